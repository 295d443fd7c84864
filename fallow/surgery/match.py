"""Which residual sites the modules of a model mask that drop paths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fallow.surgery import probe
from fallow.surgery.find import find
from fallow.surgery.flow import REARRANGING, Flow, base_name
from fallow.surgery.found import Branch
from fallow.surgery.trace import Call, Op, Trace

_CARRIES = REARRANGING - {"cat", "stack"}


def match(model: nn.Module, example: Any, modes: Mapping[nn.Module, str]) -> dict[nn.Module, list[str] | str]:
    """The sites whose branch each module masks, one for each call; a reason where it is not so.

    A module masks a site where what it is given reaches the residual sum, by views and constant factors
    alone, as the branch: masking the one is then masking the other. The probe is that of `sites`, so names
    agree; the modules must be the identity while it runs.

    Args:
        model: with the modules in it; left as it was.
        example: as in `sites`.
        modes: the modules, each with how it masks: "row" or "batch".

    Raises:
        SiteError: the model cannot run the example.
        ArgumentError: example is nothing that a model takes.
    """
    args, kwargs = probe.arguments(example)
    with probe.undisturbed(model), probe.by_modules():
        trace, _, known = probe.traces(model, args, kwargs)
    branches = find(trace)[0]
    finder = _Matcher(trace, branches, known)
    calls: dict[nn.Module, list[Call]] = {module: [] for module in modes}
    for call in trace.calls:
        if call.module in calls:
            calls[call.module].append(call)
    verdicts = {module: finder.sites(calls[module], mode) for module, mode in modes.items()}
    return _apart(verdicts, branches)


class _Matcher:
    def __init__(self, trace: Trace, branches: list[Branch], known: bool) -> None:
        self.trace, self.flow, self.known = trace, Flow(trace), known
        self.ends = {trace.ops[b.sum_op].inputs[b.branch_at]: b for b in branches}

    def sites(self, calls: list[Call], mode: str) -> list[str] | str:
        """The sites of a module's calls, or why it masks none."""
        if not calls:
            return "the example does not call it"
        names = []
        for call in calls:
            value = next(iter(call.inputs.values()), None)
            if value is None:
                return "it is called without a tensor"
            if mode == "row" and not (self.known and self.trace.batch.get(value) == 0):
                return "what it masks does not have the batch's rows"
            branch = self._branch(value)
            if branch is None:
                return "what it masks is not the branch of a residual sum"
            names.append(branch.name)
        return names

    def _branch(self, value: int) -> Branch | None:
        """The branch that ends in the value, or in it rearranged and times constants.

        That nothing else reads what lies between is for the sites: a branch with such a value is none.
        """
        todo = [value]
        while todo:
            at = todo.pop()
            if at in self.ends:
                return self.ends[at]
            for reader in self.trace.values[at].readers:
                op = self.trace.ops[reader]
                todo += op.outputs if self._carries(op) else []
        return None

    def _carries(self, op: Op) -> bool:
        return base_name(op) in _CARRIES or self.flow.constant_factor(op)


def _apart(
    verdicts: dict[nn.Module, list[str] | str], branches: list[Branch]
) -> dict[nn.Module, list[str] | str]:
    """No site twice, and none around another: of these the inner ones rest."""
    by_name = {b.name: b for b in branches}
    taken: set[str] = set()
    out: dict[nn.Module, list[str] | str] = {}
    # inner sums come first
    for module, names in sorted(verdicts.items(), key=lambda v: _order(v[1], by_name)):
        out[module] = names
        if isinstance(names, str):
            continue
        if len(set(names)) < len(names) or taken & set(names):
            out[module] = "its branch is masked twice"
        elif any(by_name[t].sum_op in by_name[n].ops for n in names for t in taken):
            out[module] = "other branches that rest lie inside its own"
        else:
            taken |= set(names)
    return out


def _order(names: list[str] | str, by_name: Mapping[str, Branch]) -> int:
    return -1 if isinstance(names, str) else max(by_name[n].sum_op for n in names)

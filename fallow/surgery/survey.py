"""Survey a model: what can rest in it, chosen, grouped and proved."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from fallow.errors import ArgumentError, SiteError, nearest
from fallow.rows import Selection
from fallow.surgery import probe, prove
from fallow.surgery.branch import BranchState, branch_state
from fallow.surgery.decide import Options
from fallow.surgery.find import find
from fallow.surgery.found import Branch, Refused
from fallow.surgery.handle import Handle
from fallow.surgery.site import Site, Sites
from fallow.surgery.trace import Trace


@dataclass
class Survey:
    """What a model was found to hold."""

    branches: dict[str, list[Branch]]  # site -> its branches
    sites: Sites


def survey(
    model: nn.Module,
    example: Any,
    granularity: str,
    include: tuple[str, ...] | None,
    exclude: tuple[str, ...] | None,
    named: tuple[str, ...] = (),
) -> Survey:
    """Find, choose and prove; ``named`` may name ambiguous sites. The model is left as it was."""
    args, kwargs = probe.arguments(example)
    with probe.undisturbed(model), probe.by_modules():
        trace, training, batch_known = probe.traces(model, args, kwargs)
        if (where := probe.dropping(training, model)) is not None:
            raise SiteError(
                f"{where} drops paths already; two such noises would multiply. Switch it off (drop_prob=0, "
                "drop_path_rate=0, layerdrop=0) before fallow.apply."
            )
        found, refused = find(trace)
        dense = sum(op.flops for op in trace.ops)
        branches = _chosen(_unshared(found, trace, refused), granularity, include, exclude, named)
        why = _proved(model, branches, probe.tiled(args, kwargs, probe.ROWS[0]), batch_known)
    refused += [Refused(b.name, why["batch"][b.name]) for b in branches if b.name in why["batch"]]
    good = [b for b in branches if b.name not in why["batch"]]
    taken = {b.name for b in branches}
    ambiguous = [Refused(b.name, b.ambiguous) for b in found if b.ambiguous and b.name not in taken]
    groups = _groups(good, granularity)
    table = [_site(name, group, why["row"], dense) for name, group in groups.items()]
    return Survey(groups, Sites(table, ambiguous, refused))


def patterns(given: str | Iterable[str] | None) -> tuple[str, ...] | None:
    """Names or patterns as a tuple; one alone stands for itself."""
    if given is None:
        return None
    found = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Iterable) else (given,)
    for pattern in found:
        if not isinstance(pattern, str):
            raise ArgumentError(f"include and exclude take site names or patterns of them, got {pattern!r}")
    return found


def refuse_unmatched(
    names: list[str], include: tuple[str, ...] | None, exclude: tuple[str, ...] | None
) -> None:
    """Refuse a pattern that matches no name."""
    for pattern in (*(include or ()), *(exclude or ())):
        if not any(fnmatchcase(n, pattern) for n in names):
            close = nearest(pattern, names)
            raise SiteError(f"no site matches {pattern!r}" + (f"; did you mean {close!r}?" if close else "."))


def matches(name: str, include: tuple[str, ...] | None, exclude: tuple[str, ...] | None) -> bool:
    """Whether the patterns take a name; no ``include`` takes all."""
    if any(fnmatchcase(name, p) for p in exclude or ()):
        return False
    return include is None or any(fnmatchcase(name, p) for p in include)


def _unshared(branches: list[Branch], trace: Trace, refused: list[Refused]) -> list[Branch]:
    """Leave out branches whose modules are called more than once in a forward (shared weights)."""
    calls = trace.times_called()
    kept = []
    for b in branches:
        shared = [r.module for r in b.roles if calls[r.module] > 1]
        if shared:
            times = calls[shared[0]]
            refused.append(Refused(b.name, f"its module {shared[0]} is called {times} times in one forward"))
        else:
            kept.append(b)
    return kept


def _chosen(
    branches: list[Branch],
    granularity: str,
    include: tuple[str, ...] | None,
    exclude: tuple[str, ...] | None,
    named: tuple[str, ...],
) -> list[Branch]:
    def site(b: Branch) -> str:
        return _block_name(b, branches) if granularity == "block" else b.name

    names = [site(b) for b in branches]
    refuse_unmatched(names, include, exclude)

    def wanted(b: Branch) -> bool:
        name = site(b)
        if b.ambiguous:  # a wildcard does not name it
            return matches(name, None, exclude) and (name in named or name in (include or ()))
        return matches(name, include, exclude)

    chosen = [b for b in branches if wanted(b)]
    return [b for b in chosen if not _gives_way(b, chosen, (*named, *(include or ())))]


def _gives_way(branch: Branch, chosen: list[Branch], named: tuple[str, ...]) -> bool:
    """Whether a site is left out because one around it or inside it was asked for by name."""
    around = [o for o in chosen if branch.sum_op in o.ops or o.sum_op in branch.ops]
    rival = next((o for o in around if o.name in named), None)
    if rival is not None and (branch.name in named or rival.ambiguous == branch.ambiguous):
        raise SiteError(
            f"{branch.name} and {rival.name}: one is inside the branch of the other; take one of them"
        )
    return rival is not None


def _block_name(branch: Branch, branches: list[Branch]) -> str:
    """The outermost block of a site that holds this one; flat models have no blocks beyond the branch."""
    around = [
        o.block
        for o in branches
        if o.block and not o.ambiguous and (branch.block == o.block or branch.block.startswith(o.block + "."))
    ]
    return min(around, key=len) if around else branch.name


def _groups(branches: list[Branch], granularity: str) -> dict[str, list[Branch]]:
    groups: dict[str, list[Branch]] = {}
    for b in branches:
        groups.setdefault(_block_name(b, branches) if granularity == "block" else b.name, []).append(b)
    return groups


def _site(name: str, group: list[Branch], row: dict[str, str], dense: int) -> Site:
    reasons = [row[b.name] for b in group if b.name in row]
    kind = "transition" if any(b.kind == "transition" for b in group) else "identity"
    return Site(
        name=name,
        kind=kind,
        cost=sum(b.flops for b in group) / dense if dense else 0.0,
        block=group[0].block,
        modules=tuple(r.module for b in group for r in b.roles),
        modes=("batch",) if reasons else ("batch", "row"),
        why_not_row=reasons[0] if reasons else "",
    )


# --- the proof ------------------------------------------------------------------------------------------


def _proved(
    model: nn.Module, branches: list[Branch], tiled: tuple, batch_known: bool
) -> dict[str, dict[str, str]]:
    """Mode -> branch -> why it cannot rest so."""
    why: dict[str, dict[str, str]] = {"batch": {}, "row": {}}
    if not branches:
        return why
    found = {b.name: [b] for b in branches}
    table = [Site(b.name, b.kind, 0.0, b.block, ()) for b in branches]
    handle = Handle(model, table, found, bind(model, found), Options())
    model.eval()
    with probe.no_silent_parameters(model):
        try:
            handle.set_rates(dict.fromkeys(found, 0.5))
            for parity in (0, 1):
                _until_right(model, handle, branches, tiled, why["batch"], "batch", parity)
            why["row"].update(why["batch"])
            for b in branches:
                if b.dim is None or not batch_known:
                    why["row"].setdefault(b.name, "its sum has no one dimension that is the batch")
            for parity in (0, 1):
                _until_right(model, handle, branches, tiled, why["row"], "row", parity)
        finally:
            handle.remove()
    return why


def _until_right(model, handle, branches, tiled, why: dict[str, str], mode: str, parity: int) -> None:
    """Check all branches together; set aside the first that differs and check again.

    Rounding differs with the number of rows and adds up over a deep model, so one that differs in company is
    checked alone before it is refused.
    """
    cleared: set[str] = set()
    while True:
        able = [b for b in branches if b.name not in why]
        plan = _plan(able, mode, parity)
        verdict = prove.check(model, handle, [b for b in able if b.name not in cleared], tiled, plan)
        if not verdict:
            return
        name = verdict[0]
        if mode == "batch" and _fewer_inner_sums(handle, branches, name):
            continue
        alone = [b for b in able if b.name == name]
        if name in plan and not prove.check(model, handle, alone, tiled, {name: plan[name]}):
            cleared.add(name)
        else:
            why[name] = verdict[1]


def _plan(branches: list[Branch], mode: str, parity: int) -> dict[str, Selection | None]:
    """Who rests: every other branch; or rows of all, in windows of all sizes and places, or scattered."""
    if mode == "batch":
        return {b.name: None for b in branches[parity::2]}
    total = probe.ROWS[0]
    if parity:
        return {b.name: Selection(total, 2, index=torch.tensor([i % 2, 3])) for i, b in enumerate(branches)}
    return {b.name: Selection(total, 1 + i % 3, i % total) for i, b in enumerate(branches)}


def _fewer_inner_sums(handle: Handle, branches: list[Branch], name: str) -> bool:
    """Try again with one inner sum less: the trace also counts those inside torch's own compositions."""
    branch = next(b for b in branches if b.name == name)
    if branch.inner_sums == 0:
        return False
    branch.inner_sums -= 1
    for state in handle.branches(name):
        state.inner_sums = branch.inner_sums
    return True


def bind(model: nn.Module, groups: dict[str, list[Branch]]) -> dict[str, list[BranchState]]:
    """The branches of each site, bound to the model's modules and numbered in the order they run."""
    sums = sorted(b.sum_op for group in groups.values() for b in group)
    return {
        site: [branch_state(model, b, site, sums.index(b.sum_op)) for b in group]
        for site, group in groups.items()
    }

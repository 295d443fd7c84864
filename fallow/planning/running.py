"""Sensitivities from the gradients of training itself: no forward and no backward beyond those of the steps.

While a site's branch runs, the gradient at its residual sum passes by anyway; its inner product with the
branch's output is the gate gradient of each row. Each step watches an eighth of the sites on a quarter of
their rows, those seen least first, so that the outputs kept until the backward and the products weigh next to
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fallow.errors import SiteError, UsageError
from fallow.planning.sensitivity import row_products
from fallow.rows import Selection, take
from fallow.surgery import Handle
from fallow.surgery.branch import Run
from fallow.surgery.decide import world
from fallow.surgery.draws import Draw

_SITES = 8  # one in so many sites is watched in a step
_ROWS = 4  # on one in so many of its rows


class RunningSensitivities:
    """Running sensitivities of an applied model, taken from its training steps.

    Formula: ``S_l`` is the mean of ``|<d loss_i / d y_l, f_li>|`` over the rows i watched since the last
    `update`, then an exponential moving average over updates.

    Args:
        handle: of the model in training; it is observed from now on, sites at rate 1 included.
        decay: weight of the earlier average at an update, in [0, 1).

    Estimator:
        Of the sensitivities under the training noise ("absolute" reduction, masks averaged, batch
        statistics), not of the full network in eval mode that `fallow.plan` measures: they rank alike and
        differ in size. A site whose batch dimension is not known has the batch's total as its one number, as
        there. The loss is taken for a mean over the batch; a loss scaler that changes its scale in
        between distorts the sizes of sites watched before and after.

    References:
        Derived, D23 and 8.3 (1).
    """

    def __init__(self, handle: Handle, *, decay: float = 0.5) -> None:
        if not isinstance(decay, (int, float)) or not 0 <= decay < 1:
            raise UsageError(f"decay must be in [0, 1), got {decay!r}")
        self.handle, self.decay = handle, decay
        names = [site.name for site in handle.sites]
        self._parts = {name: len(handle.branches(name)) for name in names}
        self._whole = {name for name in names if any(b.dim is None for b in handle.branches(name))}
        self._seen = dict.fromkeys(names, 0)  # rows
        self._sums: dict[str, Tensor | float] = dict.fromkeys(names, 0.0)
        self._average: dict[str, float] = {}
        self._draw, self._chosen = -1, set[str]()
        self._pending: dict[tuple[int, str], list[Tensor]] = {}
        handle.observe(self._see)

    @property
    def rows(self) -> dict[str, int]:
        """Rows watched since the last update, by site."""
        return dict(self._seen)

    def stop(self) -> None:
        """Stop observing."""
        self.handle.observe(None)

    def update(self) -> dict[str, float] | None:
        """Take what was seen into the average and return it by site; None while a site was never seen.

        Processes that train together all call it; what each saw is added up, so that they go on alike.
        """
        for name, (total, seen) in self._together().items():
            if seen:
                mean = total / seen
                before = self._average.get(name, mean)
                self._average[name] = self.decay * before + (1 - self.decay) * mean
            self._seen[name], self._sums[name] = 0, 0.0
        if len(self._average) < len(self._seen):
            return None
        return {name: self._average[name] for name in self._seen}

    def _together(self) -> dict[str, tuple[float, float]]:
        """Sum and rows by site, over all processes."""
        table = torch.tensor(
            [(float(self._sums[n]), float(k)) for n, k in self._seen.items()], dtype=torch.float64
        )
        if world() > 1:
            device = next((p.device for p in self.handle.model.parameters()), table.device)
            table = table.to(device)
            torch.distributed.all_reduce(table)
        return {name: (total, seen) for name, (total, seen) in zip(self._seen, table.tolist(), strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, in plain numbers."""
        return {
            "seen": dict(self._seen),
            "sums": {name: float(total) for name, total in self._sums.items()},
            "average": dict(self._average),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            UsageError: it is not what `state_dict` gave.
            SiteError: the state is of a model with other sites.
        """
        fields = ("seen", "sums", "average")
        if not isinstance(state, Mapping) or not all(isinstance(state.get(f), Mapping) for f in fields):
            raise UsageError(
                f"running sensitivities go on from {', '.join(fields)} by site: pass what state_dict() gave"
            )
        if set(state["seen"]) != set(self._seen):
            raise SiteError("the running sensitivities are of a model with other sites")
        self._seen = {name: int(state["seen"][name]) for name in self._seen}
        self._sums = {name: float(state["sums"][name]) for name in self._seen}
        self._average = {
            name: float(state["average"][name]) for name in self._seen if name in state["average"]
        }
        self._draw, self._chosen, self._pending = -1, set(), {}

    # --- in a step --------------------------------------------------------------------------------------
    def _see(self, run: Run, draw: Draw) -> None:
        if draw.index != self._draw:
            self._draw, self._chosen = draw.index, self._choose(draw)
            self._pending.clear()  # of forwards that had no backward
        if run.branch.site in self._chosen:
            run.watch = self._watch

    def _choose(self, draw: Draw) -> set[str]:
        """The sites seen least, of those that run."""
        running = [name for name in self._seen if draw.kept.get(name, True)]
        running.sort(key=lambda name: self._seen[name])
        return set(running[: -(-len(self._seen) // _SITES)])

    def _watch(self, run: Run, _shortcut: Tensor, value: Tensor | None, out: Tensor) -> None:
        if value is None or not out.requires_grad:
            return
        dim, site, key = run.dim, run.branch.site, (self._draw, run.branch.site)
        total, kept = out.shape[dim], value.shape[dim]
        count = -(-kept // _ROWS)
        whole = site in self._whole  # which of the numbers belong to a sample is not known
        few = value.detach() if whole else value.detach().narrow(dim, 0, count).clone()
        head = _head(run.selection, total, count)

        def collect(grad: Tensor) -> None:
            parts = self._pending.setdefault(key, [])
            if whole:
                parts.append(row_products(grad.detach(), few, None).expand(count))
            else:
                parts.append(row_products(take(grad.detach(), head, dim), few, dim) * total)
            if len(parts) == self._parts[site]:
                rows = torch.stack(self._pending.pop(key)).sum(0)
                self._sums[site] = self._sums[site] + rows.double().abs().sum()
                self._seen[site] += count

        out.register_hook(collect)


def _head(selection: Selection | None, total: int, count: int) -> Selection:
    """The first ``count`` of the kept rows."""
    if selection is None:
        return Selection(total, count)
    if selection.index is not None:
        return Selection(total, count, index=selection.index[:count])
    return Selection(total, count, selection.start)

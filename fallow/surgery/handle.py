"""The handle of an applied model: its rates, draws, report, and the way back."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fallow import masks, rates, schedules
from fallow.errors import RateError, RunError, UsageError
from fallow.rows import Selection, select_mask
from fallow.surgery import gate
from fallow.surgery.branch import BranchState, Run
from fallow.surgery.draws import Draw, DrawBook, RootEnter, RootLeave, in_backward
from fallow.surgery.find import Branch
from fallow.surgery.report import Report, SiteRow
from fallow.surgery.site import Site

_ATTRIBUTE = "_fallow_handle"


@dataclass(frozen=True)
class Options:
    """How draws are made; see `fallow.apply`."""

    mode: str = "batch"
    sampler: str = "bernoulli"
    scale: str = "train"
    grads: str = "none"
    ranks: str = "same"
    rows: str = "window"
    seed: int = 0


class Handle:
    """Controls the stochastic depth of one applied model; made by `fallow.apply`.

    Attributes:
        sites: the sites in order, rate 1 included.
        rates: asked survival rate of each site, before the schedule.
        options: mode, sampler, scale, grads, ranks, rows, seed.
        schedule: how the rates move over training time; None: constant.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: list[Site],
        found: dict[str, list[Branch]],
        states: dict[str, list[BranchState]],
        options: Options,
        schedule: Any = None,
    ) -> None:
        self.model, self.sites, self.options, self.schedule = model, sites, options, schedule
        self.rates: dict[str, float] = dict.fromkeys((s.name for s in sites), 1.0)
        self._states = states
        modules = dict(model.named_modules())
        self._gates: dict[str, list[tuple[nn.Module, gate.Gate]]] = {}
        for name, branches in found.items():
            self._gates[name] = []
            for branch, state in zip(branches, states[name], strict=True):
                entries = [r for r in branch.roles if r.entry]
                for role in branch.roles:
                    made = gate.Gate(self, state, role, first=bool(entries) and role is entries[0])
                    self._gates[name].append((modules[role.module], made))
        self._found = found
        self._keys = {s.name: masks.site_key(s.name) for s in sites}
        self._book = DrawBook()
        self._dense = False
        self._probe: Any = None  # decides instead of a draw while the model is being proved
        self._time: int | None = None  # set by `step`
        self._optimizer_steps = 0
        self._installed: set[str] = set()
        self._spent = False
        self._stats: dict[str, list[float]] = {s.name: [0, 0.0] for s in sites}  # forwards, kept share
        self._zeros_seen = False
        self._checked_batches: set[int] = set()
        self._hooks: list[Any] = []

    # --- rates and time ----------------------------------------------------------------------------
    def set_rates(self, new: Any) -> None:
        """Change the survival rates: a rule, a mapping site name -> rate (others 1), or a plan.

        Raises:
            RateError: a rate outside (0, 1].
            SiteError: an unknown site, with the nearest name.
        """
        self._alive()
        self.rates = rates.resolve(new, self.costs)
        wanted = {name for name, p in self.rates.items() if p < 1}
        for name in wanted - self._installed:
            for module, made in self._gates[name]:
                gate.install(module, made)
        for name in self._installed - wanted:
            for module, _ in self._gates[name]:
                gate.uninstall(module)
        self._installed = wanted
        self._stats = {name: [0, 0.0] for name in self.rates}

    @property
    def costs(self) -> dict[str, float]:
        """Share of a dense training step's FLOPs that each site's branch takes."""
        return {s.name: s.cost for s in self.sites}

    @property
    def current_rates(self) -> dict[str, float]:
        """Survival rates in force now, the schedule applied."""
        return {name: schedules.rate_at(p, self.schedule, self.time) for name, p in self.rates.items()}

    @property
    def expected_cost(self) -> float:
        """Expected share of the dense FLOPs of a whole training step: ``1 - sum c_l (1 - p_l)``."""
        return rates.expected_cost(self.rates, self.costs)

    @property
    def expected_depth(self) -> float:
        """Expected number of branches that run: ``sum p_l``."""
        return sum(self.rates.values())

    @property
    def time(self) -> int:
        """Where the schedule stands: steps set by `step`, else optimiser steps where known, else forwards."""
        if self._time is not None:
            return self._time
        return self._optimizer_steps or self._book.count

    def step(self, n: int | None = None) -> None:
        """Set the schedule's time to ``n`` optimiser steps; without ``n``, advance it by one."""
        self._time = self.time + 1 if n is None else int(n)

    @property
    def draw(self) -> int:
        """Draws made so far."""
        return self._book.count

    # --- what a forward does -------------------------------------------------------------------------
    def begin(self, branch: BranchState, entry: tuple[Tensor, int], first: bool) -> Run | None:
        """Decide what one branch does in the forward under way; None: run as if untouched."""
        if not first and branch.run is not None:
            return branch.run
        branch.run = self._decide(branch, entry)
        return branch.run

    def _decide(self, branch: BranchState, entry: tuple[Tensor, int]) -> Run | None:
        if self._probe is not None:
            return self._probe(branch, entry)
        rate = schedules.rate_at(self.rates[branch.site], self.schedule, self.time)
        if self._dense or not branch.block.training:
            return Run(branch, rate, None, False) if self.options.scale == "eval" and rate < 1 else None
        draw = self._draw(branch, entry[0])
        selection, rested = None, False
        if self.options.mode == "batch":
            rested = not draw.kept.get(branch.site, True)
            share = 0.0 if rested else 1.0
        else:
            selection = self._rows(draw, branch, entry[0].shape[entry[1]], rate)
            share, rested = selection.count / selection.total, selection.count == 0
            if selection.count == selection.total:
                selection = None
        if not in_backward():
            self._count(draw, branch, share)
        scale = 1 / rate if self.options.scale == "train" else 1.0
        zeros = branch.trainable() if rested and self.options.grads == "zero" else []
        if rested and self.options.grads == "none" and not self._zeros_seen:
            self._look_for_zeros(branch)
        return Run(branch, scale, None if rested else selection, rested, zeros)

    def _draw(self, branch: BranchState, x: Tensor) -> Draw:
        book = self._book
        if in_backward():
            return book.recall(x, branch.name) or self._new_draw()
        if book.depth == 0:
            if book.held:
                draw = book.current or book.loose
                if draw is not None:
                    return draw
            if book.loose is None or branch.order <= book.loose.reached or book.loose.index < book.count - 1:
                book.loose = book.begin(self._new_draw())
            book.loose.reached = branch.order
            book.current = draw = book.loose
        else:
            draw = book.current
            assert draw is not None
        book.remember(x, draw)
        return draw

    def _new_draw(self) -> Draw:
        self._refuse_unreduced()
        index, o = self._book.count, self.options
        draw = Draw(index)
        if o.mode == "batch":
            now = self.current_rates
            sample = masks.batch_exact if o.sampler == "exact" else masks.batch_bernoulli
            rank = _rank() if o.ranks == "independent" else 0
            kept = sample(list(now.values()), [self._keys[n] for n in now], o.seed, index, rank)
            draw.kept = dict(zip(now, kept, strict=True))
        return draw

    def _rows(self, draw: Draw, branch: BranchState, total: int, rate: float) -> Selection:
        known = draw.rows.get((branch.site, total))
        if known is not None:
            return known
        o, key, rank = self.options, self._keys[branch.site], _rank()
        if total not in self._checked_batches:
            self._check_norms(total)
        if o.sampler == "bernoulli":
            selection = select_mask(masks.row_bernoulli(rate, key, o.seed, draw.index, rank * total, total))
        elif o.rows == "scattered":
            index = masks.row_exact_scattered(rate, total, key, o.seed, draw.index, rank)
            selection = Selection(total, index.numel(), index=index)
        else:
            count, start = masks.row_exact(rate, total, key, o.seed, draw.index, rank)
            selection = Selection(total, count, start)
        draw.rows[branch.site, total] = selection
        return selection

    def _count(self, draw: Draw, branch: BranchState, share: float) -> None:
        if branch.site not in draw.share:
            stats = self._stats[branch.site]
            stats[0] += 1
            stats[1] += share
        draw.share[branch.site] = share

    # --- refusals at run time -------------------------------------------------------------------------
    def _check_norms(self, total: int) -> None:
        """Refuse a batch size at which BatchNorm could be left with one value, before it happens."""
        for states in self._states.values():
            for state in states:
                rate = self.current_rates[state.site]
                if rate == 1:
                    continue
                floor = int(rate * total + 1e-9) if self.options.sampler == "exact" else 1
                for module, per_row in state.norms:
                    if module.training and max(1, floor) * per_row < 2:
                        raise RateError(
                            f"{state.name}: at batch size {total} and survival rate {rate:g} as few as "
                            f"{max(1, floor)} row may be kept, too few values for BatchNorm to train on. Take a "
                            'larger batch or a higher rate, sampler="exact", or mode="batch".'
                        )
        self._checked_batches.add(total)

    def _refuse_unreduced(self) -> None:
        if self.options.grads == "none" and _world() > 1:
            raise UsageError(
                f'grads="none" with {_world()} processes: a branch that rests leaves its parameters without '
                "gradients, and plain DistributedDataParallel then steps on gradients it never reduced. Pass "
                'grads="zero" to apply: the zeros arrive through the graph and every gradient is reduced.'
            )

    def _look_for_zeros(self, branch: BranchState) -> None:
        p = min(branch.trainable(), key=Tensor.numel, default=None)
        if p is not None and p.grad is not None and self._book.count <= 100:
            self._zeros_seen = not bool(p.grad.any())

    # --- contexts --------------------------------------------------------------------------------------
    @contextmanager
    def hold(self) -> Iterator[None]:
        """Repeat the current masks in every forward inside (SAM, consistency losses)."""
        before, self._book.held = self._book.held, True
        try:
            yield
        finally:
            self._book.held = before

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Switch all noise off inside: every branch runs, scaled as at evaluation."""
        before, self._dense = self._dense, True
        try:
            yield
        finally:
            self._dense = before

    def masks(self) -> dict[str, Tensor]:
        """Masks of the latest draw by site, True = kept: one element in batch mode, one a row in row mode."""
        draw = self._book.current
        if draw is None:
            return {}
        if self.options.mode == "batch":
            return {name: torch.tensor(kept) for name, kept in draw.kept.items()}
        return {name: selection.mask() for (name, _), selection in draw.rows.items()}

    # --- what happened -----------------------------------------------------------------------------------
    @property
    def last_depth(self) -> float:
        """Realised depth of the latest training forward: kept shares summed over the sites."""
        return sum(self._last_shares().values())

    @property
    def last_cost(self) -> float:
        """Realised share of the dense step's FLOPs in the latest training forward."""
        return rates.expected_cost(self._last_shares(), self.costs)

    def _last_shares(self) -> dict[str, float]:
        draw = self._book.current
        share = draw.share if draw is not None else {}
        return {name: share.get(name, 1.0) for name in self.rates}

    def report(self) -> Report:
        """Asked and realised rates, depth and cost share so far; prints as a table."""
        rows = []
        for site in self.sites:
            forwards, kept = self._stats[site.name]
            realised = kept / forwards if forwards else None
            asked = self.rates[site.name]
            rows.append(SiteRow(site.name, site.kind, site.cost, asked, 1.0 if asked == 1 else realised))
        return Report(tuple(rows), self.draw, self.options.mode, self.options.sampler, self._notes())

    def metrics(self) -> dict[str, float]:
        """The report as a flat dict for loggers."""
        return self.report().as_dict()

    def _notes(self) -> tuple[str, ...]:
        notes = []
        if self._zeros_seen:
            notes.append(
                'gradients of rested branches are zeros, not None (zero_grad(set_to_none=False)?): grads="none" '
                'acts as grads="zero", and weight decay and momentum still move what rests'
            )
        if (
            self.options.mode == "row"
            and self.options.sampler == "bernoulli"
            and self.options.rows == "window"
        ):
            notes.append('independent row draws are scattered: a window needs sampler="exact"')
        return tuple(notes)

    # --- state -------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Rates, schedule, draw, seed and time: what a resumed run needs to draw as the first would have."""
        schedule = None if self.schedule is None else schedules.to_dict(self.schedule)
        state = {"rates": dict(self.rates), "schedule": schedule, "draw": self._book.count}
        stats = {name: list(s) for name, s in self._stats.items()}
        times = {"time": self._time, "optimizer_steps": self._optimizer_steps}
        return {**state, "seed": self.options.seed, **times, "stats": stats}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            UsageError: fields are missing.
            SiteError: the state is of a model with other sites.
        """
        missing = {"rates", "schedule", "draw", "seed"} - set(state)
        if missing:
            raise UsageError(
                f"the handle's state lacks {', '.join(sorted(missing))}; pass what state_dict() gave"
            )
        self.set_rates(state["rates"])
        self.schedule = None if state["schedule"] is None else schedules.from_dict(state["schedule"])
        self.options = Options(**{**self.options.__dict__, "seed": int(state["seed"])})
        self._book.count, self._book.loose, self._book.current = int(state["draw"]), None, None
        self._time, self._optimizer_steps = state.get("time"), int(state.get("optimizer_steps", 0))
        self._stats.update({k: list(v) for k, v in state.get("stats", {}).items() if k in self._stats})

    # --- the way back --------------------------------------------------------------------------------------
    def remove(self) -> None:
        """Take everything off the model again; it is as before `apply`, trained weights aside."""
        for name in self._installed:
            for module, _ in self._gates[name]:
                gate.uninstall(module)
        self._installed = set()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self.model.__dict__.get(_ATTRIBUTE) is self:
            del self.model.__dict__[_ATTRIBUTE]
        self._spent = True

    def fold(self) -> nn.Module:
        """Multiply each survival rate into its branch's last affine map; a plain model remains.

        For ``scale="eval"`` alone: there the network at evaluation is ``x + p f(x)``, and the fold makes it
        ``x + f'(x)`` for export. It spends the handle.

        Raises:
            UsageError: ``scale="train"``, whose network at evaluation has no factor to fold.
            SiteError: a branch without an affine end; nothing is changed then.
        """
        from fallow.surgery.fold import fold

        self._alive()
        if self.options.scale != "eval":
            raise UsageError(
                'fold is for scale="eval"; with scale="train" evaluation has no factor: call remove()'
            )
        fold(self.model, self._found, self.current_rates)
        self.remove()
        return self.model

    def recalibrate(self, batches: Iterable[Any]) -> None:
        """Re-estimate BatchNorm statistics for the network at evaluation, as averages over the batches.

        In training a branch's BatchNorm sees rested inputs, at evaluation every branch runs. Statistics are
        reset and averaged with equal weight per batch; nothing else of the model changes.

        Args:
            batches: inputs, or (inputs, target) pairs as training loops have them; inputs are a tensor, a
                tuple of positional arguments or a dict of keyword arguments.

        Raises:
            UsageError: no batch came.
        """
        from fallow.surgery.recalibrate import recalibrate

        self._alive()
        with self.dense():
            recalibrate(self.model, batches)

    def _alive(self) -> None:
        if self._spent:
            raise RunError("this handle is spent: its model was folded or restored; call fallow.apply again")

    def attach(self) -> None:
        """Hook the root and become the model's handle."""
        add, leave = self.model.register_forward_pre_hook, self.model.register_forward_hook
        self._hooks = [
            add(RootEnter(self), with_kwargs=True, prepend=True),
            leave(RootLeave(self), always_call=True),
        ]
        self.model.__dict__[_ATTRIBUTE] = self
        if self.schedule is not None:
            self._hooks.append(_count_optimizer_steps(self))

    def __getstate__(self) -> dict[str, Any]:
        """Copies count their own forwards: an optimiser steps the original's parameters."""
        keep = [h for h in self._hooks if not getattr(h, "fallow_global", False)]
        return {**self.__dict__, "_hooks": keep, "_probe": None}

    def __repr__(self) -> str:
        """One line."""
        o = self.options
        return (
            f"Handle({len(self.sites)} sites, mode={o.mode!r}, sampler={o.sampler!r}, scale={o.scale!r}, "
            f"expected cost {self.expected_cost:.3f}, draw {self.draw})"
        )


class _OptimizerHook:
    """Counts the steps of optimisers that hold the model's parameters, and can be removed."""

    fallow_global = True

    def __init__(self, handle: Handle) -> None:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self.handle = weakref.ref(handle)
        self.hook = register_optimizer_step_post_hook(self)

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        handle = self.handle()
        if handle is None:
            return self.hook.remove()
        own = {id(p) for p in handle.model.parameters()}
        if any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            handle._optimizer_steps += 1

    def remove(self) -> None:
        self.hook.remove()


def _count_optimizer_steps(handle: Handle) -> _OptimizerHook:
    return _OptimizerHook(handle)


def _world() -> int:
    d = torch.distributed
    return d.get_world_size() if d.is_available() and d.is_initialized() else 1


def _rank() -> int:
    return torch.distributed.get_rank() if _world() > 1 else 0


def handle_of(model: nn.Module) -> Handle | None:
    """The handle of an applied model or of a copy of one (EMA, SWA, unpickled); None where there is none.

    A wrapper (AveragedModel, DistributedDataParallel) is looked into.
    """
    for module in model.modules():
        handle = module.__dict__.get(_ATTRIBUTE)
        if handle is not None:
            return handle
    return None

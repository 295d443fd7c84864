"""The handle of an applied model: its rates, draws, report, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fallow import rates, schedules
from fallow.errors import RunError, SiteError, UsageError, check_count
from fallow.surgery import clock as clocks
from fallow.surgery import gate
from fallow.surgery.branch import BranchState, Run
from fallow.surgery.decide import Decider, Entry, Options, check_seed
from fallow.surgery.draws import Draw
from fallow.surgery.found import Branch
from fallow.surgery.report import Report, SiteRow
from fallow.surgery.root import ENCODERS, ByModules, RootEnter, RootLeave
from fallow.surgery.site import Site

_ATTRIBUTE = "_fallow_handle"


class Handle:
    """Controls the stochastic depth of one applied model; made by `fallow.apply`.

    Attributes:
        model: the model it was applied to.
        sites: the sites in order, rate 1 included.
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
        self.model, self.sites = model, sites
        every = sorted((b for group in states.values() for b in group), key=lambda b: b.order)
        self._decider = Decider(options, (s.name for s in sites), every)
        self._decider.schedule = schedule
        self._found = found
        modules = dict(model.named_modules())
        self._gates: dict[str, list[tuple[nn.Module, gate.Gate]]] = {name: [] for name in found}
        for name, branches in found.items():
            for branch, state in zip(branches, states[name], strict=True):
                entries = [r for r in branch.roles if r.entry]
                for role in branch.roles:
                    made = gate.Gate(self._decider, state, role, first=bool(entries) and role is entries[0])
                    self._gates[name].append((modules[role.module], made))
        self._installed: set[str] = set()
        self._spent = False
        self._hooks: list[Any] = []

    @property
    def options(self) -> Options:
        """Mode, sampler, scale, grads, ranks, rows, seed."""
        return self._decider.options

    @property
    def rates(self) -> dict[str, float]:
        """Asked survival rate of each site, before the schedule."""
        return dict(self._decider.rates)

    @property
    def schedule(self) -> Any:
        """How the rates move over training time; None: constant."""
        return self._decider.schedule

    def branches(self, site: str) -> list[BranchState]:
        """The branches of a site, as they are at work."""
        return [b for b in self._decider.branches if b.site == site]

    # --- rates and time ----------------------------------------------------------------------------
    def set_rates(self, new: Any) -> None:
        """Change the survival rates: a rule, a mapping site name -> rate (others 1), or a plan.

        Raises:
            RateError: a rate outside (0, 1].
            SiteError: an unknown site, with the nearest name; one that cannot rest in this mode.
        """
        self._alive()
        asked = rates.resolve(new, self.costs)
        for site in self.sites:
            if self.options.mode not in site.modes and asked[site.name] < 1:
                raise SiteError(
                    f"{site.name}: cannot rest row by row: {site.why_not_row}. Leave it out with "
                    f'exclude="{site.name}" or at rate 1, or take mode="batch".'
                )
        self._decider.rates = asked
        self._install()
        self._decider.forget()

    def _install(self) -> None:
        """Gates on what can rest, and on every site while the model is observed."""
        everything = self._decider.observer is not None
        wanted = {name for name, p in self._decider.rates.items() if p < 1 or everything}
        for name in wanted - self._installed:
            for module, made in self._gates[name]:
                gate.install(module, made)
        for name in self._installed - wanted:
            for module, _ in self._gates[name]:
                gate.uninstall(module)
        self._installed = wanted

    @property
    def costs(self) -> dict[str, float]:
        """Share of a dense training step's FLOPs that each site's branch takes."""
        return {s.name: s.cost for s in self.sites}

    @property
    def current_rates(self) -> dict[str, float]:
        """Survival rates in force now, the schedule applied."""
        return {name: self._decider.rate(name) for name in self._decider.rates}

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
        return self._decider.time

    def step(self, n: int | None = None) -> None:
        """Set the schedule's time to ``n`` optimiser steps; without ``n``, to the number of such calls.

        Raises:
            RateError: ``n`` is not a whole number from 0 on.
        """
        clock = self._decider.clock
        clock.set = (clock.set or 0) + 1 if n is None else check_count("step: n", n)

    @property
    def draw(self) -> int:
        """Draws made so far."""
        return self._decider.book.count

    def observe(self, observer: Callable[[Run, Draw], None] | None) -> None:
        """Show each branch that runs in a training forward, and the forward's draw, to ``observer``.

        It may set the run's ``watch``. One at a time; None takes it off. Copies are not observed.
        """
        self._alive()
        self._decider.observer = observer
        self._install()

    # --- contexts --------------------------------------------------------------------------------------
    @contextmanager
    def hold(self) -> Iterator[None]:
        """Repeat the current masks in every forward inside (SAM, consistency losses)."""
        book = self._decider.book
        before, book.held = book.held, True
        try:
            yield
        finally:
            book.held = before

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Switch all noise off inside: every branch runs, scaled as at evaluation."""
        before, self._decider.dense = self._decider.dense, True
        try:
            yield
        finally:
            self._decider.dense = before

    def masks(self) -> dict[str, Tensor]:
        """Masks of the latest draw by site, True = kept: one element in batch mode, one a row in row mode."""
        draw = self._decider.book.current
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
        draw = self._decider.book.current
        share = draw.share if draw is not None else {}
        return {name: share.get(name, 1.0) for name in self.rates}

    def report(self) -> Report:
        """Asked and realised rates, depth and cost share so far; prints as a table."""
        rows = []
        for site in self.sites:
            forwards, kept = self._decider.stats[site.name]
            realised = kept / forwards if forwards else None
            asked = self.rates[site.name]
            rows.append(SiteRow(site.name, site.kind, site.cost, asked, 1.0 if asked == 1 else realised))
        return Report(tuple(rows), self.draw, self.options.mode, self.options.sampler, self._notes())

    def metrics(self) -> dict[str, float]:
        """The report as a flat dict for loggers."""
        return self.report().as_dict()

    def _notes(self) -> tuple[str, ...]:
        notes = []
        if self._decider.zeros_seen:
            notes.append(
                "gradients of rested branches are zeros, not None: zero_grad(set_to_none=False)? "
                'grads="none" then acts as grads="zero": weight decay and momentum still move what rests'
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
        state = {"rates": dict(self.rates), "schedule": schedule, "draw": self._decider.book.count}
        stats = {name: list(s) for name, s in self._decider.stats.items()}
        times = {"time": self._decider.clock.set, "clock": self.time}
        return {**state, "seed": self.options.seed, **times, "stats": stats}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            UsageError: fields are missing or are not what `state_dict` gives.
            SiteError: the state is of a model with other sites.
        """
        if not isinstance(state, Mapping):
            raise UsageError(f"the handle's state must be what state_dict() gave, got {type(state).__name__}")
        missing = {"rates", "schedule", "draw", "seed"} - set(state)
        if missing:
            raise UsageError(
                f"the handle's state lacks {', '.join(sorted(missing))}; pass what state_dict() gave"
            )
        schedule = state["schedule"]
        if schedule is not None and not isinstance(schedule, Mapping):
            raise UsageError(f"the handle's schedule must be what state_dict() gave, got {schedule!r}")
        schedule = None if schedule is None else schedules.from_dict(schedule)
        seed, draw = check_seed(state["seed"]), check_count("the handle's draw", state["draw"])
        clock, time = check_count("the handle's clock", state.get("clock", draw)), state.get("time")
        if time is not None:
            check_count("the handle's time", time)
        seen = _checked_stats(state.get("stats", {}))
        saved = state["rates"] if isinstance(state["rates"], Mapping) else {}
        other = [n for n in saved if n not in self.rates] or [n for n in self.rates if n not in saved]
        if other:
            raise SiteError(f"the state is of a model with other sites: {other[0]} is in one of them only")
        self.set_rates(state["rates"])
        self._decider.schedule, self._decider.book.count = schedule, draw
        self._decider.options = replace(self.options, seed=seed)
        self._decider.book.current = self._decider.book.loose = None
        going = self._decider.clock
        going.start, going.draws, going.steps, going.set = clock, draw, 0, time
        self._decider.stats |= {name: pair for name, pair in seen.items() if name in self.rates}

    @contextmanager
    def deciding(self, decide: Callable[[BranchState, Entry], Run | None]) -> Iterator[None]:
        """Inside, ``decide`` says what every branch does, rate 1 included, in place of the draws."""
        self._alive()
        if self._decider.probe is not None:
            raise RunError("this model is being probed already")
        extra = self._installed.symmetric_difference(self._gates)
        for name in extra:
            for module, made in self._gates[name]:
                gate.install(module, made)
        self._decider.probe = decide
        try:
            yield
        finally:
            self._decider.probe = None
            for name in extra:
                for module, _ in self._gates[name]:
                    gate.uninstall(module)

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
        clocks.leave(self.model)
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
        add, leave = (self.model.register_forward_pre_hook, self.model.register_forward_hook)
        self._hooks = [
            add(RootEnter(self._decider), with_kwargs=True, prepend=True),
            leave(RootLeave(self._decider), always_call=True),
        ]
        encoders = [m for m in self.model.modules() if isinstance(m, ENCODERS)]
        for module in encoders if self.options.scale == "eval" else ():  # else evaluation is the plain model
            path = ByModules()
            self._hooks.append(module.register_forward_pre_hook(path.enter, prepend=True))
            self._hooks.append(module.register_forward_hook(path.leave, always_call=True))
        self.model.__dict__[_ATTRIBUTE] = self

    def __repr__(self) -> str:
        """One line."""
        o = self.options
        return (
            f"Handle({len(self.sites)} sites, mode={o.mode!r}, sampler={o.sampler!r}, scale={o.scale!r}, "
            f"expected cost {self.expected_cost:.3f}, draw {self.draw})"
        )


def _checked_stats(stats: Any) -> dict[str, list[float]]:
    """Forwards and kept shares by site, as a state has them."""
    try:
        return {str(name): [float(count), float(kept)] for name, (count, kept) in dict(stats).items()}
    except (TypeError, ValueError):
        raise UsageError(
            f"the handle's stats must be two numbers for each site, as state_dict() gives them, got {stats!r}"
        ) from None


def handle_of(model: nn.Module) -> Handle | None:
    """The handle of an applied model or of a copy of one (EMA, SWA, unpickled); None where there is none.

    A wrapper (AveragedModel, DistributedDataParallel) is looked into.
    """
    for module in model.modules():
        handle = module.__dict__.get(_ATTRIBUTE)
        if handle is not None:
            return handle
    return None

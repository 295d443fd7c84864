"""Decide what each branch does in the forward under way: the draws of one applied model, and their counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fallow import masks, schedules
from fallow.errors import RateError, UsageError
from fallow.rows import Selection, select_mask
from fallow.surgery.branch import BranchState, Run
from fallow.surgery.clock import Clock
from fallow.surgery.draws import Draw, DrawBook, in_backward

Entry = tuple[Tensor, int]  # what a branch is entered with, and its batch dimension


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


class Decider:
    """Draws for the branches of one model; gates ask it, the handle controls it."""

    def __init__(self, options: Options, names: Iterable[str], branches: list[BranchState]) -> None:
        self.options, self.branches = options, branches
        self.rates: dict[str, float] = dict.fromkeys(names, 1.0)
        self.keys = {name: masks.site_key(name) for name in self.rates}
        self.schedule: schedules.Schedule | None = None
        self.book = DrawBook()
        self.dense = False
        self.probe: Callable[[BranchState, Entry], Run | None] | None = (
            None  # decides while a model is proved or probed
        )
        self.observer: Callable[[Run, Draw], None] | None = None  # may watch what runs in training
        self.clock = Clock()
        self.stats: dict[str, list[float]] = {}  # site -> [forwards, sum of kept shares]
        self.zeros_seen, self.looked = False, 0
        self.checked: set[int] = set()
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        """Copies are neither proved nor observed, and count on from here by their own forwards."""
        clock = Clock(self.time, self.book.count, self.clock.set)
        return {**self.__dict__, "probe": None, "observer": None, "clock": clock}

    def forget(self) -> None:
        """Start counting anew."""
        self.stats = {name: [0, 0.0] for name in self.rates}
        self.checked = set()

    @property
    def time(self) -> int:
        """Where the schedule stands: set, else optimiser steps where known, else forwards."""
        return self.clock.now(self.book.count)

    def rate(self, site: str) -> float:
        """The survival rate in force, the schedule applied."""
        return schedules.rate_at(self.rates[site], self.schedule, self.time)

    # --- one branch in one forward ------------------------------------------------------------------
    def begin(self, branch: BranchState, entry: Entry, first: bool) -> Run | None:
        """What the branch does; None: it runs as if untouched.

        A branch with several entries asks at each; the first decides.
        """
        if first or branch.run is None:
            branch.run = self.probe(branch, entry) if self.probe is not None else self._decide(branch, entry)
        return branch.run

    def _decide(self, branch: BranchState, entry: Entry) -> Run | None:
        if self.dense or not branch.block.training:
            rate = self.rate(branch.site)
            return Run(branch, rate, None, False) if self.options.scale == "eval" and rate < 1 else None
        draw = self._draw(branch, entry[0])
        rate = draw.rates[branch.site]
        if self.options.mode == "batch":
            selection, share = None, float(draw.kept[branch.site])
        else:
            selection = self._rows(draw, branch, entry[0].shape[entry[1]], rate)
            share = selection.count / selection.total
        if not in_backward():
            self._count(draw, branch, share)
        scale = 1 / rate if self.options.scale == "train" else 1.0
        if share == 0:
            return Run(branch, scale, None, True, self._zeros(branch))
        run = Run(branch, scale, None if share == 1 else selection, False)
        if self.observer is not None:
            self.observer(run, draw)
        return run

    def _zeros(self, branch: BranchState) -> list[Tensor]:
        """The parameters that a branch at rest gives zeros to."""
        if self.options.grads == "zero":
            return branch.trainable()
        if not self.zeros_seen and self.looked < 100:  # some rests show how the loop clears gradients
            self.looked += 1
            p = min(branch.trainable(), key=Tensor.numel, default=None)
            self.zeros_seen = p is not None and p.grad is not None and not bool(p.grad.any())
        return []

    def _count(self, draw: Draw, branch: BranchState, share: float) -> None:
        if branch.site not in draw.share:
            stats = self.stats[branch.site]
            stats[0] += 1
            stats[1] += share
        draw.share[branch.site] = share

    # --- draws ----------------------------------------------------------------------------------------
    def new_draw(self) -> Draw:
        """Decide a whole training forward; rows are decided when their number is known."""
        self.refuse_unreduced()
        self.clock.stepped.clear()
        o, index = self.options, self.book.count
        draw = Draw(index, {name: self.rate(name) for name in self.rates})
        if o.mode == "batch":
            sample = masks.batch_exact if o.sampler == "exact" else masks.batch_bernoulli
            other = rank() if o.ranks == "independent" else 0
            kept = sample(list(draw.rates.values()), list(self.keys.values()), o.seed, index, other)
            draw.kept = dict(zip(draw.rates, kept, strict=True))
        return draw

    def _draw(self, branch: BranchState, x: Tensor) -> Draw:
        book = self.book
        if in_backward():
            return book.recall(x, branch.name, branch.order)
        if book.depth == 0 and not (book.held and book.current is not None):
            # Reached outside a root forward: the draw lasts until a branch comes round again.
            loose = book.loose
            if loose is None or branch.order <= loose.reached or loose.index < book.count - 1:
                loose = book.loose = book.begin(self.new_draw())
            loose.reached = branch.order
            book.current = loose
        if book.current is None:  # a root forward that began in eval mode, its parts in training mode
            book.current = book.begin(self.new_draw())
        book.remember(x, book.current)
        return book.current

    def _rows(self, draw: Draw, branch: BranchState, total: int, rate: float) -> Selection:
        known = draw.rows.get((branch.site, total))
        if known is not None:
            return known
        self._check_norms(total)
        o, key, me = self.options, self.keys[branch.site], rank()
        if rate == 1:
            selection = Selection(total, total)
        elif o.sampler == "bernoulli":
            selection = select_mask(masks.row_bernoulli(rate, key, o.seed, draw.index, me * total, total))
        elif o.rows == "scattered":
            index = masks.row_exact_scattered(rate, total, key, o.seed, draw.index, me)
            selection = Selection(total, index.numel(), index=index)
        else:
            count, start = masks.row_exact(rate, total, key, o.seed, draw.index, me)
            selection = Selection(total, count, start)
        draw.rows[branch.site, total] = selection
        return selection

    # --- refusals at run time ---------------------------------------------------------------------------
    def _check_norms(self, total: int) -> None:
        """Refuse a batch size at which BatchNorm could be left with one value, before it happens.

        At the rates asked, which a schedule only approaches from above.
        """
        if total in self.checked:
            return
        for branch in self.branches:
            rate = self.rates[branch.site]
            few = rate < 1 and _fewest(rate, total, self.options.sampler)
            for module, values in branch.norms if few else ():
                if module.training and few * values < 2:
                    raise RateError(
                        f"{branch.name}: at batch size {total} and survival rate {rate:g} as few as {few} "
                        "row may be kept, too few values for BatchNorm to train on. Take a larger batch or a "
                        'higher rate, sampler="exact", or mode="batch".'
                    )
        self.checked.add(total)

    def refuse_unreduced(self) -> None:
        """Refuse rests without gradients where gradients are reduced over processes."""
        if self.options.grads == "none" and world() > 1:
            raise UsageError(
                f'grads="none" with {world()} processes: a branch that rests leaves its parameters without '
                "gradients, and plain DistributedDataParallel then steps on gradients it never reduced. Pass "
                'grads="zero" to apply: the zeros arrive through the graph and every gradient is reduced.'
            )


def check_seed(seed: object) -> int:
    """A whole number, as it is."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise UsageError(f"seed must be a whole number, got {seed!r}")
    return seed


def _fewest(rate: float, total: int, sampler: str) -> int:
    """The smallest number of kept rows, none aside, to reckon with."""
    if sampler == "exact":
        return max(1, int(rate * total + 1e-9))
    lonely = total * rate * (1 - rate) ** (total - 1)  # P(one row is kept)
    return 1 if lonely > 1e-9 else 2


def world() -> int:
    """Processes that train together."""
    d = torch.distributed
    return d.get_world_size() if d.is_available() and d.is_initialized() else 1


def rank() -> int:
    """This process's number among them."""
    return torch.distributed.get_rank() if world() > 1 else 0

"""How a target is reached: the share of weights to be zero at each step, and the ones it takes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fallow.errors import UsageError, check_choice, check_count
from fallow.sparsity.weights import Weight

CONTROLS = ("ramp", "strength")


@dataclass(frozen=True)
class Target:
    """A share of the weights that is zero in the end, and the way there; made by `target_of`.

    Attributes:
        share: of the chosen weights, in (0, 1).
        steps: optimiser steps of the whole training.
        control: "ramp": at every step the smallest groups, as many as `wanted` says, are zero for good;
            "strength": the strength of the penalty follows, and the smallest are taken once, at `last`.
        begin: the step at which the ramp begins.
        last: the step from which the share is that of the target, to train what is left.
        every: steps between two looks.
        multiple: groups of a weight go by so many at a time.
    """

    share: float
    steps: int
    control: str
    begin: int
    last: int
    every: int
    multiple: int = 1

    def wanted(self, step: int) -> float:
        """The share at a step: ``share (1 - (1 - t)^3)`` with t from 0 to 1 between begin and last.

        References:
            Zhu, Gupta: To prune, or not to prune (2017), equation 1.
        """
        if self.last <= self.begin:
            return self.share if step >= self.last else 0.0
        t = min(max((step - self.begin) / (self.last - self.begin), 0.0), 1.0)
        return self.share * (1 - (1 - t) ** 3)

    def looks(self, step: int) -> bool:
        """Whether the controller acts after this step."""
        return step == self.last or self.begin < step < self.last and step % self.every == 0


def target_of(
    share: float,
    steps: int | None,
    control: str,
    begin: float,
    last: float,
    every: int | None,
    multiple: int = 1,
) -> Target:
    """A target, checked.

    Args:
        share: of the weights that are to be zero, in (0, 1).
        steps: optimiser steps of the whole training.
        control: of CONTROLS.
        begin: the part of the steps before anything is taken.
        last: the part of the steps after which the target holds.
        every: steps between two looks; None: a two-hundredth of the training.
        multiple: groups of a weight go by so many at a time.

    Raises:
        UsageError: a number out of its range, or no steps.
    """
    if isinstance(share, bool) or not 0 < share < 1:
        raise UsageError(f"target is the share of weights to be zero, between 0 and 1, got {share!r}")
    if steps is None:
        raise UsageError(
            "a target needs steps=, the optimiser steps of the whole training, say epochs * len(loader)"
        )
    steps = check_count("steps", steps, 1)
    check_choice("control", control, CONTROLS)
    if not 0 <= begin <= last <= 1:
        raise UsageError(f"ramp must be two parts of the steps, 0 <= begin <= end <= 1, got {(begin, last)}")
    every = max(steps // 200, 1) if every is None else check_count("every", every, 1)
    multiple = check_count("multiple", multiple, 1)
    return Target(
        float(share), steps, control, int(begin * steps), max(int(last * steps), 1), every, multiple
    )


def masks_for(
    weights: Sequence[Weight], scores: Sequence[Tensor], share: float, multiple: int = 1
) -> tuple[list[Tensor], list[str]]:
    """True = kept: all but the smallest groups, together at most that share of the entries.

    A layer that is empty passes nothing on, so the best group of each weight, or its best pack, is kept
    whatever it scores. Others go in its place, and the share is met to one group, or one pack, as long as
    there are others: see `shortfall_of`.

    Args:
        weights: what is made sparse.
        scores: of the groups, the larger the later they go; negative infinity: gone already.
        share: of all entries, to be zero.
        multiple: groups of a weight go in packs of so many, ranked by their mean scores.

    Returns:
        A mask of the groups for each weight, and the names of those of which only the best is left though
        it is smaller than what went.
    """
    units, packs = [s.detach().flatten().float().cpu() for s in scores], None
    counts = [torch.ones(len(unit), dtype=torch.int64) for unit in units]
    if multiple > 1:
        packs = [_pack_upwards(unit, multiple) for unit in units]
        counts = [pack.bincount() for pack in packs]
        units = [_means(*found) for found in zip(units, packs, counts, strict=True)]
    flat = torch.cat(units)
    sizes = torch.cat([count * w.members for w, count in zip(weights, counts, strict=True)])
    starts = [0, *itertools.accumulate(len(unit) for unit in units)]
    best = torch.tensor(
        [
            start + (int(unit.argmax()) if packs is None else len(unit) - 1)
            for start, unit in zip(starts, units, strict=False)
        ]
    )
    gone, low = _taken(flat, sizes, best, math.floor(share * int(sizes.sum()) + 0.5))
    masks, rescued = [], []
    for i, mask in enumerate((~gone).split([len(unit) for unit in units])):
        if bool(low[i]) and int(mask.sum()) == 1:
            rescued.append(weights[i].name)
        mask = mask if packs is None else mask[packs[i]]
        masks.append(mask.view(scores[i].shape).to(scores[i].device))
    return masks, rescued


def _taken(flat: Tensor, sizes: Tensor, best: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """True for what goes, the best excepted; and for those of the best that the budget would have taken."""
    ranked = flat.index_fill(0, best, math.inf)
    finite = ranked < math.inf
    gone = _smallest(ranked, sizes, budget) & finite
    low = flat[best] < flat.masked_fill(~gone, -math.inf).max()
    if torch.equal(gone, finite):  # nothing else may go: what is left of the budget would be theirs
        short = min(budget - int((sizes * gone).sum()), int(sizes[best].sum()))
        low |= _smallest(flat[best], sizes[best], short) & (flat[best] < math.inf)
    return gone, low


def _pack_upwards(scores: Tensor, multiple: int) -> Tensor:
    """`pack_of`, numbered from the smallest: of packs that are equal the first, the odd one, goes first."""
    pack = pack_of(scores, multiple)
    return pack.max() - pack


def _means(scores: Tensor, pack: Tensor, counts: Tensor) -> Tensor:
    """The mean score of each pack; rounding does not put a pack of smaller scores above one of larger."""
    means = torch.zeros(len(counts)).index_add(0, pack, scores) / counts
    return means.cummax(0).values


def pack_of(scores: Tensor, multiple: int) -> Tensor:
    """The pack of each group, from 0 for the largest; the last takes what the multiple leaves over.

    Examples:
        >>> pack_of(torch.tensor([0.3, 0.9, 0.1, 0.5, 0.7]), 2)
        tensor([1, 0, 2, 1, 0])
    """
    pack = torch.empty(len(scores), dtype=torch.int64)
    pack[scores.argsort(descending=True, stable=True)] = torch.arange(len(scores)) // multiple
    return pack


def _smallest(flat: Tensor, sizes: Tensor, budget: int) -> Tensor:
    """True for the smallest, of those that are equal the first, whose sizes add up to at most the budget."""
    gone = torch.zeros(len(flat), dtype=torch.bool)
    if bool((sizes == sizes[0]).all()):  # a selection: sorting a million weights takes longer than a step
        count = budget // int(sizes[0])
        if count:
            edge = flat.kthvalue(count).values
            gone = flat < edge
            gone[(flat == edge).nonzero()[: count - int(gone.sum()), 0]] = True
        return gone
    order = flat.argsort(stable=True)
    gone[order[sizes[order].cumsum(0) <= budget]] = True
    return gone


def best_of_blocks(weight: Weight, score: Tensor) -> Tensor:
    """The scores, infinite for the N best in each M neighbours where the weight has such blocks."""
    if not weight.keep:
        return score
    parts = score.movedim(1, -1).unflatten(-1, (-1, weight.size))
    best = parts.topk(weight.keep, -1).indices
    return parts.scatter(-1, best, math.inf).flatten(-2).movedim(-1, 1)


@dataclass(frozen=True)
class Shortfall:
    """A target that cannot be met: nothing is left that may go; made by `shortfall_of`.

    Attributes:
        asked: share of the weights that was to be zero.
        reached: share that is.
        reason: what stays, and why.
    """

    asked: float
    reached: float
    reason: str

    def __str__(self) -> str:
        return f"{self.reached:.2%} zeros instead of {self.asked:.2%}: {self.reason}"


def shortfall_of(
    weights: Sequence[Weight], masks: Sequence[Tensor], asked: float, multiple: int = 1
) -> Shortfall | None:
    """How far a share is missed where each weight has only its best group left, or its best pack.

    None where the share is met as nearly as can be: no group, or pack, fits in what is missing.
    """
    least = [_least(weight, multiple) for weight in weights]
    left = [int(mask.sum()) for mask in masks]
    if any(n > few for n, few in zip(left, least, strict=True)):
        return None
    total = sum(weight.parameter.numel() for weight in weights)
    kept = sum(n * weight.members for n, weight in zip(left, weights, strict=True))
    fits = min(1 if w.keep else few * w.members for few, w in zip(least, weights, strict=True))
    if math.floor(asked * total + 0.5) - (total - kept) < fits:
        return None
    return Shortfall(asked, 1 - kept / total, f"{_stays(weights[0], multiple)}, and all else is gone")


def _stays(weight: Weight, multiple: int) -> str:
    if weight.keep:
        return f"{weight.keep} of each {weight.size} neighbours stay"
    if multiple == 1:
        return f"one {weight.groups.removesuffix('s')} of each layer stays"
    return f"{multiple} {weight.groups} of each layer stay, or all where there are no more"


def _least(weight: Weight, multiple: int) -> int:
    """Groups that stay of a weight, whatever is asked."""
    return weight.count // weight.size * weight.keep if weight.keep else min(multiple, weight.count)


def rescue_words(count: int, multiple: int) -> str:
    """What stayed of a weight of so many groups that the target would have taken whole."""
    if multiple == 1:
        return "would be empty: the largest of its groups stayed"
    if count > multiple:
        return f"would be empty: the {multiple} largest of its groups stayed"
    groups = "group" if count == 1 else "groups"
    return (
        f"would be empty: it has {count} {groups}, no more than the multiple of {multiple}, and stayed whole"
    )


def share_of_blocks(weight: Weight) -> float:
    """The share of zeros that N:M means."""
    return 1 - weight.keep / weight.size

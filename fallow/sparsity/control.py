"""How a target is reached: the share of weights to be zero at each step, and the ones it takes."""

from __future__ import annotations

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
    """

    share: float
    steps: int
    control: str
    begin: int
    last: int
    every: int

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
    share: float, steps: int | None, control: str, begin: float, last: float, every: int | None
) -> Target:
    """A target, checked.

    Args:
        share: of the weights that are to be zero, in (0, 1).
        steps: optimiser steps of the whole training.
        control: of CONTROLS.
        begin: the part of the steps before anything is taken.
        last: the part of the steps after which the target holds.
        every: steps between two looks; None: a two-hundredth of the training.

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
    return Target(float(share), steps, control, int(begin * steps), max(int(last * steps), 1), every)


def masks_for(
    weights: Sequence[Weight], scores: Sequence[Tensor], share: float
) -> tuple[list[Tensor], list[str]]:
    """True = kept: all but the smallest groups, together at most that share of the entries.

    Args:
        weights: what is made sparse.
        scores: of the groups, the larger the later they go; negative infinity: gone already.
        share: of all entries, to be zero.

    Returns:
        A mask of the groups for each weight, and the names of those of which one group was kept though it
        belongs to the smallest: a layer that is empty passes nothing on.
    """
    sizes = torch.cat([torch.full((w.count,), w.members, dtype=torch.int64) for w in weights])
    flat = torch.cat([s.detach().flatten().float().cpu() for s in scores])
    budget = math.floor(share * int(sizes.sum()) + 0.5)
    gone = _smallest(flat, sizes, budget)
    gone &= flat < math.inf
    masks, rescued, first = [], [], 0
    for weight, score in zip(weights, scores, strict=True):
        mask = ~gone[first : first + weight.count]
        first += weight.count
        if not bool(mask.any()):
            mask[int(score.flatten().argmax())] = True
            rescued.append(weight.name)
        masks.append(mask.view(score.shape).to(score.device))
    return masks, rescued


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


def share_of_blocks(weight: Weight) -> float:
    """The share of zeros that N:M means."""
    return 1 - weight.keep / weight.size

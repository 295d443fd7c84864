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

    Args:
        weights: what is made sparse.
        scores: of the groups, the larger the later they go; negative infinity: gone already.
        share: of all entries, to be zero.
        multiple: groups of a weight go in packs of so many, ranked by their mean scores.

    Returns:
        A mask of the groups for each weight, and the names of those of which one group was kept, or one pack,
        though it belongs to the smallest: a layer that is empty passes nothing on.
    """
    units, packs = [s.detach().flatten().float().cpu() for s in scores], None
    counts = [torch.ones(len(unit), dtype=torch.int64) for unit in units]
    if multiple > 1:
        packs = [pack_of(unit, multiple) for unit in units]
        counts = [pack.bincount() for pack in packs]
        found = zip(units, packs, counts, strict=True)
        units = [torch.zeros(len(n)).index_add(0, p, s) / n for s, p, n in found]
    flat = torch.cat(units)
    sizes = torch.cat([count * w.members for w, count in zip(weights, counts, strict=True)])
    budget = math.floor(share * int(sizes.sum()) + 0.5)
    gone = _smallest(flat, sizes, budget)
    gone &= flat < math.inf
    masks, rescued = [], []
    for i, mask in enumerate((~gone).split([len(unit) for unit in units])):
        if not bool(mask.any()):
            mask[int(units[i].argmax())] = True
            rescued.append(weights[i].name)
        mask = mask if packs is None else mask[packs[i]]
        masks.append(mask.view(scores[i].shape).to(scores[i].device))
    return masks, rescued


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


def share_of_blocks(weight: Weight) -> float:
    """The share of zeros that N:M means."""
    return 1 - weight.keep / weight.size

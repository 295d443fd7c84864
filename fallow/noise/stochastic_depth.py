"""Stochastic depth for a hand-written forward: the residual sum with a branch that may rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fallow import rows as subset
from fallow.errors import ArgumentError, UsageError, check_choice, check_rate, refuse_unknown
from fallow.rows import Selection

_KEYWORDS = ("survival_rate", "mode", "sampler", "scale", "rows", "training", "generator")


def stochastic_depth(
    x: Tensor,
    branch: Callable[[Tensor], Tensor],
    *,
    survival_rate: float | None = None,
    mode: str = "batch",
    training: bool = True,
    generator: torch.Generator | None = None,
    sampler: str = "bernoulli",
    scale: str = "train",
    rows: str = "window",
    **unknown: Any,
) -> Tensor:
    """``x + branch(x)`` where the branch may rest, and is then not called.

    Formula: in training ``y = x + b/p branch(x)``, b Bernoulli with mean p (``scale="train"``), at
    evaluation ``y = x + branch(x)``; with ``scale="eval"`` (Huang et al.) ``y = x + b branch(x)`` and
    ``x + p branch(x)``.

    Shape:
        x: (rows, ...); ``branch(x)`` has the same shape; so has the result.

    Args:
        x: the branch's input and the shortcut.
        branch: called with x, or with its kept rows; it must treat rows independently in row mode (BatchNorm
            sees the kept rows).
        survival_rate: p in (0, 1]; at 1 the result is exactly ``x + branch(x)``.
        mode: "batch": one draw for all rows; "row": one draw a row, and the branch runs on the kept rows.
        training: draw or not.
        generator: of the draws; None: torch's default CPU generator, like torch's own functions.
        sampler: "bernoulli", or in row mode "exact": floor or ceil(p b) rows, each kept with probability p.
        scale: "train" or "eval", as above.
        rows: for the exact sampler: "window" (neighbours, circular; fastest; for shuffled batches) or
            "scattered".
        unknown: refused, with the conversion for drop_prob= and the like.

    Returns:
        A new tensor; x itself where everything rests.

    Raises:
        RateError: a rate outside (0, 1].
        ArgumentError: an unknown keyword, or p= and drop_prob= in place of survival_rate=.
        UsageError: a tensor without rows or of integers; another word than those above.

    Estimator:
        Unbiased for ``x + branch(x)`` with ``scale="train"``; variance ``(1-p)/p branch(x)^2`` elementwise.

    References:
        Huang et al. 2016, eq. 2 and 5.
    """
    refuse_unknown("stochastic_depth", unknown, _KEYWORDS)
    p = _checked(survival_rate, mode, sampler, scale, rows)
    if x.dim() == 0 or not (x.is_floating_point() or x.is_complex()):
        raise UsageError(
            f"stochastic_depth takes rows of real or complex numbers, (rows, ...), got {x.dtype} of shape "
            f"{tuple(x.shape)}"
        )
    if not training or p == 1:
        z = branch(x)
        return torch.add(x, z, alpha=p) if scale == "eval" and p < 1 else x + z
    factor = 1 / p if scale == "train" else 1.0
    if mode == "batch":
        return torch.add(x, branch(x), alpha=factor) if _uniform(generator) < p else x
    selection = _select(x.shape[0], p, sampler, rows, generator)
    if selection.count == 0:
        return x
    if selection.count == selection.total:
        return torch.add(x, branch(x), alpha=factor)
    return subset.add(x, branch(subset.take(x, selection)), selection, factor)


def _checked(survival_rate: float | None, mode: str, sampler: str, scale: str, rows: str) -> float:
    check_choice("mode", mode, ("batch", "row"))
    check_choice("sampler", sampler, ("bernoulli", "exact"))
    check_choice("scale", scale, ("train", "eval"))
    check_choice("rows", rows, ("window", "scattered"))
    if survival_rate is None:
        raise ArgumentError(
            "stochastic_depth needs survival_rate, the probability in (0, 1] that the branch is kept"
        )
    return check_rate(survival_rate)


def _uniform(generator: torch.Generator | None) -> float:
    return torch.rand((), generator=generator, dtype=torch.float64, device=_device(generator)).item()


def _device(generator: torch.Generator | None) -> torch.device:
    return generator.device if generator is not None else torch.device("cpu")


def _select(total: int, p: float, sampler: str, rows: str, generator: torch.Generator | None) -> Selection:
    device = _device(generator)
    if sampler == "bernoulli":
        return subset.select_mask(
            torch.rand(total, generator=generator, dtype=torch.float64, device=device) < p
        )
    whole = p * total
    floor = round(whole) if abs(whole - round(whole)) < 1e-9 else math.floor(whole)
    count = floor + (_uniform(generator) < whole - floor)
    if rows == "window":
        return Selection(total, count, min(int(_uniform(generator) * total), total - 1))
    index = torch.randperm(total, generator=generator, device=device)[:count].sort().values
    return Selection(total, count, index=index.cpu())


class StochasticDepth(nn.Module):
    """A residual block ``x + branch(x)`` whose branch rests; the Module of `stochastic_depth`.

    Args:
        branch: the residual branch; its parameters keep their names under ``branch.``.
        survival_rate: p in (0, 1].
        mode: as in `stochastic_depth`, like the other keywords.
        sampler: "bernoulli" or "exact".
        scale: "train" or "eval".
        rows: "window" or "scattered".
        generator: of the draws; None: torch's default CPU generator.
        unknown: refused, with the conversion for drop_prob= and the like.

    Raises:
        RateError: a rate outside (0, 1].
        ArgumentError: an unknown keyword.
        UsageError: another word than those above.
    """

    def __init__(
        self,
        branch: nn.Module,
        *,
        survival_rate: float | None = None,
        mode: str = "batch",
        sampler: str = "bernoulli",
        scale: str = "train",
        rows: str = "window",
        generator: torch.Generator | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        refuse_unknown("StochasticDepth", unknown, _KEYWORDS)
        self.branch = branch
        self.survival_rate = _checked(survival_rate, mode, sampler, scale, rows)
        self.mode, self.sampler, self.scale, self.rows = mode, sampler, scale, rows
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        """The sum, with the branch resting as drawn while training."""
        return stochastic_depth(
            x,
            self.branch,
            survival_rate=self.survival_rate,
            mode=self.mode,
            training=self.training,
            generator=self.generator,
            sampler=self.sampler,
            scale=self.scale,
            rows=self.rows,
        )

    def extra_repr(self) -> str:
        """The rate and the mode."""
        words = f"mode={self.mode!r}, sampler={self.sampler!r}, scale={self.scale!r}"
        return f"survival_rate={self.survival_rate}, {words}"

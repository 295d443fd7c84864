"""Dropout over features by any law of masks, and by blocks of neighbouring features."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fallow.errors import ArgumentError, UsageError, check_choice, check_count, check_rate, refuse_unknown
from fallow.noise.dropblock import drop_block1d
from fallow.schemes import Blocks, Masks, Scheme

_KEYWORDS = ("survival_rate", "block_size", "grid", "training", "generator")


def feature_dropout(
    x: Tensor, scheme: Scheme, *, training: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    """Features times random multipliers of mean 1, an own draw for each row.

    Formula: in training ``y = x z / mu``, z drawn by the scheme and mu its mean; at evaluation y is x.

    Shape:
        x: (..., width): every leading index is a row. So is the result, in x's dtype.

    Args:
        x: The features.
        scheme: Of `fallow.schemes`; its numbers must fit the width.
        training: Draw or not.
        generator: Of the draws; None: torch's default one of x's device (for `Blocks` see `drop_block1d`).

    Returns:
        A new tensor; x itself at evaluation and where no multiplier can be other than 1.

    Raises:
        ArgumentError: What is given is no scheme.
        UsageError: x has no axis or no floating-point numbers, or its width does not fit the scheme.

    Estimator:
        Unbiased for x, with the covariance ``characteristic_matrix(scheme, width) * x x'`` in a row and none
        between rows. Multipliers are drawn in float32 or better and half types rounded once, after the
        product. A mask puts zeros wherever it drops, infinities included.

    References:
        Equation (5) in Pal et al.'s setting; derived.

    Examples:
        >>> from fallow.schemes import FixedSize
        >>> feature_dropout(torch.ones(3, 4), FixedSize(2)).sum(1).tolist()
        [4.0, 4.0, 4.0]
    """
    _check_scheme("feature_dropout", scheme)
    _check_features("feature_dropout", x)
    width = x.shape[-1]
    if width:
        scheme.check(width)
    if not training or not x.numel():
        return x
    if isinstance(scheme, Blocks):
        return _blocks(x, scheme.survival_rate, scheme.block_size, scheme.grid, generator)
    rows, real = math.prod(x.shape[:-1]), x.dtype.to_real() if x.is_complex() else x.dtype
    wide = torch.promote_types(real, torch.float32)
    if not isinstance(scheme, Masks):
        multipliers = scheme.sample(rows, width, generator=generator, device=x.device, dtype=wide)
        return (x * multipliers.view(x.shape)).to(x.dtype)
    rate = scheme.rate(width)
    if rate == 1:
        return x
    kept = scheme.masks(rows, width, generator=generator, device=x.device).view(x.shape)
    if isinstance(rate, tuple):
        scale = torch.tensor([1 / p for p in rate], dtype=wide, device=x.device)
        return torch.where(kept, (x * scale).to(x.dtype), 0)
    return torch.where(kept, x * (1 / rate), 0)  # the number is not rounded to a half type first


def block_dropout(
    x: Tensor,
    *,
    survival_rate: float | None = None,
    block_size: int | None = None,
    grid: str = "disjoint",
    training: bool = True,
    generator: torch.Generator | None = None,
    **unknown: Any,
) -> Tensor:
    """Zeros in random blocks of neighbouring features, and the rest times ``1 / survival_rate``.

    Formula: `feature_dropout` by the law `fallow.schemes.Blocks`: ``y = m x / p``, every feature kept with
    probability p. Costs follow the number of blocks dropped, and no number is drawn for a feature.

    Shape:
        x: (..., width): every leading index is a row with its own mask. So is the result, in x's dtype.

    Args:
        x: The features, or hidden units.
        survival_rate: p in (0, 1].
        block_size: r, the features in a block; the width need not be a multiple, nor as large.
        grid: "disjoint": blocks from the first feature on, the last one smaller, each kept or dropped whole
            (Pal et al. analyse these); "sliding": blocks lie anywhere and overlap (DropBlock).
        training: Drop or not.
        generator: Of the draws; None: torch's default ones, as in `drop_block1d`.
        unknown: Refused, with the conversion for p=, drop_prob= and the like.

    Returns:
        A new tensor; x itself at evaluation and at rate 1.

    Raises:
        RateError: A rate outside (0, 1].
        ArgumentError: An unknown keyword, or one of the two numbers missing.
        UsageError: A block size below 1, another grid, or an x as in `feature_dropout`.

    Estimator:
        Unbiased for x. Under squared loss on a linear map it adds ``(1 - p) / p sum_b |U_b H_b|^2`` over the
        disjoint blocks, exactly.

    References:
        Pal et al. 2020; Ghiasi, Lin, Le: DropBlock (2018) for sliding blocks.

    Examples:
        >>> x = torch.ones(6)
        >>> block_dropout(x, survival_rate=0.5, block_size=6).unique().numel()
        1
    """
    refuse_unknown("block_dropout", unknown, _KEYWORDS)
    rate, size = _checked("block_dropout", survival_rate, block_size, grid)
    _check_features("block_dropout", x)
    return _blocks(x, rate, size, grid, generator) if training and x.numel() else x


def _blocks(x: Tensor, rate: float, size: int, grid: str, generator: torch.Generator | None) -> Tensor:
    if rate == 1:
        return x
    rows = x.reshape(-1, 1, x.shape[-1])
    return drop_block1d(rows, survival_rate=rate, block_size=size, grid=grid, generator=generator).reshape(
        x.shape
    )


def _check_scheme(name: str, scheme: object) -> None:
    if not isinstance(scheme, Scheme):
        raise ArgumentError(
            f"{name} takes a scheme of fallow.schemes, such as Units(0.9) for Dropout, got {scheme!r}"
        )


def _check_features(name: str, x: Tensor) -> None:
    if not x.dim():
        raise UsageError(f"{name} takes (..., width), got a tensor without axes; add one with x[None]")
    if not (x.is_floating_point() or x.is_complex()):
        raise UsageError(f"{name} takes floating-point numbers, got {x.dtype}; convert with x.float()")


def _checked(name: str, survival_rate: float | None, block_size: int | None, grid: str) -> tuple[float, int]:
    if survival_rate is None:
        raise ArgumentError(f"{name} needs survival_rate, the probability in (0, 1] that a feature is kept")
    if block_size is None:
        raise ArgumentError(f"{name} needs block_size, the number of features in a block")
    check_choice("grid", grid, ("disjoint", "sliding"))
    return check_rate(survival_rate), check_count("block_size", block_size, minimum=1)


class FeatureDropout(nn.Module):
    """The Module of `feature_dropout`.

    Args:
        scheme: Of `fallow.schemes`; may be set at any time.
        generator: Of the draws; None: torch's default one.

    Raises:
        ArgumentError: What is given is no scheme.

    Examples:
        >>> from fallow.schemes import Gaussian
        >>> FeatureDropout(Gaussian(0.25))
        FeatureDropout(Gaussian(variance=0.25))
    """

    def __init__(self, scheme: Scheme, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        _check_scheme("FeatureDropout", scheme)
        self.scheme, self.generator = scheme, generator

    def forward(self, x: Tensor) -> Tensor:
        """The features, times multipliers while training."""
        return feature_dropout(x, self.scheme, training=self.training, generator=self.generator)

    def extra_repr(self) -> str:
        """The scheme."""
        return repr(self.scheme)


class BlockDropout(nn.Module):
    """The Module of `block_dropout`.

    Args:
        survival_rate: p in (0, 1]; may be set at any time, like the others.
        block_size: r, the features in a block.
        grid: "disjoint" or "sliding".
        generator: Of the draws; None: torch's default ones.
        unknown: Refused, with the conversion for p=, drop_prob= and the like.

    Raises:
        RateError: A rate outside (0, 1].
        ArgumentError: An unknown keyword, or one of the two numbers missing.
        UsageError: A block size below 1, or another grid.

    Examples:
        >>> BlockDropout(survival_rate=0.9, block_size=8)
        BlockDropout(survival_rate=0.9, block_size=8, grid='disjoint')
    """

    def __init__(
        self,
        *,
        survival_rate: float | None = None,
        block_size: int | None = None,
        grid: str = "disjoint",
        generator: torch.Generator | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        refuse_unknown("BlockDropout", unknown, [word for word in _KEYWORDS if word != "training"])
        self.survival_rate, self.block_size = _checked("BlockDropout", survival_rate, block_size, grid)
        self.grid, self.generator = grid, generator

    @property
    def scheme(self) -> Blocks:
        """The law of its masks."""
        return Blocks(self.survival_rate, self.block_size, self.grid)

    def forward(self, x: Tensor) -> Tensor:
        """The features, with blocks dropped while training."""
        return block_dropout(
            x,
            survival_rate=self.survival_rate,
            block_size=self.block_size,
            grid=self.grid,
            training=self.training,
            generator=self.generator,
        )

    def extra_repr(self) -> str:
        """The numbers and the grid."""
        return f"survival_rate={self.survival_rate}, block_size={self.block_size}, grid={self.grid!r}"

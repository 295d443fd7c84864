"""Masks in which no feature has a place: independent, together, of a fixed number, exchangeable."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fallow.errors import UsageError, check_count, check_number, check_rate
from fallow.schemes._base import Masks, bernoulli, drawn_on, odds, same_length

# A number that is whole, or a correlation that is at its bound, but for rounding.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Units(Masks):
    """Each feature on its own: Dropout, and DropConnect on the last weights.

    Args:
        survival_rate: Of all features, or a tuple with one for each.
    """

    survival_rate: float | tuple[float, ...]

    def __post_init__(self) -> None:
        rate = self.survival_rate
        many = tuple(map(check_rate, rate)) if isinstance(rate, list | tuple) else check_rate(rate)
        object.__setattr__(self, "survival_rate", many)

    def check(self, width: int) -> None:
        """Refuse another width than that of a tuple of rates."""
        super().check(width)
        if isinstance(self.survival_rate, tuple):
            same_length("survival_rate", len(self.survival_rate), width)

    def rate(self, width: int) -> float | tuple[float, ...]:
        """As given."""
        self.check(width)
        return self.survival_rate

    def characteristic_matrix(self, width: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
        """``diag((1 - p) / p)``."""
        p = self.mean(width)
        return ((1 - p) / p).diag().to(dtype)

    def masks(self, rows: int, width: int, *, generator: Any = None, device: Any = None) -> Tensor:
        """Independent masks."""
        self.check(width)
        if isinstance(self.survival_rate, float):
            return bernoulli((rows, width), self.survival_rate, generator, device)
        place = drawn_on(generator, device)
        rates = self.mean(width).to(place).expand(rows, width)
        return torch.bernoulli(rates, generator=generator).to(torch.bool).to(device or place)


@dataclass(frozen=True)
class Layer(Masks):
    """All features together: DropPath, stochastic depth.

    Args:
        survival_rate: Of the layer.
    """

    survival_rate: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "survival_rate", check_rate(self.survival_rate))

    def rate(self, width: int) -> float:
        """P everywhere."""
        self.check(width)
        return self.survival_rate

    def characteristic_matrix(self, width: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
        """``(1 - p) / p`` everywhere."""
        self.check(width)
        return torch.full((width, width), odds(self.survival_rate), dtype=dtype)

    def masks(self, rows: int, width: int, *, generator: Any = None, device: Any = None) -> Tensor:
        """One number a row, expanded."""
        self.check(width)
        return bernoulli((rows, 1), self.survival_rate, generator, device).expand(rows, width)


@dataclass(frozen=True)
class FixedSize(Masks):
    """Exactly `kept` features, every subset of that size as likely as any other.

    Args:
        kept: At least 1 and at most the width.
    """

    kept: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "kept", check_count("kept", self.kept, minimum=1))

    def check(self, width: int) -> None:
        """Refuse widths below `kept`."""
        super().check(width)
        if self.kept > width:
            raise UsageError(
                f"kept must be at most the width, got {self.kept} of {width} features; keep fewer or use a "
                "wider layer"
            )

    def rate(self, width: int) -> float:
        """``kept / width`` everywhere."""
        self.check(width)
        return self.kept / width

    def characteristic_matrix(self, width: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
        """``b (d I - 1 1')`` with ``b = (d - s) / (s (d - 1))``."""
        self.check(width)
        scale = (width - self.kept) / (self.kept * max(width - 1, 1))
        return (scale * (width * torch.eye(width, dtype=torch.float64) - 1)).to(dtype)

    def masks(self, rows: int, width: int, *, generator: Any = None, device: Any = None) -> Tensor:
        """Independent subsets."""
        self.check(width)
        return _subsets((rows, width), self.kept, generator, device)


@dataclass(frozen=True)
class Exchangeable(Masks):
    """Features at one rate with one correlation between any two of them.

    The law: from 0 up to a correlation of 1 a row has one number for all its features with the probability of
    the correlation, and otherwise independent ones. Below 0 a row keeps floor or ceil(p d) features, each
    subset of that size as likely, with a probability such that the correlation is as asked, and otherwise has
    independent ones. (Other laws have the same rate and correlation, and act alike under squared loss.)

    Args:
        survival_rate: p.
        correlation: At most 1; at least that of keeping always floor or ceil(p d) of d features, which is
            ``(f (1 - f) / (d p (1 - p)) - 1) / (d - 1)`` with f the fraction of p d.
    """

    survival_rate: float
    correlation: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "survival_rate", check_rate(self.survival_rate))
        object.__setattr__(self, "correlation", check_number("correlation", self.correlation, -1, 1))

    def least(self, width: int) -> float:
        """The lowest correlation that this many features can have at this rate."""
        p = self.survival_rate
        if width == 1 or p == 1:
            return -1.0
        _, share = _whole(p * width)
        return (share * (1 - share) / (width * p * (1 - p)) - 1) / (width - 1)

    def check(self, width: int) -> None:
        """Refuse correlations below what this many features can have."""
        super().check(width)
        least = self.least(width)
        if self.correlation < least - _ROUNDING:
            raise UsageError(
                f"correlation must be at least {least:.6g} for {width} features at survival_rate="
                f"{self.survival_rate:g}, got {self.correlation:g}; any {width} features are more alike"
            )

    def rate(self, width: int) -> float:
        """P everywhere."""
        self.check(width)
        return self.survival_rate

    def characteristic_matrix(self, width: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
        """``(1 - p) / p [(1 - rho) I + rho 1 1']``."""
        self.check(width)
        c, rho = odds(self.survival_rate), self.correlation
        return (c * ((1 - rho) * torch.eye(width, dtype=torch.float64) + rho)).to(dtype)

    def masks(self, rows: int, width: int, *, generator: Any = None, device: Any = None) -> Tensor:
        """Independent masks."""
        self.check(width)
        p, least = self.survival_rate, self.least(width)
        free = bernoulli((rows, width), p, generator, device)
        if self.correlation >= 0:
            share, one = self.correlation, bernoulli((rows, 1), p, generator, device)
        else:
            floor, more = _whole(p * width)
            share, count = min(self.correlation / least, 1.0), bernoulli((rows, 1), more, generator, device)
            one = _subsets((rows, width), floor + count.long(), generator, device)
        return torch.where(bernoulli((rows, 1), share, generator, device), one, free)


def _whole(number: float) -> tuple[int, float]:
    """The floor of a number and what is above it."""
    floor = math.floor(number + _ROUNDING)
    return floor, max(number - floor, 0.0)


def _subsets(shape: tuple[int, int], counts: int | Tensor, generator: Any, device: Any) -> Tensor:
    """Masks that keep so many features of each row: those at the first places of a random order.

    Numbers of 53 bits are almost never equal; equal ones would be in the order of the features.
    """
    place = drawn_on(generator, device)
    order = torch.rand(shape, dtype=torch.float64, device=place, generator=generator).argsort(dim=1)
    return order.to(device or place) < counts

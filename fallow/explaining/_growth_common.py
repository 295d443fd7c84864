"""What the theory of growth, its simulation and the laws over masks share: kinds, gates and rates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fallow.errors import UsageError, check_choice, check_rate

KINDS = ("vanilla", "scaled", "batchnorm")
SCALES = ("eval", "train")
SAMPLERS = ("bernoulli", "exact")
LOST = 1.0 - 1.0 / math.pi  # of a block's second moment with BatchNorm, what is not the mean over the batch

Rates = Sequence[float] | Mapping[str, float]


def strength(kind: str, depth: int, gain: float = 2.0) -> float:
    """The strength h = s^2 gain / 2: what a kept block adds to the second moment, relative to what comes in.

    Args:
        kind: "vanilla", "scaled" or "batchnorm".
        depth: number of blocks L.
        gain: sigma_w^2, the variance of a weight times the width; 2 is He's.
    """
    check_choice("kind", kind, KINDS)
    if not (isinstance(gain, (int, float)) and math.isfinite(gain) and gain > 0):
        raise UsageError(f"gain must be a positive number, got {gain!r}: 2 is He's initialisation")
    return gain / 2 / (depth if kind == "scaled" else 1)


def gate_moments(rate: float, scale: str) -> tuple[float, float]:
    """First and second moment of a gate: (p, p) for ``scale="eval"``, (1, 1/p) for "train"."""
    check_choice("scale", scale, SCALES)
    return (rate, rate) if scale == "eval" else (1.0, 1.0 / rate)


def slopes(kind: str) -> tuple[float, float]:
    """Forward and backward: what the divisor of a block's factor gains by block, in units of h g^2.

    0: nothing divides. With BatchNorm the block adds a fixed amount: to the second moment all of it, to the
    variance over the batch all but the square of its mean.
    """
    return (1.0, LOST) if kind == "batchnorm" else (0.0, 0.0)


def checked_rates(rates: Rates) -> tuple[float, ...]:
    """The rates as numbers in (0, 1], at least one."""
    found = rates.values() if isinstance(rates, Mapping) else rates
    ps = tuple(check_rate(p, f"block {i}") for i, p in enumerate(found, 1))
    if not ps:
        raise UsageError("rates is empty: pass one survival rate for each block")
    return ps


def checked(rates: Rates, kind: str, scale: str, gain: float) -> tuple[tuple[float, ...], float]:
    """The rates and the strength h of a network of that many blocks."""
    ps = checked_rates(rates)
    check_choice("scale", scale, SCALES)
    return ps, strength(kind, len(ps), gain)


def power(log2: float | None) -> str:
    """A growth given by its log2, as a reader wants it."""
    if log2 is None:
        return "-"
    return f"2^{log2:.1f}" if abs(log2) > 40 else f"{2**log2:.4g}"

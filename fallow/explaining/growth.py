"""Growth of signals and gradients over depth under stochastic depth, in theory.

The networks of the theory, at initialisation, with masks delta_l, survival rates p_l and gates g_l = delta_l
(``scale="eval"``) or delta_l / p_l (``scale="train"``):

    y_l = y_(l-1) + s g_l W_l relu(y_(l-1)),    W_ij ~ N(0, gain / width),    l = 1..L

with s = 1 (``kind="vanilla"``), s = 1/sqrt(L) ("scaled"), or s = 1 and BatchNorm before the relu
("batchnorm"). Everything below follows from h = s^2 gain / 2, the share of the second moment that a block
adds where it is kept with gate 1. The theory is for infinite width and treats the weights of the backward
pass as independent of those of the forward pass (gradient independence); at width 512 and depth 30
simulation agrees within a few per cent. "Derived" marks what was derived for this library and not taken from
Hayou and Ayed, "Regularization in ResNet with Stochastic Depth" (2021).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fallow.errors import RateError, UsageError, check_choice, check_rate
from fallow.explaining._growth_common import SAMPLERS, Rates, checked, power, slopes, strength
from fallow.explaining.depth_profiles import noise_mass, weight_profile

_STATES = 2000  # states kept of a law over masks; neighbours are merged beyond


@dataclass(frozen=True)
class Growth:
    """Growth of a second moment over all blocks in one direction.

    Attributes:
        factors: by block, the mean over masks of the ratio of the second moment behind the block (as the
            signal goes) to the one before it.
        log2_mean: of the mean over masks of the growth over all blocks; None where no closed form is known.
        log2_typical: mean over masks of log2 of that growth.
        log2_spread: standard deviation over masks of log2 of that growth; None where not known.
        log2_dense: of the growth without noise.
        log2_test: of the growth of the network at evaluation.
    """

    factors: tuple[float, ...]
    log2_mean: float | None
    log2_typical: float
    log2_spread: float | None
    log2_dense: float
    log2_test: float


@dataclass(frozen=True)
class GrowthTheory:
    """What theory says of a network at initialisation; made by `growth_theory`.

    Attributes:
        forward: E y_l^2 over the width, from the first block to the last.
        backward: |dloss/dy_l|^2, from the last block to the first.
        weights: E |dloss/dW_l|^2 in units of width E y_0^2 |dloss/dy_L|^2 (`weight_profile`); None for
            ``sampler="exact"``.
    """

    kind: str
    scale: str
    sampler: str
    gain: float
    rates: tuple[float, ...]
    forward: Growth
    backward: Growth
    weights: tuple[float, ...] | None
    noise_mass: float

    @property
    def rate(self) -> float | None:
        """Mean growth of gradients per block, (mean over masks of the whole growth)^(1/L) (D11)."""
        mean = self.backward.log2_mean
        return None if mean is None else 2 ** (mean / len(self.rates))

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """A table."""
        head = f"{self.kind}, {len(self.rates)} blocks, gain {self.gain:g}, scale={self.scale!r}, "
        lines = [head + f"{self.sampler} masks, noise mass {self.noise_mass:.4g}"]
        lines.append("growth of second moments    forward     backward")
        for word in ("mean", "typical", "dense", "test"):
            pair = [power(getattr(side, f"log2_{word}")) for side in (self.forward, self.backward)]
            lines.append(f"{_TOTALS[word]:<26}  {pair[0]:<10}  {pair[1]}")
        return "\n".join(lines)


_TOTALS = {
    "mean": "mean over masks",
    "typical": "typical mask",
    "dense": "without noise",
    "test": "network at evaluation",
}


def growth_theory(
    rates: Rates,
    *,
    kind: str = "vanilla",
    scale: str = "eval",
    sampler: str = "bernoulli",
    gain: float = 2.0,
) -> GrowthTheory:
    """Growth of second moments over depth at initialisation, forward and backward.

    Un-normalised, either direction, by block: ``1 + h p`` for ``scale="eval"``, ``1 + h / p`` for "train",
    ``1 + h p^2`` for the network at evaluation of ``scale="eval"``, ``1 + h`` without noise; the mean over
    independent masks is the product. Given the mask the growth is ``prod over kept (1 + h g^2)``, so that the
    typical growth is ``prod (1 + h g^2)^p``: 2^(expected depth) for vanilla, ``scale="eval"``. The mean is
    carried by rare deep masks. BatchNorm: ``1 + h g^2 / v`` with the variance v that the masks made so far,
    a power law of the depth; the law of v over masks is followed, not only its mean.

    Args:
        rates: survival rates, first block first.
        kind: "vanilla", "scaled" or "batchnorm" (one mask for the batch; inputs of mean 0 and variance 1).
        scale: "eval" or "train", as in `fallow.apply`.
        sampler: "bernoulli" (independent) or "exact" (floor or ceil(sum p) blocks are kept).
        gain: sigma_w^2; 2 is He's.

    Estimator:
        Un-normalised: exact at infinite width under gradient independence. BatchNorm: for infinitely many
        rows besides; with ``sampler="exact"`` its factors and typical growth are those of independent gates.
        The network at evaluation normalises by its own statistics (`Handle.recalibrate`).

    References:
        Derived: D8, D9 (factors), D10 (typical), D13 (exact), D14 (BatchNorm; there with the mean of v, which
        at L=40, p=.5 gives 46.5 where the mean over masks is 43.2).

    Examples:
        >>> round(growth_theory([0.5] * 50).rate, 12)
        1.5
        >>> round(growth_theory([0.5] * 50, scale="train").rate, 12)
        3.0
    """
    ps, h = checked(rates, kind, scale, gain)
    check_choice("sampler", sampler, SAMPLERS)
    forward, backward = (_growth(ps, scale, sampler, h, slope) for slope in slopes(kind))
    profile = weight_profile(ps, kind=kind, scale=scale, gain=gain) if sampler == "bernoulli" else None
    mass = noise_mass(ps, scale=scale)
    return GrowthTheory(kind, scale, sampler, gain, ps, forward, backward, profile, mass)


def _growth(ps: Sequence[float], scale: str, sampler: str, h: float, slope: float) -> Growth:
    squares = [1.0 if scale == "eval" else 1.0 / (p * p) for p in ps]
    factors, logs, spread, log2_mean = [], 0.0, 0.0, 0.0
    for p, square, law in zip(ps, squares, _laws(ps, squares, h, slope), strict=False):
        ratios = [(share, h * square / divisor) for divisor, share, _ in law]
        factors.append(1 + p * sum(share * r for share, r in ratios))
        logs += p * sum(share * math.log2(1 + r) for share, r in ratios)
        spread += p * (1 - p) * math.log2(1 + h * square) ** 2
        weight = sum(w for _, _, w in law)
        log2_mean += math.log2(1 + p * sum(w / weight * h * square / v for v, _, w in law))
    deviation = None if slope else math.sqrt(spread)
    mean: float | None = log2_mean
    if sampler == "exact":
        mean, deviation = _by_count(ps, scale, h, slope)
    test = [p * p if scale == "eval" else 1.0 for p in ps]
    return Growth(
        tuple(factors), mean, logs, deviation, _log2_product([1.0] * len(ps), h, slope),
        _log2_product(test, h, slope),
    )  # fmt: skip


def _laws(
    ps: Sequence[float], squares: Sequence[float], h: float, slope: float
) -> Iterator[list[tuple[float, float, float]]]:
    """Before each block: (divisor, its probability, its probability weighted with the growth so far).

    The weights are scaled to sum to 1, so that deep networks do not overflow.
    """
    law = [(1.0, 1.0, 1.0)]
    for p, square in zip(ps, squares, strict=True):
        yield law
        if not slope:
            continue
        after: dict[float, list[float]] = {}
        for divisor, share, weight in law:
            kept = divisor + slope * h * square
            grown = weight * (1 + h * square / divisor)
            for where, odds, gain in ((divisor, 1 - p, weight), (kept, p, grown)):
                if not odds:
                    continue
                held = after.setdefault(round(where, 9), [0.0, 0.0])
                held[0] += odds * share
                held[1] += odds * gain
        total = sum(mass for _, mass in after.values())
        law = [(v, chance, mass / total) for v, (chance, mass) in sorted(after.items())]
        while len(law) > _STATES:
            law = [_merged(law[i : i + 2]) for i in range(0, len(law), 2)]


def _merged(states: list[tuple[float, float, float]]) -> tuple[float, float, float]:
    """Neighbouring states as one, at their mean divisor."""
    share, weight = sum(s for _, s, _ in states), sum(w for _, _, w in states)
    total = share + weight
    return sum(v * (s + w) for v, s, w in states) / total, share, weight


def _by_count(ps: Sequence[float], scale: str, h: float, slope: float) -> tuple[float | None, float | None]:
    """log2 mean growth, and spread of its log2, where floor or ceil(sum p) blocks are kept.

    Known where the growth depends on their number alone: not with different rates under ``scale="train"``.
    """
    if scale == "train" and max(ps) - min(ps) > 1e-12:
        return None, None
    square = 1.0 if scale == "eval" else 1.0 / (ps[0] * ps[0])
    depth = sum(ps)
    low = math.floor(depth + 1e-9)
    part = max(depth - low, 0.0)
    logs = [_log2_product([square] * n, h, slope) for n in (low, low + 1)]
    mean = logs[0] + math.log2(1 - part + part * 2 ** (logs[1] - logs[0]))
    return mean, math.sqrt(part * (1 - part)) * (logs[1] - logs[0])


def _log2_product(squares: Sequence[float], h: float, slope: float) -> float:
    total, divisor = 0.0, 1.0
    for square in squares:
        total += math.log2(1 + h * square / divisor)
        divisor += slope * h * square
    return total


def quenched_growth(
    mask: Sequence[bool],
    rates: Rates,
    *,
    kind: str = "vanilla",
    scale: str = "eval",
    direction: str = "backward",
    gain: float = 2.0,
) -> float:
    """Growth of the second moment over all blocks given the mask, in log2.

    ``prod over kept l of (1 + h g_l^2)``: for ``scale="eval"`` it depends on the number of kept blocks
    L_delta alone, ``(1 + h)^L_delta``, in the vanilla net with He's gain 2^L_delta. BatchNorm:
    `growth_theory`.

    References:
        Derived, D10.

    Examples:
        >>> quenched_growth([True, False, True], [0.5, 0.5, 0.5])
        2.0
    """
    ps, h = checked(rates, kind, scale, gain)
    check_choice("direction", direction, ("forward", "backward"))
    if len(mask) != len(ps):
        raise UsageError(f"mask must have one entry for each of the {len(ps)} rates, got {len(mask)}")
    kept = [1.0 if scale == "eval" else 1.0 / (p * p) for p, on in zip(ps, mask, strict=True) if on]
    return _log2_product(kept, h, slopes(kind)[direction == "backward"])


def linear_rate_limit(mean: float, *, gain: float = 2.0) -> float:
    """Mean growth per block of the vanilla net with linear rates of this mean, in the limit of many blocks.

    exp of the mean of ln(1 + h p) over p uniform on [2 mean - 1, 1]. For finite depth take `growth_theory`'s
    ``rate``, which is exact; the two differ by O(1/L).

    Raises:
        RateError: mean below 1/2, where linear rates do not exist in the limit.

    References:
        Derived, D11.
    """
    mean = check_rate(mean, name="mean")
    if mean < 0.5:
        raise RateError(f"linear rates of many sites have a mean of at least 1/2, got {mean:g}")
    last, h = 2 * mean - 1, strength("vanilla", 1, gain)
    if mean == 1.0:
        return 1 + h
    primitive = [(1 + h * p) * math.log(1 + h * p) / h for p in (last, 1.0)]
    return math.exp((primitive[1] - primitive[0]) / (1 - last) - 1)

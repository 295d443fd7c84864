"""Growth of signals and gradients over depth under stochastic depth: theory, simulation, and a user's model.

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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fallow import rates as rules
from fallow.errors import RateError, RunError, SiteError, UsageError, check_choice, check_count, check_rate
from fallow.feed import LossFunction, loss_of, pairs, rows_of
from fallow.surgery.branch import BranchState, Run
from fallow.surgery.handle import handle_of
from fallow.surgery.tap import Taps, seed_of_graph, tapped

KINDS = ("vanilla", "scaled", "batchnorm")
SCALES = ("eval", "train")
SAMPLERS = ("bernoulli", "exact")
SHALLOW = 8  # below this number of sites `signal_growth` warns; the number is ours

Rates = Sequence[float] | Mapping[str, float]

_LOST = 1.0 - 1.0 / math.pi  # of a block's second moment with BatchNorm, what is not the mean over the batch
_STATES = 2000  # states kept of a law over masks; neighbours are merged beyond
_UNSCALED = 1.2  # growth per block from which the last blocks count as neither normalised nor scaled down


# --- theory ----------------------------------------------------------------------------------------------


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
            pair = [_power(getattr(side, f"log2_{word}")) for side in (self.forward, self.backward)]
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
    ps, h = _checked(rates, kind, scale, gain)
    check_choice("sampler", sampler, SAMPLERS)
    forward, backward = (_growth(ps, scale, sampler, h, slope) for slope in _slopes(kind))
    profile = weight_profile(ps, kind=kind, scale=scale, gain=gain) if sampler == "bernoulli" else None
    mass = noise_mass(ps, scale=scale)
    return GrowthTheory(kind, scale, sampler, gain, ps, forward, backward, profile, mass)


def _slopes(kind: str) -> tuple[float, float]:
    """Forward and backward: what the divisor of a block's factor gains by block, in units of h g^2.

    0: nothing divides. With BatchNorm the block adds a fixed amount: to the second moment all of it, to the
    variance over the batch all but the square of its mean.
    """
    return (1.0, _LOST) if kind == "batchnorm" else (0.0, 0.0)


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
    ps, h = _checked(rates, kind, scale, gain)
    check_choice("direction", direction, ("forward", "backward"))
    if len(mask) != len(ps):
        raise UsageError(f"mask must have one entry for each of the {len(ps)} rates, got {len(mask)}")
    kept = [1.0 if scale == "eval" else 1.0 / (p * p) for p, on in zip(ps, mask, strict=True) if on]
    return _log2_product(kept, h, _slopes(kind)[direction == "backward"])


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


def weight_profile(
    rates: Rates, *, kind: str = "vanilla", scale: str = "eval", gain: float = 2.0
) -> tuple[float, ...]:
    """E |dloss/dW_l|_F^2 by block, in units of width E y_0^2 |dloss/dy_L|^2; independent masks.

    Un-normalised ``s^2 E g_l^2 / 2 prod over k != l of (1 + h E g_k^2)``: for the vanilla net and
    ``scale="eval"`` p_l / (1 + p_l) prod (1 + p_k) / 2, flat in depth for equal rates. BatchNorm
    ``s^2 E g_l^2 / 2 (1 + (1 - 1/pi) (P_l - 1))``, P_l the growth of gradients behind the block: what came
    back through a BatchNorm has mean 0 over the batch, so that the mean of the weight's input does not count.
    inf for a net too deep for a float.

    Estimator:
        As `growth_theory`; BatchNorm with the mean of the variance over masks in P_l (approximate).

    References:
        Derived: D12 for the vanilla net; the BatchNorm form is checked by simulation.
    """
    ps, h = _checked(rates, kind, scale, gain)
    seconds = [gate_moments(p, scale)[1] for p in ps]
    slope, divisor, logs = _slopes(kind)[1], 1.0, []
    for second in seconds:
        logs.append(math.log2(1 + h * second / divisor))
        divisor += slope * h * second
    whole, before, found = sum(logs), 0.0, []
    for second, log in zip(seconds, logs, strict=True):
        before += log
        others = whole - (before if kind == "batchnorm" else log)
        growth = 2.0**others if others < 1000 else math.inf
        found.append(h / gain * second * (1 + _LOST * (growth - 1) if kind == "batchnorm" else growth))
    return tuple(found)


def leave_one_out_weights(depth: int, *, strength: float = 1.0) -> tuple[float, ...]:
    """c_l: mean squared change of the output by leaving out block l, relative to its linearisation.

    ``c_l = (2 + h - 2 sqrt(1 + h) rho_(L-l)) / h``, ``rho_0 = 1 / sqrt(1 + h)``,
    ``rho_(k+1) = (rho_k + h kappa_1(rho_k)) / (1 + h)`` with the normalised arc-cosine kernel of relu.
    c_L = 1; toward the first blocks it falls to ``(2 + h - 2 sqrt(1 + h)) / h``, 3 - 2 sqrt(2) in the vanilla
    net. With h = 1/L all are close to 1.

    Args:
        depth: number of blocks L.
        strength: h, see `strength`: 1 for the vanilla net with He's gain, 1/L for the scaled one.

    Estimator:
        Exact at infinite width, full network, un-normalised relu.

    References:
        Derived, section 3.3.
    """
    check_count("depth", depth, 1)
    if not (isinstance(strength, (int, float)) and 0 < strength < math.inf):
        raise UsageError(f"strength must be a positive number, got {strength!r}: s^2 gain / 2")
    h, rho, found = float(strength), (1 + strength) ** -0.5, []
    for _ in range(depth):
        found.append((2 + h - 2 * math.sqrt(1 + h) * rho) / h)
        rho = (rho + h * arc_cosine(rho)) / (1 + h)
    return tuple(reversed(found))


def arc_cosine(rho: float) -> float:
    """The kernel kappa_1 of relu, (sqrt(1 - rho^2) + rho (pi - arccos rho)) / pi, which is 1 at 1."""
    rho = max(-1.0, min(1.0, rho))
    return (math.sqrt(1 - rho * rho) + rho * (math.pi - math.acos(rho))) / math.pi


def strongest_rates(weights: Sequence[float], mean: float) -> tuple[float, ...]:
    """The rates of this mean that maximise sum w_l p_l (1 - p_l): the most penalty at a given expected depth.

    ``p_l = (1 - lambda / w_l) / 2`` cut to [0, 1], lambda from the mean. Equal weights give equal rates. For
    a mean above 1/2 small weights get high rates, below it low ones. For ``scale="eval"``: with "train" the
    penalty's weights are (1 - p) / p, and equal rates give the least of it.

    Args:
        weights: positive, first block first; `leave_one_out_weights` for a network at initialisation.
        mean: of the rates, in (0, 1].

    Estimator:
        Exact: the mean of the rates is piecewise linear in lambda with kinks at plus and minus w_l; the piece
        is found by bisection over the sorted kinks and solved. A rate may be 0.

    References:
        Derived, section 3.3.

    Examples:
        >>> strongest_rates([1.0, 1.0], 0.7)
        (0.7, 0.7)
    """
    mean = check_rate(mean, name="mean")
    ws = [float(w) for w in weights]
    if not ws or not all(0 < w < math.inf for w in ws):
        raise UsageError(f"weights must be positive numbers, at least one, got {list(weights)!r}")

    def at(level: float) -> list[float]:
        return [min(1.0, max(0.0, (1 - level / w) / 2)) for w in ws]

    target = mean * len(ws)
    kinks = sorted({sign * w for w in ws for sign in (-1.0, 1.0)})
    low, high = 0, len(kinks) - 1  # the sum at the first is L, at the last 0, and it falls between
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if sum(at(kinks[middle])) >= target else (low, middle)
    upper, lower = sum(at(kinks[low])), sum(at(kinks[high]))
    share = 0.0 if upper == lower else (upper - target) / (upper - lower)
    return tuple(at(kinks[low] + share * (kinks[high] - kinks[low])))


def noise_mass(rates: Rates, *, scale: str = "eval") -> float:
    """V(p), the variances of the gates summed: sum p (1 - p), or sum (1 - p) / p for ``scale="train"``.

    For ``scale="eval"`` it is the variance of the number of kept blocks under independent gates, at most
    L r (1 - r) at mean rate r, with equality for equal rates alone.

    References:
        Derived, D7 and D6.
    """
    moments = [gate_moments(p, scale) for p in _rates(rates)]
    return sum(second - first * first for first, second in moments)


@dataclass(frozen=True)
class NoiseVariance:
    """Second moment of a unit of y_L, and its parts; made by `noise_variance`.

    Attributes:
        total: q_L, mean over weights and masks of the square.
        between: m_L, mean over weights of the squared mean over masks.
        noise: q_L - m_L, mean over weights of the variance over masks.
    """

    total: float
    between: float

    @property
    def noise(self) -> float:
        """The variance over masks."""
        return self.total - self.between


def noise_variance(
    rates: Rates, *, kind: str = "scaled", scale: str = "eval", gain: float = 2.0, start: float = 1.0
) -> NoiseVariance:
    """Variance over masks of a unit of y_L at initialisation, by the recursion of two replicas.

    ``q_l = q_(l-1) (1 + h E g^2)``, ``m_l = m_(l-1) + h (E g)^2 q_(l-1) kappa_1(m_(l-1) / q_(l-1))``, from
    q_0 = m_0 = ``start``. Its units are those of ``start``, E y_0^2.

    Estimator:
        Approximate even at infinite width: it puts the mean over masks of each replica's second moment
        where its law belongs. Against all pairs of masks enumerated (``scale="eval"``, equal rates, L = 8)
        the noise is off by less than .4 % at h = 1/L, but by 3 % at h = 1, growing with depth: use it for
        scaled nets. Not for BatchNorm.

    References:
        Derived, D17.
    """
    ps, h = _checked(rates, kind, scale, gain)
    if kind == "batchnorm":
        raise UsageError('noise_variance knows kind="vanilla" and "scaled"; BatchNorm mixes the rows')
    q = m = float(start)
    for p in ps:
        first, second = gate_moments(p, scale)
        q, m = q * (1 + h * second), m + h * first * first * q * arc_cosine(m / q)
    return NoiseVariance(q, m)


def train_test_mismatch(
    rates: Rates, *, kind: str = "vanilla", scale: str = "eval", gain: float = 2.0
) -> tuple[float, float]:
    """E y_L^2 / E y_0^2 in training (mean over masks) and in the network at evaluation.

    Un-normalised prod (1 + h p) and prod (1 + h p^2) for ``scale="eval"``, prod (1 + h / p) and (1 + h)^L for
    "train"; with BatchNorm, where each block adds a fixed amount, sums in place of the products.

    Estimator:
        Exact at infinite width. BatchNorm at evaluation with the statistics of that network: recalibrated.

    References:
        Derived, section 3.5.
    """
    ps, h = _checked(rates, kind, scale, gain)
    train = [h * gate_moments(p, scale)[1] for p in ps]
    test = [h * (p * p if scale == "eval" else 1.0) for p in ps]
    if kind == "batchnorm":
        return 1 + sum(train), 1 + sum(test)
    return math.prod(1 + x for x in train), math.prod(1 + x for x in test)


def _rates(rates: Rates) -> tuple[float, ...]:
    found = rates.values() if isinstance(rates, Mapping) else rates
    ps = tuple(check_rate(p, f"block {i}") for i, p in enumerate(found, 1))
    if not ps:
        raise UsageError("rates is empty: pass one survival rate for each block")
    return ps


def _checked(rates: Rates, kind: str, scale: str, gain: float) -> tuple[tuple[float, ...], float]:
    ps = _rates(rates)
    check_choice("scale", scale, SCALES)
    return ps, strength(kind, len(ps), gain)


def _power(log2: float | None) -> str:
    """A growth given by its log2, as a reader wants it."""
    if log2 is None:
        return "-"
    return f"2^{log2:.1f}" if abs(log2) > 40 else f"{2**log2:.4g}"


# --- simulation ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Simulated:
    """Growth measured in one direction; to be read beside `Growth`.

    Attributes:
        factors: by block, the mean over weights and masks of the ratio of second moments.
        errors: their standard errors, from the spread between draws of the weights.
        log2_mean: log2 of the mean over weights and masks of the growth over all blocks.
        mean_error: relative standard error of that mean; it is too small where rare masks carry the mean.
        log2_median: log2 of the median of that growth.
        log2_spread: standard deviation over masks of its log2, within a draw of the weights.
        slope: of its log2 on the log2 that theory gives each mask (`quenched_growth`), within a draw of the
            weights; for ``scale="eval"``, He's gain and no scaling that is on the number of kept blocks. 1
            where theory holds, None where the masks do not differ.
        profile: by layer 0..L, log2 of the mean second moment relative to where the signal starts.
    """

    factors: tuple[float, ...]
    errors: tuple[float, ...]
    log2_mean: float
    mean_error: float
    log2_median: float
    log2_spread: float
    slope: float | None
    profile: tuple[float, ...]


@dataclass(frozen=True)
class SimulatedGrowth:
    """Theory and simulation side by side; made by `simulate_growth`.

    Attributes:
        theory: what theory says.
        forward: E y_l^2, measured.
        backward: |dloss/dy_l|^2 by backpropagation, measured.
        weights: by block, E |dloss/dW_l|_F^2 in the units of `weight_profile`.
        weight_errors: their standard errors.
        settings: width, draws, masks, rows and seed.
    """

    theory: GrowthTheory
    forward: Simulated
    backward: Simulated
    weights: tuple[float, ...]
    weight_errors: tuple[float, ...]
    settings: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """A table; of deep networks some of the blocks."""
        t, f, b = self.theory, self.forward, self.backward
        depth = len(t.rates)
        said = ", ".join(f"{k} {v}" for k, v in self.settings.items())
        lines = [f"{t.kind}, {depth} blocks, scale={t.scale!r}, {t.sampler} masks; {said}"]
        lines.append("block  rate    backward: theory  simulation       forward: theory  simulation")
        step = max(1, math.ceil((depth - 1) / 10))
        for i in sorted({*range(0, depth, step), depth - 1}):
            cells = [
                f"{one.factors[i]:8.4f}  {two.factors[i]:.4f} ± {two.errors[i]:.4f}"
                for one, two in ((t.backward, b), (t.forward, f))
            ]
            lines.append(f"{i + 1:>5}  {t.rates[i]:.4f}          {cells[0]}        {cells[1]}")
        lines.append("in total              theory      simulation")
        for name, one, two in (("backward", t.backward, b), ("forward", t.forward, f)):
            error = f" ± {two.mean_error:.0%}"
            mean, typical = _power(one.log2_mean), _power(one.log2_typical)
            lines.append(f"{name + ' mean':<20}  {mean:<10}  {_power(two.log2_mean)}{error}")
            lines.append(f"{name + ' typical':<20}  {typical:<10}  {_power(two.log2_median)} (median)")
        if b.slope is not None:
            lines.append(f"slope of log2 growth on theory's, mask by mask: {b.slope:.3f} backward")
        return "\n".join(lines)


def simulate_growth(
    rates: Rates,
    *,
    kind: str = "vanilla",
    scale: str = "eval",
    sampler: str = "bernoulli",
    gain: float = 2.0,
    width: int = 256,
    draws: int = 8,
    masks: int = 256,
    rows: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> SimulatedGrowth:
    """Measure the growth of second moments in random networks, beside `growth_theory`.

    Each draw has its own weights, input and gradient at the output; its masks share them. Without BatchNorm
    each mask is one row of a batch, so that thousands of masks are one forward and one backward pass (of
    autograd, with the same weights both ways). With BatchNorm each mask has ``rows`` rows, over which it
    normalises.

    Args:
        rates: survival rates, first block first.
        kind: as in `growth_theory`.
        scale: as in `growth_theory`.
        sampler: as in `growth_theory`.
        gain: as in `growth_theory`.
        width: units of a layer. Finite width adds to the mean of a deep vanilla net: at depth 30 about a
            quarter at width 64, and little at 512.
        draws: of the weights, at least 2, for the standard errors.
        masks: for each draw of the weights.
        rows: of a batch with BatchNorm; 64 there. Without BatchNorm rows do not meet, and it must be 1.
        seed: of weights, inputs and masks. No global generator is read or moved.
        device: where to compute.

    Estimator:
        Per-layer factors are means of per-mask ratios and converge fast. The mean of the whole growth does
        not: in the vanilla net its second moment relative to its square is ``((1 + 3p) / (1 + p)^2)^L``, 194
        at L=50, p=.5. Compare medians there.
    """
    theory = growth_theory(rates, kind=kind, scale=scale, sampler=sampler, gain=gain)
    check_count("width", width, 2)
    check_count("draws", draws, 2)
    check_count("masks", masks, 1)
    rows = _simulated_rows(rows, kind)
    generator = torch.Generator().manual_seed(seed)
    h = strength(kind, len(theory.rates), gain)
    found = [_one_draw(theory, width, masks, rows, generator, torch.device(device)) for _ in range(draws)]
    gates, forward, backward, weights = (torch.stack(part) for part in zip(*found, strict=True))
    slopes = _slopes(kind)
    by_draw = weights.mean(1)
    return SimulatedGrowth(
        theory,
        _simulated(forward, _quenched(gates, h, slopes[0])),
        _simulated(backward.flip(-1), _quenched(gates, h, slopes[1]), reverse=True),
        tuple(by_draw.mean(0).tolist()),
        tuple((by_draw.std(0) / math.sqrt(draws)).tolist()),
        {"width": width, "draws": draws, "masks": masks, "rows": rows, "seed": seed},
    )


def _simulated_rows(rows: int | None, kind: str) -> int:
    if kind != "batchnorm":
        if rows not in (None, 1):
            raise UsageError(f"rows must be 1 without BatchNorm, got {rows!r}: ask for more masks or draws")
        return 1
    return check_count("rows", 64 if rows is None else rows, 2)


def draw_masks(
    rates: Sequence[float], count: int, generator: torch.Generator, sampler: str = "bernoulli"
) -> Tensor:
    """Masks of shape [count, L], bool; "exact" as `fallow.masks.batch_exact`, floor or ceil(sum p) blocks."""
    check_choice("sampler", sampler, SAMPLERS)
    ps = torch.tensor(tuple(rates), dtype=torch.float64)
    if sampler == "bernoulli":
        return torch.rand(count, len(ps), generator=generator, dtype=torch.float64) < ps
    order = torch.rand(count, len(ps), generator=generator).argsort(1)
    ends = ps[order].cumsum(1) + torch.rand(count, 1, generator=generator, dtype=torch.float64)
    starts = torch.cat([ends[:, :1] - ps[order][:, :1], ends[:, :-1]], 1)
    return torch.zeros(count, len(ps), dtype=torch.bool).scatter(1, order, ends.floor() > starts.floor())


def toy_forward(
    start: Tensor, gates: Tensor, weights: Iterable[Tensor], kind: str = "vanilla"
) -> tuple[list[Tensor], list[Tensor]]:
    """The sums y_0..y_L of a random network, and the inputs of its weights.

    Args:
        start: y_0, [masks, rows, width]; BatchNorm is over the rows of each mask.
        gates: [masks, L], what multiplies each branch.
        weights: L matrices [width, width].
        kind: "vanilla", "scaled" or "batchnorm".
    """
    sums, inputs = [start], []
    s = gates.shape[1] ** -0.5 if kind == "scaled" else 1.0
    for gate, weight in zip((s * gates).unbind(1), weights, strict=True):
        y = sums[-1]
        if kind == "batchnorm":
            centred = y - y.mean(1, keepdim=True)
            y = centred * (centred.square().mean(1, keepdim=True) + 1e-5).rsqrt()
        inputs.append(y.relu())
        sums.append(sums[-1] + gate[:, None, None] * (inputs[-1] @ weight.T))
    return sums, inputs


def toy_weights(
    depth: int, width: int, gain: float, generator: torch.Generator, like: Tensor
) -> list[Tensor]:
    """L matrices of independent normal numbers of variance gain / width."""
    deviation = math.sqrt(gain / width)
    return [(torch.randn(width, width, generator=generator) * deviation).to(like) for _ in range(depth)]


def _one_draw(
    theory: GrowthTheory, width: int, masks: int, rows: int, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Squared gates and squared norms, by mask, of one network.

    Gates [masks, L]; sums and their gradients [masks, L + 1]; gradients of the weights [masks, L].
    """
    ps, eval_scale = torch.tensor(theory.rates, dtype=torch.float64), theory.scale == "eval"
    squares = ps.new_ones(len(ps)) if eval_scale else ps.pow(-2)
    h = strength(theory.kind, len(ps), theory.gain)
    largest = float((1 + h * squares).log2().sum())
    like = torch.empty((), dtype=torch.float64 if largest > 60 else torch.float32, device=device)
    start = torch.randn(1, rows, width, generator=generator).to(like)
    end = torch.randn(1, rows, width, generator=generator).to(like)
    weights = toy_weights(len(ps), width, theory.gain, generator, like)
    on = draw_masks(theory.rates, masks, generator, theory.sampler)
    gates = on * squares.sqrt()
    at_once = max(1, (1 << 22) // (rows * width * max(1, len(ps) // 8)))  # bounds the memory of the graph
    parts = [_norms(start, end, part.to(like), weights, theory.kind) for part in gates.split(at_once)]
    forward, backward, by_weight = (torch.cat(part).double().cpu() for part in zip(*parts, strict=True))
    s2 = h / theory.gain * 2
    unit = (forward[:, :1] / rows) * backward[:, -1:]
    return gates.square(), forward, backward, s2 * gates.square() * by_weight / unit


def _norms(
    start: Tensor, end: Tensor, gates: Tensor, weights: list[Tensor], kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    first = start.expand(len(gates), -1, -1).clone().requires_grad_()
    with torch.enable_grad():
        sums, inputs = toy_forward(first, gates, weights, kind)
        grads = torch.autograd.grad((sums[-1] * end).sum(), sums)
    with torch.no_grad():
        # |sum over rows of b_i x_i^T|^2 by the inner products of rows: no matrix of the weights' size a mask
        by_weight = [
            ((b @ b.transpose(1, 2)) * (x @ x.transpose(1, 2))).sum((1, 2))
            for b, x in zip(grads[1:], inputs, strict=True)
        ]
        squared = [torch.stack([t.double().square().sum((1, 2)) for t in side], 1) for side in (sums, grads)]
        return squared[0], squared[1], torch.stack(by_weight, 1)


def _quenched(squares: Tensor, h: float, slope: float) -> Tensor:
    """log2 of theory's growth of each mask, from squared gates [..., L]."""
    divisor = 1 + slope * h * (squares.cumsum(-1) - squares)
    return (1 + h * squares / divisor).log2().sum(-1)


def _simulated(moments: Tensor, quenched: Tensor, reverse: bool = False) -> Simulated:
    """Statistics of squared norms [draws, masks, L + 1], in the order of the signal."""
    draws = len(moments)
    ratios = (moments[..., 1:] / moments[..., :-1]).mean(1)
    whole = moments / moments[..., :1]
    logs = whole[..., -1].log2()
    means = whole.mean(1)
    mean = means.mean(0)
    centred, expected = logs - logs.mean(1, keepdim=True), quenched - quenched.mean(1, keepdim=True)
    varies = float(expected.square().sum())
    ordered = [t.flip(-1) if reverse else t for t in (ratios, mean)]
    return Simulated(
        factors=tuple(ordered[0].mean(0).tolist()),
        errors=tuple((ordered[0].std(0) / math.sqrt(draws)).tolist()),
        log2_mean=float(mean[-1].log2()),
        mean_error=float(means[:, -1].std() / math.sqrt(draws) / mean[-1]),
        log2_median=float(logs.median()),
        log2_spread=float(centred.square().mean().sqrt()),
        slope=float((centred * expected).sum()) / varies if varies > 1e-9 else None,
        profile=tuple(ordered[1].log2().tolist()),
    )


# --- on a user's own model -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Growth in one direction, without the noise and with it.

    Attributes:
        dense: by branch, second moment behind its sum (as the signal goes) relative to the one before it;
            None for gradients at the first branch where its shortcut has none or is overwritten by the sum.
        noisy: the same with the noise: a ratio of means over masks.
        errors: standard errors of ``noisy`` over the draws (jackknife).
        dense_total: from the first shortcut to the last sum, or back.
        noisy_total: the same with the noise.
        total_error: standard error of ``noisy_total``; too small where rare masks carry the mean.
        log_excess: mean over draws of ln(total growth with noise / without).
        excess_error: its standard error.
    """

    dense: tuple[float | None, ...]
    noisy: tuple[float | None, ...]
    errors: tuple[float | None, ...]
    dense_total: float
    noisy_total: float
    total_error: float
    log_excess: float
    excess_error: float


@dataclass(frozen=True)
class SignalGrowth:
    """Growth of signals and gradients in a model; made by `signal_growth`.

    Attributes:
        branches: names, in the order they run.
        rates: survival rate of each branch's site.
        scale: of the gates.
        draws: of the masks.
        forward: mean square of an element of the residual sum.
        backward: squared norm of the loss gradient with respect to the residual sum.
        silent: branches that give exact zeros (a norm initialised at zero), where noise does nothing.
        warnings: in words, where they apply.
    """

    branches: tuple[str, ...]
    rates: tuple[float, ...]
    scale: str
    draws: int
    forward: Measured
    backward: Measured
    silent: tuple[str, ...]
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """A table."""
        wide = max(len(name) for name in (*self.branches, "branch"))
        sides = self.forward, self.backward
        lines = [f"second moments by branch, scale={self.scale!r}, {self.draws} draws of the masks"]
        lines.append(
            f"{'branch':<{wide}}  rate   forward: dense  with noise        backward: dense  with noise"
        )
        for i, name in enumerate(self.branches):
            cells = "          ".join(_cells(m.dense[i], m.noisy[i], m.errors[i]) for m in sides)
            lines.append(f"{name:<{wide}}  {self.rates[i]:.3f}        {cells}")
        cells = "          ".join(_cells(m.dense_total, m.noisy_total, m.total_error) for m in sides)
        lines.append(f"{'in total':<{wide}}               {cells}")
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings)])


def _cells(dense: float | None, noisy: float | None, error: float | None) -> str:
    if dense is None or noisy is None or error is None:
        return f"{'-':>8}  {'-':>8}         "
    return f"{dense:8.4g}  {noisy:8.4g} ± {error:<6.2g}"


def signal_growth(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Iterable[Any],
    *,
    rates: Any = None,
    scale: str | None = None,
    draws: int = 8,
    granularity: str = "branch",
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    max_batches: int = 2,
    seed: int = 0,
) -> SignalGrowth:
    """Measure how second moments of signals and gradients grow over a model's residual sums.

    Every branch is computed and multiplied by its gate, each row of a batch with its own mask (one mask for
    the batch where a branch's rows cannot be told apart). BatchNorm normalises by the batch's own statistics,
    as in training; the model's other modules run in eval mode. Afterwards the model is as it was.

    Forward, the mean square of an element of a sum; backward, the squared norm of the gradient of the loss
    with respect to it. Layers between two sums (a transition, a norm) are part of the factor of the later one
    (forward) or of the earlier one (backward): read the noise off the comparison with ``dense``.

    Args:
        model: any module with residual branches.
        loss_fn: ``loss_fn(output, target)``, one number.
        batches: (inputs, target) pairs or dicts, as in `fallow.plan`.
        rates: a rule, a mapping or a plan; None: as the model was applied, else ``rates.linear(last=0.5)``.
        scale: "train" or "eval"; None: as the model was applied, else "train".
        draws: of the masks on every batch, at least 2.
        granularity: as in `fallow.sites`.
        include: as in `fallow.sites`.
        exclude: as in `fallow.sites`.
        max_batches: how many batches to take.
        seed: of the masks. No global generator is read or moved.

    Estimator:
        Ratios of means over rows and draws. The mean over masks of a deep un-normalised network is carried by
        rare masks and comes out low with few draws.

    Raises:
        SiteError: no site, an unknown site, or one whose sum no gradient reaches, by name.
        RateError: a rate outside (0, 1].
        UsageError: no batches; too few rows for BatchNorm; a loss that is not one number.
        RunError: a loss that is not finite.
    """
    check_count("signal_growth: draws", draws, 2)
    data = pairs(model, batches, max_batches, "signal_growth")
    handle = handle_of(model)
    scale = scale if scale is not None else handle.options.scale if handle is not None else "train"
    check_choice("signal_growth: scale", scale, SCALES)
    with tapped(
        model, data[0][0], granularity=granularity, include=include, exclude=exclude
    ) as taps, torch.enable_grad():  # fmt: skip
        costs = taps.costs
        if rates is None:
            rates = {n: handle.rates[n] for n in costs} if handle is not None else rules.linear(last=0.5)
        asked = rules.resolve(rates, costs)
        _as_in_training(model, data)
        generator = torch.Generator().manual_seed(seed)
        dense = _Recorder(taps, loss_fn).over(data, None)
        noisy = [_Recorder(taps, loss_fn).over(data, _Masks(asked, scale, generator)) for _ in range(draws)]
        names = tuple(b.name for b in taps.branches)
        by_branch = tuple(asked[b.site] for b in taps.branches)
    forward = _measured(dense.forward, [r.forward for r in noisy])
    backward = _measured(dense.backward[::-1], [r.backward[::-1] for r in noisy], reverse=True)
    whole = include is None and exclude is None  # else the model may have more sites than are counted here
    warnings = _warnings(len(costs) if whole else SHALLOW, by_branch, scale, forward, backward)
    silent = tuple(n for n in names if n not in dense.active)
    if silent:
        warnings = (_silence(silent), *warnings)
    return SignalGrowth(names, by_branch, scale, draws, forward, backward, silent, warnings)


def _as_in_training(model: nn.Module, data: list[Any]) -> None:
    """BatchNorm in training mode; its buffers are restored with the rest of the model."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if min(rows_of(inputs) for inputs, _ in data) < 2:
                raise UsageError(
                    f"signal_growth: {name} normalises over the batch: pass batches of at least 2 rows"
                )
            module.train()


class _Masks:
    """Gates of one forward: one number a row for each site, drawn where they are first asked for."""

    def __init__(self, rates: Mapping[str, float], scale: str, generator: torch.Generator) -> None:
        self.rates, self.scale, self.generator = rates, scale, generator
        self.drawn: dict[tuple[str, int], Tensor] = {}

    def gate(self, branch: BranchState, value: Tensor, dim: int) -> Tensor:
        """The value with its gate."""
        rate = self.rates[branch.site]
        if rate == 1:
            return value
        rows = 1 if branch.dim is None else value.shape[dim]
        key = branch.site, rows
        if key not in self.drawn:
            kept = torch.rand(rows, generator=self.generator, dtype=torch.float64) < rate
            self.drawn[key] = kept / (rate if self.scale == "train" else 1.0)
        shape = [1] * value.dim()
        shape[dim] = rows
        return value * self.drawn[key].to(value).reshape(shape)


class _Recorder:
    """Second moments at every sum, summed over the batches of one draw.

    Attributes:
        forward: mean squares of the first shortcut and of each branch's sum, in the order they run.
        backward: squared norms of the gradients there; NaN where none came.
    """

    def __init__(self, taps: Taps, loss_fn: LossFunction) -> None:
        self.taps, self.loss_fn = taps, loss_fn
        self.first = taps.branches[0].name
        self.moments: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.grads: dict[str, float] = {}
        self.active: set[str] = set()  # branches seen to give something other than zeros

    def over(self, data: list[Any], masks: _Masks | None) -> _Recorder:
        """Run every batch, each with masks of its own."""
        for inputs, target in data:
            if masks is not None:
                masks.drawn.clear()
            inputs = tree_map(_with_gradient, inputs)
            output = self.taps.forward(inputs, self._decide(masks))
            loss_of(self.loss_fn, output, target, "signal_growth").backward()
        names = [b.name for b in self.taps.branches]
        for name in names:
            if name not in self.counts:
                raise SiteError(f"{name}: its residual sum was not reached: leave it out with exclude=")
            moment, grad = self.moments[name] / self.counts[name], self.grads.get(name, 0.0)
            if not (0 < moment < math.inf and grad < math.inf):
                raise RunError(
                    f"{name}: the mean square of its residual sum is {moment:g}, the squared norm of its "
                    f"gradient {grad:g}: growth is not defined there; check weights and inputs"
                )
            if grad == 0:
                came = "a gradient of zero" if name in self.grads else "no gradient"
                raise SiteError(
                    f"{name}: {came} reaches its residual sum: the loss must depend on it (is something "
                    "detached, or a head still at zero?), or leave the site out with exclude="
                )
        self.forward = [self.moments[n] / self.counts[n] for n in ("", *names)]
        if not 0 < self.forward[0] < math.inf:
            raise RunError(
                f"{self.first}: the mean square of its shortcut is {self.forward[0]:g}: growth is not "
                "defined there; check weights and inputs"
            )
        self.backward = [self.grads.get(n) or math.nan for n in ("", *names)]
        return self

    def _decide(self, masks: _Masks | None) -> Callable[[BranchState], Run]:
        def gate(run: Run, value: Tensor) -> Tensor:
            if not value.requires_grad:
                value = value * seed_of_graph(value.device).to(value)
            return value if masks is None else masks.gate(run.branch, value, run.dim)

        def watch(run: Run, shortcut: Tensor, value: Tensor | None, out: Tensor) -> None:
            name = run.branch.name
            if name not in self.active and value is not None and bool(value.detach().any()):
                self.active.add(name)
            if name == self.first and shortcut is not out:
                self._see("", shortcut)
            elif name == self.first and value is not None:  # a sum in place: the shortcut is gone
                self._add("", out.detach() - value.detach())
            self._see(name, out)

        return lambda branch: Run(branch, 1.0, None, False, gate=gate, watch=watch)

    def _see(self, name: str, tensor: Tensor) -> None:
        self._add(name, tensor.detach())

        def add(grad: Tensor) -> None:
            self.grads[name] = self.grads.get(name, 0.0) + _square(grad.detach())

        if tensor.requires_grad:
            tensor.register_hook(add)

    def _add(self, name: str, values: Tensor) -> None:
        self.moments[name] = self.moments.get(name, 0.0) + _square(values)
        self.counts[name] = self.counts.get(name, 0) + values.numel()


def _square(values: Tensor) -> float:
    """Sum of squares; not in half precision, which overflows at 65504."""
    return float(values.to(torch.promote_types(values.dtype, torch.float32)).square().sum())


def _with_gradient(leaf: Any) -> Any:
    """Floats ask for a gradient, so that it reaches the first shortcut even where that is the input."""
    if isinstance(leaf, Tensor) and leaf.is_floating_point():
        return leaf.detach().requires_grad_().clone()  # no leaf: the model may write into it
    return leaf


def _measured(dense: list[float], noisy: list[list[float]], reverse: bool = False) -> Measured:
    """Ratios along the way of the signal, with jackknife errors over the draws."""
    end = len(dense) - 1
    while math.isnan(dense[end]):
        end -= 1
    pairs_ = [(i, i + 1) for i in range(len(dense) - 1)]
    rows = [(dense[j] / dense[i], *_ratio(noisy, i, j)) if j <= end else (None,) * 3 for i, j in pairs_]
    total, error = _ratio(noisy, 0, end)
    plain = dense[end] / dense[0]
    logs = [math.log(draw[end] / draw[0] / plain) for draw in noisy]
    mean = sum(logs) / len(logs)
    spread = math.sqrt(sum((x - mean) ** 2 for x in logs) / (len(logs) - 1) / len(logs))
    by_branch = zip(*(reversed(rows) if reverse else rows), strict=True)
    values, means, errors = (tuple(column) for column in by_branch)
    return Measured(values, means, errors, plain, total, error, mean, spread)


def _ratio(draws: list[list[float]], i: int, j: int) -> tuple[float, float]:
    """Mean of point j over mean of point i, and its jackknife error."""
    above, below = sum(d[j] for d in draws), sum(d[i] for d in draws)
    without = [(above - d[j]) / (below - d[i]) for d in draws]
    mean = sum(without) / len(without)
    spread = sum((x - mean) ** 2 for x in without) * (len(without) - 1) / len(without)
    return above / below, math.sqrt(spread)


def _warnings(
    sites: int, rates: Sequence[float], scale: str, forward: Measured, backward: Measured
) -> tuple[str, ...]:
    if all(p == 1 for p in rates):
        return ()
    if sites < SHALLOW:
        return (
            f"{sites} {'site' if sites == 1 else 'sites'}: stochastic depth mostly hurts networks this "
            "shallow (reports of 3 and 4 blocks are all worse than without it); leave it to deeper ones",
        )
    sides = {"signals": forward, "gradients": backward}
    # Without norms and scaling both grow alike (D8); behind a norm signals do not, and gradients may.
    if scale == "eval" or not all(_compounds(side.dense) for side in sides.values()):
        return ()
    root = 1 / len(rates)
    found = [
        f"{name} {side.noisy_total:.3g} against {side.dense_total:.3g}, "
        f"{side.noisy_total**root:.3g} against {side.dense_total**root:.3g} a branch"
        for name, side in sides.items()
        if side.log_excess > 3 * side.excess_error
    ]
    if not found:
        return ()
    return (
        f'scale="train" makes second moments grow faster over {len(rates)} branches than no noise at all '
        f"({'; '.join(found)}): the branches are neither normalised nor scaled down. Normalise, scale them "
        'by 1/sqrt(depth), or take scale="eval"',
    )


def _silence(names: Sequence[str]) -> str:
    some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    said = "this branch gives" if len(names) == 1 else "these branches give"
    return (
        f"{some}: {said} exact zeros (a last layer initialised at zero?), so that growth says nothing yet: "
        "measure again after some training"
    )


def _compounds(factors: Sequence[float | None]) -> bool:
    """Whether the last blocks still multiply the second moment, by as much as the first ones.

    Behind a norm blocks add fixed amounts and their factors fall to 1; scaled ones are close to 1 throughout.
    """
    known = [math.log(x) for x in factors if x is not None]
    part = max(2, len(known) // 3)
    early, late = sum(known[:part]) / part, sum(known[-part:]) / part
    return late > math.log(_UNSCALED) and late > early / 2

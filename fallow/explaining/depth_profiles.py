"""How weights, sensitivities and noise lie over the depth of a network at initialisation.

The networks and the strength h are those of `fallow.explaining.growth`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fallow.errors import UsageError, check_count, check_rate
from fallow.explaining._growth_common import LOST, Rates, checked, checked_rates, gate_moments, slopes


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
    ps, h = checked(rates, kind, scale, gain)
    seconds = [gate_moments(p, scale)[1] for p in ps]
    slope, divisor, logs = slopes(kind)[1], 1.0, []
    for second in seconds:
        logs.append(math.log2(1 + h * second / divisor))
        divisor += slope * h * second
    whole, before, found = sum(logs), 0.0, []
    for second, log in zip(seconds, logs, strict=True):
        before += log
        others = whole - (before if kind == "batchnorm" else log)
        growth = 2.0**others if others < 1000 else math.inf
        found.append(h / gain * second * (1 + LOST * (growth - 1) if kind == "batchnorm" else growth))
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
    moments = [gate_moments(p, scale) for p in checked_rates(rates)]
    return sum(second - first * first for first, second in moments)

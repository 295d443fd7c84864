"""Survival rates for a budget: Uniform, Linear, SenseMode, and the choice between them. Pure Python.

Sites are l = 1..L with costs c_l, shares of a whole dense step that sum to at most 1, and sensitivities S_l
>= 0. A budget B is the expected share of the dense step that a rate p_l at every site leaves:

    1 - sum_l c_l (1 - p_l) = B
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fallow import rates
from fallow.errors import ArgumentError, RateError, SiteError, UsageError, check_rate, nearest

MINIMUM_RATE = 0.1
# `auto`: below this coefficient of variation the blocks count as interchangeable. Measured on trained toys:
# 0 to 0.13 where blocks are alike, 0.41 to 0.58 where three of twelve matter; at initialisation both have
# 0.22 to 0.34.
SPREAD = 0.3
# `auto`: below this mean survival rate noise is plentiful, and the budget goes to the blocks that matter.
SMALL = 0.5
# Slack for a budget that equals its bound but for rounding.
_ROUNDING = 1e-12
# Sensitivities this far below the largest are zeros: their breakpoints would overflow.
_NOTHING = 1e-200


@dataclass(frozen=True)
class Choice:
    """What `auto` chose.

    Attributes:
        method: "uniform" or "sensemode".
        rates: survival rate by site.
        spread: the coefficient of variation of the sensitivities that it looked at.
        reason: the rule in words, with the numbers.
    """

    method: str
    rates: dict[str, float]
    spread: float
    reason: str


def uniform(costs: Mapping[str, float], budget: float) -> dict[str, float]:
    """The same rate at every site, whatever each costs.

    Raises:
        RateError: a budget outside (0, 1] or out of reach, with the smallest feasible one.

    Examples:
        >>> uniform({"a": 0.5, "b": 0.5}, 0.75)
        {'a': 0.75, 'b': 0.75}
    """
    return dict(rates.uniform(budget=budget)(check_costs(costs)))


def linear(costs: Mapping[str, float], budget: float) -> dict[str, float]:
    """Huang's rule, p_l = 1 - l/L (1 - p_L), with p_L solved for.

    Raises:
        RateError: a budget outside (0, 1] or out of reach, with the smallest feasible one.
    """
    return dict(rates.linear(budget=budget)(check_costs(costs)))


def sensemode(
    sensitivities: Mapping[str, float],
    costs: Mapping[str, float] | None = None,
    *,
    budget: float,
    minimum_rate: float = MINIMUM_RATE,
    gamma: float = 1.0,
) -> dict[str, float]:
    """SenseMode: rates in proportion to sensitivities, clipped, at the budget exactly.

    Formula: ``p_l = min(1, max(p_min, a w_l))`` with ``w_l = (S_l / sqrt(c_l))^gamma`` and the a that meets
    the budget. With equal costs and gamma 1, ``p_l`` is proportional to ``S_l``. It is the one minimiser of
    the noise ``sum S_l^2 / p_l`` under the budget and ``p_min <= p_l <= 1`` (for gamma 1).

    Args:
        sensitivities: S_l >= 0 by site; only their ratios matter.
        costs: c_l by site; None: every site costs the same and the budget is the mean survival rate.
        budget: expected share of a dense step.
        minimum_rate: p_min, in (0, 1]; it keeps every block trained, and its sensitivity measurable.
        gamma: 0 gives Uniform, 1 SenseMode, between them a mixture.

    Returns:
        Survival rate by site. The budget is met to rounding. Sites of sensitivity 0 stay at p_min until all
        others are at 1 and then share what is left evenly (the limit of small equal sensitivities).

    Raises:
        RateError: the budget is out of reach, with the smallest feasible one.
        UsageError: a negative or non-finite sensitivity or cost.
        SiteError: sensitivities and costs name different sites.

    Estimator:
        Exact: the breakpoints of a piecewise linear function are sorted and searched, O(L log L).

    References:
        Hayou & Ayed (2021) for SenseMode, in the form that fallow's notes remember; the exact solver, its
        optimality (derived, D18, D19), costs (D20) and gamma (D21) are ours.

    Examples:
        >>> sensemode({"a": 4.0, "b": 1.0, "c": 2.0, "d": 1.0}, budget=0.625)
        {'a': 1.0, 'b': 0.375, 'c': 0.75, 'd': 0.375}
    """
    if costs is None:
        costs = dict.fromkeys(sensitivities, 1 / max(len(sensitivities), 1))
    costs = check_costs(costs)
    known = _checked(sensitivities, costs)
    budget, minimum = check_rate(budget, name="budget"), check_rate(minimum_rate, name="minimum_rate")
    check_gamma(gamma)
    total = math.fsum(costs.values())
    wanted = budget - (1.0 - total)  # sum c_l p_l
    if wanted < minimum * total - _ROUNDING:
        raise RateError(
            f"rates of at least {minimum:g} over {len(costs)} sites cannot reach the budget {budget:g}: the "
            f"sites hold {total:.1%} of a step; the smallest feasible budget is "
            f"{_rounded_up(1.0 - total * (1.0 - minimum))}, or lower minimum_rate"
        )
    return _solve(_weights(known, costs, gamma), costs, min(max(wanted, minimum * total), total), minimum)


def auto(
    sensitivities: Mapping[str, float],
    costs: Mapping[str, float] | None = None,
    *,
    budget: float,
    errors: Mapping[str, float] | None = None,
    minimum_rate: float = MINIMUM_RATE,
    gamma: float = 1.0,
) -> Choice:
    """Choose between Uniform and SenseMode.

    The rule, ours: SenseMode where the sensitivities differ (coefficient of variation, sampling noise taken
    off, of at least 0.3), or where the mean survival rate that the budget leaves is below 0.5; else Uniform.

    The Budget Hypothesis says that a small budget is best spent on the sensitive blocks, while a large one
    leaves little noise and should have most of it, which Uniform has. In our own trials the second half holds
    for blocks that are close to interchangeable; with planted importances SenseMode won at every budget, so a
    switch on the budget alone would be wrong. At initialisation blocks look alike: plan again after training.

    Args:
        sensitivities: as in `sensemode`.
        costs: as in `sensemode`.
        budget: as in `sensemode`.
        errors: standard errors of the sensitivities, for the noise in their spread.
        minimum_rate: as in `sensemode`.
        gamma: as in `sensemode`.

    Raises:
        RateError: as in `sensemode`.
    """
    if costs is None:
        costs = dict.fromkeys(sensitivities, 1 / max(len(sensitivities), 1))
    costs = check_costs(costs)
    known = _checked(sensitivities, costs)
    differ = spread(known, errors)
    total = math.fsum(costs.values())
    mean_rate = (check_rate(budget, name="budget") - (1 - total)) / total if total else 1.0
    if not any(known.values()):
        found, why = "uniform", "every sensitivity is zero, so nothing tells the blocks apart"
    elif differ >= SPREAD:
        found, why = "sensemode", f"the blocks differ (spread {differ:.2f}, at least {SPREAD:g})"
    elif mean_rate < SMALL:
        found = "sensemode"
        why = f"the budget leaves a mean rate of {mean_rate:.2f}, below {SMALL:g} (spread {differ:.2f})"
    else:
        found = "uniform"
        why = (
            f"the blocks are close to interchangeable (spread {differ:.2f}, below {SPREAD:g}) and the budget "
            f"leaves a mean rate of {mean_rate:.2f}, at least {SMALL:g}"
        )
    if found == "uniform":
        chosen = uniform(costs, budget)
    else:
        chosen = sensemode(known, costs, budget=budget, minimum_rate=minimum_rate, gamma=gamma)
    return Choice(found, chosen, differ, f"auto took {found}: {why}")


def spread(sensitivities: Mapping[str, float], errors: Mapping[str, float] | None = None) -> float:
    """Coefficient of variation of the sensitivities, their sampling noise taken off.

    Formula: ``sqrt(max(0, var_l S_l - mean_l e_l^2)) / mean_l S_l``, var_l with L - 1; 0 for one site or
        zeros.

    Examples:
        >>> round(spread({"a": 1.0, "b": 3.0}), 6)
        0.707107
        >>> spread({"a": 1.0, "b": 3.0}, {"a": 2.0, "b": 2.0})
        0.0
    """
    values = list(sensitivities.values())
    if len(values) < 2 or not any(values):
        return 0.0
    most = max(values)  # only ratios count, and the squares of these cannot overflow
    values = [v / most for v in values]
    mean = math.fsum(values) / len(values)
    variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
    noise = (
        math.fsum((errors.get(n, 0.0) / most) ** 2 for n in sensitivities) / len(values) if errors else 0.0
    )
    return math.sqrt(max(0.0, variance - noise)) / mean


def check_gamma(gamma: object) -> None:
    """Refuse what is no number of at least 0."""
    if isinstance(gamma, bool) or not isinstance(gamma, (int, float)) or not 0 <= gamma < math.inf:
        raise UsageError(f"gamma must be a number of at least 0, got {gamma!r}")


def check_costs(costs: Mapping[str, float]) -> dict[str, float]:
    """Costs as they are, if they are shares of one step.

    Raises:
        UsageError: one is negative or not finite, or together they are more than the step.
        SiteError: there is no site.
    """
    if not isinstance(costs, Mapping):
        raise ArgumentError(f"costs must be a mapping from site name to share of a step, got {costs!r}")
    if not costs:
        raise SiteError("there are no sites to give survival rates to")
    for name, cost in costs.items():
        if not _is_size(cost):
            raise UsageError(f"{name}: its cost must be a share of a step, at least 0, got {cost!r}")
    total = math.fsum(costs.values())
    if total > 1 + 1e-9:
        raise UsageError(f"costs are shares of one step and sum to at most 1, got {total:g}")
    return dict(costs)


def _checked(sensitivities: Mapping[str, float], costs: Mapping[str, float]) -> dict[str, float]:
    if not isinstance(sensitivities, Mapping):
        raise ArgumentError(
            f"sensitivities must be a mapping from site name to number, got {sensitivities!r}"
        )
    for name in sensitivities:
        if name not in costs:
            close = nearest(str(name), costs)
            raise SiteError(
                f"{name}: has a sensitivity but no cost" + (f"; did you mean {close}?" if close else "")
            )
    for name in costs:
        if name not in sensitivities:
            raise SiteError(f"{name}: has a cost but no sensitivity; give one for each site")
        value = sensitivities[name]
        if not _is_size(value):
            raise UsageError(f"{name}: its sensitivity must be a number of at least 0, got {value!r}")
    return {name: float(sensitivities[name]) for name in costs}


def _is_size(value: Any) -> bool:
    try:
        return math.isfinite(value) and value >= 0
    except TypeError:
        return False


def _weights(known: Mapping[str, float], costs: Mapping[str, float], gamma: float) -> dict[str, float]:
    """w_l over the largest finite one; infinite for what is free and need never rest."""
    if gamma == 0:
        return dict.fromkeys(costs, 1.0)
    most = max(known.values()) or 1.0  # ratios alone count, and they cannot overflow
    plain = {n: known[n] / most / math.sqrt(c) if c else math.inf for n, c in costs.items()}
    largest = max((w for w in plain.values() if w < math.inf), default=0.0) or 1.0
    return {n: w if w == math.inf else (w / largest) ** gamma for n, w in plain.items()}


def _solve(
    weights: Mapping[str, float], costs: Mapping[str, float], wanted: float, minimum: float
) -> dict[str, float]:
    """``clip(a w_l, minimum, 1)`` with the a for which ``sum c_l p_l = wanted``."""
    free = [n for n, w in weights.items() if w == math.inf]
    alive = [n for n, w in weights.items() if _NOTHING < w < math.inf]
    dead = [n for n, w in weights.items() if w <= _NOTHING]
    left = wanted - math.fsum(costs[n] for n in free) - minimum * math.fsum(costs[n] for n in dead)
    full = math.fsum(costs[n] for n in alive)
    found = dict.fromkeys(free, 1.0) | dict.fromkeys(dead, minimum) | dict.fromkeys(alive, 1.0)
    if alive and left < full:
        found |= _interpolated({n: weights[n] for n in alive}, costs, left, minimum)
    elif dead:
        share = (wanted - math.fsum(costs[n] for n in free) - full) / math.fsum(costs[n] for n in dead)
        found |= dict.fromkeys(dead, min(max(share, minimum), 1.0))
    return {name: found[name] for name in weights}


def _interpolated(
    weights: Mapping[str, float], costs: Mapping[str, float], wanted: float, minimum: float
) -> dict[str, float]:
    """The same for positive weights: bisect over the breakpoints, then solve the segment the budget is in."""

    def filled(scale: float) -> float:
        return math.fsum(costs[n] * min(max(scale * w, minimum), 1.0) for n, w in weights.items())

    # Each filled from scratch: sums carried along the breakpoints would carry rounding over all magnitudes.
    turns = sorted(turn for w in weights.values() for turn in (minimum / w, 1.0 / w))
    at = turns[max(bisect_right(turns, wanted, key=filled) - 1, 0)]
    low = [n for n, w in weights.items() if minimum / w > at]
    high = [n for n, w in weights.items() if 1.0 / w <= at]
    rising = [n for n, w in weights.items() if minimum / w <= at < 1.0 / w]
    rest = wanted - math.fsum(costs[n] for n in high) - minimum * math.fsum(costs[n] for n in low)
    scale = rest / math.fsum(costs[n] * weights[n] for n in rising) if rising else 0.0
    found = dict.fromkeys(low, minimum) | dict.fromkeys(high, 1.0)
    return found | {n: min(max(scale * weights[n], minimum), 1.0) for n in rising}


def _rounded_up(bound: float) -> str:
    """The first four-digit number that is not below the bound."""
    return f"{min(math.ceil(bound * 1e4 - 1e-6) / 1e4, 1.0):g}"

"""Survival rates over the depth of a model.

A rule is called with the costs of the sites, an ordered mapping from site name to the share of a whole
training step's FLOPs that the site's branch takes, and returns a survival rate in (0, 1] for each of them.
The costs sum to at most 1: what is left over cannot rest, and a budget counts it in.

Sites are numbered l = 1..L in the order of the costs, p_l is the survival rate of site l and c_l its cost:

    expected cost  =  1 - sum_l c_l (1 - p_l)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from fallow.errors import ArgumentError, RateError, SiteError, check_rate, nearest, refuse_unknown

Costs = Mapping[str, float]
Rule = Callable[[Costs], Mapping[str, float]]

# Slack for a budget or a mean that equals its bound but for rounding.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Uniform:
    """The same survival rate at every site; made by `uniform`."""

    survival_rate: float | None = None
    budget: float | None = None

    def __call__(self, costs: Costs) -> dict[str, float]:
        """Return the survival rate of each site in `costs`."""
        if self.budget is None:
            rate = self.survival_rate
            assert rate is not None  # `uniform` sets exactly one of the two
        else:
            rate = 1.0 - _drop_for("uniform", self.budget, costs, dict.fromkeys(costs, 1.0))
        return dict.fromkeys(costs, rate)


@dataclass(frozen=True)
class Linear:
    """Survival rates that fall on a line from the first site to the last; made by `linear`."""

    last: float | None = None
    first: float | None = None
    mean: float | None = None
    budget: float | None = None

    def __call__(self, costs: Costs) -> dict[str, float]:
        """Return the survival rate of each site in `costs`."""
        count = len(costs)
        if self.first is not None:
            assert self.last is not None  # `linear` refuses `first` without `last`
            steps = [1.0] if count == 1 else [site / (count - 1) for site in range(count)]
            start, end = self.first, self.last
        else:
            steps = [(site + 1) / count for site in range(count)]
            start, end = 1.0, self._end(costs, steps)
        return {name: _between(start, end, step) for name, step in zip(costs, steps, strict=True)}

    def _end(self, costs: Costs, steps: list[float]) -> float:
        """p_L of Huang's form, from whichever of the three was given."""
        if self.last is not None:
            return self.last
        if self.budget is not None:
            return 1.0 - _drop_for("linear", self.budget, costs, dict(zip(costs, steps, strict=True)))
        assert self.mean is not None
        # mean = 1 - (1 - p_L)(L + 1)/(2 L), and p_L > 0
        count = max(len(costs), 1)
        drop = (1.0 - self.mean) * 2 * count / (count + 1)
        if drop >= 1.0 - _ROUNDING:
            bound = (count - 1) / (2 * count)
            raise RateError(
                f"linear rates over {count} sites cannot have the mean {self.mean:g}: it must be above "
                f"(L-1)/2L = {bound:.6g}, so the smallest feasible mean is {_just_above(bound)}; "
                "pass that, or use uniform rates"
            )
        return 1.0 - drop


@dataclass(frozen=True)
class Explicit:
    """Survival rates by name or pattern; made by `explicit`."""

    table: tuple[tuple[str, float], ...]
    default: float = 1.0

    def __call__(self, costs: Costs) -> dict[str, float]:
        """Return the survival rate of each site in `costs`."""
        for pattern, _ in self.table:
            if pattern not in costs and not any(fnmatchcase(name, pattern) for name in costs):
                raise _unknown_site(pattern, costs)
        return {name: self._rate(name) for name in costs}

    def _rate(self, name: str) -> float:
        exact = dict(self.table)
        if name in exact:
            return exact[name]
        return next((rate for pattern, rate in self.table if fnmatchcase(name, pattern)), self.default)


def uniform(
    survival_rate: float | None = None,
    *,
    mean: float | None = None,
    budget: float | None = None,
    **unknown: object,
) -> Uniform:
    """The same survival rate at every site.

    Args:
        survival_rate: The rate itself.
        mean: The mean survival rate, here the same thing.
        budget: The expected share of the cost of a whole step; the rate follows from the costs.
        **unknown: Refused, with the conversion where another library's name was used.

    Raises:
        RateError: For a value outside (0, 1]; when called, for a budget that these sites cannot reach.

    Examples:
        >>> uniform(0.8)({"a": 0.5, "b": 0.4})
        {'a': 0.8, 'b': 0.8}
        >>> round(uniform(budget=0.73)({"a": 0.5, "b": 0.4})["a"], 9)
        0.7
    """
    refuse_unknown("uniform", unknown, ("survival_rate", "mean", "budget"))
    given = _one_of("uniform", survival_rate=survival_rate, mean=mean, budget=budget)
    if "budget" in given:
        return Uniform(budget=given["budget"])
    return Uniform(survival_rate=next(iter(given.values())))


def linear(
    last: float | None = None,
    *,
    first: float | None = None,
    mean: float | None = None,
    budget: float | None = None,
    **unknown: object,
) -> Linear:
    """Survival rates that change linearly over the sites.

    Peers mean two different things by "linear"; both ends are spelt out here.

    - `linear(last=p)`, Huang et al. (2016): p_l = 1 - l/L (1 - p), so the first site already drops a little.
    - `linear(first=a, last=b)`: p_l = a + (b - a)(l - 1)/(L - 1), so the first site has exactly `a`.
    - `linear(mean=m)` and `linear(budget=B)`: Huang's form, with the last rate solved for.

    Args:
        last: The survival rate of the last site.
        first: The survival rate of the first site; only together with `last`.
        mean: The mean survival rate; above (L-1)/2L, since the last rate is positive.
        budget: The expected share of the cost of a whole step.
        **unknown: Refused, with the conversion where another library's name was used.

    Raises:
        RateError: For a value outside (0, 1]; when called, for a mean or budget out of reach.

    References:
        Huang, Sun, Liu, Sedra, Weinberger: Deep networks with stochastic depth (2016), equation 4.

    Examples:
        >>> linear(last=0.5)(dict.fromkeys("abcd", 0.2))
        {'a': 0.875, 'b': 0.75, 'c': 0.625, 'd': 0.5}
        >>> linear(first=1.0, last=0.7)(dict.fromkeys("ab", 0.4))
        {'a': 1.0, 'b': 0.7}
    """
    refuse_unknown("linear", unknown, ("last", "first", "mean", "budget"), rate="last")
    if first is not None:
        if last is None or mean is not None or budget is not None:
            raise ArgumentError(
                "linear takes first together with last, and with nothing else: linear(first=, last=)"
            )
        return Linear(
            last=check_rate(last, "linear", name="last"), first=check_rate(first, "linear", name="first")
        )
    given = _one_of("linear", last=last, mean=mean, budget=budget)
    return Linear(**given)


def explicit(mapping: Mapping[str, float], default: float = 1.0) -> Explicit:
    """Survival rates by site name or shell-style pattern.

    An exact name wins over a pattern, an earlier pattern over a later one; other sites get `default`.

    Args:
        mapping: Name or pattern (`"layer3.*"`) to survival rate.
        default: The survival rate of the sites that nothing matches.

    Raises:
        RateError: For a value outside (0, 1].
        SiteError: When called, for a name or pattern that no site has.

    Examples:
        >>> explicit({"layer2.*": 0.5})({"layer1.0": 0.3, "layer2.0": 0.3})
        {'layer1.0': 1.0, 'layer2.0': 0.5}
    """
    if not isinstance(mapping, Mapping):
        raise ArgumentError(f"explicit takes a mapping from site name to survival rate, got {mapping!r}")
    table = tuple((str(name), check_rate(rate, str(name))) for name, rate in mapping.items())
    return Explicit(table, check_rate(default, "explicit", name="default"))


def expected_cost(rates: Mapping[str, float], costs: Costs) -> float:
    """The expected share of the dense cost of a whole step, 1 - sum c_l (1 - p_l).

    Examples:
        >>> expected_cost({"a": 0.5, "b": 1.0}, {"a": 0.4, "b": 0.4})
        0.8
    """
    return 1.0 - math.fsum(cost * (1.0 - rates[name]) for name, cost in costs.items())


def resolve(rates: Rule | Mapping[str, float], costs: Costs) -> dict[str, float]:
    """Turn a rule or a mapping into a checked survival rate for every site, in the order of the sites.

    Args:
        rates: A rule of this module, a function of the costs, or a mapping; the sites that a mapping leaves
            out get 1.
        costs: Ordered site name to share of the cost of a whole step.

    Raises:
        RateError: For a rate outside (0, 1], by site.
        SiteError: For a name that is not a site, with the nearest one; for a site that a function left out.
        ArgumentError: For anything else than a rule or a mapping.
    """
    if isinstance(rates, Mapping):
        found, missing_is_one = rates, True
    elif callable(rates):
        found, missing_is_one = rates(costs), False
    else:
        raise ArgumentError(
            f"rates must be a rule or a mapping from site name to survival rate, got {rates!r}: "
            "for one rate everywhere pass fallow.rates.uniform(rate)"
        )
    if not isinstance(found, Mapping):
        raise ArgumentError(f"a rule must return a mapping from site name to survival rate, got {found!r}")
    for name in found:
        if name not in costs:
            raise _unknown_site(name, costs)
    if not missing_is_one:
        for name in costs:
            if name not in found:
                raise SiteError(
                    f"{name}: the rule returned no survival rate for this site; return one for each"
                )
    return {name: check_rate(found[name], name) if name in found else 1.0 for name in costs}


def _one_of(function: str, **values: float | None) -> dict[str, float]:
    """The one value that was given, checked."""
    given = {name: value for name, value in values.items() if value is not None}
    if len(given) != 1:
        got = f"got {' and '.join(given)}" if given else "got none of them"
        raise ArgumentError(f"{function} takes exactly one of {', '.join(values)}; {got}")
    return {name: check_rate(value, function, name=name) for name, value in given.items()}


def _between(start: float, end: float, step: float) -> float:
    """A point on the line, exact at both ends and where they are equal (a rate of 1 must stay exactly 1)."""
    return end if step == 1.0 else start + (end - start) * step


def _drop_for(rule: str, budget: float, costs: Costs, weights: Mapping[str, float]) -> float:
    """The d in [0, 1) for which rates 1 - d w_l meet the budget: 1 - d sum c_l w_l = B."""
    saving = math.fsum(costs[name] * weights[name] for name in costs)
    wanted = 1.0 - budget
    if wanted <= _ROUNDING:
        return 0.0
    if wanted >= saving * (1.0 - _ROUNDING):
        bound = 1.0 - saving
        raise RateError(
            f"{rule} rates over {len(costs)} sites cannot reach the budget {budget:g}: they hold "
            f"{math.fsum(costs.values()):.1%} of a step; the smallest feasible budget is {_just_above(bound)}"
        )
    return wanted / saving


def _just_above(bound: float) -> str:
    """The first four-digit number above a bound that is itself not allowed."""
    return f"{min((math.floor(bound * 1e4 + 1e-6) + 1) / 1e4, 1.0):g}"


def _unknown_site(name: object, costs: Costs) -> SiteError:
    close = nearest(str(name), costs)
    known = f"did you mean {close}?" if close else f"the sites are {', '.join(list(costs)[:8]) or 'none'}"
    if not close and len(costs) > 8:
        known += f" and {len(costs) - 8} more"
    return SiteError(f"{name}: no such site; {known}")

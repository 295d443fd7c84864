"""Allocation against its laws: the budget, the optimality conditions, other solvers, and its limits."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from fallow.errors import ArgumentError, FallowError, RateError, SiteError, UsageError
from fallow.planning import allocate

Table = dict[str, float]


@st.composite
def problems(draw, magnitude: float = 3.0, zeros: bool = False):
    """Sensitivities, costs that sum to at most 1, p_min, and a budget that can be met."""
    count = draw(st.integers(1, 12))
    names = [f"s{i}" for i in range(count)]
    exponent = st.floats(-magnitude, magnitude)
    free = st.sampled_from([0.0, 1.0, 1.0])
    size = [10 ** draw(exponent) * (draw(free) if zeros else 1.0) for _ in names]
    share = [draw(st.floats(0.01, 1)) * (draw(free) if zeros else 1.0) for _ in names]
    total = (math.fsum(share) or 1.0) * draw(st.floats(1, 3))
    costs = {n: c / total for n, c in zip(names, share, strict=True)}
    minimum = draw(st.floats(0.01, 1))
    held = math.fsum(costs.values())
    budget = 1 - held * (1 - minimum) * draw(st.floats(0, 1))
    return dict(zip(names, size, strict=True)), costs, minimum, budget


def cost(rates: Table, costs: Table) -> float:
    return 1 - math.fsum(costs[n] * (1 - rates[n]) for n in costs)


def bisected(known: Table, costs: Table, minimum: float, budget: float, gamma: float = 1.0) -> Table:
    """``clip(a (S / sqrt(c))^gamma)`` with a found by halving its logarithm."""

    def at(log: float) -> Table:
        raw = {n: log + gamma * (math.log(known[n]) - math.log(costs[n]) / 2) for n in costs}
        return {n: math.exp(min(max(v, math.log(minimum)), 0.0)) for n, v in raw.items()}

    low, high = -2000.0, 2000.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(at(middle), costs) < budget else (low, middle)
    return at(high)


def solve(problem, **options) -> Table:
    known, costs, minimum, budget = problem
    return allocate.sensemode(known, costs, **{"budget": budget, "minimum_rate": minimum} | options)


# --- the budget and the optimum ---------------------------------------------------------------------------


@given(problems(300, zeros=True), st.sampled_from([0.0, 0.3, 1.0, 2.0, 7.0]))
def test_the_budget_is_met_whatever_the_ratios(problem, gamma):
    """Sensitivities over 600 orders of magnitude, zeros among them, and sites that cost nothing."""
    known, costs, minimum, budget = problem
    rates = solve(problem, gamma=gamma)
    assert list(rates) == list(costs)
    assert all(minimum <= p <= 1 for p in rates.values())
    assert cost(rates, costs) == pytest.approx(budget, rel=0, abs=1e-12)


@given(problems())
def test_rates_satisfy_the_optimality_conditions(problem):
    """Of min sum S^2/p: S^2/(c p^2) is one number inside, at most it at p_min, at least it at 1."""
    known, costs, minimum, _ = problem
    rates = solve(problem)
    force = {n: known[n] ** 2 / costs[n] / p**2 for n, p in rates.items()}
    inside = [force[n] for n, p in rates.items() if minimum < p < 1]
    at_least = [force[n] for n, p in rates.items() if p == 1 > minimum]
    at_most = [force[n] for n, p in rates.items() if p == minimum < 1]
    slack = 1 + 1e-9
    assert max(inside, default=0) <= min(inside, default=math.inf) * slack
    assert max(at_most, default=0) <= min([*inside, *at_least], default=math.inf) * slack
    assert min(at_least, default=math.inf) * slack >= max([*inside, *at_most], default=0)


@given(problems(), st.sampled_from([0.4, 1.0, 1.7]))
def test_it_agrees_with_bisection(problem, gamma):
    known, costs, minimum, budget = problem
    expected = bisected(known, costs, minimum, budget, gamma)
    rates = solve(problem, gamma=gamma)
    assert all(rates[n] == pytest.approx(expected[n], abs=1e-9) for n in costs)


@pytest.mark.parametrize("seed", range(5))
def test_it_agrees_with_a_numerical_optimiser(seed: int):
    rng = np.random.default_rng(seed)
    size, share = rng.lognormal(size=6), rng.dirichlet(np.ones(6)) * 0.9
    budget, minimum = 0.1 + 0.9 * rng.uniform(0.3, 0.9), 0.1
    want = budget - 0.1
    best = minimize(
        lambda p: float((size**2 / p).sum()),
        np.full(6, want / 0.9),
        jac=lambda p: -(size**2) / p**2,
        bounds=[(minimum, 1)] * 6,
        constraints={"type": "eq", "fun": lambda p: share @ p - want, "jac": lambda p: share},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    names = "abcdef"
    rates = allocate.sensemode(
        dict(zip(names, size, strict=True)), dict(zip(names, share, strict=True)), budget=budget
    )
    noise = float((size**2 / np.array(list(rates.values()))).sum())
    assert noise <= best.fun * (1 + 1e-9)
    assert list(rates.values()) == pytest.approx(list(best.x), abs=1e-4)


# --- symmetries and limits --------------------------------------------------------------------------------


@given(problems(), st.randoms(use_true_random=False), st.floats(1e-12, 1e12))
def test_order_and_unit_do_not_matter(problem, random, unit):
    known, costs, minimum, budget = problem
    names = list(costs)
    random.shuffle(names)
    shuffled = {n: known[n] * unit for n in names}, {n: costs[n] for n in names}, minimum, budget
    rates, other = solve(problem), solve(shuffled)
    assert list(other) == names
    assert all(rates[n] == pytest.approx(other[n], rel=1e-10) for n in names)


@given(problems(zeros=True))
def test_gamma_zero_is_uniform(problem):
    known, costs, minimum, budget = problem
    rates = solve(problem, gamma=0)
    held = math.fsum(costs.values())
    if held and budget > 1 - held * (1 - 1e-9):
        expected = allocate.uniform(costs, budget)
        assert all(rates[n] == pytest.approx(expected[n], abs=1e-9) for n in costs)


@given(problems(zeros=True), st.floats(0, 1))
def test_no_rate_falls_when_the_budget_rises(problem, further):
    known, costs, minimum, budget = problem
    less, more = solve(problem), solve((known, costs, minimum, budget + (1 - budget) * further))
    assert all(more[n] >= less[n] - 1e-9 for n in costs)


def test_sites_of_no_sensitivity_are_the_limit_of_small_equal_ones():
    known, share = {"a": 2.0, "b": 1.0, "c": 0.0, "d": 0.0}, dict.fromkeys("abcd", 0.25)
    for budget in (0.3, 0.55, 0.7, 0.9, 1.0):
        rates = allocate.sensemode(known, share, budget=budget)
        near = allocate.sensemode(known | {"c": 1e-9, "d": 1e-9}, share, budget=budget)
        assert rates == pytest.approx(near, abs=1e-8)
    assert allocate.sensemode(known, share, budget=0.75) == pytest.approx(
        {"a": 1, "b": 1, "c": 0.5, "d": 0.5}
    )


def test_a_site_that_costs_nothing_never_rests():
    rates = allocate.sensemode({"a": 1.0, "b": 1e-9}, {"a": 0.6, "b": 0.0}, budget=0.7)
    assert rates == {"a": pytest.approx(0.5), "b": 1.0}


def test_without_costs_the_budget_is_the_mean_rate():
    rates = allocate.sensemode({"a": 3.0, "b": 1.0, "c": 1.0}, budget=0.5)
    assert math.fsum(rates.values()) / 3 == pytest.approx(0.5) and rates["a"] == pytest.approx(3 * rates["b"])


# --- budgets out of reach ---------------------------------------------------------------------------------


@settings(max_examples=50)
@given(problems(), st.sampled_from(["uniform", "linear", "sensemode"]), st.floats(0.001, 0.999))
def test_a_budget_out_of_reach_names_the_smallest_that_works(problem, rule, how_far):
    known, costs, minimum, _ = problem

    def run(budget: float) -> Table:
        if rule == "sensemode":
            return allocate.sensemode(known, costs, budget=budget, minimum_rate=minimum)
        return getattr(allocate, rule)(costs, budget)

    held = math.fsum(costs.values())
    steps = {n: (i + 1) / len(costs) for i, n in enumerate(costs)}
    drop = {"uniform": held, "sensemode": held * (1 - minimum)}
    bound = 1 - drop.get(rule, math.fsum(costs[n] * steps[n] for n in costs))
    if bound * how_far < 1e-6:
        return
    with pytest.raises(RateError) as refused:
        run(bound * how_far)
    named = float(re.search(r"smallest feasible budget is ([\d.e-]+)", str(refused.value))[1])
    assert bound - 1e-9 <= named <= bound + 1.1e-4
    assert cost(run(named), costs) == pytest.approx(named, abs=1e-12)


def test_linear_over_equal_costs_ends_where_the_theory_says():
    """Exists from a mean rate of (L - 1) / 2L on; p_L = 1 - 2 (L - depth) / (L + 1)."""
    share = {str(i): 1 / 54 for i in range(54)}
    rates = allocate.linear(share, 40.25 / 54)
    assert rates["53"] == pytest.approx(0.5) and math.fsum(rates.values()) == pytest.approx(40.25)
    allocate.linear(share, 53 / 108 + 1e-6)
    with pytest.raises(RateError, match="smallest feasible budget is 0.4908"):
        allocate.linear(share, 53 / 108 - 1e-6)


@pytest.mark.parametrize("budget", [0, -0.1, 1.2, math.nan, math.inf, True, "half"])
@pytest.mark.parametrize("rule", ["uniform", "linear", "sensemode", "auto"])
def test_what_is_no_budget_is_refused(rule, budget):
    tables = ({"a": 1.0, "b": 2.0},) if rule in ("sensemode", "auto") else ()
    with pytest.raises(RateError, match=r"budget must be in \(0, 1\]"):
        getattr(allocate, rule)(*tables, {"a": 0.4, "b": 0.4}, budget=budget)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"sensitivities": {"a": 1.0, "b": -1.0}}, UsageError, "b: its sensitivity"),
        ({"sensitivities": {"a": math.nan, "b": 1.0}}, UsageError, "a: its sensitivity"),
        ({"sensitivities": {"a": 1.0, "b": math.inf}}, UsageError, "b: its sensitivity"),
        ({"sensitivities": {"a": 1.0}}, SiteError, "b: has a cost but no sensitivity"),
        ({"sensitivities": {"a": 1.0, "b": 1.0, "bb": 1.0}}, SiteError, "bb: has a sensitivity but no cost"),
        ({"sensitivities": [1.0, 1.0]}, ArgumentError, "must be a mapping"),
        ({"costs": {"a": -0.1, "b": 0.2}}, UsageError, "a: its cost"),
        ({"costs": {"a": math.nan, "b": 0.2}}, UsageError, "a: its cost"),
        ({"costs": {"a": 0.7, "b": 0.4}}, UsageError, "at most 1, got 1.1"),
        ({"costs": {}, "sensitivities": {}}, SiteError, "no sites"),
        ({"costs": 0.5}, ArgumentError, "must be a mapping"),
        ({"sensitivities": {"a": "high", "b": 1.0}}, FallowError, "a: its sensitivity"),
        ({"costs": {"a": "dear", "b": 0.1}}, FallowError, "a: its cost"),
        ({"gamma": -1}, UsageError, "gamma"),
        ({"gamma": math.nan}, UsageError, "gamma"),
        ({"gamma": "one"}, UsageError, "gamma"),
        ({"minimum_rate": 0}, RateError, "minimum_rate"),
        ({"minimum_rate": 1.5}, RateError, "minimum_rate"),
    ],
)
@pytest.mark.parametrize("rule", ["sensemode", "auto"])
def test_bad_tables_are_refused_by_name(rule, change, error, words):
    options = {"sensitivities": {"a": 1.0, "b": 9.0}, "costs": {"a": 0.4, "b": 0.4}, "budget": 0.7} | change
    with pytest.raises(error, match=words):
        getattr(allocate, rule)(**options)


# --- auto -------------------------------------------------------------------------------------------------


def spreading(wanted: float) -> Table:
    """Two sites whose coefficient of variation is this."""
    half = wanted / math.sqrt(2)
    return {"a": 1 + half, "b": 1 - half}


@pytest.mark.parametrize(
    ("differ", "mean_rate", "method"),
    [
        (allocate.SPREAD - 0.01, allocate.SMALL + 0.01, "uniform"),
        (allocate.SPREAD + 0.01, allocate.SMALL + 0.01, "sensemode"),
        (allocate.SPREAD + 0.01, 0.95, "sensemode"),
        (allocate.SPREAD - 0.01, allocate.SMALL - 0.01, "sensemode"),
        (0.0, 0.99, "uniform"),
    ],
)
def test_auto_takes_sensemode_where_blocks_differ_or_the_budget_is_small(differ, mean_rate, method):
    known, costs = spreading(differ), {"a": 0.3, "b": 0.5}
    budget = 0.2 + 0.8 * mean_rate  # of which a fifth cannot rest
    choice = allocate.auto(known, costs, budget=budget)
    assert choice.method == method and choice.spread == pytest.approx(differ)
    rule = allocate.uniform(costs, budget)
    assert choice.rates == (rule if method == "uniform" else allocate.sensemode(known, costs, budget=budget))
    assert f"{differ:.2f}" in choice.reason and f"auto took {method}" in choice.reason


def test_auto_takes_sampling_noise_off_the_spread_and_zeros_for_no_knowledge():
    known, costs = spreading(allocate.SPREAD + 0.1), {"a": 0.5, "b": 0.5}
    assert allocate.auto(known, costs, budget=0.8).method == "sensemode"
    assert allocate.auto(known, costs, errors={"a": 0.3, "b": 0.3}, budget=0.8).method == "uniform"
    nothing = allocate.auto({"a": 0.0, "b": 0.0}, costs, budget=0.3)
    assert nothing.method == "uniform" and "zero" in nothing.reason


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=8), st.floats(0.01, 100), st.floats(0, 0.5))
def test_the_spread_is_the_coefficient_of_variation_less_the_noise(values, unit, error):
    known = {str(i): v for i, v in enumerate(values)}
    cv = np.std(values, ddof=1) / np.mean(values)
    assert allocate.spread(known) == pytest.approx(cv, abs=1e-7)
    scaled = {n: v * unit for n, v in known.items()}
    noisy = allocate.spread(scaled, dict.fromkeys(known, error * unit))
    assert allocate.spread({n: v * 1e299 for n, v in known.items()}) == pytest.approx(cv, abs=1e-7)
    assert noisy**2 == pytest.approx(max(cv**2 - (error / np.mean(values)) ** 2, 0), abs=1e-9)


# The module itself, in packages whose own __init__ does not run.
_ALONE = """
import sys, types
for name in ("fallow", "fallow.planning"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [name.replace(".", "/")]
import fallow.planning.allocate
assert not {"torch", "numpy"} & set(sys.modules)
"""


def test_it_is_plain_python():
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", _ALONE], check=True, timeout=60, cwd=root)

"""The rate rules against their formulas, bounds and refusals."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fallow import errors, rates

RATE = st.floats(min_value=0.01, max_value=1.0)


@st.composite
def some_costs(draw: st.DrawFn) -> dict[str, float]:
    """Up to 60 sites that hold between a tenth and all of a step."""
    weights = draw(st.lists(st.floats(min_value=0.1, max_value=10), min_size=1, max_size=60))
    share = draw(st.floats(min_value=0.1, max_value=1))
    return {f"block{i}": share * weight / sum(weights) for i, weight in enumerate(weights)}


def even_costs(count: int, share: float = 0.9) -> dict[str, float]:
    return {f"block{i}": share / count for i in range(count)}


@given(some_costs(), RATE)
def test_uniform_is_the_same_rate_everywhere(costs, rate):
    assert rates.uniform(rate)(costs) == dict.fromkeys(costs, rate)
    assert rates.uniform(mean=rate) == rates.uniform(rate)


@given(some_costs(), RATE)
def test_huangs_rule_site_by_site(costs, last):
    found = rates.linear(last=last)(costs)
    for site, rate in enumerate(found.values(), start=1):
        assert rate == pytest.approx(1 - site / len(costs) * (1 - last))
    assert list(found) == list(costs)
    assert found[list(costs)[-1]] == last  # exactly: 1 at the end must be 1


def test_huangs_published_numbers():
    """ResNet-110 has 54 blocks; with p_L = 0.5 about 40 of them are kept on average (Huang, section 3)."""
    found = list(rates.linear(last=0.5)(even_costs(54)).values())
    assert sum(found) == pytest.approx((3 * 54 - 1) / 4)


@given(some_costs(), RATE, RATE)
def test_both_ends_are_met_exactly(costs, first, last):
    found = list(rates.linear(first=first, last=last)(costs).values())
    assert found[-1] == last
    if len(found) > 1:
        assert found[0] == first
        steps = [b - a for a, b in zip(found, found[1:], strict=False)]
        assert steps == pytest.approx([(last - first) / (len(found) - 1)] * len(steps))


def test_rates_of_one_stay_exactly_one():
    for rule in (
        rates.linear(1.0),
        rates.linear(1.0, first=1.0),
        rates.linear(mean=1.0),
        rates.linear(budget=1.0),
    ):
        assert set(rule(even_costs(27)).values()) == {1.0}
    assert set(rates.uniform(budget=1.0)(even_costs(27)).values()) == {1.0}


@given(st.integers(1, 60), RATE)
def test_a_linear_mean_is_met_or_refused_at_its_bound(count, mean):
    costs, bound = even_costs(count), (count - 1) / (2 * count)
    assume(abs(mean - bound) > 1e-6)
    if mean > bound:
        found = rates.linear(mean=mean)(costs)
        assert sum(found.values()) / count == pytest.approx(mean)
        assert min(found.values()) > 0
    else:
        with pytest.raises(errors.RateError, match=r"smallest feasible mean is [\d.]+"):
            rates.linear(mean=mean)(costs)


def test_the_bound_itself_is_refused_and_the_named_mean_works():
    with pytest.raises(errors.RateError, match="smallest feasible mean is 0.4445") as caught:
        rates.linear(mean=8 / 18)(even_costs(9))
    assert "(L-1)/2L" in str(caught.value)
    assert rates.linear(mean=0.4445)(even_costs(9))["block8"] > 0


@given(some_costs(), st.floats(min_value=0.01, max_value=1.0), st.sampled_from([rates.uniform, rates.linear]))
def test_a_budget_is_met_or_the_named_one_is(costs, budget, rule):
    try:
        found = rule(budget=budget)(costs)
    except errors.RateError as error:
        named = float(str(error).rsplit(" ", 1)[1])
        assert named > budget or named == pytest.approx(budget)
        assert rates.expected_cost(rule(budget=named)(costs), costs) == pytest.approx(named)
    else:
        assert rates.expected_cost(found, costs) == pytest.approx(budget)
        assert all(0 < rate <= 1 for rate in found.values())


def test_a_uniform_budget_cannot_reach_what_does_not_rest():
    costs = even_costs(10, share=0.6)
    with pytest.raises(
        errors.RateError, match="hold 60.0% of a step; the smallest feasible budget is 0.4001"
    ):
        rates.uniform(budget=0.4)(costs)
    with pytest.raises(errors.RateError, match="smallest feasible budget is 0.6701"):
        rates.linear(budget=0.5)(costs)


def test_a_name_wins_over_patterns_and_the_first_pattern_over_later_ones():
    costs = dict.fromkeys(["layer1.0", "layer1.1", "layer2.0", "head"], 0.2)
    rule = rates.explicit({"layer?.0": 0.5, "layer*": 0.7, "layer2.0": 0.3}, default=0.9)
    assert rule(costs) == {"layer1.0": 0.5, "layer1.1": 0.7, "layer2.0": 0.3, "head": 0.9}


@pytest.mark.parametrize("resolve", [lambda table, costs: rates.explicit(table)(costs), rates.resolve])
def test_unknown_names_are_refused_with_the_nearest(resolve):
    with pytest.raises(errors.SiteError, match="^blok3: no such site; did you mean block3?"):
        resolve({"blok3": 0.5}, even_costs(5))
    with pytest.raises(errors.SiteError, match="the sites are block0, .* and 4 more$"):
        resolve({"zzz": 0.5}, even_costs(12))


def test_resolve_completes_a_mapping_in_the_order_of_the_sites():
    found = rates.resolve({"block2": 0.5, "block0": 0.25}, even_costs(4))
    assert list(found.items()) == [("block0", 0.25), ("block1", 1.0), ("block2", 0.5), ("block3", 1.0)]


def test_resolve_takes_rules_and_checks_a_users_own():
    costs = even_costs(3)
    assert rates.resolve(rates.uniform(0.5), costs) == dict.fromkeys(costs, 0.5)
    assert rates.resolve(lambda costs: dict.fromkeys(costs, 0.5), costs) == dict.fromkeys(costs, 0.5)
    with pytest.raises(errors.RateError, match="^block0: survival_rate must be"):
        rates.resolve(lambda costs: dict.fromkeys(costs, 0.0), costs)
    with pytest.raises(errors.SiteError, match="^block1: the rule returned no survival rate"):
        rates.resolve(lambda costs: {"block0": 0.5}, costs)
    with pytest.raises(errors.ArgumentError, match="a rule must return a mapping"):
        rates.resolve(lambda costs: [0.5], costs)  # type: ignore[arg-type, return-value]


def test_resolve_says_what_to_pass_for_a_plain_number():
    with pytest.raises(errors.ArgumentError, match=r"got 0.5: .* fallow.rates.uniform\(rate\)"):
        rates.resolve(0.5, even_costs(3))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -0.1, 1.2, float("nan"), True, "half"])
@pytest.mark.parametrize("keyword", ["mean", "budget"])
def test_values_outside_the_interval_are_refused_at_once(value, keyword):
    for rule in (rates.uniform, rates.linear):
        with pytest.raises(errors.RateError, match=rf"{keyword} must be in \(0, 1\]"):
            rule(**{keyword: value})
        with pytest.raises(errors.RateError):
            rule(value)
    with pytest.raises(errors.RateError, match="^block0: survival_rate"):
        rates.explicit({"block0": value})
    with pytest.raises(errors.RateError, match="default"):
        rates.explicit({}, default=value)


def test_exactly_one_form_is_taken():
    for call in (
        lambda: rates.uniform(),
        lambda: rates.uniform(0.5, mean=0.5),
        lambda: rates.linear(),
        lambda: rates.linear(0.5, budget=0.5),
        lambda: rates.linear(first=0.9),
        lambda: rates.linear(0.5, first=0.9, mean=0.7),
        lambda: rates.explicit([("block0", 0.5)]),  # type: ignore[arg-type]
    ):
        with pytest.raises(errors.ArgumentError, match="takes"):
            call()


def test_other_libraries_keywords_are_converted():
    with pytest.raises(errors.ArgumentError, match="uniform takes survival_rate, not p: for p=0.1"):
        rates.uniform(p=0.1)
    with pytest.raises(errors.ArgumentError, match="for drop_path_rate=0.2 pass last=0.8"):
        rates.linear(drop_path_rate=0.2)
    with pytest.raises(errors.ArgumentError, match="linear does not take budgte; did you mean budget?"):
        rates.linear(budgte=0.2)


@given(some_costs(), st.data())
def test_expected_cost_is_between_what_cannot_rest_and_one(costs, data):
    table = {name: data.draw(RATE) for name in costs}
    cost = rates.expected_cost(table, costs)
    assert 1 - sum(costs.values()) - 1e-9 <= cost <= 1
    assert rates.expected_cost(dict.fromkeys(costs, 1.0), costs) == 1.0

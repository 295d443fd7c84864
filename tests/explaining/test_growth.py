"""The theory of growth beside the enumeration of all masks."""

import math

import pytest
from growth_cases import KINDS, RATES, every_mask, linear
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.errors import RateError, UsageError
from fallow.explaining import growth
from fallow.explaining.growth import growth_theory, linear_rate_limit, quenched_growth


def grown(gates, kind, direction):
    """Second moments behind each block, from the network's recursion; gates are numbers."""
    s2 = 1 / len(gates) if kind == "scaled" else 1.0
    total, variance, growth_so_far, seen = 1.0, 1.0, 1.0, []
    for gate in gates:
        if kind != "batchnorm":
            ratio = 1 + s2 * gate**2  # He's gain: E (W relu(y))^2 = E y^2
        elif direction == "forward":
            ratio = (total + gate**2) / total
        else:
            ratio = 1 + gate**2 / variance
        total += gate**2
        variance += gate**2 * (1 - 1 / math.pi)  # relu of a standard normal has mean square 1/2, mean^2 1/2pi
        growth_so_far *= ratio
        seen.append(ratio)
    return growth_so_far, seen


@pytest.mark.parametrize("scale", ["eval", "train"])
@pytest.mark.parametrize("kind", KINDS)
def test_growth_is_that_of_all_masks_enumerated(kind, scale):
    theory = growth_theory(RATES, kind=kind, scale=scale)
    for direction in ("forward", "backward"):
        side = getattr(theory, direction)
        mean, typical, square, factors = 0.0, 0.0, 0.0, [0.0] * len(RATES)
        for mask, chance in every_mask(RATES):
            gates = [on / (p if scale == "train" else 1) for on, p in zip(mask, RATES, strict=True)]
            whole, ratios = grown(gates, kind, direction)
            log2 = quenched_growth(mask, RATES, kind=kind, scale=scale, direction=direction)
            assert math.isclose(2**log2, whole)
            mean += chance * whole
            typical += chance * math.log2(whole)
            square += chance * math.log2(whole) ** 2
            factors = [f + chance * r for f, r in zip(factors, ratios, strict=True)]
        assert side.factors == pytest.approx(factors, rel=1e-9)
        assert 2**side.log2_mean == pytest.approx(mean, rel=1e-9)
        assert side.log2_typical == pytest.approx(typical, rel=1e-9)
        if side.log2_spread is not None:
            assert side.log2_spread == pytest.approx(math.sqrt(square - typical**2), rel=1e-9)
        assert (side.log2_spread is None) == (kind == "batchnorm")
        assert 2**side.log2_dense == pytest.approx(grown([1.0] * len(RATES), kind, direction)[0])
        test = RATES if scale == "eval" else [1.0] * len(RATES)
        assert 2**side.log2_test == pytest.approx(grown(test, kind, direction)[0])


def test_merging_states_of_a_deep_batchnorm_net_changes_next_to_nothing(monkeypatch):
    rates = linear(12, 0.3)  # 4096 different sums of 1 / p^2
    exact, merged = [], []
    for states, found in ((1 << 20, exact), (100, merged)):
        monkeypatch.setattr(growth, "_STATES", states)
        side = growth_theory(rates, kind="batchnorm", scale="train").backward
        found += [side.log2_mean, side.log2_typical, *side.factors]
    assert merged != exact
    assert merged == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rates", [[0.5] * 7, [0.9, 0.4, 0.7, 0.5, 0.6]])
def test_masks_of_fixed_size_grow_by_their_number_alone(kind, rates):
    side = growth_theory(rates, kind=kind, sampler="exact").backward
    low = math.floor(sum(rates) + 1e-9)
    part = sum(rates) - low
    both = [grown([1.0] * n + [0.0] * (len(rates) - n), kind, "backward")[0] for n in (low, low + 1)]
    if kind == "scaled":  # there the recursion above knows the depth by the number of gates
        both = [(1 + 1 / len(rates)) ** n for n in (low, low + 1)]
    assert 2**side.log2_mean == pytest.approx((1 - part) * both[0] + part * both[1])
    log = math.log2(both[1] / both[0])
    assert side.log2_spread == pytest.approx(math.sqrt(part * (1 - part)) * log, abs=1e-7)


def test_masks_of_fixed_size_under_inverted_scaling_need_equal_rates():
    assert growth_theory([0.5, 0.6], scale="train", sampler="exact").backward.log2_mean is None
    assert growth_theory([0.5, 0.5], scale="train", sampler="exact").rate == pytest.approx(math.sqrt(5))


@given(st.lists(st.floats(0.05, 1), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_equal_rates_have_the_largest_mean_growth_and_all_rules_the_same_typical_one(rates):
    side = growth_theory(rates).backward
    r = sum(rates) / len(rates)
    assert side.log2_typical == pytest.approx(sum(rates))
    assert side.log2_typical <= side.log2_mean + 1e-9
    assert side.log2_mean <= len(rates) * math.log2(1 + r) + 1e-9
    assert growth_theory(rates, scale="train").backward.log2_mean >= side.log2_dense - 1e-9


def test_very_deep_networks_do_not_overflow():
    side = growth_theory([0.1] * 3000, scale="train").backward
    assert side.log2_mean == pytest.approx(3000 * math.log2(11))
    assert growth_theory([0.5] * 3000).weights[0] == math.inf
    assert "2^" in str(growth_theory([0.1] * 3000, scale="train"))


def test_batchnorm_makes_a_power_law_of_the_exponential():
    deep = [growth_theory([1.0] * n, kind="batchnorm").backward.log2_dense for n in (200, 1600)]
    assert (deep[1] - deep[0]) / 3 == pytest.approx(math.pi / (math.pi - 1), rel=0.01)


@pytest.mark.parametrize("mean", [0.5, 0.75, 0.9])
def test_the_linear_limit_is_the_integral_and_deep_nets_tend_to_it(mean):
    steps = 2000
    nodes = [2 * mean - 1 + (2 - 2 * mean) * (i + 0.5) / steps for i in range(steps)]
    limit = linear_rate_limit(mean)
    assert limit == pytest.approx(math.exp(sum(map(math.log1p, nodes)) / steps), rel=1e-6)
    gaps = []
    for depth in (100, 200):
        last = 1 - 2 * depth * (1 - mean) / (depth + 1)
        gaps.append(abs(growth_theory(linear(depth, last)).rate - limit))
    assert gaps[1] < 0.6 * gaps[0] < 0.01
    assert linear_rate_limit(1.0) == 2.0
    with pytest.raises(RateError, match="at least 1/2, got 0.4"):
        linear_rate_limit(0.4)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: growth_theory([]), UsageError, "rates is empty"),
        (lambda: growth_theory([0.5, 1.5]), RateError, "block 2: survival_rate must be in"),
        (lambda: growth_theory([0.5], kind="plain"), UsageError, 'kind must be "vanilla", "scaled"'),
        (lambda: growth_theory([0.5], scale="test"), UsageError, 'scale must be "eval" or "train"'),
        (lambda: growth_theory([0.5], sampler="fixed"), UsageError, 'sampler must be "bernoulli" or "exact"'),
        (lambda: growth_theory([0.5], gain=0), UsageError, "gain must be a positive number, got 0"),
        (lambda: quenched_growth([True], [0.5, 0.5]), UsageError, "each of the 2 rates, got 1"),
    ],
)
def test_bad_input_is_refused_in_words(call, error, words):
    with pytest.raises(error, match=words.replace("(", r"\(")):
        call()

"""Profiles over depth beside enumeration, random networks and numerical optima."""

import itertools
import math

import pytest
import torch
from growth_cases import RATES, every_mask, linear
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.errors import RateError, UsageError
from fallow.explaining.depth_profiles import (
    leave_one_out_weights,
    noise_mass,
    strongest_rates,
    weight_profile,
)
from fallow.explaining.random_networks import toy_forward, toy_weights


@pytest.mark.parametrize("kind", ["vanilla", "scaled"])
@pytest.mark.parametrize("scale", ["eval", "train"])
def test_weight_gradients_are_signal_times_gradient(kind, scale):
    s2 = 1 / len(RATES) if kind == "scaled" else 1.0
    expected = [0.0] * len(RATES)
    for mask, chance in every_mask(RATES):
        gates = [on / (p if scale == "train" else 1) for on, p in zip(mask, RATES, strict=True)]
        for i, gate in enumerate(gates):
            before = math.prod(1 + s2 * g**2 for g in gates[:i])
            behind = math.prod(1 + s2 * g**2 for g in gates[i + 1 :])
            expected[i] += chance * s2 * gate**2 * behind * before / 2
    assert weight_profile(RATES, kind=kind, scale=scale) == pytest.approx(expected)


def test_weight_gradients_are_flat_in_depth_for_equal_rates():
    profile = weight_profile([0.6] * 9)
    assert max(profile) == pytest.approx(min(profile))


def test_leave_one_out_weights_fall_from_one_to_their_limit():
    weights = leave_one_out_weights(300)
    assert weights[-1] == pytest.approx(1)
    assert all(a < b for a, b in itertools.pairwise(weights[-30:]))
    assert weights[0] == pytest.approx(3 - 2 * math.sqrt(2), rel=0.05)
    assert weights[0] > 3 - 2 * math.sqrt(2)
    assert all(abs(c - 1) < 0.1 for c in leave_one_out_weights(50, strength=1 / 50))


def test_leave_one_out_weights_agree_with_random_networks():
    depth, width, draws = 4, 256, 60
    generator = torch.Generator().manual_seed(0)
    found = []
    gates = torch.cat([torch.ones(1, depth), 1 - torch.eye(depth)])
    for _ in range(draws):
        start = torch.randn(1, 1, width, generator=generator)
        weights = toy_weights(depth, width, 2.0, generator, start)
        out = toy_forward(start.expand(depth + 1, -1, -1), gates, weights)[0][-1][:, 0]
        found.append((out[:1] - out[1:]).square().sum(1) / (start.square().sum() * 2 ** (depth - 1)))
    values = torch.stack(found)
    theory = torch.tensor(leave_one_out_weights(depth))
    assert ((values.mean(0) - theory).abs() < 5 * values.std(0) / math.sqrt(draws)).all()
    assert (values.std(0) / math.sqrt(draws) < 0.06 * theory).all()


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=20), st.floats(0.02, 1))
@settings(max_examples=100, deadline=None)
def test_the_strongest_rates_meet_the_mean_and_no_exchange_improves_them(weights, mean):
    rates = strongest_rates(weights, mean)
    assert sum(rates) / len(rates) == pytest.approx(mean, abs=1e-12)
    assert all(0 <= p <= 1 for p in rates)
    slopes = [w * (1 - 2 * p) for w, p in zip(weights, rates, strict=True)]
    for i, j in itertools.permutations(range(len(rates)), 2):
        if rates[i] < 1 and rates[j] > 0:  # some of j's rate could go to i
            assert slopes[i] <= slopes[j] + 1e-9 * max(weights)


@pytest.mark.parametrize("mean", [0.2, 0.5, 0.8])
def test_the_strongest_rates_are_the_numerical_optimum(mean):
    optimize = pytest.importorskip("scipy.optimize")
    weights = leave_one_out_weights(10)
    result = optimize.minimize(
        lambda p: -sum(w * x * (1 - x) for w, x in zip(weights, p, strict=True)),
        [mean] * 10,
        bounds=[(0, 1)] * 10,
        constraints={"type": "eq", "fun": lambda p: sum(p) - 10 * mean},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert strongest_rates(weights, mean) == pytest.approx(list(result.x), abs=1e-5)


def test_early_blocks_get_high_rates_at_large_means_and_low_ones_at_small_means():
    weights = leave_one_out_weights(12)
    high, low = strongest_rates(weights, 0.8), strongest_rates(weights, 0.2)
    assert list(high) == sorted(high, reverse=True)
    assert list(low) == sorted(low)
    assert high[0] > 0.8 > high[-1]
    assert strongest_rates([2.0] * 3, 0.3) == pytest.approx([0.3] * 3)


@pytest.mark.parametrize("scale", ["eval", "train"])
def test_noise_mass_is_the_variance_of_the_gates_summed(scale):
    values = [
        (sum(on / (p if scale == "train" else 1) for on, p in zip(mask, RATES, strict=True)), chance)
        for mask, chance in every_mask(RATES)
    ]
    mean = sum(v * c for v, c in values)
    expected = sum((v - mean) ** 2 * c for v, c in values)
    assert noise_mass(RATES, scale=scale) == pytest.approx(expected)


def test_noise_mass_of_the_linear_rule_tends_to_its_closed_form():
    for r in (0.5, 0.75, 0.9):
        rates = linear(4000, 1 - 2 * 4000 * (1 - r) / 4001)
        assert noise_mass(rates) / 4000 == pytest.approx((1 - r) * (4 * r - 1) / 3, abs=1e-3)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: leave_one_out_weights(3, strength=0), UsageError, "strength must be a positive"),
        (lambda: strongest_rates([1, -1], 0.5), UsageError, "weights must be positive"),
        (lambda: strongest_rates([1, 1], 0), RateError, "mean must be in"),
    ],
)
def test_bad_input_is_refused_in_words(call, error, words):
    with pytest.raises(error, match=words.replace("(", r"\(")):
        call()

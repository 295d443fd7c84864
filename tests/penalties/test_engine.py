"""The engine: against every closed form, on jumps and kinks it was not told of, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from separable_cases import PENALTIES, STEPS, engine_of, kinks, smooth_weights, weights
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from fallow.errors import ArgumentError, RateError, UsageError
from fallow.penalties import (
    MCP,
    GemanMcClure,
    LogSum,
    LpNorm,
    Separable,
    Standout,
    TargetedThreshold,
    VariationalDropout,
    from_eta,
    from_survival_rate,
)

every = pytest.mark.parametrize("penalty", PENALTIES, ids=repr)


@every
def test_the_engine_agrees_with_the_closed_form(penalty: Separable):
    engine = engine_of(penalty)
    w = weights()
    assert_close(engine.value(w), penalty.value(w), rtol=1e-12, atol=0)
    assert_close(engine.gradient(w), penalty.gradient(w), rtol=1e-12, atol=1e-290)
    assert_close(engine.eta(w), penalty.eta(w), rtol=1e-15, atol=0)
    eta = torch.logspace(-3, 3, 61, dtype=torch.float64)
    assert_close(engine.dual(eta), penalty.dual(eta), rtol=1e-9, atol=1e-10)
    assert engine.at_zero == penalty.at_zero


@every
@pytest.mark.parametrize("step", STEPS)
def test_the_engines_prox_agrees_with_the_closed_form(penalty: Separable, step: float):
    w = weights()
    engine = engine_of(penalty)
    assert_close(engine.prox(w, step), penalty.prox(w, step), rtol=0, atol=1e-9)
    assert_close(engine.prox(w, torch.full_like(w, step)), penalty.prox(w, step), rtol=0, atol=1e-9)


@every
@pytest.mark.parametrize("strength", [0.2, 3.0])
def test_a_survival_rate_leads_to_the_same_penalty(penalty: Separable, strength: float):
    engine = from_survival_rate(
        lambda w: penalty.survival_rate(w, strength), strength=strength, kinks=kinks(penalty)
    )
    w = weights()
    w = w[w.abs() < 20]
    # 1 - rate has an error of 1e-16, which eta multiplies
    digits = 1e-15 * (1 + penalty.eta(w.abs().max()) / strength).clamp(max=1e5)
    assert_close(engine.value(w), penalty.value(w), rtol=max(float(digits), 1e-10), atol=1e-10)
    assert_close(engine.survival_rate(w, strength), penalty.survival_rate(w, strength), rtol=1e-12, atol=0)
    assert engine.at_zero == penalty.at_zero


def test_strength_times_the_value_is_the_same_for_a_rate_at_any_strength():
    w = weights()
    totals = [s * from_survival_rate(torch.sigmoid, strength=s).value(w) for s in (0.01, 1.0, 7.0)]
    assert_close(totals[0], totals[1], rtol=1e-12, atol=0)
    assert_close(totals[2], totals[1], rtol=1e-12, atol=0)
    assert_close(totals[1], Standout().value(w), rtol=1e-9, atol=0)


@pytest.mark.parametrize("penalty", [MCP(), TargetedThreshold(0.7, survival_rate=0.3)], ids=repr)
def test_kinks_and_jumps_are_found_unasked(penalty: Separable):
    engine = from_eta(penalty.eta)
    w = torch.cat([weights(), torch.tensor(kinks(penalty), dtype=torch.float64)])
    assert_close(engine.value(w), penalty.value(w), rtol=1e-12, atol=0)
    assert_close(engine.prox(w, 0.5), penalty.prox(w, 0.5), rtol=0, atol=1e-9)


def test_a_staircase_of_rates_has_the_piecewise_quadratic_penalty():
    """Rates 0.2, 0.5, 1 with steps at 1 and 2: ridges of 4, 1 and 0, each from its step on."""

    def rate(w: Tensor) -> Tensor:
        return 0.2 + 0.3 * (w >= 1).double() + 0.5 * (w >= 2).double()

    w = torch.linspace(0, 4, 401, dtype=torch.float64)
    expected = 2 * w.clamp(max=1) ** 2 + ((w.clamp(1, 2)) ** 2 - 1) / 2
    for engine in (from_survival_rate(rate), from_survival_rate(rate, kinks=[2, 1])):
        assert_close(engine.value(w), expected, rtol=1e-12, atol=0)
    assert engine.at_zero == "ridge"
    x = engine.prox(w, 1.0)
    candidates = torch.linspace(0, 4, 4001, dtype=torch.float64)
    cost = (candidates - w[:, None]) ** 2 / 2 + engine.value(candidates)
    assert bool(((x - w) ** 2 / 2 + engine.value(x) <= cost.amin(1) + 1e-12).all())


def test_derivatives_go_through_the_strategy():
    engine = from_eta(lambda w: w * (w + 2) * (1 + torch.tanh(w)))
    w = smooth_weights(LogSum()).requires_grad_()
    assert gradcheck(engine.value, w, eps=1e-5, atol=1e-7)
    assert gradgradcheck(engine.value, w, eps=1e-5, atol=1e-6)
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(engine.total(w), w, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), w)
    assert bool((slope == 0).all()) and bool(bend.isfinite().all())


def test_single_precision_comes_back_as_it_came():
    engine = from_eta(lambda w: w * (w + 2))
    w = torch.tensor([-3.0, 0.0, 1e-20, 2.0], requires_grad=True)
    for result in (
        engine.value(w),
        engine.gradient(w),
        engine.prox(w, 0.1),
        engine.eta(w),
        engine.dual(w.abs()),
    ):
        assert result.dtype == torch.float32 and result.shape == w.shape
    assert_close(engine.value(w), LogSum().value(w))
    engine.total(w).backward()
    assert_close(w.grad, LogSum().gradient(w))


@pytest.mark.parametrize(
    ("eta", "expected"),
    [
        (lambda w: w + 0.1, "ridge"),
        (lambda w: torch.full_like(w, math.inf), "ridge"),
        (lambda w: w.sqrt(), "ridge"),
        (lambda w: 1e-6 * w, "slope"),
        (lambda w: torch.expm1(w.clamp(max=700)), "slope"),
        (lambda w: w**1.5, "singular"),
        (lambda w: w**2, "barrier"),
        (lambda w: torch.where(w < 0.5, 0.0, w), "barrier"),
        (torch.zeros_like, "barrier"),
    ],
)
def test_behaviour_at_zero_is_told_from_eta(eta, expected: str):
    assert from_eta(eta).at_zero == expected


def test_a_barrier_is_infinite_beside_0_and_its_prox_projects():
    engine = from_eta(lambda w: w * w)
    w = torch.tensor([-2.0, 0.0, 1e-9])
    assert engine.value(w).tolist() == [math.inf, 0.0, math.inf]
    assert engine.prox(w, 0.1).abs().tolist() == [0.0, 0.0, 0.0]
    assert torch.equal(engine.prox(w, 0.0), w)


def test_a_strategy_that_decreases_is_refused_with_place_and_amount():
    with pytest.raises(UsageError) as caught:
        from_survival_rate(lambda w: 0.8 - 0.3 * ((w > 1) & (w < 2)).double())
    text = str(caught.value)
    assert (
        "the survival rate must not decrease in |w|, but it falls by 0.3, from 0.8 at |w| = 1 to 0.5" in text
    )
    assert "running maximum" in text
    with pytest.raises(UsageError, match=r"eta must not decrease in \|w\|, but it falls by 0.5"):
        from_eta(lambda w: torch.where(w < 1, 1.0, 0.5).double())
    with pytest.raises(UsageError, match=r"eta must not decrease .* from inf at"):
        from_eta(lambda w: torch.where(w < 1, torch.inf, w))


def test_rounding_is_no_decrease():
    noisy = from_survival_rate(lambda w: (w / (1 + w)) * (1 - 1e-14 * (w.log2().floor() % 2)))
    assert noisy.at_zero == "slope"


@pytest.mark.parametrize(
    ("rate", "words"),
    [
        (lambda w: w, r"the survival rate is 1\.\d+ at \|w\| = 1\.\d+: it must be in \[0, 1\]"),
        (lambda w: w.clamp(max=1) - 0.1, r"the survival rate is -0.1 at"),
    ],
)
def test_rates_outside_0_to_1_are_refused(rate, words: str):
    with pytest.raises(RateError, match=words):
        from_survival_rate(rate)


def test_what_is_no_strategy_is_refused():
    with pytest.raises(UsageError, match=r"eta is nan at \|w\| = .*: write it so that it stays defined"):
        from_eta(lambda w: (w - 1).sqrt())
    with pytest.raises(UsageError, match="eta is -1 at .* must not be negative"):
        from_eta(lambda w: w - 1)
    with pytest.raises(ArgumentError, match="one number for each magnitude, got shape"):
        from_eta(lambda w: w.sum())
    with pytest.raises(ArgumentError, match="must give a tensor of floats, got torch.int64"):
        from_eta(lambda w: w.long())
    with pytest.raises(ArgumentError, match="a strategy is a function"):
        from_eta(0.5)  # pyright: ignore
    with pytest.raises(UsageError, match="every kink must be a finite number above 0, got -1"):
        from_eta(lambda w: w, kinks=[-1.0])
    with pytest.raises(UsageError, match="strength must be a finite number above 0"):
        from_survival_rate(torch.sigmoid, strength=0.0)


def test_the_figures_of_the_notes_prototype_are_met():
    """Section 6 (d): l1 through its rate, l_1/2 through eta, and the others, relative error in the value."""
    w = torch.logspace(-3, 1, 200, dtype=torch.float64)
    strategies = [
        (from_survival_rate(lambda v: v / (v + 0.5), strength=0.5), LpNorm(1.0)),
        (from_eta(lambda v: v**1.5), LpNorm(0.5)),
        (from_survival_rate(lambda v: v * (v + 2) / (v * (v + 2) + 1)), LogSum(2.0)),
        (from_eta(lambda v: (1 + v * v) ** 2), GemanMcClure()),
        (from_eta(VariationalDropout().eta), VariationalDropout()),
    ]
    for engine, penalty in strategies:
        assert_close(engine.value(w), penalty.value(w), rtol=1e-13, atol=0)

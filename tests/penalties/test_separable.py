"""Laws that hold for every separable penalty: duality, convexity in the square, derivatives, prox."""

from __future__ import annotations

import math

import pytest
import torch
from separable_cases import PENALTIES, STEPS, kinks, smooth_weights, weights
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from fallow.errors import ArgumentError, UsageError
from fallow.penalties import LogSum, LpNorm, MolchanovFit, Ridge, Separable, VariationalDropout

every = pytest.mark.parametrize("penalty", PENALTIES, ids=repr)


def grid(low: float = -6, high: float = 3, count: int = 4001) -> Tensor:
    return torch.logspace(low, high, count, dtype=torch.float64)


@every
def test_the_eta_trick_attains_the_value_and_nothing_is_below(penalty: Separable):
    """Equation (3), on a grid of eta and at the minimiser itself."""
    w = weights()
    w = w[w != 0]
    eta = penalty.eta(w)
    ridge = torch.where(eta.isinf(), 0.0, w * w / eta)
    assert_close((ridge + penalty.dual(eta)) / 2, penalty.value(w), rtol=1e-10, atol=1e-14)
    etas = grid(-12, 8)
    bound = (w[:, None] ** 2 / etas + penalty.dual(etas)) / 2
    assert bool((bound.amin(1) >= penalty.value(w) * (1 - 1e-12) - 1e-14).all())


@every
def test_the_dual_is_the_conjugate(penalty: Separable):
    """``f = sup 2 Omega - w^2 / eta``: never below, and met on a fine grid where it is finite."""
    ends = torch.tensor([0.0, *kinks(penalty)], dtype=torch.float64)
    w = torch.cat([ends, grid(-8, 6, 40001)])
    etas = grid(-2, 2, 41)
    gap = penalty.dual(etas) - (2 * penalty.value(w)[:, None] - w[:, None] ** 2 / etas).amax(0)
    finite = gap.isfinite()
    assert bool((gap[finite] >= -1e-12).all())
    assert bool((gap[finite] <= 1e-6 * (1 + penalty.dual(etas)[finite])).all())
    # infinite where the supremum grows without end
    assert bool(finite.all()) or isinstance(penalty, Ridge)


@every
def test_twice_the_value_is_concave_and_grows_in_the_square(penalty: Separable):
    t = torch.linspace(0, 9, 3001, dtype=torch.float64)
    phi = 2 * penalty.value(t.sqrt())
    rises = phi.diff()
    assert bool((rises >= -1e-14).all())
    assert bool((rises.diff() <= 1e-13).all())


@every
def test_eta_never_falls_and_gives_the_slope(penalty: Separable):
    w = grid()
    eta = penalty.eta(w)
    assert bool((eta[1:] >= eta[:-1] * (1 - 1e-14)).all())
    assert_close(w / eta, penalty.gradient(w), rtol=1e-12, atol=1e-290)
    assert_close(penalty.eta(-w), eta, rtol=0, atol=0)


@every
def test_the_survival_rate_is_that_of_the_variance_strength_over_eta(penalty: Separable):
    """Equation (1), ``alpha (eta + strength) = eta``; kept for certain where eta is infinite."""
    w = weights().requires_grad_()
    rate = penalty.survival_rate(w, 0.3)
    assert not rate.requires_grad
    assert bool(((rate >= 0) & (rate <= 1)).all())
    eta = penalty.eta(w)
    free = eta.isinf()
    assert_close((rate * (eta + 0.3))[~free], eta[~free], rtol=1e-14, atol=0)
    assert bool((rate[free] == 1).all())


@every
def test_the_penalty_is_even_and_0_at_0(penalty: Separable):
    w = weights()
    assert bool((penalty.value(-w) == penalty.value(w)).all())
    assert bool((penalty.gradient(-w) == -penalty.gradient(w)).all())
    zero = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    assert penalty.total(zero) == 0
    penalty.total(zero).backward()
    assert zero.grad is not None
    assert bool((zero.grad == 0).all()) and bool((penalty.gradient(zero) == 0).all())


@every
def test_autograd_gives_the_gradient(penalty: Separable):
    w = weights().requires_grad_()
    penalty.total(w).backward()
    assert w.grad is not None
    assert_close(w.grad, penalty.gradient(w), rtol=1e-15, atol=0)


@every
def test_first_and_second_derivatives_are_those_of_the_value(penalty: Separable):
    w = smooth_weights(penalty).requires_grad_()
    assert gradcheck(penalty.value, w, eps=1e-5, atol=1e-7)
    assert gradgradcheck(penalty.value, w, eps=1e-5, atol=1e-6)


# torch itself scripts its forward derivatives on first use
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@every
def test_derivatives_under_functional_transforms(penalty: Separable):
    w = smooth_weights(penalty)
    slopes = torch.func.vmap(torch.func.grad(penalty.value))(w)
    assert_close(slopes, penalty.gradient(w), rtol=1e-13, atol=1e-15)
    forward = torch.func.jvp(penalty.value, (w,), (torch.ones_like(w),))[1]
    assert_close(forward, penalty.gradient(w), rtol=1e-13, atol=1e-15)


@every
@pytest.mark.parametrize("step", STEPS)
def test_nothing_on_a_fine_grid_beats_the_prox(penalty: Separable, step: float):
    w = weights()
    w = w[w.abs() < 10][::3]
    x = penalty.prox(w, step)
    found = (x - w) ** 2 / 2 + step * penalty.value(x)
    candidates = torch.linspace(-10, 10, 8001, dtype=torch.float64)
    best = ((candidates - w[:, None]) ** 2 / 2 + step * penalty.value(candidates)).amin(1)
    assert bool((found <= best + 1e-12 * (1 + best)).all())


@every
@pytest.mark.parametrize("step", STEPS[::2])
def test_the_prox_is_stationary_where_it_is_not_0(penalty: Separable, step: float):
    w = weights()
    x = penalty.prox(w, step)
    away = x != 0
    residual = x + step * penalty.gradient(x) - w
    # the slope jumps at a kink: there w lies between both sides
    left, right = (penalty.gradient(x * (1 + side)) for side in (-1e-9, 1e-9))
    kinked = (left - right).abs() > 1e-6
    scale = 1 + step + w.abs()
    assert bool((residual.abs() <= 1e-9 * scale)[away & ~kinked].all())


@every
@pytest.mark.parametrize("step", STEPS[::2])
def test_the_prox_is_odd_and_monotone_and_takes_steps_of_each_weight(penalty: Separable, step: float):
    w = weights().sort().values
    x = penalty.prox(w, step)
    assert bool((x.diff() >= -1e-12).all())
    assert_close(penalty.prox(-w, step), -x, rtol=0, atol=0)
    assert bool((x.abs() <= w.abs() * (1 + 1e-13)).all())
    assert_close(penalty.prox(w, torch.full_like(w, step)), x, rtol=1e-11, atol=1e-13)
    assert_close(
        penalty.prox(w, torch.tensor(step)), penalty.prox(w, float(torch.tensor(step))), rtol=0, atol=0
    )


@every
def test_different_steps_at_once_are_those_one_by_one(penalty: Separable):
    steps = torch.tensor(STEPS, dtype=torch.float64)
    w = weights()[::7].unsqueeze(1).expand(-1, len(STEPS)).contiguous()
    together = penalty.prox(w, steps)
    alone = torch.stack([penalty.prox(w[:, i], step) for i, step in enumerate(STEPS)], 1)
    assert_close(together, alone, rtol=1e-11, atol=1e-13)


@every
def test_a_step_of_0_changes_nothing(penalty: Separable):
    w = weights()
    assert_close(penalty.prox(w, 0.0), w, rtol=1e-15, atol=0)
    assert_close(penalty.prox(w, torch.zeros_like(w)), w, rtol=1e-12, atol=1e-18)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_single_precision_rounded(penalty: Separable, dtype: torch.dtype):
    w = torch.cat([weights(), torch.tensor([300.0, -3e4], dtype=torch.float64)]).to(dtype)
    for name in ("value", "gradient", "eta", "dual"):
        of = getattr(penalty, name)
        x = w.abs() if name == "dual" else w
        assert torch.equal(of(x), of(x.float()).to(dtype))
    assert torch.equal(penalty.survival_rate(w, 0.1), penalty.survival_rate(w.float(), 0.1).to(dtype))
    assert torch.equal(penalty.prox(w, 0.5), penalty.prox(w.float(), 0.5).to(dtype))
    w.requires_grad_()
    (found,) = torch.autograd.grad(penalty.total(w), w)
    assert torch.equal(found, penalty.gradient(w))


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_number_is_too_small_or_too_large_for_derivatives_and_the_prox(
    penalty: Separable, dtype: torch.dtype
):
    tiny = torch.finfo(dtype).tiny
    w = torch.tensor([0.0, tiny / 8, tiny, 1e-30, 1e-12, 1.0, 1e6, 1e15], dtype=dtype)
    w = torch.cat([w, -w, w.new_tensor([math.inf, -math.inf])])
    assert not bool(penalty.gradient(w).isnan().any())
    assert not bool(penalty.eta(w).isnan().any())
    for step in (0.0, 1e-30, 0.3, 1e9):
        for given in (step, torch.full_like(w, step)):
            x = penalty.prox(w, given)
            assert bool((x.abs() <= w.abs() * (1 + 1e-6)).all())
            assert bool(((x == 0) | (x.sign() == w.sign())).all())
            alone = torch.cat([penalty.prox(one, step) for one in w[:-2].split(1)])
            assert_close(x[:-2], alone) if step else assert_close(x, w, rtol=0, atol=0)


@every
def test_what_is_at_zero_decides_which_weights_become_0(penalty: Separable):
    small, step = grid(-5, -1, 41), 1e-3
    zeros = penalty.prox(small, step) == 0
    if penalty.at_zero == "ridge":
        assert not bool(zeros.any())
    elif penalty.at_zero == "slope":
        slope = float(penalty.gradient(torch.tensor(1e-12, dtype=torch.float64)))
        clear = (small / (step * slope) - 1).abs() > 1e-6
        assert_close(zeros[clear], (small <= step * slope)[clear])
    else:
        # every 0 is a local minimum: no slope of the loss, however steep, gets it away at once
        assert float(penalty.gradient(torch.tensor(1e-30, dtype=torch.float64))) > 1e3
        assert bool(zeros[0]) and not bool(zeros[-1])


@every
def test_single_precision_keeps_its_digits_near_0_and_far_away(penalty: Separable):
    """Against double precision on the same numbers, in units in the last place."""
    w = torch.logspace(-18, 5 if type(penalty) not in (LpNorm, Ridge) else 3, 400)
    ulp = torch.finfo(torch.float32).eps
    loose = 40 if isinstance(penalty, VariationalDropout | MolchanovFit) else 12
    for name in ("value", "gradient", "eta"):
        single, double = (getattr(penalty, name)(v) for v in (w, w.double()))
        inside = (double > 1e-30) & (double < 1e30)
        # an exponential of a large number is as exact as the number
        growth = loose * (
            1 + (penalty.gradient(w.double()).clamp(min=1e-300).log().abs() if name != "value" else 0)
        )
        wrong = (single.double() - double).abs() > ulp * growth * double
        assert not bool((wrong & inside).any()), name


@every
@pytest.mark.parametrize("step", [1e-6, 1e-3, 0.5])
def test_the_prox_in_single_precision_is_that_in_double_to_an_ulp_of_the_weight(
    penalty: Separable, step: float
):
    w = torch.logspace(-6, 3, 500)
    single, double = penalty.prox(w, step).double(), penalty.prox(w.double(), step)
    off = (single - double).abs() > 16 * torch.finfo(torch.float32).eps * w.double()
    # close to a jump it is steep, and at the jump rounding decides the side
    assert int(off.sum()) <= 2


@every
def test_shapes_and_layouts_pass_through(penalty: Separable):
    w = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(1))
    for view in (w, w.transpose(0, 2), w[:, ::2], w[:0], w[0, 0, 0]):
        flat = (
            torch.stack([penalty.prox(v, 0.5) for v in view.reshape(-1)])
            if view.numel()
            else view.reshape(-1)
        )
        for result in (penalty.prox(view, 0.5), penalty.prox(view, torch.full_like(view, 0.5))):
            assert result.shape == view.shape and result.dtype == view.dtype
            assert_close(result.reshape(-1), flat, rtol=1e-5, atol=1e-6)
        for name in ("value", "gradient", "eta", "dual"):
            assert getattr(penalty, name)(view.abs()).shape == view.shape


def test_many_weights_are_taken_in_pieces_with_the_same_result():
    w = torch.randn(200_001, generator=torch.Generator().manual_seed(2))
    for penalty in (LogSum(0.5), LpNorm(0.5), LpNorm(1.0)):
        whole = penalty.prox(w, 0.3)
        assert_close(whole, torch.cat([penalty.prox(part, 0.3) for part in w.split(1000)]))
        assert_close(penalty.gradient(w), torch.cat([penalty.gradient(p) for p in w.split(1000)]))
        assert_close(penalty.eta(w), torch.cat([penalty.eta(p) for p in w.split(1000)]))


@every
def test_nan_weights_are_refused_where_the_result_would_hide_them(penalty: Separable):
    w = torch.tensor([1.0, math.nan, 0.0])
    for call in (lambda: penalty.prox(w, 1.0), lambda: penalty.eta(w), lambda: penalty.survival_rate(w, 1.0)):
        with pytest.raises(UsageError, match="w must not be NaN, got 1 of 3 entries"):
            call()
    assert bool(penalty.value(w)[1].isnan())


def test_infinite_weights_of_both_signs_are_not_taken_for_nan():
    w = torch.tensor([math.inf, -math.inf, 1.0])
    assert LogSum(2.0).prox(w, 0.1)[:2].tolist() == [math.inf, -math.inf]
    assert VariationalDropout().prox(w, 0.1)[:2].tolist() == [math.inf, -math.inf]


@every
def test_wrong_types_and_steps_are_refused(penalty: Separable):
    w = torch.ones(3)
    with pytest.raises(ArgumentError, match="w must be real floating point, got torch.int64"):
        penalty.value(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ArgumentError, match="w must be a tensor, got list"):
        penalty.prox([1.0], 1.0)  # pyright: ignore
    with pytest.raises(UsageError, match="step must be finite and not negative, got -1"):
        penalty.prox(w, -1.0)
    with pytest.raises(UsageError, match="step must be finite and not negative"):
        penalty.prox(w, torch.tensor([1.0, math.nan, 1.0]))
    with pytest.raises(UsageError, match=r"step must fit w of shape \[3\], got shape \[4\]"):
        penalty.prox(w, torch.ones(4))
    with pytest.raises(ArgumentError, match="step must be a number or a tensor, got True"):
        penalty.prox(w, True)
    with pytest.raises(UsageError, match="strength must be a finite number above 0"):
        penalty.survival_rate(w, 0.0)

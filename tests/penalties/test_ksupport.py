"""The k-support norm against its definitions: box form, brute force over counts, duality, solvers."""

from __future__ import annotations

import itertools
import math

import numpy
import pytest
import torch
from scipy.optimize import linprog, minimize
from torch import Tensor

from fallow.errors import ArgumentError, UsageError
from fallow.penalties import KSupport, ksupport_dual_norm, ksupport_gradient, ksupport_prox, ksupport_sq

SUPPORTS = (0.4, 1, 1.5, 2, 3.7, 5, 7)


def vectors(count: int = 12) -> Tensor:
    """Random ones, ones with ties and zeros, ones with a gap, one entry, none."""
    plain = torch.randn(count, 7, dtype=torch.float64)
    steep = plain * torch.tensor([30.0, 9.0, 3.0, 1.0, 0.1, 0.0, 0.01])
    edge = torch.zeros(2, 7, dtype=torch.float64)
    edge[0, 2] = -3.0
    return torch.cat([plain, (2 * plain).round(), steep, torch.ones(1, 7), edge])


def box_sq(w: Tensor, k: float) -> float:
    """min of sum w^2 / eta over the box, by bisection of the water level."""
    z = w.abs()
    if int((z > 0).sum()) <= k:
        return float(z.square().sum())
    low, high = 0.0, float(z.sum()) / k + float(z.max())
    for _ in range(120):
        middle = (low + high) / 2
        low, high = (middle, high) if float((z / middle).clamp(max=1).sum()) > k else (low, middle)
    eta = (z / high).clamp(max=1)
    return float((z.square()[z > 0] / eta[z > 0]).sum())


def brute_prox(w: Tensor, gamma: float, k: float) -> Tensor:
    """The best of all candidates: a threshold for every pair of counts."""
    z = w.abs().sort(descending=True).values
    best, value = torch.zeros_like(w), math.inf
    ts = [0.0, *z.tolist()]
    for q, rho in itertools.combinations(range(len(w) + 1), 2):
        if k - q + gamma * (rho - q) > 0:
            ts.append(float(gamma * z[q:rho].sum() / (k - q + gamma * (rho - q))))
    for t in ts:
        x = w.sign() * torch.minimum(w.abs() / (1 + gamma), (w.abs() - t).clamp(min=0))
        now = objective(x, w, gamma, k)
        if now < value:
            best, value = x, now
    return best


def objective(x: Tensor, w: Tensor, gamma: float, k: float) -> float:
    return float((x - w).square().sum()) / 2 + gamma / 2 * box_sq(x, k)


@pytest.mark.parametrize("k", SUPPORTS)
def test_the_squared_norm_is_the_minimum_over_the_box(k: float):
    w = vectors()
    expected = torch.tensor([box_sq(v, k) for v in w], dtype=torch.float64)
    torch.testing.assert_close(ksupport_sq(w, k), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_norm_is_the_gauge_of_sparse_unit_vectors(k: int):
    """Its polar in smooth form: max <w, u> where the squares over every k entries sum to at most 1."""
    w = torch.tensor([2.0, 1.0, 0.5, 0.2], dtype=torch.float64)
    pick = numpy.array([[i in c for i in range(4)] for c in itertools.combinations(range(4), k)], dtype=float)
    found = minimize(
        lambda u: -float(w.numpy() @ u),
        numpy.full(4, 0.3),
        jac=lambda u: -w.numpy(),
        constraints={"type": "ineq", "fun": lambda u: 1 - pick @ u**2, "jac": lambda u: -2 * pick * u},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert -found.fun == pytest.approx(float(ksupport_sq(w, k).sqrt()), rel=1e-8)


def test_k_of_1_is_the_square_of_the_sum_and_k_of_d_the_sum_of_squares():
    w = vectors()
    torch.testing.assert_close(ksupport_sq(w, 1), w.abs().sum(-1).square(), rtol=1e-13, atol=0)
    torch.testing.assert_close(ksupport_sq(w, 7), w.square().sum(-1), rtol=1e-13, atol=0)
    torch.testing.assert_close(ksupport_sq(w, 0.5), 2 * w.abs().sum(-1).square(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("k", SUPPORTS)
def test_the_dual_norm_is_the_largest_product_over_the_box(k: float):
    for u in vectors(3):
        best = linprog(-u.square().numpy(), A_ub=numpy.ones((1, 7)), b_ub=[k], bounds=(0, 1))
        assert float(ksupport_dual_norm(u, k)) == pytest.approx(math.sqrt(-best.fun), rel=1e-9)


@pytest.mark.parametrize("k", SUPPORTS)
def test_norm_and_dual_norm_meet_at_the_gradient(k: float):
    """<w, g> = |w| |g|* with g = grad |w|^2, and |g|* = 2 |w|."""
    w = vectors()
    g = ksupport_gradient(w, k)
    torch.testing.assert_close((w * g).sum(-1), 2 * ksupport_sq(w, k), rtol=1e-12, atol=0)
    torch.testing.assert_close(ksupport_dual_norm(g, k), 2 * ksupport_sq(w, k).sqrt(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", SUPPORTS)
@pytest.mark.parametrize("gamma", [0.01, 0.5, 3.0, 200.0])
def test_the_prox_is_the_best_of_all_counts(gamma: float, k: float):
    w = vectors(4)
    expected = torch.stack([brute_prox(v, gamma, k) for v in w])
    torch.testing.assert_close(ksupport_prox(w, gamma, k), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("k", [1, 2.5, 4])
def test_the_prox_is_what_a_solver_of_the_joint_problem_finds(k: float):
    """min over x and eta of |x - w|^2 / 2 + gamma / 2 sum x^2 / eta; x is eliminated."""
    gamma = 0.7
    for w in vectors(2)[:2]:
        squares = w.square().numpy()
        found = minimize(
            lambda eta, squares=squares: float((squares * gamma / (eta + gamma)).sum()) / 2,
            numpy.full(7, k / 7),
            jac=lambda eta, squares=squares: -squares * gamma / (eta + gamma) ** 2 / 2,
            bounds=[(0, 1)] * 7,
            constraints={"type": "eq", "fun": lambda eta: eta.sum() - k, "jac": lambda eta: numpy.ones(7)},
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 500},
        )
        eta = torch.tensor(found.x)
        torch.testing.assert_close(ksupport_prox(w, gamma, k), eta / (eta + gamma) * w, rtol=0, atol=2e-6)
        assert objective(ksupport_prox(w, gamma, k), w, gamma, k) <= found.fun * (1 + 1e-12)


@pytest.mark.parametrize("k", SUPPORTS)
def test_moreau_splits_a_vector_between_prox_and_conjugate(k: float):
    """w - x is gamma times a subgradient at x: |w - x|* = gamma |x|, <w - x, x> = gamma |x|^2."""
    w = vectors()
    x = ksupport_prox(w, 0.8, k)
    norm = ksupport_sq(x, k)
    torch.testing.assert_close(((w - x) * x).sum(-1), 0.8 * norm, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(ksupport_dual_norm(w - x, k), 0.8 * norm.sqrt(), rtol=1e-11, atol=1e-13)


def test_a_gap_after_the_kth_entry_keeps_exactly_k():
    w = torch.tensor([5.0, -4.0, 1.0, 0.5, -1.0], dtype=torch.float64)
    expected = torch.tensor([2.5, -2.0, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(ksupport_prox(w, 1.0, 2), expected, rtol=0, atol=0)
    edge = torch.tensor([5.0, -4.0, 2.0, 2.0], dtype=torch.float64)  # gamma z_2 = (1 + gamma) z_3 to the bit
    assert ksupport_prox(edge, 1.0, 2).tolist() == [2.5, -2.0, 0.0, 0.0]


@pytest.mark.parametrize("k", [0.5, 1, 2, 3, 3.5, 4])
def test_zeros_stay_zero_and_few_entries_are_only_divided(k: float):
    w = torch.tensor([0.0, 3.0, 0.0, -2.0], dtype=torch.float64)
    x = ksupport_prox(w, 0.25, k)
    assert x[0] == 0 and x[2] == 0 and bool(x.isfinite().all())
    if k >= 2:
        torch.testing.assert_close(x, w / 1.25)
    assert not ksupport_prox(torch.zeros(4), 0.25, k).any() and ksupport_sq(torch.zeros(4), k) == 0


def test_a_step_of_0_changes_nothing_and_a_huge_one_leaves_nothing():
    w = vectors()
    for k in SUPPORTS:
        torch.testing.assert_close(ksupport_prox(w, 0.0, k), w, rtol=0, atol=0)
        assert ksupport_prox(w, 1e12, k).abs().max() < 1e-9


def test_every_vector_of_a_batch_is_treated_as_if_alone_with_its_own_step():
    w = torch.randn(3, 4, 9, dtype=torch.float64)
    steps = torch.rand(3, 4, dtype=torch.float64)
    x = ksupport_prox(w, steps, 2.5)
    for i, j in itertools.product(range(3), range(4)):
        alone = ksupport_prox(w[i, j], float(steps[i, j]), 2.5)
        torch.testing.assert_close(x[i, j], alone, rtol=1e-14, atol=0)
    one = ksupport_prox(w, steps[:1], 2.5)
    torch.testing.assert_close(one[2], ksupport_prox(w[2], steps[0], 2.5))
    assert ksupport_sq(w, 2).shape == (3, 4) and ksupport_prox(w[:0], 0.1, 2).shape == (0, 4, 9)


def test_order_signs_and_scale_pass_through():
    w = vectors()
    order, signs = torch.randperm(7), torch.randn(7).sign()
    x = ksupport_prox(w, 0.6, 2.5)
    torch.testing.assert_close(ksupport_prox(w[:, order] * signs, 0.6, 2.5), x[:, order] * signs)
    torch.testing.assert_close(ksupport_prox(1e150 * w, 0.6, 2.5), 1e150 * x)
    torch.testing.assert_close(ksupport_prox(1e-150 * w, 0.6, 2.5), 1e-150 * x, rtol=1e-7, atol=0)


def test_large_entries_do_not_hide_small_ones():
    w = torch.tensor([1e20, 3.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    alone = ksupport_prox(w[1:], 0.5, 1)
    torch.testing.assert_close(ksupport_prox(w, 0.5, 2)[1:], alone, rtol=1e-14, atol=0)


@pytest.mark.parametrize("size", [1000, 100_000])
def test_single_precision_is_as_good_as_its_rounding(size: int):
    w = torch.randn(size, dtype=torch.float64)
    for k in (1, size // 100 + 0.5, size // 3):
        single, double = ksupport_prox(w.float(), 0.5, k), ksupport_prox(w.float().double(), 0.5, k)
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), double, rtol=0, atol=3e-7 * float(w.abs().max()))
        assert float(ksupport_sq(w.float(), k)) == pytest.approx(float(ksupport_sq(w, k)), rel=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept_and_as_good_as_its_rounding(dtype: torch.dtype):
    w = torch.randn(4, 50).to(dtype)
    x = ksupport_prox(w, 0.5, 7)
    assert x.dtype == dtype and ksupport_sq(w, 7).dtype == dtype
    torch.testing.assert_close(x.double(), ksupport_prox(w.double(), 0.5, 7), rtol=0.02, atol=0.02)
    torch.testing.assert_close(ksupport_sq(w, 7).double(), ksupport_sq(w.double(), 7), rtol=0.02, atol=0)


@pytest.mark.parametrize("k", SUPPORTS)
def test_derivatives_are_those_of_differences(k: float):
    w = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    step = torch.tensor([0.3, 1.0, 4.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: ksupport_sq(v, k), w)
    assert torch.autograd.gradgradcheck(lambda v: ksupport_sq(v, k), w)
    assert torch.autograd.gradcheck(lambda v: ksupport_dual_norm(v, k), w)
    assert torch.autograd.gradcheck(lambda v, s: ksupport_prox(v, s, k), (w, step))
    assert torch.autograd.gradgradcheck(lambda v, s: ksupport_prox(v, s, k), (w, step))


def test_the_gradient_is_that_of_autograd_and_its_formula_also_holds_at_ties():
    w = vectors().requires_grad_()
    for k in SUPPORTS:
        (given,) = torch.autograd.grad(ksupport_sq(w, k).sum(), w)
        torch.testing.assert_close(given, ksupport_gradient(w.detach(), k), rtol=1e-12, atol=1e-14)


def test_the_derivative_in_a_gap_and_at_spare_zeros_is_that_of_division():
    for values, k in (([5.0, -4.0, 1.0, 0.5], 2), ([3.0, 0.0, 0.0], 2)):
        w = torch.tensor(values, dtype=torch.float64, requires_grad=True)
        jacobian = torch.autograd.functional.jacobian(lambda v, k=k: ksupport_prox(v, 1.0, k), w)
        expected = [0.5 if abs(v) > 3.5 or len(values) == 3 else 0.0 for v in values]
        torch.testing.assert_close(jacobian, torch.tensor(expected).double().diag())


def test_the_penalty_is_half_the_squared_norm_and_its_prox_is_that_of_its_value():
    penalty, w = KSupport(2.5), vectors()
    torch.testing.assert_close(penalty.value(w), penalty.squared_norm(w) / 2)
    torch.testing.assert_close(penalty.total(w), penalty.value(w).sum())
    torch.testing.assert_close(penalty.prox(w, 0.4), ksupport_prox(w, 0.4, 2.5))
    torch.testing.assert_close(penalty.gradient(w), ksupport_gradient(w, 2.5) / 2)
    torch.testing.assert_close(penalty.dual_norm(w), ksupport_dual_norm(w, 2.5))
    x = penalty.prox(w, 0.4)
    for _ in range(20):  # no point near it is better
        other = x + 1e-3 * torch.randn_like(x)
        value = [(v - w).square().sum(-1) / 2 + 0.4 * penalty.value(v) for v in (x, other)]
        assert bool((value[0] <= value[1]).all())


def test_eta_attains_the_value_and_the_prox_shrinks_by_the_survival_rate():
    penalty, w = KSupport(2.5), torch.randn(6, 7, dtype=torch.float64)
    eta = penalty.eta(w)
    torch.testing.assert_close((w.square() / eta).sum(-1) / 2, penalty.value(w))
    torch.testing.assert_close(eta.sum(-1), torch.full((6,), 2.5, dtype=torch.float64))
    assert not penalty.dual(eta).any() and penalty.dual(eta * 1.01).isinf().all()
    x = penalty.prox(w, 0.4)
    torch.testing.assert_close(x, penalty.survival_rate(x, 0.4) * w * (x != 0))
    assert not penalty.eta(torch.zeros(3)).any()


@pytest.mark.parametrize("call", [ksupport_sq, ksupport_gradient, ksupport_dual_norm])
def test_bad_input_is_refused_in_words(call):
    w = torch.randn(4)
    for k in (0, -1, math.nan, math.inf, True, "2"):
        with pytest.raises(UsageError, match="k must be a finite number above 0"):
            call(w, k)
    with pytest.raises(UsageError, match="at most the number of entries, 4, got 4.5"):
        call(w, 4.5)
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(UsageError, match="w must be finite"):
            call(torch.tensor([1.0, bad, 2.0]), 2)
    with pytest.raises(ArgumentError, match="floating point, got torch.int64"):
        call(torch.arange(4), 2)
    with pytest.raises(ArgumentError, match="w must be a tensor, got list"):
        call([1.0, 2.0], 1)
    with pytest.raises(UsageError, match="at least 1 dimensions"):
        call(torch.tensor(1.0), 1)


def test_bad_steps_are_refused_in_words():
    w = torch.randn(3, 4)
    for step in (-0.1, math.nan, math.inf, torch.tensor([0.1, -1.0, 0.2])):
        with pytest.raises(UsageError, match="step must be finite and not negative"):
            ksupport_prox(w, step, 2)
    with pytest.raises(UsageError, match=r"fits the \[3\] vectors, got \[4\]"):
        ksupport_prox(w, torch.ones(4), 2)
    with pytest.raises(ArgumentError, match="step must be a number"):
        ksupport_prox(w, "0.1", 2)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="w must be finite"):
        ksupport_prox(w * math.nan, 0.1, 2)
    with pytest.raises(UsageError, match="k must be"):
        KSupport(0)
    with pytest.raises(UsageError, match="strength must be"):
        KSupport(1).survival_rate(w, -1.0)

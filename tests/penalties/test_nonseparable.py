"""Hard thresholding, targeted dropout by rank and ARD on vectors: brute force, duality, derivatives."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor
from torch.testing import assert_close

from fallow.errors import ArgumentError, UsageError
from fallow.penalties import ARD, HardThreshold, Targeted, VectorARD


def vectors(count: int = 20, size: int = 6) -> Tensor:
    return torch.randn(count, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("k", [0, 1, 3, 6, 9])
def test_hard_thresholding_is_the_nearest_vector_with_so_few_entries(k: int):
    penalty, w = HardThreshold(k), vectors()
    x = penalty.prox(w, 0.3)
    supports = [
        torch.tensor(s, dtype=torch.float64) for s in itertools.product([0, 1], repeat=6) if sum(s) <= k
    ]
    nearest = torch.stack([(w * (1 - s)).square().sum(-1) for s in supports]).amin(0)
    assert_close((x - w).square().sum(-1), nearest, rtol=1e-14, atol=1e-15)
    assert bool((penalty.value(x) == 0).all())
    assert bool((penalty.value(w) == (0 if k >= 6 else math.inf)).all())


def test_hard_thresholding_keeps_for_certain_or_not_at_all():
    penalty, w = HardThreshold(2), torch.tensor([3.0, -4.0, 1.0])
    assert penalty.survival_rate(w).tolist() == [1, 1, 0]
    assert penalty.eta(w).tolist() == [math.inf, math.inf, 0]
    assert penalty.gradient(w).tolist() == [0, 0, math.inf]
    assert penalty.gradient(torch.tensor([3.0, -4.0, -1.0])).tolist() == [0, 0, -math.inf]
    assert penalty.gradient(torch.tensor([0.0, 2.0, 0.0, 0.0])).tolist() == [0, 0, 0, 0]
    assert penalty.dual(penalty.eta(w)) == 0 and penalty.dual(w) == math.inf
    assert penalty.at_zero == "barrier"
    assert torch.equal(penalty.prox(w, 0.0), w)
    # of equal entries exactly k are kept
    assert HardThreshold(2).prox(torch.ones(5), 1.0).sum() == 2


@pytest.mark.parametrize("k", [0, 1, 3, 6])
@pytest.mark.parametrize("rate", [0.2, 0.9, 1.0])
def test_targeted_dropout_is_the_trimmed_ridge(k: int, rate: float):
    penalty, w = Targeted(k, survival_rate=rate), vectors()
    rho = (1 - rate) / rate
    least = torch.stack([w[:, list(s)].square().sum(-1) for s in itertools.combinations(range(6), k)]).amin(0)
    assert_close(penalty.value(w), rho / 2 * least)
    rates = penalty.survival_rate(w)
    assert bool(((rates - rate).abs() < 1e-15).sum(-1).ge(k).all()) and bool((rates <= 1).all())
    v = w.clone().requires_grad_()
    penalty.total(v).backward()
    assert_close(v.grad, penalty.gradient(w))
    eta = penalty.eta(w)
    assert_close(penalty.gradient(w), torch.where(eta.isinf(), 0.0, w / eta))


@pytest.mark.parametrize("k", [1, 3])
def test_the_prox_of_targeted_dropout_is_the_best_over_all_choices_of_whom_to_shrink(k: int):
    penalty, w = Targeted(k, survival_rate=0.25), vectors()
    x = penalty.prox(w, 0.7)
    found = (x - w).square().sum(-1) / 2 + 0.7 * penalty.value(x)
    costs = []
    for chosen in itertools.combinations(range(6), k):
        y = w.clone()
        y[:, list(chosen)] /= 1 + 0.7 * 3
        costs.append((y - w).square().sum(-1) / 2 + 0.7 * 3 / 2 * y[:, list(chosen)].square().sum(-1))
    assert_close(found, torch.stack(costs).amin(0))
    steps = torch.rand(20, dtype=torch.float64)
    alone = torch.stack([penalty.prox(v, float(s)) for v, s in zip(w, steps, strict=True)])
    assert_close(penalty.prox(w, steps), alone)


def test_targeted_dropout_is_subquadratic():
    """The sum of the k smallest squares is concave in the squares: a midpoint never lies below the chord."""
    penalty = Targeted(3, survival_rate=0.5)
    a, b = vectors(200).square(), vectors(400)[200:].square()
    middle = penalty.value(((a + b) / 2).sqrt())
    assert bool((middle >= (penalty.value(a.sqrt()) + penalty.value(b.sqrt())) / 2 - 1e-14).all())


def test_the_dual_of_targeted_dropout_is_that_of_a_linear_program():
    """Finite iff ``rho (sum of the k smallest t) <= sum t / eta`` for all t >= 0, here of sum 1."""
    penalty, rho = Targeted(2, survival_rate=0.25), 3.0
    generator = torch.Generator().manual_seed(1)
    duals = []
    for _ in range(60):
        eta = torch.rand(4, dtype=torch.float64, generator=generator) * 1.2
        # maximise rho z - t / eta where z <= t_i + t_j for all pairs: the sum of the two smallest
        pairs = [[-(i in p) * 1.0 for i in range(4)] + [1.0] for p in itertools.combinations(range(4), 2)]
        solved = linprog([*(1 / eta).tolist(), -rho], pairs, [0.0] * 6, [[1.0] * 4 + [0.0]], [1.0])
        expected = 0.0 if -solved.fun <= 1e-12 else math.inf
        duals.append(float(penalty.dual(eta)))
        assert duals[-1] == expected
    assert 0 < duals.count(0.0) < 60
    w = vectors(20, 4)
    assert bool((penalty.dual(penalty.eta(w)) == 0).all())


def test_targeted_dropout_ends_as_hard_thresholding():
    w = vectors()
    assert_close(
        Targeted(4, survival_rate=1e-12).prox(w, 1.0), HardThreshold(2).prox(w, 1.0), rtol=0, atol=1e-10
    )


def ard() -> VectorARD:
    generator = torch.Generator().manual_seed(3)
    return VectorARD(torch.randn(7, 5, dtype=torch.float64, generator=generator), noise=0.5)


def test_ards_eta_is_stationary_and_its_update_never_raises_the_objective():
    penalty, w = ard(), vectors(8, 5)

    def objective(eta: Tensor) -> Tensor:
        return ((w * w / eta).sum(-1) + penalty.dual(eta)) / 2

    eta = torch.ones_like(w)
    for _ in range(50):
        new = penalty.update(w, eta)
        assert bool((objective(new) <= objective(eta) + 1e-12).all())
        eta = new
    eta = penalty.eta(w)
    assert_close(penalty.value(w), objective(eta), rtol=1e-13, atol=0)
    covariance = 0.5 * torch.eye(7, dtype=torch.float64) + (penalty.inputs * eta[:, None]) @ penalty.inputs.T
    pull = torch.einsum("ij,bik,kj->bj", penalty.inputs, torch.linalg.inv(covariance), penalty.inputs)
    assert_close((w / eta).square(), pull, rtol=1e-9, atol=0)


def test_ards_gradient_is_that_of_its_value():
    penalty = ard()
    w = vectors(3, 5).requires_grad_()
    penalty.total(w).backward()
    assert_close(w.grad, penalty.gradient(w), rtol=1e-10, atol=0)
    for j in range(5):
        ahead, behind = w.detach().clone(), w.detach().clone()
        ahead[:, j] += 1e-5
        behind[:, j] -= 1e-5
        difference = (penalty.value(ahead) - penalty.value(behind)) / 2e-5
        assert_close(difference, penalty.gradient(w)[:, j], rtol=0, atol=2e-8)


def test_ards_strategy_is_integrable_and_subquadratic():
    """The Jacobian of 1 / eta in the squares is symmetric and negative (notes, 1.4)."""
    penalty = ard()
    t = torch.tensor([0.5, 1.0, 0.2, 2.0, 0.7], dtype=torch.float64)
    columns = []
    for j in range(5):
        bump = torch.zeros(5, dtype=torch.float64)
        bump[j] = 1e-5
        ahead, behind = (1 / penalty.eta((t + s * bump).sqrt()) for s in (1, -1))
        columns.append((ahead - behind) / 2e-5)
    jacobian = torch.stack(columns, 1)
    assert_close(jacobian, jacobian.T, rtol=0, atol=1e-7)
    assert float(torch.linalg.eigvalsh((jacobian + jacobian.T) / 2).max()) < 0


def test_with_orthogonal_inputs_ard_falls_apart_into_scalars():
    inputs = torch.linalg.qr(vectors(9, 4)).Q * torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    penalty = VectorARD(inputs, noise=0.5)
    scalars = [ARD(float(c)) for c in inputs.square().sum(0) / 0.5]
    w = vectors(6, 4)
    parts = torch.stack([s.value(v) for s, v in zip(scalars, w.T, strict=True)], -1)
    assert_close(penalty.value(w), parts.sum(-1), rtol=1e-10, atol=0)
    etas = torch.stack([s.eta(v) for s, v in zip(scalars, w.T, strict=True)], -1)
    assert_close(penalty.eta(w), etas, rtol=1e-9, atol=0)
    small = torch.stack([s.prox(v, 0.05) for s, v in zip(scalars, w.T, strict=True)], -1)
    assert_close(penalty.prox(w, 0.05), small, rtol=0, atol=1e-7)


def test_ards_prox_is_never_worse_than_staying_and_stationary():
    penalty, w = ard(), vectors(6, 5)
    x = penalty.prox(w, 0.1)
    moved = (x - w).square().sum(-1) / 2 + 0.1 * penalty.value(x)
    assert bool((moved <= 0.1 * penalty.value(w)).all())
    away = x.abs() > 1e-6
    assert_close((x + 0.1 * penalty.gradient(x) - w)[away], torch.zeros_like(w)[away], rtol=0, atol=1e-7)
    assert torch.equal(penalty.prox(w, 0.0), w)


def test_vectors_that_do_not_fit_are_refused():
    w = torch.ones(3)
    with pytest.raises(UsageError, match="k must be at most the number of entries, 3, got 4"):
        Targeted(4, survival_rate=0.5).value(w)
    with pytest.raises(UsageError, match="k must be an integer of at least 0, got -1"):
        HardThreshold(-1)
    with pytest.raises(UsageError, match="k must be an integer of at least 0, got 1.5"):
        Targeted(1.5, survival_rate=0.5)  # pyright: ignore
    with pytest.raises(UsageError, match="w must have 5 entries in its last dimension"):
        ard().value(w)
    with pytest.raises(UsageError, match=r"inputs must be a matrix \[n, d\], got shape \[1, 2, 3\]"):
        VectorARD(torch.ones(1, 2, 3))
    with pytest.raises(UsageError, match="inputs must be finite"):
        VectorARD(torch.full((2, 2), math.nan))
    for penalty in (HardThreshold(1), Targeted(1, survival_rate=0.5)):
        with pytest.raises(UsageError, match="w must not be NaN"):
            penalty.prox(torch.tensor([1.0, math.nan]), 1.0)
        with pytest.raises(ArgumentError, match="w must be real floating point"):
            penalty.prox(torch.ones(3, dtype=torch.int64), 1.0)
        with pytest.raises(UsageError, match="step must be finite and not negative"):
            penalty.prox(w, -1.0)

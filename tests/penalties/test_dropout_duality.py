"""Adaptive dropout and its penalty are one thing: by enumeration of masks, and in what algorithms reach."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fallow.penalties import (
    MCP,
    HardConcrete,
    LogSum,
    LpNorm,
    Separable,
    Standout,
    TargetedThreshold,
    VariationalDropout,
    from_survival_rate,
)

PENALTIES = [LogSum(0.5), MCP(), Standout(), VariationalDropout(), LpNorm(1.0), HardConcrete(0.5)]
every = pytest.mark.parametrize("penalty", PENALTIES, ids=repr)


def regression(
    rows: int = 30, columns: int = 8, seed: int = 0, *, normal: bool = True
) -> tuple[Tensor, Tensor]:
    """Inputs, with columns of mean square 1 where `normal`, and targets of a sparse linear model."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    if normal:
        inputs = inputs / inputs.square().mean(0).sqrt()
    true = torch.zeros(columns, dtype=torch.float64)
    true[::3] = torch.tensor([1.5, -2.0, 0.7] * columns, dtype=torch.float64)[: len(true[::3])]
    noise = torch.randn(rows, dtype=torch.float64, generator=generator)
    return inputs, inputs @ true + 0.3 * noise


def loss(inputs: Tensor, targets: Tensor, w: Tensor) -> Tensor:
    return (targets - inputs @ w).square().mean() / 2


def masks(rates: Tensor) -> tuple[Tensor, Tensor]:
    """Every mask, [2^d, d], and its probability under independent rates."""
    kept = torch.tensor(list(itertools.product([0.0, 1.0], repeat=len(rates))), dtype=torch.float64)
    return kept, torch.where(kept == 1, rates, 1 - rates).prod(1)


@every
@pytest.mark.parametrize("normal", [True, False])
def test_the_expected_loss_over_all_masks_is_the_tikhonov_objective(penalty: Separable, normal: bool):
    """Equation (2), with the curvature h of each column."""
    inputs, targets = regression(normal=normal)
    strength = 0.3
    w = torch.linspace(-0.5, 0.5, 8, dtype=torch.float64)
    rates, eta = penalty.survival_rate(w, strength), penalty.eta(w)
    kept, chance = masks(rates)
    scaled = w * kept / rates.clamp(min=1e-300)
    expected = sum(p * loss(inputs, targets, v) for p, v in zip(chance, scaled, strict=True))
    ridge = inputs.square().mean(0) * w * w / eta
    tikhonov = loss(inputs, targets, w) + strength / 2 * torch.where(w == 0, 0.0, ridge).sum()
    assert_close(torch.as_tensor(expected), tikhonov, rtol=1e-12, atol=0)


def test_an_unscaled_mask_is_the_penalty_of_the_effective_weight():
    """Targeted dropout: the stored u, masked without rescaling, is the weight rate times u where targeted."""
    inputs, targets = regression()
    penalty = TargetedThreshold(0.4, survival_rate=0.3)
    stored = torch.linspace(-1, 1, 8, dtype=torch.float64)
    rates = torch.where(stored.abs() * 0.3 < 0.4, 0.3, 1.0).double()
    rates[stored.abs() * 0.3 < 0.4] = 0.3
    kept, chance = masks(rates)
    expected = sum(p * loss(inputs, targets, stored * m) for p, m in zip(chance, kept, strict=True))
    w = rates * stored
    assert_close(torch.as_tensor(expected), loss(inputs, targets, w) + penalty.total(w), rtol=1e-12, atol=0)


@every
def test_the_expected_gradient_of_adaptive_dropout_is_that_of_the_penalised_loss(penalty: Separable):
    """Where the rates are not differentiated, which is why `survival_rate` gives none to differentiate."""
    inputs, targets = regression()
    strength = 0.3
    w = torch.linspace(-0.6, 0.5, 8, dtype=torch.float64, requires_grad=True)
    rates = penalty.survival_rate(w, strength)
    kept, chance = masks(rates)
    expected = torch.stack(
        [p * loss(inputs, targets, w * m / rates) for p, m in zip(chance, kept, strict=True)]
    ).sum()
    (noisy,) = torch.autograd.grad(expected, w)
    (penalised,) = torch.autograd.grad(loss(inputs, targets, w) + strength * penalty.total(w), w)
    assert_close(noisy, penalised, rtol=1e-11, atol=1e-13)


def test_differentiating_through_the_rates_would_be_another_penalty():
    """LogSum(2) at w = 1: slope 1/9 instead of 1/3, that of ``w^2 / (2 eta(w))``."""
    w = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    (through,) = torch.autograd.grad(w**2 / (2 * (w * (w + 2))), w)
    assert float(through) == pytest.approx(1 / 9)
    assert float(LogSum(2.0).gradient(w)) == pytest.approx(1 / 3)


def reweighted(
    penalty: Separable, inputs: Tensor, targets: Tensor, strength: float, start: Tensor
) -> list[Tensor]:
    """The iterates of reweighted ridge, in the form that divides by nothing."""
    gram, moment = inputs.T @ inputs / len(inputs), inputs.T @ targets / len(inputs)
    iterates = [start]
    for _ in range(400):
        root = penalty.eta(iterates[-1]).clamp(max=1e12).sqrt()
        system = root[:, None] * gram * root + strength * torch.eye(len(root), dtype=root.dtype)
        iterates.append(root * torch.linalg.solve(system, root * moment))
    return iterates


@pytest.mark.parametrize(
    "penalty", [LogSum(0.1), LogSum(2.0), MCP(1.0, 1.5), LpNorm(1.0), VariationalDropout()], ids=repr
)
def test_reweighting_never_raises_the_objective_and_ends_where_the_prox_does(penalty: Separable):
    inputs, targets = regression(60, 12, seed=3)
    strength = 0.05
    start = torch.linalg.lstsq(inputs, targets[:, None]).solution[:, 0]
    iterates = reweighted(penalty, inputs, targets, strength, start)
    objectives = [float(loss(inputs, targets, w) + strength * penalty.total(w)) for w in iterates]
    assert all(b <= a + 1e-13 for a, b in itertools.pairwise(objectives))

    # proximal gradient descent from the same start
    rate = 1 / float(torch.linalg.eigvalsh(inputs.T @ inputs / len(inputs)).max())
    w = start
    for _ in range(3000):
        w = penalty.prox(w - rate * (inputs.T @ (inputs @ w - targets)) / len(inputs), rate * strength)
    assert_close(iterates[-1], w, rtol=0, atol=1e-6)
    assert objectives[-1] == pytest.approx(
        float(loss(inputs, targets, w) + strength * penalty.total(w)), abs=1e-10
    )


def test_in_an_orthogonal_design_one_prox_is_the_solution():
    inputs = torch.linalg.qr(regression(40, 6)[0]).Q * math.sqrt(40)
    targets = regression(40, 6)[1]
    least = inputs.T @ targets / 40
    w = LogSum(0.1).prox(least, 0.2)
    iterates = reweighted(LogSum(0.1), inputs, targets, 0.2, w + 1e-9 * w.sign())
    assert_close(iterates[-1], w, rtol=0, atol=1e-9)


def test_a_users_strategy_trains_what_its_penalty_says():
    """By descent on the exact expected loss over masks, rates detached, against the penalised loss."""
    inputs, targets = regression(40, 4, seed=5)

    def rate(w: Tensor) -> Tensor:
        return 0.1 + 0.9 * torch.tanh(w)

    penalty = from_survival_rate(rate, strength=1.0)
    with torch.enable_grad():
        w = torch.full((4,), 0.5, dtype=torch.float64, requires_grad=True)
        for _ in range(300):
            rates = rate(w.detach().abs())
            kept, chance = masks(rates)
            expected = (chance * (targets - (w * kept / rates) @ inputs.T).square().mean(1)).sum() / 2
            (slope,) = torch.autograd.grad(expected, w)
            w = (w - 0.1 * slope).detach().requires_grad_()
    stationary = inputs.T @ (inputs @ w - targets) / 40 + penalty.gradient(w)
    assert_close(stationary.detach(), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-6)

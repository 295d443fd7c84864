"""Three algorithms for penalised least squares that must find the same weights."""

import pytest
import torch
from torch import Tensor

from fallow.errors import UsageError
from fallow.penalties import MCP, LogSum, LpNorm, Ridge, Separable
from fallow.sparsity import irls, proximal, variable_projection

CASES: list[tuple[Separable, float]] = [
    (LpNorm(1.0), 0.05),
    (LogSum(0.1), 0.02),
    (LogSum(2.0), 0.15),
    (MCP(a=1.5, l=1.0), 0.1),
    (Ridge(2.0), 0.3),
]


@pytest.fixture(scope="module")
def problem() -> tuple[Tensor, Tensor]:
    """200 rows, 30 normalised columns of which 6 matter."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 30, dtype=torch.float64, generator=generator)
    x = x / x.square().mean(0).sqrt()
    w = torch.zeros(30, dtype=torch.float64)
    w[:6] = torch.tensor([2.0, -1.5, 1.0, 0.8, -0.7, 3.0])
    return x, x @ w + 0.5 * torch.randn(200, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize(("omega", "strength"), CASES)
def test_reweighting_and_proximal_steps_agree(
    problem: tuple[Tensor, Tensor], omega: Separable, strength: float
) -> None:
    first = irls(*problem, omega, strength, iterations=20_000)
    second = proximal(*problem, omega, strength)
    assert first.converged
    assert second.converged
    torch.testing.assert_close(first.weights, second.weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("omega", "strength"), CASES[1:3])
def test_variable_projection_agrees_too(
    problem: tuple[Tensor, Tensor], omega: Separable, strength: float
) -> None:
    first = irls(*problem, omega, strength, iterations=20_000)
    second = variable_projection(*problem, omega, strength)
    torch.testing.assert_close(first.weights, second.weights, rtol=0, atol=1e-6)
    assert second.objective[-1] == pytest.approx(first.objective[-1], abs=1e-10)


@pytest.mark.parametrize(("omega", "strength"), CASES)
def test_the_objective_never_rises_and_the_end_is_stationary(
    problem: tuple[Tensor, Tensor], omega: Separable, strength: float
) -> None:
    x, y = problem
    fit = irls(x, y, omega, strength, iterations=20_000)
    values = torch.tensor(fit.objective, dtype=torch.float64)
    assert bool((values.diff() <= 1e-12).all())
    gradient = x.T @ (x @ fit.weights - y) / len(x)
    alive = fit.weights.abs() > 1e-6
    pull = gradient + strength * omega.gradient(fit.weights)
    torch.testing.assert_close(pull[alive], torch.zeros_like(pull[alive]), rtol=0, atol=1e-6)


def test_lasso_is_scikit_learns(problem: tuple[Tensor, Tensor]) -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    x, y = problem
    theirs = linear.Lasso(alpha=0.05, fit_intercept=False, tol=1e-14, max_iter=100_000)
    theirs.fit(x.numpy(), y.numpy())
    ours = irls(x, y, LpNorm(1.0), 0.05, iterations=20_000).weights
    torch.testing.assert_close(ours, torch.from_numpy(theirs.coef_), rtol=0, atol=1e-8)


def test_the_ridge_is_its_closed_form(problem: tuple[Tensor, Tensor]) -> None:
    x, y = problem
    gram = x.T @ x / 200 + torch.eye(30, dtype=torch.float64) * 0.3 / 2.0
    torch.testing.assert_close(irls(x, y, Ridge(2.0), 0.3).weights, torch.linalg.solve(gram, x.T @ y / 200))


def test_zeros_are_absorbing_for_reweighting_alone(problem: tuple[Tensor, Tensor]) -> None:
    start = torch.zeros(30, dtype=torch.float64)
    start[0] = 1.0
    stuck = irls(*problem, LpNorm(1.0), 0.05, start=start)
    free = proximal(*problem, LpNorm(1.0), 0.05, start=start)
    assert int((stuck.weights != 0).sum()) == 1
    assert int((free.weights != 0).sum()) >= 6


def test_shapes_and_numbers_are_checked() -> None:
    x, y = torch.randn(5, 2), torch.randn(4)
    with pytest.raises(UsageError, match=r"got \[5, 2\] and \[4\]"):
        irls(x, y, Ridge(), 1.0)
    with pytest.raises(UsageError, match="NaN"):
        proximal(x, torch.full((5,), float("nan")), Ridge(), 1.0)

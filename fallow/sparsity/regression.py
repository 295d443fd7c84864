"""Penalised least squares by three algorithms that must agree: reweighting, proximal steps, projection.

    F(w) = |y - X w|^2 / (2 n) + strength sum_j Omega(w_j)

References:
    LeJeune, Javadi, Baraniuk: The Flip Side of the Reweighted Coin (2021), for the duality of the two sides.
    Bach and others (2012), for reweighted l2; the stable form is derived.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fallow.errors import UsageError, check_count
from fallow.penalties import Separable


@dataclass(frozen=True)
class Fit:
    """What an algorithm found.

    Attributes:
        weights: [d].
        objective: F after each iteration.
        converged: whether it stopped because nothing moved.
    """

    weights: Tensor
    objective: tuple[float, ...]
    converged: bool


def irls(
    x: Tensor,
    y: Tensor,
    penalty: Separable,
    strength: float,
    *,
    start: Tensor | None = None,
    iterations: int = 1000,
    tolerance: float = 1e-12,
) -> Fit:
    """Iteratively reweighted Tikhonov: ridge with the inverse weights eta of the last solution, in turn.

    Formula: ``w <- D (D G D + strength diag(1/(1 + eta)))^-1 D X'y / n`` with ``G = X'X / n`` and
    ``D^2 = eta / (1 + eta)``, which is the ridge solution and divides by nothing where eta is 0 or infinite.

    Args:
        x: [n, d].
        y: [n].
        penalty: a separable one; F never increases.
        strength: lambda.
        start: the weights to begin with; None: least squares. Zeros stay zeros.
        iterations: at most.
        tolerance: it stops where no weight moves by more than this share of the largest.

    Estimator:
        A stationary point of F, the global minimum where F is convex.

    Raises:
        UsageError: shapes that do not fit, numbers that are not finite.
    """
    gram, moment, n = _problem(x, y)
    w = _least_squares(x, y) if start is None else start.to(x)
    found: list[float] = []
    for _ in range(check_count("iterations", iterations, 1)):
        eta = penalty.eta(w)
        inverse = 1 / (1 + eta)
        scale = (1 - inverse).clamp_min(0).sqrt()
        system = scale[:, None] * gram * scale + torch.diag(strength * inverse)
        new = scale * torch.linalg.solve(system, scale * moment)
        moved, w = (new - w).abs().amax(), new
        found.append(_objective(x, y, w, penalty, strength, n))
        if moved <= tolerance * w.abs().amax().clamp_min(torch.finfo(w.dtype).tiny):
            return Fit(w, tuple(found), True)
    return Fit(w, tuple(found), False)


def proximal(
    x: Tensor,
    y: Tensor,
    penalty: Separable,
    strength: float,
    *,
    start: Tensor | None = None,
    iterations: int = 100_000,
    tolerance: float = 1e-13,
) -> Fit:
    """Proximal gradient steps of the size of one over the largest eigenvalue of X'X / n.

    Args:
        x: [n, d].
        y: [n].
        penalty: one with a proximal operator.
        strength: lambda.
        start: None: least squares.
        iterations: at most.
        tolerance: as in `irls`.

    Estimator:
        A stationary point of F; zeros may come back, other than in `irls`.
    """
    gram, moment, n = _problem(x, y)
    step = 1 / float(torch.linalg.eigvalsh(gram)[-1])
    w = _least_squares(x, y) if start is None else start.to(x)
    found: list[float] = []
    for _ in range(check_count("iterations", iterations, 1)):
        new = penalty.prox(w - step * (gram @ w - moment), step * strength)
        moved, w = (new - w).abs().amax(), new
        if len(found) < 1000:
            found.append(_objective(x, y, w, penalty, strength, n))
        if moved <= tolerance * w.abs().amax().clamp_min(torch.finfo(w.dtype).tiny):
            return Fit(w, (*found, _objective(x, y, w, penalty, strength, n)), True)
    return Fit(w, (*found, _objective(x, y, w, penalty, strength, n)), False)


def variable_projection(
    x: Tensor,
    y: Tensor,
    penalty: Separable,
    strength: float,
    *,
    start: Tensor | None = None,
    iterations: int = 2000,
) -> Fit:
    """L-BFGS over ``log eta`` alone, the weights being the ridge solution at each.

    Formula: ``J(eta) = min_w |y - X w|^2/(2n) + strength/2 sum_j (w_j^2/eta_j + f(eta_j))``, whose minimum is
    that of F.

    Args:
        x: [n, d].
        y: [n].
        penalty: one with a dual f.
        strength: lambda.
        start: weights whose eta it begins with; None: least squares.
        iterations: at most.

    Estimator:
        A stationary point of F. Weights and ``log eta`` moved together are badly conditioned: from least
        squares such a search stops early.
    """
    gram, moment, n = _problem(x, y)
    w = _least_squares(x, y) if start is None else start.to(x)
    logs = penalty.eta(w).clamp(1e-12, 1e12).log().requires_grad_()
    found: list[float] = []

    def ridge(eta: Tensor) -> Tensor:
        inverse = 1 / (1 + eta)
        scale = (eta * inverse).sqrt()
        system = scale[:, None] * gram * scale + torch.diag(strength * inverse)
        return scale * torch.linalg.solve(system, scale * moment)

    def closure() -> Tensor:
        search.zero_grad()
        eta = logs.exp()
        w = ridge(eta)
        error = (y - x @ w).square().sum() / (2 * n)
        value = error + strength / 2 * (w.square() / eta + penalty.dual(eta)).sum()
        value.backward()
        return value

    search = torch.optim.LBFGS(
        [logs],
        max_iter=check_count("iterations", iterations, 1),
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
        history_size=50,
        line_search_fn="strong_wolfe",
    )
    search.step(closure)
    with torch.no_grad():
        w = ridge(logs.exp())
    found.append(_objective(x, y, w, penalty, strength, n))
    state = search.state[logs]
    return Fit(w.detach(), tuple(found), int(state.get("n_iter", iterations)) < iterations)


def _problem(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, int]:
    if x.dim() != 2 or y.shape != x.shape[:1] or not len(x):
        raise UsageError(f"x must be [n, d] and y [n], got {list(x.shape)} and {list(y.shape)}")
    if not bool(x.isfinite().all() & y.isfinite().all()):
        raise UsageError("x and y must be finite, got NaN or infinite entries")
    return x.T @ x / len(x), x.T @ y / len(x), len(x)


def _least_squares(x: Tensor, y: Tensor) -> Tensor:
    return torch.linalg.lstsq(x, y[:, None]).solution[:, 0]


def _objective(x: Tensor, y: Tensor, w: Tensor, penalty: Separable, strength: float, n: int) -> float:
    return float((y - x @ w).square().sum() / (2 * n) + strength * penalty.total(w))

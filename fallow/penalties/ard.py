"""Automatic relevance determination: the scalar penalty, and that of a linear model with given inputs.

References:
    Wipf, Nagarajan: A new view of automatic relevance determination (2007), for the update of eta. Both as
    penalties: project's notes, section 2; the prox of the scalar one derived.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fallow.errors import UsageError
from fallow.penalties._checks import check_floats, check_positive, check_step
from fallow.penalties._numerics import check_weights, chunked, root_above
from fallow.penalties.separable import AtZero, Separable

_ITERATIONS = 2000
_SETTLED = 1e-13


def ard_prox(w: Tensor, step: float | Tensor, c: float) -> Tensor:
    """The prox of `ARD`: ``|x| = |w| - step / u``, ``u = (|w| + sqrt(w^2 - 4 (step - 1 / c))) / 2``, or 0.

    u is the larger root of ``u^2 - |w| u + step - 1 / c``, and ``x = u - 1 / (c u)``. Up to ``step = 2 /
    c`` it is 0 while ``|w| <= step sqrt(c)``, and continuous; beyond, the objective decides.
    """
    if isinstance(step, Tensor):
        magnitude = w.abs()
        u = (magnitude + (magnitude * magnitude - 4 * (step - 1 / c)).clamp(min=0).sqrt()) / 2
        x = magnitude - step / u
        wins = step * ARD(c)._value(x.clamp(min=0)) < x * (x / 2 + step / u)
        return torch.where((x > 0) & (wins | (step * c <= 2)), x, 0.0).copysign(w)
    threshold = ard_threshold(step, c)

    def shrunk(part: Tensor) -> Tensor:
        magnitude = part.abs()
        root = (magnitude * magnitude).sub_(4 * (step - 1 / c)).sqrt_()
        move = root.add_(magnitude).reciprocal_().mul_(2 * step).copysign_(part)
        return (part - move).masked_fill_(magnitude <= threshold, 0.0)

    return chunked(shrunk, w)


def ard_threshold(step: float, c: float) -> float:
    """Up to which ``|w|`` the prox of `ARD` is 0; where it jumps, objectives are equal at both ends."""
    if step * c <= 2:
        return step * math.sqrt(c)

    def slope(x: float) -> float:
        return 2 / (x + math.hypot(x, 2 / math.sqrt(c)))

    def zero_is_better(x: float) -> bool:
        ratio = c * x / slope(x)
        value = (ratio / (1 + ratio) + math.log1p(ratio)) / 2
        return step * value > x * (x / 2 + step * slope(x))

    u = math.sqrt(step - 1 / c)  # where its two roots meet
    x = root_above(zero_is_better, u - 1 / (c * u))
    return x + step * slope(x)


@dataclass(frozen=True)
class ARD(Separable):
    """The penalty of ``f(eta) = log(1 + c eta)``: eta = (w^2 + |w| sqrt(w^2 + 4 / c)) / 2.

    What automatic relevance determination is for one weight, or for orthogonal inputs. Slope sqrt(c) at 0,
    falling like 1 / |w|. No stand-in for variational dropout: it ends 0.635 above it.

    Attributes:
        c: Above 0; for inputs x and noise variance tau, ``|x|^2 / tau``.

    Examples:
        >>> ARD(c=1.0).eta(torch.tensor([0.0, 1.5]))
        tensor([0., 3.])
    """

    c: float = 1.0
    at_zero: ClassVar[AtZero] = "slope"

    def __post_init__(self) -> None:
        check_positive("c", self.c)

    def _value(self, magnitude: Tensor) -> Tensor:
        ratio = self._eta(magnitude) * self.c
        # log(1 + r) + r / (1 + r), the latter without infinity over infinity
        return (ratio.log1p() + (1 + ratio.reciprocal()).reciprocal()) / 2

    def _slope(self, magnitude: Tensor) -> Tensor:
        return 2 / (magnitude + self._root(magnitude))

    def _eta(self, magnitude: Tensor) -> Tensor:
        return magnitude * ((magnitude + self._root(magnitude)) / 2)

    def _root(self, magnitude: Tensor) -> Tensor:
        return torch.hypot(magnitude, torch.full_like(magnitude, 2 / math.sqrt(self.c)))

    def _prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        return ard_prox(w, step, self.c)

    def _dual(self, eta: Tensor) -> Tensor:
        return (self.c * eta).log1p()


@dataclass(frozen=True, eq=False)
class VectorARD:
    """The penalty of a linear model's evidence on vectors along the last dimension; no sum of parts.

    ``f(eta) = log det (I + X diag(eta) X^T / noise)``, n rows of X, so that f(0) = 0.

    Attributes:
        inputs: X, of shape [n, d].
        noise: The variance tau of the noise, above 0.
        at_zero: What the penalty is like at 0.

    Estimator:
        eta by Wipf and Nagarajan's update to a relative change of 1e-13, at most 2000 times; it never raises
        the objective. Value and first derivative are as exact as eta; there is no second derivative.

    Examples:
        >>> penalty = VectorARD(torch.eye(2), noise=1.0)  # orthogonal: ARD(1) for each weight
        >>> torch.allclose(penalty.eta(torch.tensor([0.0, 1.5])), torch.tensor([0.0, 3.0]))
        True
    """

    inputs: Tensor
    noise: float = 1.0
    at_zero: ClassVar[AtZero] = "slope"

    def __post_init__(self) -> None:
        if check_floats("inputs", self.inputs, 2).dim() != 2:
            raise UsageError(f"inputs must be a matrix [n, d], got shape {list(self.inputs.shape)}")
        if not bool(self.inputs.isfinite().all()):
            raise UsageError("inputs must be finite: remove or fill the entries that are not")
        check_positive("noise", self.noise)

    def value(self, w: Tensor) -> Tensor:
        """The penalty of each vector, of shape w.shape[:-1]; its gradient is exact."""
        eta = self.eta(w)
        free = eta > 0
        ridge = torch.where(free, w * w / torch.where(free, eta, 1.0), 0.0).sum(-1)
        return (ridge + self.dual(eta)) / 2

    def total(self, w: Tensor) -> Tensor:
        """The sum of the values, a scalar."""
        return self.value(w).sum()

    @torch.no_grad()
    def gradient(self, w: Tensor) -> Tensor:
        """The gradient of `value`, ``w / eta``, without autograd; 0 where w is."""
        return self._pull(self.eta(w)).to(w.dtype) * w.sign()

    @torch.no_grad()
    def eta(self, w: Tensor) -> Tensor:
        """The minimiser: ``w_j^2 / eta_j^2 = x_j^T S^-1 x_j``, S = noise I + X diag(eta) X^T."""
        magnitude = self._checked(w).double().abs()
        eta = magnitude * (magnitude + 1)
        for _ in range(_ITERATIONS):
            new = self.update(magnitude, eta)
            settled = bool(((new - eta).abs() <= _SETTLED * new).all())
            eta = new
            if settled:
                break
        return eta.to(w.dtype)

    @torch.no_grad()
    def update(self, w: Tensor, eta: Tensor) -> Tensor:
        """One step of Wipf and Nagarajan: ``|w_j| / sqrt(x_j^T S^-1 x_j)`` with S at `eta`."""
        return torch.where(w != 0, w.abs() / self._pull(eta), 0.0).to(w.dtype)

    @torch.no_grad()
    def survival_rate(self, w: Tensor, strength: float) -> Tensor:
        """Keep probability ``eta / (eta + strength)`` of the adaptive dropout that this is dual to."""
        return 1 / (1 + check_positive("strength", strength) / self.eta(w))

    @torch.no_grad()
    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        """A stationary point of ``|x - w|^2 / 2 + step value(x)``, by reweighting, never above `w` itself.

        Estimator:
            The global minimiser where the objective is convex, as for small steps; else where descent ends.
        """
        start = self._checked(w).double()
        tau = check_step(step, w.shape[:-1], w)
        x, eta = start, start.abs() * (start.abs() + 1)
        for _ in range(_ITERATIONS):
            eta = self.update(x, eta)
            new = torch.where(tau > 0, start * eta / (eta + tau), start)
            settled = bool(((new - x).abs() <= _SETTLED * start.abs().amax(-1, keepdim=True)).all())
            x = new
            if settled:
                break
        return x.to(w.dtype)

    @torch.no_grad()
    def dual(self, eta: Tensor) -> Tensor:
        """``log det (I + X diag(eta) X^T / noise)`` of each vector."""
        return torch.linalg.slogdet(self._covariance(eta.double()) / self.noise).logabsdet.to(eta.dtype)

    def _pull(self, eta: Tensor) -> Tensor:
        """``sqrt(x_j^T S^-1 x_j)``, which is ``|w_j| / eta_j`` at the minimiser."""
        inputs = self.inputs.double().to(eta.device)
        factor = torch.linalg.cholesky(self._covariance(eta.double()))
        solved = torch.linalg.solve_triangular(factor, inputs.expand(*factor.shape[:-2], -1, -1), upper=False)
        return solved.square().sum(-2).sqrt()

    def _covariance(self, eta: Tensor) -> Tensor:
        inputs = self.inputs.double().to(eta.device)
        noise = self.noise * torch.eye(inputs.shape[0], dtype=torch.float64, device=eta.device)
        return noise + (inputs * eta.unsqueeze(-2)) @ inputs.T

    def _checked(self, w: Tensor) -> Tensor:
        weights = check_weights(check_floats("w", w)).detach()
        if weights.shape[-1] != self.inputs.shape[1]:
            raise UsageError(
                f"w must have {self.inputs.shape[1]} entries in its last dimension, one for each column of "
                f"inputs, got {weights.shape[-1]}"
            )
        return weights

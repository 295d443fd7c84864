"""Powers of the weights: l_p for 0 < p < 2, l1 among them, and the ridge. The proxes are derived."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fallow.errors import UsageError
from fallow.penalties._checks import check_positive
from fallow.penalties._numerics import chunked
from fallow.penalties.separable import AtZero, Separable


def soft_threshold(w: Tensor, step: float | Tensor) -> Tensor:
    """``sgn(w) max(|w| - step, 0)``, the prox of ``step |x|``."""
    if isinstance(step, Tensor):
        return (w.abs() - step).clamp_(min=0).copysign_(w)
    return chunked(lambda part: part.abs().sub_(step).clamp_(min=0).copysign_(part), w)


def lp_prox(w: Tensor, step: float | Tensor, p: float) -> Tensor:
    """``argmin_x (x - w)^2 / 2 + step |x|^p / p``: soft at 1, else a root of ``x + step x^(p-1) = |w|``.

    For p < 1 the minimiser is 0 until it jumps to x, ``x^(2-p) = 2 step (1 - p) / p``, at
    ``|w| = x (1 + p / (2 (1 - p)))``; above, Newton's method from ``|w|`` falls on the root, the function
    being convex, and at p = 1/2 it is that of a cubic, by its cosine. For p > 1 Newton's method falls on
    ``y = x^(p-1)``, the root of ``y^(1/(p-1)) + step y = |w|``, from ``min(|w| / step, |w|^(p-1))``.

    References:
        Derived.
    """
    if p == 1:
        return soft_threshold(w, step)
    if not isinstance(step, Tensor):
        tau = torch.tensor(step, dtype=w.dtype, device=w.device)
        return chunked(lambda part: lp_prox(part, tau, p), w)
    if p > 1:
        return _smooth_lp_prox(w, step, p)
    magnitude = w.abs()
    # step x^(p-1) at the jump, with the powers joined: x^(p-1) alone is infinite at step 0
    jump = (2 * step * (1 - p) / p) ** (1 / (2 - p))
    above = magnitude > jump * (1 + p / (2 * (1 - p)))
    moves = above & (step > 0) & magnitude.isfinite()
    m = torch.where(moves, magnitude, 1 + 2 * (jump + step))
    if p == 0.5:
        third = (m / 3).sqrt()
        x = (2 * third * ((-step / (2 * third**3)).acos() / 3).cos()).square()
    else:
        x = m
        for _ in range(12 if w.dtype == torch.float64 else 8):
            pull = step * x ** (p - 1)
            x = x - (x + pull - m) / (1 + (p - 1) * pull / x)
    return torch.where(moves, x, torch.where(above, magnitude, 0.0)).copysign_(w)


def _smooth_lp_prox(w: Tensor, step: Tensor, p: float) -> Tensor:
    """The prox for p > 1, where it is continuous and 0 at 0 alone."""
    magnitude, power = w.abs(), 1 / (p - 1)
    y = torch.fmin(magnitude / step, magnitude ** (p - 1))  # fmin: 0 / 0 where step and w are 0
    for _ in range(60 if w.dtype == torch.float64 else 30):
        excess = (y**power + step * y - magnitude).clamp(min=0)
        y = (y - excess / (power * y ** (power - 1) + step).clamp(min=1e-300)).clamp_(min=0)
    return torch.where((step > 0) & magnitude.isfinite(), y**power, magnitude).copysign_(w)


@dataclass(frozen=True)
class LpNorm(Separable):
    """``|w|^p / p`` for 0 < p < 2: eta = |w|^(2 - p). p = 1 is l1; below, every 0 is a local minimum.

    Attributes:
        p: The power, in (0, 2).

    Examples:
        >>> LpNorm(1.0).prox(torch.tensor([0.4, -2.0]), 0.5)
        tensor([ 0.0000, -1.5000])
    """

    p: float = 1.0

    def __post_init__(self) -> None:
        if check_positive("p", self.p) >= 2:
            raise UsageError(f"p must be in (0, 2), got {self.p!r}: for 2 take Ridge(1.0)")

    @property
    def at_zero(self) -> AtZero:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Singular below p = 1, a slope at 1; above, smooth: no exact zeros, though eta(0) is 0."""
        return "singular" if self.p < 1 else "slope" if self.p == 1 else "ridge"

    def _value(self, magnitude: Tensor) -> Tensor:
        return magnitude**self.p / self.p

    def _slope(self, magnitude: Tensor) -> Tensor:
        return magnitude ** (self.p - 1)

    def _gradient(self, w: Tensor) -> Tensor:
        # At 0 the slope is infinite for p < 1, and its derivative for all p but 1.
        away = w != 0
        return torch.where(away, self._slope(torch.where(away, w, 1.0).abs()) * w.sign(), 0.0)

    def _eta(self, magnitude: Tensor) -> Tensor:
        return magnitude ** (2 - self.p)

    def _prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        return lp_prox(w, step, self.p)

    def _dual(self, eta: Tensor) -> Tensor:
        q = self.p / (2 - self.p)
        return eta**q / q


@dataclass(frozen=True)
class Ridge(Separable):
    """``w^2 / (2 eta0)``: constant dropout, weight decay; the border of what a strategy can give.

    Attributes:
        eta0: The constant eta, above 0.
    """

    eta0: float = 1.0
    at_zero: ClassVar[AtZero] = "ridge"

    def __post_init__(self) -> None:
        check_positive("eta0", self.eta0)

    def _value(self, magnitude: Tensor) -> Tensor:
        return magnitude * magnitude / (2 * self.eta0)

    def _slope(self, magnitude: Tensor) -> Tensor:
        return magnitude / self.eta0

    def _eta(self, magnitude: Tensor) -> Tensor:
        return torch.full_like(magnitude, self.eta0)

    def _prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        return w / (1 + step / self.eta0)

    def _dual(self, eta: Tensor) -> Tensor:
        slack = 1 + 4 * torch.finfo(eta.dtype).eps
        return torch.where(eta <= self.eta0 * slack, 0.0, eta * torch.inf).to(eta.dtype)

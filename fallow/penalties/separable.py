"""What all separable penalties share: one object with value, gradient, prox, eta, dual and keep probability.

A separable penalty is a sum of one even function Omega over the weights, Omega(0) = 0, of which

    phi(t) = 2 Omega(sqrt t)  is concave and does not decrease                            (subquadratic)

holds. It is then the least of a family of ridges, and the weight eta of the best of them is a strategy that
keeps larger weights more often:

    Omega(w) = min_{eta >= 0} (w^2 / eta + f(eta)) / 2,      f(eta) = sup_w (2 Omega(w) - w^2 / eta)    (3)
    eta(w) = w / Omega'(w),      survival rate = eta(w) / (eta(w) + strength)                           (4, 1)

References:
    LeJeune, Javadi, Baraniuk: The Flip Side of the Reweighted Coin (2021), for the duality of adaptive
    dropout and subquadratic penalties. Numbers in brackets are those of the project's notes on it; derived.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fallow.penalties._checks import check_floats, check_positive
from fallow.penalties._numerics import check_elementwise_step, check_weights, chunked
from fallow.penalties._prox import conjugate, numeric_prox
from fallow.special import widened

AtZero = Literal["ridge", "slope", "singular", "barrier"]


class _Value(torch.autograd.Function):
    """The value with the exact gradient; differentiable again where the slope is."""

    generate_vmap_rule = True

    @staticmethod
    def forward(w: Tensor, penalty: Separable) -> Tensor:
        return penalty._value(widened(w).abs()).to(w.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Separable], output: Tensor) -> None:
        ctx.penalty = inputs[1]
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * _exact_gradient(ctx.penalty, ctx.saved_tensors[0]), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return tangent * _exact_gradient(ctx.penalty, ctx.saved_tensors[0])


def _exact_gradient(penalty: Separable, w: Tensor) -> Tensor:
    return penalty._gradient(widened(w)).to(w.dtype)


class Separable:
    """The base of the separable penalties; each gives `_value`, `_slope` and `_eta` of ``|w|``.

    Attributes:
        at_zero: What the penalty is like at 0, which decides whether it makes zeros. ``"ridge"``: smooth, no
            exact zeros, sparsity only by a threshold. ``"slope"``: like l1, zero where the loss pulls less
            than the slope. ``"singular"``: an infinite slope, every 0 is a local minimum. ``"barrier"``:
            infinite beside 0.
    """

    at_zero: ClassVar[AtZero]

    def value(self, w: Tensor) -> Tensor:
        """The penalty of each weight; its gradient is exact, 0 at 0, and differentiable again.

        Raises:
            ArgumentError: `w` is no real floating-point tensor.
        """
        return _Value.apply(check_floats("w", w, 0), self)  # pyright: ignore[reportReturnType]

    def total(self, w: Tensor) -> Tensor:
        """The sum of the values, a scalar."""
        return self.value(w).sum()

    @torch.no_grad()
    def gradient(self, w: Tensor) -> Tensor:
        """The gradient of `value`, without autograd; 0 at 0, where it is the shortest subgradient."""
        return chunked(lambda part: _exact_gradient(self, part), check_floats("w", w, 0).detach())

    @torch.no_grad()
    def eta(self, w: Tensor) -> Tensor:
        """``w / Omega'(w)``, the minimiser in (3): the inverse ridge weight of reweighting; without gradient.

        0 where the penalty forbids to move, infinite where it is flat.

        Raises:
            ArgumentError: `w` is no real floating-point tensor.
            UsageError: Entries are NaN.
        """
        return chunked(lambda part: self._eta(widened(part).abs()).to(part.dtype), check_weights(w).detach())

    @torch.no_grad()
    def survival_rate(self, w: Tensor, strength: float) -> Tensor:
        """Keep probability ``eta / (eta + strength)`` of the adaptive dropout that this is dual to.

        Without gradient: differentiating through it would train another penalty.
        """
        number = check_positive("strength", strength)

        def rate(part: Tensor) -> Tensor:
            odds = self._eta(widened(part).abs()).reciprocal().mul_(number)
            return odds.add_(1).reciprocal_().to(part.dtype)

        return chunked(rate, check_weights(w).detach())

    @torch.no_grad()
    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        """``argmin_x (x - w)^2 / 2 + step value(x)``, the global one, elementwise; without gradient.

        Args:
            w: The weights, of any shape.
            step: A number of at least 0, or a tensor that broadcasts against `w`, say a preconditioned rate.

        Raises:
            ArgumentError: `w` is no real floating-point tensor, or `step` no number.
            UsageError: Entries are NaN, or `step` is negative, not finite or of the wrong shape.
        """
        weights = widened(check_weights(w).detach())
        return self._prox(weights, check_elementwise_step(step, weights)).to(w.dtype)

    def dual(self, eta: Tensor) -> Tensor:
        """``f(eta)`` of (3), elementwise, for entries in [0, infinity].

        Its derivative is ``w^2 / eta^2`` at the weight w whose eta this is; where f has kinks, one of them.
        """
        return self._dual(widened(check_floats("eta", eta, 0))).to(eta.dtype)

    def _value(self, magnitude: Tensor) -> Tensor:
        raise NotImplementedError

    def _slope(self, magnitude: Tensor) -> Tensor:
        """The derivative of the penalty at ``|w|``, at 0 from the right; differentiable, leaves its input."""
        raise NotImplementedError

    def _gradient(self, w: Tensor) -> Tensor:
        return self._slope(w.abs()) * w.sign()

    def _eta(self, magnitude: Tensor) -> Tensor:
        return magnitude / self._slope(magnitude)

    def _prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        return numeric_prox(w, step, self._value, self._slope)

    def _dual(self, eta: Tensor) -> Tensor:
        return conjugate(eta, self._value, self._eta)

"""The penalty of variational dropout, exactly and by Molchanov's fit.

Where the noise variance of each weight minimises the evidence bound, what is left is a penalty on the weight:

    Omega(w) = min_eta (w^2 / eta + f(eta)) / 2,      f(eta) = 2 KL(eta),      w^2 = eta^2 f'(eta) at eta(w)

In units in which strength and curvature are 1: for n samples and curvature h it is Omega(sqrt(n h) |w|) / n.

References:
    Molchanov, Ashukha, Vetrov: Variational dropout sparsifies deep neural networks (2017), for the fit. The
    penalty: project's notes, sections 2.1 and 2, derived there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fallow.penalties.separable import AtZero, Separable
from fallow.special import Table, kl_slope, variational_kl

Scalar = Callable[[Tensor], Tensor]

# Molchanov's k1, k2, k3.
_FIT = (0.63576, 1.87320, 1.48695)
_LOGS = 82.0


@dataclass(frozen=True)
class VariationalDropout(Separable):
    """The exact penalty: ``|w| - w^2 / 12`` near 0, ``log |w| + (1 + log 2 + gamma) / 2`` far away.

    Slope 1 at 0, falling like 1 / |w|; eta is |w| near 0 and w^2 - 1 far away. Its prox at unit step is
    0 up to |w| = 1: one standard error of the estimate.

    Estimator:
        Exact to rounding (1e-14 relative): eta and value are looked up in tables, made where first
        needed from Dawson's function and Newton's method.

    Examples:
        >>> VariationalDropout().value(torch.tensor([0.0, 1.0, 100.0]))
        tensor([0.0000, 0.9136, 5.7403])
    """

    at_zero: ClassVar[AtZero] = "slope"

    def _value(self, magnitude: Tensor) -> Tensor:
        # log(1 + w) has the right ends but for a constant; the rest begins with w^2
        share = (1 + magnitude.pow(-2)).reciprocal()
        return magnitude.log1p() + share * _tables()[1]((1 + magnitude).reciprocal())

    def _slope(self, magnitude: Tensor) -> Tensor:
        near = (1 + magnitude).reciprocal()
        return near / _tables()[0](near)

    def _eta(self, magnitude: Tensor) -> Tensor:
        return magnitude * ((1 + magnitude) * _tables()[0]((1 + magnitude).reciprocal()))

    def _dual(self, eta: Tensor) -> Tensor:
        return 2 * variational_kl(eta)


@dataclass(frozen=True)
class MolchanovFit(Separable):
    """The penalty of variational dropout as published, its divergence by a fit with a sigmoid.

    ``f(eta) = 2 (k1 sigmoid(k3 log eta - k2) + log(1 + eta) / 2)``, k = (0.63576, 1.87320, 1.48695).

    Estimator:
        An approximation of `VariationalDropout`: off by at most 0.0094 in KL (near r = 33) and in value; the
        slope, 1 at 0, first rises a little. For comparison with published results; the exact one costs less.

    Examples:
        >>> MolchanovFit().dual(torch.tensor([0.01, 1.0])) / 2
        tensor([0.0051, 0.4312])
    """

    at_zero: ClassVar[AtZero] = "slope"

    def _value(self, magnitude: Tensor) -> Tensor:
        return (magnitude * self._slope(magnitude) + self._dual(self._eta(magnitude))) / 2

    def _slope(self, magnitude: Tensor) -> Tensor:
        return 1 / ((1 + magnitude) * self._ratio(magnitude))

    def _eta(self, magnitude: Tensor) -> Tensor:
        return magnitude * ((1 + magnitude) * self._ratio(magnitude))

    def _ratio(self, magnitude: Tensor) -> Tensor:
        # 1 to rounding at the ends of the table; where w is 0, log would be infinite and so its derivative
        inside = torch.where(magnitude > 0, magnitude, 1e-36)
        return _fit_table()(inside.log().clamp(-_LOGS, _LOGS))

    def _dual(self, eta: Tensor) -> Tensor:
        k1, k2, k3 = _FIT
        return 2 * k1 * torch.sigmoid(k3 * eta.log() - k2) + eta.log1p()


def fit_slope(eta: Tensor) -> Tensor:
    """The derivative of the fit's dual."""
    k1, k2, k3 = _FIT
    gate = torch.sigmoid(k3 * eta.log() - k2)
    return 2 * k1 * k3 * gate * (1 - gate) / eta + 1 / (1 + eta)


def fit_bend(eta: Tensor) -> Tensor:
    """The second derivative of the fit's dual."""
    k1, k2, k3 = _FIT
    gate = torch.sigmoid(k3 * eta.log() - k2)
    first = 2 * k1 * k3 * gate * (1 - gate) / eta
    return first * (k3 * (1 - 2 * gate) - 1) / eta - (1 + eta).pow(-2)


def solve_eta(w: Tensor, slope: Scalar, elasticity: Scalar) -> Tensor:
    """The eta with ``eta sqrt(f'(eta)) = w``: Newton's method in logarithms, from ``w (1 + w)``; 0 at 0.

    Args:
        w: Magnitudes in double precision.
        slope: f'.
        elasticity: ``eta f'' / f'``, above -2.
    """
    eta = torch.where(w > 0, w, 1.0) * (1 + w)
    for _ in range(12):
        miss = w.log() - eta.log() - slope(eta).log() / 2
        eta = eta * (miss / (1 + elasticity(eta).clamp(min=-1.2) / 2)).exp()
    return torch.where(w > 0, eta, 0.0)


@functools.cache
def _fit_table() -> Table:
    """``eta / (w (1 + w))`` of the fit over log w; its power of w near 0 suits no other scale."""

    def ratio(logs: Tensor) -> Tensor:
        w = logs.exp()
        eta = solve_eta(w, fit_slope, lambda eta: eta * fit_bend(eta) / fit_slope(eta))
        return eta / (w * (1 + w))

    return Table(ratio, -_LOGS, _LOGS, 2048, 9)


@functools.cache
def _tables() -> tuple[Table, Table]:
    """``eta / (w (1 + w))`` and ``(Omega - log(1 + w)) (1 + 1 / w^2)`` as functions of 1 / (1 + w)."""

    def solved(t: Tensor) -> tuple[Tensor, Tensor]:
        w = 1 / t - 1

        def elasticity(eta: Tensor) -> Tensor:
            # eta f'' / f' for f' = D(x) / x, x^2 = eta / 2, is (x / D - 2 x^2 - 1) / 2
            ratio = 2 * kl_slope(eta)
            return (1 / ratio - eta - 1) / 2

        return w, solve_eta(w, lambda eta: 2 * kl_slope(eta), elasticity)

    def eta_ratio(t: Tensor) -> Tensor:
        w, eta = solved(t)
        return eta / (w * (1 + w))

    def remainder(t: Tensor) -> Tensor:
        w, eta = solved(t)
        return (w * (w / eta) / 2 + variational_kl(eta) - w.log1p()) * (1 + w.pow(-2))

    return Table(eta_ratio, 0.0, 1.0), Table(remainder, 0.0, 1.0)

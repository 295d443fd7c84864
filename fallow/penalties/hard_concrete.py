"""The penalty of hard concrete gates, "l0 regularisation", with the location of each gate at its best.

A gate is s = clip(sigmoid((logit u + log a) / b) (zeta - gamma) + gamma, 0, 1), u uniform. For a weight
w, E[s] times the stored one, what it adds to a loss of curvature 1, and c times the chance that it is
open, are

    Omega_c(w) = min_a w^2 (E[s^2] / E[s]^2 - 1) / 2 + c P(s > 0)  =  2 c Omega_(1/2)(w / sqrt(2 c))

With A = P(s > 0) / P(s = 0) and y running from where the gate opens to where it is 1, moments over A are
integrals of s(y)^k exp(-y) / (1 + A exp(-y))^2, smooth in A: nothing is lost for small gates.

References:
    Louizos, Welling, Kingma: Learning sparse neural networks through L0 regularization (2018), for the gates
    and b, gamma, zeta. The penalty: project's notes, section 2.2, derived there; the form in A derived.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fallow.penalties._checks import check_positive
from fallow.penalties._prox import numeric_prox
from fallow.penalties.separable import AtZero, Separable
from fallow.special import Table, gauss_legendre

TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1
# logit u from where the gate opens to where it is 1.
_SPAN = TEMPERATURE * (math.log((1 - LOW) / (HIGH - 1)) - math.log(-LOW / HIGH))
# From this step on the prox is that of l0; a little below, a tangent from 0 meets the curve first.
_HARD_STEP = 0.5


@dataclass(frozen=True)
class HardConcrete(Separable):
    """The penalty of hard concrete gates at cost c: a slope of 1.4752 sqrt(2 c) at 0, exactly c from w* on.

    w* = 0.5350 sqrt(2 c): there eta jumps from 2.348 to infinity, the best gate from random to open. For
    steps of at least 1/2, 1 among them, the prox is that of l0: w or 0, with the threshold sqrt(2 c
    step).

    Attributes:
        c: The cost of an open gate, above 0; 1/2 is drawn in LeJeune and others' figure.

    Estimator:
        Exact to rounding: moments by 32 Gauss-Legendre nodes, eta and value looked up in tables from them.
        Gates trained by gradient find the best location only up to w*: beyond it both local minima last.

    Examples:
        >>> penalty = HardConcrete(c=0.5)
        >>> penalty.prox(torch.tensor([0.9, -1.1]), 1.0), penalty.value(torch.tensor([0.6, 7.0]))
        (tensor([ 0.0000, -1.1000]), tensor([0.5000, 0.5000]))
    """

    c: float = 0.5
    at_zero: ClassVar[AtZero] = "slope"

    def __post_init__(self) -> None:
        check_positive("c", self.c)

    @property
    def scale(self) -> float:
        """``sqrt(2 c)``: the weight that is 1 for the member c = 1/2."""
        return math.sqrt(2 * self.c)

    @property
    def flat(self) -> float:
        """w*, from where on the penalty is constant."""
        return _tables()[2] * self.scale

    def _value(self, magnitude: Tensor) -> Tensor:
        y, inside = self._inside(magnitude)
        return torch.where(inside, 2 * self.c * y * _tables()[1](y), self.c)

    def _slope(self, magnitude: Tensor) -> Tensor:
        y, inside = self._inside(magnitude)
        return torch.where(inside, self.scale / _tables()[0](y), 0.0)

    def _eta(self, magnitude: Tensor) -> Tensor:
        y, inside = self._inside(magnitude)
        return torch.where(inside, y * _tables()[0](y), torch.inf)

    def _prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        if isinstance(step, float) and step >= _HARD_STEP:
            return torch.where(w.abs() > self.scale * math.sqrt(step), w, 0.0)
        return numeric_prox(w, step, self._value, self._slope, (self.flat,))

    def _inside(self, magnitude: Tensor) -> tuple[Tensor, Tensor]:
        """The weight in units of the scale, at most w*, and whether it is below w* (or NaN)."""
        y = magnitude / self.scale
        return y.clamp(max=_tables()[2]), ~(y >= _tables()[2])


def gate_moments(log_a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """P(s > 0), E[s] and E[s^2] of a gate at location `log_a`, elementwise.

    Examples:
        >>> gate_moments(torch.zeros((), dtype=torch.float64))[0]
        tensor(0.8318, dtype=torch.float64)
    """
    odds = (log_a.double() - TEMPERATURE * math.log(-LOW / HIGH)).exp()
    first, second, _, _ = _moments(odds)
    open_ = odds / (1 + odds)
    return open_.to(log_a.dtype), (odds * first).to(log_a.dtype), (odds * second).to(log_a.dtype)


def _moments(odds: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``E[s] / A`` and ``E[s^2] / A`` and their derivatives in A, elementwise, in double precision."""
    nodes, weights = gauss_legendre(32)
    y = _SPAN * nodes
    gate = torch.sigmoid(y / TEMPERATURE + math.log(-LOW / (HIGH))) * (HIGH - LOW) + LOW
    decay, end = (-y).exp(), math.exp(-_SPAN)
    tail = 1 + odds.unsqueeze(-1) * decay
    density = _SPAN * weights * decay / tail.square()
    bend = -2 * density * decay / tail
    one, one_bend = end / (1 + odds * end), -((end / (1 + odds * end)) ** 2)
    first, second = (density * gate).sum(-1) + one, (density * gate * gate).sum(-1) + one
    return first, second, (bend * gate).sum(-1) + one_bend, (bend * gate * gate).sum(-1) + one_bend


def _curve(odds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, eta and value of the member c = 1/2 where A is the best gate; elementwise.

    With R = A E[s^2] / E[s]^2 the bracket is R / A - 1, and ``w^2 = A^2 C' / (R - A R')``, C = A / (1 + A).
    """
    first, second, first_bend, second_bend = _moments(odds)
    ratio = second / first**2
    ratio_bend = ratio * (second_bend / second - 2 * first_bend / first)
    w = odds / ((1 + odds) * (ratio - odds * ratio_bend).sqrt())
    eta = odds / (ratio - odds)
    return w, eta, (w * w / eta + odds / (1 + odds)) / 2


@functools.cache
def _tables() -> tuple[Table, Table, float]:
    """``eta / w`` and ``Omega / w`` over [0, w*], and w*, for the member c = 1/2."""

    def at(log_odds: float) -> tuple[Tensor, Tensor, Tensor]:
        return _curve(torch.tensor(math.exp(log_odds), dtype=torch.float64))

    low, high = math.log(0.1), math.log(20.0)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float(at(middle)[2]) < 0.5 else (low, middle)
    top, flat = low, float(at(low)[0])

    def best(w: Tensor) -> Tensor:
        low, high = torch.full_like(w, -46.0), torch.full_like(w, top)
        for _ in range(56):
            middle = (low + high) / 2
            below = _curve(middle.exp())[0] < w
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return ((low + high) / 2).exp()

    def eta_ratio(w: Tensor) -> Tensor:
        return _curve(best(w))[1] / w

    def value_ratio(w: Tensor) -> Tensor:
        return _curve(best(w))[2] / w

    return Table(eta_ratio, 0.0, flat, 128, 8), Table(value_ratio, 0.0, flat, 128, 8), flat

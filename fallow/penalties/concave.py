"""Penalties that flatten: MCP, SCAD, Welsch, Geman-McClure.

References:
    Zhang: Nearly unbiased variable selection under minimax concave penalty (2010). Fan, Li: Variable
    selection via nonconcave penalized likelihood (2001). Both normalised to slope 1 at 0, as in section 2 of
    the project's notes. The prox of SCAD beyond its convex range is derived.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fallow.errors import UsageError
from fallow.penalties._checks import check_positive
from fallow.penalties._numerics import chunked
from fallow.penalties.separable import AtZero, Separable


def mcp_prox(w: Tensor, step: float | Tensor, flat: float) -> Tensor:
    """The firm threshold: 0 up to `step`, w from `flat` on, a line between; hard where ``step >= flat``.

    Args:
        w: The weights.
        step: The threshold, a number or one for each weight.
        flat: From where on the penalty is constant, a l.
    """
    if not isinstance(step, Tensor):
        tau = torch.tensor(step, dtype=w.dtype, device=w.device)
        return chunked(lambda part: mcp_prox(part, tau, flat), w)
    magnitude, tau = w.abs(), step
    firm = torch.minimum((magnitude - tau).clamp_(min=0) / (1 - tau / flat).clamp(min=1e-30), magnitude)
    hard = torch.where(magnitude > (tau * flat).sqrt(), magnitude, 0.0)
    return torch.where(tau < flat, firm, hard).copysign_(w)


def scad_prox(w: Tensor, step: float | Tensor, a: float, l: float) -> Tensor:  # noqa: E741
    """Soft up to l + step, a steeper line to a l, then w; beyond ``step = (a - 1) l`` a jump instead.

    Args:
        w: The weights.
        step: A number or one for each weight.
        a: From a l on the penalty is constant.
        l: Up to l it is that of l1.
    """
    if not isinstance(step, Tensor):
        tau = torch.tensor(step, dtype=w.dtype, device=w.device)
        return chunked(lambda part: scad_prox(part, tau, a, l), w)
    magnitude, tau = w.abs(), step
    bend = (a - 1) * l
    soft = (magnitude - tau).clamp_(min=0)
    line = (bend * magnitude - tau * a * l) / (bend - tau).clamp(min=1e-30 * bend)
    smooth = torch.minimum(torch.maximum(soft, line), magnitude)
    # With tau >= (a - 1) l the middle piece is concave: soft, then w from where their objectives meet.
    level = (a + 1) * l
    meet = torch.where(tau <= level, (tau + level) / 2, (tau * level).sqrt())
    jumped = torch.where(magnitude > meet, magnitude, soft.clamp(max=l) * (tau <= level))
    return torch.where(tau < bend, smooth, jumped).copysign_(w)


@dataclass(frozen=True)
class MCP(Separable):
    """``|w| - w^2 / (2 a l)`` up to ``|w| = a l``, then constant: eta = a l |w| / (a l - |w|), then infinite.

    Attributes:
        a: Only the product a l matters; both are kept as in the literature.
        l: MCP(1/2, sqrt 2) is that of LeJeune and others' figure.

    Examples:
        >>> MCP(2.0, 1.0).prox(torch.tensor([0.4, 1.0, -3.0]), 0.5)
        tensor([ 0.0000,  0.6667, -3.0000])
    """

    a: float = 0.5
    l: float = math.sqrt(2)  # noqa: E741
    at_zero: ClassVar[AtZero] = "slope"

    def __post_init__(self) -> None:
        check_positive("a", self.a)
        check_positive("l", self.l)

    @property
    def flat(self) -> float:
        """From where on the penalty is constant."""
        return self.a * self.l

    def _value(self, magnitude: Tensor) -> Tensor:
        inside = magnitude.clamp(max=self.flat)
        return inside * (1 - inside / (2 * self.flat))

    def _slope(self, magnitude: Tensor) -> Tensor:
        return (1 - magnitude / self.flat).clamp(min=0)

    def _prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        return mcp_prox(w, step, self.flat)

    def _dual(self, eta: Tensor) -> Tensor:
        return self.flat / (1 + self.flat / eta)


@dataclass(frozen=True)
class SCAD(Separable):
    """``|w|`` up to l, a parabola to a l, then ``(a + 1) l / 2``: l1 for small weights, flat for large ones.

    Attributes:
        a: Above 2; 3.7 is Fan and Li's.
        l: Above 0.

    Examples:
        >>> SCAD(3.7, 1.0).prox(torch.tensor([0.4, 1.0, -5.0]), 0.5)
        tensor([ 0.0000,  0.5000, -5.0000])
    """

    a: float = 3.7
    l: float = 1.0  # noqa: E741
    at_zero: ClassVar[AtZero] = "slope"

    def __post_init__(self) -> None:
        if check_positive("a", self.a) <= 2:
            raise UsageError(f"a must be above 2 for SCAD, got {self.a!r}: Fan and Li take 3.7")
        check_positive("l", self.l)

    def _value(self, magnitude: Tensor) -> Tensor:
        beyond = (magnitude.clamp(max=self.a * self.l) - self.l).clamp(min=0)
        return magnitude.clamp(max=self.l) + beyond * (1 - beyond / (2 * (self.a - 1) * self.l))

    def _slope(self, magnitude: Tensor) -> Tensor:
        return ((self.a * self.l - magnitude) / ((self.a - 1) * self.l)).clamp(0, 1)

    def _prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        return scad_prox(w, step, self.a, self.l)

    def _dual(self, eta: Tensor) -> Tensor:
        f = self.l * (self.a + 1 - self.l / eta) / ((self.a - 1) * self.l / eta + 1)
        return torch.where(eta <= self.l, eta, f)


@dataclass(frozen=True)
class Welsch(Separable):
    """``(1 - exp(-w^2)) / 2``: eta = exp(w^2), a ridge that lets go."""

    at_zero: ClassVar[AtZero] = "ridge"

    def _value(self, magnitude: Tensor) -> Tensor:
        return -(magnitude * magnitude).neg_().expm1_() / 2

    def _slope(self, magnitude: Tensor) -> Tensor:
        rate = (-magnitude * magnitude).exp()
        return torch.where(rate == 0, 0.0, magnitude) * rate  # not infinity times 0

    def _eta(self, magnitude: Tensor) -> Tensor:
        return (magnitude * magnitude).exp_()

    def _dual(self, eta: Tensor) -> Tensor:
        # 1 - (1 + t) exp(-t) at t = log eta
        return gamma_two(eta.clamp(min=1).log())


@dataclass(frozen=True)
class GemanMcClure(Separable):
    """``w^2 / (2 (1 + w^2))``: eta = (1 + w^2)^2, a ridge that lets go."""

    at_zero: ClassVar[AtZero] = "ridge"

    def _value(self, magnitude: Tensor) -> Tensor:
        # 1 / w^2 is infinite at 0 and 0 at infinity: both come out right
        return 0.5 / (1 + (magnitude * magnitude).reciprocal_())

    def _slope(self, magnitude: Tensor) -> Tensor:
        rate = (1 + magnitude * magnitude).reciprocal()
        return torch.where(rate == 0, 0.0, magnitude) * rate * rate  # not infinity times 0

    def _eta(self, magnitude: Tensor) -> Tensor:
        return (magnitude * magnitude).add_(1).pow_(2)

    def _dual(self, eta: Tensor) -> Tensor:
        return (1 - eta.clamp(min=1).rsqrt()).square()


def gamma_two(z: Tensor) -> Tensor:
    """``1 - (1 + z) exp(-z)`` for z >= 0, to rounding near 0 too."""
    near, far = z.clamp(max=1), z.clamp(max=1e3)
    series = torch.zeros_like(z)
    for k in range(19, 1, -1):
        series = (series + 1) * near / k
    # the tail of the exponential's series from z^2 / 2 on, less than the whole by 1 + z
    return torch.where(z < 1, near * series * (-near).exp(), 1 - (1 + far) * (-far).exp())

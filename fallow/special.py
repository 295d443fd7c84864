"""Dawson's function and the Kullback-Leibler divergence of variational dropout, which is its integral.

    D(x) = exp(-x^2) int_0^x exp(t^2) dt,      KL(r) = 2 int_0^sqrt(r/2) D                              (6)

Both are looked up in tables of smooth ratios over 1 / (1 + x), which cover every x without overflow. The
tables are made once, where first needed, in double precision: D from its power series below 1/4, by
Rybicki's sum up to 8, from its asymptotic series beyond; KL by a quadrature of D or from its own
asymptotic series.

References:
    Rybicki: Dawson's integral and the sampling theorem (1989). Equation (6): project's notes, derived there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fallow.errors import ArgumentError

EULER = 0.57721566490153286
# The limit of KL(r) - log(r) / 2.
KL_LIMIT = (math.log(2) + EULER) / 2
_FAR = 8.0


def dawson(x: Tensor) -> Tensor:
    """Dawson's function, elementwise; odd, with the derivative ``1 - 2 x D(x)`` in autograd.

    Estimator:
        Within 1e-15 relative in double precision, within an ulp or two in single, for all x; no overflow.
        Half precision is computed in single.

    Raises:
        ArgumentError: `x` is no real floating-point tensor.

    Examples:
        >>> dawson(torch.tensor([0.0, 1.0, -1e30], dtype=torch.float64))
        tensor([ 0.0000e+00,  5.3808e-01, -5.0000e-31], dtype=torch.float64)
    """
    return _Dawson.apply(widened(_floats("x", x))).to(x.dtype)  # pyright: ignore


def variational_kl(r: Tensor) -> Tensor:
    """KL from N(w, w^2 / r) to the log-uniform prior, up to the constant that makes it 0 at r = 0; r >= 0.

    ``E log |sqrt(r) + e| - E log |e|`` with e standard normal. With the derivative
    ``D(x) / (2 x)``, ``x = sqrt(r / 2)``, in autograd.

    Estimator:
        Exact to rounding, 1e-14 relative in double precision, where the fits in the literature are off by up
        to 0.009.

    Raises:
        ArgumentError: `r` is no real floating-point tensor.

    References:
        Derived: project's notes, equation (6). Molchanov, Ashukha, Vetrov: Variational dropout
        sparsifies deep neural networks (2017), for the divergence and a fit of it.

    Examples:
        >>> variational_kl(torch.tensor([0.01, 1.0, 300.0], dtype=torch.float64))
        tensor([0.0050, 0.4267, 3.4854], dtype=torch.float64)
    """
    return _Divergence.apply(widened(_floats("r", r))).to(r.dtype)  # pyright: ignore


class _Dawson(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        magnitude = x.abs()
        smooth = _tables()[0]((1 + magnitude).reciprocal())
        # two forms of x / (1 + 2 x^2): neither over- nor underflows on its side
        return smooth * torch.where(magnitude < 1, x / (1 + 2 * x * x), (x.reciprocal() + 2 * x).reciprocal())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (1 - 2 * x * dawson(x))


class _Divergence(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(r: Tensor) -> Tensor:
        x = (r / 2).sqrt()
        # log(1 + r) / 2 has the right ends but for a constant; the rest begins with r^2, that is x^4
        share = (1 + x.pow(-4)).reciprocal()
        return r.log1p() / 2 + share * _tables()[1]((1 + x).reciprocal())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (r,) = ctx.saved_tensors
        return grad * kl_slope(r)


def kl_slope(r: Tensor) -> Tensor:
    """The derivative of `variational_kl`, ``D(x) / (2 x)`` at ``x = sqrt(r / 2)``."""
    return dawson_ratio((r / 2).clamp(min=0).sqrt()) / 2


def dawson_ratio(x: Tensor) -> Tensor:
    """``D(x) / x`` for x >= 0: 1 at 0, like ``1 / (2 x^2)`` far away."""
    return _tables()[0]((1 + x).reciprocal()) / (1 + 2 * x * x)


@functools.cache
def _tables() -> tuple[Table, Table]:
    """``D(x) (1 + 2 x^2) / x`` and ``(KL - log(1 + r) / 2) (1 + 1 / x^4)`` as functions of 1 / (1 + x)."""

    def ratio(t: Tensor) -> Tensor:
        x = 1 / t - 1
        return _slow_ratio(x) * (1 + 2 * x * x)

    def divergence(t: Tensor) -> Tensor:
        x = 1 / t - 1
        r = 2 * x * x
        near = integral_from(torch.zeros_like(x), x.clamp(max=_FAR), density, 96) - r.log1p() / 2
        far = KL_LIMIT - _odd_series(r, shift=True) - (1 / r).log1p() / 2
        # sum_k (-r)^k r / (2k + 2) (1 / (2k + 1)!! - 1), k > 0: close to 0 the difference is lost to rounding
        small = r.clamp(max=0.02)
        start = torch.zeros_like(r)
        for k in range(12, 0, -1):
            start = (-small) * (start + small * (1 / math.prod(range(1, 2 * k + 2, 2)) - 1) / (2 * k + 2))
        return torch.where(r < 0.02, start, torch.where(x < _FAR, near, far)) * (1 + x.pow(-4))

    ratios = Table(ratio, 0.0, 1.0)

    def density(x: Tensor) -> Tensor:
        return 2 * x * ratios((1 + x).reciprocal()) / (1 + 2 * x * x)

    return ratios, Table(divergence, 0.0, 1.0)


def _slow_ratio(x: Tensor) -> Tensor:
    """``D(x) / x`` in double precision, by the three formulas."""
    series, term = torch.ones_like(x), torch.ones_like(x)
    for k in range(1, 24):
        term = term * (-2 * x * x).clamp(min=-0.25) / (2 * k + 1)
        series = series + term
    spacing = 0.25
    odd = torch.arange(-63, 64, 2, dtype=x.dtype)
    middle = x.clamp(0.125, _FAR).unsqueeze(-1)
    rybicki = (torch.exp(-((middle - spacing * odd) ** 2)) / odd).sum(-1) / math.sqrt(math.pi)
    square = 2 * x * x
    far = (1 + _odd_series(square)) / square
    return torch.where(x < 0.25, series, torch.where(x < _FAR, rybicki / x, far))


def _odd_series(square: Tensor, *, shift: bool = False) -> Tensor:
    """``sum_k (2k - 1)!! / square^k``, with each term over 2k where `shift`; for large squares."""
    total, term = torch.zeros_like(square), torch.ones_like(square)
    wide = square.clamp(min=2 * _FAR**2)
    for k in range(1, 40):
        term = term * (2 * k - 1) / wide
        total = total + (term / (2 * k) if shift else term)
    return total


def widened(t: Tensor) -> Tensor:
    """Half precision as float32, in which squares do not overflow and tables have their digits."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def _floats(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ArgumentError(f"{name} must be a real floating-point tensor, got {got}: convert it first")
    return value


# --- quadrature and tables ----------------------------------------------------------------------------------


@functools.cache
def gauss_legendre(count: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the rule on [0, 1], in double precision; Newton on the Legendre recurrence."""
    x = torch.cos(math.pi * (torch.arange(count, dtype=torch.float64) + 0.75) / (count + 0.5))
    slope = torch.ones_like(x)
    for _ in range(8):
        before, now = torch.ones_like(x), x
        for k in range(2, count + 1):
            before, now = now, ((2 * k - 1) * x * now - (k - 1) * before) / k
        slope = count * (x * now - before) / (x * x - 1)
        x = x - now / slope
    return (1 - x) / 2, 1 / ((1 - x * x) * slope * slope)


def integral_from(
    low: Tensor, high: Tensor, integrand: Callable[[Tensor], Tensor], nodes: int, power: int = 1
) -> Tensor:
    """``int_low^high integrand`` for each pair, by one rule after ``v = low + (high - low) u^power``."""
    u, weights = (part.to(low.device) for part in gauss_legendre(nodes))
    width = high - low
    points = low.unsqueeze(-1) + width.unsqueeze(-1) * u**power
    return width * (integrand(points) * (weights * power * u ** (power - 1))).sum(-1)


class Table:
    """A smooth function of t in [low, high], fitted by polynomials on equal intervals.

    Fitted in double precision at Chebyshev nodes; looked up in the type and on the device of the argument,
    differentiable in it. With 512 intervals and degree 6 a function whose scale is that of the interval is
    met to rounding.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        low: float,
        high: float,
        intervals: int = 512,
        degree: int = 6,
    ) -> None:
        self.low, self.scale, self.intervals = low, intervals / (high - low), intervals
        order = degree + 1
        local = torch.cos(math.pi * (torch.arange(order, dtype=torch.float64) + 0.5) / order)
        start = torch.arange(intervals, dtype=torch.float64).unsqueeze(-1)
        values = function(low + (start + (local + 1) / 2) / self.scale)
        basis = local.unsqueeze(-1) ** torch.arange(order, dtype=torch.float64)
        self._fits: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        # [degree + 1, intervals], in double precision, of a variable from -1 to 1 in each interval
        self.coefficients = torch.linalg.solve(basis, values.T).contiguous()

    def __call__(self, t: Tensor) -> Tensor:
        """The function at `t`, elementwise; beyond the ends the last polynomial goes on."""
        key = (t.dtype, t.device)
        if key not in self._fits:
            self._fits[key] = self.coefficients.to(dtype=t.dtype, device=t.device)
        fit = self._fits[key]
        position = (t - self.low) * self.scale
        # NaN goes to the first interval and stays NaN in the polynomial.
        index = position.detach().nan_to_num(0.0).clamp(0, self.intervals - 1).long()
        local = (position - index) * 2 - 1
        # A dimension more, as indexing by a single number would read it on the host.
        index = index.unsqueeze(-1)
        result = fit[-1][index].squeeze(-1)
        for row in fit[:-1].flip(0):
            result = result * local + row[index].squeeze(-1)
        return result

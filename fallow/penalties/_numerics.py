"""Numbers the penalties share: Gauss-Legendre rules, fitted tables, checks of weights and steps."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable

import torch
from torch import Tensor

from fallow.errors import ArgumentError, UsageError
from fallow.penalties._checks import check_floats, check_step

_CHUNK = 2**16


def check_weights(w: object) -> Tensor:
    """Return `w` if it is a real floating-point tensor without NaN.

    One reduction decides nearly always: a sum is NaN only where an entry is, or where infinities cancel.
    """
    weights = check_floats("w", w, 0)
    total = weights.detach().sum(dtype=torch.float64)
    if bool(total.isnan()) and bool(weights.isnan().any()):
        bad = int(weights.isnan().sum())
        raise UsageError(
            f"w must not be NaN, got {bad} of {weights.numel()} entries: the result would hide them; see "
            "which update made them, and lower its learning rate"
        )
    return weights


def check_elementwise_step(step: object, w: Tensor) -> float | Tensor:
    """Return `step` as a float, or as a tensor that broadcasts against `w`; not negative, finite."""
    if isinstance(step, Tensor):
        try:
            fits = torch.broadcast_shapes(step.shape, w.shape) == w.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise UsageError(f"step must fit w of shape {list(w.shape)}, got shape {list(step.shape)}")
        if not bool(((step >= 0) & step.isfinite()).all()):
            raise UsageError("step must be finite and not negative, got a tensor with other entries")
        return float(step) if step.dim() == 0 else step.detach().to(w.dtype)
    if isinstance(step, bool) or not isinstance(step, numbers.Real):
        raise ArgumentError(f"step must be a number or a tensor, got {step!r}")
    if not 0.0 <= float(step) < math.inf:
        raise UsageError(f"step must be finite and not negative, got {step!r}")
    return float(step)


def check_step_of_vectors(step: object, w: Tensor) -> Tensor:
    """Return `step` as a tensor of shape [..., 1] in the type of `w`: one number for each vector."""
    return check_step(step, w.shape[:-1], w).detach().to(w.dtype)


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
        self._exact = torch.linalg.solve(basis, values.T).contiguous()

    def __call__(self, t: Tensor) -> Tensor:
        """The function at `t`, elementwise; beyond the ends the last polynomial goes on."""
        key = (t.dtype, t.device)
        if key not in self._fits:
            self._fits[key] = self._exact.to(dtype=t.dtype, device=t.device)
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


def root_above(holds: Callable[[float], bool], start: float) -> float:
    """The number above `start` > 0 at which `holds` turns from true to false, by doubling and bisection."""
    low, high = start, 2 * start
    while holds(high):
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if holds(middle) else (low, middle)
    return high


def chunked(function: Callable[[Tensor], Tensor], w: Tensor) -> Tensor:
    """An elementwise function of `w`, by pieces that fit a processor's cache.

    Without gradient. Whole where `w` is small, elsewhere than on a processor, or not one stretch of memory.
    """
    small = w.numel() <= _CHUNK or torch.compiler.is_compiling()
    if small or w.device.type != "cpu" or not w.is_contiguous():
        return function(w)
    result = torch.empty_like(w)
    for part, out in zip(w.view(-1).split(_CHUNK), result.view(-1).split(_CHUNK), strict=True):
        out.copy_(function(part))
    return result

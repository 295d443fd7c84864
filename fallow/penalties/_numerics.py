"""Numbers the penalties share: checks of weights and steps, pieces that fit a cache."""

from __future__ import annotations

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
    total = weights.detach().sum()
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

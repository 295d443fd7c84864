"""What the penalties take, checked in one place."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from fallow.errors import ArgumentError, UsageError, check_count


def check_floats(name: str, value: object, dimensions: int = 1) -> Tensor:
    """Return `value` if it is a real floating-point tensor of at least so many dimensions."""
    if not isinstance(value, Tensor):
        raise ArgumentError(
            f"{name} must be a tensor, got {type(value).__name__}: wrap it in torch.as_tensor"
        )
    if not value.is_floating_point():
        raise ArgumentError(
            f"{name} must be real floating point, got {value.dtype}: convert it, say .float()"
        )
    if value.dim() < dimensions:
        raise UsageError(f"{name} must have at least {dimensions} dimensions, got {list(value.shape)}")
    return value


def check_finite(name: str, largest: Tensor) -> None:
    """Refuse a tensor of which `largest` are entries; the sort puts NaN and infinities there."""
    if not bool(largest.isfinite().all()):
        raise UsageError(f"{name} must be finite, got NaN or infinite entries: see where they come from")


def check_positive(name: str, value: object) -> float:
    """Return `value` as a float if it is a finite number above 0; booleans are refused."""
    number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    if not 0.0 < number < math.inf:
        raise UsageError(f"{name} must be a finite number above 0, got {value!r}")
    return number


def check_support(k: object, size: int) -> float:
    """Return `k` as a float if it lies in (0, size], `size` being the number of entries."""
    number = check_positive("k", k)
    if number > size:
        raise UsageError(f"k must be at most the number of entries, {size}, got {k!r}")
    return number


def check_step(step: object, shape: torch.Size, like: Tensor) -> Tensor:
    """Return `step` as a double tensor of shape [*shape, 1], one number a vector; gradients pass."""
    if isinstance(step, bool) or not isinstance(step, numbers.Real | Tensor):
        raise ArgumentError(f"step must be a number or a tensor, got {step!r}")
    given = step if isinstance(step, Tensor) else torch.tensor(float(step), dtype=torch.float64)
    if not bool(((given >= 0) & given.isfinite()).all()):
        raise UsageError(f"step must be finite and not negative, got {step!r}")
    try:
        wide = given.to(device=like.device, dtype=torch.float64).expand(shape)
    except RuntimeError:
        raise UsageError(
            f"step must be a number or have a shape that fits the {list(shape)} vectors, "
            f"got {list(given.shape)}"
        ) from None
    return wide.unsqueeze(-1)


def check_blocks(width: object, block_size: object) -> tuple[int, int, int]:
    """Return (width, block size, number of blocks) where the blocks are equal."""
    d, r = check_count("width", width, 1), check_count("block_size", block_size, 1)
    if d % r:
        nearest = max(d // r, 1) * r
        raise UsageError(
            f"width must be a multiple of block_size, got {d} hidden units in blocks of {r}: the last block "
            f"would be smaller and there is no closed form; take a width of {nearest} or another block_size"
        )
    return d, r, d // r

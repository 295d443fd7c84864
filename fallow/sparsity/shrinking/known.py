"""What is constant: values that do not depend on the model's input, with NaN for those that do.

A tensor beside each value holds the constants in place. Constants spread as far as zeros let them: a zero
weight hides an unknown input, a factor of zero hides the other one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

NAN = float("nan")
Lookup = Callable[[Tensor], "Tensor | None"]


def tidy(known: Tensor | None) -> Tensor | None:
    """None where nothing is known."""
    if known is None or not known.is_floating_point():
        return known
    return None if known.numel() and bool(known.isnan().all()) else known


def complete(known: Tensor | None) -> bool:
    """Whether every element is known."""
    return known is not None and not bool(known.isnan().any())


def pointwise(func: Any, args: tuple, kwargs: dict, of: Lookup, out: Tensor) -> Tensor | None:
    """Constants through an elementwise operation."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    product = func._overloadpacket in (torch.ops.aten.mul, torch.ops.aten.mul_)
    pairs = [(t, of(t)) for t in tensors]
    if not out.is_floating_point() or not (product or all(k is not None for _, k in pairs)):
        return out if all(complete(k) for _, k in pairs) and not out.is_floating_point() else None
    if all(k is None for _, k in pairs):
        return None
    shadow = [torch.full_like(t, NAN, dtype=out.dtype) if k is None else k.clone() for t, k in pairs]
    feed = iter(shadow)
    moved = tree_map(lambda t: next(feed) if isinstance(t, Tensor) else t, (args, kwargs))
    unknown, zero = torch.zeros((), dtype=torch.bool), torch.zeros((), dtype=torch.bool)
    for k in shadow:
        unknown, zero = unknown | k.isnan(), zero | (k == 0)
    result = func(*moved[0], **moved[1]).clone()
    result = torch.where(unknown.expand(result.shape), NAN, result)
    return tidy(torch.where(zero.expand(result.shape), 0.0, result) if product else result)


def product(a: Tensor, a_known: Tensor | None, b: Tensor, b_known: Tensor | None) -> Tensor | None:
    """Constants of a (batched) matrix product."""
    if a_known is None and b_known is None:
        return None
    if a_known is None and b_known is not None and not bool((b_known == 0).all(-2).any()):
        return None
    if b_known is None and a_known is not None and not bool((a_known == 0).all(-1).any()):
        return None
    x = torch.full_like(a, NAN) if a_known is None else a_known
    y = torch.full_like(b, NAN) if b_known is None else b_known
    hidden = _count(x.isnan(), (y != 0)) + _count(x != 0, y.isnan())  # NaN counts as not zero
    return tidy((x.nan_to_num(0.0) @ y.nan_to_num(0.0)).masked_fill(hidden > 0, NAN))


def _count(a: Tensor, b: Tensor) -> Tensor:
    return a.to(torch.float32) @ b.to(torch.float32)


def convolution(
    x: Tensor, known: Tensor | None, weight: Tensor, bias: Tensor | None, rest: tuple
) -> Tensor | None:
    """Constants of a convolution with known weights; at a padded border they may differ from those inside."""
    run = torch.ops.aten.convolution.default
    if known is None and not bool((weight == 0).flatten(1).all(1).any()):
        return None
    xs = torch.full_like(x, NAN) if known is None else known
    hidden = run(xs.isnan().to(weight.dtype), (weight != 0).to(weight.dtype), None, *rest)
    result = run(xs.nan_to_num(0.0), weight, bias, *rest)
    return tidy(result.masked_fill(hidden > 0.5, NAN))


def affine(known: Tensor | None, scale: Tensor, shift: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """Constants of ``x * scale + shift`` with known scale and shift; a scale of zero hides x."""
    x = torch.full(shape, NAN, dtype=scale.dtype, device=scale.device) if known is None else known
    result = torch.where((scale == 0).expand(shape), shift.expand(shape), x * scale + shift)
    return tidy(result)


def uniform(known: Tensor | None, dim: int, count: int) -> tuple[Tensor, Tensor]:
    """For each index of `dim`: its constant where it is the same everywhere else NaN; whether it is known."""
    if known is None:
        return torch.full((count,), NAN, dtype=torch.float64), torch.zeros(count, dtype=torch.bool)
    rows = known.movedim(dim, 0).reshape(count, -1).double().cpu()
    everywhere = ~rows.isnan().any(1)
    first = rows[:, 0]
    same = ((rows - first[:, None]).abs() <= 1e-12 * first.abs()[:, None]).all(1)
    return torch.where(everywhere & same, first, NAN), everywhere

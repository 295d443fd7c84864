"""What is constant: values that do not depend on the model's input, with NaN for those that do.

A tensor beside each value holds the constants in place. Constants spread as far as zeros let them: a zero
weight hides an unknown input, a factor of zero hides the other one. What would be another number for inputs
of another size (images, tokens, rows) is none.
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
    known: Tensor | None, weight: Tensor, bias: Tensor | None, rest: tuple, channels: int, shape: torch.Size
) -> Tensor | None:
    """Constants of a convolution with known weights, where a padded border changes nothing.

    Taken from a map that is wide enough for its inside and its borders, whatever the size of this one: where
    it has a single pixel, say, a border looks like a constant.

    Args:
        known: constants of the input.
        weight: the kernels.
        bias: if there is one.
        rest: stride, padding, dilation, transposed, output padding, groups.
        channels: of the input.
        shape: of the output.
    """
    if known is None and not bool((weight == 0).flatten(1).all(1).any()):
        return None
    run = torch.ops.aten.convolution.default
    values = torch.full((channels,), NAN) if known is None else uniform(known, 1, channels)[0]
    sizes = [2 * (k - 1) * d + s + 1 for k, d, s in zip(weight.shape[2:], rest[2], rest[0], strict=True)]
    wide = values.to(weight).reshape(1, -1, *[1] * len(sizes)).expand(1, -1, *sizes)
    hidden = run(wide.isnan().to(weight.dtype), (weight != 0).to(weight.dtype), None, *rest)
    result = run(wide.nan_to_num(0.0), weight, bias, *rest).masked_fill(hidden > 0.5, NAN)
    found = uniform(result, 1, shape[1])[0].to(weight)
    return tidy(found.reshape(1, -1, *[1] * len(sizes)).expand(shape).clone())


def _alike(values: Tensor, of: Tensor) -> Tensor:
    """Whether constants are the same number but for rounding; NaN is like none."""
    return (values - of).abs() <= 1e-12 * of.abs()


def pooled(before: Tensor, after: Tensor, dim: int) -> Tensor | None:
    """Constants of a pool or another operation within each channel, where it leaves a constant as it is.

    Args:
        before: those of its input.
        after: as they come out.
        dim: of the channels.
    """
    count = before.shape[dim]
    here, there = uniform(before, dim, count)[0], uniform(after, dim, count)[0]
    same = _alike(there, here)
    shape = [-1 if d == dim else 1 for d in range(after.dim())]
    return tidy(after.masked_fill(~same.reshape(shape).to(after.device), NAN))


def reduced(before: Tensor, after: Tensor, over: list[int], dims: list[int], *, keeps: bool) -> Tensor | None:
    """Constants of a reduction over dimensions of any size: of what is the same along them, or is zero.

    Args:
        before: those of its input.
        after: as they come out.
        over: the dimensions that are reduced.
        dims: those of them whose size is the input's.
        keeps: whether it gives a constant back, as the mean does and the sum does not.
    """
    if not dims:
        return tidy(after)
    first = before
    for d in dims:
        first = first.narrow(d, 0, 1)
    same = _alike(before, first)
    same = same if keeps else same & (before == 0)
    for d in sorted(over, reverse=True):
        same = same.all(d, keepdim=after.dim() == before.dim())
    return tidy(after.masked_fill(~same, NAN))


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
    same = _alike(rows, first[:, None]).all(1)
    return torch.where(everywhere & same, first, NAN), everywhere

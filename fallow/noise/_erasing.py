"""A tensor times a number, with blocks set to zero; the gradient is the same of the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fallow.noise._blocks import Grid, erase

# Elements that an inner loop should run over before the loop's own cost disappears.
_INNER = 2048


def scaled(x: Tensor, factor: float, grid: Grid, seeds: list[Tensor]) -> Tensor:
    """``factor * x`` with zeros in the blocks of the seeds; they alone are kept for the gradient."""
    return _Sparse.apply(x, factor, grid, *seeds)  # pyright: ignore[reportReturnType]


class _Sparse(torch.autograd.Function):
    """Linear in x, so it is its own derivative and its own adjoint."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float, grid: Grid, *seeds: Tensor) -> Tensor:
        ctx.factor, ctx.grid = factor, grid
        ctx.save_for_backward(*seeds)
        ctx.save_for_forward(*seeds)
        out = x * factor
        erase(out, grid, seeds)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        seeds = ctx.saved_tensors
        return _Sparse.apply(grad, ctx.factor, ctx.grid, *seeds), None, None, *(None for _ in seeds)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _Sparse.apply(tangents[0], ctx.factor, ctx.grid, *ctx.saved_tensors)


def masked(x: Tensor, factor: float, dropped: Tensor) -> Tensor:
    """``factor * x`` with zeros where ``dropped``; it has x's shape, or one channel for all."""
    if dropped.shape == x.shape:
        return (x * factor).masked_fill_(dropped, 0)
    return _Shared.apply(x, factor, dropped)  # pyright: ignore[reportReturnType]


class _Shared(torch.autograd.Function):
    """One pass over x: times a small tensor of factors that all channels share."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float, dropped: Tensor) -> Tensor:
        ctx.factor = factor
        ctx.save_for_backward(dropped)
        ctx.save_for_forward(dropped)
        return _times(x, factor, dropped)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _Shared.apply(grads[0], ctx.factor, *ctx.saved_tensors), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _Shared.apply(tangents[0], ctx.factor, *ctx.saved_tensors)


def _times(x: Tensor, factor: float, dropped: Tensor) -> Tensor:
    kept = torch.logical_not(dropped).to(x.dtype)
    whole = x
    if x.is_contiguous():
        # small maps: several channels together are one inner loop, and the factors still a small tensor
        rows, channels, size = x.shape[0], x.shape[1], dropped[0].numel()
        group = _group(channels, size)
        whole = x.view(rows, channels // group, group * size)
        kept = kept.view(rows, 1, 1, size).expand(rows, 1, group, size).reshape(rows, 1, group * size)
    if x.dtype.itemsize < 4:
        # 1/p is not a number of these types: a factor tensor would be off by up to 0.4 %
        return torch.addcmul(x.new_zeros(()), whole, kept, value=factor).view_as(x)
    return (whole * (kept * factor)).view_as(x)


def _group(channels: int, size: int) -> int:
    """The smallest divisor of the channels that fills an inner loop, a sixteenth of them at most."""
    for group in range(1, channels // 16 + 1):
        if channels % group == 0 and group * size >= _INNER:
            return group
    return next((g for g in range(channels // 16, 0, -1) if channels % g == 0), 1)

"""A tensor times a number, with blocks set to zero; the gradient is the same of the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fallow.noise._blocks import Grid, erase


def scaled(x: Tensor, factor: float, grid: Grid, seeds: list[Tensor]) -> Tensor:
    """``factor * x`` with zeros in the blocks of the seeds; they alone are kept for the gradient."""
    return _Sparse.apply(x, factor, grid, *seeds)  # pyright: ignore[reportReturnType]


class _Sparse(torch.autograd.Function):
    """Linear in x, so it is its own derivative and its own adjoint."""

    @staticmethod
    def forward(x: Tensor, factor: float, grid: Grid, *seeds: Tensor) -> Tensor:
        out = x * factor
        erase(out, grid, seeds)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.factor, ctx.grid, *seeds = inputs
        ctx.save_for_backward(*seeds)
        ctx.save_for_forward(*seeds)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        seeds = ctx.saved_tensors
        return _Sparse.apply(grad, ctx.factor, ctx.grid, *seeds), None, None, *(None for _ in seeds)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _Sparse.apply(tangents[0], ctx.factor, ctx.grid, *ctx.saved_tensors)


def shared(x: Tensor, factor: float, kept: Tensor) -> Tensor:
    """``factor * x * kept``, where ``kept`` holds 0 and 1 in x's dtype and one channel for all.

    One pass over x. (An infinite x that is dropped becomes NaN, as in torch's dropout.)
    """
    return _Shared.apply(x, factor, kept)  # pyright: ignore[reportReturnType]


class _Shared(torch.autograd.Function):
    """Linear in x, too."""

    @staticmethod
    def forward(x: Tensor, factor: float, kept: Tensor) -> Tensor:
        if x.dtype.itemsize >= 4:
            return x * (kept * factor)
        # 1/p is not a number of these types: a tensor of factors would be off by up to 0.4 %
        rows = x.movedim(1, -1)
        if x.is_contiguous() or not rows.is_contiguous():
            return torch.addcmul(kept.new_zeros(()), x, kept, value=factor)
        out = x * factor  # channels last: what is dropped is a few whole runs of memory
        dropped = (kept == 0).flatten().nonzero().flatten()
        out.movedim(1, -1).view(-1, x.shape[1]).index_fill_(0, dropped, 0)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.factor, kept = inputs
        ctx.save_for_backward(kept)
        ctx.save_for_forward(kept)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _Shared.apply(grads[0], ctx.factor, *ctx.saved_tensors), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _Shared.apply(tangents[0], ctx.factor, *ctx.saved_tensors)

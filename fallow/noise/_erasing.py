"""A tensor times a number, with blocks set to zero; the gradient is the same of the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fallow.noise._blocks import Grid, Seeds, erase


def scaled(x: Tensor, factor: float, grid: Grid, seeds: Seeds) -> Tensor:
    """``factor * x`` with zeros in the blocks of the seeds; they alone are kept for the gradient."""
    if not _differentiated(x):
        return _scaled(x, factor, grid, seeds)
    if torch._C._are_functorch_transforms_active():  # which take no autograd function of the older form
        kept = torch.ones(x.shape, dtype=torch.bool, device=x.device)
        erase(kept, grid, seeds)
        return torch.where(kept, x * factor, 0)
    return _Sparse.apply(x, seeds.cells, factor, grid, seeds)  # pyright: ignore[reportReturnType]


def _differentiated(x: Tensor) -> bool:
    """Whether autograd may look; its function costs as much as the multiplication of a small tensor."""
    return x.requires_grad and torch.is_grad_enabled() or torch.autograd.forward_ad._current_level >= 0


def _scaled(x: Tensor, factor: float, grid: Grid, seeds: Seeds) -> Tensor:
    out = x * factor
    erase(out, grid, seeds)
    return out


class _Sparse(torch.autograd.Function):
    """Linear in x, so it is its own derivative and its own adjoint."""

    # The older form, context first: the newer one inspects the signature at every call.
    @staticmethod
    def forward(ctx: Any, x: Tensor, cells: Tensor, factor: float, grid: Grid, seeds: Seeds) -> Tensor:
        ctx.factor, ctx.grid, ctx.counts, ctx.planes = factor, grid, seeds.counts, seeds.planes
        ctx.save_for_backward(cells)
        ctx.save_for_forward(cells)
        return _scaled(x, factor, grid, seeds)

    @staticmethod
    def _again(ctx: Any, x: Tensor) -> Tensor:
        (cells,) = ctx.saved_tensors
        return scaled(x, ctx.factor, ctx.grid, Seeds(cells, ctx.counts, ctx.planes))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _Sparse._again(ctx, grads[0]), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _Sparse._again(ctx, tangents[0])


def shared(x: Tensor, factor: float, kept: Tensor) -> Tensor:
    """``factor * x * kept``, where ``kept``, in x's dtype, has one channel for all and zeros where dropped.

    One pass over x. (An infinite x that is dropped becomes NaN, as in torch's dropout.)
    """
    if not _differentiated(x):
        return _shared(x, factor, kept)
    if torch._C._are_functorch_transforms_active():
        return x * factor * kept
    return _Shared.apply(x, kept, factor)  # pyright: ignore[reportReturnType]


def _shared(x: Tensor, factor: float, kept: Tensor) -> Tensor:
    if factor == 1:
        return x * kept
    if x.is_contiguous() or not x.movedim(1, -1).is_contiguous():
        return torch.addcmul(kept.new_zeros(()), x, kept, value=factor)
    out = x * factor  # channels last: what is dropped is a few whole runs of memory
    dropped = (kept == 0).flatten().nonzero().flatten()
    out.movedim(1, -1).view(-1, x.shape[1]).index_fill_(0, dropped, 0)
    return out


class _Shared(torch.autograd.Function):
    """Linear in x, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        ctx.save_for_backward(kept)
        ctx.save_for_forward(kept)
        return _shared(x, factor, kept)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return shared(grads[0], ctx.factor, *ctx.saved_tensors), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return shared(tangents[0], ctx.factor, *ctx.saved_tensors)

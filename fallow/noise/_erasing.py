"""A tensor times a number, with blocks set to zero; the gradient is the same of the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import has_torch_function_unary

from fallow.kernels import drop_masked, drop_seeds
from fallow.noise._blocks import Grid, Seeds, erase


def scaled(x: Tensor, factor: float, grid: Grid, seeds: Seeds) -> Tensor:
    """``factor * x`` with zeros in the blocks of the seeds; nothing of x is kept for the gradient.

    The seeds are of every map, or of the rows alone, whose channels share them.
    """
    if _watched(x):
        return torch.where(_kept(x, grid, seeds), x * factor, 0)
    if not _differentiated(x):
        return _scaled(x, factor, grid, seeds)
    return _Sparse.apply(x, factor, grid, seeds)  # pyright: ignore[reportReturnType]


def _watched(x: Tensor) -> bool:
    """Whether something needs to see plain operations: a transform, or a class of tensors of its own.

    Transforms take no autograd function of the older form. Inside of one, the class would meet its tensors
    again, and what it makes of them would come out as a view.
    """
    return torch._C._are_functorch_transforms_active() or has_torch_function_unary(x)


def _differentiated(x: Tensor) -> bool:
    """Whether autograd may look; its function costs as much as the multiplication of a small tensor."""
    return x.requires_grad and torch.is_grad_enabled() or forward_ad._current_level >= 0


def _scaled(x: Tensor, factor: float, grid: Grid, seeds: Seeds) -> Tensor:
    out = drop_seeds(x, factor, grid.geometry, seeds.planes, seeds.key)
    if out is not None:
        return out
    if seeds.planes != x.shape[0] * x.shape[1]:
        return _masked(x, factor, _kept(x, grid, seeds))
    out = x * factor
    erase(out, grid, seeds)
    return out


def _kept(x: Tensor, grid: Grid, seeds: Seeds) -> Tensor:
    channels = seeds.planes // x.shape[0]
    kept = torch.ones((x.shape[0], channels, *x.shape[2:]), dtype=torch.bool, device=x.device)
    erase(kept, grid, seeds)
    return kept


class _Sparse(torch.autograd.Function):
    """Linear in x, so it is its own derivative and its own adjoint."""

    # The older form, context first: the newer one inspects the signature at every call.
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float, grid: Grid, seeds: Seeds) -> Tensor:
        ctx.way = factor, grid, seeds
        return _scaled(x, factor, grid, seeds)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return scaled(grads[0], *ctx.way), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return scaled(tangents[0], *ctx.way)


def masked(x: Tensor, factor: float, kept: Tensor) -> Tensor:
    """``factor * x`` with zeros where `kept`, of x's shape or with one channel for all, is False."""
    if _watched(x):
        return torch.where(kept, x * factor, 0)
    if not _differentiated(x):
        return _masked(x, factor, kept)
    return _Masked.apply(x, kept, factor)  # pyright: ignore[reportReturnType]


def _masked(x: Tensor, factor: float, kept: Tensor) -> Tensor:
    out = drop_masked(x, factor, kept)
    if out is not None:
        return out
    out = x * factor
    if kept.shape == x.shape or not x.is_floating_point():
        return out.masked_fill_(~kept, 0)
    if x.is_contiguous() or not x.movedim(1, -1).is_contiguous():
        # masked_fill_ takes one element at a time; this is the same choice many at a time
        wide = kept.to(x.dtype).expand_as(out)
        return torch.ops.aten.threshold_backward.grad_input(out, wide, 0, grad_input=out)
    dropped = (~kept).flatten().nonzero().flatten()  # channels last: a few whole runs of memory
    out.movedim(1, -1).view(-1, x.shape[1]).index_fill_(0, dropped, 0)
    return out


class _Masked(torch.autograd.Function):
    """Linear in x, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        ctx.save_for_backward(kept)
        ctx.save_for_forward(kept)
        return _masked(x, factor, kept)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return masked(grads[0], ctx.factor, *ctx.saved_tensors), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return masked(tangents[0], ctx.factor, *ctx.saved_tensors)

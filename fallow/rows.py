"""Subsets of the rows (samples) of a batch: take the kept rows, add a branch's result back to them.

Both work on any batch dimension and keep the memory layout: a window of rows is a view on the way in and one
pass over memory on the way out, and scattered rows are gathered and added on the flat, permuted view, because
``index_select`` and ``index_add`` on a channels_last tensor would return a contiguous one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Selection:
    """Which ``count`` of ``total`` rows are kept: a circular window from ``start``, or the rows ``index``.

    Attributes:
        total: rows of the batch.
        count: rows kept.
        start: first row of the window; it wraps past the end.
        index: sorted int64 row numbers on the CPU; ``None`` for a window.
    """

    total: int
    count: int
    start: int = 0
    index: Tensor | None = None

    def mask(self) -> Tensor:
        """Bool tensor [total], True = kept."""
        kept = torch.zeros(self.total, dtype=torch.bool, device="cpu")
        if self.index is not None:
            kept[self.index] = True
        else:
            for first, length, _ in self.pieces():
                kept[first : first + length] = True
        return kept

    def pieces(self) -> list[tuple[int, int, int]]:
        """The window as one or two runs: (first row of the batch, length, first row of the subset)."""
        head = min(self.count, self.total - self.start)
        runs = [(self.start, head, 0)]
        if head < self.count:
            runs.append((0, self.count - head, head))
        return runs

    def rest(self) -> list[tuple[int, int]]:
        """The rows outside the window as at most two runs: (first row, length)."""
        end = self.start + self.count
        if end > self.total:
            return [(end - self.total, self.total - self.count)]
        runs = [(0, self.start), (end, self.total - end)]
        return [(first, length) for first, length in runs if length]

    def parts(self, x: Tensor, dim: int) -> tuple[list[Tensor], list[Tensor]]:
        """Views of a tensor of the whole batch: the window's runs in its own order, and the rows outside."""
        end = self.start + self.count
        if end > self.total:
            sizes = [end - self.total, self.total - self.count, self.total - self.start]
            tail, rest, head = x.split_with_sizes(sizes, dim)
            return [head, tail], [rest]
        before, kept, after = x.split_with_sizes([self.start, self.count, self.total - end], dim)
        return [kept], [t for t, n in ((before, self.start), (after, self.total - end)) if n]

    def halves(self, z: Tensor, dim: int) -> list[Tensor]:
        """Views of a tensor of the kept rows: the window's runs."""
        head = self.total - self.start
        return [z] if self.count <= head else list(z.split_with_sizes([head, self.count - head], dim))

    @property
    def scattered(self) -> bool:
        """Whether the kept rows lie apart in memory, so that taking them copies."""
        return self.index is not None or self.start + self.count > self.total


def select_mask(mask: Tensor) -> Selection:
    """The selection of the True rows of a bool tensor [rows]."""
    index = mask.nonzero().flatten().cpu()
    return Selection(total=mask.numel(), count=index.numel(), index=index)


def take(x: Tensor, selection: Selection, dim: int = 0) -> Tensor:
    """The kept rows of ``x`` along ``dim``, differentiable; a window that does not wrap shares x's memory.

    Shape:
        x: ``selection.total`` along ``dim``; result: ``selection.count`` along ``dim``, same layout.
    """
    if x.requires_grad and torch.is_grad_enabled():
        return _Take.apply(x, selection, dim)  # pyright: ignore[reportReturnType]
    return copied(x, selection, dim)


def spread(z: Tensor, selection: Selection, dim: int = 0) -> Tensor:
    """Rows back in their places, zeros elsewhere: the gradient of `take`, differentiable.

    Shape:
        z: ``selection.count`` along ``dim``; result: ``selection.total`` along ``dim``, same layout.
    """
    return _Spread.apply(z, selection, dim)  # pyright: ignore[reportReturnType]


def add(x: Tensor, z: Tensor, selection: Selection, scale: float = 1.0, dim: int = 0) -> Tensor:
    """``x`` with ``scale * z`` added to its kept rows: one pass over memory, layout kept.

    Formula: ``y[i] = x[i] + scale * z[j]`` where row i is the j-th kept one, else ``y[i] = x[i]``.

    Shape:
        x: ``selection.total`` along ``dim``; z: ``selection.count`` along ``dim``; result like x, in the
        promoted dtype of both.
    """
    return _AddRows.apply(x, z, selection, scale, dim)  # pyright: ignore[reportReturnType]


def add_(x: Tensor, z: Tensor, selection: Selection, scale: float = 1.0, dim: int = 0) -> Tensor:
    """The in-place form of `add`: touches the kept rows only."""
    if selection.index is None:
        for first, length, at in selection.pieces():
            x.narrow(dim, first, length).add_(z.narrow(dim, at, length), alpha=scale)
        return x
    index = selection.index.to(x.device)
    return x.index_add_(dim, index, z.to(x.dtype), alpha=scale)


def copied(x: Tensor, selection: Selection, dim: int = 0) -> Tensor:
    """The kept rows outside of any graph: the memory of x or a copy."""
    if selection.index is not None:
        return _gather(x.detach(), selection.index, dim)
    if not selection.scattered:
        return x.narrow(dim, selection.start, selection.count).detach()
    pieces, _ = selection.parts(x, dim)
    if has_plain_layout(x):
        return torch.cat(pieces, dim)  # of channels_last tensors it is one too
    out = _like(x, selection.count, dim)
    for half, piece in zip(selection.halves(out, dim), pieces, strict=True):
        half.copy_(piece)
    return out


def has_plain_layout(x: Tensor) -> bool:
    """Whether x is contiguous or channels_last, which torch's operations keep."""
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _flat_order(x: Tensor) -> list[int] | None:
    """The order of dimensions in which ``x`` is contiguous, or None where there is none (a strided view)."""
    if x.is_contiguous():
        return list(range(x.dim()))
    order = sorted(range(x.dim()), key=lambda d: (-x.stride(d), d))
    return order if x.permute(order).is_contiguous() else None


def _gather(x: Tensor, index: Tensor, dim: int) -> Tensor:
    index = index.to(x.device)
    order = _flat_order(x)
    if order is None or order == list(range(x.dim())):
        return x.index_select(dim, index)
    back = [order.index(d) for d in range(x.dim())]
    return x.permute(order).index_select(order.index(dim), index).permute(back)


def _like(x: Tensor, count: int, dim: int) -> Tensor:
    """New memory in the layout of ``x`` for another number of rows."""
    if has_plain_layout(x):
        shape = [count if d == dim else n for d, n in enumerate(x.shape)]
        how = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=how)
    order = _flat_order(x) or list(range(x.dim()))
    shape = [count if d == dim else x.shape[d] for d in order]
    return x.new_empty(shape).permute([order.index(d) for d in range(x.dim())])


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, selection: Selection, dim: int) -> Tensor:  # type: ignore[override]
        ctx.selection, ctx.dim = selection, dim
        return copied(x, selection, dim)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return spread(grad, ctx.selection, ctx.dim), None, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad: Tensor, selection: Selection, dim: int) -> Tensor:  # type: ignore[override]
        ctx.selection, ctx.dim = selection, dim
        out = _like(grad, selection.total, dim)
        if selection.index is not None:
            return out.zero_().index_copy_(dim, selection.index.to(grad.device), grad)
        kept, rest = selection.parts(out, dim)
        for piece, half in zip(kept, selection.halves(grad, dim), strict=True):
            piece.copy_(half)
        for piece in rest:
            piece.zero_()
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return take(grad, ctx.selection, ctx.dim), None, None


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, z: Tensor, selection: Selection, scale: float, dim: int) -> Tensor:  # type: ignore[override]
        ctx.selection, ctx.scale, ctx.dim = selection, scale, dim
        ctx.dtypes = x.dtype, z.dtype
        dtype = torch.promote_types(x.dtype, z.dtype)
        if selection.index is None:
            out = torch.empty_like(x, dtype=dtype)
            (to, untouched), (old, others) = selection.parts(out, dim), selection.parts(x, dim)
            for piece, before, half in zip(to, old, selection.halves(z, dim), strict=True):
                torch.add(before, half, alpha=scale, out=piece)
            for piece, before in zip(untouched, others, strict=True):
                piece.copy_(before)
            return out
        out = x.to(dtype) if dtype != x.dtype else x.clone()
        index, order = (selection.index.to(x.device), _flat_order(out) or list(range(out.dim())))
        flat = out.permute(order)
        flat.index_add_(order.index(dim), index, z.to(dtype).permute(order), alpha=scale)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x_dtype, z_dtype = ctx.dtypes
        grad_x = grad.to(x_dtype) if ctx.needs_input_grad[0] else None
        grad_z = None
        if ctx.needs_input_grad[1]:
            if ctx.scale == 1:  # no pass over memory where the window does not wrap
                grad_z = take(grad, ctx.selection, ctx.dim)
            elif torch.is_grad_enabled():
                grad_z = _TakeScaled.apply(grad, ctx.selection, ctx.scale, ctx.dim)
            else:
                grad_z = _scaled(grad, ctx.selection, ctx.scale, ctx.dim)
            grad_z = grad_z.to(z_dtype)
        return grad_x, grad_z, None, None, None


def _scaled(x: Tensor, selection: Selection, scale: float, dim: int) -> Tensor:
    if selection.index is not None:
        return _gather(x, selection.index, dim).mul_(scale)
    out = _like(x, selection.count, dim)
    for half, piece in zip(selection.halves(out, dim), selection.parts(x, dim)[0], strict=True):
        torch.mul(piece, scale, out=half)
    return out


class _TakeScaled(torch.autograd.Function):
    """``scale * take(x)`` in one pass."""

    @staticmethod
    def forward(ctx, x: Tensor, selection: Selection, scale: float, dim: int) -> Tensor:  # type: ignore[override]
        ctx.selection, ctx.scale, ctx.dim = selection, scale, dim
        return _scaled(x, selection, scale, dim)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        zeros = grad.new_zeros(()).expand(
            [ctx.selection.total if d == ctx.dim else n for d, n in enumerate(grad.shape)]
        )
        return add(zeros, grad, ctx.selection, ctx.scale, ctx.dim), None, None, None


class _ZeroGrads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, how: str, *parameters: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(*parameters)
        if how == "written":
            ctx.mark_dirty(x)
            return x
        return x.clone() if how == "copy" else x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        zeros = [
            torch.zeros_like(p) if need else None
            for p, need in zip(ctx.saved_tensors, ctx.needs_input_grad[2:], strict=True)
        ]
        return grad, None, *zeros


def zero_grads(x: Tensor, parameters: list[Tensor], how: str = "view") -> Tensor:
    """``x`` unchanged, with a node in the graph that gives each parameter a gradient of zeros.

    The zeros arrive through the graph like any gradient, so that the order of ``zero_grad`` does not matter
    and data-parallel hooks fire. ``copy`` returns new memory, for callers that write into the result.
    """
    if not torch.is_grad_enabled() or not any(p.requires_grad for p in parameters):
        return x.clone() if how == "copy" else x
    return _ZeroGrads.apply(x, how, *parameters)  # pyright: ignore[reportReturnType]

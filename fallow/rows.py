"""Subsets of the rows (samples) of a batch: take the kept rows, add a branch's result back to them.

Both work on any batch dimension and keep the memory layout: a window of rows is a view on the way in and one
pass over memory on the way out, and scattered rows are gathered and added on the flat, permuted view, because
``index_select`` and ``index_add`` on a channels_last tensor would return a contiguous one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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


def select_mask(mask: Tensor) -> Selection:
    """The selection of the True rows of a bool tensor [rows]."""
    index = mask.nonzero().flatten().cpu()
    return Selection(total=mask.numel(), count=index.numel(), index=index)


def take(x: Tensor, selection: Selection, dim: int = 0) -> Tensor:
    """The kept rows of ``x`` along ``dim``, differentiable; a window that does not wrap is a view.

    Shape:
        x: ``selection.total`` along ``dim``; result: ``selection.count`` along ``dim``, same layout.
    """
    if selection.index is not None:
        return _gather(x, selection.index, dim)
    pieces = selection.pieces()
    if len(pieces) > 1:
        return _TakeWindow.apply(x, selection, dim)  # pyright: ignore[reportReturnType]
    # The gradient of a plain narrow is contiguous whatever the layout, and adding it up is then slow.
    order = _flat_order(x) or list(range(x.dim()))
    back = [order.index(d) for d in range(x.dim())]
    return x.permute(order).narrow(order.index(dim), *pieces[0][:2]).permute(back)


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


@contextmanager
def saved_as_rows(x: Tensor, taken: Tensor, selection: Selection, dim: int = 0) -> Iterator[None]:
    """Inside, what backward needs of the copy ``taken = take(x, ...)`` is kept as x and taken again then.

    For an x that is kept anyway (the ReLU that made it keeps it): the copy would be memory on top of it.
    Nothing happens where something else decides how tensors are saved (activation checkpointing).
    """
    where, version, whole = _memory(taken), x._version, x.detach()
    if taken.data_ptr() == x.data_ptr() or _other_hooks():
        yield
        return

    def pack(t: Tensor) -> Tensor | None:
        return None if _memory(t) == where else t

    def unpack(t: Tensor | None) -> Tensor:
        if t is not None:
            return t
        if x._version != version:
            raise RuntimeError("the input of a branch was written into before its backward")
        return take(whole, selection, dim)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _other_hooks() -> bool:
    top = getattr(getattr(torch._C, "_autograd", None), "_top_saved_tensors_default_hooks", None)
    return top is None or top(False) is not None


def _memory(t: Tensor) -> tuple:
    return t.data_ptr(), t.shape, t.stride(), t.dtype, t._version


def _flat_order(x: Tensor) -> list[int] | None:
    """The order of dimensions in which ``x`` is contiguous, or None where there is none (a strided view)."""
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
    order = _flat_order(x) or list(range(x.dim()))
    shape = [count if d == dim else x.shape[d] for d in order]
    return x.new_empty(shape).permute([order.index(d) for d in range(x.dim())])


class _TakeWindow(torch.autograd.Function):
    """A window that wraps: one copy on the way in, one buffer on the way back."""

    @staticmethod
    def forward(ctx, x: Tensor, selection: Selection, dim: int) -> Tensor:  # type: ignore[override]
        ctx.selection, ctx.dim = selection, dim
        out = _like(x, selection.count, dim)
        for first, length, at in selection.pieces():
            out.narrow(dim, at, length).copy_(x.narrow(dim, first, length))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return _Spread.apply(grad, ctx.selection, ctx.dim), None, None


class _Spread(torch.autograd.Function):
    """Rows back to their places, zeros elsewhere: the gradient of `_TakeWindow`, which is the one of this."""

    @staticmethod
    def forward(ctx, grad: Tensor, selection: Selection, dim: int) -> Tensor:  # type: ignore[override]
        ctx.selection, ctx.dim = selection, dim
        out = _like(grad, selection.total, dim)
        for first, length, at in selection.pieces():
            out.narrow(dim, first, length).copy_(grad.narrow(dim, at, length))
        for first, length in selection.rest():
            out.narrow(dim, first, length).zero_()
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
            for first, length, at in selection.pieces():
                torch.add(
                    x.narrow(dim, first, length),
                    z.narrow(dim, at, length),
                    alpha=scale,
                    out=out.narrow(dim, first, length),
                )
            for first, length in selection.rest():
                out.narrow(dim, first, length).copy_(x.narrow(dim, first, length))
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
                grad_z = take(grad, ctx.selection, ctx.dim).to(z_dtype)
            else:
                grad_z = _TakeScaled.apply(grad, ctx.selection, ctx.scale, ctx.dim).to(z_dtype)
        return grad_x, grad_z, None, None, None


class _TakeScaled(torch.autograd.Function):
    """``scale * take(x)`` in one pass."""

    @staticmethod
    def forward(ctx, x: Tensor, selection: Selection, scale: float, dim: int) -> Tensor:  # type: ignore[override]
        ctx.selection, ctx.scale, ctx.dim = selection, scale, dim
        if selection.index is not None:
            return _gather(x, selection.index, dim).mul_(scale)
        out = _like(x, selection.count, dim)
        for first, length, at in selection.pieces():
            torch.mul(x.narrow(dim, first, length), scale, out=out.narrow(dim, at, length))
        return out

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

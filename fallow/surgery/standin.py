"""The tensor that travels through a branch while some or all of its rows rest.

`Rows` is a tensor of the kept rows that knows which rows they are. Operations between a branch's modules work
on it as on any tensor, and the residual addition puts the rows back in one pass. Where the whole branch rests
it absorbs every operation, and the addition gives back the shortcut itself: nothing is computed or copied.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fallow import rows
from fallow.errors import UsageError

if TYPE_CHECKING:
    from fallow.surgery.branch import Run

_plain = torch._C.DisableTorchFunctionSubclass

_ADDITIONS = {"add", "__add__", "__radd__", "add_", "__iadd__"}
_RESHAPES = {"view", "reshape", "expand", "_unsafe_view", "unflatten"}
_BROADCASTS = {
    "add",
    "sub",
    "mul",
    "div",
    "__mul__",
    "__rmul__",
    "__sub__",
    "__rsub__",
    "__truediv__",
    "__add__",
}
_BROADCASTS |= {
    "__radd__",
    "true_divide",
    "multiply",
    "subtract",
    "where",
    "maximum",
    "minimum",
    "pow",
    "lerp",
}
_BROADCASTS |= {"add_", "mul_", "sub_", "div_", "addcmul", "masked_fill"}
_JOINS = {"cat", "concat", "concatenate", "stack"}
_KEEP_DIM = _BROADCASTS | {
    "relu",
    "gelu",
    "silu",
    "dropout",
    "tanh",
    "sigmoid",
    "to",
    "float",
    "contiguous",
    "clone",
}
# What a rested stand-in answers from the tensor it stands on, and what it hands out in several pieces.
_FACTS = {
    "size",
    "dim",
    "stride",
    "numel",
    "nelement",
    "ndimension",
    "is_contiguous",
    "get_device",
    "element_size",
}
_FACTS |= {
    "is_floating_point",
    "is_complex",
    "storage_offset",
    "__len__",
    "__repr__",
    "__format__",
    "__hash__",
}
_FACTS |= {"data_ptr", "untyped_storage", "has_names", "__set__", "requires_grad_", "type"}
_FACTS |= {
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "item",
    "tolist",
    "equal",
    "allclose",
    "is_pinned",
}
_PIECES = {
    "chunk",
    "split",
    "unbind",
    "tensor_split",
    "__iter__",
    "split_with_sizes",
    "max",
    "min",
    "topk",
    "sort",
}


class Rows(torch.Tensor):
    """A branch's kept rows under way to its residual sum."""

    run: Run
    batch_dim: int

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Pass operations on to the rows; stop at the residual sum."""
        kwargs = kwargs or {}
        name = func.__name__
        if torch.compiler.is_compiling():  # a graph would keep the draw it was traced with
            raise UsageError(
                "torch.compile of an applied model is not supported yet: train the model as it is, or call "
                "remove() on its handle first."
            )
        if name in _ADDITIONS and len(args) == 2:
            mine, other = (args[0], args[1]) if isinstance(args[0], Rows) else (args[1], args[0])
            run = mine.run
            if isinstance(other, Tensor) and not isinstance(other, Rows) and not run.done:
                if run.inner_sums == 0:
                    onto = args[0] if name in ("add_", "__iadd__") else None
                    return residual_sum(run, other, mine, onto, kwargs.get("alpha", 1))
                run.inner_sums -= 1
        first = _first(args, kwargs)
        if first.run.done:
            return _afterwards(func, args, kwargs)
        return (
            _absorb(first, func, name, args, kwargs)
            if first.run.rested
            else _work(first, func, name, args, kwargs)
        )


def wrap(tensor: Tensor, run: Run, batch_dim: int) -> Rows:
    """The tensor as rows of this run."""
    with _plain():
        out = tensor.as_subclass(Rows)
    out.run, out.batch_dim = run, batch_dim
    return out


def rest(like: Tensor, run: Run, shape: tuple[int, ...] | None = None) -> Rows:
    """The stand-in of a branch that rests entirely, of a shape code between modules may ask for.

    It costs no memory: it is the tensor it stands on, or one number expanded.
    """
    with torch.no_grad(), _plain():
        plain = unwrap(like).detach()
        if shape is not None and shape != tuple(plain.shape):
            plain = plain.new_zeros(()).expand(shape)
        return wrap(plain, run, 0)


def unwrap(tensor: Tensor) -> Tensor:
    """The plain tensor."""
    if isinstance(tensor, Rows):
        with _plain():
            return tensor.as_subclass(torch.Tensor)
    return tensor


def residual_sum(run: Run, shortcut: Tensor, branch: Rows, onto: Tensor | None, alpha: float) -> Tensor:
    """Shortcut plus scaled branch on the kept rows, the shortcut elsewhere; ``onto``: written in place."""
    scale = run.scale * alpha
    if run.rested:
        out = _at_rest(run, shortcut, onto is shortcut)
        run.finish(shortcut, None, out)
        return out
    z = unwrap(branch)
    if run.gate is not None:
        z = run.gate(run, z)
    if run.selection is None:
        out = shortcut.add_(z, alpha=scale) if onto is shortcut else torch.add(shortcut, z, alpha=scale)
    elif onto is shortcut:
        out = rows.add_(shortcut, z, run.selection, scale, run.dim)
    else:
        out = rows.add(shortcut, z, run.selection, scale, run.dim)
    if onto is branch and out.dtype != branch.dtype:
        out = out.to(branch.dtype)  # a sum in place has the dtype of what it is written into
    run.finish(shortcut, z * alpha if run.watch is not None and alpha != 1 else z, out)
    return out


def _at_rest(run: Run, shortcut: Tensor, written: bool) -> Tensor:
    dtype = run.sum_dtype(shortcut)
    copy = run.copy and not written
    if dtype != shortcut.dtype:
        shortcut, copy = shortcut.to(dtype), False
    if run.zeros:
        return rows.zero_grads(shortcut, run.zeros, "written" if written else "copy" if copy else "view")
    return shortcut.clone() if copy else shortcut


def _afterwards(func: Callable, args: Any, kwargs: Any) -> Any:
    """What a branch left behind (an auxiliary loss, something to log) is a plain tensor once its sum is made.

    One that rested left nothing: NaN, which a log shows and a loss cannot hide.
    """

    def plain(t: Any) -> Any:
        if not isinstance(t, Rows):
            return t
        absent = t.run.rested and unwrap(t).is_floating_point()
        return torch.full_like(unwrap(t), math.nan) if absent else unwrap(t)

    args, kwargs = tree_map(plain, (args, kwargs))
    return func(*args, **kwargs)


def _first(args: Any, kwargs: Any) -> Rows:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Rows):
            return value
        if isinstance(value, (list, tuple)):
            for v in value:
                if isinstance(v, Rows):
                    return v
    raise TypeError("no rows among the arguments")  # pragma: no cover - torch calls us with one


_SHAPES = _RESHAPES | {"permute", "transpose", "flatten", "unsqueeze", "squeeze", "movedim", "swapaxes", "t"}


def _absorb(first: Rows, func: Callable, name: str, args: Any, kwargs: Any) -> Any:
    if name in _FACTS or name == "__get__":
        with _plain():
            out = func(*args, **kwargs)
        return rest(out, first.run) if isinstance(out, Tensor) else out
    if name in _SHAPES:  # views: free, and code between modules may ask for the shape next
        with _plain(), torch.no_grad(), suppress(RuntimeError, IndexError):
            return wrap(func(*args, **kwargs), first.run, -1)
        return first
    if name in _PIECES:
        with _plain(), torch.no_grad():
            out = func(*args, **kwargs)
        if name == "__iter__":
            return iter([rest(t, first.run) for t in out])
        return tree_map(lambda t: rest(t, first.run) if isinstance(t, Tensor) else t, out)
    return first


def _work(first: Rows, func: Callable, name: str, args: Any, kwargs: Any) -> Any:
    run, selection = first.run, first.run.selection
    if selection is not None and name in _BROADCASTS:
        args = tuple(_aligned(a, first) for a in args)
    elif selection is not None and name in _JOINS and isinstance(args[0], (list, tuple)):
        args = ([_aligned(a, first) for a in args[0]], *args[1:])
    with _plain():
        try:
            out = func(*args, **kwargs)
        except RuntimeError:
            # x.view(batch_size, ...) with the batch size read before the rows were taken
            if (
                selection is None
                or name not in _RESHAPES
                or not any(a == selection.total for a in _sizes(args))
            ):
                raise
            out = func(*_resized(args, selection.total, selection.count), **kwargs)
    dim = first.batch_dim if name in _KEEP_DIM else -1

    def again(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        fits = selection is None or (
            0 <= first.batch_dim < t.dim() and t.shape[first.batch_dim] == selection.count
        )
        return wrap(t, run, dim if dim >= 0 or not fits else first.batch_dim)

    if name == "__iter__":
        return iter([again(t) for t in out])
    return tree_map(again, out)


def _aligned(value: Any, first: Rows) -> Any:
    """A whole-batch operand (a gate, a mask) cut to the kept rows; others as they are."""
    if not isinstance(value, Tensor) or isinstance(value, Rows) or first.batch_dim < 0:
        return value
    selection = first.run.selection
    with _plain():
        dim = first.batch_dim - (first.dim() - value.dim())
    if selection is not None and 0 <= dim < value.dim() and value.shape[dim] == selection.total:
        return rows.take(value, selection, dim)
    return value


def _sizes(args: Any) -> list[Any]:
    flat: list[Any] = []
    for a in args[1:]:
        flat += list(a) if isinstance(a, (tuple, list)) else [a]
    return [a for a in flat if isinstance(a, int)]


def _resized(args: Any, total: int, count: int) -> tuple[Any, ...]:
    """The first size that equals the batch size, replaced by the number of kept rows."""
    done = False

    def swap(a: Any) -> Any:
        nonlocal done
        if isinstance(a, int) and a == total and not done:
            done = True
            return count
        return a

    return (
        args[0],
        *(tuple(swap(v) for v in a) if isinstance(a, (tuple, list)) else swap(a) for a in args[1:]),
    )

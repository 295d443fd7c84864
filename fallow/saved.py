"""What a branch keeps for its backward: the tensor its rows are of, where that is kept anyway."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fallow import rows
from fallow.rows import Selection


@contextmanager
def saved_as_rows(x: Tensor, taken: Tensor, selection: Selection, dim: int = 0) -> Iterator[None]:
    """Inside, what backward needs of the copy ``taken = take(x, ...)`` is kept as x and taken again then.

    For an x that is kept anyway (the ReLU that made it keeps it): the copy would be memory on top of it.
    Nothing happens where something else decides how tensors are saved (activation checkpointing).
    """
    if not selection.scattered or _other_hooks():
        yield
        return
    place, where, version, whole = taken.data_ptr(), _memory(taken), x._version, x.detach()

    def pack(t: Tensor) -> Tensor | None:
        return None if t.data_ptr() == place and _memory(t) == where else t

    def unpack(t: Tensor | None) -> Tensor:
        if t is not None:
            return t
        if x._version != version:
            raise RuntimeError("the input of a branch was written into before its backward")
        return rows.copied(whole, selection, dim)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _other_hooks() -> bool:
    top = getattr(getattr(torch._C, "_autograd", None), "_top_saved_tensors_default_hooks", None)
    return top is None or top(False) is not None


def _memory(t: Tensor) -> tuple:
    return t.shape, t.stride(), t.dtype, t._version

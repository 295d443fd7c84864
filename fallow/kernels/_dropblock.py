"""A tensor times a number with blocks of zeros, in one pass over memory (dropblock.cpp)."""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fallow.kernels import _build

_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# The first call on so many elements builds the library; a task has about so many bytes, a thread's share
# at least so many elements.
_WORTH, _TASK, _SHARE = 1 << 14, 1 << 14, 1 << 15


@dataclass(frozen=True, eq=False)
class Geometry:
    """What the cells of a map cover.

    A seed's cell has a class, of cells whose blocks are equally wide, and a number in it: (column, map, cells
    of the axes but the last), the first digit slowest. Without classes it is (map, cells of the axes).

    Attributes:
        sizes: of a map, one to three axes.
        cells: along each of them.
        block: side of a block. Cell i covers ``i - block + 1 .. i``, cut to the map.
        disjoint: cell i covers ``i block .. (i + 1) block - 1`` instead, cut to the map.
        classes: for each its first position on the last axis, the step to the next column's, their width and
            their number; or none.
    """

    sizes: tuple[int, ...]
    cells: tuple[int, ...]
    block: int
    disjoint: bool
    classes: tuple[tuple[int, int, int, int], ...]


def drop_seeds(
    x: Tensor, factor: float, geometry: Geometry, planes: int, counts: tuple[int, ...], key: int
) -> Tensor | None:
    """``x * factor`` with zeros in the blocks of the seeds, or None where the kernel does not apply.

    Args:
        x: (rows, channels, *sizes).
        factor: of what is kept; rounded as torch rounds ``x * factor``.
        geometry: of the maps.
        planes: maps the seeds speak of: rows times channels, or the rows alone, whose channels share them.
        counts: seeds of each class.
        key: what the seeds' cells are made of; i counts through all classes, from 1. A cell is ``floor(n u)``
            of the n of its class, where u is the upper 53 bits of splitmix64's number i with this state.
    """
    code = _code(x)
    if code is None or not _fits(geometry, planes):
        return None
    rows, channels = x.shape[:2]
    shared = planes == rows and channels != 1
    return _run(x, factor, code, geometry, shared, (counts, key), None)


def drop_masked(x: Tensor, factor: float, kept: Tensor) -> Tensor | None:
    """``x * factor`` with zeros where `kept` is False, or None where the kernel does not apply.

    Args:
        x: (rows, channels, *sizes).
        factor: as above.
        kept: bool, of x's shape or with one channel.
    """
    code = _code(x)
    if code is None or not kept.is_contiguous() or kept.device != x.device:
        return None
    shared = kept.shape[1] == 1 and x.shape[1] != 1
    return _run(x, factor, code, _whole(tuple(x.shape[2:])), shared, None, kept)


def _fits(geometry: Geometry, planes: int) -> bool:
    """Whether the kernel's whole numbers are large enough."""
    columns = geometry.cells[-1] < 1 << 24 and len(geometry.classes) < 1 << 8
    return columns and planes * math.prod(geometry.cells) < 1 << 32


@functools.lru_cache(64)
def _whole(sizes: tuple[int, ...]) -> Geometry:
    return Geometry(sizes, (1,) * len(sizes), 1, False, ())


def _code(x: Tensor) -> int | None:
    """The number of x's dtype for the kernel; None where plain operations are needed or serve better."""
    code = _CODES.get(x.dtype)
    if (
        code is None
        or type(x) not in (Tensor, nn.Parameter)
        or x.device.type != "cpu"
        or x.layout != torch.strided
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()  # flop counters, fake tensors, tracers: they want to see
        or torch._C._get_tracing_state() is not None
        or x.is_neg()
        or x._is_zerotensor()
        or not x.numel()
        or (not _build.ready() and x.numel() < _WORTH)
        or _build.switched_off()
    ):
        return None
    library = _build.library()
    return code if library is not None and library.fallow_dropblock_takes(code) else None


def _run(
    x: Tensor,
    factor: float,
    code: int,
    geometry: Geometry,
    shared: bool,
    seeds: tuple[tuple[int, ...], int] | None,
    kept: Tensor | None,
) -> Tensor | None:
    last = not x.is_contiguous()
    if last and not x.movedim(1, -1).is_contiguous():
        return None
    if last and not shared and kept is not None:
        return None  # whose mask is in another order
    library = _build.library()
    spec, table, tasks = _spec(geometry, x.shape[0], x.shape[1], x.itemsize, code, last, shared)
    threads = max(min(torch.get_num_threads(), x.numel() // _SHARE, tasks), 1)
    counts, key = ((), 0) if seeds is None else seeds
    local = threads * math.prod(geometry.sizes) * x.itemsize if shared else 0
    out = torch.empty_like(x)
    scratch = torch.empty(8 * sum(counts) + 4 * (tasks + 2) + local + 64, dtype=torch.uint8, device="cpu")
    assert library is not None
    library.fallow_dropblock(
        spec,
        table,
        (ctypes.c_int64 * len(counts))(*counts),
        key,
        x.data_ptr(),
        out.data_ptr(),
        factor,
        None if kept is None else kept.data_ptr(),
        scratch.data_ptr(),
        threads,
    )
    return out


@functools.lru_cache(256)
def _spec(
    geometry: Geometry, rows: int, channels: int, itemsize: int, code: int, last: bool, shared: bool
) -> tuple[ctypes.Array, ctypes.Array, int]:
    """What dropblock.cpp calls Spec and table, and the number of its tasks."""
    missing = [1] * (3 - len(geometry.sizes))
    group = max(_TASK // (itemsize * math.prod(geometry.sizes)), 1)
    numbers = [
        *(code, last, shared, rows, channels),
        *(*missing, *geometry.sizes, *missing, *geometry.cells),
        *(geometry.block, geometry.disjoint, group, len(geometry.classes)),
    ]
    flat = [number for part in geometry.classes for number in part]
    tasks = rows if last or shared else -(-rows * channels // group)
    return (ctypes.c_int64 * len(numbers))(*map(int, numbers)), (ctypes.c_int64 * len(flat))(*flat), tasks

"""A tensor times a number with blocks of zeros, in one pass over memory (dropblock.cpp)."""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fallow.kernels._build import State, library

# Looked up once: where a large tensor fills the caches, each look into torch's long tables is felt.
_transforms = torch._C._are_functorch_transforms_active
_modes = torch._C._len_torch_dispatch_stack
_tracing = torch._C._get_tracing_state
_empty, _empty_like, _strided = torch.empty, torch.empty_like, torch.strided
_ORDINARY = (Tensor, nn.Parameter)

# The first call on so many elements builds the library; a task has about so many bytes, a thread's share at
# least so many elements; up to so many bytes the kernel has room of its own.
_WORTH, _TASK, _SHARE, _ROOM = 1 << 14, 1 << 14, 1 << 15, 1 << 14


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
        intensity: mean number of seeds of a cell.
    """

    sizes: tuple[int, ...]
    cells: tuple[int, ...]
    block: int
    disjoint: bool
    classes: tuple[tuple[int, int, int, int], ...]
    intensity: float


def drop_seeds(x: Tensor, factor: float, geometry: Geometry, planes: int, key: int) -> Tensor | None:
    """``x * factor`` with zeros in the blocks of the seeds, or None where the kernel does not apply.

    Args:
        x: (rows, channels, *sizes).
        factor: of what is kept; rounded as torch rounds ``x * factor``.
        geometry: of the maps.
        planes: maps the seeds speak of: rows times channels, or the rows alone, whose channels share them.
        key: what the seeds are made of, as `fallow.noise` does: the Poisson numbers of the classes from
            numbers 0, -1, -2 and so on of splitmix64's sequence with this state, the cells from 1, 2, 3.
    """
    code = _code(x)
    if code is None:
        return None
    shared = planes == x.shape[0] and x.shape[1] != 1
    return _run(x, factor, code, geometry, shared, key, None)


def drop_masked(x: Tensor, factor: float, kept: Tensor) -> Tensor | None:
    """``x * factor`` with zeros where `kept` is False, or None where the kernel does not apply.

    Args:
        x: (rows, channels, *sizes).
        factor: as above.
        kept: bool, of x's shape or with one channel.
    """
    code = None if torch.compiler.is_compiling() else _code(x)
    if code is None or not kept.is_contiguous() or kept.device != x.device:
        return None
    shared = kept.shape[1] == 1 and x.shape[1] != 1
    return _run(x, factor, code, _whole(tuple(x.shape[2:])), shared, 0, kept)


@functools.lru_cache(64)
def _whole(sizes: tuple[int, ...]) -> Geometry:
    return Geometry(sizes, (1,) * len(sizes), 1, False, (), 0.0)


def _code(x: Tensor) -> int | None:
    """The number of x's dtype for the kernel; None where plain operations are needed or serve better."""
    if not State.asked and x.numel() >= _WORTH and not State.paused:
        library()
    code = State.codes.get(x.dtype)
    if (
        code is None
        or State.paused
        or type(x) not in _ORDINARY
        or not x.is_cpu
        or x.layout is not _strided
        or _transforms()
        or _modes()  # flop counters, fake tensors, tracers: they want to see
        or _tracing() is not None
        or x.is_neg()
        or x._is_zerotensor()
    ):
        return None
    return code


def _run(
    x: Tensor, factor: float, code: int, geometry: Geometry, shared: bool, key: int, kept: Tensor | None
) -> Tensor | None:
    last = not x.is_contiguous()
    if last and not x.movedim(1, -1).is_contiguous():
        return None
    if last and not shared and kept is not None:
        return None  # whose mask is in another order
    spec, table, tasks, room = _spec(geometry, x.shape[0], x.shape[1], x.itemsize, code, last, shared)
    if not tasks:
        return None
    threads = min(x.numel() // _SHARE, tasks)
    threads = min(torch.get_num_threads(), threads) if threads > 1 else 1
    if shared:
        room += threads * (math.prod(geometry.sizes) * x.itemsize + 64)
    out = _empty_like(x)
    scratch = _empty(room, dtype=torch.uint8, device="cpu") if room > _ROOM else None
    assert State.library is not None
    failed = State.library.fallow_dropblock(
        spec,
        table,
        geometry.intensity,
        key,
        x.data_ptr(),
        out.data_ptr(),
        factor,
        None if kept is None else kept.data_ptr(),
        None if scratch is None else scratch.data_ptr(),
        0 if scratch is None else room,
        threads,
    )
    return None if failed else out


@functools.lru_cache(256)
def _spec(
    geometry: Geometry, rows: int, channels: int, itemsize: int, code: int, last: bool, shared: bool
) -> tuple[ctypes.Array, ctypes.Array, int, int]:
    """What dropblock.cpp calls Spec and table, how many tasks it has, and bytes of scratch without masks.

    No task: integers of the kernel are too small.
    """
    missing = [1] * (3 - len(geometry.sizes))
    area, planes = math.prod(geometry.sizes), rows * (1 if shared else channels)
    group = max(_TASK // (itemsize * area), 1)
    tasks = rows if last or shared else -(-planes // group)
    cells = planes * math.prod(geometry.cells)
    if cells >= 1 << 32 or geometry.cells[-1] >= 1 << 24 or len(geometry.classes) >= 1 << 8:
        tasks = 0
    numbers = [
        *(code, last, shared, rows, channels),
        *(*missing, *geometry.sizes, *missing, *geometry.cells),
        *(geometry.block, geometry.disjoint, group),
        *(2 * rows * channels * area * itemsize > _last_cache(), len(geometry.classes)),
    ]
    flat = [number for part in geometry.classes for number in part]
    mean = cells * geometry.intensity  # of the seeds; more than eight deviations above it there will not be
    room = 8 * int(mean + 8 * math.sqrt(mean) + 64) + 4 * tasks + 128
    return (
        (ctypes.c_int64 * len(numbers))(*map(int, numbers)),
        (ctypes.c_int64 * len(flat))(*flat),
        tasks,
        room,
    )


@functools.cache
def _last_cache() -> int:
    """Bytes of the cache that a core shares, as Linux says; C libraries may count those of all its peers."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text(encoding="ascii")
        return int(text.strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        return 32 << 20

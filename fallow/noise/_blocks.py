"""Where DropBlock's blocks lie: a Poisson number of seeds on a padded grid, and what each of them covers.

A grid has, for every map (one channel of one sample), cells in which a seed may lie; a seed drops the block
of its cell, cut to the map. Sliding: one cell for every place of a block that meets the map, `size + block -
1` an axis, so every position, at the border too, is covered by exactly ``block ** n`` cells. Disjoint: one
cell for each block of a tiling from the origin, so every position is covered by one.

The law. The number of seeds is Poisson with mean ``cells * lam``, and each lies in a uniformly drawn cell,
with repetition. Splitting a Poisson number over cells makes the counts of the cells independent Poisson
numbers of mean lam; with ``lam = -log(p) / cover`` a cell has a seed with probability ``g = 1 - exp(-lam) =
1 - p^(1/cover)``, independently of all others, and a position is kept with probability ``exp(-lam cover) =
p``. So the draw is that of one Bernoulli number a cell, exactly, at the cost of the seeds alone. [derived]
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fallow.kernels import Geometry
from fallow.noise import _counts

# Rows of blocks written at a time where the tensor is small; more of them in large tensors.
_RUNS = 1 << 16
# Up to so many seeds, and entries of a table of a map's blocks, few operations count more than few writes.
_FEW, _TABLE = 4096, 1 << 19
# Seeds an element above which a mask is cheaper to keep than the seeds; writes an element above which it is
# cheaper to draw every cell and to dilate, unless the cells are many times the elements.
_SEEDS, _WRITES, _PADDING = 0.02, 2.0, 4.0


@dataclass(frozen=True)
class Columns:
    """Cells of the last axis whose blocks, cut to the map, are equally wide: ``start = offset + i step``."""

    width: int
    count: int
    step: int
    offset: int = 0


@dataclass(frozen=True, eq=False)
class Grid:
    """The cells of a tensor's maps and the survival rate.

    Attributes:
        sizes: of a map, one to three.
        block: its side.
        disjoint: blocks tile the map, or may lie anywhere.
        rate: p in (0, 1).
        planes: how many maps.
    """

    sizes: tuple[int, ...]
    block: int
    disjoint: bool
    rate: float
    planes: int

    def axis(self, size: int) -> int:
        """Cells along an axis."""
        return _axis(size, self.block, self.disjoint)

    @functools.cached_property
    def cells(self) -> int:
        """Cells of a map."""
        return math.prod(map(self.axis, self.sizes))

    @property
    def cover(self) -> int:
        """Cells whose block covers a position, the same for each."""
        return 1 if self.disjoint else self.block ** len(self.sizes)

    @property
    def intensity(self) -> float:
        """lam, the mean number of seeds in a cell."""
        return -math.log(self.rate) / self.cover

    @functools.cached_property
    def seeds(self) -> float:
        """Mean number of seeds an element."""
        return self.cells * self.intensity / math.prod(self.sizes)

    @functools.cached_property
    def sparse(self) -> bool:
        """Whether seeds take less room than a mask, and less time."""
        return self.seeds <= _SEEDS and not self.dense

    @functools.cached_property
    def dense(self) -> bool:
        """Whether drawing every cell is cheaper than writing every block."""
        block = math.prod(min(self.block, size) for size in self.sizes)
        return self.seeds * block > _WRITES and self.cells <= _PADDING * math.prod(self.sizes)

    @functools.cached_property
    def few(self) -> bool:
        """Whether all cells are one class, written number by number."""
        table = self.cells * math.prod(min(self.block, size) for size in self.sizes)
        return self.planes * self.cells * self.intensity < _FEW and table <= _TABLE

    @functools.cached_property
    def columns(self) -> list[Columns]:
        """The cells of the last axis by width; one class of single numbers where seeds are few."""
        return [Columns(1, 1, 0)] if self.few else _columns(self.sizes[-1], self.block, self.disjoint)

    @functools.cached_property
    def tabled(self) -> tuple[int, ...]:
        """Axes whose cells are looked up; `columns` are of the last one, or of none."""
        return self.sizes if self.few else self.sizes[:-1]

    @functools.cached_property
    def geometry(self) -> Geometry:
        """The same for the compiled kernel."""
        parts = () if self.few else self.columns
        classes = tuple((part.offset, part.step, part.width, part.count) for part in parts)
        cells = tuple(map(self.axis, self.sizes))
        return Geometry(self.sizes, cells, self.block, self.disjoint, classes, self.intensity)

    @functools.cached_property
    def chunks(self) -> list[tuple[int, int]]:
        """First map and number of maps of parts whose runs take little memory beside the tensor."""
        elements = math.prod(self.sizes)
        runs = self.seeds * elements * math.prod(min(self.block, size) for size in self.tabled)
        limit = max(_RUNS, self.planes * elements // 64)
        step = self.planes if runs * self.planes <= limit else max(int(limit / runs), 1)
        return [(i, min(step, self.planes - i)) for i in range(0, self.planes, max(step, 1))]


def _axis(size: int, block: int, disjoint: bool) -> int:
    return -(-size // block) if disjoint else size + block - 1


def _columns(size: int, block: int, disjoint: bool) -> list[Columns]:
    """The whole blocks, then those cut by either border."""
    if disjoint:
        whole, rest = divmod(size, block)
        parts = [Columns(block, whole, block), Columns(rest, 1, 0, whole * block)]
        return [part for part in parts if part.width and part.count]
    full = min(size, block)
    cut = [Columns(width, 2, size - width) for width in range(1, full)]
    return [Columns(full, abs(size - block) + 1, int(size >= block)), *cut]


@functools.lru_cache(64)
def grid_of(shape: tuple[int, ...], block: int, disjoint: bool, rate: float) -> Grid:
    """The grid of a tensor (rows, channels, *map), kept: its numbers are asked for in every call."""
    return Grid(shape[2:], block, disjoint, rate, shape[0] * shape[1])


class Seeds(NamedTuple):
    """Seeds of so many maps, and the key that their numbers and cells are made of."""

    planes: int
    key: int


def draw(planes: int, generator: torch.Generator | None) -> Seeds:
    """Seeds of that many maps; without a generator, of the default CPU generator.

    One number, however many seeds: a backward needs no memory for them, the CPU does not wait for another
    device, and where a tensor fills the caches each operation of torch less is felt.
    """
    host = "cpu" if generator is None else generator.device
    return Seeds(planes, int(torch.randint(1 << 62, (1,), generator=generator, device=host).item()))


def counts(grid: Grid, seeds: Seeds) -> list[int]:
    """How many seeds each of the columns has."""
    numbers = _counts.uniforms(seeds.key)
    return [_counts.poisson(span * grid.intensity, numbers) for span in _spans(grid, seeds.planes)]


def cells(grid: Grid, seeds: Seeds, device: torch.device) -> Tensor:
    """The cells, those of each of the columns one after the other: ``floor(n u)`` of n, with u of 53 bits.

    Seed i, from 1, takes its u from number i of the key's sequence (`_counts`), in integers of 64 bits
    that wrap around: every device has the same, and the compiled kernel. Cells are numbered (column, map,
    cell of the other axes), the columns in the order of their classes.
    """
    each = counts(grid, seeds)
    z = torch.arange(1, sum(each) + 1, device=device)
    z.mul_(_signed(_counts.STEP)).add_(seeds.key)
    for shift, factor in _counts.MIX:
        z.bitwise_xor_(_shifted(z, shift)).mul_(_signed(factor))
    u = _shifted(z.bitwise_xor_(_shifted(z, 31)), 11).double()
    found, low = [], 0
    for part, span in zip(u.split(each), _spans(grid, seeds.planes), strict=True):
        found.append(part.mul_(span * 2.0**-53).long().add_(low))
        low += span
    return found[0] if len(found) == 1 else torch.cat(found)


def _signed(number: int) -> int:
    """The same 64 bits as torch has them."""
    return number - (number >> 63 << 64)


def _shifted(number: Tensor, bits: int) -> Tensor:
    """To the right, with zeros coming in."""
    return (number >> bits).bitwise_and_((1 << 64 - bits) - 1)


@functools.lru_cache(64)
def _spans(grid: Grid, planes: int) -> list[int]:
    """Cells of each of the columns in that many maps."""
    others = planes * math.prod(map(grid.axis, grid.tabled))
    return [others * part.count for part in grid.columns]


def erase(target: Tensor, grid: Grid, seeds: Seeds, first: int = 0, value: float = 0) -> None:
    """Write `value` into the blocks of the seeds.

    Args:
        target: a dense tensor (rows, channels, *sizes) of any layout.
        grid: the cells of its maps.
        seeds: from `draw`.
        first: the number of the map that the seeds call 0.
        value: what to write.
    """
    each = counts(grid, seeds)
    if any(each):
        write(target, grid, cells(grid, seeds, target.device), each, seeds.planes, first, value)


def write(
    target: Tensor,
    grid: Grid,
    numbers: Tensor,
    each: Sequence[int],
    planes: int,
    first: int = 0,
    value: float = 0,
) -> None:
    """`erase` for cells that are known."""
    stride, begin = target.stride(), 0
    for part, count in zip(grid.columns, each, strict=True):
        runs = _runs(target, grid, numbers[begin : begin + count], planes, first)
        # a run's start, then its positions one after the other, wherever the run starts
        length = target.numel() - (part.width - 1) * stride[-1]
        view = target.as_strided((length, part.width), (1, stride[-1]), target.storage_offset())
        view.index_fill_(0, runs.view(-1), value)
        begin += count


def _runs(target: Tensor, grid: Grid, rest: Tensor, planes: int, first: int) -> Tensor:
    """Where each row of each cell's block starts in the memory of the target, [cells, rows of a block]."""
    stride, channels = target.stride(), target.shape[1]
    tables, starts = _tables(grid.sizes, grid.block, grid.disjoint, grid.few, stride[2:], target.device)
    offsets, begin = [], None
    if len(starts) > 1:
        others = planes * math.prod(table.shape[0] for table in tables)
        column, rest = _split(rest, others)
        begin = starts.index_select(0, column)
    for table in reversed(tables):
        rest, digit = _split(rest, table.shape[0])
        offsets.append(table.index_select(0, digit))
    plane = rest + first if first else rest
    if channels == 1 or stride[0] == channels * stride[1]:
        start = plane * stride[0 if channels == 1 else 1]
    else:
        row, channel = _split(plane, channels)
        start = row * stride[0] + channel * stride[1]
    runs = (start if begin is None else start.add_(begin)).unsqueeze(1)
    for offset in offsets:
        runs = offset.add_(runs) if runs.shape[1] == 1 else (runs[:, :, None] + offset[:, None]).flatten(1)
    return runs


def _split(number: Tensor, base: int) -> tuple[Tensor, Tensor]:
    """The number without its last digit in that base, and this digit."""
    return torch.div(number, base, rounding_mode="floor"), number % base


@functools.lru_cache(64)
def _tables(
    sizes: tuple[int, ...],
    block: int,
    disjoint: bool,
    few: bool,
    stride: tuple[int, ...],
    device: torch.device,
) -> tuple[list[Tensor], Tensor]:
    """Offsets of the positions of every cell of the tabled axes, and where each column starts.

    A cut block repeats its last position. With few seeds one table has the whole blocks of a map.
    """
    with torch.inference_mode(False):  # kept for later calls, which may be of another mode
        tables = []
        for size, step in zip(sizes, stride, strict=True):
            first = torch.arange(_axis(size, block, disjoint), device=device)
            first = first * block if disjoint else first - (block - 1)
            last = (first + (block - 1)).clamp_(max=size - 1)
            steps = torch.arange(min(size, block), device=device)
            tables.append(torch.minimum(first.clamp_(min=0)[:, None] + steps, last[:, None]) * step)
        if few:
            whole = tables[0]
            for table in tables[1:]:
                whole = (whole[:, None, :, None] + table[:, None]).flatten(2).flatten(0, 1)
            return [whole], torch.zeros(1, dtype=torch.long, device=device)
        parts = _columns(sizes[-1], block, disjoint)
        starts = [part.offset + i * part.step for part in parts for i in range(part.count)]
        return tables[:-1], torch.tensor(starts, device=device) * stride[-1]


def paint(target: Tensor, grid: Grid, generator: torch.Generator | None, value: float = 0) -> Tensor:
    """Write `value` into the blocks of a fresh draw, and return the contiguous target."""
    if target.numel() and grid.sparse:
        erase(target, grid, draw(grid.planes, generator), value=value)
        return target
    for first, count in grid.chunks if target.numel() else ():
        if grid.dense:
            mask = dilated(grid, count, target.device, generator)
            target.view(-1, *grid.sizes)[first : first + count].masked_fill_(mask, value)
        else:
            erase(target, grid, draw(count, generator), first, value)
    return target


def dilated(grid: Grid, planes: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """True in the blocks, by the same law: a number for every cell, then each axis widened to blocks."""
    place = device if generator is None else generator.device
    seeds = torch.empty((planes, *map(grid.axis, grid.sizes)), dtype=torch.bool, device=place)
    seeds = seeds.bernoulli_(-math.expm1(-grid.intensity), generator=generator).to(device)
    for axis, size in enumerate(grid.sizes, start=1):
        if grid.disjoint:
            index = torch.div(torch.arange(size, device=device), grid.block, rounding_mode="floor")
            seeds = seeds.index_select(axis, index)
            continue
        reach = 1  # cells that each number stands for by now; doubling takes log2(block) passes
        while reach < grid.block:
            step = min(reach, grid.block - reach)
            length = seeds.shape[axis] - step
            seeds = seeds.narrow(axis, 0, length) | seeds.narrow(axis, step, length)
            reach += step
    return seeds

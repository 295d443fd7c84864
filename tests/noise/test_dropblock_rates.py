"""The law of DropBlock's masks: rates, covariances and, on tiny maps, every probability."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fallow.noise import _blocks, drop_block2d, drop_block_mask

# Each way of drawing, forced on whatever grid: (seeds below which all cells are one class, writes an element
# above which every cell is drawn).
WAYS = {"few": (math.inf, math.inf), "columns": (0, math.inf), "cells": (0, 0)}
every_grid = pytest.mark.parametrize("grid", ["sliding", "disjoint"])


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    few, writes = WAYS[request.param]
    monkeypatch.setattr(_blocks, "_FEW", few)
    monkeypatch.setattr(_blocks, "_WRITES", writes)
    if not writes:
        monkeypatch.setattr(_blocks, "_PADDING", math.inf)
    _blocks.grid_of.cache_clear()
    request.addfinalizer(_blocks.grid_of.cache_clear)
    return request.param


def oracle_cells(sizes: tuple[int, ...], block: int, grid: str) -> Iterator[frozenset[tuple[int, ...]]]:
    """The positions of each cell's block, one by one."""
    axes = []
    for size in sizes:
        starts = range(-(block - 1), size) if grid == "sliding" else range(0, size, block)
        axes.append([[i for i in range(start, start + block) if 0 <= i < size] for start in starts])
    for spans in itertools.product(*axes):
        yield frozenset(itertools.product(*spans))


def masks(shape: tuple[int, ...], p: float, block: int, grid: str, seed: int = 0, **options: bool) -> Tensor:
    noise = torch.Generator().manual_seed(seed)
    return drop_block_mask(shape, survival_rate=p, block_size=block, grid=grid, generator=noise, **options)


def assert_rate(kept: Tensor, p: float) -> None:
    """Corners, the middle, the whole map and its border within 4 standard errors; every position within 5."""
    sample = kept.flatten(0, 1).double()
    each = (sample.mean(0) - p) / math.sqrt(p * (1 - p) / len(sample))
    assert float(each.abs().max()) < 5
    for place in (0, -1):
        assert abs(float(each[(place,) * each.dim()])) < 4
    assert abs(float(each[tuple(size // 2 for size in each.shape)])) < 4
    inner = torch.zeros(each.shape, dtype=torch.bool)
    inner[tuple(slice(1, -1) for _ in each.shape)] = True
    for part in (torch.ones_like(inner), ~inner):
        shares = sample[:, part].mean(1)
        assert abs(float(shares.mean()) - p) < 4 * float(shares.std()) / math.sqrt(len(shares))


# --- rates --------------------------------------------------------------------------------------------------


@every_grid
@pytest.mark.parametrize(
    ("size", "block"),
    [*itertools.product((3, 7), range(1, 10)), (14, 5), (14, 7), (14, 8), (28, 4), (28, 7), (56, 7), (56, 9)],
)
def test_every_position_is_kept_at_the_asked_rate(size: int, block: int, grid: str) -> None:
    rows = max(6000 if size < 14 else 0, 600_000 // size**2)
    for seed, p in enumerate((0.9, 0.5), start=2):
        assert_rate(masks((rows, 1, size, size), p, block, grid, seed), p)


@every_grid
@pytest.mark.parametrize(
    ("sizes", "block"),
    [
        ((5, 11), 3),
        ((11, 5), 6),
        ((4, 30), 8),
        ((1, 9), 4),
        ((20,), 5),
        ((3,), 8),
        ((1,), 1),
        ((50,), 2),
        ((4, 5, 6), 3),
        ((3, 3, 3), 4),
        ((2, 7, 3), 2),
        ((7, 7), 20),
    ],
    ids=str,
)
def test_and_on_maps_of_any_shape_and_dimension(
    sizes: tuple[int, ...], block: int, grid: str, way: str
) -> None:
    assert_rate(masks((4000, 2, *sizes), 0.8, block, grid), 0.8)


@every_grid
@pytest.mark.parametrize("p", [0.999, 0.3, 0.02, 1e-9])
def test_rates_near_both_ends(p: float, grid: str) -> None:
    kept = masks((20_000, 1, 6, 6), p, 3, grid).double()
    rate, error = kept.mean((0, 1)), math.sqrt(p * (1 - p) / 20_000)
    assert ((rate - p).abs() < 5 * error + 1e-12).all()


@every_grid
def test_shared_channels_have_one_mask_a_row_at_the_asked_rate(grid: str) -> None:
    kept = masks((9000, 5, 8, 6), 0.7, 3, grid, shared_channels=True)
    assert kept.shape == (9000, 1, 8, 6)
    assert_rate(kept, 0.7)


def test_many_chunks_are_the_same_law(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_blocks, "_RUNS", 100)
    _blocks.grid_of.cache_clear()
    assert_rate(masks((3000, 2, 9, 9), 0.6, 4, "sliding"), 0.6)


# --- the whole law ------------------------------------------------------------------------------------------


@every_grid
@pytest.mark.parametrize(
    ("sizes", "block"),
    [((5,), 3), ((2,), 5), ((4, 5), 2), ((3, 6), 4), ((2, 3), 5), ((3, 2, 4), 2)],
    ids=str,
)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("way", ["few", "columns"], indirect=True)
def test_the_cells_blocks_are_those_of_the_oracle(
    sizes: tuple[int, ...], block: int, grid: str, layout: str, way: str
) -> None:
    rows, channels = 2, 3
    cells = _blocks.Grid(sizes, block, grid == "disjoint", 0.5, rows * channels)
    blank = torch.zeros(rows, channels, *sizes)
    if layout == "channels last":
        blank = blank.movedim(1, -1).contiguous().movedim(-1, 1)
    found = Counter()
    parts, number = cells.columns, 0
    for kind, part in enumerate(parts):
        for _ in range(rows * channels * math.prod(map(cells.axis, cells.tabled)) * part.count):
            counts = tuple(int(other == kind) for other in range(len(parts)))
            target = blank.clone()
            _blocks.write(target, cells, torch.tensor([number]), counts, rows * channels, value=1)
            number += 1
            places = [tuple(place) for place in target.nonzero().tolist()]
            assert len({place[:2] for place in places}) == 1
            found[places[0][:2], frozenset(place[2:] for place in places)] += 1
    planes = itertools.product(range(rows), range(channels))
    oracle = list(oracle_cells(sizes, block, grid))
    assert found == Counter((plane, places) for plane in planes for places in oracle)
    covers = Counter(place for places in oracle for place in places)
    assert set(covers.values()) == {cells.cover}


@every_grid
@pytest.mark.parametrize(
    ("sizes", "block"), [((3,), 2), ((2,), 4), ((2, 2), 2), ((2, 3), 1), ((4,), 3)], ids=str
)
def test_every_mask_has_the_probability_of_the_seeds_that_make_it(
    sizes: tuple[int, ...], block: int, grid: str, way: str
) -> None:
    p, draws = 0.6, 40_000
    cells = list(oracle_cells(sizes, block, grid))
    cover = block ** len(sizes) if grid == "sliding" else 1
    g = 1 - p ** (1 / cover)
    law: dict[frozenset[tuple[int, ...]], float] = Counter()
    for seeds in itertools.product((False, True), repeat=len(cells)):
        places = frozenset().union(*(cell for cell, seed in zip(cells, seeds, strict=True) if seed))
        law[places] += math.prod(g if seed else 1 - g for seed in seeds)
    kept = masks((draws, 1, *sizes), p, block, grid, seed=4)
    seen = Counter(frozenset(tuple(place) for place in (~pattern[0]).nonzero().tolist()) for pattern in kept)
    assert set(seen) <= set(law)
    for places, probability in law.items():
        error = math.sqrt(probability * (1 - probability) / draws)
        assert abs(seen[places] / draws - probability) < 5 * error


@pytest.mark.parametrize(("sizes", "block"), [((6,), 3), ((4, 5), 3), ((3, 3), 4), ((2, 3, 2), 2)], ids=str)
def test_two_positions_of_a_map_covary_as_their_windows_overlap(
    sizes: tuple[int, ...], block: int, way: str
) -> None:
    p, draws = 0.7, 20_000
    kept = masks((draws, 1, *sizes), p, block, "sliding").reshape(draws, -1).double()
    both = kept.T @ kept / draws
    places = list(itertools.product(*map(range, sizes)))
    overlap = torch.tensor(
        [
            [math.prod(max(block - abs(a - b), 0) for a, b in zip(i, j, strict=True)) for j in places]
            for i in places
        ]
    )
    expected = p ** (2 - overlap / block ** len(sizes)).double()
    assert ((both - expected).abs() < 5 * (expected * (1 - expected) / draws).sqrt()).all()


def test_on_the_disjoint_grid_blocks_are_whole_and_independent() -> None:
    kept = masks((20_000, 1, 5, 7), 0.6, 3, "disjoint")[:, 0]
    corners = kept[:, ::3, ::3]
    index = torch.arange(7) // 3
    assert torch.equal(kept, corners[:, index[:5]][:, :, index])
    flat = corners.reshape(20_000, -1).double()
    both = flat.T @ flat / 20_000
    expected = torch.full((6, 6), 0.36, dtype=torch.float64).fill_diagonal_(0.6)
    assert ((both - expected).abs() < 5 * (expected * (1 - expected) / 20_000).sqrt()).all()


@pytest.mark.parametrize("other", [lambda m: (m[::2, 0], m[1::2, 0]), lambda m: (m[:, 0], m[:, 1])])
def test_rows_and_channels_are_independent(other: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    one, two = other(masks((20_000, 2, 4, 4), 0.6, 2, "sliding"))
    both = (one & two).double()
    assert (abs(both.mean(0) - 0.36) < 5 * math.sqrt(0.36 * 0.64 / len(both))).all()


# --- self-normalisation -------------------------------------------------------------------------------------


def test_realised_normalisation_favours_the_border_as_documented() -> None:
    p, draws, shape = 0.9, 3000, (2, 2, 7, 7)
    kept = masks((2 * draws, *shape[1:]), p, 5, "sliding").reshape(draws, 4, 7, 7).double()
    share = kept.mean((1, 2, 3), keepdim=True)
    one = drop_block2d(
        torch.ones(shape, dtype=torch.float64),
        survival_rate=p,
        block_size=5,
        normalise="realised",
        generator=torch.Generator().manual_seed(3),
    )
    mask = masks(shape, p, 5, "sliding", 3).double()
    assert torch.allclose(one, mask / mask.mean(), rtol=1e-14)
    mean = (kept / share).mean((0, 1))
    covariance = ((kept - p) * (share - p)).mean((0, 1))
    first_order = 1 + (share.var() - covariance) / p**2 + (kept.mean((0, 1)) - share.mean()) / p
    bias = mean - kept.mean((0, 1)) / share.mean()
    assert bias[3, 3] < 0 < min(bias[i, j] for i in (0, 6) for j in (0, 6))
    assert float((mean - first_order).abs().max()) < 0.3 * float(bias.abs().max())

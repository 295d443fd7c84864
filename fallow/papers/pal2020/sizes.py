"""How much of `pal2020` each scale runs, and the cells that follow from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fallow.papers import _experiments
from fallow.papers._experiments import Cell, cells_of
from fallow.papers.pal2020.cells import adaptive_cell, descent_cell, minimum_cell, point_cell, widths_cell
from fallow.papers.pal2020.deep import deep_cell

# The set-ups of the theory notes, 10.2; a target of 120 x 80, and 160 hidden units.
COMMON = {"outputs": 120, "samples": 80}
RATE, WIDTH, LEARNING_RATE, WINDOWS = 0.5, 160, 0.01, 40
CURVES, OPTIMA = (1, 8, 16, 32), (1, 4, 8, 16, 32, 80)
SLIDING = (8, 16, 32)
BASE_RATE, ADAPTIVE = 0.9, (1, 2, 5, 10, 20, 40)
WIDTHS = (20, 40, 80, 160, 320, 640, 1280)

# Minutes on one core: of 1000 steps of descent with its twin on (1), and without it; of 1000 iterations.
_PER_STEP, _PER_PLAIN, _PER_ITERATION = 2.0 / 60, 0.9 / 60, 3.3 / 60


@dataclass(frozen=True)
class Deep:
    """Deep networks on one image set.

    Attributes:
        name: for plots.
        options: of `deep_cell`, without block size, method and steps.
        block_sizes: r.
        methods: method -> steps.
        minutes: method -> minutes of one cell on one core.
    """

    name: str
    options: Mapping[str, Any]
    block_sizes: Sequence[int]
    methods: Mapping[str, int]
    minutes: Mapping[str, float]


@dataclass(frozen=True)
class Size:
    """What one scale runs: steps of descent, iterations of L-BFGS, seeds of a pair, masks at a point."""

    steps: int
    iterations: int
    seeds: int
    draws: int
    deep: Sequence[Deep]


_DEEP = {"survival_rate": RATE, "learning_rate": 3e-3, "seed": 0}


def _images(data: str, images: int, net: str, targets: str, width: int = 48, **other: Any) -> dict[str, Any]:
    return {**_DEEP, "data": data, "images": images, "net": net, "targets": targets, "width": width, **other}


SIZES = {
    "tiny": Size(
        steps=6000,
        iterations=1000,
        seeds=3,
        draws=3000,
        deep=tuple(
            Deep(
                f"digits (128), MLP, {targets}",
                _images("digits", 128, "mlp-128", targets),
                (1, 4, 8),
                {"minimise": 1000, "sampled": 5000},
                {"minimise": 3.5 / 60, "sampled": 7.5 / 60},
            )
            for targets in ("teacher", "falling")
        ),
    ),
    "small": Size(
        steps=20_000,
        iterations=4000,
        seeds=5,
        draws=10_000,
        deep=(
            *(
                Deep(
                    f"digits (256), MLP, {targets}",
                    _images("digits", 256, "mlp-256", targets),
                    (1, 4, 8),
                    {"minimise": 1500, "sampled": 6000},
                    {"minimise": 0.2, "sampled": 0.65},
                )
                for targets in ("teacher", "falling")
            ),
            Deep(
                "Fashion-MNIST (500), MLP, teacher",
                _images("fashion-mnist", 500, "mlp-256", "teacher"),
                (1, 8),
                {"minimise": 1500, "sampled": 3000},
                {"minimise": 0.7, "sampled": 1.1},
            ),
            Deep(
                "CIFAR-10 (200), ResNet-8, teacher",
                _images("cifar10", 200, "resnet-8", "teacher"),
                (1, 8),
                {"adam": 600, "sampled": 600},
                {"adam": 2.7, "sampled": 2.7},
            ),
        ),
    ),
    "full": Size(
        steps=600_000,
        iterations=8000,
        seeds=5,
        draws=100_000,
        deep=(
            Deep(
                "MNIST (2,000), MLP, falling",
                _images("mnist", 2000, "mlp-1024", "falling"),
                (1, 4, 8, 16),
                {"minimise": 6000, "sampled": 60_000},
                {"minimise": 20.0, "sampled": 60.0},
            ),
            *(
                Deep(
                    f"CIFAR-10 (5,000), ResNet-{depth}, {targets}",
                    _images("cifar10", 5000, f"resnet-{depth}", targets, 96, learning_rate=1e-3),
                    (1, 4, 8, 16),
                    {"adam": 8000, "sampled": 16_000},
                    {"adam": 20.0 * depth / 20, "sampled": 40.0 * depth / 20},
                )
                for depth in (20, 56)
                for targets in ("teacher", "falling")
            ),
        ),
    ),
}


def _descent(size: Size, law: str, block_size: int, masks: str, both: bool, seed: int = 0) -> Cell:
    options = {"law": law, "survival_rate": RATE, "block_size": block_size, "masks": masks, "width": WIDTH}
    options |= {**COMMON, "steps": size.steps, "learning_rate": LEARNING_RATE, "windows": WINDOWS}
    tags = {"work": "descent", "law": law, "r": block_size, "masks": masks, "seed": seed}
    minutes = size.steps / 1000 * (_PER_STEP if both else _PER_PLAIN)
    name = f"descent-{law}-r{block_size}-{masks}-seed{seed}"
    return Cell(name, {**options, "both": both, "seed": seed}, tags, minutes, descent_cell)


def _minimum(size: Size, law: str, block_size: int) -> Cell:
    options = {"law": law, "survival_rate": RATE, "block_size": block_size, "width": WIDTH, **COMMON}
    tags = {"work": "minimum", "law": law, "r": block_size, "seed": 0}
    minutes = size.iterations / 1000 * _PER_ITERATION
    more = {"iterations": size.iterations, "seed": 0}
    return Cell(f"minimum-{law}-r{block_size}", {**options, **more}, tags, minutes, minimum_cell)


def _curves(size: Size) -> list[Cell]:
    blocks = [_descent(size, "disjoint", r, "row", True) for r in CURVES]
    return [*blocks, _descent(size, "dropconnect", 1, "batch", True)]


def _optimum(size: Size) -> list[Cell]:
    walks = [_descent(size, "disjoint", r, "row", r in CURVES) for r in OPTIMA]
    return [*(_minimum(size, "disjoint", r) for r in OPTIMA), *walks]


def _sliding(size: Size) -> list[Cell]:
    return [
        *(_descent(size, law, r, "row", True) for law in ("disjoint", "sliding") for r in SLIDING),
        *(_minimum(size, law, r) for law in ("disjoint", "sliding") for r in SLIDING),
    ]


def _pairs(size: Size) -> list[Cell]:
    """Dropout and DropConnect from the same starts, a mask a step; the first DropConnect's beside (1)."""
    laws = ("disjoint", "dropconnect")
    return [
        _descent(size, law, 1, "batch", law == "dropconnect" and seed == 0, seed)
        for seed in range(size.seeds)
        for law in laws
    ]


def _points(size: Size) -> list[Cell]:
    return [
        Cell(
            f"point-{'whitened' if whitened else 'correlated'}",
            {"whitened": whitened, "survival_rate": 0.7, "draws": size.draws, "seed": 0},
            {"work": "point", "whitened": whitened, "seed": 0},
            max(size.draws / 1000 * 0.45 / 60, 0.01),
            point_cell,
        )
        for whitened in (True, False)
    ]


def _adaptive(size: Size) -> list[Cell]:
    made = []
    for r in ADAPTIVE:
        options = {"base_rate": BASE_RATE, "block_size": r, "width": WIDTH, **COMMON}
        options |= {"iterations": size.iterations, "seed": 0}
        minutes = size.iterations / 1000 * _PER_ITERATION
        tags = {"work": "adaptive", "r": r, "seed": 0}
        made.append(Cell(f"adaptive-r{r}", options, tags, minutes, adaptive_cell))
    options = {"base_rate": BASE_RATE, "fixed_rate": RATE, "block_size": 10, "widths": list(WIDTHS), **COMMON}
    return [*made, Cell("widths", options, {"work": "widths"}, 0.01, widths_cell)]


def _deep(size: Size) -> list[Cell]:
    made = []
    for deep in size.deep:
        stem = "-".join(str(deep.options[key]) for key in ("data", "net", "targets"))
        for r in deep.block_sizes:
            for method, steps in deep.methods.items():
                options = {**deep.options, "block_size": r, "method": method, "steps": steps}
                tags = {"work": "deep", "task": deep.name, "r": r, "method": method, "seed": 0}
                minutes = deep.minutes[method]
                made.append(Cell(f"deep-{stem}-r{r}-{method}", options, tags, minutes, deep_cell))
    return made


_MAKERS = {
    "curves": _curves,
    "optimum": _optimum,
    "sliding": _sliding,
    "pairs": _pairs,
    "points": _points,
    "adaptive": _adaptive,
    "deep": _deep,
}
CELLS = cells_of(_MAKERS, SIZES)
by_scale = partial(_experiments.by_scale, CELLS)

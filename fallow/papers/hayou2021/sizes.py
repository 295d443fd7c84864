"""How much of `hayou2021` each scale runs, and the cells that follow from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fallow.papers import _experiments
from fallow.papers._experiments import Cell, cells_of
from fallow.papers.hayou2021.cells import growth_cell, law_cell, penalty_cell
from fallow.papers.hayou2021.toys import toy_cell

LINEAR_FROM = 0.55  # Linear has no rates for budgets much below a half
BUDGET = 0.7  # of the growth figure
_DEPTHS = {"stable": (5, 20, 80), "vanilla": (5, 20)}


@dataclass(frozen=True)
class Images:
    """A classification: options of `fallow train`, budgets, seeds, minutes of a dense run on one core."""

    task: str
    options: Mapping[str, Any]
    budgets: Sequence[float]
    seeds: int
    minutes: float


@dataclass(frozen=True)
class Size:
    """What one scale runs."""

    growth: Mapping[str, int]
    law: Mapping[str, Any]
    penalty: Mapping[str, Any]
    toys: Mapping[str, int]  # toy -> training steps
    toy_budgets: Sequence[float]
    toy_seeds: int
    images: Sequence[Images] = field(default_factory=tuple)


TOYS = {"teacher": "interchangeable blocks (toy 1)", "planted": "planted blocks (toy 2)"}
_STEP = 4.5e-3 / 60  # minutes of a toy's training step with every block

_HUANG = {"preset": "huang", "scale": "eval", "mode": "batch", "batch_size": 64}
SIZES = {
    "tiny": Size(
        growth={"depth": 50, "width": 256, "draws": 8, "masks": 256},
        law={"width": 128, "masks": 2048, "steps": 150, "seeds": 3, **_DEPTHS},
        penalty={"budgets": (0.75,), "seeds": 4, "steps": 300, "looks": 6, "masks": 128},
        toys={"teacher": 400, "planted": 600},
        toy_budgets=(0.3, 0.5, 0.75, 0.9),
        toy_seeds=4,
        images=(
            Images(
                "digits, ResNet-20",
                {**_HUANG, "data": "digits", "model": "resnet20", "epochs": 12},
                (0.3, 0.6, 0.9),
                4,
                0.12,
            ),
        ),
    ),
    "small": Size(
        growth={"depth": 50, "width": 512, "draws": 16, "masks": 512},
        law={"width": 256, "masks": 4096, "steps": 500, "seeds": 3, **_DEPTHS},
        penalty={"budgets": (0.6, 0.75), "seeds": 4, "steps": 1500, "looks": 10, "masks": 256},
        toys={"teacher": 1500, "planted": 2500},
        toy_budgets=(0.2, 0.3, 0.5, 0.6, 0.75, 0.9),
        toy_seeds=6,
        images=(
            Images(
                "digits, ResNet-56",
                {**_HUANG, "data": "digits", "model": "resnet56", "epochs": 20},
                (0.3, 0.6, 0.9),
                3,
                0.5,
            ),
            Images(
                "Fashion-MNIST (5,000 images), ResNet-20",
                {**_HUANG, "data": "fashion-mnist", "train_size": 5000, "model": "resnet20", "epochs": 8},
                (0.3, 0.6, 0.9),
                3,
                1.5,
            ),
            Images(
                "CIFAR-10 (5,000 images), ResNet-20",
                {**_HUANG, "data": "cifar10", "train_size": 5000, "model": "resnet20", "epochs": 12},
                (0.3, 0.6, 0.9),
                3,
                2.8,
            ),
        ),
    ),
    "full": Size(
        growth={"depth": 50, "width": 512, "draws": 64, "masks": 1024},
        law={"width": 512, "masks": 8192, "steps": 1500, "seeds": 5, **_DEPTHS},
        penalty={"budgets": (0.6, 0.75), "seeds": 5, "steps": 1500, "looks": 15, "masks": 1000},
        toys={"teacher": 1500, "planted": 2500},
        toy_budgets=(0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9),
        toy_seeds=10,
        images=tuple(
            Images(
                f"{title}, ResNet-{depth}",
                {**_HUANG, "data": name, "model": f"resnet{depth}", "epochs": 164, "weight_decay": 1e-4},
                (0.2, 0.4, 0.6, 0.8, 0.9),
                3,
                60.0 * depth / 56,
            )
            for name, title in (("cifar10", "CIFAR-10"), ("cifar100", "CIFAR-100"))
            for depth in (56, 110)
        ),
    ),
}


def _growth(size: Size) -> list[Cell]:
    made = []
    for kind in ("vanilla", "scaled"):
        for rule in ("standard", "uniform", "linear"):
            options = {"kind": kind, "rule": rule, "budget": BUDGET, **size.growth}
            work = size.growth["draws"] * size.growth["masks"] * size.growth["width"] ** 2
            words = "stable, 1/√L" if kind == "scaled" else kind
            name, tags = f"growth-{kind}-{rule}", {"kind": words, "rule": rule}
            made.append(Cell(name, options, tags, max(work / 8e9, 0.02), growth_cell))
    return made


def _law(size: Size) -> list[Cell]:
    plan = dict(size.law)
    seeds, depths = plan.pop("seeds"), {net: plan.pop(net) for net in ("stable", "vanilla")}
    made = []
    for net, trained, seed in ((n, t, s) for n in depths for t in (False, True) for s in range(seeds)):
        for depth in depths[net]:
            options = {"scaled": net == "stable", "trained": trained, "depth": depth, "budget": 0.5, **plan}
            tags = {"net": net, "trained": trained, "depth": depth, "seed": seed}
            minutes = 0.02 + trained * plan["steps"] * depth * 3e-6 * plan["width"] / 128
            name = f"law-{net}-{'trained' if trained else 'initial'}-L{depth}-seed{seed}"
            made.append(Cell(name, {**options, "seed": seed}, tags, minutes, law_cell))
    return made


def _penalty(size: Size) -> list[Cell]:
    plan = dict(size.penalty)
    budgets, seeds = plan.pop("budgets"), plan.pop("seeds")
    return [
        Cell(
            f"penalty-{rule}-{budget:g}-seed{seed}",
            {"rule": rule, "budget": budget, "depth": 16, "width": 64, "seed": seed, **plan},
            {"rule": rule, "budget": budget, "seed": seed},
            plan["steps"] * _STEP + (plan["looks"] + 1) * plan["masks"] * 2e-5,
            penalty_cell,
        )
        for budget in budgets
        for rule in ("uniform", "linear")
        for seed in range(seeds)
    ]


def arms(budgets: Sequence[float]) -> list[tuple[str, float]]:
    """(rule, budget) of an error figure: Standard once, Linear where it has rates."""
    rules = [(rule, b) for b in budgets for rule in ("uniform", "linear", "sensemode")]
    return [("standard", 1.0), *((rule, b) for rule, b in rules if rule != "linear" or b >= LINEAR_FROM)]


def _toys(size: Size) -> list[Cell]:
    made = []
    for toy, steps in size.toys.items():
        for rule, budget in arms(size.toy_budgets):
            for seed in range(size.toy_seeds):
                options = {"toy": toy, "rule": rule, "budget": budget, "seed": seed, "steps": steps}
                tags = {"task": TOYS[toy], "rule": rule, "budget": budget, "seed": seed}
                minutes = steps * _STEP * (0.2 + 0.8 * budget)
                made.append(Cell(f"{toy}-{rule}-{budget:g}-seed{seed}", options, tags, minutes, toy_cell))
    return made


def _images(size: Size) -> list[Cell]:
    made = []
    for images in size.images:
        stem = f"{images.options['data']}-{images.options['model']}"
        for rule, budget in arms(images.budgets):
            chosen = (
                {"rates": "uniform", "survival_rate": 1.0}
                if rule == "standard"
                else {"rates": rule, "budget": budget}
            )
            for seed in range(images.seeds):
                tags = {"task": images.task, "rule": rule, "budget": budget, "seed": seed}
                options = {**images.options, **chosen, "seed": seed}
                name = f"{stem}-{rule}-{budget:g}-seed{seed}"
                made.append(Cell(name, options, tags, images.minutes * (0.15 + 0.85 * budget)))
    return made


_MAKERS = {"growth": _growth, "law": _law, "penalty": _penalty, "toys": _toys, "images": _images}
CELLS = cells_of(_MAKERS, SIZES)
by_scale = partial(_experiments.by_scale, CELLS)


def sensemode_cells() -> dict[str, list[Cell]]:
    """Every training with SenseMode, by scale."""
    both = by_scale("toys", "images")
    return {scale: [c for c in cells if c.tags["rule"] == "sensemode"] for scale, cells in both.items()}

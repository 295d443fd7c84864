"""How much of `huang2016` each scale runs, and the cells that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fallow.papers import _experiments
from fallow.papers._experiments import Cell, cells_of
from fallow.papers.huang2016.timing import timing_cell

LAST = 0.5  # p_L of all of the paper's tables
# The authors' training: one draw a batch, no 1/p in training, and an optimiser that moves what rested too.
PAPERS = {
    "preset": "huang",
    "mode": "batch",
    "sampler": "bernoulli",
    "scale": "eval",
    "grads": "zero",
    "rates": "linear",
    "last": LAST,
}
# The paper has no such comparison: the same rates, so the same expected cost, in other ways. By rows a branch
# hardly ever rests for a whole batch, so "zero" and "none" are one there.
WAYS: Mapping[str, Mapping[str, str]] = {
    "bernoulli, batch, zero": {},
    "bernoulli, batch, none": {"grads": "none"},
    "exact, batch, zero": {"sampler": "exact"},
    "exact, batch, none": {"grads": "none", "sampler": "exact"},
    "bernoulli, row, none": {"grads": "none", "mode": "row"},
    "exact, row, none": {"grads": "none", "mode": "row", "sampler": "exact"},
}
OWN = next(iter(WAYS))  # the paper's among them
AUGMENTED, AS_THEY_ARE = "augmented", "as they are"
RULES = ("linear", "uniform")
_OVERHEAD = 0.03  # minutes a cell beside its steps: sites are proved, shares of time measured
_SHARE = 0.82  # of a dense step's time, at p_L = 0.5
_FAST = {"channels_last": True}  # four fifths of the other layout's time on a CPU


@dataclass(frozen=True)
class Images:
    """A classification.

    Attributes:
        title: in words.
        data: the image set.
        depth: of the ResNet.
        minutes: of one constant-depth training on one core.
        seeds: how many.
        options: of `fallow train`, beside the paper's.
        augmented: with augmentation, without, or both.
        test_every: epochs between test errors where constant and stochastic depth stand side by side.
        variant: in the names of cells, where the same images and depth are there in another form.
    """

    title: str
    data: str
    depth: int
    minutes: float
    seeds: int
    options: Mapping[str, Any]
    augmented: Sequence[bool] = (True, False)
    test_every: int | None = None
    variant: str = ""

    def task(self, augmented: bool) -> str:
        """Its name in plots and tables."""
        return f"{self.title}, ResNet-{self.depth}, {AUGMENTED if augmented else AS_THEY_ARE}"


@dataclass(frozen=True)
class Size:
    """What one scale runs.

    Attributes:
        images: of tables and curves, constant and stochastic depth side by side.
        swept: of these the place of the one that p_L is varied on, augmented.
        last: the values of p_L beside 0.5.
        heat: depth -> minutes of one training of the same images at that depth.
        warm: the values of p_L of the heat map beside 0.5 and 1.
        seeds: of p_L and of the ablation.
        deep: the very deep net.
        rounds: timed steps of each arm of the ablation.
        ablated: the place of the images that the ablation trains on, augmented.
    """

    images: Sequence[Images]
    swept: int
    last: Sequence[float]
    heat: Mapping[int, float]
    warm: Sequence[float]
    seeds: int
    deep: Images
    rounds: int
    ablated: int = 0


def _digits(depth: int, minutes: float, seeds: int, epochs: int) -> Images:
    return Images("digits", "digits", depth, minutes, seeds, {"epochs": epochs}, test_every=_every(epochs))


def _some(name: str, title: str, depth: int, minutes: float, seeds: int, **options: Any) -> Images:
    every = options.pop("test_every", _every(options["epochs"]))
    return Images(title, name, depth, minutes, seeds, {"batch_size": 64, **options}, test_every=every)


def _every(epochs: int) -> int | None:
    """Epochs between test errors: a quarter of a short training's, ten of a long one's, none of a few's."""
    return min(epochs // 4, 10) or None


def _cifar(depth: int, minutes: float, augmented: Sequence[bool] = (True, False), **more: Any) -> Images:
    options = {"epochs": 12, "train_size": 10_000, "batch_size": 64, **_FAST, **more}
    title = "CIFAR-10 (10,000 images)"
    return Images(title, "cifar10", depth, minutes, 3, options, augmented, _every(options["epochs"]))


def _fashion(minutes: float, epochs: int, also: str = "") -> Images:
    title = f"Fashion-MNIST (4,000 images{also})"
    return _some("fashion-mnist", title, 20, minutes, 3, epochs=epochs, train_size=4000, **_FAST)


SIZES = {
    "tiny": Size(
        images=(
            _digits(20, 0.12, 3, 20),
            _some(
                "fashion-mnist",
                "Fashion-MNIST (1,000 images)",
                20,
                0.35,
                2,
                epochs=8,
                train_size=1000,
                batch_size=32,
                test_every=None,  # there are ten images to test for one to train on
                **_FAST,
            ),
        ),
        swept=0,
        last=(0.2, 0.8),
        heat={20: 0.12, 32: 0.19},
        warm=(0.2, 0.8),
        seeds=2,
        deep=_some("digits", "digits (96 images)", 1202, 0.6, 1, epochs=2, train_size=96, batch_size=16),
        rounds=150,
    ),
    "small": Size(
        images=(
            # from the full learning rate on its loss stays near chance for the first third of the training
            _cifar(56, 11.0, (True,), learning_rate_warmup=2.0),
            _cifar(20, 4.0),
            _fashion(1.3, 12),
            # the noise is to help where nets overfit, which takes longer
            replace(_fashion(9.0, 100, ", 100 epochs"), augmented=(False,), variant="-long"),
        ),
        swept=2,
        last=(0.2, 0.4, 0.6, 0.8),
        heat={20: 1.3, 32: 2.1, 44: 2.9},
        warm=(0.2, 0.8),
        seeds=3,
        deep=_some("cifar10", "CIFAR-10 (96 images)", 1202, 3.0, 1, epochs=2, train_size=96, batch_size=16),
        rounds=150,
        ablated=2,
    ),
    "full": Size(
        images=(
            _some("cifar10", "CIFAR-10", 110, 9000.0, 3, epochs=500, batch_size=128),
            _some("cifar100", "CIFAR-100", 110, 9000.0, 3, epochs=500, batch_size=128),
            Images("SVHN", "svhn", 152, 18000.0, 3, {"epochs": 50, "batch_size": 128}, (False,), 10),
        ),
        swept=0,
        last=(0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9),
        heat={20: 1600.0, 32: 2600.0, 44: 3600.0, 56: 4600.0, 110: 9000.0},
        warm=(0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9),
        seeds=1,
        deep=_some(
            "cifar10", "CIFAR-10", 1202, 60000.0, 1, epochs=300, batch_size=128, learning_rate_warmup=10.0
        ),
        rounds=150,
    ),
}


def _options(images: Images, augmented: bool, seed: int, **more: Any) -> dict[str, Any]:
    """Of a run as the paper has it, but for what `more` says."""
    own = {"data": images.data, "model": f"resnet{images.depth}", **images.options}
    return {**PAPERS, **own, "augment": augmented, "seed": seed, **more}


def _name(images: Images, augmented: bool) -> str:
    return f"{images.data}-resnet{images.depth}{images.variant}{'' if augmented else '-plain'}"


def _pair(images: Images, augmented: bool, seed: int, **tags: Any) -> Cell:
    """Constant and stochastic depth, step by step in turn from the same weights on the same batches."""
    name = f"{_name(images, augmented)}-pair-seed{seed}"
    options = _options(images, augmented, seed, twin=True, test_every=images.test_every)
    found = {"task": images.task(augmented), "data": images.data, "depth": images.depth}
    found |= {"augmented": augmented, "rule": "linear", "last": LAST, "way": OWN, "seed": seed, **tags}
    return Cell(name, options, found, images.minutes * (1 + _SHARE) + _OVERHEAD)


def _alone(images: Images, seed: int, rule: str, last: float, way: str = OWN) -> Cell:
    """Stochastic depth alone, on augmented images; p_L = 1 is constant depth."""
    rates = {"rates": rule, "last": last}
    if rule == "uniform" or last == 1:
        rates = {"rates": "uniform", "survival_rate": last, "last": None}
    options = _options(images, True, seed, **rates, **WAYS[way])
    kind = f"{rule}-{last:g}" if way == OWN else way.replace(", ", "-")
    tags = {"task": images.task(True), "data": images.data, "depth": images.depth, "augmented": True}
    tags |= {"rule": rule, "last": last, "way": way, "seed": seed}
    rests = (1 - last) / (2 if rule == "linear" else 1)
    minutes = images.minutes * (1 - 0.9 * rests) + _OVERHEAD
    return Cell(f"{_name(images, True)}-{kind}-seed{seed}", options, tags, minutes)


def _tables(size: Size) -> list[Cell]:
    return [
        _pair(images, augmented, seed)
        for images in size.images
        for augmented in images.augmented
        for seed in range(images.seeds)
    ]


def _sweep(size: Size) -> list[Cell]:
    """p_L varied for both rules; constant depth, and the linear rule at 0.5, are those of the tables."""
    images = size.images[size.swept]
    made = [_pair(images, True, seed) for seed in range(size.seeds)]
    for rule in RULES:
        for last in sorted({*size.last, LAST}):
            if (rule, last) != ("linear", LAST):
                made += [_alone(images, seed, rule, last) for seed in range(size.seeds)]
    return made


def _heat(size: Size) -> list[Cell]:
    """p_L by depth, the linear rule; what the tables and the other figure have is taken from there."""
    swept = size.images[size.swept]
    made = []
    for depth, minutes in size.heat.items():
        if depth == swept.depth:
            known = _sweep(size)
            made += [c for c in known if c.tags["rule"] == "linear" and c.tags["last"] in (*size.warm, LAST)]
            continue
        images = replace(swept, depth=depth, minutes=minutes, test_every=None)
        for seed in range(size.seeds):
            made.append(_pair(images, True, seed))
            made += [_alone(images, seed, "linear", last) for last in size.warm]
    return made


def _deep(size: Size) -> list[Cell]:
    return [_pair(size.deep, True, seed) for seed in range(size.deep.seeds)]


def _ablation(size: Size) -> list[Cell]:
    """Other ways at the same rates; the paper's, and constant depth, are those of the tables."""
    images = size.images[size.ablated]
    made = [_pair(images, True, seed) for seed in range(size.seeds)]
    made += [
        _alone(images, seed, "linear", LAST, way) for way in WAYS if way != OWN for seed in range(size.seeds)
    ]
    options = {"data": images.data, "options": _options(images, True, 0), "ways": WAYS, "rounds": size.rounds}
    tags = {"work": "timing", "task": images.task(True)}
    name = f"{_name(images, True)}-timing"
    return [*made, Cell(name, options, tags, 0.2, timing_cell)]


_MAKERS: Mapping[str, Callable[[Size], list[Cell]]] = {
    "tables": _tables,
    "sweep": _sweep,
    "heat": _heat,
    "deep": _deep,
    "ablation": _ablation,
}
CELLS = cells_of(_MAKERS, SIZES)
by_scale = partial(_experiments.by_scale, CELLS)

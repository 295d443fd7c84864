"""How much of `lejeune2021` each scale runs, and the cells that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fallow.papers import _experiments
from fallow.papers._experiments import Cell, cells_of
from fallow.papers.lejeune2021.figure import penalties_cell
from fallow.papers.lejeune2021.methods import METHODS
from fallow.papers.lejeune2021.train import train_cell

# In the order of the authors' table; the eta-Trick is there with either dual function.
SEVEN = ("vardrop-lr-ar", "vardrop-lr", "vardrop", "eta-trick", "adaprox", "adatikhonov", "logsum")
AS_PUBLISHED = {"eta-trick": "eta-trick-published"}
LOGSUM, VARDROP, PEER, SPARSE = "logsum-target", "vardrop-target", "magnitude", "sparse-vd"
OURS = (LOGSUM, VARDROP)
BATCH = {SPARSE: 100}
PUBLISHED_EPOCHS, PUBLISHED_DATA = 200, "mnist"

# By validation error at a 100th of the weights, see the item tuning. The dual of variational dropout of
# 60,000 images would have a strength of 3.2e-5.
_OWN: Mapping[str, Mapping[str, Any]] = {
    LOGSUM: {"eps": 0.05, "strength": 1e-5},
    VARDROP: {"ramp": [0.1, 0.9]},
    PEER: {"ramp": [0.1, 0.5]},
    SPARSE: {},
}
_RATE: Mapping[str, float] = {LOGSUM: 3e-3, VARDROP: 3e-3, PEER: 1e-3}
# What was tried, more settings of the peer than of either of ours: learning rates, and for each these.
TRIED_RATES: Mapping[str, Sequence[float]] = {
    PEER: (3e-4, 1e-3, 3e-3, 6e-3),
    LOGSUM: (1e-3, 3e-3, 6e-3),
    VARDROP: (1e-3, 3e-3, 6e-3),
}
TRIED: Mapping[str, Sequence[Mapping[str, Any]]] = {
    PEER: ({"ramp": [0.1, 0.5]}, {}, {"ramp": [0.1, 0.85]}, {"ramp": [0.3, 0.7]}, {"ramp": [0.1, 0.3]}),
    LOGSUM: tuple({"eps": eps, "strength": strength} for eps in (0.05, 0.2) for strength in (1e-5, 3e-5)),
    VARDROP: ({"ramp": [0.1, 0.9]}, {"ramp": [0.1, 0.9], "strength": 3.0}, {}),
}
# Seconds an epoch of 48,000 images on one core, by method; of digits, by how much less.
_SECONDS = {
    "vardrop-lr-ar": 2.9,
    "vardrop-lr": 2.7,
    "vardrop": 2.1,
    "eta-trick": 1.4,
    "eta-trick-published": 2.8,
    "adaprox": 1.7,
    "adatikhonov": 1.9,
    "logsum": 1.5,
    SPARSE: 3.7,
    PEER: 1.4,
    LOGSUM: 1.7,
    VARDROP: 3.3,
}
_DIGITS = 1 / 100


@dataclass(frozen=True)
class Size:
    """What one scale runs.

    Attributes:
        data: the image set.
        epochs: of every training.
        seeds: of each method.
        repeats: seeds of each recipe beside the methods.
        faster: factor of the published learning rates: with fewer steps weights could not move as far.
        slower: by method, a factor beside it.
        plain: compressions to reach, of images as they are.
        shifted: compressions to reach, of images moved by up to one pixel.
        tuned: the compression at which settings are compared; 0: they are not.
    """

    data: str
    epochs: int
    seeds: int
    repeats: int
    faster: float
    plain: Sequence[int]
    shifted: Sequence[int]
    tuned: int = 0
    slower: Mapping[str, float] = field(default_factory=dict)


SIZES = {
    "tiny": Size(
        data="digits",
        epochs=300,
        seeds=2,
        repeats=2,
        faster=30.0,
        plain=(20,),
        shifted=(),
        slower=dict.fromkeys(("eta-trick", "eta-trick-published"), 1 / 3),
    ),
    "small": Size(
        data="mnist",
        epochs=40,
        seeds=1,
        repeats=3,
        faster=5.0,
        plain=(80, 100),
        shifted=(80, 120),
        tuned=100,
    ),
    "full": Size(data="mnist", epochs=200, seeds=3, repeats=3, faster=1.0, plain=(100,), shifted=(120,)),
}


def _cell(size: Size, method: str, seed: int, name: str, more: Mapping[str, Any], **tags: Any) -> Cell:
    options = {
        "method": method,
        "data": size.data,
        "validation": True,
        "epochs": size.epochs,
        "batch_size": BATCH.get(method, 128),
        "learning_rate": round(METHODS[method].learning_rate * size.faster * size.slower.get(method, 1.0), 9),
        "shift": 0,
        "settings": {},
        "seed": seed,
        **more,
    }
    seconds = _SECONDS[method] * size.epochs * (_DIGITS if size.data == "digits" else 1.0)
    if not options["validation"]:
        seconds *= 1.25
    return Cell(name, options, {"method": method, "seed": seed, **tags}, seconds / 60, train_cell)


def _figure1(_: Size) -> list[Cell]:
    options = {"points": 100, "size": 32, "kept": 16}
    return [Cell("penalties", options, {"work": "penalties"}, 0.01, penalties_cell)]


def _methods(size: Size) -> list[Cell]:
    """The seven methods, the eta-Trick twice."""
    return [
        _cell(size, method, seed, f"{method}-seed{seed}", {})
        for seed in range(size.seeds)
        for method in (*SEVEN, *AS_PUBLISHED.values())
    ]


def _beyond(size: Size) -> list[Cell]:
    """Recipes beside the seven, trained on all training images: their settings were chosen before."""
    made = []
    for seed in range(size.repeats):
        own = {"validation": False, "learning_rate": METHODS[SPARSE].learning_rate}
        made.append(_cell(size, SPARSE, seed, f"{SPARSE}-seed{seed}", own, shift=0, goal=0))
        for shift, goals in ((0, size.plain), (1, size.shifted)):
            for goal in goals:
                # noise on the weights is for images of which a network of this size learns each by heart
                for method in (PEER, LOGSUM) if shift else (PEER, *OURS):
                    more = {
                        "validation": False,
                        "learning_rate": _RATE[method],
                        "shift": shift,
                        "settings": {**_OWN[method], "target": 1 - 1 / goal},
                    }
                    moved = "-shifted" if shift else ""
                    name = f"{method}-{goal}x{moved}-seed{seed}"
                    made.append(_cell(size, method, seed, name, more, shift=shift, goal=goal))
    return made


def _tuning(size: Size) -> list[Cell]:
    """Settings of the recipes with a target, by validation error."""
    made = []
    for method in (PEER, *OURS) if size.tuned else ():
        for rate in TRIED_RATES[method]:
            for place, own in enumerate(TRIED[method]):
                settings = {**own, "target": 1 - 1 / size.tuned}
                more = {"learning_rate": rate, "settings": settings}
                name = f"tuning-{method}-rate{rate:g}-{place}"
                made.append(_cell(size, method, 0, name, more, used=used(method, rate, own)))
    return made


def used(method: str, rate: float, own: Mapping[str, Any]) -> bool:
    """Whether these are the settings that the recipe has in `_beyond`."""
    return rate == _RATE[method] and own == _OWN[method]


_MAKERS: Mapping[str, Callable[[Size], list[Cell]]] = {
    "figure1": _figure1,
    "methods": _methods,
    "beyond": _beyond,
    "tuning": _tuning,
}
CELLS = cells_of(_MAKERS, SIZES)
by_scale = partial(_experiments.by_scale, CELLS)

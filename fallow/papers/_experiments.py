"""Experiments as data: a paper has items (figures, tables), an item cells, a cell is one piece of work.

A later paper adds a file with a `Paper`; what runs, resumes, gathers and draws is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fallow.errors import UsageError, nearest

SCALES = ("tiny", "small", "full")

# Whether a number or a statement may be called the paper's depends on how we know it.
LABELS = {
    "paper": "said by the paper",
    "lit": "from the literature named beside it, not from the paper",
    "derived": "derived for this project and checked numerically, not a number of the paper",
    "memory": "a recollection of the paper, not checked against its text: never to be quoted as its result",
}


@dataclass(frozen=True)
class Known:
    """A value or a statement to hold ours against.

    Attributes:
        name: what it is.
        label: one of LABELS, how we know it.
        source: where it stands.
        value: the number; None for a statement.
    """

    name: str
    label: str
    source: str
    value: float | None = None

    def __post_init__(self) -> None:
        if self.label not in LABELS:
            raise UsageError(f"the label of {self.name!r} must be one of {', '.join(LABELS)}")

    def as_dict(self) -> dict[str, Any]:
        """As the results file holds it."""
        return {"name": self.name, "label": self.label, "source": self.source, "value": self.value}


@dataclass(frozen=True)
class Cell:
    """One piece of work with its own folder.

    Attributes:
        name: the folder's name, unique within its paper and scale.
        options: of `recipes.train.Config` for a training run, else the keyword arguments of `work`.
        tags: what distinguishes it for the plots (rule, budget, seed, ...).
        minutes: what it is expected to take on one core; see `Scale.on_gpu`.
        work: None for a training run; else a function of a module that returns what JSON can hold. It is
            called with `options` and `pieces=`, a function `pieces(name, compute)` that keeps the result of
            each long part, and must be a function of its options alone. Where these name an image set under
            "data" it is called with `data_dir=` too.
    """

    name: str
    options: Mapping[str, Any]
    tags: Mapping[str, Any] = field(default_factory=dict)
    minutes: float = 0.1
    work: Callable[..., Any] | None = None

    @property
    def data(self) -> str | None:
        """The image set that it reads; None for none."""
        return self.options.get("data", None if self.work else "digits")


Cells = Mapping[str, Mapping[str, Sequence[Cell]]]
# What is known of an item's finished cells -> {"panels": [...], "tables": [...], "statements": [...]}.
Gather = Callable[[Sequence[tuple[Cell, Mapping[str, Any]]]], Mapping[str, Any]]


def cells_of(makers: Mapping[str, Callable[[Any], list[Cell]]], sizes: Mapping[str, Any]) -> Cells:
    """Scale -> part of a paper -> its cells, each part made from the scale's size."""
    return {scale: {part: make(size) for part, make in makers.items()} for scale, size in sizes.items()}


def by_scale(cells: Cells, *parts: str) -> dict[str, list[Cell]]:
    """The cells of these parts, each once, by scale."""
    return {
        scale: list({cell.name: cell for part in parts for cell in groups[part]}.values())
        for scale, groups in cells.items()
    }


@dataclass(frozen=True)
class Item:
    """A figure or a table.

    Attributes:
        name: what `--only` takes.
        title: in a few words.
        shows: what is to be seen, and which kind of figure of the paper it stands for.
        cells: by scale; several items may share cells, which then run once.
        gather: makes plots and tables of the cells' results.
        known: what ours is held against.
        differences: from the paper's set-up, by scale; "" holds for all of them.
    """

    name: str
    title: str
    shows: str
    cells: Mapping[str, Sequence[Cell]]
    gather: Gather
    known: tuple[Known, ...] = ()
    differences: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Scale:
    """A size at which a paper is reproduced.

    Attributes:
        about: its settings in words.
        takes: for one that wants a GPU, what it would take; else empty.
        on_gpu: whether the minutes of its cells are a GPU's, not a core's.
    """

    about: str
    takes: str = ""
    on_gpu: bool = False


@dataclass(frozen=True)
class Paper:
    """What is reproduced of a paper.

    Attributes:
        name: what `fallow reproduce` takes.
        title: of the paper.
        cite: authors, place, year and address.
        items: its figures and tables.
        scales: name -> `Scale`.
        notes: what a reader must know of where the numbers come from.
    """

    name: str
    title: str
    cite: str
    items: tuple[Item, ...]
    scales: Mapping[str, Scale]
    notes: tuple[str, ...] = ()

    def chosen(self, only: Sequence[str], scale: str) -> list[Item]:
        """The items of these names at a scale; all of them for no name.

        Raises:
            UsageError: a scale or an item that there is not, or an item that this scale has not.
        """
        if scale not in self.scales:
            raise UsageError(f"{self.name} has no scale {scale}: there are {', '.join(self.scales)}")
        names = [item.name for item in self.items]
        for name in only:
            if name not in names:
                close = nearest(name, names)
                hint = f"did you mean {close}? There" if close else "there"
                raise UsageError(f"{self.name} has no item {name}: {hint} are {', '.join(names)}")
            cells = next(item.cells for item in self.items if item.name == name)
            if not cells.get(scale):
                has = ", ".join(other for other in self.scales if cells.get(other))
                raise UsageError(f"{self.name} has {name} at --scale {has} alone, not at {scale}")
        return [item for item in self.items if not only or item.name in only]

    def cells(self, items: Sequence[Item], scale: str) -> list[Cell]:
        """The cells of these items, each once, the longest first."""
        found = {cell.name: cell for item in items for cell in item.cells.get(scale, ())}
        return sorted(found.values(), key=lambda cell: -cell.minutes)

"""What stands on the page of one document, whatever its kind; the template says how."""

from __future__ import annotations

from dataclasses import dataclass

from fallow.report._shapes import Plot
from fallow.report._tables import Table


@dataclass(frozen=True)
class Tile:
    """One figure in large type."""

    name: str
    value: str
    aside: str


@dataclass(frozen=True)
class Section:
    """One run, plan or explanation on the page."""

    anchor: str
    name: str
    status: str  # empty where there is nothing that could be under way
    warning: str
    headline: str
    tiles: tuple[Tile, ...]
    summary: Table
    plots: tuple[Plot, ...]
    notes: tuple[str, ...]
    details: tuple[Table, ...]
    small: str = ""  # below the summary
    notes_title: str = "Notes on the data"
    source: str = "results.json"
    foot: str = ""
    tables: tuple[Table, ...] = ()  # in cards of their own, below the figures

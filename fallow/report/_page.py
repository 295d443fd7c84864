"""The page: what stands in it, handed to the template that says how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fallow.errors import need
from fallow.report import _plots, _tables, _words
from fallow.report._plots import Plot
from fallow.report._tables import Table
from fallow.report._words import get, number

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Tile:
    """One figure in large type."""

    name: str
    value: str
    aside: str


@dataclass(frozen=True)
class Section:
    """One run on the page."""

    anchor: str
    name: str
    status: str
    warning: str
    headline: str
    tiles: tuple[Tile, ...]
    summary: Table
    plots: tuple[Plot, ...]
    notes: tuple[str, ...]
    details: tuple[Table, ...]


def tiles(results: dict[str, Any]) -> tuple[Tile, ...]:
    """The figures a reader looks for first, those of them that the run has."""
    model, twin = (get(results, "arms", arm, "summary") for arm in ("model", "twin"))
    summary, time = get(results, "summary"), _tables.ideals(results)[0]
    sites = len(_words.records(results.get("sites")))
    error, images = get(model, "test_error"), get(model, "test_images")
    beside = f"on {_words.count(images)} images"
    if number(get(twin, "test_error")) is not None:
        other = _words.with_error(get(twin, "test_error"), get(twin, "test_images"))
        beside = f"constant depth {other}; {_words.verdict(results)}"
    candidates = [
        (
            get(summary, "time_ratio", "median"),
            Tile(
                "time per step",
                _words.plain(get(summary, "time_ratio", "median"), ".2f"),
                f"of constant depth; ideal {_words.plain(time, '.2f')}",
            ),
        ),
        (
            error,
            Tile(
                "test error",
                _words.with_error(error, images),
                beside,
            ),
        ),
        (
            get(summary, "memory_ratio"),
            Tile("peak memory", _words.plain(get(summary, "memory_ratio"), ".2f"), "of constant depth"),
        ),
        (
            get(model, "realised_depth"),
            Tile(
                "mean depth",
                _words.plain(get(model, "realised_depth"), ".1f"),
                f"of {sites} branches worked in a step",
            ),
        ),
    ]
    return tuple(tile for value, tile in candidates if number(value) is not None)


def section(name: str, results: dict[str, Any], index: int) -> Section:
    """One run's part of the page."""
    provenance = get(results, "provenance")
    provenance = dict(provenance) if isinstance(provenance, dict) else {}
    data = provenance.pop("data", None)
    data = dict(data) if isinstance(data, dict) else {}
    notes = data.pop("notes", None)
    details = (
        _tables.pairs("Provenance", provenance),
        _tables.pairs("Data set", data),
        _tables.pairs("Configuration", results.get("config")),
    )
    return Section(
        anchor=f"run-{index + 1}",
        name=name,
        status=str(results.get("status", "unknown")),
        warning=_words.status_words(results),
        headline=_words.headline(results),
        tiles=tiles(results),
        summary=_tables.summary(results),
        plots=tuple(_plots.of_run(results, f"run-{index + 1}-")),
        notes=tuple(note for note in notes if isinstance(note, str)) if isinstance(notes, list) else (),
        details=tuple(table for table in details if table.rows),
    )


def template(name: str) -> Any:
    """A template of this folder; whatever goes into it is escaped."""
    jinja2 = need("jinja2", "lab")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def render(named: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """The page of the runs, (name, results) each."""
    return template("page.html.jinja").render(
        sections=[section(name, results, index) for index, (name, results) in enumerate(named)],
        comparison=_tables.compared(named) if len(named) > 1 else None,
        compared_plots=_plots.of_runs(named) if len(named) > 1 else [],
    )

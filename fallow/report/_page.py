"""The page: what stands in it, handed to the template that says how."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fallow.errors import need
from fallow.report import _explanations, _plans, _plots, _sparse, _sparse_plots, _tables, _words
from fallow.report._section import Section, Tile
from fallow.report._words import get, number

# Kinds of which several results are laid side by side: their table, their figures.
_COMPARED = {
    "train": (_tables.compared, _plots.of_runs),
    "sparsify": (_sparse.compared, _sparse_plots.of_runs),
}
HERE = Path(__file__).parent
_SMALL = "Test errors are given with their binomial standard error."
_PAIRED = (
    " A ratio compares with the constant-depth twin, step by step; the ideal is what resting would give if "
    "nothing but the branches' own work counted."
)
_FOOT = (
    "A test error \u00b1 its standard error covers the chance of the test images, not that of another seed."
)


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
    """One document's part of the page."""
    makers = {"plan": _plans.section, "explanation": _explanations.section, "sparsify": _sparse.section}
    return makers.get(str(results.get("kind")), _of_run)(name, results, index)


def _of_run(name: str, results: dict[str, Any], index: int) -> Section:
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
    summary = _tables.summary(results)
    return Section(
        anchor=f"run-{index + 1}",
        name=name,
        status=str(results.get("status", "unknown")),
        warning=_words.status_words(results),
        headline=_words.headline(results),
        tiles=tiles(results),
        summary=summary,
        plots=tuple(_plots.of_run(results, f"run-{index + 1}-")),
        notes=tuple(note for note in notes if isinstance(note, str)) if isinstance(notes, list) else (),
        details=tuple(table for table in details if table.rows),
        small=_SMALL + (_PAIRED if len(summary.columns) > 2 else ""),
        foot=_FOOT,
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
    """The page of several documents of one kind, (name, results) each."""
    sections = [section(name, results, index) for index, (name, results) in enumerate(named)]
    kind = str(named[0][1].get("kind", "train"))
    comparison, plots = _COMPARED.get(kind, (None, None)) if len(named) > 1 else (None, None)
    return template("page.html.jinja").render(
        sections=sections,
        several=len(named) > 1,
        comparison=comparison(named) if comparison else None,
        compared_plots=plots(named) if plots else [],
        sources=" and ".join(dict.fromkeys(one.source for one in sections)),
        feet=list(dict.fromkeys(one.foot for one in sections if one.foot)),
    )

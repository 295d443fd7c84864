"""The page of a reproduced paper: each of its items with plots, tables, and where every number comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fallow.report import _charts, _page, _tables, _words
from fallow.report._shapes import Plot
from fallow.report._tables import Table
from fallow.report._words import get, number, records


@dataclass(frozen=True)
class Part:
    """One item of a paper on the page."""

    anchor: str
    title: str
    shows: str
    status: str
    statements: tuple[str, ...]
    plots: tuple[Plot, ...]
    tables: tuple[tuple[Table, str], ...]  # with a note
    known: Table
    differences: tuple[str, ...]


@dataclass(frozen=True)
class Sheet:
    """One paper at one scale."""

    anchor: str
    title: str
    cite: str
    scale: str
    status: str
    about: str
    warning: str
    notes: tuple[str, ...]
    remarks: tuple[str, ...]
    parts: tuple[Part, ...]
    details: tuple[Table, ...]


def texts(value: Any) -> tuple[str, ...]:
    """The strings of a list."""
    return tuple(x for x in value if isinstance(x, str)) if isinstance(value, list) else ()


def sheet(results: dict[str, Any], index: int) -> Sheet:
    """What the page says of one results file."""
    paper, provenance = get(results, "paper"), get(results, "provenance")
    provenance = dict(provenance) if isinstance(provenance, dict) else {}
    remarks = texts(provenance.pop("remarks", []))
    labels = get(paper, "labels")
    anchor = f"paper-{index + 1}"
    parts = [part(item, f"{anchor}-{i + 1}", labels) for i, item in enumerate(records(results.get("items")))]
    details = (
        _cells(results),
        _tables.pairs("Provenance", provenance),
        _tables.pairs("What the labels mean", labels),
    )
    return Sheet(
        anchor=anchor,
        title=str(get(paper, "title") or get(paper, "name") or "a paper"),
        cite=str(get(paper, "cite") or ""),
        scale=str(results.get("scale", "")),
        status=str(results.get("status", "unknown")),
        about=str(get(results, "settings", "about") or ""),
        warning=_warning(results),
        notes=texts(get(paper, "notes")),
        remarks=remarks,
        parts=tuple(parts),
        details=tuple(table for table in details if table.rows),
    )


def _warning(results: dict[str, Any]) -> str:
    """What a reader must know of a reproduction that is not whole."""
    cells = records(results.get("cells"))
    done = sum(cell.get("status") == "done" for cell in cells)
    failed: dict[str, list[str]] = {}  # by reason: many cells may fail alike
    for cell in cells:
        if cell.get("status") == "failed":
            failed.setdefault(str(cell.get("message") or ""), []).append(str(cell.get("name")))
    if done == len(cells):
        return ""
    words = f"{done} of {len(cells)} cells are done; what is not there yet is left out below."
    reasons = [", ".join(names) + (f" ({reason})" if reason else "") for reason, names in failed.items()]
    return words + (f" Failed: {'; '.join(reasons)}." if reasons else "")


def part(item: dict[str, Any], anchor: str, labels: Any) -> Part:
    """One item."""
    plots = [_charts.chart(p, f"{anchor}-{i}") for i, p in enumerate(records(item.get("panels")))]
    found = [(_charts.table(t), str(t.get("note") or "")) for t in records(item.get("tables"))]
    status, done, cells = (item.get(key) for key in ("status", "cells_done", "cells"))
    return Part(
        anchor=anchor,
        title=str(item.get("title") or item.get("name") or ""),
        shows=str(item.get("shows") or ""),
        status="" if status == "done" else f"{_words.count(done)} of {_words.count(cells)} cells",
        statements=texts(item.get("statements")),
        plots=tuple(plot for plot in plots if plot is not None),
        tables=tuple((table, note) for table, note in found if table is not None),
        known=known(item, labels),
        differences=texts(item.get("differences")),
    )


def known(item: dict[str, Any], labels: Any) -> Table:
    """What ours is held against, and how that is known."""
    rows = [
        (
            str(one.get("name")),
            _words.plain(one.get("value")) if number(one.get("value")) is not None else "statement",
            f"{one.get('label')}: {get(labels, str(one.get('label'))) or 'unknown label'}",
            str(one.get("source")),
        )
        for one in records(item.get("known"))
    ]
    return Table("Held against", ("what", "value", "how it is known", "source"), tuple(rows))


def _cells(results: dict[str, Any]) -> Table:
    rows = []
    for cell in records(results.get("cells")):
        found = cell.get("found")
        numbers = found.items() if isinstance(found, dict) else ()
        words = ", ".join(f"{key} {_words.plain(value)}" for key, value in numbers)
        seconds = _words.plain(cell.get("seconds"), ".1f")
        rows.append((str(cell.get("name")), str(cell.get("status")), seconds, words or _words.MISSING))
    columns = ("cell", "status", "processor seconds", "found")
    return Table("Every cell", columns, tuple(rows))


def render(results: Sequence[dict[str, Any]]) -> str:
    """The page of one or several results files of papers."""
    sheets = [sheet(one, index) for index, one in enumerate(results)]
    return _page.template("paper.html.jinja").render(sheets=sheets)

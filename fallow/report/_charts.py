"""Plots and tables of a reproduction, drawn from the plain series that its results hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fallow.errors import need
from fallow.report import _svg, _words
from fallow.report._shapes import LOG_FROM, Plot
from fallow.report._svg import COLOUR
from fallow.report._tables import Table
from fallow.report._words import get, number, records

STYLES = ("line", "points", "dashed", "steps")
FEW = 12  # places up to which a line shows its points
_SWATCHES = {"dashed": "dash", "points": "point"}


@dataclass(frozen=True)
class Curve:
    """One curve with its finite points."""

    name: str
    points: tuple[tuple[float, float, float | None], ...]  # x, y, standard error
    style: str
    label: str
    colour: str

    @property
    def words(self) -> str:
        """Its name; for a line that is not ours, how it is known."""
        return self.name if self.label == "ours" else f"{self.name} [{self.label}]"

    @property
    def swatch(self) -> str:
        """Classes of its key in the legend."""
        return f"{_SWATCHES.get(self.style, 'line')} {self.colour}"


def curves(panel: Any) -> list[Curve]:
    """The curves of a panel that have a point."""
    found, groups = [], {}
    for one in records(get(panel, "series")):
        points = _points(one)
        name, style, label = (str(one.get(key, "")) for key in ("name", "style", "label"))
        group = str(one.get("group") or name)
        alone = style == "dashed" and group == name
        if not alone:
            groups.setdefault(group, f"run-{len(groups) % _svg.RUNS}")
        colour = "ink" if alone else groups[group]
        if points:
            found.append(Curve(name, points, style if style in STYLES else "line", label or "ours", colour))
    return found


def _points(one: dict[str, Any]) -> tuple[tuple[float, float, float | None], ...]:
    xs, ys, errors = (found if isinstance(found := one.get(k), list) else [] for k in ("x", "y", "error"))
    errors = [*errors, *[None] * (len(xs) - len(errors))]
    triples = ((number(x), number(y), number(e)) for x, y, e in zip(xs, ys, errors, strict=False))
    return tuple((x, y, e) for x, y, e in triples if x is not None and y is not None)


def chart(panel: dict[str, Any], name: str) -> Plot | None:
    """A panel as a figure with its table; None where it has no point."""
    if panel.get("kind") == "heat":
        return _heat(panel, name)
    found = curves(panel)
    if not found:
        return None
    title, bottom, side, note = (str(panel.get(key) or "") for key in ("title", "x", "y", "note"))
    wanted = panel.get("log") is True
    label = f"{title}. The numbers are in the table beside."
    drawing = _svg.draw(name, label, lambda axes: _paint(axes, found, bottom, side, wanted))
    legend = tuple((curve.swatch, curve.words) for curve in found)
    if any(e is not None for curve in found for *_, e in curve.points):
        note = f"{note} Bars and bands: one standard error.".strip()
    return Plot(name, title, note, drawing, legend, _table(title, bottom, found))


def _paint(axes: Any, found: Sequence[Curve], bottom: str, side: str, wanted: bool) -> None:
    ticker = need("matplotlib.ticker", "lab")
    for curve in found:
        _draw(axes, curve)
    ys = [y for curve in found for _, y, _ in curve.points]
    logarithmic = wanted and min(ys) > 0 and max(ys) / min(ys) >= LOG_FROM
    if logarithmic:
        axes.set_yscale("log")
        dense = max(ys) / min(ys) < 1000
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if dense else (1,), numticks=12))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:g}"))
    whole = all(x == int(x) for curve in found for x, *_ in curve.points)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(7, integer=whole))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}"))
    axes.set_title(side + (", log scale" if logarithmic else ""))
    axes.set_xlabel(bottom)


def _draw(axes: Any, curve: Curve) -> None:
    x, y, errors = zip(*curve.points, strict=True)
    colour = COLOUR[curve.colour]
    if curve.style == "dashed":
        axes.plot(x, y, color=colour, linewidth=1.4, linestyle=(0, (4, 2.5)))
        return
    spread = [e or 0.0 for e in errors]
    dense = len(x) > FEW
    if curve.style == "steps":
        axes.step(x, y, where="mid", color=colour, linewidth=1.4)
    elif curve.style == "points":
        axes.plot(x, y, color=colour, linestyle="none", marker="o", markersize=2.6 if dense else 4)
    else:
        axes.plot(x, y, color=colour, marker=None if dense else "o", markersize=4)
    if not any(spread):
        return
    if dense:
        low, high = ([v + sign * e for v, e in zip(y, spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    else:
        axes.errorbar(x, y, yerr=spread, color=colour, linestyle="none", linewidth=1.2, capsize=2.5)


def _table(title: str, bottom: str, found: Sequence[Curve]) -> Table:
    """A row a place, a column a curve."""
    places = sorted({x for curve in found for x, *_ in curve.points})
    cells = [{x: _with_error(y, e) for x, y, e in curve.points} for curve in found]
    rows = tuple((f"{x:g}", *(column.get(x, _words.MISSING) for column in cells)) for x in places)
    return Table(title, (bottom, *(curve.words for curve in found)), rows)


def _heat(panel: dict[str, Any], name: str) -> Plot | None:
    """A map of numbers, the darker the larger; the numbers are written into it."""
    xs, ys, rows = (found if isinstance(found := panel.get(k), list) else [] for k in ("xs", "ys", "values"))
    cells = [
        (i, j, value)
        for j, row in enumerate(rows[: len(ys)])
        for i, one in enumerate((row if isinstance(row, list) else [])[: len(xs)])
        if (value := number(one)) is not None
    ]
    if not cells:
        return None
    title, bottom, side, note = (str(panel.get(key) or "") for key in ("title", "x", "y", "note"))
    columns, places = [cell(x) for x in xs], [cell(y) for y in ys]
    low, high = min(v for *_, v in cells), max(v for *_, v in cells)

    def paint(axes: Any) -> None:
        for i, j, value in cells:
            share = (value - low) / (high - low) if high > low else 0.5
            shade = 0.08 + 0.62 * share
            axes.bar(i, 0.94, 0.94, j - 0.47, color=COLOUR["run-0"], alpha=shade)
            axes.text(i, j, _words.plain(value, ".3g"), ha="center", va="center", color=COLOUR["ink"])
        axes.set_xticks(range(len(xs)), columns)
        axes.set_yticks(range(len(ys)), places)
        axes.set_xlim(-0.5, len(xs) - 0.5)
        axes.set_ylim(-0.5, len(ys) - 0.5)
        axes.grid(visible=False)
        axes.set_title(side)
        axes.set_xlabel(bottom)

    label = f"{title}. The numbers are in the table beside."
    drawing = _svg.draw(name, label, paint, height=70 + 34 * len(ys))
    known = {(i, j): value for i, j, value in cells}
    table = tuple(
        (place, *(_words.plain(known.get((i, j)), ".4g") for i in range(len(xs))))
        for j, place in enumerate(places)
    )
    return Plot(name, title, note, drawing, (), Table(title, (f"{side} by {bottom}", *columns), table))


def _with_error(value: float, error: float | None) -> str:
    if not error:
        return _words.plain(value)
    digits = max(0, min(8, 1 - math.floor(math.log10(error))))
    form = f".{digits}f" if error < 1e6 else ".3g"
    return f"{_words.plain(value, form)}{_words.SPACE}±{_words.SPACE}{_words.plain(error, form)}"


def table(content: dict[str, Any]) -> Table | None:
    """A table of the results in text; None where it has no row."""
    columns, rows = content.get("columns"), content.get("rows")
    if not isinstance(columns, list) or not isinstance(rows, list) or not rows:
        return None
    width = len(columns)
    text = [[cell(value) for value in row[:width]] for row in rows if isinstance(row, list)]
    padded = tuple((*row, *[_words.MISSING] * (width - len(row))) for row in text)
    return Table(str(content.get("caption") or ""), tuple(map(str, columns)), padded)


def cell(value: Any) -> str:
    """A value of a table in text."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value}" if isinstance(value, int) else _words.plain(value, ".4g")

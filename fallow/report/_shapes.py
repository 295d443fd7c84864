"""The shapes that the figures are made of: curves over epochs, bars against an ideal, bands over steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fallow.errors import need
from fallow.report._svg import COLOUR
from fallow.report._tables import Table

LOG_FROM = 8.0  # largest over smallest value from which a logarithmic axis reads better


@dataclass(frozen=True)
class Plot:
    """One figure of the page."""

    name: str
    title: str
    note: str
    svg: str
    legend: tuple[tuple[str, str], ...]  # (classes of the swatch, words)
    table: Table


@dataclass(frozen=True)
class Line:
    """One curve."""

    points: Sequence[tuple[float, float]]
    colour: str
    words: str
    dashed: bool = False


def curves(axes: Any, lines: Sequence[Line], title: str, bottom: str) -> None:
    """Curves over whole numbers, logarithmic where the values span much and none is zero."""
    ticker = need("matplotlib.ticker", "lab")
    for line in lines:
        x, y = zip(*line.points, strict=True)
        axes.plot(
            x,
            y,
            color=COLOUR[line.colour],
            linewidth=1.5 if line.dashed else 2.0,
            linestyle=(0, (3, 2)) if line.dashed else "-",
            marker="o" if len(x) <= 12 else None,
            markersize=4,
        )
    values = [y for line in lines for _, y in line.points]
    logarithmic = min(values) > 0 and max(values) / min(values) >= LOG_FROM
    if logarithmic:
        axes.set_yscale("log")
        dense = max(values) / min(values) < 1000
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if dense else (1,), numticks=12))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:g}"))
    axes.xaxis.set_major_locator(ticker.MaxNLocator(7, integer=True))
    axes.set_title(title + (", log scale" if logarithmic else ""))
    axes.set_xlabel(bottom)


def columns(
    axes: Any, found: Sequence[tuple[int, str, float]], words: Callable[[str, float], str]
) -> dict[str, str]:
    """Upright bars, one a site: (place, name, height) each.

    Returns:
        Their tooltips, as `_svg.draw` takes them.
    """
    for place, _, height in found:
        axes.bar(place, height, width=0.74, color=COLOUR["model"], alpha=0.75)[0].set_gid(f"site-{place}")
    axes.set_xlim(0.3, max(place for place, _, _ in found) + 0.7)
    axes.xaxis.set_major_locator(need("matplotlib.ticker", "lab").MaxNLocator(9, integer=True, min_n_ticks=1))
    axes.set_xlabel("site, from the input to the output")
    return {f"site-{place}": words(name, height) for place, name, height in found}


Band = tuple[int, int, float, float, float]  # first and last step, mean, least, greatest
Bar = tuple[str, float, float | None, float | None, float | None]


def bars(
    axes: Any, rows: Sequence[Bar], colours: Sequence[str], bottom: str = "ratio to constant depth"
) -> None:
    """Horizontal bars with intervals, the ideal of each, and a line at 1, what they are ratios to."""
    for place, ((name, value, low, high, ideal), colour) in enumerate(zip(rows, colours, strict=True)):
        y = -place
        axes.barh(y, value, height=0.46, color=COLOUR[colour], alpha=0.8)
        if low is not None and high is not None:
            axes.hlines(y, low, high, color=COLOUR["ink"], linewidth=1.6)
            axes.vlines([low, high], y - 0.1, y + 0.1, color=COLOUR["ink"], linewidth=1.6)
        if ideal is not None:
            axes.vlines(
                ideal, y - 0.36, y + 0.36, color=COLOUR["ink"], linewidth=1.8, linestyle=(0, (2, 1.2))
            )
        axes.text(0, y + 0.36, f"{name}  {value:.3f}", va="bottom", ha="left", color=COLOUR["ink"])
    axes.axvline(1, color=COLOUR["twin"], linewidth=1.8)
    ends = [x for _, value, _, high, ideal in rows for x in (value, high, ideal) if x is not None]
    axes.set_xlim(0, 1.06 * max(1, *ends))
    axes.set_ylim(-len(rows) + 0.45, 0.85)
    axes.set_yticks([])
    axes.grid(True, axis="x")
    axes.set_xlabel(bottom)


def bar_legend(rows: Sequence[Bar]) -> tuple[tuple[str, str], ...]:
    """The keys to bars, those that are there."""
    marks = [("whisker ink", "interval")] if any(low is not None for _, _, low, _, _ in rows) else []
    marks += [("tick ink", "ideal")] if any(ideal is not None for *_, ideal in rows) else []
    return (*marks, ("line twin", "constant depth"))


def bands(values: Sequence[float], most: int) -> list[Band]:
    """At most `most` runs of consecutive values, of equal length to within one.

    Returns:
        (first, last, mean, least, greatest) of each, places counted from 1.
    """
    pieces = min(most, len(values))
    edges = [i * len(values) // pieces for i in range(pieces + 1)] if pieces else []
    spans = [(i, j, values[i:j]) for i, j in zip(edges, edges[1:], strict=False)]
    return [(i + 1, j, sum(part) / (j - i), min(part), max(part)) for i, j, part in spans]

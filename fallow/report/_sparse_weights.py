"""The figures of a sparsification that show its weights: their magnitudes, what is left of each layer."""

from __future__ import annotations

from typing import Any

from fallow.errors import need
from fallow.report import _shapes, _svg, _words
from fallow.report._shapes import Plot
from fallow.report._svg import COLOUR
from fallow.report._tables import Table
from fallow.report._words import get, number, numbers, records

ROWS = 20  # of the tables beside curves
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
MAGNITUDE = {
    "weights": "magnitude |w| of a weight",
    "groups": "root mean square of a group of weights",
}
BESIDE = "The numbers are in the table beside."


def power(exponent: float) -> str:
    """A power of ten as an axis says it."""
    whole = exponent == int(exponent)
    return "10" + f"{exponent:g}".translate(_SUPERSCRIPTS) if whole else f"{10.0**exponent:.2g}"


def powers(axes: Any, bottom: str) -> None:
    """An axis of logarithms to the base ten."""
    ticker = need("matplotlib.ticker", "lab")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=high - low > 2))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: power(x)))
    axes.set_xlabel(bottom)


def histogram(results: dict[str, Any], prefix: str) -> Plot | None:
    """How many weights there are of each magnitude, and how many are zero."""
    found = get(results, "histogram")
    low, high, zeros = (number(get(found, key)) for key in ("low", "high", "zeros"))
    counts = numbers(get(found, "counts"))
    if low is None or high is None or not 1e-9 < high - low < 400 or abs(low) > 400 or not any(counts):
        return None
    width = (high - low) / len(counts)
    middles = [low + width * (i + 0.5) for i in range(len(counts))]

    def paint(axes: Any) -> None:
        ticker = need("matplotlib.ticker", "lab")
        axes.bar(middles, counts, width=0.9 * width, color=COLOUR["model"], alpha=0.8)
        powers(axes, MAGNITUDE["weights"])
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:g}"))
        axes.set_title("weights of that magnitude")

    whole = (zeros or 0) + sum(counts)
    note = (
        f"{_words.count(zeros)} of {_words.count(whole)} weights are zero and have no place on this axis. "
        "The first bar holds all that are smaller."
    )
    step = max(1, -(-len(counts) // ROWS))
    rows = [("0", _words.count(zeros))]
    rows += [
        (_between(low + width * i, low + width * min(i + step, len(counts)), i == 0), _words.count(sum(part)))
        for i in range(0, len(counts), step)
        if (part := counts[i : i + step])
    ]
    return Plot(
        f"{prefix}histogram",
        "Magnitudes of the weights",
        note,
        _svg.draw(f"{prefix}histogram", f"Histogram of the weights' magnitudes. {BESIDE}", paint),
        (("bar model", "weights that are not zero"),),
        Table("Magnitudes of the weights", ("magnitude", "weights"), tuple(rows)),
    )


def _between(low: float, high: float, first: bool) -> str:
    ends = [f"{10.0**x:.2g}" if -300 < x < 300 else _words.MISSING for x in (low, high)]
    return f"below {ends[1]}" if first else f"{ends[0]} to {ends[1]}"


def layers(results: dict[str, Any], prefix: str) -> Plot | None:
    """The share of each layer's weights that is left."""
    found = [
        (str(layer.get("name", "")), kept / weights)
        for layer in records(results.get("layers"))
        if (kept := number(layer.get("kept"))) is not None and (weights := number(layer.get("weights")))
    ]
    found = [(name, share) for name, share in found if 0 <= share <= 1]
    if not found:
        return None

    def paint(axes: Any) -> dict[str, str]:
        places = [(i + 1, name, 100 * share) for i, (name, share) in enumerate(found)]
        tips = _shapes.columns(axes, places, lambda name, height: f"{name}: {height:.2f} % left")
        axes.set_title("weights left, in %")
        axes.set_xlabel("layer, from the input to the output")
        return tips

    rows = tuple((name, _words.percent(share)) for name, share in found)
    name = f"{prefix}layers"
    return Plot(
        name,
        "What is left of each layer",
        "Shapes before and after are in the table of layers.",
        _svg.draw(name, f"Share of each layer's weights that is left. {BESIDE}", paint),
        (("bar model", "weights that are not zero"),),
        Table("Weights left", ("layer", "share"), rows),
    )

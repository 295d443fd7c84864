"""The figures of a sparsification: its penalty with the strategy, and the way to its zeros."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from fallow.errors import need
from fallow.report import _shapes, _sparse_weights, _svg, _words
from fallow.report._shapes import Line, Plot
from fallow.report._sparse_weights import BESIDE, MAGNITUDE, ROWS, powers
from fallow.report._svg import COLOUR
from fallow.report._tables import Table, epoch_of, series
from fallow.report._words import get, number, records

Named = tuple[str, str, dict[str, Any]]  # colour, words, results


# --- the penalty and its strategy --------------------------------------------------------------------------


def _curve(results: dict[str, Any], key: str) -> list[tuple[float, float]]:
    """(log10 of the magnitude, value) where both are numbers that can be drawn."""
    found = get(results, "curves")
    xs, ys = (v if isinstance(v := get(found, k), list) else [] for k in ("magnitude", key))
    pairs = ((number(x), number(y)) for x, y in zip(xs, ys, strict=False))
    return [(math.log10(x), y) for x, y in pairs if x is not None and x > 0 and y is not None and y >= 0]


def _law(
    runs: Sequence[Named], name: str, key: str, title: str, axis: str, note: str, *, alone: bool
) -> Plot | None:
    """The curves of one key of every run over the magnitudes."""
    lines = [
        Line(points, colour, words) for colour, words, results in runs if (points := _curve(results, key))
    ]
    if not lines:
        return None
    cut = number(get(runs[0][2], "curves", "cut")) if alone and key == "survival_rate" else None
    kinds = {str(get(results, "curves", "of")) for _, _, results in runs}
    bottom = MAGNITUDE[kinds.pop()] if kinds <= {"weights"} or kinds <= {"groups"} else "magnitude"

    def paint(axes: Any) -> None:
        if key == "survival_rate":
            for line in lines:
                axes.plot(*zip(*line.points, strict=True), color=COLOUR[line.colour], linewidth=2.0)
            axes.set_ylim(0, 1.03)
            axes.set_title(axis)
        else:
            _shapes.curves(axes, lines, axis, "")
        if cut is not None:
            axes.axhline(cut, color=COLOUR["ink"], linewidth=1.2, linestyle=(0, (4, 2.5)))
        powers(axes, bottom)

    legend = [(f"line {line.colour}", line.words) for line in lines]
    legend += [("dash ink", f"zero below {cut:g}")] if cut is not None else []
    places = lines[0].points[:: max(1, len(lines[0].points) // ROWS)]
    values = [dict(line.points) for line in lines]
    if alone:
        rows = tuple((f"{10.0**x:.3g}", *(_words.plain(of.get(x)) for of in values)) for x, _ in places)
        table = Table(title, ("magnitude", *(line.words for line in lines)), rows)
    else:
        rows = tuple(
            (line.words, *(_words.plain(_at(line.points, x)) for x in _decades(lines))) for line in lines
        )
        table = Table(f"{title}, by magnitude", ("run", *(f"{10.0**x:g}" for x in _decades(lines))), rows)
    drawing = _svg.draw(name, f"{title} over the magnitude of the weights. {BESIDE}", paint)
    return Plot(name, title, note, drawing, tuple(legend), table)


def _decades(lines: Sequence[Line]) -> list[int]:
    """The powers of ten among the magnitudes drawn, at most eight."""
    ends = [x for line in lines for x, _ in (line.points[0], line.points[-1])]
    found = list(range(math.ceil(min(ends)), math.floor(max(ends)) + 1))
    return found[-8:]


def _at(points: Sequence[tuple[float, float]], x: float) -> float | None:
    """The value at the drawn place nearest to x; None beyond the ends."""
    if not points[0][0] - 0.1 <= x <= points[-1][0] + 0.1:
        return None
    return min(points, key=lambda point: abs(point[0] - x))[1]


def _strategy_note(results: dict[str, Any]) -> str:
    strength = _words.plain(get(results, "curves", "strength"), ".3g")
    return (
        f"The adaptive dropout that the penalty is dual to: a weight is kept with probability eta / (eta + "
        f"strength), eta = w / (slope of the penalty at w), at strength {strength}."
    )


# --- over the epochs ---------------------------------------------------------------------------------------


def _over_epochs(
    runs: Sequence[Named], name: str, title: str, axis: str, key: str, scale: float, note: str
) -> Plot | None:
    """One value of every run over its epochs."""
    lines = [
        Line([(x, scale * y) for x, y in points], colour, words)
        for colour, words, results in runs
        if (points := series(results, key))
    ]
    if not lines:
        return None
    target = number(get(runs[0][2], "config", "target")) if len(runs) == 1 and key == "sparsity" else None

    def paint(axes: Any) -> None:
        if target is not None and 0 < target < 1:
            axes.axhline(100 * target, color=COLOUR["ink"], linewidth=1.2, linestyle=(0, (4, 2.5)))
        _shapes.curves(axes, lines, axis, "epoch")

    legend = [(f"line {line.colour}", line.words) for line in lines]
    legend += [("dash ink", f"target, {100 * target:g}{_words.SPACE}%")] if target is not None else []
    if len(runs) == 1:
        table = epochs(runs[0][2])
    else:
        rows = tuple(
            (line.words, f"{len(line.points)}", *(_words.plain(y) for y in _ends(line))) for line in lines
        )
        table = Table(f"{title} of the runs", ("run", "epochs", "first", "least", "last"), rows)
    drawing = _svg.draw(name, f"{title} over epochs. {BESIDE}", paint)
    return Plot(name, title, note, drawing, tuple(legend), table)


def _ends(line: Line) -> tuple[float, float, float]:
    values = [y for _, y in line.points]
    return values[0], min(values), values[-1]


def epochs(results: dict[str, Any]) -> Table:
    """Every epoch of a run."""
    rows = tuple(
        (
            _words.plain(epoch_of(record, index)),
            _words.percent(record.get("sparsity")),
            _words.percent(record.get("validation_error")),
            _words.plain(record.get("train_loss")),
            _words.plain(record.get("strength"), ".3g"),
            _words.plain(record.get("learning_rate"), ".3g"),
        )
        for index, record in enumerate(records(results.get("epochs")))
    )
    columns = ("epoch", "zeros", "validation error", "training loss", "strength", "learning rate")
    return Table("Epoch by epoch", columns, rows)


def _path(runs: Sequence[Named], name: str) -> Plot | None:
    """Validation error against zeros, an epoch a point, joined in their order."""
    lines = []
    for colour, words, results in runs:
        zeros, errors = (dict(series(results, key)) for key in ("sparsity", "validation_error"))
        points = [(100 * zeros[e], 100 * errors[e]) for e in sorted(zeros.keys() & errors.keys())]
        lines += [Line(points, colour, words)] if points else []
    if not lines:
        return None

    def paint(axes: Any) -> None:
        ticker = need("matplotlib.ticker", "lab")
        for line in lines:
            x, y = zip(*line.points, strict=True)
            axes.plot(x, y, color=COLOUR[line.colour], linewidth=1.4, marker="o", markersize=3.5)
            axes.plot(x[-1:], y[-1:], color=COLOUR[line.colour], marker="o", markersize=8, linestyle="none")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}"))
        axes.set_title("validation error in %")
        axes.set_xlabel("weights that are zero, in %")

    rows = tuple(
        (line.words, str(i + 1), f"{x:.2f}{_words.SPACE}%", f"{y:.2f}{_words.SPACE}%")
        for line in lines
        for i, (x, y) in enumerate(line.points)
    )
    table = Table("Zeros and validation error", ("run", "epoch", "zeros", "validation error"), rows)
    return Plot(
        name,
        "Error against zeros",
        "A point an epoch, in their order, the last one large. Validated with what is cut set to zero.",
        _svg.draw(name, f"Validation error against the share of zeros, epoch by epoch. {BESIDE}", paint),
        tuple((f"line {line.colour}", line.words) for line in lines),
        table,
    )


# --- all of them -------------------------------------------------------------------------------------------


def _common(runs: Sequence[Named], prefix: str, *, alone: bool) -> list[Callable[[], Plot | None]]:
    first = runs[0][2]
    penalty = str(get(first, "curves", "name") or "penalty") if alone else "penalty"
    return [
        lambda: _law(
            runs, f"{prefix}penalty", "penalty", "Penalty", "Omega(w)", f"{penalty}, before the strength."
            if alone else "Before the strength.", alone=alone,
        ),
        lambda: _law(
            runs, f"{prefix}strategy", "survival_rate", "Its strategy", "survival rate",
            _strategy_note(first) if alone else "Each at the strength of its run's last epoch.", alone=alone,
        ),
        lambda: _over_epochs(
            runs, f"{prefix}error", "Validation error", "error in %", "validation_error", 100,
            "Of the network with what is cut set to zero.",
        ),
        lambda: _over_epochs(
            runs, f"{prefix}zeros", "Zeros", "weights that are zero, in %", "sparsity", 100, ""
        ),
        lambda: _path(runs, f"{prefix}path"),
    ]  # fmt: skip


def _strength(results: dict[str, Any], prefix: str) -> Plot | None:
    """The strength where the controller moves it."""
    if len({y for _, y in series(results, "strength")}) < 2:
        return None
    runs = [("model", "strength", results)]
    note = "The controller raises it while there are fewer zeros than the ramp asks for, and lowers it else."
    return _over_epochs(runs, f"{prefix}strength", "Strength", "strength", "strength", 1, note)


def of_run(results: dict[str, Any], prefix: str) -> list[Plot]:
    """All figures of one run for which it has numbers."""
    words = str(get(results, "config", "strategy") or "this run")
    common = _common([("model", words, results)], prefix, alone=True)
    weights = [_sparse_weights.histogram(results, prefix), _sparse_weights.layers(results, prefix)]
    found = [*weights, *(make() for make in common), _strength(results, prefix)]
    return [plot for plot in found if plot is not None]


def of_runs(named: Sequence[tuple[str, dict[str, Any]]]) -> list[Plot]:
    """The figures that lay several runs side by side."""
    runs = [(f"run-{i % _svg.RUNS}", name, results) for i, (name, results) in enumerate(named)]
    found = [make() for make in _common(runs, "compared-", alone=False)]
    return [plot for plot in found if plot is not None]

"""The part of an explanation that shows noise in front of the last linear layer, and the global minimum."""

from __future__ import annotations

from typing import Any

from fallow.report import _shapes, _svg, _words
from fallow.report._section import Tile
from fallow.report._shapes import Bar, Line, Plot
from fallow.report._tables import Table
from fallow.report._words import get, number

# Forms of the penalty beside its Monte Carlo estimate, and the colour of each.
FORMS = {
    "exact": ("exact", "run-1"),
    "quadratic": ("quadratic form", "run-2"),
    "jensen": ("Jensen's bound", "run-3"),
}
MONTE_CARLO = "Monte Carlo"
_LEADING = 32  # singular values drawn


def penalty(head: Any) -> float | None:
    """The exact penalty where there is one, else that by Monte Carlo."""
    exact = number(get(head, "exact"))
    return number(get(head, "monte_carlo")) if exact is None else exact


def headline(head: Any) -> str:
    """One sentence with what was found."""
    value = penalty(head)
    if value is None:
        return "What noise in front of the head penalises was not measured."
    share = get(head, "share")
    of = "" if number(share) is None else f", {_words.percent(share, 1)} of the loss under it"
    said = f"Noise in front of the head adds {_words.plain(value)} to the loss{of}"
    above = get(head, "optimum", "above")
    if number(above) is None:
        return f"{said}."
    return f"{said}; the objective is at most {_distance(above)} the global minimum."


def _distance(above: Any) -> str:
    share = number(above) or 0.0
    return f"{_words.percent(share)} above" if share < 9 else f"{_words.plain(share + 1, '.3g')} times"


def tiles(head: Any) -> tuple[Tile, ...]:
    """The figures a reader looks for first, those of them that there are."""
    minimum = _words.plain(get(head, "optimum", "minimum"))
    candidates = [
        (penalty(head), "penalty of the head", "loss under its noise less plain loss"),
        (get(head, "optimum", "objective"), "objective", f"global minimum {minimum}"),
        (get(head, "effective_rank"), "effective rank", "of the predictions"),
    ]
    return tuple(
        Tile(name, _words.plain(value), aside)
        for value, name, aside in candidates
        if number(value) is not None
    )


def table(head: Any) -> Table:
    """Everything but the spectra."""
    rows = [("head", "name"), ("noise", "scheme"), ("found", "source")]
    rows = [(title, str(get(head, key))) for title, key in rows]
    rows += [("loss without the noise", _words.plain(get(head, "loss"), ".6g"))]
    forms = [(f"penalty, {name}", get(head, form), None) for form, (name, _) in FORMS.items()]
    forms += [(f"penalty, {MONTE_CARLO}", get(head, "monte_carlo"), get(head, "monte_carlo_error"))]
    rows += [(name, _with_error(value, error)) for name, value, error in forms if number(value) is not None]
    rows += [
        ("share of the loss", _words.percent(get(head, "share"))),
        ("kappa", _words.plain(get(head, "kappa"))),
        ("effective rank", _words.plain(get(head, "effective_rank"))),
    ]
    optimum = [
        ("objective, loss and penalty", "objective"),
        ("least of any head on these features", "best_head"),
        ("global minimum, closed form", "minimum"),
        ("lower bound, by duality", "bound"),
    ]
    rows += [
        (name, _words.plain(value, ".6g"))
        for name, key in optimum
        if number(value := get(head, "optimum", key)) is not None
    ]
    if number(get(head, "optimum", "above")) is not None:
        rows.append(("objective, at most", f"{_distance(get(head, 'optimum', 'above'))} the minimum"))
    return Table("Noise in front of the head", ("measure", "value"), tuple(rows))


def _with_error(value: Any, error: Any) -> str:
    found = _words.plain(value)
    return found if number(error) is None else f"{found}\u00a0\u00b1\u00a0{_words.plain(error, '.2g')}"


def forms(head: Any, prefix: str) -> Plot | None:
    """The forms of the penalty as ratios to the Monte Carlo estimate."""
    drawn, error = number(get(head, "monte_carlo")), number(get(head, "monte_carlo_error"))
    if drawn is None or drawn <= 0:
        return None
    low, high = (None, None) if error is None else (1 - error / drawn, 1 + error / drawn)
    bars: list[Bar] = [(MONTE_CARLO, 1.0, low, high, None)]
    colours = ["model"]
    for form, (title, colour) in FORMS.items():
        value = number(get(head, form))
        if value is not None and abs(value) < 1e6 * drawn:
            bars.append((title, value / drawn, None, None, None))
            colours.append(colour)
    name = f"{prefix}head"
    drawing = _svg.draw(
        name,
        "The penalty of noise in front of the head, each form as a ratio to Monte Carlo. The numbers are in "
        "the table beside.",
        lambda axes: _shapes.bars(axes, bars, colours, "ratio to Monte Carlo"),
        height=44 + 44 * len(bars),
    )
    legend = [("line twin", MONTE_CARLO)]
    legend += [("whisker ink", "one standard error")] if error is not None else []
    note = "Masks are drawn on the head alone; the exact form and the quadratic one need none."
    return Plot(name, "Penalty of the head", note, drawing, tuple(legend), table(head))


def spectra(head: Any, prefix: str) -> Plot | None:
    """Singular values of the predictions, and of those at the global minimum."""
    found = [
        (title, colour, _words.numbers(get(head, "optimum", key)), dashed)
        for title, colour, key, dashed in (
            ("the head's predictions", "model", "spectrum", False),
            ("the global minimiser's", "ink", "optimal_spectrum", True),
        )
    ]
    if not all(values for *_, values, _ in found):
        return None
    lines = [
        Line(list(enumerate(values[:_LEADING], start=1)), colour, title, dashed)
        for title, colour, values, dashed in found
    ]
    count = max(len(values) for *_, values, _ in found)
    padded = [[*values, *[None] * (count - len(values))] for *_, values, _ in found]
    rows = tuple(
        (str(place), *(_words.plain(value) for value in pair))
        for place, pair in enumerate(zip(*padded, strict=True), start=1)
    )
    name = f"{prefix}spectrum"
    drawing = _svg.draw(
        name,
        "Singular values of the predictions and of the minimiser's. The numbers are in the table beside.",
        lambda axes: _shapes.curves(axes, lines, "singular value", "number, from the largest"),
    )
    note = "Without the bias. Noise pushes the spectrum down; at the global minimum the two are the same."
    legend = tuple((f"{'dash' if line.dashed else 'line'} {line.colour}", line.words) for line in lines)
    columns = ("number", *(title for title, *_ in found))
    return Plot(
        name, "Spectrum of the predictions", note, drawing, legend, Table("Singular values", columns, rows)
    )

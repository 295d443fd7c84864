"""The figures of the page, each a drawing with its legend and the table that says the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fallow.errors import need
from fallow.report import _shapes, _svg, _tables, _words
from fallow.report._replans import replans
from fallow.report._shapes import Band, Bar, Line, Plot, bands
from fallow.report._svg import COLOUR
from fallow.report._tables import Table, arms, label, series
from fallow.report._words import get, number, numbers, records

BINS = 110  # bands of the depth plot: one every four units of its width
ROWS = 20  # bands of its table
DROP = 0.5  # a learning rate that falls below this share of the last epoch's has been dropped


def _drops(results: dict[str, Any]) -> list[float]:
    """The epochs at whose start the learning rate was dropped."""
    rates = series(get(results, "arms", "model"), "learning_rate")
    return [
        after[0] - 0.5 for before, after in zip(rates, rates[1:], strict=False) if after[1] < DROP * before[1]
    ]


def _over_epochs(
    results: dict[str, Any],
    name: str,
    title: str,
    axis: str,
    note: str,
    keys: dict[str, Any],
    scale: float = 1,
) -> Plot | None:
    """A figure of per-epoch values of both arms; `keys`: key -> (word, writer of its table cells)."""
    lines: list[Line] = []
    for arm, value in arms(results).items():
        for key, (word, _) in reversed(keys.items()):
            dashed = len(keys) > 1 and word.startswith("training")
            points = [(x, y * scale) for x, y in series(value, key)]
            if points:
                words = f"{word}, {label(results, arm)}" if len(keys) > 1 else label(results, arm)
                lines.append(Line(points, arm, words, dashed))
    if not lines:
        return None
    drops = _drops(results)

    def paint(axes: Any) -> None:
        for drop in drops:
            axes.axvline(drop, color=COLOUR["soft"], linewidth=0.8, linestyle=(0, (1, 2)))
        _shapes.curves(axes, lines, axis, "epoch")

    legend = [(f"{'dash' if line.dashed else 'line'} {line.colour}", line.words) for line in lines]
    legend += [("dots soft", "learning rate drops")] if drops else []
    drawing = _svg.draw(name, f"{title}, over epochs. The numbers are in the table beside.", paint)
    return Plot(
        name, title, note, drawing, tuple(legend), _tables.epochs(results, f"{title}, by epoch", keys)
    )


def loss(results: dict[str, Any], prefix: str) -> Plot | None:
    """Training loss of both arms."""
    note = "Measured while training: with stochastic depth the loss is that of the shortened nets."
    keys = {"train_loss": ("training loss", _words.plain)}
    return _over_epochs(results, f"{prefix}loss", "Training loss", "mean loss of an epoch", note, keys)


def error(results: dict[str, Any], prefix: str) -> Plot | None:
    """Training and validation error of both arms."""
    note = "Validation error is that of the whole net; training error is measured on the shortened ones."
    keys = {
        "train_error": ("training error", _words.percent),
        "validation_error": ("validation error", _words.percent),
    }
    return _over_epochs(results, f"{prefix}error", "Error", "error in %", note, keys, 100)


def gradient(results: dict[str, Any], prefix: str) -> Plot | None:
    """Mean gradient magnitude of the first convolution (Huang et al. 2016, figure 7)."""
    note = (
        "Mean absolute gradient of the first convolution's weights, after Huang et al. (2016), figure 7: "
        "how much of the error signal reaches the far end of the net."
    )
    keys = {"gradient_first_convolution": ("mean gradient", lambda x: _words.plain(x, ".3e"))}
    title = "Gradient at the first convolution"
    return _over_epochs(results, f"{prefix}gradient", title, "mean |gradient|", note, keys)


def depth(results: dict[str, Any], prefix: str) -> Plot | None:
    """Realised depth of every step, in bands, with the expected and the constant depth."""
    values = numbers(get(results, "arms", "model", "depths"))
    if not values:
        return None
    parts = bands(values, BINS)
    expected = number(get(results, "budget", "expected_depth"))
    whole = len(records(results.get("sites"))) or number(get(results, "budget", "sites"))
    size = -(-len(values) // len(parts))  # of the longest band
    legend = [("line model", "realised" if size == 1 else f"realised, mean of every {size} steps")]
    legend += [("band model", "least to most in those steps")] if size > 1 else []
    legend += [("dash ink", f"expected, {expected:.2f}")] if expected is not None else []
    legend += [("line twin", f"every branch, {whole:g}")] if whole else []
    rows = tuple(
        (f"{first}\u2013{last}", f"{mean:.2f}", f"{low:g}", f"{high:g}")
        for first, last, mean, low, high in bands(values, ROWS)
    )
    table = Table("Realised depth", ("steps", "mean", "least", "most"), rows)
    overall = sum(values) / len(values)
    note = f"Over {_words.count(len(values))} steps the realised depth was {overall:.2f} on average."
    name, said = (
        f"{prefix}depth",
        "Realised depth of the training steps. The numbers are in the table beside.",
    )
    drawing = _svg.draw(name, said, lambda axes: _paint_depth(axes, parts, expected, whole))
    return Plot(name, "Depth of every step", note, drawing, tuple(legend), table)


def _paint_depth(axes: Any, parts: Sequence[Band], expected: float | None, whole: float | None) -> None:
    """Bands of steps, the expected depth and that of all branches."""
    middle = [(first + last) / 2 for first, last, *_ in parts]
    mean, low, high = ([part[i] for part in parts] for i in (2, 3, 4))
    few = {"marker": "o", "markersize": 3} if len(parts) < BINS else {}
    axes.fill_between(middle, low, high, color=COLOUR["model"], alpha=0.22, linewidth=0)
    axes.plot(middle, mean, color=COLOUR["model"], linewidth=1.5, **few)
    if expected is not None:
        axes.axhline(expected, color=COLOUR["ink"], linewidth=1.4, linestyle=(0, (5, 3)))
    if whole:
        axes.axhline(whole, color=COLOUR["twin"], linewidth=1.8)
    axes.set_title("branches that worked")
    axes.set_xlabel("training step")
    axes.xaxis.set_major_locator(need("matplotlib.ticker", "lab").MaxNLocator(6, integer=True))


def survival(results: dict[str, Any], prefix: str) -> Plot | None:
    """Survival rates asked and realised, site by site."""
    sites = [
        (i + 1, str(s.get("name", "")), number(s.get("asked")), number(s.get("realised")))
        for i, s in enumerate(records(results.get("sites")))
    ]
    asked = [(i, a) for i, _, a, _ in sites if a is not None]
    realised = [(i, r) for i, _, _, r in sites if r is not None]
    if not asked and not realised:
        return None

    def paint(axes: Any) -> dict[str, str]:
        ticker = need("matplotlib.ticker", "lab")
        tips = {}
        for index, name, wanted, got in sites:
            if got is not None:
                axes.bar(index, got, width=0.74, color=COLOUR["model"], alpha=0.75)[0].set_gid(
                    f"site-{index}"
                )
            tips[f"site-{index}"] = f"{name}: asked {_words.ratio(wanted)}, realised {_words.ratio(got)}"
        if asked:
            left, right = [i - 0.48 for i, _ in asked], [i + 0.48 for i, _ in asked]
            axes.hlines([a for _, a in asked], left, right, color=COLOUR["ink"], linewidth=1.8)
        axes.set_ylim(0, 1.02)
        axes.set_xlim(0.3, len(sites) + 0.7)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(9, integer=True, min_n_ticks=1))
        axes.set_title("share of the draws in which the branch worked")
        axes.set_xlabel("site, from the input to the output")
        return tips

    legend = [("bar model", "realised")] if realised else []
    legend += [("line ink", "asked")] if asked else []
    name = f"{prefix}survival"
    label = "Survival rates asked and realised, site by site. The names are in the table beside."
    drawing = _svg.draw(name, label, paint)
    note = "Names, kinds and cost shares of the sites are in the table."
    if records(results.get("plans")):
        note += " Asked and realised are of the last plan, and of the steps after it."
    return Plot(name, "Survival rates", note, drawing, tuple(legend), _tables.sites(results))


def against_ideal(results: dict[str, Any], prefix: str) -> Plot | None:
    """Time, memory and FLOPs against constant depth and the ideal."""
    bars = _tables.ratios(results)
    if not bars:
        return None
    name = f"{prefix}ideal"
    drawing = _svg.draw(
        name,
        "Time, memory and FLOPs of a step as ratios to constant depth. The numbers are in the table beside.",
        lambda axes: _shapes.bars(axes, bars, ["model"] * len(bars)),
        height=44 + 56 * len(bars),
    )
    note = "Constant depth is 1. The ideal of the times is from measured shares where known, else from FLOPs."
    if "twin" not in arms(results):
        note = (
            "This run had no constant-depth twin beside it: time and memory have nothing to be compared with."
        )
    table = _tables.against_ideal(results)
    return Plot(
        name,
        "Time and memory against the ideal",
        note,
        drawing,
        (("bar model", "measured"), *_shapes.bar_legend(bars)),
        table,
    )


def of_run(results: dict[str, Any], prefix: str) -> list[Plot]:
    """All figures of one run for which it has numbers."""
    makers = (error, loss, against_ideal, survival, replans, depth, gradient)
    return [plot for maker in makers if (plot := maker(results, prefix)) is not None]


def of_runs(named: Sequence[tuple[str, dict[str, Any]]]) -> list[Plot]:
    """The figures that lay several runs side by side."""
    found = (_compared_error(named), _compared_time(named))
    return [plot for plot in found if plot is not None]


def _colour(index: int) -> str:
    return f"run-{index % _svg.RUNS}"


def _compared_error(named: Sequence[tuple[str, dict[str, Any]]]) -> Plot | None:
    """Validation error of every run; the twins dashed, in the colour of their run."""
    lines = [
        Line([(x, 100 * y) for x, y in points], _colour(i), f"{name}, {label(results, arm)}", arm == "twin")
        for i, (name, results) in enumerate(named)
        for arm, value in arms(results).items()
        if (points := series(value, "validation_error"))
    ]
    if not lines:
        return None
    drawing = _svg.draw(
        "compared-error",
        "Validation error of every run, over epochs. The numbers are in the table beside.",
        lambda axes: _shapes.curves(axes, lines, "error in %", "epoch"),
    )
    rows = tuple(
        (
            line.words,
            str(len(line.points)),
            f"{min(y for _, y in line.points):.2f} %",
            f"{line.points[-1][1]:.2f} %",
        )
        for line in lines
    )
    table = Table("Validation error of the runs", ("run", "epochs", "least", "last"), rows)
    legend = tuple((f"{'dash' if line.dashed else 'line'} {line.colour}", line.words) for line in lines)
    return Plot("compared-error", "Validation error", "", drawing, legend, table)


def _compared_time(named: Sequence[tuple[str, dict[str, Any]]]) -> Plot | None:
    """Time per step of every run that had a twin beside it."""
    bars: list[Bar] = []
    colours = []
    for index, (name, results) in enumerate(named):
        found = [bar for bar in _tables.ratios(results) if bar[0].startswith("CPU")]
        bars += [(name, *bar[1:]) for bar in found]
        colours += [_colour(index)] * len(found)
    if not bars:
        return None
    drawing = _svg.draw(
        "compared-time",
        "CPU time of a step as a ratio to constant depth, run by run. The numbers are in the table beside.",
        lambda axes: _shapes.bars(axes, bars, colours),
        height=44 + 56 * len(bars),
    )
    rows = tuple(
        (
            n,
            _words.ratio(v),
            _words.interval({"low": low, "high": high}, ".3f") or _words.MISSING,
            _words.ratio(ideal),
        )
        for n, v, low, high, ideal in bars
    )
    table = Table("CPU time per step, ratio to constant depth", ("run", "ratio", "interval", "ideal"), rows)
    return Plot("compared-time", "Time per step", "", drawing, _shapes.bar_legend(bars), table)

"""What is plotted, tabled and said of `lejeune2021`'s trainings; every sentence follows from the numbers."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fallow.papers._panels import (
    Found,
    gathered,
    panel,
    pick,
    series,
    table,
)
from fallow.papers.lejeune2021.methods import METHODS
from fallow.papers.lejeune2021.sizes import (
    AS_PUBLISHED,
    PUBLISHED_DATA,
    PUBLISHED_EPOCHS,
    SEVEN,
)

# Test error in % and nonzero fraction of the authors' notebooks, one unseeded run each.
AUTHORS: Mapping[str, tuple[float, float]] = {
    "vardrop-lr-ar": (3.21, 0.0237904),
    "vardrop-lr": (1.41, 0.0884861),
    "vardrop": (1.54, 0.594598),
    "eta-trick": (2.16, 0.0513373),
    "adaprox": (2.94, 0.0275582),
    "adatikhonov": (2.88, 0.0182795),
    "logsum": (2.93, 0.0189557),
}
POINTS, PART = 0.5, 0.25  # of error in %, and of the compression: within these ours counts as the same
_LOOKS = 100  # epochs that a curve shows
_INVERSE = {published: method for method, published in AS_PUBLISHED.items()}


@dataclass(frozen=True)
class Row:
    """One method over its seeds; errors in %."""

    method: str
    errors: list[float]
    fractions: list[float]
    weights: list[int]
    all_weights: int
    neurons: list[list[int]]

    @property
    def error(self) -> float:
        """Mean test error."""
        return statistics.fmean(self.errors)

    @property
    def fraction(self) -> float:
        """Mean fraction of nonzero weights."""
        return statistics.fmean(self.fractions)

    @property
    def compression(self) -> float | None:
        """All weights over the mean of those that are left; None where none is."""
        return 1 / self.fraction if self.fraction else None

    @property
    def author(self) -> tuple[float, float]:
        """Error and fraction of the authors' run of it."""
        return AUTHORS[_INVERSE.get(self.method, self.method)]

    @property
    def close(self) -> tuple[bool, bool]:
        """Whether error and compression are those of the authors, within `POINTS` and `PART`."""
        error, fraction = self.author
        ratio = 0.0 if self.compression is None else self.compression * fraction
        return abs(self.error - error) <= POINTS, abs(ratio - 1) <= PART


def rows(found: Found) -> dict[str, Row]:
    """By method, in the order of the authors' table, as far as there are cells."""
    made = {}
    for method in (*SEVEN, *_INVERSE):
        results = [result for _, result in pick(found, method=method)]
        if results:
            made[method] = row_of(method, results)
    return made


def row_of(method: str, results: Sequence[Mapping[str, Any]]) -> Row:
    """One method from the results of its seeds."""
    return Row(
        method,
        [100 * result["test_error"] for result in results],
        [result["fraction"] for result in results],
        [result["weights"] for result in results],
        results[0]["all_weights"],
        [result["neurons"] for result in results],
    )


def chosen(made: Mapping[str, Row], as_published: bool) -> list[Row]:
    """One row for each of the seven: of the eta-Trick the one that is asked for."""
    names = [AS_PUBLISHED.get(method, method) if as_published else method for method in SEVEN]
    return [made[name] for name in names if name in made]


def comparable(found: Found) -> bool:
    """Whether these cells have the authors' images and epochs."""
    return all(
        cell.options["data"] == PUBLISHED_DATA and cell.options["epochs"] == PUBLISHED_EPOCHS
        for cell, _ in found
    )


# --- figure 2 -----------------------------------------------------------------------------------------------


def curves(found: Found, as_published: bool = False) -> Mapping[str, Any]:
    """Fraction of nonzero weights and validation error by epoch, means over seeds."""
    made = rows(found)
    left, right = [], []
    for row in made.values():
        title = METHODS[row.method].title
        # LogSum is dashed too, and in ink: it runs along AdaTikhonov's curve
        wanted = row in chosen(made, as_published) and row.method != "logsum"
        style = "line" if wanted else "dashed"
        results = [result["curve"] for _, result in pick(found, method=row.method)]
        for panel_of, key in ((left, "fraction"), (right, "validation_error")):
            epochs, means = _mean_curve([one[key] for one in results])
            panel_of.append(series(title, epochs, means, style=style, group=title.split(",")[0]))
    other = "with the right dual function" if as_published else "as published"
    note = f"means over seeds; dashed: LogSum, and the eta-Trick {other}"
    panels = [
        panel("Fraction of nonzero parameters", "epoch", "fraction", left, log=True, note=note),
        panel("Validation error", "epoch", "error", right, note=note),
    ]
    return gathered(panels, [], _late(found, made))


def _mean_curve(many: Sequence[Sequence[float]]) -> tuple[list[int], list[float]]:
    """Epochs, at most `_LOOKS` or so with the last, and means; 0 is left out as logarithms have none."""
    count = len(many[0])
    every = max(1, count // _LOOKS)
    epochs = sorted({*range(every, count + 1, every), 1, count})
    means = [(epoch, statistics.fmean(one[epoch - 1] for one in many)) for epoch in epochs]
    means = [(epoch, mean) for epoch, mean in means if mean > 0]
    return [epoch for epoch, _ in means], [mean for _, mean in means]


def _late(found: Found, made: Mapping[str, Row]) -> list[str]:
    """What the last eighth of the training does: the notes call it the effect of lr -> 0."""
    said = []
    for row in made.values():
        results = [result["curve"]["fraction"] for _, result in pick(found, method=row.method)]
        count = len(results[0])
        before = statistics.fmean(one[count - 1 - count // 8] for one in results)
        after = statistics.fmean(one[-1] for one in results)
        if before > 0 and after < 0.5 * before:
            said.append(
                f"{METHODS[row.method].title}: the fraction of nonzero weights falls from {before:.3f} to "
                f"{after:.3f} in the last eighth of the training, as the learning rate goes to 0."
            )
    return said


# --- the table ----------------------------------------------------------------------------------------------


def methods(found: Found, as_published: bool = False) -> Mapping[str, Any]:
    """The table of the seven methods, with the authors' beside, and which of ours agree with theirs."""
    made, judged = rows(found), comparable(found)
    seven = chosen(made, as_published)
    listed = [*seven, *(row for row in made.values() if row not in seven)]
    columns = ["method", "test error %", "s.d.", "nonzero fraction", "s.d.", "compression", "neurons left"]
    columns += ["authors' error %", "authors' compression", "agree", "seeds"]
    lines = []
    for row in listed:
        error, fraction = row.author
        agree = "–" if not judged else _agrees(row)
        lines.append(
            [
                METHODS[row.method].title,
                *(row.error, spread(row.errors), row.fraction, spread(row.fractions)),
                *(row.compression, ", ".join("-".join(map(str, one)) for one in row.neurons)),
                *(error, 1 / fraction, agree, len(row.errors)),
            ]
        )
    note = (
        f"means and standard deviations over seeds; neurons left in the two hidden layers, by seed; agree: "
        f"error within {POINTS:g} points and compression within {PART:.0%} of the authors' single run"
    )
    return gathered([], [table("LeNet-300-100", columns, lines, note)], _said(found, made, seven, judged))


def _agrees(row: Row) -> str:
    near = row.close
    return {(True, True): "both", (True, False): "error", (False, True): "compression"}.get(near, "neither")


def spread(numbers: Sequence[float]) -> float | None:
    """Their standard deviation; None of a single one."""
    return statistics.stdev(numbers) if len(numbers) > 1 else None


def _said(found: Found, made: Mapping[str, Row], seven: Sequence[Row], judged: bool) -> list[str]:
    cell, result = found[0]
    words = [
        f"{cell.options['data']}: {result['trained_on']} images to train on, {result['validated_on']} to "
        f"validate on, {result['tested_on']} to test on; {cell.options['epochs']} epochs."
    ]
    if judged:
        words += _judged(seven)
        words += [_outside(row) for row in seven if row.close != (True, True)]
        words += _by_strength(found)
        others = [row for row in made.values() if row not in seven]
        words += [f"Beside the seven: {_numbers(row)}." for row in others]
    else:
        words.append(
            f"The authors' numbers are of {PUBLISHED_DATA.upper()} after {PUBLISHED_EPOCHS} epochs: at this "
            "scale nothing is held against them."
        )
    words += [
        f"{METHODS[row.method].title} has lost all its weights in {row.weights.count(0)} of "
        f"{len(row.weights)} seeds: the divergence counts in full from the first step, and nothing slows it."
        for row in made.values()
        if 0 in row.weights
    ]
    return words + _eta(made) + _twins(made)


def _judged(seven: Sequence[Row]) -> list[str]:
    both = [METHODS[row.method].title for row in seven if row.close == (True, True)]
    return [
        f"{len(both)} of {len(seven)} methods agree with the authors' single runs in error (within "
        f"{POINTS:g} points) and compression (within {PART:.0%}){': ' if both else '.'}"
        + (", ".join(both) + "." if both else "")
    ]


def _outside(row: Row) -> str:
    error, fraction = row.author
    theirs = f"the authors' run had {error:g} % and {1 / fraction:.1f}x"
    return f"Outside, in {_which(row)}: {_numbers(row)}; {theirs}."


def _by_strength(found: Found) -> list[str]:
    """How many weights AdaProx has left by the cut of the other methods, in the same networks."""
    own = [result for _, result in found if "by_strength" in result]
    if not own:
        return []
    (method,) = {cell.tags["method"] for cell, result in found if "by_strength" in result}
    other = [result["by_strength"] for result in own]
    sizes = sorted(1 / one["fraction"] for one in other if one["fraction"])
    errors = sorted(100 * one["test_error"] for one in other)
    ends = f"{sizes[0]:.1f}x to {sizes[-1]:.1f}x" if sizes else "nothing left"
    return [
        f"{METHODS[method].title} depends on where it is cut: its last survival rates hold the learning "
        "rate, which has fallen to nearly 0, so that what Adam moves to and fro about 0 counts as left. The "
        "same networks, cut as LogSum's are by the survival rates for λ itself, have "
        f"{ends} with an error of {errors[0]:.2f} to {errors[-1]:.2f} %."
    ]


def _which(row: Row) -> str:
    error, size = row.close
    return "error and compression" if not error and not size else "compression" if error else "error"


def _numbers(row: Row) -> str:
    sizes = sorted(1 / fraction for fraction in row.fractions if fraction)
    ends = f"{sizes[0]:.1f}x to {sizes[-1]:.1f}x" if sizes else "nothing left"
    return (
        f"{METHODS[row.method].title} with an error of {min(row.errors):.2f} to {max(row.errors):.2f} % and "
        f"{ends} over {len(row.errors)} seeds"
    )


def _eta(made: Mapping[str, Row]) -> list[str]:
    """The eta-Trick with its two dual functions."""
    if not {*AS_PUBLISHED, *_INVERSE} <= made.keys():
        return []
    right, faulty = made["eta-trick"], made["eta-trick-published"]
    return [
        f"The eta-Trick keeps {right.fraction:.1%} of the weights with the dual function of the penalty, and "
        f"{faulty.fraction:.1%} as published, where the second term is doubled and 0.001 log η is added."
    ]


def _twins(made: Mapping[str, Row]) -> list[str]:
    """AdaTikhonov has LogSum's gradient but for one step and the smallest weights."""
    if not {"adatikhonov", "logsum"} <= made.keys():
        return []
    first, second = made["adatikhonov"], made["logsum"]
    error, fraction = abs(first.error - second.error), abs(first.fraction - second.fraction)
    return [
        "AdaTikhonov and LogSum, whose gradients are the same but for the smallest weights, end "
        f"{error:.2f} points of error and {fraction:.4f} of nonzero fraction apart."
    ]

"""What is plotted and tabled, as plain data for the results file; means, standard errors, comparisons."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fallow.errors import need
from fallow.papers._experiments import Cell

Found = Sequence[tuple[Cell, Mapping[str, Any]]]
Gathered = dict[str, list[Any]]
# A difference is called "not shown" within this many standard errors, and where one as large has more than
# this chance though nothing differs: with few seeds two standard errors alone are met too easily.
SHOWN, CHANCE = 2.0, 0.05
FEW, NOT_SHOWN = "too few seeds", "not shown"


def series(
    name: str,
    x: Sequence[float],
    y: Sequence[float],
    *,
    error: Sequence[float | None] | None = None,
    style: str = "line",
    label: str = "ours",
    group: str = "",
) -> dict[str, Any]:
    """One curve.

    Args:
        name: for the legend.
        x: places.
        y: values.
        error: standard errors.
        style: "line", "points", "dashed" or "steps" (a histogram by its middles).
        label: "ours", or how a reference line is known.
        group: curves of one group have one colour.
    """
    found = {"name": name, "x": list(x), "y": list(y), "error": error, "style": style, "label": label}
    return {**found, "group": group or name}


def panel(
    title: str, x: str, y: str, curves: Sequence[Mapping[str, Any]], *, log: bool = False, note: str = ""
) -> dict[str, Any]:
    """One set of axes."""
    return {"title": title, "x": x, "y": y, "log": log, "note": note, "series": list(curves)}


def heat(
    title: str, x: str, y: str, xs: Sequence[Any], ys: Sequence[Any], values: Sequence[Sequence[float | None]]
) -> dict[str, Any]:
    """A map of numbers: `values` holds a row for each of `ys`, in it one for each of `xs`."""
    grid = [list(row) for row in values]
    return {"kind": "heat", "title": title, "x": x, "y": y, "xs": [*xs], "ys": [*ys], "values": grid}


def table(
    caption: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], note: str = ""
) -> dict[str, Any]:
    """A table of numbers and words."""
    return {"caption": caption, "columns": list(columns), "rows": [list(row) for row in rows], "note": note}


def gathered(panels: list[Any], tables: list[Any], statements: list[str]) -> dict[str, list[Any]]:
    """What an item's `gather` returns."""
    return {"panels": panels, "tables": tables, "statements": statements}


def pick(found: Found, **tags: Any) -> list[tuple[Cell, Mapping[str, Any]]]:
    """The cells with these tags."""
    return [(c, r) for c, r in found if all(c.tags.get(key) == value for key, value in tags.items())]


def values(found: Found, tag: str) -> list[Any]:
    """The different values of a tag, in order."""
    return sorted({cell.tags[tag] for cell, _ in found})


def tasks(found: Found) -> list[str]:
    """The different tasks, in the order of the cells."""
    return list(dict.fromkeys(cell.tags["task"] for cell, _ in found if "task" in cell.tags))


def data_words(found: Found) -> list[str]:
    """Of training runs, a sentence a task: on which images, for how long, and what tested them."""
    said = []
    for task in tasks(found):
        result = pick(found, task=task)[0][1]
        if "data" not in result:
            continue
        data, config = result["data"], result["config"]
        notes = "; ".join(str(note).rstrip(".") for note in data.get("notes", []))
        said.append(
            f"{task}: {data['train']} training images, {config['epochs']} epochs, batch "
            f"{config['batch_size']}, learning rate {config['learning_rate']:g}, error on {data['test']} "
            f"test images." + (f" {notes}." if notes else "")
        )
    return said


def over_epochs(
    name: str, runs: Sequence[Sequence[Mapping[str, Any]]], key: str, factor: float = 1.0
) -> dict[str, Any]:
    """A number of the epochs' records, times `factor`: its mean over runs, with standard errors.

    An epoch in which no run has a number, or none was measured, is left out.
    """
    points = [
        (records[0]["epoch"], *mean_and_error(known))
        for records in zip(*runs, strict=True)
        if (known := [factor * value for record in records if (value := record.get(key)) is not None])
    ]
    return series(name, [x for x, *_ in points], [m for _, m, _ in points], error=[e for *_, e in points])


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error; None for the error of a single value."""
    mean = statistics.fmean(values)
    return mean, statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def grouped(
    found: Found, keys: Sequence[str], value: Callable[[Mapping[str, Any]], float | None]
) -> dict[tuple[Any, ...], dict[int, float]]:
    """Values by the tags `keys`, and within by seed; a value of None is left out."""
    groups: dict[tuple[Any, ...], dict[int, float]] = {}
    for cell, result in found:
        number = value(result)
        if number is not None and all(key in cell.tags for key in keys):
            groups.setdefault(tuple(cell.tags[key] for key in keys), {})[cell.tags["seed"]] = number
    return groups


def compared(first: Mapping[int, float], second: Mapping[int, float]) -> dict[str, Any] | None:
    """First minus second over the seeds that both have, in pairs.

    Returns:
        difference: its mean; error: its standard error; apart: how many of them it is from 0; chance: of a
        mean at least as far out where nothing differs (Student's t, two-sided); seeds: how many pairs. None
        with less than two pairs.

    Estimator:
        Pairs share data and initial weights, so what they have in common cancels. With few seeds the standard
        error is itself uncertain; `chance` counts that in, `apart` does not.
    """
    pairs = [first[seed] - second[seed] for seed in sorted(first) if seed in second]
    if len(pairs) < 2:
        return None
    mean, error = mean_and_error(pairs)
    assert error is not None
    error = error if error > 1e-9 * abs(mean) else 0.0  # what rounding leaves of equal differences
    apart = mean / error if error else math.copysign(math.inf, mean) if mean else 0.0
    chance = float(2 * need("scipy.stats", "lab").t.sf(abs(apart), len(pairs) - 1))
    return {"difference": mean, "error": error, "apart": apart, "chance": chance, "seeds": len(pairs)}


def is_shown(found: Mapping[str, Any]) -> bool:
    """Whether a comparison shows a difference, by `SHOWN` and `CHANCE`.

    Never from pairs that all differ by the same: errors are counts of few images, so that two or three of
    them coincide now and then, and their spread of 0 is no standard error.
    """
    apart = abs(found["apart"])
    return SHOWN <= apart < math.inf and found["chance"] <= CHANCE


def told(found: Mapping[str, Any] | None, less: str, more: str) -> str:
    """`less` or `more`, whichever a comparison shows; or that it shows neither."""
    if found is None or found["seeds"] < 3:
        return FEW
    if not is_shown(found):
        return NOT_SHOWN
    return less if found["difference"] < 0 else more


def verdict(found: Mapping[str, Any] | None, lower: str, higher: str) -> str:
    """Which of two rules has the smaller error, in words; or that none is shown to have it."""
    return told(found, f"{lower} better", f"{higher} better")

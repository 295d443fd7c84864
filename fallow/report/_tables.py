"""The tables of the page: every figure in numbers, for readers who cannot or would rather not see it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fallow.report import _words as words
from fallow.report._words import get, number, records

ARMS = ("model", "twin")


@dataclass(frozen=True)
class Table:
    """Cells of text; the first of a row names it."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def arms(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The arms a run has, "model" and where there is one "twin"."""
    found = {arm: get(results, "arms", arm) for arm in ARMS}
    return {arm: value for arm, value in found.items() if isinstance(value, dict)}


def label(results: dict[str, Any], arm: str) -> str:
    """What the run calls an arm."""
    said = get(results, "arms", arm, "label")
    return (
        said
        if isinstance(said, str) and said
        else {"model": "stochastic depth", "twin": "constant depth"}[arm]
    )


def epoch_of(record: dict[str, Any], index: int) -> float:
    """The epoch a record is of, its place in the list where it does not say."""
    stated = number(record.get("epoch"))
    return float(index + 1) if stated is None else stated


def series(arm: Any, key: str) -> list[tuple[float, float]]:
    """(epoch, value) of the epochs in which `key` is a finite number."""
    pairs = ((epoch_of(r, i), number(r.get(key))) for i, r in enumerate(records(get(arm, "epochs"))))
    return [(epoch, value) for epoch, value in pairs if value is not None]


def epochs(results: dict[str, Any], caption: str, keys: dict[str, Any]) -> Table:
    """One row an epoch; for each arm the columns of `keys`, key -> (name, writer of text)."""
    columns: list[str] = ["epoch"]
    cells: dict[float, list[str]] = {}
    width = len(arms(results)) * len(keys)
    for arm, value in arms(results).items():
        for key, (name, write) in keys.items():
            for index, record in enumerate(records(value.get("epochs"))):
                row = cells.setdefault(epoch_of(record, index), [words.MISSING] * width)
                row[len(columns) - 1] = write(record.get(key))
            columns.append(f"{name}, {label(results, arm)}")
    rows = tuple((words.plain(epoch), *row) for epoch, row in sorted(cells.items()))
    return Table(caption, tuple(columns), rows)


def sites(results: dict[str, Any]) -> Table:
    """Every site with its cost share and its asked and realised survival rate."""
    rows = [
        (
            str(index + 1),
            str(site.get("name", words.MISSING)),
            str(site.get("kind", words.MISSING)),
            words.percent(site.get("cost")),
            words.ratio(site.get("asked")),
            words.ratio(site.get("realised")),
        )
        for index, site in enumerate(records(results.get("sites")))
    ]
    columns = ("site", "name", "kind", "share of a step's FLOPs", "rate asked", "rate realised")
    return Table("Survival rate of every site", columns, tuple(rows))


def ideals(results: dict[str, Any]) -> tuple[Any, Any]:
    """The ideal ratios of time (from the measured share where known, else from FLOPs) and of FLOPs."""
    flops, time = get(results, "budget", "ideal_flops"), get(results, "budget", "ideal_time")
    return (flops if number(time) is None else time), flops


def ratios(results: dict[str, Any]) -> list[tuple[str, float, float | None, float | None, float | None]]:
    """What is compared with constant depth: (name, ratio, low, high, ideal), where measured."""
    summary, time, flops = get(results, "summary"), *ideals(results)
    asked = [
        ("CPU time per step", get(summary, "time_ratio"), time),
        ("wall time per step", get(summary, "wall_ratio"), time),
        ("peak memory", {"median": get(summary, "memory_ratio")}, flops),
        ("FLOPs, realised", {"median": get(summary, "realised_cost")}, flops),
    ]
    return [
        (name, median, number(get(value, "low")), number(get(value, "high")), number(ideal))
        for name, value, ideal in asked
        if (median := number(get(value, "median"))) is not None
    ]


def against_ideal(results: dict[str, Any]) -> Table:
    """The ratios to constant depth with their intervals, beside the ideals."""
    rows = [
        (
            name,
            words.ratio(value),
            words.interval({"low": low, "high": high}, ".3f") or words.MISSING,
            words.ratio(ideal),
        )
        for name, value, low, high, ideal in ratios(results)
    ]
    budget = get(results, "budget")
    rows += [
        (name, words.ratio(get(budget, key)), words.MISSING, words.MISSING)
        for name, key in (
            ("ideal from counted FLOPs", "ideal_flops"),
            ("ideal from measured time", "ideal_time"),
        )
        if number(get(budget, key)) is not None
    ]
    return Table("Ratios to constant depth", ("measure", "ratio", "interval", "ideal"), tuple(rows))


def _measures(results: dict[str, Any]) -> list[tuple[str, Callable[[str, Any], str], Any, Any]]:
    """The rows of the summary: (name, text of an arm, ratio to the twin, ideal)."""
    found, time, flops = get(results, "summary"), *ideals(results)
    cost = get(found, "realised_cost")

    def of(key: str, write: Callable[[Any], str]) -> Callable[[str, Any], str]:
        return lambda _, arm: write(get(arm, "summary", key))

    def error(_: str, arm: Any) -> str:
        return words.with_error(get(arm, "summary", "test_error"), get(arm, "summary", "test_images"))

    cpu, wall = get(found, "time_ratio", "median"), get(found, "wall_ratio", "median")
    return [
        ("test error", error, None, None),
        ("test images", of("test_images", words.count), None, None),
        ("validation error", of("validation_error", words.percent), None, None),
        ("CPU time per step (median)", of("cpu_s_per_step", words.milliseconds), cpu, time),
        ("wall time per step (median)", of("wall_s_per_step", words.milliseconds), wall, time),
        ("peak memory", of("peak_memory_mb", words.megabytes), get(found, "memory_ratio"), flops),
        ("realised depth", of("realised_depth", lambda x: words.plain(x, ".2f")), None, None),
        ("share of a step's FLOPs", lambda arm, _: words.ratio(cost if arm == "model" else 1.0), cost, flops),
        ("parameters", lambda _, arm: words.count(arm.get("parameters")), None, None),
    ]


def summary(results: dict[str, Any]) -> Table:
    """The run in one table: a row a measure that there is, a column an arm."""
    present = arms(results)
    paired = len(present) == len(ARMS)
    rows = []
    for name, write, ratio, ideal in _measures(results):
        cells = [write(arm, value) for arm, value in present.items()]
        if any(cell != words.MISSING for cell in cells):
            rows.append((name, *cells, *((words.ratio(ratio), words.ratio(ideal)) if paired else ())))
    columns = ("measure", *(label(results, arm) for arm in present), *(("ratio", "ideal") if paired else ()))
    return Table("Summary", columns, tuple(rows))


def compared(named: Sequence[tuple[str, dict[str, Any]]]) -> Table:
    """Several runs, a row an arm."""
    rows = [
        (
            f"{name}: {label(results, arm)}",
            words.with_error(get(value, "summary", "test_error"), get(value, "summary", "test_images")),
            words.count(get(value, "summary", "test_images")),
            words.milliseconds(get(value, "summary", "cpu_s_per_step")),
            words.ratio(get(results, "summary", "time_ratio", "median")) if arm == "model" else words.MISSING,
            words.ratio(ideals(results)[0]) if arm == "model" else words.MISSING,
            words.megabytes(get(value, "summary", "peak_memory_mb")),
            str(results.get("status", words.MISSING)),
        )
        for name, results in named
        for arm, value in arms(results).items()
    ]
    columns = (
        "run",
        "test error",
        "test images",
        "CPU time per step",
        "ratio",
        "ideal",
        "peak memory",
        "status",
    )
    return Table("The runs compared", columns, tuple(rows))


def pairs(caption: str, mapping: Any) -> Table:
    """A mapping as a table of keys and values; nested values as JSON."""
    rows = [(str(key), _text(value)) for key, value in mapping.items()] if isinstance(mapping, dict) else []
    return Table(caption, ("key", "value"), tuple(rows))


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return "none"
    return json.dumps(value, ensure_ascii=False)

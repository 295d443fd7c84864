"""The part of the page that shows a sparsification: what is zero, what is left, and what it takes now."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fallow.report import _sparse_plots, _tables, _words
from fallow.report._section import Section, Tile
from fallow.report._tables import Table
from fallow.report._words import get, number, records

SIDES = ("dense", "small")
_FOOT = (
    "A test error ± its standard error covers the chance of the test images, not that of another seed. "
    "Latencies are medians of one machine."
)
_SMALL = (
    "Before: the trained network with its zeros in place. After: the network without the neurons, filters "
    "and heads that are all zeros; single zeros in what stays save no operation of a dense network."
)
_STAYED = "would be empty: the largest of its groups stayed"


def share_of(found: Any) -> float | None:
    """After over before; None where one is missing or before is 0."""
    before, after = (number(get(found, side)) for side in SIDES)
    return None if not before or after is None else after / before


def times(ratio: Any) -> str:
    """How many times more there was before."""
    found = number(ratio)
    if not found or found < 0:
        return _words.MISSING
    return _words.plain(found, ".2f" if found < 10 else ".1f" if found < 100 else ".0f", unit="times")


def _inverse(share: float | None) -> str:
    return times(1 / share) if share else _words.MISSING


def headline(results: dict[str, Any]) -> str:
    """One sentence with what the run found."""
    zeros, error = get(results, "summary", "sparsity"), get(results, "test", "test_error")
    if number(error) is None:
        return f"{_words.percent(zeros, 1)} of the weights are zero so far: no test error yet."
    images = get(results, "test", "test_images")
    said = (
        f"{_words.percent(zeros)} of the weights are zero; the test error is "
        f"{_words.with_error(error, images)} on {_words.count(images)} images"
    )
    flops, time = (share_of(get(results, "small", key)) for key in ("flops", "latency_ms"))
    if flops is not None:
        said += f"; the smaller network takes {_words.plain(flops, '.2f')} of the FLOPs"
        said += "" if time is None else f" and {_words.plain(time, '.2f')} of the time"
    elif isinstance(get(results, "small", "failed"), str):
        said += "; the network could not be made smaller"
    return f"{said}."


def tiles(results: dict[str, Any]) -> tuple[Tile, ...]:
    """The figures a reader looks for first, those of them that the run has."""
    test, summary, small = (get(results, key) for key in ("test", "summary", "small"))
    error, images, kept = get(test, "test_error"), get(test, "test_images"), get(summary, "kept")
    flops, latency = get(small, "flops"), get(small, "latency_ms")
    candidates = [
        (error, "test error", _words.with_error(error, images), f"on {_words.count(images)} images"),
        (
            kept,
            "weights left",
            _words.count(kept),
            f"of {_words.count(get(summary, 'weights'))}; compression {times(get(summary, 'compression'))}",
        ),
        (
            share_of(flops),
            "FLOPs of an image",
            _words.plain(share_of(flops), ".2f"),
            f"of before: {_words.count(get(flops, 'small'))} of {_words.count(get(flops, 'dense'))}",
        ),
        (
            share_of(latency),
            "latency",
            _words.plain(share_of(latency), ".2f"),
            f"of before: {_milliseconds(get(latency, 'small'))} of {_milliseconds(get(latency, 'dense'))} "
            f"for {_words.count(get(latency, 'rows'))} images",
        ),
    ]
    return tuple(Tile(*texts) for value, *texts in candidates if number(value) is not None)


def _milliseconds(value: Any) -> str:
    found = number(value)
    return _words.plain(value) if found is None else _words.milliseconds(found / 1000)


def _kilobytes(value: Any) -> str:
    return _words.plain(value, ",.1f", 1 / 1000, "kB").replace(",", "\u202f")


def summary(results: dict[str, Any]) -> Table:
    """The run in one table: before and after, and how many times more before was."""
    test, found, small = (get(results, key) for key in ("test", "summary", "small"))
    rows = []
    if number(get(test, "test_error")) is not None:
        error = _words.with_error(get(test, "test_error"), get(test, "test_images"))
        rows.append(("test error with the zeros", error, _words.MISSING, _words.MISSING))
    if number(get(found, "kept")) is not None:
        counts = (_words.count(get(found, key)) for key in ("weights", "kept"))
        rows.append(("weights that are not zero", *counts, times(get(found, "compression"))))
    timed = _words.count(get(small, "latency_ms", "rows"))
    measures = [
        ("parameters", get(small, "parameters"), _words.count),
        ("FLOPs of an image", get(small, "flops"), _words.count),
        (f"latency of {timed} images", get(small, "latency_ms"), _milliseconds),
        ("file of weights", get(small, "bytes"), _kilobytes),
    ]
    for name, pair, write in measures:
        if number(get(pair, "small")) is not None:
            cells = (write(get(pair, side)) for side in SIDES)
            rows.append((name, *cells, _inverse(share_of(pair))))
    pair = {"dense": get(small, "bytes", "dense"), "small": get(small, "bytes", "sparse")}
    if number(pair["small"]) is not None:
        rows.append(
            ("file with sparse rows (CSR)", *(_kilobytes(pair[s]) for s in SIDES), _inverse(share_of(pair)))
        )
    return Table("Before and after", ("measure", "before", "after", "before / after"), tuple(rows))


def layers(results: dict[str, Any]) -> Table:
    """Every layer: its shape, what is left of it, its shape in the smaller network."""
    shapes = get(results, "small", "shapes")
    rows = []
    for layer in records(results.get("layers")):
        name, before = str(layer.get("name", _words.MISSING)), layer.get("shape")
        kept, weights = number(layer.get("kept")), number(layer.get("weights"))
        groups, whole = number(layer.get("kept_groups")), number(layer.get("groups"))
        grouped = f"{_words.count(groups)} of {_words.count(whole)}" if whole != weights else _words.MISSING
        rows.append(
            (
                name,
                _shape(before),
                f"{_words.count(kept)} of {_words.count(weights)}",
                _words.percent(kept / weights if weights and kept is not None else None),
                grouped,
                _shape(get(shapes, name)),
            )
        )
    columns = ("layer", "shape before", "weights left", "share", "groups left", "shape after")
    if all(row[4] == _words.MISSING for row in rows):
        columns, rows = (*columns[:4], columns[5]), [(*row[:4], row[5]) for row in rows]
    return Table("Layers before and after", columns, tuple(rows))


def _shape(value: Any) -> str:
    sizes = _words.numbers(value)
    return f"{_words.SPACE}×{_words.SPACE}".join(f"{size:g}" for size in sizes) or _words.MISSING


def left(results: dict[str, Any]) -> Table:
    """What is zero or constant and stays in the smaller network, with the reason."""
    rows = tuple(
        (str(item.get("name", "")), _words.count(item.get("count")), str(item.get("reason", "")))
        for item in records(get(results, "small", "left"))
    )
    return Table("What is dead and stays all the same", ("layer", "units", "reason"), rows)


def rescued(results: dict[str, Any]) -> list[str]:
    """The layers that the target would have emptied, and what stayed of each."""
    names, found = results.get("rescued"), []
    for name in names if isinstance(names, list) else ():
        words = get(results, "stayed", name)  # results of older versions have none
        found.append(f"{name} {words if isinstance(words, str) else _STAYED}")
    return found


def notes(results: dict[str, Any]) -> tuple[str, ...]:
    """What a reader must mind."""
    found = []
    failed = get(results, "small", "failed")
    if isinstance(failed, str):
        found.append(f"The network could not be made smaller; its zeros are in the files. {failed}.")
    spared = results.get("spared")
    for name in spared if isinstance(spared, list) else ():
        found.append(f"The outputs of {name} are the classes, so all of them stay.")
    short = get(results, "shortfall")
    asked, reached = (number(get(short, key)) for key in ("asked", "reached"))
    if asked is not None and reached is not None:
        found.append(
            f"The target was not met: {_words.percent(reached)} zeros instead of {_words.percent(asked)}, "
            f"because {get(short, 'reason')}."
        )
    found += [f"{said}." for said in rescued(results)]
    gap, largest = (number(get(results, "small", key)) for key in ("largest_difference", "largest_output"))
    if gap is not None and largest is not None:
        found.append(
            f"On the test images the smaller network's outputs differ from the larger one's by at most "
            f"{_words.plain(gap, '.1e')}; the largest output is {_words.plain(largest, '.3g')}."
        )
    exported = get(results, "small", "exported")
    found += [f"small/: {exported}."] if isinstance(exported, str) else []
    more = get(results, "provenance", "data", "notes")
    found += [note for note in more if isinstance(note, str)] if isinstance(more, list) else []
    return tuple(found)


def status_words(results: dict[str, Any]) -> str:
    """What a reader must know about a run that is not done; empty for one that is."""
    status, done = results.get("status"), len(records(results.get("epochs")))
    if status == "done":
        return ""
    reached = f"after {done} epoch{'' if done == 1 else 's'}"
    words = {
        "running": f"This run had not finished when its results were read: they stop {reached}.",
        "interrupted": f"This run was interrupted {reached}; fallow sparsify --resume continues it.",
        "failed": f"This run failed {reached}; what it had found until then is below.",
    }
    said = words.get(str(status), f"This run has the unknown status {status!r}; its results stop {reached}.")
    reason = results.get("message")
    return f"{said} {reason}" if isinstance(reason, str) and reason else said


def section(name: str, results: dict[str, Any], index: int) -> Section:
    """One run's part of the page."""
    provenance = get(results, "provenance")
    provenance = dict(provenance) if isinstance(provenance, dict) else {}
    data = provenance.pop("data", None)
    data = {k: v for k, v in data.items() if k != "notes"} if isinstance(data, dict) else {}
    details = (
        _tables.pairs("Provenance", provenance),
        _tables.pairs("Data set", data),
        _tables.pairs("Configuration", results.get("config")),
    )
    return Section(
        anchor=f"run-{index + 1}",
        name=name,
        status=str(results.get("status", "unknown")),
        warning=status_words(results),
        headline=headline(results),
        tiles=tiles(results),
        summary=summary(results),
        plots=tuple(_sparse_plots.of_run(results, f"run-{index + 1}-")),
        notes=notes(results),
        details=tuple(table for table in details if table.rows),
        small=_SMALL if get(results, "small", "flops") else "",
        notes_title="What to mind",
        foot=_FOOT,
        tables=tuple(table for table in (layers(results), left(results)) if table.rows),
    )


def compared(named: Sequence[tuple[str, dict[str, Any]]]) -> Table:
    """Several runs, a row each."""
    rows = []
    for name, results in named:
        test, small = get(results, "test"), get(results, "small")
        rows.append(
            (
                name,
                str(get(results, "config", "strategy") or _words.MISSING),
                str(get(results, "config", "groups") or _words.MISSING),
                _words.percent(get(results, "summary", "sparsity")),
                times(get(results, "summary", "compression")),
                _words.with_error(get(test, "test_error"), get(test, "test_images")),
                _words.plain(share_of(get(small, "flops")), ".3f"),
                _words.plain(share_of(get(small, "latency_ms")), ".3f"),
                str(results.get("status", _words.MISSING)),
            )
        )
    columns = "run, strategy, groups, zeros, compression, test error, FLOPs, latency, status"
    return Table("The runs compared", tuple(columns.split(", ")), tuple(rows))

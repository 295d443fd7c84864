"""What a reproduction leaves: all that is done, gathered into one results.json."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fallow._version import __version__
from fallow.errors import DataError
from fallow.papers import _cells
from fallow.papers._cells import ORIGIN
from fallow.papers._experiments import LABELS, Cell, Item, Paper
from fallow.papers._runner import Outcome, folder_of
from fallow.recipes._results import now
from fallow.recipes._run import RESULTS, RunFolder

SCHEMA = 1


def is_done(cell: Cell, home: Path) -> bool:
    """Whether a cell has run to its end; not so where its file cannot be read."""
    try:
        return _cells.is_done(cell, folder_of(cell, home))
    except DataError:
        return False


def results_in(home: Path) -> dict[str, Any]:
    """What a reproduction left in its folder; empty where that cannot be read, in whole or in part."""
    try:
        found = json.loads((home / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not found or not isinstance(found, dict):
        return {}
    parts = {key: found[key] for key in ("paper", "provenance") if isinstance(found.get(key), dict)}
    return {**found, "paper": {}, "provenance": {}, **parts}


def failed_in(home: Path) -> dict[str, str]:
    """The cells that failed when they were last run, with the reason, as the results in a folder say."""
    return _failures(_cells_in(results_in(home)))


def _failures(cells: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    return {name: str(cell.get("message", "")) for name, cell in cells.items() if cell["status"] == "failed"}


def _cells_in(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The records of cells by name; those that were changed into something else are left out."""
    cells = results.get("cells")
    whole = [cell for cell in cells if isinstance(cell, dict)] if isinstance(cells, list) else []
    return {str(cell["name"]): cell for cell in whole if "name" in cell and "status" in cell}


def write_results(
    paper: Paper,
    scale: str,
    home: Path,
    command: str,
    outcomes: Sequence[Outcome],
    remarks: Sequence[str] = (),
) -> None:
    """Gather all that is done, of this call and of earlier ones, into results.json.

    Args:
        paper: what is reproduced.
        scale: one of its.
        home: the folder.
        command: what the user called.
        outcomes: how the cells ended that this call ran.
        remarks: sentences that are kept with the results, beside those that are there already.

    Raises:
        DataError: what a finished cell left cannot be read.
        RunError: the file cannot be written.
    """
    kept = results_in(home)
    before, cells_before = kept.get("provenance", {}), _cells_in(kept)
    remarks = list(dict.fromkeys([*before.get("remarks", []), *remarks]))
    everything = paper.cells(paper.items, scale)
    seeds = sorted({cell.tags["seed"] for cell in everything if "seed" in cell.tags})
    failed = _failures(cells_before)  # a call that did not run them, or not to their end, knows no better
    failed |= {outcome.name: outcome.message for outcome in outcomes if outcome.status == "failed"}
    origins = _inherited(cells_before, before)
    records = [_record(cell, home, failed, origins) for cell in sorted(everything, key=lambda c: c.name)]
    finished = [record["name"] for record in records if record["status"] == "done"]
    ran = any(outcome.status == "done" for outcome in outcomes) or any(
        cells_before.get(name, {}).get("status") != "done"
        for name in finished  # by a call that was killed
    )
    session = _provenance(command) if ran or not before else before
    provenance = {**session, **_origins(records), "remarks": remarks, "seeds": seeds}
    items = [_gathered(item, scale, home) for item in paper.items if item.cells.get(scale)]
    done = sum(is_done(cell, home) for cell in everything)
    results = {
        "schema": SCHEMA,
        "kind": "paper",
        "status": "done" if done == len(everything) else "partial",
        "paper": {
            "name": paper.name,
            "title": paper.title,
            "cite": paper.cite,
            "notes": list(paper.notes),
            "labels": LABELS,
        },
        "scale": scale,
        "settings": {"about": paper.scales[scale].about, "takes": paper.scales[scale].takes},
        "items": items,
        "cells": records,
        "provenance": provenance,
    }
    RunFolder(home, command).write_json(RESULTS, results)


def _provenance(command: str) -> dict[str, Any]:
    """Of this call; what the cells say of themselves goes before it."""
    return {
        "command": command,
        "fallow": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "hardware": _cells.hardware("cuda" if torch.cuda.is_available() else "cpu"),
        "finished": now(),
    }


def _inherited(cells: Mapping[str, Mapping[str, Any]], provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Where finished cells come from as the results so far say: each of itself, or one line of them all."""
    apart = any(key in cell for cell in cells.values() for key in ORIGIN)
    found = {}
    for name, cell in cells.items():
        if cell["status"] == "done":
            source = cell if apart else provenance
            found[name] = {key: source[key] for key in ORIGIN if isinstance(source.get(key), str)}
    return found


def _origins(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Where the finished cells come from: every different version and machine, and when the last ended."""
    found = {key: sorted({record[key] for record in records if key in record}) for key in ORIGIN}
    told = {key: " and ".join(values) for key, values in found.items() if values}
    return told | ({"finished": found["finished"][-1]} if found["finished"] else {})


def _gathered(item: Item, scale: str, home: Path) -> dict[str, Any]:
    cells = item.cells[scale]
    done = [(cell, _cells.result(cell, folder_of(cell, home))) for cell in cells if is_done(cell, home)]
    found = item.gather(done) if done else {}
    return {
        "name": item.name,
        "title": item.title,
        "shows": item.shows,
        "status": "done" if len(done) == len(cells) else "partial" if done else "not run",
        "cells_done": len(done),
        "cells": len(cells),
        "differences": [*item.differences.get("", ()), *item.differences.get(scale, ())],
        "known": [known.as_dict() for known in item.known],
        **{"panels": [], "tables": [], "statements": []},
        **found,
    }


def _record(
    cell: Cell, home: Path, failed: Mapping[str, str], origins: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    """A cell in short: what it was asked, how far it is, its single numbers, where they come from."""
    record: dict[str, Any] = {"name": cell.name, "tags": dict(cell.tags), "options": dict(cell.options)}
    if not is_done(cell, home):
        reason = {"message": failed[cell.name]} if cell.name in failed else {}
        return {**record, "status": "failed" if reason else "open", **reason}
    folder = folder_of(cell, home)
    found = _cells.result(cell, folder)
    numbers = {key: value for key, value in found.items() if isinstance(value, int | float)}
    whence = {**origins.get(cell.name, {}), **_cells.origin(cell, folder)}
    return {**record, "status": "done", "seconds": _cells.seconds(cell, folder), "found": numbers, **whence}

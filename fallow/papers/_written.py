"""What a reproduction leaves: all that is done, gathered into one results.json."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fallow._version import __version__
from fallow.errors import DataError
from fallow.papers import _cells
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


def write_results(
    paper: Paper,
    scale: str,
    home: Path,
    command: str,
    outcomes: Sequence[Outcome],
    remarks: Sequence[str] = (),
) -> None:
    """Gather all that is done, of this call and of earlier ones, into results.json."""
    kept = results_in(home)
    before = kept.get("provenance", {})
    ran = any(outcome.status == "done" for outcome in outcomes)
    remarks = list(dict.fromkeys([*before.get("remarks", []), *remarks]))
    everything = paper.cells(paper.items, scale)
    seeds = sorted({cell.tags["seed"] for cell in everything if "seed" in cell.tags})
    provenance = _provenance(command, remarks) if ran or not before else {**before, "remarks": remarks}
    provenance["seeds"] = seeds
    failed = {outcome.name: outcome.message for outcome in outcomes if outcome.status == "failed"}
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
        "cells": [_record(cell, home, failed) for cell in sorted(everything, key=lambda cell: cell.name)],
        "provenance": provenance,
    }
    RunFolder(home, command).write_json(RESULTS, results)


def _provenance(command: str, remarks: list[str]) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hardware = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.machine()} CPU with {torch.backends.cpu.get_cpu_capability()}, one thread a cell"
    )
    return {
        "command": command,
        "fallow": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "hardware": hardware,
        "finished": now(),
        "remarks": remarks,
    }


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


def _record(cell: Cell, home: Path, failed: dict[str, str]) -> dict[str, Any]:
    """A cell in short: what it was asked, how far it is, its single numbers."""
    record: dict[str, Any] = {"name": cell.name, "tags": dict(cell.tags), "options": dict(cell.options)}
    if not is_done(cell, home):
        reason = {"message": failed[cell.name]} if cell.name in failed else {}
        return {**record, "status": "failed" if reason else "open", **reason}
    folder = folder_of(cell, home)
    found = _cells.result(cell, folder)
    numbers = {key: value for key, value in found.items() if isinstance(value, int | float)}
    return {**record, "status": "done", "seconds": _cells.seconds(cell, folder), "found": numbers}

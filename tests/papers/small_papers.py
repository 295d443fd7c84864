"""A small paper for tests of the shelf, and work that counts how often it is done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fallow.papers._experiments import Cell, Item, Known, Paper, Scale
from fallow.papers._panels import Found

TRAIN = {"model": "resnet20", "train_size": 60, "batch_size": 20, "epochs": 2, "budget": 0.8}


def draw(parts: int, log: str, pieces: Callable[..., Any]) -> dict[str, Any]:
    """Sums of random numbers, a part at a time; each part that is computed leaves a line in the log.

    A file KILL beside the log, with the number of a part in it, kills the process in that part.
    """

    def one(part: int) -> float:
        kill = Path(log).with_name("KILL")
        if kill.exists() and kill.read_text() == str(part):
            kill.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        with Path(log).open("a") as file:
            file.write(f"{part}\n")
        return torch.randn(3).sum().item()

    found = [pieces(f"part{part}", lambda part=part: one(part)) for part in range(parts)]
    return {"sum": sum(found), "last": torch.randn(()).item()}


def fails(log: str, pieces: Callable[..., Any]) -> dict[str, Any]:
    """Fails while there is a file BROKEN beside the log."""
    from fallow.errors import RunError

    if Path(log).with_name("BROKEN").exists():
        raise RunError("it is broken")
    return {"sum": 1.0}


def dies(log: str, pieces: Callable[..., Any]) -> dict[str, Any]:
    """Kills the process that it runs in."""
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def errs(log: str, pieces: Callable[..., Any]) -> dict[str, Any]:
    """Raises what no cell should."""
    raise ZeroDivisionError("by nothing")


def sleeps(log: str, pieces: Callable[..., Any]) -> dict[str, Any]:
    """Writes its process id, then sleeps for a minute."""
    Path(log).write_text(str(os.getpid()))
    time.sleep(60)
    return {}


def gather(found: Found) -> Mapping[str, Any]:
    """A table of what the cells found."""
    rows = [[cell.name, result.get("sum", result.get("test_error"))] for cell, result in found]
    words = [str(result.get("last", "")) for _, result in found]
    return {"panels": [], "tables": [{"caption": "all", "columns": ["cell", "found"], "rows": rows}]} | {
        "statements": words
    }


def paper(
    folder: Path, *, training: bool = False, work: Any = draw, takes: str = "", **options: Any
) -> Paper:
    """A paper of two items that share a cell."""
    log = str(folder / "log")
    given = options or ({"parts": 3} if work is draw else {})
    cells = [Cell(f"work{i}", {**given, "log": log + str(i)}, {"seed": i}, work=work) for i in range(3)]
    if training:
        cells.append(Cell("train", TRAIN, {"seed": 0}))
    first = Item(
        "first", "The first", "something", {"tiny": cells[:2]}, gather, (Known("x", "lit", "y", 1.0),)
    )
    second = Item("second", "The second", "more", {"tiny": cells[1:]}, gather, (), {"": ("ours is small",)})
    scales = {"tiny": Scale("small", takes)}
    return Paper("small1999", "A small paper", "Nobody, 1999", (first, second), scales, ("all is ours",))


def main(folder: str, jobs: str, work: str) -> None:
    """Reproduce it; for processes that may be killed."""
    from fallow.papers import shelf

    home = Path(folder)
    chosen = paper(home, training=True) if work == "draw" else paper(home, work=sleeps)
    shelf.reproduce(chosen, jobs=int(jobs), out=home / "out")


def process(*arguments: object, stderr: Any = subprocess.DEVNULL, **more: str) -> subprocess.Popen[bytes]:
    """`main` in another process; `more` is of its environment."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    program = f"import sys; sys.path[:0] = {paths!r}; import small_papers; small_papers.main(*sys.argv[1:])"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stderr=stderr)

"""Runs the cells of a paper side by side, each in its own folder; what is done stays done."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fallow.errors import FallowError, RunError, UsageError, need
from fallow.papers import _cells
from fallow.papers._experiments import Cell
from fallow.recipes._stop import Interrupted
from fallow.recipes.show import Show

CELLS = "cells"
_LOCK = ".lock"
_POLL = 0.5  # seconds between two looks at whether the process that started a worker is still there
_watching = False


@dataclass(frozen=True)
class Outcome:
    """How a cell ended: "done", "failed" or "interrupted", after so many seconds, with the reason."""

    name: str
    status: str
    seconds: float
    message: str = ""


class Watcher:
    """Is told how far a reproduction is; shows nothing. Progress tables inherit from it."""

    inner: Show | None = None  # where a training run of this very process shows its steps

    def begin(self, cells: Sequence[Cell], open_cells: Sequence[Cell], jobs: int) -> None:
        """The cells in all, those that are not done yet, and how many run at once."""

    def ended(self, outcome: Outcome) -> None:
        """A cell is over."""

    def end(self) -> None:
        """Nothing more comes."""


def run_cells(
    cells: Sequence[Cell],
    home: Path,
    *,
    jobs: int,
    data_dir: str | None = None,
    command: str = "fallow reproduce",
    watcher: Watcher | None = None,
    outcomes: list[Outcome] | None = None,
) -> list[Outcome]:
    """Run those cells that are not done.

    Args:
        cells: in the order in which they start.
        home: their folders are made in `cells/` below it.
        jobs: how many at once; 1: one after the other in this process.
        data_dir: where image sets are.
        command: what the user called, for the runs' results.
        watcher: is told of the progress.
        outcomes: each is put here as it comes, and so is there after an interruption too.

    Returns:
        How each cell that ran ended: `outcomes`. A cell that fails does not keep the others from running.

    Raises:
        UsageError: a folder holds a cell with other options or one that was begun on another kind of device,
            or another process works here.
        DataError: a cell's file cannot be read.
        RunError: a process that ran cells was killed.
        Interrupted: SIGINT or SIGTERM came; what is done stays.
    """
    watcher = watcher or Watcher()
    for cell in cells:
        _cells.refuse_other(cell, folder_of(cell, home))
    waiting = [cell for cell in cells if not _cells.is_done(cell, folder_of(cell, home))]
    jobs = max(1, min(jobs, len(waiting)))
    outcomes = [] if outcomes is None else outcomes
    watcher.begin(cells, waiting, jobs)
    try:
        with alone(home), _terminable():
            for outcome in _outcomes(waiting, home, jobs, data_dir, command, watcher.inner):
                outcomes.append(outcome)
                watcher.ended(outcome)
    except KeyboardInterrupt:
        raise Interrupted(_stopped(home), signal.SIGINT) from None
    except Interrupted as stop:
        raise Interrupted(_stopped(home), stop.signal) from None
    finally:
        watcher.end()
    return outcomes


def folder_of(cell: Cell, home: Path) -> Path:
    """Where a cell's files are."""
    return home / CELLS / cell.name


def _stopped(home: Path) -> str:
    return f"interrupted; what is done is kept in {home}: give the same command again to go on"


def _outcomes(
    waiting: Sequence[Cell], home: Path, jobs: int, data_dir: str | None, command: str, inner: Show | None
) -> Iterator[Outcome]:
    tasks = [(cell, folder_of(cell, home), data_dir, command) for cell in waiting]
    if jobs <= 1:
        yield from (_one(*task, inner) for task in tasks)
        return
    joblib, killed = need("joblib", "lab"), need("joblib.externals.loky.process_executor", "lab")
    parallel = joblib.Parallel(n_jobs=jobs, batch_size=1, return_as="generator_unordered")
    try:
        yield from parallel(joblib.delayed(_in_worker)(os.getpid(), *task) for task in tasks)
    except killed.TerminatedWorkerError as error:
        raise RunError(
            f"a process that ran cells for {home} was killed, most often for want of memory: what is done is "
            f"kept; give the same command again, with fewer than --jobs {jobs}"
        ) from error


def _in_worker(parent: int, cell: Cell, folder: Path, data_dir: str | None, command: str) -> Outcome:
    """`_one` in a process that ends with the one that started it: nobody else writes to its folders then."""
    global _watching
    if not _watching and os.getppid() == parent:  # not so on another machine of a cluster
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
        _watching = True
    try:
        return _one(cell, folder, data_dir, command, None)
    except (KeyboardInterrupt, Interrupted):
        return Outcome(cell.name, "interrupted", 0.0)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL)
    os._exit(1)


def _one(cell: Cell, folder: Path, data_dir: str | None, command: str, inner: Show | None) -> Outcome:
    """Run one cell with one thread."""
    start, threads = time.monotonic(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _cells.run(cell, folder, data_dir, command, inner)
    except Interrupted:
        raise
    except Exception as error:  # whatever it is, it must not keep the other cells from running
        words = str(error) if isinstance(error, FallowError) else f"{type(error).__name__}: {error}"
        return Outcome(cell.name, "failed", time.monotonic() - start, words)
    finally:
        torch.set_num_threads(threads)
    return Outcome(cell.name, "done", time.monotonic() - start)


@contextlib.contextmanager
def alone(home: Path) -> Iterator[None]:
    """Inside, no other reproduction works in this folder.

    Raises:
        UsageError: one does.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield
        return
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock = (home / _LOCK).open("w")
    except OSError as error:
        raise UsageError(
            f"the folder {home} cannot be made or written to ({error.strerror}): name another with --out"
        ) from None
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(
                f"another fallow reproduce works in {home}: wait for it, or name another folder with --out"
            ) from None
        yield


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Inside, SIGTERM ends the work as Ctrl-C does, so that workers go too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _frame: object) -> None:
        raise Interrupted("", number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def expected_minutes(cells: Sequence[Cell], jobs: int) -> float:
    """Minutes that these cells should take side by side: their sum shared, or the longest alone."""
    return max(sum(c.minutes for c in cells) / max(jobs, 1), max((c.minutes for c in cells), default=0.0))

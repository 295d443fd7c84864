"""The shelf: papers that can be reproduced by one command, and the runner they share.

A paper is data (`_experiments.Paper`); `reproduce` runs its cells, gathers what is plotted, and leaves one
`results.json` from which the page is drawn.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fallow import data
from fallow.errors import DataError, RunError, UsageError, check_count, nearest
from fallow.papers import _cells, hayou2021, huang2016, lejeune2021, pal2020
from fallow.papers._experiments import Cell, Paper
from fallow.papers._runner import CELLS, Outcome, Watcher, expected_minutes, folder_of, run_cells
from fallow.papers._written import failed_in, is_done, results_in, write_results
from fallow.paths import expanded
from fallow.recipes._stop import Interrupted

__all__ = [
    "ALL",
    "AS_PUBLISHED",
    "PAPERS",
    "Done",
    "Entry",
    "cores",
    "entries",
    "home_of",
    "paper_of",
    "refuse_all",
    "reproduce",
]


PAPERS: dict[str, Paper] = {
    paper.name: paper for paper in (huang2016.PAPER, hayou2021.PAPER, pal2020.PAPER, lejeune2021.PAPER)
}
# Those of which the authors' code departs from the formulas, shown as the code has it; the same cells.
AS_PUBLISHED: dict[str, Paper] = {lejeune2021.PUBLISHED.name: lejeune2021.PUBLISHED}
ALL = "all"  # in place of a paper's name: every one of them
TWO_CORES = 2  # what expected times are said for


@dataclass(frozen=True)
class Done:
    """What a reproduction left.

    Attributes:
        folder: it holds results.json and the cells' folders.
        failed: the cells that failed, with the reason.
    """

    folder: Path
    failed: tuple[Outcome, ...]


@dataclass(frozen=True)
class Entry:
    """A line of the list: what there is, how to run it, what it should take, how far it is.

    Attributes:
        minutes: expected on two cores; at a scale of which the times are a GPU's, on one of these.
        state: of the run in `home_of`, in words.
    """

    paper: str
    item: str
    title: str
    scale: str
    command: str
    minutes: float
    state: str


def paper_of(name: str, *, as_published: bool = False) -> Paper:
    """The paper of that name; `as_published` where its authors' code departs from its formulas.

    Raises:
        UsageError: there is none, or it has no such variant.
    """
    if name in PAPERS:
        if as_published and name not in AS_PUBLISHED:
            raise UsageError(f"--as-published is for {', '.join(AS_PUBLISHED)} alone: leave it out")
        return AS_PUBLISHED[name] if as_published else PAPERS[name]
    close = nearest(name, PAPERS)
    hint = f"did you mean {close}? There" if close else "there"
    raise UsageError(f"no paper {name}: {hint} are {', '.join(PAPERS)}, or {ALL}")


def home_of(paper: str, scale: str) -> Path:
    """The folder that a reproduction gets where none is named."""
    return Path("runs") / f"{paper}-{scale}"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def entries(papers: Sequence[Paper] | None = None) -> list[Entry]:
    """Everything on the shelf, an item and a scale a line, with the state of the run in `home_of`."""
    found = []
    for paper in papers if papers is not None else PAPERS.values():
        for scale, about in paper.scales.items():
            home = home_of(paper.name, scale)
            failed = failed_in(home)
            for item in paper.items:
                cells = paper.cells([item], scale)
                if not cells:
                    continue
                command = f"fallow reproduce {paper.name} --only {item.name} --scale {scale}"
                minutes = expected_minutes(cells, 1 if about.on_gpu else TWO_CORES)
                state = _state(cells, home, failed)
                found.append(Entry(paper.name, item.name, item.title, scale, command, minutes, state))
    return found


def _state(cells: Sequence[Cell], home: Path, failed: Collection[str]) -> str:
    """In words, from the folders, and from the results which cells failed when they were last run."""
    if not home.is_dir():
        return "not run"
    left = [cell for cell in cells if not is_done(cell, home)]
    done, broken = len(cells) - len(left), sum(cell.name in failed for cell in left)
    if not done and not broken:
        return "not run"
    words = f"{done} of {len(cells)} cells" if left else "done"
    return f"{words}, {broken} failed" if broken else words


def reproduce(
    paper: str | Paper,
    *,
    scale: str = "tiny",
    only: Sequence[str] = (),
    jobs: int | None = None,
    out: str | os.PathLike[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    force: bool = False,
    watcher: Watcher | None = None,
    command: str | None = None,
    remarks: Sequence[str] = (),
) -> Done:
    """Run what is not done yet of a paper's items, and write what there is to `results.json`.

    Args:
        paper: its name, or an own `Paper`.
        scale: one of the paper's.
        only: names of items; none: all.
        jobs: cells at once, each with one thread; None: one a core, on a GPU one.
        out: folder; None: runs/PAPER-SCALE.
        data_dir: where image sets are.
        force: run what wants a GPU without one.
        watcher: is told of the progress.
        command: what the user called, for the results.
        remarks: sentences that are kept with the results, about the data for instance.

    Raises:
        UsageError: an unknown paper, item or scale; a scale that wants a GPU without one; a folder in use.
        DataError: an image set is not there; nothing was run then.
        RunError: a process that ran cells was killed; the same call goes on.
        Interrupted: on request; the same call goes on.
    """
    chosen = paper if isinstance(paper, Paper) else paper_of(paper)
    items = chosen.chosen(only, scale)
    jobs = (1 if torch.cuda.is_available() else cores()) if jobs is None else check_count("--jobs", jobs, 1)
    cells = chosen.cells(items, scale)
    home = home_of(chosen.name, scale) if out is None else Path(out)
    where = None if data_dir is None else str(data_dir)
    _refuse(chosen, scale, home, force)
    _need_data([cell for cell in cells if not is_done(cell, home)], where, (chosen, scale))
    command = command or f"fallow reproduce {chosen.name} --scale {scale}"
    outcomes: list[Outcome] = []
    how: Any = {"jobs": jobs, "data_dir": where, "command": command, "watcher": watcher}
    try:
        run_cells(cells, home, **how, outcomes=outcomes)
    except (Interrupted, RunError):  # on request, or a worker was killed
        write_results(chosen, scale, home, command, outcomes, remarks)
        raise
    write_results(chosen, scale, home, command, outcomes, remarks)
    return Done(home, tuple(outcome for outcome in outcomes if outcome.status == "failed"))


def refuse_all(homes: Mapping[str, Path], scale: str, data_dir: str | None, force: bool) -> None:
    """Refuse what `reproduce` would refuse of any of these papers, before the first of them runs.

    Args:
        homes: paper -> its folder.
        scale: of all of them.
        data_dir: where image sets are.
        force: run what wants a GPU without one.

    Raises:
        UsageError: a paper that has no such scale or wants a GPU; a folder that holds something else, or a
            cell with other options.
        DataError: an image set is not there.
    """
    to_run: list[Cell] = []
    for name, home in homes.items():
        paper = paper_of(name)
        cells = paper.cells(paper.chosen((), scale), scale)
        _refuse(paper, scale, home, force)
        for cell in cells:
            _cells.refuse_other(cell, folder_of(cell, home))
        to_run += [cell for cell in cells if not is_done(cell, home)]
    _need_data(to_run, data_dir)


def _refuse(paper: Paper, scale: str, home: Path, force: bool) -> None:
    """Refuse a scale that this machine is too small for, and a folder that holds something else."""
    takes = paper.scales[scale].takes
    if takes and not force and not torch.cuda.is_available():
        raise UsageError(
            f"{paper.name} at scale {scale} is for a GPU and torch sees none here: {takes}. Take another "
            "--scale, or go on all the same with --force"
        )
    if not home.exists():
        return
    if not home.is_dir():
        raise UsageError(f"{home} is a file, not a folder: name another place with --out")
    found = results_in(home)
    other = found and (found.get("paper", {}).get("name"), found.get("scale")) != (paper.name, scale)
    strange = not (home / CELLS).is_dir() and any(not path.name.startswith(".") for path in home.iterdir())
    if other or (not found and strange):
        raise UsageError(
            f"the folder {home} exists and holds something else than {paper.name} at scale {scale}: name "
            "another place with --out"
        )


def _need_data(cells: Sequence[Cell], data_dir: str | None, asked: tuple[Paper, str] | None = None) -> None:
    """Read every image set once before anything runs, so that a missing one costs no time.

    Args:
        cells: that are to run.
        data_dir: where image sets are.
        asked: the paper and the scale, of which what can run without is named; None: of none.

    Raises:
        DataError: a set is not there, or its folder.
    """
    if data_dir is not None and not os.path.isdir(expanded(data_dir)):
        raise DataError(f"the data folder {data_dir} does not exist: pass the folder that holds the files.")
    missing: dict[str, DataError] = {}
    for name in sorted({cell.data for cell in cells if cell.data}):
        try:
            data.load(name, data_dir)
        except DataError as error:
            missing[name] = error
    if missing:
        first, *others = missing
        also = f" Missing too: {', '.join(others)}." if others else ""
        without = "" if asked is None else _without(missing, *asked)
        raise DataError(f"{missing[first]}{also}{without}")


def _without(missing: Collection[str], paper: Paper, scale: str) -> str:
    """What can be run of a paper at a scale without these image sets, in words."""
    cells = {item.name: item.cells.get(scale, ()) for item in paper.items}
    able = [name for name, its in cells.items() if its and not any(cell.data in missing for cell in its)]
    return f" Without them run: --only {', --only '.join(able)}." if able else ""

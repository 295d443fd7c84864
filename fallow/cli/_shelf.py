"""The command `reproduce`: it parses, calls the shelf and prints what there is."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from fallow.errors import RunError, UsageError, need
from fallow.papers import _progress, shelf
from fallow.papers._experiments import SCALES, Paper, Scale
from fallow.recipes import show
from fallow.report import write_report

_SHOWN = 3  # failed cells that the closing error names
_DAY = 24 * 60  # minutes


def reproduce(
    context: typer.Context,
    paper: Annotated[
        str | None, typer.Argument(help="A paper on the shelf, or all; none: list them.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="Only this item (figure or table); may be repeated.")
    ] = None,
    scale: Annotated[
        str | None, typer.Option("--scale", help=f"{', '.join(SCALES)} [tiny].", show_default=False)
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", help="Runs at once, one thread each [one a core].", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder [runs/PAPER-SCALE].", show_default=False)
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="Folder that holds the image sets.", show_default=False)
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Go on without the GPU that a scale wants.", show_default=False)
    ] = False,
    as_published: Annotated[
        bool,
        typer.Option(
            "--as-published", help="Follow the authors' code, not the formulas.", show_default=False
        ),
    ] = False,
    note: Annotated[
        list[str] | None, typer.Option("--note", help="A sentence kept with the results; may be repeated.")
    ] = None,
) -> None:
    """Reproduce a paper's figures and tables; what is done is never run again.

    Without a paper: everything there is, with its command, expected time and the state of its last run. With
    "all": every paper, one after the other.
    """
    console = show.console()
    if paper in (None, shelf.ALL):
        given = {"--only": only, "--as-published": as_published}
        if paper is None:
            given |= {"--scale": scale, "--out": out, "--data-dir": data_dir, "--force": force}
            given |= {"--jobs": jobs, "--note": note}
        for name, value in given.items():
            if value:
                raise UsageError(f"{name} goes with a paper: fallow reproduce PAPER {name} ...")
    if paper is None:
        _print_list(console)
        return
    options = {"scale": scale or SCALES[0], "only": only or (), "jobs": jobs, "data_dir": data_dir}
    options |= {"force": force, "command": shlex.join(context.obj), "remarks": note or ()}
    if paper == shelf.ALL:
        _all(console, out, options)
        return
    page, failed = _one(console, shelf.paper_of(paper, as_published=as_published), out, options)
    _refuse_failed(failed, page)
    _line(f"report  {page}")


def _one(console: Any, paper: Paper, out: Path | None, options: dict[str, Any]) -> tuple[Path, list[str]]:
    """Reproduce a paper: its page, and which cells failed."""
    scale = options["scale"]
    items = paper.chosen(options["only"], scale)
    cells = {item.name: [cell.name for cell in item.cells.get(scale, ())] for item in items}
    watcher = _progress.Table(console, cells) if console.is_terminal else _progress.Lines(_line)
    done = shelf.reproduce(paper, out=out, watcher=watcher, **options)
    _line(f"results {done.folder / 'results.json'}")
    return write_report(done.folder), [f"{cell.name}: {cell.message}" for cell in done.failed]


def _all(console: Any, out: Path | None, options: dict[str, Any]) -> None:
    """Reproduce every paper, each in its own folder, and make one page of them all."""
    scale, below = options["scale"], out or Path("runs")
    if below.exists() and not below.is_dir():
        raise UsageError(f"{below} is a file, not a folder: name another place with --out")
    homes = {name: below / shelf.home_of(name, scale).name for name in shelf.PAPERS}
    shelf.refuse_all(homes, scale, options["data_dir"], options["force"])
    failed: list[str] = []
    for name, home in homes.items():
        paper = shelf.paper_of(name)
        _line(f"{name}: {paper.title}")
        page, its = _one(console, paper, home, options)
        _line(f"report  {page}")
        failed += its
    page = write_report([*homes.values()], below / f"{shelf.ALL}-{scale}.html")
    _refuse_failed(failed, page)
    _line(f"all     {page}")


def _refuse_failed(failed: list[str], page: Path) -> None:
    if failed:
        raise RunError(f"{len(failed)} cells failed ({'; '.join(failed[:_SHOWN])}); the rest is in {page}")


def _print_list(console: Any) -> None:
    """Every item of every paper, a block a paper and scale."""
    table_of, box = need("rich.table", "lab").Table, need("rich.box", "lab").SIMPLE_HEAD
    found = shelf.entries()
    where = shelf.home_of("PAPER", "SCALE")
    console.print(f"State: of {where}; a folder named with --out is not looked at.\n", highlight=False)
    for paper, scale in dict.fromkeys((entry.paper, entry.scale) for entry in found):
        about = shelf.PAPERS[paper].scales[scale]
        title = f"{paper}: {shelf.PAPERS[paper].title}\nfallow reproduce {paper} --scale {scale}"
        console.print(title, highlight=False, markup=False, soft_wrap=True)
        for words in [about.about, *([f"For a GPU: {about.takes}."] if about.takes else [])]:
            console.print(words, highlight=False, markup=False, soft_wrap=True)
        table = table_of(box=box, pad_edge=False)
        for heading in ("--only", "what", "two cores", "state"):
            table.add_column(heading, no_wrap=heading != "what")
        for entry in found:
            if (entry.paper, entry.scale) == (paper, scale):
                table.add_row(entry.item, entry.title, _time(entry, about), entry.state)
        console.print(table, highlight=False, markup=False)


def _time(entry: shelf.Entry, about: Scale) -> str:
    """What an item should take, in words; days where there are many hours."""
    days = round(entry.minutes / _DAY)
    words = f"{days} days" if days > 2 else show.duration(60 * entry.minutes)
    if not about.takes:
        return words
    return f"{words} with a GPU" if about.on_gpu else f"GPU; {words} on two cores"


def _line(text: str) -> None:
    print(text, flush=True)

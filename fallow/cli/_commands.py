"""The commands: each parses, calls one function and prints what it returns."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from fallow._version import __version__
from fallow.cli import _examine, _shelf, _sparsify
from fallow.cli._flags import given_options, print_line, with_flags
from fallow.errors import UsageError
from fallow.recipes import show, train
from fallow.recipes._config import Config
from fallow.recipes._sparse_config import SparseConfig
from fallow.report import write_report

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # markup would eat the defaults, which stand in square brackets
    help="Stochastic depth that really rests what it drops.",
)
# The base of the parser's own errors, under whatever name this version of typer has it.
_Parsing: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def run(arguments: list[str]) -> int:
    """Parse and run; the parser's own errors become ours."""
    command = typer.main.get_command(app)
    try:
        context = command.make_context("fallow", arguments or ["--help"], obj=["fallow", *arguments])
        with context:
            command.invoke(context)
    except typer.Exit as stop:
        return stop.exit_code
    except typer.Abort:
        raise KeyboardInterrupt from None
    except _Parsing as error:
        where = getattr(getattr(error, "ctx", None), "command_path", "fallow")
        text = error.format_message()  # type: ignore[attr-defined]
        raise UsageError(f"{text.rstrip('.')}: {where} --help lists what there is") from None
    return 0


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fallow {__version__}")
        raise typer.Exit


@app.callback()
def _fallow(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


# --- train ---------------------------------------------------------------------------------------------


def _train(**given: Any) -> None:
    """Train a residual network under a compute budget, beside its constant-depth twin.

    Without options: the bundled digits, ResNet-56, three quarters of the compute; a few minutes on two cores.
    """
    context, out, resumed, options = given_options(given)
    console = show.console()
    progress = show.Live(console) if console.is_terminal else show.Lines(print_line)
    if resumed is not None:
        folder = train.resume(resumed, show=progress)
    else:
        command = shlex.join(context.obj)
        folder = train.train(Config.of(options), out, show=progress, command=command)
    show.print_table(train.read_results(folder), console)
    print_line(f"run     {folder}")
    print_line(f"report  {write_report(folder)}")


app.command("train")(with_flags(_train, Config, "runs/DATA-MODEL-N"))


# --- plan, explain, sparsify, reproduce ------------------------------------------------------------------

app.command("plan")(_examine.plan)
app.command("explain")(_examine.explain)
app.command("sparsify")(with_flags(_sparsify.sparsify, SparseConfig, "runs/DATA-MODEL-sparse-N"))
app.command("reproduce")(_shelf.reproduce)


# --- report, sites ---------------------------------------------------------------------------------------


@app.command("report")
def _report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or .json files.", metavar="RUN...")],
    out: Annotated[Path | None, typer.Option("--out", help="File or folder [the first run's].")] = None,
) -> None:
    """Draw the page of runs, plans or explanations from their files; nothing is run again."""
    print(write_report(runs, out))


@app.command("sites")
def _sites(
    model: Annotated[str, typer.Argument(help="A model as in fallow train --model.")] = "resnet56",
    dataset: Annotated[str, typer.Option("--data", help="Data set whose images it takes.")] = "digits",
    data_dir: Annotated[Path | None, typer.Option("--data-dir", help="Folder with its files.")] = None,
) -> None:
    """List where a model's branches can rest, and what share of a step each costs."""
    print(train.sites_of(Config(model=model, data=dataset, data_dir=data_dir and str(data_dir))))

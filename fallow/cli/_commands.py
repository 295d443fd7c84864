"""The commands: each parses, calls one function and prints what it returns."""

from __future__ import annotations

import inspect
import shlex
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from fallow._version import __version__
from fallow.cli import _examine, _shelf
from fallow.errors import UsageError
from fallow.recipes import show, train
from fallow.recipes._config import Config
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
    context, out, resumed = given.pop("context"), given.pop("out"), given.pop("resume")
    options = {name: value for name, value in given.items() if value is not None and value != []}
    console = show.console()
    progress = show.Live(console) if console.is_terminal else show.Lines(_line)
    if resumed is not None:
        if options or out is not None:
            name = next(iter(options), "out").replace("_", "-")
            raise UsageError(f"--resume continues a run with its own options: leave out --{name}")
        folder = train.resume(resumed, show=progress)
    else:
        command = shlex.join(context.obj)
        folder = train.train(Config.of(options), out, show=progress, command=command)
    show.print_table(train.read_results(folder), console)
    _line(f"run     {folder}")
    _line(f"report  {write_report(folder)}")


def _line(text: str) -> None:
    print(text, flush=True)


def _train_signature() -> inspect.Signature:
    """A flag for every field of `Config`, so that none is forgotten and each reaches its place."""
    hints = get_type_hints(Config)
    flags = [
        _flag("out", Path | None, "Folder of the run, new or empty [runs/DATA-MODEL-N]."),
        _flag("resume", Path | None, "Folder of a run to continue from its last checkpoint."),
    ]
    for item in fields(Config):
        text = item.metadata["help"]
        default = item.default
        if isinstance(default, (str, float, int)) and not isinstance(default, bool):
            text = f"{text.removesuffix('.')} [{default}]."
        flags.append(_flag(item.name, _flag_type(hints[item.name]), text))
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    return inspect.Signature([context, *flags])


def _flag(name: str, kind: Any, text: str) -> inspect.Parameter:
    spelt = "--" + name.replace("_", "-")
    names = f"{spelt}/--no-{name.replace('_', '-')}" if kind == bool | None else spelt
    option = typer.Option(names, help=text, show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option]
    )


def _flag_type(hint: Any) -> Any:
    """None for "not said", lists for tuples, and text where a field also takes a mapping."""
    if get_origin(hint) is tuple:
        return list[str] | None
    if get_origin(hint) in (Union, UnionType):
        return get_args(hint)[0] | None
    return hint | None


_train.__signature__ = _train_signature()  # type: ignore[attr-defined]
_train.__annotations__ = {p.name: p.annotation for p in _train.__signature__.parameters.values()}  # type: ignore[attr-defined]
app.command("train")(_train)


# --- plan, explain ---------------------------------------------------------------------------------------

app.command("plan")(_examine.plan)
app.command("explain")(_examine.explain)
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

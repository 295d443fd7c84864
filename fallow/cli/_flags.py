"""Flags from the fields of a configuration, so that none is forgotten and each reaches its place."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from fallow.errors import UsageError


def with_flags(command: Callable[..., None], config: type, home: str) -> Callable[..., None]:
    """The command with a flag for every field of the configuration, and --out and --resume.

    Args:
        command: takes what is given as keywords, None where nothing is.
        config: a dataclass whose fields have a help text.
        home: where a run goes without --out.
    """
    hints = get_type_hints(config)
    flags = [
        _flag("out", Path | None, f"Folder of the run, new or empty [{home}]."),
        _flag("resume", Path | None, "Folder of a run to continue from its last checkpoint."),
    ]
    for item in fields(config):
        text = item.metadata["help"]
        default = item.default
        if isinstance(default, (str, float, int)) and not isinstance(default, bool):
            text = f"{text.removesuffix('.')} [{default}]."
        flags.append(_flag(item.name, _type(hints[item.name]), text))
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    signature = inspect.Signature([context, *flags])
    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    return command


def _flag(name: str, kind: Any, text: str) -> inspect.Parameter:
    spelt = "--" + name.replace("_", "-")
    names = f"{spelt}/--no-{name.replace('_', '-')}" if kind == bool | None else spelt
    option = typer.Option(names, help=text, show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option]
    )


def _type(hint: Any) -> Any:
    """None for "not said", lists for tuples, and text where a field also takes a mapping."""
    if get_origin(hint) is tuple:
        return list[str] | None
    if get_origin(hint) in (Union, UnionType):
        return get_args(hint)[0] | None
    return hint | None


def given_options(given: dict[str, Any]) -> tuple[Any, Path | None, Path | None, dict[str, Any]]:
    """The context, --out, --resume, and the options that were given.

    Raises:
        UsageError: --resume together with anything else.
    """
    context, out, resumed = given.pop("context"), given.pop("out"), given.pop("resume")
    options = {name: value for name, value in given.items() if value is not None and value != []}
    if resumed is not None and (options or out is not None):
        name = next(iter(options), "out").replace("_", "-")
        raise UsageError(f"--resume continues a run with its own options: leave out --{name}")
    return context, out, resumed, options


def print_line(text: str) -> None:
    """One line, at once."""
    print(text, flush=True)

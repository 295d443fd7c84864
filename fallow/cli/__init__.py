"""The command line: `fallow` and `python -m fallow`.

Exit codes: 0 done, 1 a run failed, 2 bad usage, 130 interrupted. Errors are one paragraph on standard error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from fallow.errors import FallowError, MissingExtra, RunError, need

__all__ = ["main", "run"]


def main() -> None:
    """Run the program with the arguments of the process, and end it with the exit code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command.

    Args:
        arguments: without the program's name.

    Returns:
        The exit code.
    """
    try:
        for module in ("typer", "rich", "safetensors", "sklearn", "matplotlib", "jinja2"):
            need(module, "lab")
    except MissingExtra as error:
        return _refuse(error, 2)
    from fallow.cli import _commands

    try:
        return _commands.run(list(arguments))
    except FallowError as error:
        number = getattr(error, "signal", None)
        return _refuse(error, 128 + number if number else 1 if isinstance(error, RunError) else 2)
    except KeyboardInterrupt:
        return _refuse("interrupted", 130)
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _refuse(error: object, code: int) -> int:
    """One paragraph on standard error."""
    print(f"fallow: {' '.join(str(error).split())}", file=sys.stderr)
    return code

"""How a run comes to its end before its last step: on request, or by a failure, always with whole files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fallow.errors import FallowError, RunError
from fallow.recipes._run import RunFolder
from fallow.recipes._stop import Interrupted


class NotFinite(RunError):
    """A loss or a weight that is not a finite number.

    Attributes:
        record: where it happened and what rested, for the results; empty where that is not known.
    """

    def __init__(self, message: str, record: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.record = record or {}


@dataclass(frozen=True)
class Advice:
    """What to do about a run that ended early, in the words of the command that was called.

    Attributes:
        less: where memory was short, what to take: "Take ..." is put before it.
        diverged: where a loss or a weight was not finite; a sentence without its full stop.
        again: the command that goes on; None: `fallow train --resume` with the run's folder.
    """

    less: str
    diverged: str = "Start anew with a lower --learning-rate"
    again: str | None = None


@contextlib.contextmanager
def noted(
    folder: RunFolder,
    write: Callable[..., None],
    step: Callable[[], int],
    *,
    less: str,
    diverged: str = Advice.diverged,
) -> Iterator[None]:
    """Inside, a request to stop, an error of ours or a want of memory is put in words and noted.

    Args:
        folder: of the run.
        write: called with a status and what else is to be noted.
        step: how many steps are done.
        less: what to take where memory is short, in words.
        diverged: what to do where a number was not finite; a sentence.

    Raises:
        RunError: what failed, with what is left and what to do.
        Interrupted: as it came.
    """

    def note(status: str, **more: Any) -> None:
        with contextlib.suppress(FallowError):  # a full disk must not hide why
            write(status, **more)

    try:
        yield
    except Interrupted as stop:
        note("interrupted", message=str(stop))
        raise
    except (FallowError, MemoryError, RuntimeError) as error:
        if not isinstance(error, FallowError) and not of_memory(error):
            raise
        failure = _failure(error, folder, step(), less, diverged)
        record = {"failure": error.record} if isinstance(error, NotFinite) and error.record else {}
        note("failed", message=str(failure), **record)
        raise failure from error


def of_memory(error: BaseException) -> bool:
    """Whether there was too little of it; on a CPU torch has no error of its own for that."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _failure(error: BaseException, folder: RunFolder, step: int, less: str, diverged: str) -> RunError:
    """The error in words that say what is left and what to do."""
    kept = "the last good checkpoint is kept" if folder.has_state() else "there is no checkpoint yet"
    if isinstance(error, NotFinite):
        return RunError(f"{error}: {kept} in {folder.path}. {diverged}")
    if isinstance(error, RunError):
        return error
    if isinstance(error, FallowError):
        return RunError(f"{error}: {kept} in {folder.path}")
    return RunError(f"not enough memory at step {step}: {kept} in {folder.path}. Take {less}")


def stop_if_asked(asked: Sequence[int], step: int, total: int, folder: RunFolder) -> None:
    """After a checkpoint: stop where that was asked for, unless this was the last step.

    Raises:
        Interrupted: with the command that goes on.
    """
    if asked and step < total:
        raise Interrupted(
            f"interrupted after step {step} of {total}; a checkpoint is written. "
            f"Continue with {folder.again}",
            asked[0],
        )

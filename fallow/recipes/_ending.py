"""How a run comes to its end before its last step: on request, or by a failure, always with whole files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
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


@contextlib.contextmanager
def noted(
    folder: RunFolder, write: Callable[..., None], step: Callable[[], int], *, less: str
) -> Iterator[None]:
    """Inside, a request to stop, an error of ours or a want of memory is put in words and noted.

    Args:
        folder: of the run.
        write: called with a status and what else is to be noted.
        step: how many steps are done.
        less: what to do where memory is short, in words.

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
        if isinstance(error, RuntimeError) and not isinstance(error, FallowError) and not _of_memory(error):
            raise
        failure = _failure(error, folder, step(), less)
        record = {"failure": error.record} if isinstance(error, NotFinite) and error.record else {}
        note("failed", message=str(failure), **record)
        raise failure from error


def _of_memory(error: RuntimeError) -> bool:
    """Whether there was too little of it; on a CPU torch has no error of its own for that."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _failure(error: BaseException, folder: RunFolder, step: int, less: str) -> RunError:
    """The error in words that say what is left and what to do."""
    kept = "the last good checkpoint is kept" if folder.has_state() else "there is no checkpoint yet"
    if isinstance(error, NotFinite):
        return RunError(f"{error}: {kept} in {folder.path}. Start anew with a lower --learning-rate")
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

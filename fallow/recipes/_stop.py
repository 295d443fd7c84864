"""Stopping on request: the signal is noted, and the loop stops where a checkpoint makes sense."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

from fallow.errors import RunError


class Interrupted(RunError):
    """A run that was asked to stop, after it wrote a checkpoint.

    Attributes:
        signal: the number of the signal that asked.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = int(number)


@contextlib.contextmanager
def asked_to_stop() -> Iterator[list[int]]:
    """A list that gets the first SIGINT or SIGTERM; a second one acts as it did before."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread may set handlers
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _frame: object) -> None:
        asked.append(number)
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        restore()

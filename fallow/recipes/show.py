"""What a run shows: a live line on a terminal, plain lines elsewhere, and the table at its end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Protocol

from fallow.errors import need

_PLAIN_EVERY = 30.0  # seconds between plain lines inside a long epoch
_REFRESH_EVERY = 0.2
_WIDTH = 100  # of a table that does not go to a terminal


class Show(Protocol):
    """Where a run shows its progress."""

    def say(self, text: str) -> None:
        """One sentence for the user."""

    def begin(self, step: int, total: int) -> None:
        """The loop starts at `step` of `total`."""

    def step(self, done: int, words: str) -> None:
        """A step is over; its loss and the like in words."""

    def epoch(self, words: str) -> None:
        """An epoch is over."""

    def end(self) -> None:
        """The loop is over, one way or another."""


class Silent(Show):
    """Shows nothing."""


class Lines:
    """Plain lines: one an epoch, and one now and then inside a long epoch.

    Args:
        write: takes one line.
    """

    def __init__(self, write: Callable[[str], None] = print) -> None:
        self._write = write
        self._total = self._first = self._done = 0
        self._start = self._last = time.monotonic()

    def say(self, text: str) -> None:
        """Write a sentence."""
        self._write(text)

    def begin(self, step: int, total: int) -> None:
        """Remember where the loop starts."""
        self._first, self._total = step, total
        self._start = self._last = time.monotonic()

    def step(self, done: int, words: str) -> None:
        """Write a line where the last one is long ago."""
        self._done = done
        if time.monotonic() - self._last >= _PLAIN_EVERY:
            self._line(f"step {done}/{self._total}  {words}")

    def epoch(self, words: str) -> None:
        """Write the epoch's line."""
        self._line(f"epoch {words}")

    def end(self) -> None:
        """Nothing is left open."""

    def _line(self, text: str) -> None:
        self._last = time.monotonic()
        done = max(self._done - self._first, 1)
        left = (self._last - self._start) / done * (self._total - self._done)
        self._write(f"{text}  {duration(left)} left" if left >= 0.5 else text)


class Live:
    """A live line on a terminal, with a plain line above it for every epoch.

    Args:
        console: rich's console.
    """

    def __init__(self, console: Any) -> None:
        progress = need("rich.progress", "lab")
        self._progress = progress.Progress(
            progress.TextColumn("step {task.completed}/{task.total}"),
            progress.BarColumn(bar_width=20),
            progress.TextColumn("{task.fields[shown]}"),
            progress.TimeRemainingColumn(),
            console=console,
            transient=True,
            auto_refresh=False,  # a thread that draws would count as processor time of the steps
        )
        self._console = console
        self._last = 0.0

    def say(self, text: str) -> None:
        """Write a sentence above the live line."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def begin(self, step: int, total: int) -> None:
        """Show the line."""
        self._task = self._progress.add_task("", total=total, completed=step, shown="")
        self._progress.start()

    def step(self, done: int, words: str) -> None:
        """Bring the line up to date, a few times a second."""
        self._progress.update(self._task, completed=done, shown=words)
        if time.monotonic() - self._last > _REFRESH_EVERY:
            self._progress.refresh()
            self._last = time.monotonic()

    def epoch(self, words: str) -> None:
        """Write the epoch's line above."""
        self.say(f"epoch {words}")

    def end(self) -> None:
        """Take the line away."""
        self._progress.stop()


def epoch_words(records: dict[str, dict[str, Any]], epochs: int) -> str:
    """One line of an epoch: the model's numbers, the twin's in brackets."""
    ours, twin = records["model"], records.get("twin")
    aside = "" if twin is None else f" (twin {twin['train_loss']:.4f})"
    other = "" if twin is None else f" (twin {twin['validation_error']:.1%})"
    return (
        f"{ours['epoch']}/{epochs}  loss {ours['train_loss']:.4f}{aside}  "
        f"validation error {ours['validation_error']:.1%}{other}  "
        f"depth {ours['depth']:.1f}  cost {ours['cost']:.3f}"
    )


def duration(seconds: float) -> str:
    """Seconds in words: 45 s, 3 min 10 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def rows(results: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The closing table: what, the model's, the twin's, ratio to the twin."""
    arms = [results["arms"]["model"]["summary"], results["arms"].get("twin", {}).get("summary", {})]
    found, budget = results["summary"], results["budget"]
    images = arms[0].get("test_images")
    sites = budget["sites"]

    def both(key: str, write: Callable[[float], str]) -> tuple[str, str]:
        ours, theirs = ("" if arm.get(key) is None else write(arm[key]) for arm in arms)
        return ours, theirs

    def milliseconds(seconds: float) -> str:
        return f"{1000 * seconds:.1f} ms"

    table = [
        (f"test error ({images} images)", *both("test_error", lambda e: error_words(e, images)), ""),
        ("CPU time per step", *both("cpu_s_per_step", milliseconds), interval(found.get("time_ratio"))),
        ("wall time per step", *both("wall_s_per_step", milliseconds), interval(found.get("wall_ratio"))),
        ("  ideal, from counted FLOPs", "", "", number(budget["ideal_flops"])),
        ("  ideal, from measured time", "", "", number(budget["ideal_time"])),
        (
            "peak memory of a step",
            *both("peak_memory_mb", lambda mb: f"{mb:.1f} MB"),
            number(found.get("memory_ratio")),
        ),
        ("realised depth", *both("realised_depth", lambda d: f"{d:.2f} of {sites}"), ""),
        ("share of dense FLOPs", number(found.get("realised_cost")), "1.000" if arms[1] else "", ""),
    ]
    return [row for row in table if any(row[1:])]


def error_words(error: float, images: int) -> str:
    """An error share in percent with its binomial standard error."""
    return f"{100 * error:.2f} ± {100 * math.sqrt(error * (1 - error) / images):.2f} %"


def interval(found: dict[str, float] | None) -> str:
    """A ratio with its 95 % interval."""
    return "" if not found else f"{found['median']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def number(value: float | None) -> str:
    """Three decimals, or nothing."""
    return "" if value is None else f"{value:.3f}"


def print_table(results: dict[str, Any], console: Any) -> None:
    """Print the closing table."""
    table_of = need("rich.table", "lab").Table
    table = table_of(box=need("rich.box", "lab").SIMPLE_HEAD, pad_edge=False)
    twin = "twin" in results["arms"]
    heads = ["", "stochastic depth", "constant depth", "ratio (95 % interval)"]
    kept = (0, 1, 2, 3) if twin else (0, 1)
    for place in kept:
        table.add_column(heads[place], justify="left" if place == 0 else "right", no_wrap=True)
    for row in rows(results) if twin else _alone(results):
        table.add_row(*(row[place] for place in kept))
    console.print(table, highlight=False)


def _alone(results: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The rows of a run without a twin: its ideals move to its own column."""
    return [(name, ours or other, "", "") for name, ours, _, other in rows(results)]


def console(stream: Any = None) -> Any:
    """A console that does not fold a table where there is no terminal."""
    make = need("rich.console", "lab").Console
    plain = make(file=stream)
    return plain if plain.is_terminal else make(file=stream, width=max(_WIDTH, plain.width))

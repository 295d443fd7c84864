"""How far a reproduction is: a table on a terminal, a plain line for each cell elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fallow.errors import need
from fallow.papers._experiments import Cell
from fallow.papers._runner import Outcome, Watcher, expected_minutes
from fallow.recipes.show import Silent, duration

_OFTEN = 0.5  # seconds between drawings of a run's steps


class Progress(Watcher):
    """Counts the cells and estimates the time left; shows nothing.

    The estimate scales what the open cells are expected to take by how long those that are over took.
    """

    def begin(self, cells: Sequence[Cell], open_cells: Sequence[Cell], jobs: int) -> None:
        """Start to count."""
        self.cells = {cell.name: cell for cell in cells}
        self.open = {cell.name: cell for cell in open_cells}
        self.jobs, self.failed = jobs, 0
        self._planned = self._taken = 0.0

    def ended(self, outcome: Outcome) -> None:
        """Count a cell."""
        cell = self.open.pop(outcome.name)
        self.failed += outcome.status != "done"
        self._planned += 60 * cell.minutes
        self._taken += outcome.seconds

    def left(self) -> float:
        """Seconds left, estimated."""
        pace = self._taken / self._planned if self._planned else 1.0
        return 60 * expected_minutes(list(self.open.values()), self.jobs) * pace

    def counts(self) -> str:
        """How many cells are over, of how many."""
        return f"{len(self.cells) - len(self.open)}/{len(self.cells)}"


class Lines(Progress):
    """One plain line for each cell.

    Args:
        write: takes one line.
    """

    def __init__(self, write: Callable[[str], None] = print) -> None:
        self._write = write

    def begin(self, cells: Sequence[Cell], open_cells: Sequence[Cell], jobs: int) -> None:
        """Say how much there is to do."""
        super().begin(cells, open_cells, jobs)
        if open_cells:
            self._write(
                f"{len(open_cells)} of {len(cells)} cells to run, {jobs} at a time: "
                f"about {duration(self.left())}"
            )

    def ended(self, outcome: Outcome) -> None:
        """Say how a cell ended."""
        super().ended(outcome)
        how = f"{outcome.status} in {duration(outcome.seconds)}"
        why = f": {outcome.message}" if outcome.message else ""
        left = f", {duration(self.left())} left" if self.open else ""
        self._write(f"{self.counts()} {outcome.name} {how}{left}{why}")


class _Steps(Silent):
    """Hands the steps of a run in this process to the table."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell, self._last, self._total = tell, 0.0, 0

    def begin(self, step: int, total: int) -> None:
        self._total = total

    def step(self, done: int, words: str) -> None:
        if time.monotonic() - self._last > _OFTEN:
            self._last = time.monotonic()
            self._tell(f"step {done}/{self._total}  {words}")


class Table(Progress):
    """A table that is drawn anew on a terminal: a row an item, and the time left.

    Args:
        console: rich's console.
        items: item name -> names of its cells.
    """

    def __init__(self, console: Any, items: Mapping[str, Sequence[str]]) -> None:
        self._console, self._items = console, items
        self._now = ""
        self.inner = _Steps(self._running)

    def begin(self, cells: Sequence[Cell], open_cells: Sequence[Cell], jobs: int) -> None:
        """Show the table."""
        super().begin(cells, open_cells, jobs)
        self._since = time.monotonic()
        # With one job the runs' own processor time is measured in this process: no thread may draw then.
        self._live = need("rich.live", "lab").Live(
            console=self._console,
            get_renderable=self._table,
            auto_refresh=jobs > 1,
            refresh_per_second=1,
            transient=True,
        )
        self._live.start()

    def ended(self, outcome: Outcome) -> None:
        """Bring the table up to date; say above it what failed."""
        super().ended(outcome)
        self._since, self._now = time.monotonic(), ""
        if outcome.status == "failed":
            self._console.print(f"{outcome.name} failed: {outcome.message}", highlight=False, markup=False)
        self._live.refresh()

    def end(self) -> None:
        """Take the table away."""
        self._live.stop()

    def _running(self, text: str) -> None:
        self._now = text
        self._live.refresh()

    def _table(self) -> Any:
        table_of, box = need("rich.table", "lab").Table, need("rich.box", "lab").SIMPLE_HEAD
        left = max(self.left() - (time.monotonic() - self._since), 0.0)
        caption = f"{self.counts()} cells, about {duration(left)} left  {self._now}"
        table = table_of(box=box, pad_edge=False, caption=caption, caption_justify="left")
        for heading, side in (("item", "left"), ("done", "right"), ("cells", "right")):
            table.add_column(heading, justify=side, no_wrap=True)
        for name, cells in self._items.items():
            mine = [cell for cell in cells if cell in self.cells]
            table.add_row(name, str(sum(cell not in self.open for cell in mine)), str(len(mine)))
        return table

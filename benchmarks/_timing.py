"""Paired timing for the benchmarks: interleaved steps, medians of ratios with intervals, memory, tables.

No machine is quiet for long. So every arm takes one step a round, in an order drawn anew each round; an arm's
step is compared with the constant-depth step of the *same* round; and what is reported is the median of these
ratios with a bootstrap interval, of process CPU time first, since other people's work does not count in it.
"""

from __future__ import annotations

import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import fallow

# glibc maps blocks of 32 MiB and more afresh for every tensor and gives memory back as soon as it is free:
# tens of thousands of page faults a step, a number that differs from run to run. With these it keeps it.
_TUNABLES = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592"


def keep_memory() -> None:
    """Start this process again with an allocator that keeps what it has; Linux only, and only once."""
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return
    environment = {**os.environ, "GLIBC_TUNABLES": _TUNABLES, "KINETO_LOG_LEVEL": "99"}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


@dataclass(frozen=True)
class Interval:
    """A median with its bootstrap interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def as_dict(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in asdict(self).items()}


def median_interval(
    values: Sequence[float], *, level: float = 0.95, draws: int = 4000, seed: int = 0
) -> Interval:
    """Median and percentile-bootstrap interval of independent values.

    References:
        Efron and Tibshirani 1993, chapter 13.
    """
    data = torch.tensor(values, dtype=torch.float64)
    if not data.numel() or not bool(data.isfinite().all()):
        raise ValueError(f"an interval needs finite values, got {list(values)}")
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(data.numel(), (draws, data.numel()), generator=generator)
    medians = data[picks].quantile(0.5, dim=1)
    tail = (1 - level) / 2
    low, high = medians.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(float(data.quantile(0.5)), low, high)


def ratios(arm: Sequence[float], base: Sequence[float]) -> list[float]:
    """Per-pair ratios; both must have one value a round."""
    return [a / b for a, b in zip(arm, base, strict=True)]


@dataclass
class Times:
    """What one arm took, a value a round."""

    cpu: list[float]
    wall: list[float]


def interleave(
    arms: Mapping[str, Callable[[], None]],
    rounds: int,
    *,
    warmup: int,
    seed: int = 0,
    clocks: tuple[Callable[[], float], Callable[[], float]] = (time.process_time, time.perf_counter),
    after: Callable[[str, int], None] | None = None,
) -> dict[str, Times]:
    """Run every arm once a round, in random order, and time each.

    Args:
        arms: name -> one step.
        rounds: rounds that are timed.
        warmup: rounds before these.
        seed: of the orders.
        clocks: CPU time of the process and wall time.
        after: called, untimed, after each timed step with the arm's name and the round.
    """
    cpu, wall = clocks
    order, names = random.Random(seed), list(arms)
    times = {name: Times([], []) for name in names}
    for turn in range(-warmup, rounds):
        order.shuffle(names)
        for name in names:
            began = cpu(), wall()
            arms[name]()
            took = cpu() - began[0], wall() - began[1]
            if turn < 0:
                continue
            times[name].cpu.append(took[0])
            times[name].wall.append(took[1])
            if after is not None:
                after(name, turn)
    return times


def highest_sum(changes: Iterable[int]) -> int:
    """The highest running sum, from 0."""
    total = highest = 0
    for change in changes:
        total += change
        highest = max(highest, total)
    return highest


def step_memory(step: Callable[[], None]) -> int:
    """Bytes that one step has allocated at most at a time, above what was there before it.

    Counted at torch's CPU allocator, every allocation and release, so it does not depend on what the C
    library keeps or what ran before, as the resident set of a process does. What libraries allocate on their
    own is not in it.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        step()
    results: Any = run.profiler and run.profiler.kineto_results
    events = [e for e in results.events() if e.name() == "[memory]"]
    return highest_sum(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct tensors."""
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def hardware() -> dict[str, object]:
    """What kind of machine this is, without its name."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            model = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "cpu": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "malloc": os.environ.get("GLIBC_TUNABLES", "as it is"),
    }


def heading(kind: str, arguments: Sequence[str] | None) -> dict[str, Any]:
    """How a report begins: what it is of, the command that made it, versions."""
    words = sys.argv[1:] if arguments is None else arguments
    return {
        "schema": 1,
        "kind": kind,
        "command": " ".join(["python", f"benchmarks/{kind}.py", *words]),
        "versions": {
            "fallow": fallow.__version__,
            "torch": torch.__version__,
            "python": sys.version.split()[0],
        },
    }


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, with rich where it is installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(plain_table(title, header, rows))
        return
    console = Console(width=None if sys.stdout.isatty() else 150)
    shown = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        shown.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        shown.add_row(*(cell.replace("[", "\\[") for cell in row))
    console.print(shown)


def plain_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same in plain text."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = cells
        aligned = (c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))
        return "  ".join((first.ljust(widths[0]), *aligned))

    return "\n".join([title, line(header), "  ".join("-" * w for w in widths), *map(line, rows)])

"""What a run measures: the time of a step, its peak memory, ratios with an interval."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_RESAMPLES = 1000


class Stopwatch:
    """Processor time (of all threads of the process) and wall time of one piece of work.

    On CUDA the clocks are read after the device has finished.
    """

    def __init__(self, device: str) -> None:
        self._cuda = torch.device(device) if device.startswith("cuda") else None
        self._start = self._now()

    def read(self) -> tuple[float, float]:
        """Seconds of processor and of wall time since it was made."""
        cpu, wall = self._now()
        return cpu - self._start[0], wall - self._start[1]

    def _now(self) -> tuple[float, float]:
        if self._cuda is not None:
            torch.cuda.synchronize(self._cuda)
        return time.process_time(), time.perf_counter()


class _Live(TorchDispatchMode):
    """Bytes of the tensor memory that is alive: every operation's outputs until their memory is freed.

    What autograd keeps for backward counts, scratch space inside one kernel does not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, int] = {}
        self._watches: list[weakref.finalize] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.see(tree_leaves(out))
        return out

    def see(self, values: Iterable[Any]) -> None:
        """Count the memory of tensors that is not counted yet."""
        for value in values:
            if not isinstance(value, Tensor):
                continue
            storage = value.untyped_storage()
            if storage._cdata in self._alive:
                continue
            self._alive[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            self._watches.append(weakref.finalize(storage, self._freed, storage._cdata))

    def _freed(self, key: int) -> None:
        self.now -= self._alive.pop(key, 0)

    def forget(self) -> None:
        """Stop watching."""
        for watch in self._watches:
            watch.detach()


class Peak:
    """The result of `peak_memory`, in bytes once its block is left."""

    bytes: int = 0


@contextmanager
def peak_memory(device: str, held: Iterable[Tensor]) -> Iterator[Peak]:
    """Peak memory of the work inside, with what it starts from.

    On CUDA the allocator says it; on the CPU, whose allocator keeps no count, every tensor is followed from
    the operation that made it until its memory is freed. Neither touches a random number or a result.

    Args:
        device: where the work runs.
        held: weights, buffers, gradients and optimiser state that the work starts with; what else is on the
            device (the other arm) does not count.
    """
    peak, known = Peak(), list(held)
    if device.startswith("cuda"):
        own = sum(t.nbytes for t in known)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device) - before + own
        return
    live = _Live()
    live.see(known)
    try:
        with live:
            yield peak
    finally:
        peak.bytes = live.peak
        live.forget()


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float] | None:
    """Median of the paired ratios with a 95 % interval from a percentile bootstrap over the pairs.

    Pairs in which either is NaN (measured under another load on purpose) do not count, nor does a step that
    one arm did not reach. None without a pair.
    """
    mine, other = _paired(ours, theirs)
    pairs = mine / other
    if not len(pairs):
        return None
    random = np.random.default_rng(0)
    medians = [np.median(random.choice(pairs, len(pairs))) for _ in range(_RESAMPLES)]
    low, high = np.percentile(medians, [2.5, 97.5])
    return {"median": float(np.median(pairs)), "low": float(low), "high": float(high)}


def ratio_of_means(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float] | None:
    """Ratio of the means over the pairs that count for `ratio`, with its interval from the same bootstrap.

    An ideal ratio is one of means; the median of ratios is another number where steps differ, as they do
    where whole branches rest.
    """
    mine, other = _paired(ours, theirs)
    if not len(mine):
        return None
    random = np.random.default_rng(0)
    drawn = (random.integers(len(mine), size=len(mine)) for _ in range(_RESAMPLES))
    means = [mine[places].sum() / other[places].sum() for places in drawn]
    low, high = np.percentile(means, [2.5, 97.5])
    return {"ratio": float(mine.sum() / other.sum()), "low": float(low), "high": float(high)}


def _paired(ours: Sequence[float], theirs: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Of both what was measured in both."""
    both = min(len(ours), len(theirs))
    mine, other = np.asarray(ours[:both], float), np.asarray(theirs[:both], float)
    counts = np.isfinite(mine) & np.isfinite(other) & (other > 0)  # a coarse clock may not have moved
    return mine[counts], other[counts]


def median(values: Sequence[float]) -> float | None:
    """The median of those that are numbers."""
    known = np.asarray(values, float)
    known = known[np.isfinite(known)]
    return float(np.median(known)) if len(known) else None


def mean(values: Sequence[float]) -> float | None:
    """The mean of those that are numbers."""
    known = np.asarray(values, float)
    known = known[np.isfinite(known)]
    return float(np.mean(known)) if len(known) else None

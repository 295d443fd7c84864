"""Which draw is in force: one for each outermost training forward, and the right one when it is recomputed.

Draws are decided on the host before the work. A recomputation under activation checkpointing must see the
masks of *its own* forward, also when several forwards precede one backward. Two things tell which that was:
a hook on the node that made the root's output runs first in that forward's backward, and a checkpointed
region is entered again with the very memory it was entered with.
"""

from __future__ import annotations

import sys
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fallow.errors import RunError
from fallow.rows import Selection

_NONE = -2  # no branch has asked
_CHECKPOINT = torch.utils.checkpoint.__file__


@dataclass(eq=False)
class Draw:
    """One draw: the decisions of one training forward."""

    index: int
    rates: dict[str, float] = field(default_factory=dict)  # in force
    kept: dict[str, bool] = field(default_factory=dict)  # batch mode: site -> kept
    rows: dict[tuple[str, int], Selection] = field(default_factory=dict)  # row mode: by site and batch size
    share: dict[str, float] = field(default_factory=dict)  # realised share of rows kept, by site reached
    reached: int = -1  # last branch reached outside a root forward
    marked: bool = False  # a `Mark` at the end of its forward says when backward gets there
    recalled: bool = False  # its forward was recomputed
    graph: bool = True  # made with gradients on; reentrant checkpoints run their forward without


def in_backward() -> bool:
    """Whether this thread is inside a backward pass, so that a forward is a recomputation."""
    return torch._C._current_graph_task_id() != -1


class DrawBook:
    """Keeps the draws of one applied model.

    A draw lives as long as something may recompute its forward: one with a mark as long as its graph, which
    holds the mark; of the others the latest are kept.
    """

    def __init__(self, count: int = 0) -> None:
        self.count = count
        self.current: Draw | None = None  # of the root forward under way, or the latest one
        self.loose: Draw | None = None  # of sites reached outside a root forward
        self.depth = 0  # root forwards under way
        self.held = False
        self._recalled: Draw | None = None  # of the forward that is being recomputed
        self._order = _NONE  # the branch that asked last in it
        self._unmarked: list[Draw] = []
        self._memory: dict[tuple, tuple[StorageWeakRef, list[weakref.ref[Draw]]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Copies keep the count and the latest masks, not what belongs to a forward under way."""
        return {**DrawBook(self.count).__dict__, "current": self.current}

    def begin(self, draw: Draw) -> Draw:
        """Put a new draw in force."""
        self.count = draw.index + 1
        draw.graph = torch.is_grad_enabled()
        self._unmarked = [*self._unmarked[-15:], draw]
        self._recalled, self._order = None, _NONE
        if len(self._memory) > 4096:
            self._memory = {k: v for k, v in self._memory.items() if not v[0].expired()}
        return draw

    def remember(self, x: Tensor, draw: Draw) -> None:
        """Note that a forward entered here with this memory."""
        key = _place(x)
        if key is None:
            return
        storage = x.untyped_storage()
        known = self._memory.get(key)
        others = [] if known is None or known[0].expired() else known[1]
        alive = [ref for ref in others if ref() not in (None, draw)]
        self._memory[key] = (StorageWeakRef(storage), [*alive, weakref.ref(draw)])

    def recall(self, x: Tensor, where: str, order: int) -> Draw:
        """The draw of the forward that is being recomputed from here on."""
        known = self._memory.get(_place(x) or ())
        there = [] if known is None or known[0].expired() else [d for r in known[1] if (d := r()) is not None]
        there = [d for d in there if d is self._recalled or not d.recalled] or there
        if len(there) == 1:
            self._recalled = there[0]
        elif there:  # one input of several forwards: only marks tell them apart
            if self._recalled not in there or not all(d.marked for d in there):
                raise self._cannot_tell(where, len(there))
        elif self._recalled is None or order != self._order + 1:  # not the region's next branch: a new region
            waiting = [d for d in self._unmarked if not d.recalled and d.graph != _reentrant()]
            able = waiting if self._recalled is None else {*waiting, self._recalled}
            if len(able) != 1:
                raise self._cannot_tell(where, len(able))
            (self._recalled,) = able
        self._order = order
        assert self._recalled is not None
        self._recalled.recalled = True
        return self._recalled

    def _cannot_tell(self, where: str, forwards: int) -> RunError:
        return RunError(
            f"{where}: a checkpointed region is recomputed, and which of {forwards} forwards it belongs to "
            "cannot be told. Call the model itself rather than its parts, checkpoint from a residual block "
            "on, or run backward after each forward."
        )

    def mark(self, draw: Draw) -> None:
        """A backward reached the end of this draw's forward."""
        self._recalled, self._order = draw, _NONE

    def has_mark(self, draw: Draw) -> None:
        """The graph tells when backward reaches this draw's forward, and keeps the draw."""
        draw.marked = True
        self._unmarked = [d for d in self._unmarked if d is not draw]


def _reentrant() -> bool:
    """Whether the recomputation under way is that of a reentrant checkpoint."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "backward" and frame.f_code.co_filename == _CHECKPOINT:
            return True
        frame = frame.f_back
    return False


def _place(x: Tensor) -> tuple | None:
    """Where in memory a tensor lies; None for one that has no memory of its own (under torch.func)."""
    try:
        return x.untyped_storage()._cdata, x.storage_offset(), tuple(x.shape)
    except (RuntimeError, NotImplementedError):
        return None

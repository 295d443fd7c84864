"""Which draw is in force: one for each outermost training forward, and the right one when it is recomputed.

Draws are decided on the host before the work. A recomputation under activation checkpointing must see the
masks of *its own* forward, also when several forwards precede one backward. Two things tell which that was:
a hook on the node that made the root's output runs first in that forward's backward, and a checkpointed
region is entered again with the very memory it was entered with.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from fallow.errors import RunError, SiteError
from fallow.rows import Selection

if TYPE_CHECKING:
    from fallow.surgery.decide import Decider


@dataclass
class Draw:
    """One draw: the decisions of one training forward."""

    index: int
    rates: dict[str, float] = field(default_factory=dict)  # in force
    kept: dict[str, bool] = field(default_factory=dict)  # batch mode: site -> kept
    rows: dict[tuple[str, int], Selection] = field(
        default_factory=dict
    )  # row mode: (site, batch size) -> rows
    share: dict[str, float] = field(default_factory=dict)  # realised share of rows kept, by site reached
    reached: int = -1  # last branch reached outside a root forward


def in_backward() -> bool:
    """Whether this thread is inside a backward pass, so that a forward is a recomputation."""
    return torch._C._current_graph_task_id() != -1


class DrawBook:
    """Keeps the draws of one applied model."""

    def __init__(self, count: int = 0) -> None:
        self.count = count
        self.current: Draw | None = None  # of the root forward under way, or the latest one
        self.loose: Draw | None = None  # of sites reached outside a root forward
        self.depth = 0  # root forwards under way
        self.held = False
        self._recalled: Draw | None = None
        self._unrecalled = 0  # draws since the last backward
        self._memory: dict[int, tuple[StorageWeakRef, Draw]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Copies keep the count and the latest masks, not what belongs to a forward under way."""
        kept = {"count": self.count, "current": self.current, "held": False, "loose": None, "depth": 0}
        return {**kept, "_recalled": None, "_unrecalled": 0, "_memory": {}}

    def begin(self, draw: Draw) -> Draw:
        """Put a new draw in force."""
        self.count = draw.index + 1
        # A recalled draw is over once new work starts; several forwards may wait for one backward.
        self._unrecalled = 1 if self._recalled is not None else self._unrecalled + 1
        self._recalled = None
        if len(self._memory) > 4096:
            self._memory = {k: v for k, v in self._memory.items() if not v[0].expired()}
        return draw

    def remember(self, x: Tensor, draw: Draw) -> None:
        """Note that a forward entered here with this memory."""
        storage = x.untyped_storage()
        self._memory[storage._cdata] = (StorageWeakRef(storage), draw)

    def recall(self, x: Tensor | None, where: str) -> Draw | None:
        """The draw of the forward that is being recomputed."""
        if x is not None:
            known = self._memory.get(x.untyped_storage()._cdata)
            if known is not None and not known[0].expired():
                self._recalled = known[1]
        if self._recalled is None:
            if self._unrecalled > 1:
                raise RunError(
                    f"{where}: a checkpointed region is recomputed, and which of {self._unrecalled} forwards "
                    "it belongs to cannot be told. Call the model itself rather than its parts, checkpoint "
                    "from a residual block on, or run backward after each forward."
                )
            self._recalled = self.loose or self.current
        return self._recalled

    def mark(self, draw: Draw) -> None:
        """A backward reached the end of this draw's forward."""
        self._recalled = draw


class Mark:
    """Runs before the node of a root's output in backward: that forward's draw is the one to recall."""

    def __init__(self, book: DrawBook, draw: Draw) -> None:
        self.book, self.draw = weakref.ref(book), draw

    def __call__(self, _grads: Any) -> None:
        """Mark the draw."""
        book = self.book()
        if book is not None:
            book.mark(self.draw)


class RootEnter:
    """Forward pre-hook of the root: a new draw for each outermost training forward."""

    def __init__(self, decider: Decider) -> None:
        self.decider = decider

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Start the forward."""
        book = self.decider.book
        if getattr(module, "_is_replica", False):
            raise SiteError(
                "DataParallel copies the model at every step, and draws would be lost with the copies. "
                "Use torch.nn.parallel.DistributedDataParallel."
            )
        if not module.training:
            return
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if in_backward():
            for t in tensors:
                book.recall(t, "the model")
            return
        if book.depth == 0:
            if not book.held or book.current is None:
                book.current = book.begin(self.decider.new_draw())
            for t in tensors:
                book.remember(t, book.current)
        book.depth += 1


class RootLeave:
    """Forward hook of the root: marks the end of the forward in the graph; runs after errors too."""

    def __init__(self, decider: Decider) -> None:
        self.decider = decider

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        """End the forward."""
        book = self.decider.book
        if not module.training or in_backward():
            return
        book.depth = max(0, book.depth - 1)
        if book.depth == 0 and book.current is not None:
            for t in tree_leaves(output):
                if isinstance(t, Tensor) and t.grad_fn is not None:
                    t.grad_fn.register_prehook(Mark(book, book.current))

"""Hooks of the root: where a forward begins and ends, and where its backward begins."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fallow.errors import UsageError
from fallow.surgery.clock import follow
from fallow.surgery.decide import Decider
from fallow.surgery.draws import Draw, DrawBook, in_backward


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
            raise UsageError(
                "DataParallel copies the model at every step, and draws would be lost with the copies. "
                "Use torch.nn.parallel.DistributedDataParallel."
            )
        if not module.training or self.decider.dense:
            return
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if in_backward():
            if tensors:
                first = next((t for t in tensors if t.is_floating_point()), tensors[0])
                book.recall(first, "the model", -1)
            return
        if book.depth == 0:
            if book.count == self.decider.clock.draws:  # the first forward it counts
                follow(module, self.decider.clock, look=self.decider.schedule is not None)
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
        if not module.training or self.decider.dense or in_backward():
            return
        book.depth = max(0, book.depth - 1)
        if book.depth > 0 or book.current is None:
            return
        ends = [t.grad_fn for t in tree_leaves(output) if isinstance(t, Tensor) and t.grad_fn is not None]
        for node in ends:
            node.register_prehook(Mark(book, book.current))
        if ends:
            book.has_mark(book.current)


ENCODERS = nn.TransformerEncoder, nn.TransformerEncoderLayer


class ByModules:
    """Hooks of one of torch's transformer encoders: it calls its modules also where no gradient is needed.

    Its fused path at evaluation reads their weights and would pass by the gates on them.
    """

    def __init__(self) -> None:
        self.before: list[bool] = []

    def enter(self, *_: Any) -> None:
        """Switch the fused path off."""
        self.before.append(torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)

    def leave(self, *_: Any) -> None:
        """Put it back; runs after errors too, those of earlier hooks among them."""
        if self.before:
            torch.backends.mha.set_fastpath_enabled(self.before.pop())

"""The time of a schedule, and the optimisers whose steps it counts."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook


@dataclass
class Clock:
    """The time of a schedule: set by hand, else optimiser steps where known, else forwards."""

    start: int = 0
    draws: int = 0  # made when it started
    set: int | None = None
    steps: int = 0  # optimiser steps since
    by_optimizer: bool = False
    stepped: list[int] = field(default_factory=list)  # optimisers that stepped since the latest draw

    def now(self, draws: int) -> int:
        """The time, after so many draws."""
        if self.set is not None:
            return self.set
        return self.start + (self.steps if self.by_optimizer else draws - self.draws)

    def optimizer_stepped(self, which: int) -> None:
        """An optimiser that holds parameters of the model made a step.

        Several may share a model (by kind of weights, by parameter, one around the other): their steps on
        the gradients of one forward are one step.
        """
        self.by_optimizer = True
        if not self.stepped or which in self.stepped:
            self.steps += 1
            self.stepped.clear()
        self.stepped.append(which)


# One hook for all models, and none before the first is applied. It is never taken off again: torch walks over
# its hooks while they run, and a model may be dropped at any moment.
_followed: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Clock]] = weakref.WeakKeyDictionary()
_installed: list[Any] = []


def follow(model: nn.Module, clock: Clock, look: bool) -> None:
    """Let a clock run on the steps of the model's optimisers; ``look``: for one that is there already."""
    _followed[model] = weakref.ref(clock)
    if not _installed:
        _installed.append(register_optimizer_step_post_hook(_stepped))
    if look and not clock.by_optimizer:
        clock.by_optimizer = any(
            issubclass(type(o), Optimizer) and _holds(o, model) for o in gc.get_objects()
        )


def leave(model: nn.Module) -> None:
    """Stop following."""
    _followed.pop(model, None)


def _stepped(optimizer: Optimizer, *_: Any) -> None:
    for model, ref in list(_followed.items()):
        clock = ref()
        if clock is not None and _holds(optimizer, model):
            clock.optimizer_stepped(id(optimizer))


def _holds(optimizer: Optimizer, model: nn.Module) -> bool:
    own = {id(p) for p in model.parameters()}
    return any(id(p) in own for group in optimizer.param_groups for p in group["params"])

"""What every method of `lejeune2021` is: a network on its way to fewer weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_SPREAD = 0.02  # standard deviation of the first weights where a method says so
# Molchanov's schedule: between these parts of the training the weight of the divergence rises from 0 to 1.
_RISE = (5 / 200, 20 / 200)


@dataclass(frozen=True)
class Plan:
    """What a method is told of the training.

    Attributes:
        epochs: in all.
        steps: optimiser steps in all.
        samples: N of the bound of variational dropout.
        learning_rate: at the start.
        draws: of the noise.
        settings: the method's own, by name.
    """

    epochs: int
    steps: int
    samples: int
    learning_rate: float
    draws: torch.Generator
    settings: Mapping[str, Any]


class Trainee:
    """A network on its way to fewer weights.

    Attributes:
        model: with its noise, if any.
        plan: of the training.
        optimiser: of the network's parameters and the method's own.
    """

    optimiser: torch.optim.Adam

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.model, self.plan = model, plan

    def begin(self, epoch: int) -> None:
        """Set the learning rate of an epoch."""
        for group in self.optimiser.param_groups:
            group["lr"] = group["first_rate"] * self.share(epoch / self.plan.epochs)

    def share(self, time: float) -> float:
        """The learning rate at a part of the training, relative to the first: on a line to 0."""
        return 1 - time

    def loss(self, error: Tensor) -> Tensor:
        """What is minimised, from the mean cross-entropy of a batch."""
        return error

    def update(self, last: bool) -> None:
        """What happens after the optimiser's step, `last` in its epoch or not."""

    def masks(self) -> dict[str, Tensor]:
        """True = kept, of each weight: what a network at the end has, as of now."""
        raise NotImplementedError

    def masks_by_strength(self) -> dict[str, Tensor]:
        """The same by another rule, for a method whose own depends on the learning rate; empty for others."""
        return {}

    def state(self) -> dict[str, Any]:
        """To go on from."""
        return {"model": self.model.state_dict(), "optimiser": self.optimiser.state_dict()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])

    def _adam(self, *groups: tuple[Iterable[nn.Parameter], float]) -> None:
        """Adam over groups of parameters, each with its learning rate."""
        made = [{"params": [*params], "lr": rate, "first_rate": rate} for params, rate in groups]
        self.optimiser = torch.optim.Adam([group for group in made if group["params"]], fused=True)


def risen(time: float) -> float:
    """How much of the divergence counts at a part of the training."""
    first, last = _RISE
    return min(max((time - first) / (last - first), 0.0), 1.0)


def small_(model: nn.Module, draws: torch.Generator) -> None:
    """Weights from N(0, 0.02^2), biases 0."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, _SPREAD, generator=draws)
            else:
                parameter.zero_()

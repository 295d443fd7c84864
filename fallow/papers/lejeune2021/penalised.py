"""Methods of `lejeune2021` that are a penalty, a target, or both, through `fallow.sparsify`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fallow.papers.lejeune2021.trainee import Plan, Trainee, risen
from fallow.penalties import LogSum
from fallow.sparsity.sparsify import CUT, sparsify

STRENGTH = 1e-3  # of LogSum, in all methods of the case study


@dataclass(frozen=True)
class FaultyLogSum:
    """LogSum with the dual function that the authors' eta-Trick ran on, in place of its own.

    Formula: ``2 [log((r + eps) / 2) - (r - eps)^2 / (4 eta)] + 1e-3 log(eta / strength)``, r^2 = eps^2 + 4
    eta. The second term is twice what it should be, and the last is none of the penalty's.

    Attributes:
        eps: of LogSum.
        strength: lambda, which the last term needs.

    References:
        Project's notes, section 3, of the two discrepancies in the authors' code.
    """

    eps: float
    strength: float

    @property
    def right(self) -> LogSum:
        """The penalty that it should be."""
        return LogSum(eps=self.eps)

    def value(self, w: Tensor) -> Tensor:
        """That of LogSum."""
        return self.right.value(w)

    def eta(self, w: Tensor) -> Tensor:
        """That of LogSum."""
        return self.right.eta(w)

    def prox(self, w: Tensor, step: Any) -> Tensor:
        """That of LogSum."""
        return self.right.prox(w, step)

    def dual(self, eta: Tensor) -> Tensor:
        """The faulty one, with the added logarithm."""
        wide = (self.eps**2 + 4 * eta).sqrt() + self.eps
        # (r - eps)^2 / (4 eta) without the difference of nearly equal numbers
        faulty = 2 * ((wide / 2).log() - 4 * eta / wide.square())
        return faulty + 1e-3 * (eta / self.strength).log()


class Penalised(Trainee):
    """A penalty, a target, or both, through `fallow.sparsify`."""

    def __init__(
        self, model: nn.Module, plan: Plan, strategy: Any, method: str = "gradient", **more: Any
    ) -> None:
        super().__init__(model, plan)
        self.strategy = strategy
        given = {"strength": STRENGTH, **plan.settings, **more}
        given.pop("eps", None)
        if "target" in given:
            given["steps"] = plan.steps
        self._adam((model.parameters(), plan.learning_rate))
        self.run = sparsify(model, strategy=strategy, method=method, optimiser=self.optimiser, **given)
        own = [*self.run.parameters()]
        if own:
            rate = plan.learning_rate
            self.optimiser.add_param_group({"params": own, "lr": rate, "first_rate": rate})

    def loss(self, error: Tensor) -> Tensor:
        """The error and the penalty."""
        return error + self.run.penalty()

    def update(self, last: bool) -> None:
        """Prox, survival rates or masks."""
        self.run.update()

    def masks(self) -> dict[str, Tensor]:
        """By survival rate, or by the target."""
        return self.run.masks()

    def state(self) -> dict[str, Any]:
        """With the penalty's own."""
        return {**super().state(), "run": self.run.state_dict()}

    def load(self, state: Mapping[str, Any]) -> None:
        """With the penalty's own."""
        super().load(state)
        self.run.load_state_dict(state["run"])


class Learned(Penalised):
    """Variational dropout whose noisiest weights go along a ramp; the divergence on Molchanov's schedule."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        own: dict[str, Any] = {"strength": plan.settings.get("strength", 1.0), "samples": plan.samples}
        own["schedule"] = lambda step: risen(step / plan.steps)
        super().__init__(model, plan, None, "variational", **own)

    def begin(self, epoch: int) -> None:
        """The learning rate; the noise draws from torch's own generator, the same whatever was before."""
        super().begin(epoch)
        torch.manual_seed(self.plan.draws.initial_seed())


class Multiplied(Penalised):
    """AdaProx, whose weights are cut by the very survival rates that its last step multiplied them with.

    Those are for lr strength / sqrt(v) in place of the strength, v Adam's second moment.
    """

    def update(self, last: bool) -> None:
        """Multiply; in the last step of an epoch see with what."""
        if not last:
            self.run.update()
            return
        before = {weight.name: weight.magnitude().clone() for weight in self.run.weights}
        self.run.update()
        self._kept = {
            weight.name: (weight.magnitude() >= CUT * before[weight.name]) & (before[weight.name] > 0)
            for weight in self.run.weights
        }

    def masks(self) -> dict[str, Tensor]:
        """By the survival rates of the last step of the epoch."""
        return self._kept

    def masks_by_strength(self) -> dict[str, Tensor]:
        """By the survival rates for the strength itself, which cut the weights of LogSum."""
        return {
            weight.name: self.strategy.survival_rate(weight.magnitude(), self.run.strength) >= CUT
            for weight in self.run.weights
        }

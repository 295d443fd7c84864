"""The seven methods of `lejeune2021` and what stands beside them, as one thing that is trained.

Nothing here makes weights sparse itself: penalties, learned rates, targets and noise are those of
`fallow.sparsity` and `fallow.noise`. What is here is which of them, with which settings, a method is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fallow.noise.variational import variational_
from fallow.penalties import LogSum
from fallow.sparsity.sparsify import CUT, sparsify

EPS, STRENGTH = 2.0, 1e-3  # of LogSum, in all methods of the case study
SPREAD = 0.02  # standard deviation of the first weights where a method says so
# Molchanov's schedule: between these parts of the training the weight of the divergence rises from 0 to 1.
RISE = (5 / 200, 20 / 200)
_CUT_OF_THREE = 1 / (1 + math.exp(3))  # survival rate at log alpha = 3
_NO_CLIP = 40.0


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


# --- penalties ----------------------------------------------------------------------------------------------


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


# --- variational dropout ------------------------------------------------------------------------------------


class Variational(Trainee):
    """N times the cross-entropy and the divergence of variational dropout, as the authors have it.

    In the additive form the authors learn log sigma and `variational_` log sigma^2; as Adam's steps do not
    depend on a parameter's scale, twice the learning rate for it is the same training.
    """

    def __init__(self, model: nn.Module, plan: Plan, form: str, sample: str) -> None:
        super().__init__(model, plan)
        small_(model, plan.draws)
        plain = [*model.parameters()]
        additive = form == "additive"
        start, clip = (-10.0, 10.0) if additive else (-5.0, _NO_CLIP)
        self.noise = variational_(
            model, form=form, sample=sample, start=start, clip=clip, cut=CUT, generator=plan.draws
        )
        rate = plan.learning_rate
        self._adam((plain, rate), (self.noise.parameters(), 2 * rate if additive else rate))
        self.weight = 1.0

    def loss(self, error: Tensor) -> Tensor:
        """N times the bound."""
        return self.plan.samples * error + self.weight * self.noise.kl("fit")

    def masks(self) -> dict[str, Tensor]:
        """By survival rate."""
        return self.noise.masks()


class Scheduled(Variational):
    """Sparse variational dropout on Molchanov's schedule."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        Trainee.__init__(self, model, plan)
        small_(model, plan.draws)
        plain = [*model.parameters()]
        self.noise = variational_(model, start=-10.0, clip=8.0, cut=_CUT_OF_THREE, generator=plan.draws)
        rate = plan.learning_rate
        self._adam((plain, rate), (self.noise.parameters(), rate))
        self.weight = 0.0

    def begin(self, epoch: int) -> None:
        """The learning rate, and how much of the divergence counts."""
        super().begin(epoch)
        self.weight = risen(epoch / self.plan.epochs)

    def share(self, time: float) -> float:
        """Constant for half of the training, then on a line to 0."""
        return min(1.0, 2 * (1 - time))


def risen(time: float) -> float:
    """How much of the divergence counts at a part of the training."""
    first, last = RISE
    return min(max((time - first) / (last - first), 0.0), 1.0)


def small_(model: nn.Module, draws: torch.Generator) -> None:
    """Weights from N(0, 0.02^2), biases 0."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, SPREAD, generator=draws)
            else:
                parameter.zero_()


# --- the methods by name ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """One curve of the figure.

    Attributes:
        title: in plots and tables.
        learning_rate: Adam's at the start, on MNIST.
        make: the network and the plan -> what is trained.
    """

    title: str
    learning_rate: float
    make: Callable[[nn.Module, Plan], Trainee]


def _logsum(plan: Plan) -> LogSum:
    return LogSum(eps=plan.settings.get("eps", EPS))


METHODS: dict[str, Method] = {
    "vardrop-lr-ar": Method(
        "VarDrop+LR+AR", 1e-4, lambda model, plan: Variational(model, plan, "additive", "activations")
    ),
    "vardrop-lr": Method(
        "VarDrop+LR", 1e-3, lambda model, plan: Variational(model, plan, "multiplicative", "activations")
    ),
    "vardrop": Method(
        "VarDrop", 1e-3, lambda model, plan: Variational(model, plan, "multiplicative", "weights")
    ),
    "eta-trick": Method("eta-Trick", 1e-3, lambda model, plan: Penalised(model, plan, _logsum(plan), "eta")),
    "eta-trick-published": Method(
        "eta-Trick, as published",
        1e-3,
        lambda model, plan: Penalised(model, plan, FaultyLogSum(EPS, STRENGTH), "eta"),
    ),
    "adaprox": Method("AdaProx", 1e-4, lambda model, plan: Multiplied(model, plan, _logsum(plan), "adaprox")),
    "adatikhonov": Method(
        "AdaTikhonov", 1e-4, lambda model, plan: Penalised(model, plan, _logsum(plan), "tikhonov")
    ),
    "logsum": Method("LogSum", 1e-4, lambda model, plan: Penalised(model, plan, _logsum(plan))),
    "sparse-vd": Method("Sparse VD", 1e-3, Scheduled),
    "magnitude": Method("Gradual magnitude", 1e-3, lambda model, plan: Penalised(model, plan, "magnitude")),
    "logsum-target": Method(
        "LogSum to a target", 1e-3, lambda model, plan: Penalised(model, plan, _logsum(plan))
    ),
    "vardrop-target": Method("VarDrop to a target", 1e-3, Learned),
}

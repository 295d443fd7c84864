"""Variational dropout as `lejeune2021` trains it: N times the cross-entropy and the divergence."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from fallow.noise.variational import variational_
from fallow.papers.lejeune2021.trainee import Plan, Trainee, risen, small_
from fallow.sparsity.sparsify import CUT

_CUT_OF_THREE = 1 / (1 + math.exp(3))  # survival rate at log alpha = 3
_NO_CLIP = 40.0


class Variational(Trainee):
    """N times the cross-entropy and the divergence of variational dropout, as the authors have it.

    In the additive form the authors learn log sigma and `variational_` log sigma^2; as Adam's steps do not
    depend on a parameter's scale, twice the learning rate for it is the same training.
    """

    def __init__(self, model: nn.Module, plan: Plan, form: str, sample: str) -> None:
        super().__init__(model, plan)
        additive = form == "additive"
        start, clip = (-10.0, 10.0) if additive else (-5.0, _NO_CLIP)
        faster = 2.0 if additive else 1.0
        self._add_noise(faster, form=form, sample=sample, start=start, clip=clip, cut=CUT)
        self.weight = 1.0

    def _add_noise(self, faster: float, **noise: Any) -> None:
        """Small weights, noise on them, and its learning rate: so many times the network's."""
        small_(self.model, self.plan.draws)
        plain = [*self.model.parameters()]
        self.noise = variational_(self.model, generator=self.plan.draws, **noise)
        rate = self.plan.learning_rate
        self._adam((plain, rate), (self.noise.parameters(), faster * rate))

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
        self._add_noise(1.0, start=-10.0, clip=8.0, cut=_CUT_OF_THREE)
        self.weight = 0.0

    def begin(self, epoch: int) -> None:
        """The learning rate, and how much of the divergence counts."""
        super().begin(epoch)
        self.weight = risen(epoch / self.plan.epochs)

    def share(self, time: float) -> float:
        """Constant for half of the training, then on a line to 0."""
        return min(1.0, 2 * (1 - time))

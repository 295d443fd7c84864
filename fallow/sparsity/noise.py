"""Noise on the chosen weights of a model, as what a method of a run is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fallow.errors import UsageError
from fallow.noise._attached import attached
from fallow.noise._handle import Handle, settled
from fallow.sparsity.base import Method, Strategy
from fallow.sparsity.control import Target
from fallow.sparsity.weights import Weight


@dataclass(frozen=True, kw_only=True)
class Noise:
    """What the noise of a method is like; each takes what concerns it, and checks it.

    Attributes:
        form: of "variational": "additive" or "multiplicative".
        sample: of "variational": "activations", which is for linear layers and convolutions, or "weights".
        survival_rate: of "hardconcrete" at first, of what is targeted by "targeted" at the end of the ramp.
    """

    form: str = "additive"
    sample: str = "activations"
    survival_rate: float = 0.5


class Noisy(Method):
    """Noise on the chosen weights, which comes off a copy of the model or the model itself.

    Attributes:
        name: of the method.
        model: on which it is.
        handle: what `fallow.noise` gives to hold it.
        owns: whether the noise says by itself what is penalised, so that there is no strategy to choose.
    """

    name: ClassVar[str]
    owns: ClassVar[bool] = False
    kind: ClassVar[type[Handle]]
    groups: ClassVar[tuple[str, ...]] = ()  # those there are; none: all

    def __init__(
        self,
        weights: Sequence[Weight],
        strategy: Strategy,
        optimiser: torch.optim.Optimizer | None,
        *,
        model: nn.Module,
        noise: Noise | None,
        samples: int | None,
        target: Target | None,
    ) -> None:
        super().__init__(weights, strategy, optimiser)
        self.model, self.noise, self.samples, self.target = model, noise or Noise(), samples, target
        self._check()
        names = [weight.name for weight in weights]
        self.handle: Any = self.attach(names)
        self._sites = {name: (noise, own) for name, noise, own in attached(model) if name in names}

    def attach(self, names: list[str]) -> Handle:
        """Put the noise on."""
        raise NotImplementedError

    def _check(self) -> None:
        """Refuse what this noise cannot have, before anything is put on."""
        groups = self.weights[0].groups
        if self.groups and groups not in self.groups and not (self.weights[0].keep and "N:M" in self.groups):
            raise UsageError(f"method {self.name!r} has groups of {', '.join(self.groups)}, got {groups!r}")
        owners: dict[int, set[int]] = {}
        for module in self.model.modules():
            for parameter in module._parameters.values():
                owners.setdefault(id(parameter), set()).add(id(module))
        for weight in self.weights:
            if len(owners[id(weight.parameter)]) > 1:
                raise UsageError(
                    f"{weight.name} is the parameter of several layers, of which one alone would have noise: "
                    "leave it out with exclude="
                )

    def parameters(self) -> Iterator[nn.Parameter]:
        """What the noise has learned; these are parameters of the model too."""
        return self.handle.parameters()

    def final(self, weight: Weight) -> Tensor:
        """The weight at evaluation."""
        return settled(*self._sites[weight.name]) if self.handle.names else weight.parameter.detach()

    def strip(self, model: nn.Module) -> None:
        """Weights as at evaluation, without noise; of a weight that would be empty what the run has kept."""
        names = self.handle.names
        if not names:
            return
        layers = {id(noise): noise for name, noise, _ in attached(model) if name in names}
        before = {name: model.get_parameter(name).detach().clone() for name in names}
        Handle.harden(self.kind.holding(model, list(layers.values())))
        with torch.no_grad():
            for name, value in before.items():
                found = model.get_parameter(name)
                if not bool(found.any()):
                    found.copy_(value)

    def remove(self) -> None:
        """Take the noise off, and what it has learned."""
        self.handle.remove()

    def _rates(self, weight: Weight) -> Tensor:
        """Those of the noise, group by group; 1 where it was removed."""
        if not self.handle.names:
            return torch.ones_like(weight.magnitude())
        noise, own = self._sites[weight.name]
        return noise.rates(own)

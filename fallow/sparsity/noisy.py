"""Methods that put noise on the weights in training, and what their survival rates say in the end.

- dropout, gaussian: weight dropout whose survival rates are the strategy's after every update. With curvature
  h along the weights the expected loss has the gradient of ``strength sum h Omega(w)`` beside its own.
- variational: normal weights with learned variances; ``strength KL / samples`` is added to the loss.
- hardconcrete: learned gates; ``strength`` times the expected number of weights behind open gates is added.
- targeted: the smallest of each row are dropped, more and more of them along the target's ramp.

What is learned sits in the model beside its weights, and in the model's state dict, as long as noise does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fallow.errors import FallowError, RunError, UsageError, check_count
from fallow.noise import (
    HardConcreteGates,
    TargetedDropout,
    VariationalNoise,
    WeightDropout,
    hard_concrete_,
    targeted_dropout_,
    variational_,
    weight_dropout_,
)
from fallow.noise._attached import attached
from fallow.noise._handle import Handle, settled
from fallow.sparsity.base import Method, Strategy
from fallow.sparsity.control import Target
from fallow.sparsity.weights import Weight

# log sigma^2 of what is masked: far below what the clip of log alpha makes of it, 3e-12 at a weight of 0.
_SILENT = -50.0


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
        model: on which it is.
        handle: what `fallow.noise` gives to hold it.
        owns: whether the noise says by itself what is penalised, so that there is no strategy to choose.
    """

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
        self.name = next(name for name, method in NOISY.items() if type(self) is method)
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


class Dropout(Noisy):
    """Weight dropout whose survival rates follow the weights.

    Entries of a group share their rate and not their draws, as the penalty of root mean squares has it.
    Nothing is dropped before the first update, nor after the target is reached.

    References:
        LeJeune, Javadi, Baraniuk: The Flip Side of the Reweighted Coin (2021). For groups: derived.
    """

    kind = WeightDropout
    draws: ClassVar[str] = "bernoulli"

    def attach(self, names: list[str]) -> Handle:
        """With survival rates of 1."""
        return weight_dropout_(self.model, names=names, kind=self.draws)

    @torch.no_grad()
    def update(self, strength: float) -> None:
        """Take the survival rates of the weights as they are now."""
        if not self.handle.names:
            return
        try:
            found = {weight.name: self.rate(weight, strength) for weight in self.weights}
            self.handle.rates = {weight.name: weight.spread(found[weight.name]) for weight in self.weights}
        except FallowError:  # as a rule NaN, which is looked for only now
            for weight in self.weights:
                if not bool(weight.parameter.isfinite().all()):
                    raise RunError(
                        f"{weight.name} has NaN or infinite entries: no rate was changed; load the last "
                        "checkpoint and lower the learning rate"
                    ) from None
            raise

    def settle(self) -> None:
        """No noise any more: it was the penalty."""
        if self.handle.names:
            self.handle.rates = 1.0

    def state(self) -> dict[str, Any]:
        """The rates in force, by weight."""
        return self.handle.rates

    def load(self, state: dict[str, Any]) -> None:
        """Bring them back."""
        self.handle.rates = state


class Gaussian(Dropout):
    """The same with normal noise."""

    draws = "gaussian"


class Variational(Noisy):
    """Variational dropout; at strength 1 it minimises its bound once the schedule is at 1.

    The survival rate is ``1 / (1 + alpha)``, of a group the share of the squared weights in squares and
    variances together. Masked weights are without noise. The noisy model itself cuts nothing.

    References:
        Molchanov, Ashukha, Vetrov: Variational dropout sparsifies deep neural networks (2017).
    """

    owns = True
    kind = VariationalNoise

    def _check(self) -> None:
        if self.samples is None:
            raise UsageError('method "variational" needs samples=, how many the model is trained on')
        self.samples = check_count("samples", self.samples, 1)
        super()._check()

    def attach(self, names: list[str]) -> Handle:
        """Without a cut of its own, which is the run's."""
        form, sample = self.noise.form, self.noise.sample
        return variational_(self.model, names=names, form=form, sample=sample, cut=0.0)

    def penalty(self, strength: float) -> Tensor | float:
        """``strength KL / samples``; masked weights are a constant in it."""
        assert self.samples is not None
        return self.handle.kl() * (strength / self.samples) if self.handle.names else 0.0

    def rate(self, weight: Weight, strength: float) -> Tensor:
        """Signal over signal and noise, whatever the strength."""
        rates = self._rates(weight)
        if weight.axis is None or not self.handle.names:
            return rates
        square = weight.parameter.detach().square()
        total = weight.magnitude((square / rates).sqrt()).square()
        return (weight.magnitude().square() / total).nan_to_num(0.0)

    def score(self, weight: Weight) -> Tensor:
        """The survival rate: the noisiest go first."""
        return self.rate(weight, 1.0)

    @torch.no_grad()
    def masked(self, masks: Sequence[Tensor]) -> None:
        """Additive noise would stay where weights are 0."""
        if self.noise.form != "additive" or not self.handle.names:
            return
        for weight, mask in zip(self.weights, masks, strict=True):
            noise, own = self._sites[weight.name]
            noise.learned(own).masked_fill_(~weight.spread(mask), _SILENT)


class HardConcrete(Noisy):
    """Gates on weights, or on groups of them, that are learned with them.

    The survival rate is the probability that a gate is open, and ranks the groups. In the plain model weights
    are multiplied by the gates of the test, which are 0 below a survival rate of .31: that may be more zeros
    than a target asks for.

    References:
        Louizos, Welling, Kingma: Learning sparse neural networks through L0 regularization (2018).
    """

    owns = True
    kind = HardConcreteGates
    groups = ("weights", "outputs", "inputs", "N:M")

    def attach(self, names: list[str]) -> Handle:
        """A gate for each group."""
        groups = "weights" if self.weights[0].axis is None else self.weights[0].groups
        rate = self.noise.survival_rate
        return hard_concrete_(self.model, survival_rate=rate, groups=groups, names=names)

    def penalty(self, strength: float) -> Tensor | float:
        """``strength`` times the expected number of weights behind open gates."""
        return self.handle.penalty(strength) if self.handle.names else 0.0

    def rate(self, weight: Weight, strength: float) -> Tensor:
        """The probability that the gate is open, whatever the strength."""
        return self._rates(weight).reshape(weight.magnitude().shape)

    def score(self, weight: Weight) -> Tensor:
        """The same: it rises with the gate of the test, and tells apart those that are 0 or 1."""
        return self.rate(weight, 1.0)


class Targeted(Noisy):
    """Targeted dropout, whose share and drop rate rise while the target's ramp does.

    At its end the smallest of each row, or the rows of smallest norm in a layer, are zero: other than by
    other methods each row loses the same share, to an entry, and the rest of the target one row at a time.

    References:
        Gomez and others: Learning sparse networks using targeted dropout (2019).
    """

    owns = True
    ramps = True
    kind = TargetedDropout
    groups = ("weights", "outputs")

    def _check(self) -> None:
        if self.target is None:
            raise UsageError('method "targeted" needs target= and steps=: nothing else says how many go')
        if self.target.control != "ramp":
            raise UsageError(
                'method "targeted" has no strength to control: take control="ramp", got '
                f"{self.target.control!r}"
            )
        super()._check()

    def attach(self, names: list[str]) -> Handle:
        """At the foot of the ramp."""
        assert self.target is not None
        self.time, steps = 0, max(self.target.last - self.target.begin, 1)
        share, rate, groups = self.target.share, self.noise.survival_rate, self.weights[0].groups
        return targeted_dropout_(
            self.model, share, survival_rate=rate, groups=groups, ramp_steps=steps, names=names
        )

    def update(self, strength: float) -> None:
        """A step along the ramp."""
        self._at(self.time + 1)

    def _at(self, time: int) -> None:
        assert self.target is not None
        self.time = time
        if self.handle.names:
            self.handle.step(max(time - self.target.begin, 0))

    def rate(self, weight: Weight, strength: float) -> Tensor:
        """That of what is targeted now, 1 of the rest."""
        return self._rates(weight).reshape(weight.magnitude().shape)

    def score(self, weight: Weight) -> Tensor:
        """The smallest share at which a group is targeted: its rank in the row, or in the layer."""
        size = weight.magnitude()
        rows = size.unsqueeze(0) if weight.axis is not None else size.flatten(1)
        rank = rows.argsort(dim=1, stable=True).argsort(dim=1) + 1
        return (rank.double() / rows.shape[1]).view(size.shape)

    def state(self) -> dict[str, Any]:
        """The time."""
        return {"time": self.time}

    def load(self, state: dict[str, Any]) -> None:
        """Bring it back."""
        self._at(check_count("time", state["time"]))


NOISY: dict[str, type[Noisy]] = {
    "dropout": Dropout,
    "gaussian": Gaussian,
    "variational": Variational,
    "hardconcrete": HardConcrete,
    "targeted": Targeted,
}

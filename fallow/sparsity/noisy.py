"""Methods that put noise on the weights in training, and what their survival rates say in the end.

- dropout, gaussian: weight dropout whose survival rates are the strategy's after every update. With curvature
  h along the weights the expected loss has the gradient of ``strength sum h Omega(w)`` beside its own.
- variational: normal weights with learned variances; ``strength KL / samples`` is added to the loss.
- hardconcrete: learned gates; ``strength`` times the expected number of weights behind open gates is added.
- targeted: the smallest of each row are dropped, more and more of them along the target's ramp.

What is learned sits in the model beside its weights, and in the model's state dict, as long as noise does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

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
from fallow.noise._handle import Handle
from fallow.sparsity.noise import Noisy
from fallow.sparsity.weights import Weight

# log sigma^2 of what is masked: far below what the clip of log alpha makes of it, 3e-12 at a weight of 0.
_SILENT = -50.0


class Dropout(Noisy):
    """Weight dropout whose survival rates follow the weights.

    Entries of a group share their rate and not their draws, as the penalty of root mean squares has it.
    Nothing is dropped before the first update, nor after the target is reached.

    References:
        LeJeune, Javadi, Baraniuk: The Flip Side of the Reweighted Coin (2021). For groups: derived.
    """

    name = "dropout"
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

    name = "gaussian"
    draws = "gaussian"


class Variational(Noisy):
    """Variational dropout; at strength 1 it minimises its bound once the schedule is at 1.

    The survival rate is ``1 / (1 + alpha)``, of a group the share of the squared weights in squares and
    variances together. Masked weights are without noise. The noisy model itself cuts nothing.

    References:
        Molchanov, Ashukha, Vetrov: Variational dropout sparsifies deep neural networks (2017).
    """

    owns = True
    name = "variational"
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
    name = "hardconcrete"
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
    name = "targeted"
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
    method.name: method for method in (Dropout, Gaussian, Variational, HardConcrete, Targeted)
}

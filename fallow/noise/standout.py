"""Standout: the keep probability of a unit follows its own activation."""

from __future__ import annotations

import math
import numbers
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fallow.errors import ArgumentError, RunError, UsageError, check_number
from fallow.noise._attached import Attached, check_free
from fallow.noise._handle import Handle, draw

_LAYERS = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


def standout(
    x: Tensor,
    belief: Tensor,
    *,
    kappa: float = 1.0,
    beta: float = 0.0,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Units dropped with probabilities that follow their activations.

    Formula: in training ``m x``, m = 1 with probability ``sigmoid(kappa belief + beta)``, else 0; at
    evaluation x times that probability. Masks are not scaled.

    Shape:
        x: any.
        belief: that of x.
        returns: that of x.

    Args:
        x: The units.
        belief: Their activations ``pi^T x`` in the network that decides, here those before the non-linearity;
            no gradient goes through it.
        kappa: How fast the probability grows with the activation; not negative.
        beta: Its logit where the activation is 0.
        training: Random or expected.
        generator: Of the draws; None: torch's default one of the units' device.

    Raises:
        ArgumentError: No tensors.
        UsageError: Other shapes, or numbers that cannot be.

    Estimator:
        Evaluation is the expectation of this layer's units given their activations, not that of the network.

    References:
        Ba, Frey: Adaptive dropout for training deep neural networks (2013), with the deciding network tied to
        the layer's own weights.

    Examples:
        >>> standout(torch.ones(2), torch.tensor([0.0, 100.0]), training=False)
        tensor([0.5000, 1.0000])
    """
    if not isinstance(x, Tensor) or not isinstance(belief, Tensor):
        raise ArgumentError(f"standout takes tensors, got {type(x).__name__} and {type(belief).__name__}")
    if x.shape != belief.shape:
        raise UsageError(
            f"standout has a belief for each unit, got shapes {list(belief.shape)} and {list(x.shape)}"
        )
    slope, shift = check_number("kappa", kappa, 0.0), _finite("beta", beta)
    rates = torch.sigmoid(slope * belief.detach() + shift)
    if not training:
        return x * rates.to(x.dtype)
    like = rates if rates.dtype in (torch.float32, torch.float64) else rates.float()
    return x.masked_fill(draw(torch.rand, x.shape, like, generator) >= rates, 0)


def _finite(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise UsageError(f"{name} must be a finite number, got {value!r}")
    return float(value)


class _OnOutput(Attached):
    words: ClassVar[str] = "StandoutNoise"

    def __init__(
        self, module: nn.Module, at: nn.Module, kappa: float, beta: float, generator: torch.Generator | None
    ) -> None:
        super().__init__(module, ("<output>",), generator)  # no parameter, so noise on weights goes along
        self.at, self.kappa, self.beta = at, kappa, beta
        self.belief: Tensor | None = None
        self._hooks.append(module.register_forward_hook(self._believe))
        self._hooks.append(at.register_forward_hook(self._drop))

    def _believe(self, module: nn.Module, _args: Any, output: Tensor) -> None:
        self.belief = output.detach()

    def _drop(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        belief, self.belief = self.belief, None
        if belief is None:
            raise RunError(
                f"{type(self.at).__name__}, where standout drops, ran without {type(self.module).__name__} "
                "before it, which says how often; put the two into one checkpointed part, or leave at= out"
            )
        mode = {"training": self.module.training, "generator": self.generator}
        return standout(output, belief, kappa=self.kappa, beta=self.beta, **mode)


class StandoutNoise(Handle):
    """What `standout_` has put on a layer; made by it."""

    kind: ClassVar[type[Attached]] = _OnOutput

    @property
    def kappa(self) -> float:
        """How fast the keep probability grows with the activation; may be set."""
        return self._layers()[0].kappa

    @kappa.setter
    def kappa(self, value: float) -> None:
        for noise in self._layers():
            noise.kappa = check_number("kappa", value, 0.0)

    @property
    def beta(self) -> float:
        """Its logit where the activation is 0; may be set."""
        return self._layers()[0].beta

    @beta.setter
    def beta(self, value: float) -> None:
        for noise in self._layers():
            noise.beta = _finite("beta", value)

    def survival_rates(self) -> dict[str, Tensor]:
        """Refused: they are those of an input."""
        raise UsageError("the survival rates of standout follow the input: see the function standout")

    def harden(self) -> dict[str, Tensor]:
        """Refused: the expected mask depends on the input, so no plain layer computes it."""
        raise UsageError("no weights make up for standout, whose rates follow the input: use remove()")


def standout_(
    layer: nn.Module,
    *,
    at: nn.Module | None = None,
    kappa: float = 1.0,
    beta: float = 0.0,
    generator: torch.Generator | None = None,
) -> StandoutNoise:
    """Put `standout` on the units of a linear layer or convolution, by its activations (bias included).

    Parameters, state_dict keys and optimisers stay as they are; copies and pickles have noise of their own.

    Args:
        layer: nn.Linear or a convolution.
        at: The module whose output is masked, say the non-linearity behind the layer; None: the layer itself,
            which is the same in front of ReLU, but not in front of what makes 0 or half of a unit something
            else.
        kappa: How fast the keep probability grows with the activation; not negative.
        beta: Its logit where the activation is 0.
        generator: Of the draws; None: torch's default one. Under activation checkpointing take None.

    Raises:
        ArgumentError: Another layer, or no module.
        UsageError: Standout is there already; numbers that cannot be.

    References:
        Ba, Frey: Adaptive dropout for training deep neural networks (2013). Of weights, with the rates
        ``sigmoid(kappa |w| + beta)``: `weight_dropout_` with `fallow.penalties.Standout` as its strategy.

    Examples:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> noise = standout_(model[0], at=model[1], beta=1.0)
        >>> list(model.state_dict()) == list(nn.Sequential(*model).state_dict())
        True
        >>> noise.remove()
    """
    if not isinstance(layer, _LAYERS):
        raise ArgumentError(
            f"standout_ takes nn.Linear or a convolution, got {type(layer).__name__}: "
            "pass hidden layers one by one"
        )
    place = layer if at is None else at
    if not isinstance(place, nn.Module):
        raise ArgumentError(f"at must be a module, got {type(at).__name__}")
    check_free(layer, "<output>")
    slope, shift = check_number("kappa", kappa, 0.0), _finite("beta", beta)
    return StandoutNoise.holding(layer, [_OnOutput(layer, place, slope, shift, generator)])

"""Hard concrete gates on weights or groups of them: dropout to exact zeros whose rates are learned."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fallow.errors import ArgumentError, check_choice, check_number, check_rate, refuse_unknown
from fallow.noise._attached import Attached, placed
from fallow.noise._handle import Handle, draw, group_shape

TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1
# Between these log a stays, as in the authors' code; gates are neither quite open nor quite shut.
CLAMP = math.log(1e2)
GROUPS = ("weights", "outputs", "inputs")
_OPENS = TEMPERATURE * math.log(-LOW / HIGH)
_EDGE = 1e-6  # uniform draws stay so far from 0 and 1


def hard_concrete_gate(
    log_a: Tensor, *, training: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    """Gates in [0, 1], elementwise, differentiable in their location.

    Formula: in training ``clip(sigmoid((logit u + log a) / b) (zeta - gamma) + gamma, 0, 1)``, u uniform; at
    evaluation ``clip(sigmoid(log a) (zeta - gamma) + gamma, 0, 1)``; b = 2/3, gamma = -0.1, zeta = 1.1.

    Args:
        log_a: The locations, of any shape.
        training: Random, or the gate of the test.
        generator: Of the draws; None: torch's default one.

    Raises:
        ArgumentError: `log_a` is no real floating-point tensor.

    Estimator:
        The gradient is that of the draw, unbiased for the expected gate's. The gate of the test is not the
        expected one: it is 0 below log a = -2.40 and 1 above 2.40.

    References:
        Louizos, Welling, Kingma: Learning sparse neural networks through L0 regularization (2018), (10) to
        (13).

    Examples:
        >>> hard_concrete_gate(torch.tensor([-3.0, 0.0, 3.0]), training=False)
        tensor([0.0000, 0.5000, 1.0000])
    """
    if not isinstance(log_a, Tensor) or not log_a.is_floating_point():
        raise ArgumentError(f"log_a must be a real floating-point tensor, got {log_a!r}")
    if not training:
        return (torch.sigmoid(log_a) * (HIGH - LOW) + LOW).clamp(0, 1)
    wide = log_a.to(torch.promote_types(log_a.dtype, torch.float32))  # a half type has few numbers near 1
    u = draw(torch.rand, wide.shape, wide, generator).clamp(_EDGE, 1 - _EDGE)
    gate = torch.sigmoid((u.logit() + wide) / TEMPERATURE) * (HIGH - LOW) + LOW
    return gate.clamp(0, 1).to(log_a.dtype)


def open_probability(log_a: Tensor) -> Tensor:
    """The probability that a gate is not 0, ``sigmoid(log a - b log(-gamma / zeta))``; elementwise.

    Examples:
        >>> open_probability(torch.zeros(()))
        tensor(0.8318)
    """
    return torch.sigmoid(log_a - _OPENS)


class _Gated(Attached):
    words: ClassVar[str] = "HardConcreteGates"
    extra = "_log_a"

    def __init__(
        self,
        module: nn.Module,
        names: tuple[str, ...],
        groups: str,
        survival_rate: float,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__(module, names, generator)
        self.groups, self.first = groups, math.log(survival_rate) - math.log1p(-survival_rate)
        self.put()

    def start(self, name: str, weight: Tensor) -> Tensor:
        shape = group_shape(self.module, name, weight, self.groups)
        noise = draw(torch.randn, shape, weight, self.generator)
        return (self.first + 0.01 * noise).clamp_(-CLAMP, CLAMP)

    def seen(self, name: str, weight: Tensor) -> Tensor:
        log_a = self.learned(name)
        if not self.module.training:
            return weight * hard_concrete_gate(log_a.clamp(-CLAMP, CLAMP), training=False)
        # Here and not in the graph: outside the bounds there would be no gradient back. Not a change that
        # autograd should know of, either: it comes before any use of what the optimiser has made.
        log_a.data.clamp_(-CLAMP, CLAMP)
        return weight * hard_concrete_gate(log_a, generator=self.generator)

    def rates(self, name: str) -> Tensor:
        return open_probability(self.learned(name).detach().clamp(-CLAMP, CLAMP))


class HardConcreteGates(Handle):
    """What `hard_concrete_` has put on a model; made by it."""

    kind: ClassVar[type[Attached]] = _Gated

    def expected_l0(self) -> Tensor:
        """The expected number of weights whose gate is not 0, differentiable in the locations."""
        return self.penalty(1.0)

    def penalty(self, strength: float, weight_decay: float = 0.0) -> Tensor:
        """``sum_g P(gate g is open) (strength m_g + weight_decay |w_g|^2 / 2)``, m_g weights in group g.

        Args:
            strength: lambda, of one weight; not negative.
            weight_decay: Of the weights as they are behind open gates.

        Raises:
            UsageError: Numbers that are negative or not finite.
        """
        lam = check_number("strength", strength, 0.0)
        decay = check_number("weight_decay", weight_decay, 0.0)
        total = torch.zeros(())
        for i, (noise, own) in enumerate(self._found.values()):
            weight, log_a = noise.weight(own), noise.learned(own)
            cost: Any = lam * (weight.numel() // log_a.numel())
            if decay:
                axes = [k for k, size in enumerate(log_a.shape) if size == 1]
                square = weight.square()
                cost = cost + decay / 2 * (square.sum(axes, keepdim=True) if axes else square)
            part = (open_probability(log_a.clamp(-CLAMP, CLAMP)) * cost).sum()
            total = part if not i else total + part.to(total.device)
        return total

    def gates(self) -> dict[str, Tensor]:
        """The gates of the test, by the name of the weight, of a shape that broadcasts with it; detached."""
        return {
            name: hard_concrete_gate(noise.learned(own).detach(), training=False)
            for name, (noise, own) in self._found.items()
        }


def hard_concrete_(
    module: nn.Module,
    *,
    survival_rate: float = 0.5,
    groups: str = "weights",
    names: str | Iterable[str] | None = None,
    generator: torch.Generator | None = None,
    **unknown: Any,
) -> HardConcreteGates:
    """Multiply weights of a layer or a model by gates in [0, 1] whose locations are learned.

    In training gates are drawn in every forward, at evaluation they are those of the test; they are often 0
    or 1 exactly. The masks are not scaled: what counts is gate times weight. The loss wants
    `HardConcreteGates.penalty`.

    Beside each parameter there is a new one, named ``weight_log_a``: make the optimiser afterwards. It is
    held between -log 100 and log 100. State dicts of the plain model load into the gated one, where the gates
    begin anew then; for the way back see `HardConcreteGates.plain_state_dict` and `HardConcreteGates.harden`.

    Args:
        module: A layer or a whole model.
        survival_rate: At first log a is logit(survival_rate), plus noise of 0.01; below 1.
        groups: "weights": a gate for each; "outputs": for all weights of a neuron or filter (its bias stays);
            "inputs": for all weights that take the same input.
        names: Of parameters, as in `named_parameters`; None: the weights of all linear layers and
            convolutions.
        generator: Of the draws; None: torch's default one. Under activation checkpointing take None.
        unknown: Refused, with the conversion for p= and the like.

    Raises:
        RateError: A rate outside (0, 1].
        ArgumentError: No module, an unknown keyword.
        UsageError: A rate of 1; names that are no parameters or have noise already; NaN weights; groups that
            a layer does not have.

    Estimator:
        Of the expected loss: unbiased. Gates find the best location only up to a weight: beyond it both
        minima last, see `fallow.penalties.HardConcrete`.

    References:
        Louizos, Welling, Kingma: Learning sparse neural networks through L0 regularization (2018). Start and
        bounds are those of the authors' code, which has gates for inputs.

    Examples:
        >>> layer = nn.Linear(3, 2)
        >>> gates = hard_concrete_(layer, groups="outputs")
        >>> layer.weight_log_a.shape
        torch.Size([2, 1])
        >>> loss = layer(torch.ones(4, 3)).square().mean() + gates.penalty(1e-3)
        >>> gates.remove()
    """
    refuse_unknown("hard_concrete_", unknown, ("survival_rate", "groups", "names", "generator"))
    check_choice("groups", groups, GROUPS)
    first = check_rate(survival_rate)
    check_number("survival_rate (of gates that are to be learned)", first, 0.0, 0.9999)
    sites = placed("hard_concrete_", module, names)
    for site, own in sites:
        for name in own:
            group_shape(site, name, site.get_parameter(name), groups)
    return HardConcreteGates.holding(
        module, [_Gated(site, own, groups, first, generator) for site, own in sites]
    )

"""Targeted dropout: the smallest weights or units alone are dropped, which a network gets used to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fallow.errors import RateError, check_choice, check_count, check_number, refuse_unknown
from fallow.noise._attached import Attached, placed
from fallow.noise._handle import Handle, check_rates, draw, group_shape

GROUPS = ("weights", "outputs")


def targeted_dropout(
    weight: Tensor,
    share: float,
    *,
    survival_rate: float,
    groups: str = "weights",
    training: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A weight of which the smallest entries are dropped, or the rows of the smallest norm.

    Formula: "weights": in each row, the n weights of one output, the ``floor(share n)`` of smallest magnitude
    are targeted; "outputs": of all rows those of the smallest norms. In training each of what is targeted is
    0 with probability 1 - survival_rate, and not scaled otherwise; at evaluation all of it is 0.

    Shape:
        weight: (out, ...).
        returns: that of the weight.

    Args:
        weight: What is masked.
        share: Of what is targeted, in [0, 1].
        survival_rate: In [0, 1], of what is targeted; everything else is kept.
        groups: "weights" or "outputs".
        training: Random, or the network of the test.
        generator: Of the draws; None: torch's default one of the weight's device.

    Raises:
        RateError: A survival rate outside [0, 1].
        UsageError: A share outside [0, 1]; other groups.

    Estimator:
        Biased on purpose: the expected weight of what is targeted is p = survival_rate times the weight. At
        expected weights w a quadratic loss of curvature 1 gets ``(1 - p) / (2 p)`` times the sum of the
        targeted squares more, a trimmed ridge.

    References:
        Gomez and others: Learning sparse networks using targeted dropout (2019), and its code for ranks. The
        penalty: project's notes, section 2, derived there.

    Examples:
        >>> targeted_dropout(torch.tensor([[3.0, -1.0, 2.0, 0.5]]), 0.5, survival_rate=0.5, training=False)
        tensor([[3., 0., 2., 0.]])
    """
    check_choice("groups", groups, GROUPS)
    rate = _rate(survival_rate)
    return _masked(weight, check_number("share", share, 0.0, 1.0), rate, groups, training, generator)


def _rate(value: object) -> float:
    if isinstance(value, Tensor):
        raise RateError("survival_rate of targeted dropout is one number, got a tensor")
    return float(check_rates("targeted dropout", value, torch.Size()))


def targets(weight: Tensor, share: float, groups: str) -> Tensor:
    """What is targeted, True, of a shape that broadcasts with the weight; of equal magnitudes any."""
    size = weight.detach().flatten(1).abs() if weight.dim() > 1 else weight.detach().abs().unsqueeze(0)
    if groups == "outputs":
        size = torch.linalg.vector_norm(size, dim=1).unsqueeze(0)
    count = int(share * size.shape[1] + 1e-9)  # 0.29 of 100 is 29
    chosen = torch.zeros_like(size, dtype=torch.bool)
    chosen.scatter_(1, size.topk(count, 1, largest=False, sorted=False).indices, True)
    if groups == "outputs":
        return chosen.view(-1, *(1,) * (weight.dim() - 1))
    return chosen.view(weight.shape)


def _masked(
    weight: Tensor,
    share: float,
    survival_rate: float,
    groups: str,
    training: bool,
    generator: torch.Generator | None,
) -> Tensor:
    chosen = targets(weight, share, groups)
    if training:
        like = weight.new_empty(0, dtype=torch.promote_types(weight.dtype, torch.float32))
        chosen = chosen & (draw(torch.rand, chosen.shape, like, generator) >= survival_rate)
    return weight.masked_fill(chosen, 0)


def ramp(step: int, steps: int) -> tuple[float, float]:
    """Factors of the share and of the drop rate after `step` of `steps` steps of the ramp.

    The drop rate rises linearly; the share to 0.95 over the first half, to 1 over the second.

    References:
        The code of Gomez and others (2019), with 40,000 steps.

    Examples:
        >>> ramp(10, 40), ramp(30, 40), ramp(99, 40)
        ((0.475, 0.25), (0.975, 0.75), (1.0, 1.0))
    """
    done = min(step / steps, 1.0)
    return 0.95 * min(2 * done, 1.0) + 0.05 * max(2 * done - 1, 0.0), done


class _Targeted(Attached):
    words: ClassVar[str] = "TargetedDropout"

    def __init__(
        self,
        module: nn.Module,
        names: tuple[str, ...],
        share: float,
        survival_rate: float,
        groups: str,
        steps: int,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__(module, names, generator)
        self.share, self.survival_rate, self.groups = share, survival_rate, groups
        self.steps, self.time = steps, 0
        self.put()

    def now(self) -> tuple[float, float]:
        """Share and survival rate in force."""
        share, drop = ramp(self.time, self.steps) if self.steps else (1.0, 1.0)
        return self.share * share, 1 - (1 - self.survival_rate) * drop

    def seen(self, name: str, weight: Tensor) -> Tensor:
        share, rate = self.now()
        if not share or (self.module.training and rate == 1):
            return weight
        return _masked(weight, share, rate, self.groups, self.module.training, self.generator)

    def rates(self, name: str) -> Tensor:
        share, rate = self.now()
        weight = self.weight(name).detach()
        return torch.where(targets(weight, share, self.groups), rate, 1.0).to(weight.dtype)


class TargetedDropout(Handle):
    """What `targeted_dropout_` has put on a model; made by it."""

    kind: ClassVar[type[Attached]] = _Targeted

    @property
    def share(self) -> float:
        """What share is targeted now; set it to that at the end of the ramp."""
        return self._layers()[0].now()[0]

    @share.setter
    def share(self, value: float) -> None:
        wanted = check_number("share", value, 0.0, 1.0)
        for noise in self._layers():
            noise.share = wanted

    @property
    def survival_rate(self) -> float:
        """Of what is targeted now; set it to that at the end of the ramp."""
        return self._layers()[0].now()[1]

    @survival_rate.setter
    def survival_rate(self, value: float) -> None:
        wanted = _rate(value)
        for noise in self._layers():
            noise.survival_rate = wanted

    @property
    def time(self) -> int:
        """Steps of the ramp so far."""
        return self._layers()[0].time

    def step(self, n: int | None = None) -> None:
        """Go on with the ramp, after the optimiser's step: to step `n`, or by one."""
        time = self.time + 1 if n is None else check_count("n", n)
        for noise in self._layers():
            noise.time = time


def targeted_dropout_(
    module: nn.Module,
    share: float,
    *,
    survival_rate: float | None = None,
    groups: str = "weights",
    ramp_steps: int = 0,
    names: str | Iterable[str] | None = None,
    generator: torch.Generator | None = None,
    **unknown: Any,
) -> TargetedDropout:
    """Put `targeted_dropout` on weights of a layer or a model.

    The parameters themselves, state_dict keys and optimisers stay as they are; copies and pickles have noise
    of their own. At evaluation what is targeted is 0, and stays so in the plain model after `harden`.

    Args:
        module: A layer or a whole model.
        share: Of each row's weights, or of the rows, in [0, 1].
        survival_rate: In [0, 1], of what is targeted.
        groups: "weights"; "outputs": whole neurons or filters, by the norm of their weights (biases stay).
        ramp_steps: With `TargetedDropout.step` after each of the optimiser's, share and drop rate rise from 0
            over so many steps; 0: at once.
        names: Of parameters, as in `named_parameters`; None: the weights of all linear layers and
            convolutions.
        generator: Of the draws; None: torch's default one. Under activation checkpointing take None.
        unknown: Refused, with the conversion for p= and the like.

    Raises:
        RateError: A survival rate outside [0, 1], or none.
        ArgumentError: No module, an unknown keyword.
        UsageError: A share outside [0, 1]; other groups; names that are no parameters or have noise already;
            NaN weights.

    References:
        Gomez and others: Learning sparse networks using targeted dropout (2019), and its code for the ramp.

    Examples:
        >>> layer = nn.Linear(4, 2)
        >>> drop = targeted_dropout_(layer, 0.5, survival_rate=0.5, ramp_steps=100)
        >>> drop.step(50)
        >>> drop.share, drop.survival_rate
        (0.475, 0.75)
        >>> drop.remove()
    """
    keywords = ("share", "survival_rate", "groups", "ramp_steps", "names", "generator")
    refuse_unknown("targeted_dropout_", unknown, keywords)
    check_choice("groups", groups, GROUPS)
    wanted, rate = check_number("share", share, 0.0, 1.0), _rate(survival_rate)
    steps = check_count("ramp_steps", ramp_steps)
    sites = placed("targeted_dropout_", module, names)
    for site, own in sites:
        for name in own:
            group_shape(site, name, site.get_parameter(name), "outputs")
    return TargetedDropout.holding(
        module, [_Targeted(site, own, wanted, rate, groups, steps, generator) for site, own in sites]
    )

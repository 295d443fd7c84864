"""How a strategy acts on weights while they are trained: as a penalty, after the step, or as learned weights.

With strength lam, groups of m entries and root mean square n (single weights: m = 1, n = |w|) all of these
minimise the loss plus ``lam sum_g m Omega(n_g)``, Omega the strategy's penalty, or come near to it:

- gradient: the penalty is added to the loss.
- tikhonov: ``lam / 2 sum w^2 / eta``, eta of the last update; the same gradient, one update late.
- prox: after the optimiser's step of size rho, ``n <- argmin (x - n)^2 / 2 + rho lam Omega(x)``.
- adaprox: after the step ``w <- w eta / (eta + rho lam)``, eta at w: one multiplication by survival rates.
- calibrated: ``sum_g m Omega(sqrt(samples h_g) n_g) / samples``, h the curvature of the loss along the
  weights: what variational dropout minimises once its noise is optimised, without a strength to choose.
- eta: ``lam / 2 sum_g m (n^2 / eta + f(eta))`` over weights and ``log(eta / lam)`` together.
- those of `fallow.sparsity.noisy`: noise on the weights in the forward.

The factor 1/2 is that of the eta-trick throughout.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fallow.errors import UsageError
from fallow.kernels import logsum_adaprox_
from fallow.penalties import LogSum
from fallow.sparsity.base import Method
from fallow.sparsity.curvature import Curvature
from fallow.sparsity.noisy import NOISY
from fallow.sparsity.totals import eta_total_of, total_of
from fallow.sparsity.weights import Weight

# Survival rates below this are not divided by: lam / eta stays below a thousand.
_SMALLEST_RATE = 1e-3


class Gradient(Method):
    """The penalty through autograd."""

    def penalty(self, strength: float) -> Tensor | float:
        """``strength sum_g m Omega(n_g)``."""
        single = [weight.parameter for weight in self.weights if weight.axis is None]
        if len(single) == len(self.weights):
            found = total_of(self.strategy, strength, single)
            if found is not None:
                return found
        total: Tensor | float = 0.0
        for weight in self.weights:
            value = self.strategy.value(_differentiable(weight)).sum()
            total = total + (value if weight.axis is None else value * weight.members)
        return total * strength


class Tikhonov(Method):
    """A ridge whose weights are those of the last update, so that no derivative goes through them."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.inverse: list[Tensor | None] = [None] * len(self.weights)

    def penalty(self, strength: float) -> Tensor | float:
        """``sum w^2 (1 - a) / (2 a)``, a the survival rates of the last update; 0 before the first."""
        total: Tensor | float = 0.0
        for weight, inverse in zip(self.weights, self.inverse, strict=True):
            if inverse is not None:
                total = total + (weight.parameter.square() * weight.spread(inverse)).sum()
        return total * 0.5

    def update(self, strength: float) -> None:
        """Take the survival rates of the weights as they are now."""
        most = (1 - _SMALLEST_RATE) / _SMALLEST_RATE
        for i, weight in enumerate(self.weights):
            self.inverse[i] = (strength / self.eta(weight, strength)).clamp_(max=most)

    def state(self) -> dict[str, Any]:
        """The inverse odds by weight."""
        found = zip(self.weights, self.inverse, strict=True)
        return {weight.name: inverse for weight, inverse in found if inverse is not None}

    def load(self, state: dict[str, Any]) -> None:
        """Bring them back."""
        self.inverse = [state.get(weight.name) for weight in self.weights]


class Prox(Method):
    """The proximal operator of the penalty with the optimiser's step size."""

    needs_optimiser = True

    def update(self, strength: float) -> None:
        """Shrink each group to its proximal point."""
        for weight, step in zip(self.weights, self._steps(), strict=True):
            if weight.axis is None:
                w = weight.parameter.detach()
                w.copy_(self.strategy.prox(w, step * strength))
                continue
            magnitude = weight.magnitude()
            shrunk = self.strategy.prox(magnitude, step * strength)
            factor = torch.where(magnitude > 0, shrunk / magnitude, 0.0)
            weight.parameter.detach().mul_(weight.spread(factor))

    def _steps(self) -> Iterator[Any]:
        for weight, group in zip(self.weights, self._settings(), strict=True):
            yield step_size(self._optimiser(), group, weight)

    def _settings(self) -> Iterator[dict[str, Any]]:
        """Of each weight the optimiser's group."""
        settings = {id(p): group for group in self._optimiser().param_groups for p in group["params"]}
        for weight in self.weights:
            if id(weight.parameter) not in settings:
                raise UsageError(f"the optimiser does not move {weight.name}: give it all of the parameters")
            yield settings[id(weight.parameter)]

    def _optimiser(self) -> torch.optim.Optimizer:
        assert self.optimiser is not None
        return self.optimiser


class AdaProx(Prox):
    """One multiplication by survival rates: the proximal point of the ridge that the weights have now.

    Its fixed points are those of the penalty but for a bias of the order of the step, which goes with it.
    """

    def update(self, strength: float) -> None:
        """Divide each group by ``1 + step strength / eta``, which is infinite where eta is 0."""
        for weight, group in zip(self.weights, self._settings(), strict=True):
            if strength == 0 or float(group["lr"]) == 0:
                continue  # 0 / 0 where eta is 0
            w, step = weight.parameter.detach(), moments(self._optimiser(), group, weight)
            if weight.axis is None and type(self.strategy) is LogSum:
                if logsum_adaprox_(w, self.strategy.eps, step.rate * strength, *step[1:]):
                    continue
            eta = self.strategy.eta(w if weight.axis is None else weight.magnitude())
            size = torch.as_tensor(_step(step, weight), dtype=eta.dtype, device=eta.device)
            inverse = torch.add(eta.new_ones(()), size / eta, alpha=strength)
            w.div_(weight.spread(inverse))


class Eta(Method):
    """Weights and inverse Tikhonov weights minimised together, the latter as ``log(eta / strength)``."""

    START = 5.0  # survival rate .993

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.logits = nn.ParameterList(
            nn.Parameter(torch.full_like(weight.magnitude(), self.START)) for weight in self.weights
        )

    def penalty(self, strength: float) -> Tensor | float:
        """``strength / 2 sum_g m (n^2 / eta + f(eta))``; 0 at strength 0, where eta is 0."""
        if strength == 0:  # the least over the logits; differentiable, as it is otherwise
            return sum((logit.flatten()[:0].sum() for logit in self.logits), 0.0)
        if all(weight.axis is None for weight in self.weights):
            found = zip(self.weights, self.logits, strict=True)
            pairs = [(weight.parameter, logit) for weight, logit in found]
            if (short := eta_total_of(self.strategy, strength, pairs)) is not None:
                return short
        total: Tensor | float = 0.0
        for weight, logit in zip(self.weights, self.logits, strict=True):
            eta = strength * logit.exp()
            square = (weight.parameter.square() / weight.spread(eta)).sum()
            total = total + square + self.strategy.dual(eta).sum() * weight.members
        return total * (0.5 * strength)

    def eta(self, weight: Weight, strength: float) -> Tensor:
        """As they have been learned."""
        logit = self.logits[list(self.weights).index(weight)]
        return strength * logit.detach().exp()

    def parameters(self) -> Iterator[nn.Parameter]:
        """The logits of the survival rates, one for each group."""
        return iter(self.logits)

    def state(self) -> dict[str, Any]:
        """The logits by weight."""
        found = zip(self.weights, self.logits, strict=True)
        return {weight.name: logit.detach() for weight, logit in found}

    def load(self, state: dict[str, Any]) -> None:
        """Bring them back into the same parameters."""
        with torch.no_grad():
            for weight, logit in zip(self.weights, self.logits, strict=True):
                logit.copy_(state[weight.name])


class Calibrated(Method):
    """The penalty in units of what the data say of each weight; `Curvature` has to watch the model.

    Until the curvature was seen once nothing is penalised.

    References:
        Derived: with variational dropout's penalty this is its evidence lower bound, for a loss with this
        curvature, after the noise of each weight is optimised.
    """

    def __init__(self, *args: Any, curvature: Curvature, samples: int) -> None:
        super().__init__(*args)
        self.curvature, self.samples = curvature, samples

    def _scale(self, weight: Weight) -> Tensor | None:
        """``sqrt(samples h)``, of a group the root mean square."""
        h = self.curvature.values.get(weight.name)
        if h is None:
            return None
        return math.sqrt(self.samples) * weight.magnitude(h.sqrt())

    def penalty(self, strength: float) -> Tensor | float:
        """``strength / samples sum_g m Omega(sqrt(samples h) n)``; 1 is variational dropout's strength."""
        total: Tensor | float = 0.0
        for weight in self.weights:
            scale = self._scale(weight)
            if scale is not None:
                value = self.strategy.value(_differentiable(weight) * scale).sum()
                total = total + (value if weight.axis is None else value * weight.members)
        return total * (strength / self.samples)

    def eta(self, weight: Weight, strength: float) -> Tensor:
        """In units of the data; infinite, so that nothing is cut, before the curvature is known."""
        scale = self._scale(weight)
        if scale is None:
            return torch.full_like(weight.magnitude(), math.inf)
        return strength * self.strategy.eta(weight.magnitude() * scale)

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Nothing watches the model."""
        self.curvature.remove()
        try:
            yield
        finally:
            self.curvature.attach()

    def remove(self) -> None:
        """Nothing watches the model any more."""
        self.curvature.remove()

    def state(self) -> dict[str, Any]:
        """The curvature."""
        return self.curvature.state()

    def load(self, state: dict[str, Any]) -> None:
        """Bring it back."""
        self.curvature.load(state)


METHODS: dict[str, type[Method]] = {
    "calibrated": Calibrated,
    "gradient": Gradient,
    "tikhonov": Tikhonov,
    "prox": Prox,
    "adaprox": AdaProx,
    "eta": Eta,
    **NOISY,
}


class Moments(NamedTuple):
    """An optimiser's step for a unit of gradient: ``rate / (sqrt(second) correction + offset)``, or rate."""

    rate: float
    second: Tensor | None = None
    correction: float = 1.0
    offset: float = 0.0


def moments(optimiser: torch.optim.Optimizer, group: dict[str, Any], weight: Weight) -> Moments:
    """The step as the optimiser's state has it."""
    rate = float(group["lr"])
    state = optimiser.state.get(weight.parameter, {})
    second = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
    if second is None or rate == 0:
        return Moments(rate)
    correction = (1 - group["betas"][1] ** float(state["step"])) ** -0.5
    return Moments(rate, second, correction, group["eps"])


def step_size(optimiser: torch.optim.Optimizer, group: dict[str, Any], weight: Weight) -> Any:
    """The optimiser's step for a unit of gradient: its rate, over the root second moment where it has one.

    For a group of entries the harmonic mean over them: a common factor then moves it as far as it moves the
    entries in the optimiser's measure, and one that never had a gradient, whose step is 1e8 rates, does not
    speak for all. Read it before a scheduler moves the rate.
    """
    return _step(moments(optimiser, group, weight), weight)


def _step(found: Moments, weight: Weight) -> Any:
    rate, second, correction, offset = found
    if second is None:
        return rate
    root = second.sqrt()
    torch.add(second.new_tensor(offset), root, alpha=correction, out=root)
    if weight.axis is not None:
        axes = [i for i in range(root.dim()) if i != weight.axis]
        root = root.mean(axes).unflatten(0, (-1, weight.size)).mean(1)
    return torch.div(second.new_tensor(rate), root, out=root)


def _differentiable(weight: Weight) -> Tensor:
    """The magnitudes with their gradient; the sign of a single weight is for the penalty to see."""
    return weight.parameter if weight.axis is None else weight.magnitude(weight.parameter)

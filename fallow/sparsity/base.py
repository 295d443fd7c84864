"""What a run asks of its method and of its strategy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fallow.errors import UsageError
from fallow.sparsity.weights import Weight


class Strategy(Protocol):
    """What a penalty of `fallow.penalties` offers."""

    def value(self, w: Tensor) -> Tensor:
        """Omega, entry by entry."""
        ...

    def prox(self, w: Tensor, step: Any) -> Tensor:
        """``argmin (x - w)^2 / 2 + step Omega(x)``."""
        ...

    def eta(self, w: Tensor) -> Tensor:
        """``w / Omega'(w)``."""
        ...

    def dual(self, eta: Tensor) -> Tensor:
        """f, ``Omega(w) = min_eta (w^2 / eta + f(eta)) / 2``."""
        ...


class Method:
    """What a run asks of its method; this one does nothing to the weights.

    Attributes:
        weights: what is made sparse.
        strategy: the penalty and its survival rates.
        optimiser: that of the training loop, where the method needs its steps.
        ramps: whether it follows a target's ramp by itself, so that masks are taken at the end of it alone.
    """

    needs_optimiser = False
    ramps = False

    def __init__(
        self, weights: Sequence[Weight], strategy: Strategy, optimiser: torch.optim.Optimizer | None
    ) -> None:
        self.weights, self.strategy, self.optimiser = weights, strategy, optimiser
        if self.needs_optimiser and optimiser is None:
            raise UsageError(
                f"method {type(self).__name__.lower()!r} follows the optimiser's steps: pass optimiser="
            )

    # --- in training ----------------------------------------------------------------------------------------

    def penalty(self, strength: float) -> Tensor | float:
        """What is added to the loss."""
        return 0.0

    def update(self, strength: float) -> None:
        """What happens after the optimiser's step."""

    def masked(self, masks: Sequence[Tensor]) -> None:
        """What happens after weights were masked, in every step from the first mask on."""

    def settle(self) -> None:
        """What happens when the target is reached, so that the rest trains on without a penalty."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """What the optimiser has to move besides the model's own."""
        return iter(())

    # --- what decides ---------------------------------------------------------------------------------------

    def eta(self, weight: Weight, strength: float) -> Tensor:
        """Inverse Tikhonov weights of the groups; they keep with the probability eta / (eta + strength)."""
        return self.strategy.eta(weight.magnitude())

    def rate(self, weight: Weight, strength: float) -> Tensor:
        """Survival rates of the groups."""
        eta = self.eta(weight, strength)
        return torch.where(eta.isinf(), 1.0, eta / (eta + strength)) if strength else torch.ones_like(eta)

    def score(self, weight: Weight) -> Tensor:
        """What a target ranks groups by: the smallest go first.

        The magnitude; of groups over the mean of those in their layer that are not zero, as layers that take
        many inputs have smaller weights and would go first as a whole.
        """
        magnitude = weight.magnitude()
        if weight.axis is None:
            return magnitude
        alive = magnitude > 0
        return magnitude * (alive.sum() / magnitude.sum()) if bool(alive.any()) else magnitude

    # --- the plain model ------------------------------------------------------------------------------------

    def final(self, weight: Weight) -> Tensor:
        """What the plain model has in place of the weight, before anything is cut; detached."""
        return weight.parameter.detach()

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Inside, a copy of the model has nothing of the method about it, or what `strip` takes off."""
        yield

    def strip(self, model: nn.Module) -> None:
        """Make a copy of the model plain, with the weights of `final`."""

    def remove(self) -> None:
        """Take what the method has put on the model off it."""

    # --- checkpoints ----------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What the method remembers, as `torch.load` reads it with ``weights_only=True``."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Bring the memory back."""

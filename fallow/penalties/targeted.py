"""The penalties of targeted dropout: the smallest weights kept with one probability, the others always.

With rho = (1 - p) / p for the survival rate p, at strength 1: a ridge on the smallest, nothing on the rest.
As p falls to 0 they become hard thresholding.

References:
    Gomez and others: Learning sparse networks using targeted dropout (2019), for the strategy. The penalties:
    project's notes, section 2, derived there; prox and the dual of `Targeted` derived.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fallow.errors import UsageError, check_count, check_rate
from fallow.penalties._checks import check_floats, check_positive
from fallow.penalties._numerics import check_step_of_vectors, check_weights
from fallow.penalties.separable import AtZero, Separable


@dataclass(frozen=True, init=False, repr=False)
class TargetedThreshold(Separable):
    """``rho / 2 min(w^2, threshold^2)``, the capped ridge: weights below the threshold are the targeted ones.

    Attributes:
        threshold: Above 0.
        rate: The survival rate of a targeted weight, in (0, 1]; `survival_rate` where it is made.

    Examples:
        >>> penalty = TargetedThreshold(1.0, survival_rate=0.5)
        >>> penalty.prox(torch.tensor([0.5, 1.4, 1.5]), 1.0)
        tensor([0.2500, 0.7000, 1.5000])
    """

    threshold: float
    rate: float
    at_zero: ClassVar[AtZero] = "ridge"

    def __init__(self, threshold: float, *, survival_rate: float) -> None:
        object.__setattr__(self, "threshold", check_positive("threshold", threshold))
        object.__setattr__(self, "rate", check_rate(survival_rate))

    def __repr__(self) -> str:
        return f"TargetedThreshold({self.threshold}, survival_rate={self.rate})"

    @property
    def rho(self) -> float:
        """``(1 - p) / p``, the ridge on a targeted weight."""
        return (1 - self.rate) / self.rate

    def _value(self, magnitude: Tensor) -> Tensor:
        return magnitude.clamp(max=self.threshold).square() * (self.rho / 2)

    def _slope(self, magnitude: Tensor) -> Tensor:
        return torch.where(magnitude < self.threshold, self.rho * magnitude, 0.0)

    def _eta(self, magnitude: Tensor) -> Tensor:
        ridge = torch.full_like(magnitude, 1 / self.rho if self.rho else torch.inf)
        return ridge.masked_fill_(magnitude >= self.threshold, torch.inf)

    def _prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        # Shrunk and kept cost the same at |w| = threshold sqrt(1 + step rho).
        shrink = 1 + self.rho * torch.as_tensor(step, dtype=w.dtype, device=w.device)
        return torch.where(w.abs() > self.threshold * shrink.sqrt(), w, w / shrink)

    def _dual(self, eta: Tensor) -> Tensor:
        return self.threshold**2 * (self.rho - eta.reciprocal()).clamp(min=0)


@dataclass(frozen=True, init=False, repr=False)
class Targeted:
    """``rho / 2`` times the sum of the k smallest squares of each vector, the trimmed ridge; no sum of parts.

    Vectors lie along the last dimension; of equal entries at the border exactly as many as fit are targeted.

    Attributes:
        k: How many are targeted, from 0 to the number of entries.
        rate: The survival rate of a targeted weight, in (0, 1]; `survival_rate` where it is made.
        at_zero: What the penalty is like at 0.

    Examples:
        >>> penalty = Targeted(2, survival_rate=0.5)
        >>> w = torch.tensor([3.0, -1.0, 2.0])
        >>> penalty.value(w), penalty.prox(w, 1.0)
        (tensor(2.5000), tensor([ 3.0000, -0.5000,  1.0000]))
    """

    k: int
    rate: float
    at_zero: ClassVar[AtZero] = "ridge"

    def __init__(self, k: int, *, survival_rate: float) -> None:
        object.__setattr__(self, "k", check_count("k", k))
        object.__setattr__(self, "rate", check_rate(survival_rate))

    def __repr__(self) -> str:
        return f"Targeted({self.k}, survival_rate={self.rate})"

    @property
    def rho(self) -> float:
        """``(1 - p) / p``, the ridge on a targeted weight."""
        return (1 - self.rate) / self.rate

    def value(self, w: Tensor) -> Tensor:
        """The penalty of each vector, of shape w.shape[:-1]; its gradient is exact."""
        chosen = smallest(check_floats("w", w).detach(), self.k)
        return torch.where(chosen, w, 0.0).square().sum(-1) * (self.rho / 2)

    def total(self, w: Tensor) -> Tensor:
        """The sum of the values, a scalar."""
        return self.value(w).sum()

    @torch.no_grad()
    def gradient(self, w: Tensor) -> Tensor:
        """The gradient of `value`, without autograd."""
        return torch.where(smallest(check_floats("w", w), self.k), self.rho * w, 0.0)

    @torch.no_grad()
    def eta(self, w: Tensor) -> Tensor:
        """``1 / rho`` for the targeted, infinite for the others."""
        weights = check_weights(w)
        ridge = torch.full_like(weights, 1 / self.rho if self.rho else torch.inf)
        return ridge.masked_fill_(~smallest(weights, self.k), torch.inf)

    @torch.no_grad()
    def survival_rate(self, w: Tensor, strength: float = 1.0) -> Tensor:
        """``eta / (eta + strength)``: at strength 1 the rate of the targeted, and 1 for the others."""
        return 1 / (1 + check_positive("strength", strength) / self.eta(w))

    @torch.no_grad()
    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        """The targeted divided by ``1 + step rho``; `step` a number or one for each vector."""
        weights = check_weights(w)
        shrink = 1 + self.rho * check_step_of_vectors(step, weights)
        return torch.where(smallest(weights, self.k), weights / shrink, weights)

    @torch.no_grad()
    def dual(self, eta: Tensor) -> Tensor:
        """0 for each vector with ``sum_j min(1, 1 / (rho eta_j)) >= k``, infinite for all others."""
        asked = check_floats("eta", eta)
        if self.k > asked.shape[-1]:
            raise _too_many(self.k, asked.shape[-1])
        covered = (self.rho * asked).reciprocal().clamp(max=1).sum(-1)
        slack = 8 * torch.finfo(asked.dtype).eps * max(self.k, 1)
        return torch.where(covered >= self.k - slack, 0.0, torch.inf).to(asked.dtype)


def smallest(w: Tensor, k: int) -> Tensor:
    """Mask of the k smallest magnitudes of each vector along the last dimension, exactly k of them."""
    size = w.shape[-1]
    if k > size:
        raise _too_many(k, size)
    chosen = torch.zeros_like(w, dtype=torch.bool)
    return chosen.scatter_(-1, w.abs().topk(k, -1, largest=False, sorted=False).indices, True)


def _too_many(k: int, size: int) -> UsageError:
    return UsageError(f"k must be at most the number of entries, {size}, got {k}: flatten w or lower k")

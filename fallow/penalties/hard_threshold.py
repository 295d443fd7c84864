"""Hard thresholding: at most k entries of a vector may differ from 0; magnitude pruning as a penalty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fallow.errors import check_count
from fallow.penalties._checks import check_floats, check_positive
from fallow.penalties._numerics import check_step_of_vectors, check_weights
from fallow.penalties.separable import AtZero
from fallow.penalties.targeted import smallest


@dataclass(frozen=True)
class HardThreshold:
    """0 for vectors along the last dimension with at most k entries that are not 0, infinite for all others.

    Its prox keeps the k largest of each vector: magnitude pruning, and with gradient steps between iterative
    hard thresholding. For one count over a whole matrix, flatten it.

    Attributes:
        k: How many may differ from 0, from 0 to the number of entries.
        at_zero: Infinite beside what is kept: it needs projection (`prox`), no gradient sees it.

    Examples:
        >>> HardThreshold(1).prox(torch.tensor([3.0, -4.0, 1.0]), 1.0)
        tensor([ 0., -4.,  0.])
    """

    k: int
    at_zero: ClassVar[AtZero] = "barrier"

    def __post_init__(self) -> None:
        check_count("k", self.k)

    def value(self, w: Tensor) -> Tensor:
        """0 or infinity for each vector, of shape w.shape[:-1]; without gradient."""
        count = (check_floats("w", w).detach() != 0).sum(-1)
        return torch.where(count <= self.k, 0.0, torch.inf).to(w.dtype)

    def total(self, w: Tensor) -> Tensor:
        """The sum of the values, a scalar."""
        return self.value(w).sum()

    @torch.no_grad()
    def gradient(self, w: Tensor) -> Tensor:
        """0 on the k largest, infinite with the weight's sign on what else is not 0."""
        free = self._kept(w) | (w == 0)
        return torch.where(free, 0.0, torch.inf * w)

    @torch.no_grad()
    def eta(self, w: Tensor) -> Tensor:
        """Infinite on the k largest, 0 for the others."""
        return torch.where(self._kept(check_weights(w)), torch.inf, 0.0).to(w.dtype)

    @torch.no_grad()
    def survival_rate(self, w: Tensor, strength: float = 1.0) -> Tensor:
        """1 on the k largest, 0 for the others, at any strength."""
        check_positive("strength", strength)
        return self._kept(check_weights(w)).to(w.dtype)

    @torch.no_grad()
    def prox(self, w: Tensor, step: float | Tensor = 1.0) -> Tensor:
        """The k largest of each vector; the same for every step, of which 0 alone leaves `w` as it is."""
        weights = check_weights(w)
        moves = check_step_of_vectors(step, weights) > 0
        return torch.where(self._kept(weights) | ~moves, weights, 0.0)

    @torch.no_grad()
    def dual(self, eta: Tensor) -> Tensor:
        """0 for vectors with at most k entries that are not 0, infinite for all others."""
        return self.value(check_floats("eta", eta))

    def _kept(self, w: Tensor) -> Tensor:
        size = check_floats("w", w).shape[-1]
        return ~smallest(w, max(size - self.k, 0))

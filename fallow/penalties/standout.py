"""The penalty of standout, dropout whose keep probability is a logistic function of the weight.

References:
    Ba, Frey: Adaptive dropout for training deep neural networks (2013), for standout; its reduction to
    one weight and the penalty: project's notes, sections 2 and 2.3, derived there.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fallow.errors import UsageError
from fallow.penalties._checks import check_positive
from fallow.penalties.concave import gamma_two
from fallow.penalties.separable import AtZero, Separable


@dataclass(frozen=True)
class Standout(Separable):
    """``exp(-beta) / kappa^2 (1 - (1 + kappa |w|) exp(-kappa |w|))``, of sigmoid(kappa |w| + beta) kept.

    At strength 1: there eta = exp(kappa |w| + beta). A ridge of strength exp(-beta) near 0, constant far
    away.

    Attributes:
        kappa: How fast the rate grows with the weight, above 0.
        beta: Its logit at 0.

    Examples:
        >>> Standout().survival_rate(torch.tensor([0.0, -1.0]), 1.0)
        tensor([0.5000, 0.7311])
    """

    kappa: float = 1.0
    beta: float = 0.0
    at_zero: ClassVar[AtZero] = "ridge"

    def __post_init__(self) -> None:
        check_positive("kappa", self.kappa)
        finite = isinstance(self.beta, numbers.Real) and math.isfinite(self.beta)
        if not finite or isinstance(self.beta, bool):
            raise UsageError(f"beta must be a finite number, got {self.beta!r}")

    @property
    def _level(self) -> float:
        return math.exp(-self.beta) / self.kappa**2

    def _value(self, magnitude: Tensor) -> Tensor:
        return self._level * gamma_two(self.kappa * magnitude)

    def _slope(self, magnitude: Tensor) -> Tensor:
        return magnitude * (-self.kappa * magnitude - self.beta).exp()

    def _gradient(self, w: Tensor) -> Tensor:
        rate = (-self.kappa * w.abs() - self.beta).exp()
        return torch.where(rate == 0, 0.0, w) * rate  # not infinity times 0

    def _eta(self, magnitude: Tensor) -> Tensor:
        return (self.kappa * magnitude).add_(self.beta).exp_()

    def _dual(self, eta: Tensor) -> Tensor:
        # at the weight z / kappa that has this eta; none has less than exp(beta)
        z = (eta.log() - self.beta).clamp(min=0)
        spent = torch.where(z == torch.inf, 0.0, z * z * (-z).exp())
        return self._level * (2 * gamma_two(z) - spent)

"""LogSum and Log2Sum: sums of logarithms, the penalties nearest to counting that stay continuous."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fallow import kernels
from fallow.penalties._checks import check_positive
from fallow.penalties._numerics import chunked, root_above
from fallow.penalties.separable import AtZero, Separable


def logsum_prox(w: Tensor, step: float | Tensor, eps: float) -> Tensor:
    """``argmin_x (x - w)^2 / 2 + step log(|x| + eps)``, elementwise.

    ``|x| = |w| - step / u`` with ``u = (|w| + eps + sqrt((|w| + eps)^2 - 4 step)) / 2``, the larger root of
    ``u^2 - (|w| + eps) u + step``, where that is above the threshold of `logsum_threshold`, else 0.

    Estimator:
        Exact to an ulp of ``|w|``, in float32 too: nothing large is subtracted from anything large.

    References:
        Derived: project's notes, section 5, item 1, in the form without cancellation.
    """
    if isinstance(step, Tensor):
        return _prox_by_steps(w, step, eps)
    threshold = logsum_threshold(step, eps)
    if (found := kernels.logsum_prox(w.detach(), eps, step, threshold)) is not None:
        return found

    def shrunk(part: Tensor) -> Tensor:
        magnitude = part.abs()
        u = magnitude + eps
        # Below the threshold the root may be NaN: the mask puts 0 there.
        root = (u * u).sub_(4 * step).sqrt_()
        move = u.add_(root).reciprocal_().mul_(2 * step).copysign_(part)
        return (part - move).masked_fill_(magnitude <= threshold, 0.0)

    return chunked(shrunk, w.detach())


def _prox_by_steps(w: Tensor, step: Tensor, eps: float) -> Tensor:
    """The prox where each weight has its own step: 0 and the root compared instead of a threshold."""
    magnitude = w.abs()
    u = magnitude + eps
    u = (u + (u * u - 4 * step).clamp(min=0).sqrt()) / 2
    x = magnitude - step / u
    # x^2 / 2 - |w| x = -x^2 / 2 - step x / u, as |w| = x + step / u; while step <= eps^2 there is no jump
    wins = step * (x / eps).log1p() < x * (x / 2 + step / u)
    return torch.where((x > 0) & (wins | (step <= eps * eps)), x, 0.0).copysign(w)


def logsum_threshold(step: float, eps: float) -> float:
    """Up to which ``|w|`` the prox of LogSum is 0: ``step / eps`` while ``step <= eps^2``; then it jumps.

    Beyond, x after the jump is where the objective is that of 0: with ``|w| = x + step / (x + eps)``,
    ``step log(1 + x / eps) = x^2 / 2 + step x / (x + eps)``.

    Examples:
        >>> round(logsum_threshold(0.05, 0.1), 4), logsum_threshold(0.25, 1.0)
        (0.3743, 0.25)
    """
    if step <= eps * eps:
        return step / eps

    def zero_is_better(x: float) -> bool:
        return step * math.log1p(x / eps) > x * (x / 2 + step / (x + eps))

    fold = math.sqrt(step) - eps  # where u^2 = step: the two roots of u meet
    x = root_above(zero_is_better, fold) if fold > 0 else 0.0
    return x + step / (x + eps)


@dataclass(frozen=True)
class LogSum(Separable):
    """``log(1 + |w| / eps)``: eta = |w| (|w| + eps), a slope of 1 / eps at 0 that falls like 1 / |w|.

    The constant -log eps makes it 0 at 0; gradient, prox and eta do not see it.

    Attributes:
        eps: The offset, above 0; 2 is that of LeJeune and others' experiments.

    Examples:
        >>> LogSum(eps=1.0).prox(torch.tensor([-3.0, 0.1]), 0.2)
        tensor([-2.9494,  0.0000])
    """

    eps: float = 2.0
    at_zero: ClassVar[AtZero] = "slope"

    def __post_init__(self) -> None:
        check_positive("eps", self.eps)

    def _value(self, magnitude: Tensor) -> Tensor:
        return (magnitude / self.eps).log1p_()

    def _slope(self, magnitude: Tensor) -> Tensor:
        return (magnitude + self.eps).reciprocal()

    def _gradient(self, w: Tensor) -> Tensor:
        return w.sign() / w.abs().add_(self.eps)

    def _eta(self, magnitude: Tensor) -> Tensor:
        return (magnitude + self.eps).mul_(magnitude)

    def _prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        return logsum_prox(w, step, self.eps)

    def _dual(self, eta: Tensor) -> Tensor:
        root = 2 * (self.eps**2 / 4 + eta).sqrt()  # eta times 4 may be infinite
        share = 4 * (eta / (root + self.eps))  # root - eps, without cancellation
        f = 2 * (share / (2 * self.eps)).log1p() - share / (root + self.eps)
        return torch.where(eta == torch.inf, torch.inf, f)


@dataclass(frozen=True)
class Log2Sum(Separable):
    """``log(1 + w^2 / eps)``: eta = (w^2 + eps) / 2, a ridge near 0; Student's t, type-I ARD.

    The constant -log eps makes it 0 at 0.

    Attributes:
        eps: The offset, above 0.

    Examples:
        >>> Log2Sum(eps=1.0).dual(torch.tensor([0.4, 0.8, 2.0, 5.0]))
        tensor([0.0000, 0.1900, 1.2726, 2.8052])
    """

    eps: float = 1.0
    at_zero: ClassVar[AtZero] = "ridge"

    def __post_init__(self) -> None:
        check_positive("eps", self.eps)

    def _value(self, magnitude: Tensor) -> Tensor:
        x = magnitude / math.sqrt(self.eps)
        far = x.clamp(min=1)  # whose square may be infinite
        return torch.where(x > 1, 2 * far.log() + far.pow(-2).log1p(), (x * x).log1p())

    def _slope(self, magnitude: Tensor) -> Tensor:
        near, far = magnitude.clamp(max=1), magnitude.clamp(min=1)
        return torch.where(magnitude > 1, 2 / (far + self.eps / far), 2 * near / (near * near + self.eps))

    def _eta(self, magnitude: Tensor) -> Tensor:
        return (magnitude * magnitude).add_(self.eps).div_(2)

    def _dual(self, eta: Tensor) -> Tensor:
        ratio = (2 * eta / self.eps).clamp(min=1)
        f = 2 * (ratio.log() + ratio.reciprocal() - 1)
        return torch.where(eta.isnan(), eta, f)

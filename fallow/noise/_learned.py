"""Normal noise whose variance is learned beside each weight: alpha, variance, a draw, the divergence."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fallow import kernels
from fallow.special import Table, variational_kl

# Molchanov's k1, k2, k3.
_FIT = (0.63576, 1.87320, 1.48695)
# Beside w^2 where it is divided by, and beside the variance of an activation under its root.
SMALL = 1e-8


def molchanov_kl(log_alpha: Tensor) -> Tensor:
    """The published fit of the divergence of variational dropout, elementwise; 0 for infinite alpha.

    Formula: ``k1 sigmoid(-k2 - k3 log alpha) + log(1 + 1 / alpha) / 2``, k = (0.63576, 1.87320, 1.48695).

    Estimator:
        Biased: off by at most 0.0094 from `fallow.special.variational_kl`, which is exact.

    References:
        Molchanov, Ashukha, Vetrov: Variational dropout sparsifies deep neural networks (2017), equation (14),
        with the other sign and the constant that makes it 0 at infinity.

    Examples:
        >>> molchanov_kl(-torch.tensor([0.01, 1.0, 300.0], dtype=torch.float64).log())
        tensor([0.0051, 0.4312, 3.4885], dtype=torch.float64)
    """
    k1, k2, k3 = _FIT
    return k1 * torch.sigmoid(-k2 - k3 * log_alpha) + nn.functional.softplus(-log_alpha) / 2


def kl(log_alpha: Tensor) -> Tensor:
    """The divergence itself."""
    return variational_kl((-log_alpha).exp())


@functools.cache
def _rest() -> tuple[Tensor, float, float]:
    """The divergence less ``log(1 + 1 / alpha) / 2``; beyond its ends constant in single precision."""
    table = Table(lambda a: kl(a) - torch.logaddexp(-a, torch.zeros_like(a)) / 2, -24.0, 40.0, 512, degree=5)
    return table.coefficients.float(), table.low, table.scale


@dataclass(frozen=True)
class Learned:
    """How noise depends on weights w and on what is learned beside them, `log`.

    Attributes:
        additive: `log` is log sigma^2 = log(alpha (w^2 + 1e-8)), else log alpha.
        clip: log alpha is held in [-clip, clip].
        worth: there are so many weights that the compiled form is worth being built. Not asked of each layer,
            nor anew: a forward and its repetition under activation checkpointing have to do the same.
    """

    additive: bool
    clip: float
    worth: bool = False

    def log_alpha(self, log: Tensor, w: Tensor) -> Tensor:
        """Clipped, of each weight."""
        found = log - (w.square() + SMALL).log() if self.additive else log
        return found.clamp(-self.clip, self.clip)

    def variance(self, log: Tensor, w: Tensor) -> Tensor:
        """``alpha w^2``, alpha clipped."""
        return _Disturbed.apply(self, log, w, None) if self._takes(log, w) else self.plain(log, w, None)  # pyright: ignore[reportReturnType]

    def draw(self, log: Tensor, w: Tensor, e: Tensor) -> Tensor:
        """The weights with their noise, from standard normal numbers."""
        if self._takes(log, w) and kernels.takes(e, worth=True):
            return _Disturbed.apply(self, log, w, e)  # pyright: ignore[reportReturnType]
        return self.plain(log, w, e)

    def divergence(self, exact: bool, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor | None:
        """Summed over pairs of `log` and `w`, or that of `molchanov_kl`; None where there is no short way."""
        if not pairs or not all(self._takes(*pair) for pair in pairs):
            return None
        tensors = [tensor for pair in pairs for tensor in (pair if self.additive else pair[:1])]
        return kernels.sum_of(partial(self._fused, exact), partial(self._plain, exact), tensors)

    def plain(self, log: Tensor, w: Tensor, e: Tensor | None) -> Tensor:
        """A draw, or without `e` the variance, from torch's operations."""
        # of the clipped alpha in both forms, so that it is one distribution in the loss and in the divergence
        found = self.log_alpha(log, w)
        if e is None:
            return found.exp() * (w.square() + SMALL if self.additive else w.square())
        return w + (found / 2).exp() * ((w.square() + SMALL).sqrt() if self.additive else w) * e

    def _takes(self, log: Tensor, w: Tensor) -> bool:
        known = self.worth and log.requires_grad and w.requires_grad and log.shape == w.shape
        return known and kernels.takes(w, worth=True) and kernels.takes(log, worth=True)

    def _pairs(self, tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Of the multiplicative form the weights are not looked at."""
        firsts, seconds = (tensors[::2], tensors[1::2]) if self.additive else (tensors, tensors)
        return zip(firsts, seconds, strict=True)

    def _fused(self, exact: bool, *tensors: Tensor) -> tuple[float, list[Tensor]]:
        total, gradients, rest = 0.0, [], _rest() if exact else None
        for log, w in self._pairs(tensors):
            part, found = kernels.diverged(log, w, self.additive, self.clip, rest)
            total += part
            gradients += found
        return total, gradients

    def _plain(self, exact: bool, *tensors: Tensor) -> Tensor:
        of = kl if exact else molchanov_kl
        return torch.stack([of(self.log_alpha(*pair)).sum() for pair in self._pairs(tensors)]).sum()


class _Disturbed(torch.autograd.Function):
    """A variance or a draw for each weight, forward and backward in one pass each."""

    @staticmethod
    def forward(ctx: Any, law: Learned, log: Tensor, w: Tensor, e: Tensor | None) -> Tensor:
        ctx.law = law
        ctx.save_for_backward(log, w, e)
        return kernels.disturbed(log, w, e, law.additive, law.clip)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (log, w, e), law = ctx.saved_tensors, ctx.law
        short = not torch.is_grad_enabled() and kernels.readable(grad)
        if short and kernels.takes(dense := grad.contiguous(), worth=True):
            found = kernels.disturbed_back(log, w, e, dense, law.additive, law.clip)
        else:
            found = kernels.gradients_of(lambda log, w: law.plain(log, w, e), (log, w), grad)
        return None, *found, None

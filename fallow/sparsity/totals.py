"""LogSum over many weights with its gradient, in few passes: small networks do not hide them."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fallow.kernels import (
    WORTH,
    eta_trick,
    gradients_of,
    has_tangent,
    logsum_total,
    readable,
    sum_of,
    takes,
)
from fallow.penalties import LogSum

_CHUNK, _FACTORS = 2**16, 8
_DTYPES = (torch.float32, torch.float64)


def logsum_and_gradient(w: Tensor, eps: float, factor: float) -> tuple[float, Tensor]:
    """``factor sum log(1 + |w| / eps)`` and its gradient ``factor sign(w) / (|w| + eps)``, 0 at 0.

    Estimator:
        The gradient is exact to rounding. The sum takes logarithms of products of eight terms, each rounded
        once: an error of one rounding of 1 for each weight, so weights far below eps times that count as 0.

    References:
        Derived.
    """
    flat = w.detach()
    if (found := logsum_total(flat, eps, factor)) is not None:
        return found
    flat = flat.reshape(-1)
    gradient = torch.empty_like(flat)
    zeros, room, one = _room(w.dtype)
    total = 0.0
    for part, out in zip(flat.split(_CHUNK), gradient.split(_CHUNK), strict=True):
        terms, zero = room[: len(part)], zeros[: len(part)]
        torch.add(one, torch.abs(part, out=terms), alpha=1 / eps, out=terms)
        torch.addcdiv(zero, torch.sign(part, out=out), terms, value=factor / eps, out=out)
        total += _log_product(terms)
    return factor * total, gradient.view(w.shape)


_rooms = threading.local()


def _room(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros, room and a one that are kept: fresh memory costs as much as what is done in it."""
    found = _rooms.__dict__.setdefault("by_dtype", {})
    if dtype not in found:
        found[dtype] = (
            *(torch.zeros(_CHUNK, dtype=dtype) for _ in range(2)),
            torch.ones((), dtype=dtype),
        )
    return found[dtype]


def _log_product(terms: Tensor) -> float:
    """The sum of logarithms of terms of at least 1; a logarithm costs as much as six other passes."""
    whole = terms.numel() - terms.numel() % _FACTORS
    products = terms[:whole].view(_FACTORS, -1).prod(0)
    total = float(products.log_().sum() + terms[whole:].log().sum())
    return total if math.isfinite(total) else float(terms.log().sum())  # beyond the largest number


class _Total(torch.autograd.Function):
    """The sum over all weights: one node of the graph, whose gradients are there before backward."""

    @staticmethod
    def forward(ctx: Any, strategy: LogSum, factor: float, *weights: Tensor) -> Tensor:
        found = [logsum_and_gradient(w, strategy.eps, factor) for w in weights]
        ctx.strategy, ctx.factor = strategy, factor
        ctx.gradients = [gradient for _, gradient in found]
        ctx.save_for_backward(*weights)
        return weights[0].new_tensor(sum(total for total, _ in found))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights = ctx.saved_tensors
        if torch.is_grad_enabled() or not readable(grad):  # to be differentiated again, or many at once

            def plain(*weights: Tensor) -> Tensor:
                return torch.stack([ctx.strategy.total(w) for w in weights]).sum() * ctx.factor

            return None, None, *gradients_of(plain, weights, grad)
        if ctx.gradients is None:
            ctx.gradients = [logsum_and_gradient(w, ctx.strategy.eps, ctx.factor)[1] for w in weights]
        gradients, ctx.gradients = ctx.gradients, None  # free to be added to
        if float(grad) != 1:
            gradients = [gradient.mul_(grad) for gradient in gradients]
        return None, None, *gradients


def total_of(strategy: object, factor: float, weights: Sequence[Tensor]) -> Tensor | None:
    """``factor`` times the sum of the strategy's values, differentiable; None where there is no short way."""
    known = type(strategy) is LogSum and weights
    if not known or any(not _plain(w) for w in weights) or len({w.dtype for w in weights}) > 1:
        return None
    return _Total.apply(strategy, factor, *weights)  # pyright: ignore[reportReturnType]


def eta_total_of(strategy: object, strength: float, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor | None:
    """``strength / 2 sum (w^2 / eta + f(eta))`` over pairs of weights and logits, ``eta = strength e^logit``.

    Differentiable; None where there is no short way.
    """
    # of all together, and not of what was built before: the first step is done as any other
    if type(strategy) is not LogSum or sum(w.numel() for w, _ in pairs) < WORTH:
        return None
    if not all(t.requires_grad and takes(t, worth=True) for pair in pairs for t in pair):
        return None
    return eta_total(strategy, strength, pairs)


def eta_total(strategy: LogSum, strength: float, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The same for tensors that the kernels take."""

    def fused(*tensors: Tensor) -> tuple[float, list[Tensor]]:
        found = [eta_trick(*pair, strategy.eps, strength) for pair in _pairs(tensors)]
        return sum(total for total, _ in found), [g for _, gradients in found for g in gradients]

    def plain(*tensors: Tensor) -> Tensor:
        parts = [eta_sum(strategy, strength, *pair) for pair in _pairs(tensors)]
        return torch.stack(parts).sum() * (0.5 * strength)

    return sum_of(fused, plain, [tensor for pair in pairs for tensor in pair])


def _pairs(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(tensors[::2], tensors[1::2], strict=True)


def eta_sum(strategy: Any, strength: float, w: Tensor, logit: Tensor) -> Tensor:
    """``sum (w^2 / eta + f(eta))`` of single weights, from torch's operations."""
    eta = strength * logit.exp()
    return (w.square() / eta).sum() + strategy.dual(eta).sum()


def _plain(w: Tensor) -> bool:
    return w.device.type == "cpu" and w.dtype in _DTYPES and w.requires_grad and not has_tangent(w)

"""A sum over many weights as one node of the graph, whose gradients are there before backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Fused = Callable[..., tuple[float, list[Tensor]]]


def sum_of(fused: Fused, plain: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """A number that depends on tensors, differentiable as often as `plain` is.

    Args:
        fused: from the tensors the value, and its gradients in memory of their own. Where the value is not
            finite, `plain` is asked.
        plain: the value from torch's operations.
        tensors: each with its gradient.
    """
    return _Sum.apply(fused, plain, *tensors)  # pyright: ignore[reportReturnType]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fused: Fused, plain: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        ctx.fused, ctx.plain = fused, plain
        total, ctx.gradients = fused(*(t.detach() for t in tensors))
        ctx.finite = math.isfinite(total)
        ctx.save_for_backward(*tensors)
        return tensors[0].new_tensor(total) if ctx.finite else plain(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        if torch.is_grad_enabled() or not ctx.finite or not readable(grad):
            return None, None, *gradients_of(ctx.plain, tensors, grad)
        if ctx.gradients is None:
            _, ctx.gradients = ctx.fused(*(t.detach() for t in tensors))
        gradients, ctx.gradients = ctx.gradients, None  # free to be added to
        if float(grad) != 1:
            gradients = [gradient.mul_(grad) for gradient in gradients]
        return None, None, *gradients


def readable(grad: Tensor) -> bool:
    """Whether it has numbers: under `is_grads_batched` it looks like any other tensor and has none."""
    try:
        return grad.data_ptr() != 0
    except RuntimeError:
        return False


def gradients_of(plain: Callable[..., Tensor], tensors: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """Through autograd, to be differentiated again where that is on."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # of each place by itself: tensors may be the same, or depend on each other
        places = [t.view_as(t) for t in tensors]
        return torch.autograd.grad(plain(*places), places, grad, create_graph=again, materialize_grads=True)

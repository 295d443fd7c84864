"""A linear map in which every row has its own mask of the weight, without all the masks at once.

Masks are drawn for a few rows at a time, from a generator that one number of the caller's seeds; backward
seeds it again and draws the same. So what is kept for backward is the input, the weight and the number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Weights masked at a time: about a cache's worth on a CPU, enough to fill a GPU.
_ON_CPU, _ELSEWHERE = 1 << 18, 1 << 26


def seed_of(generator: torch.Generator | None) -> int:
    """A number that stands for all masks of a call; drawn as torch's own functions draw."""
    place = torch.device("cpu") if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=place))


def masks(
    rows: int, shape: tuple[int, int], rate: float, seed: int, device: torch.device
) -> Iterator[Tensor]:
    """Masks of one row after the other, bool, True = kept: [some rows, *shape] at a time."""
    generator = torch.Generator(device).manual_seed(seed)
    limit = _ON_CPU if device.type == "cpu" else _ELSEWHERE
    step = max(limit // max(shape[0] * shape[1], 1), 1)
    for first in range(0, rows, step):
        mask = torch.empty((min(step, rows - first), *shape), dtype=torch.bool, device=device)
        yield mask.bernoulli_(rate, generator=generator)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, rate: float, generator: torch.Generator | None
) -> Tensor:
    """``(M * W / rate) x + b`` with an own M for each row of x, [..., in] to [..., out]."""
    if torch.is_autocast_enabled(x.device.type):  # as the plain linear map would
        half = torch.get_autocast_dtype(x.device.type)
        x, weight = (t.to(half) if t.dtype != torch.float64 else t for t in (x, weight))
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    out: Any = _RowMasked.apply(rows, weight, rate, seed_of(generator))
    out = out.view(*x.shape[:-1], len(weight))
    return out if bias is None else out + bias.to(out.dtype)


class _RowMasked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rate: float, seed: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rate, ctx.seed = rate, seed
        out, first = x.new_empty(len(x), len(weight)), 0
        with torch.autocast(x.device.type, enabled=False):
            for mask in masks(len(x), (len(weight), x.shape[1]), rate, seed, x.device):
                part = slice(first, first := first + len(mask))
                out[part] = torch.bmm(torch.where(mask, weight, 0), x[part, :, None]).squeeze(2)
        return out.mul_(1 / rate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        to_x, to_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(weight.dtype, torch.float32)  # a sum over all rows
        grad_x = torch.empty_like(x) if to_x else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if to_weight else None
        first = 0
        with torch.autocast(x.device.type, enabled=False):
            for mask in masks(len(x), (len(weight), x.shape[1]), ctx.rate, ctx.seed, x.device):
                part = slice(first, first := first + len(mask))
                if grad_x is not None:
                    grad_x[part] = torch.bmm(grad[part, None], torch.where(mask, weight, 0)).squeeze(1)
                if grad_weight is not None:
                    outer = grad[part, :, None].to(wide) * x[part, None]
                    grad_weight += outer.masked_fill_(~mask, 0).sum(0)
        if grad_x is not None:
            grad_x.mul_(1 / ctx.rate)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(1 / ctx.rate).to(weight.dtype)
        return grad_x, grad_weight, None, None

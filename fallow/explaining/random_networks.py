"""The random residual networks of the theory of growth, and masks for them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fallow.errors import check_choice
from fallow.explaining._growth_common import SAMPLERS


def draw_masks(
    rates: Sequence[float], count: int, generator: torch.Generator, sampler: str = "bernoulli"
) -> Tensor:
    """Masks of shape [count, L], bool; "exact" as `fallow.masks.batch_exact`, floor or ceil(sum p) blocks."""
    check_choice("sampler", sampler, SAMPLERS)
    ps = torch.tensor(tuple(rates), dtype=torch.float64)
    if sampler == "bernoulli":
        return torch.rand(count, len(ps), generator=generator, dtype=torch.float64) < ps
    order = torch.rand(count, len(ps), generator=generator).argsort(1)
    ends = ps[order].cumsum(1) + torch.rand(count, 1, generator=generator, dtype=torch.float64)
    starts = torch.cat([ends[:, :1] - ps[order][:, :1], ends[:, :-1]], 1)
    return torch.zeros(count, len(ps), dtype=torch.bool).scatter(1, order, ends.floor() > starts.floor())


def toy_forward(
    start: Tensor, gates: Tensor, weights: Iterable[Tensor], kind: str = "vanilla"
) -> tuple[list[Tensor], list[Tensor]]:
    """The sums y_0..y_L of a random network, and the inputs of its weights.

    Args:
        start: y_0, [masks, rows, width]; BatchNorm is over the rows of each mask.
        gates: [masks, L], what multiplies each branch.
        weights: L matrices [width, width].
        kind: "vanilla", "scaled" or "batchnorm".
    """
    sums, inputs = [start], []
    s = gates.shape[1] ** -0.5 if kind == "scaled" else 1.0
    for gate, weight in zip((s * gates).unbind(1), weights, strict=True):
        y = sums[-1]
        if kind == "batchnorm":
            centred = y - y.mean(1, keepdim=True)
            y = centred * (centred.square().mean(1, keepdim=True) + 1e-5).rsqrt()
        inputs.append(y.relu())
        sums.append(sums[-1] + gate[:, None, None] * (inputs[-1] @ weight.T))
    return sums, inputs


def toy_weights(
    depth: int, width: int, gain: float, generator: torch.Generator, like: Tensor
) -> list[Tensor]:
    """L matrices of independent normal numbers of variance gain / width."""
    deviation = math.sqrt(gain / width)
    return [(torch.randn(width, width, generator=generator) * deviation).to(like) for _ in range(depth)]

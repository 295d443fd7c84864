"""Small residual networks whose outputs are known for every gate: the oracle of `explain`."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LENGTH = 8
# Unequal, so that no site can be taken for another.
RATES = {f"blocks.{i}": p for i, p in enumerate((0.95, 0.6, 0.85, 0.7, 0.9, 0.8, 0.75, 0.65))}
LOSSES = {"cross_entropy": F.cross_entropy, "quadratic": F.mse_loss}


class Block(nn.Module):
    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.into, self.back, self.scale = nn.Linear(width, width), nn.Linear(width, width), scale

    def branch(self, x: Tensor) -> Tensor:
        return self.scale * self.back(torch.tanh(self.into(x)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Net(nn.Module):
    """Blocks scaled by 1/sqrt(L); (..., 4) to (..., out)."""

    def __init__(self, out: int = 3, length: int = LENGTH, width: int = 16) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, width), nn.Linear(width, out)
        self.blocks = nn.ModuleList(Block(width, length**-0.5) for _ in range(length))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def gated(self, x: Tensor, gates: Tensor) -> Tensor:
        """The output with gates (..., L) that broadcast against the rows; none of the library's code."""
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            x = x + gates[..., i, None] * block.branch(x)
        return self.head(x)


def data(kind: str, rows: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(rows, 4, generator=generator, dtype=torch.float64)
    if kind == "cross_entropy":
        return x, torch.randint(0, 3, (rows,), generator=generator)
    return x, torch.randn(rows, 2, generator=generator, dtype=torch.float64)


@functools.cache
def fitted(kind: str, steps: int = 150) -> Net:
    """A network trained at p = .8, one mask a row. Not to be changed: it is shared."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = Net(3 if kind == "cross_entropy" else 2)
        x, target = data(kind)
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        for _ in range(steps):
            optimizer.zero_grad()
            gates = (torch.rand(len(x), LENGTH, dtype=torch.float64) < 0.8).double()
            LOSSES[kind](net.gated(x, gates), target).backward()
            optimizer.step()
    net.zero_grad()
    return net


def every_mask(rates: list[float]) -> tuple[Tensor, Tensor]:
    """All 2^L masks (2^L, L) and their probabilities."""
    masks = torch.tensor(list(itertools.product((0.0, 1.0), repeat=len(rates))), dtype=torch.float64)
    p = torch.tensor(rates, dtype=torch.float64)
    return masks, (masks * p + (1 - masks) * (1 - p)).prod(1)


def gates_of(masks: Tensor, rates: list[float], scale: str) -> Tensor:
    return masks / torch.tensor(rates, dtype=torch.float64) if scale == "train" else masks


@torch.no_grad()
def every_output(net: Net, x: Tensor, rates: list[float], scale: str) -> tuple[Tensor, Tensor]:
    """Outputs (2^L, rows, out) and probabilities of all masks."""
    masks, chance = every_mask(rates)
    return net.gated(x, gates_of(masks, rates, scale)[:, None, :]), chance


def losses_of(kind: str, outputs: Tensor, target: Tensor) -> Tensor:
    """Loss of each of (masks, rows, out)."""
    if kind == "quadratic":
        return ((outputs - target) ** 2).mean((1, 2))
    picked = outputs.log_softmax(-1).gather(-1, target.expand(outputs.shape[:2])[..., None])
    return -picked.squeeze(-1).mean(1)


def exact(kind: str, rates: list[float], scale: str) -> tuple[float, float]:
    """E loss(Y) - loss(E Y), and E loss(Y), by enumeration."""
    net, (x, target) = fitted(kind), data(kind)
    outputs, chance = every_output(net, x, rates, scale)
    noisy = (chance * losses_of(kind, outputs, target)).sum()
    mean = torch.einsum("m,mro->ro", chance, outputs)
    return float(noisy - losses_of(kind, mean[None], target)[0]), float(noisy)

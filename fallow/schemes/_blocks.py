"""Masks of blocks of neighbouring features."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fallow.errors import check_choice, check_count, check_rate
from fallow.schemes._base import Masks, bernoulli, odds


@dataclass(frozen=True)
class Blocks(Masks):
    """Blocks of neighbouring features: DropBlock.

    Args:
        survival_rate: p, of every feature.
        block_size: r; the width need not be a multiple, nor as large.
        grid: "disjoint": the features are cut into blocks from the first on, the last one smaller, each kept
            or dropped whole; "sliding": blocks lie anywhere and overlap, on a grid padded by r - 1 at both
            ends, as in `fallow.drop_block1d`.
    """

    survival_rate: float
    block_size: int
    grid: str = "disjoint"

    def __post_init__(self) -> None:
        object.__setattr__(self, "survival_rate", check_rate(self.survival_rate))
        object.__setattr__(self, "block_size", check_count("block_size", self.block_size, minimum=1))
        check_choice("grid", self.grid, ("disjoint", "sliding"))

    def rate(self, width: int) -> float:
        """P everywhere."""
        self.check(width)
        return self.survival_rate

    def characteristic_matrix(self, width: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
        """``(1 - p) / p`` within a block; sliding: ``p^(-o / r) - 1`` with ``o = max(r - |i - j|, 0)``."""
        self.check(width)
        i = torch.arange(width)
        if self.grid == "disjoint":
            block = i // self.block_size
            return odds(self.survival_rate) * (block[:, None] == block).to(dtype)
        both = (self.block_size - (i[:, None] - i).abs()).clamp_min(0).double() / self.block_size
        return torch.expm1(-math.log(self.survival_rate) * both).to(dtype)

    def masks(self, rows: int, width: int, *, generator: Any = None, device: Any = None) -> Tensor:
        """Independent masks, from a number for each block, or for each place of a block."""
        self.check(width)
        p, r = self.survival_rate, min(self.block_size, width)
        if self.grid == "disjoint":
            blocks = bernoulli((rows, -(-width // r)), p, generator, device)
            return blocks[:, :, None].expand(-1, -1, r).flatten(1)[:, :width]
        # A place is free of a seed with probability p^(1/r); that of a seed is drawn, since near 1 a
        # device's numbers are coarse. Where the block is longer than the width, the many places that drop
        # everything are one, at the middle.
        share = math.log(p) / self.block_size
        seeds = bernoulli((rows, width + r - 1), -math.expm1(share), generator, device)
        if self.block_size > width:
            every = -math.expm1(share * (self.block_size - width + 1))
            seeds[:, width - 1] = bernoulli((rows,), every, generator, device)
        taken = torch.nn.functional.pad(seeds.cumsum(1), (1, 0))
        return taken[:, r:] == taken[:, :-r]


@dataclass(frozen=True)
class UnitsInBlocks(Masks):
    """A mask of units times one of disjoint blocks.

    Args:
        unit_rate: Survival rate of a unit in a block that is kept.
        block_rate: Survival rate of a block.
        block_size: r; the last block is smaller where the width is no multiple.
    """

    unit_rate: float
    block_rate: float
    block_size: int

    def __post_init__(self) -> None:
        for name in ("unit_rate", "block_rate"):
            object.__setattr__(self, name, check_rate(getattr(self, name), name=name))
        object.__setattr__(self, "block_size", check_count("block_size", self.block_size, minimum=1))

    def rate(self, width: int) -> float:
        """The product of the rates everywhere."""
        self.check(width)
        return self.unit_rate * self.block_rate

    def characteristic_matrix(self, width: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
        """In a block ``1 / block_rate - 1``, on the diagonal ``1 / (block_rate unit_rate) - 1``."""
        blocks = Blocks(self.block_rate, self.block_size).characteristic_matrix(width)
        return (blocks + odds(self.unit_rate) / self.block_rate * torch.eye(width, dtype=torch.float64)).to(
            dtype
        )

    def masks(self, rows: int, width: int, *, generator: Any = None, device: Any = None) -> Tensor:
        """Independent masks."""
        blocks = Blocks(self.block_rate, self.block_size)
        kept = blocks.masks(rows, width, generator=generator, device=device)
        return kept & bernoulli((rows, width), self.unit_rate, generator, device)

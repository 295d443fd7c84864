"""Structured noise, one method a file."""

from fallow.noise.dropblock import (
    DropBlock1d,
    DropBlock2d,
    DropBlock3d,
    drop_block1d,
    drop_block2d,
    drop_block3d,
    drop_block_mask,
)
from fallow.noise.stochastic_depth import StochasticDepth, stochastic_depth

__all__ = [
    "DropBlock1d",
    "DropBlock2d",
    "DropBlock3d",
    "StochasticDepth",
    "drop_block1d",
    "drop_block2d",
    "drop_block3d",
    "drop_block_mask",
    "stochastic_depth",
]

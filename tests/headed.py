"""A small network with a linear head, in double precision, and batches for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Headed(nn.Module):
    """A backbone to seven features and a head, with a place between them."""

    def __init__(self, between: nn.Module | None = None, bias: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 7))
        self.between = between or nn.Identity()
        self.fc = nn.Linear(7, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.between(self.body(x)))


def net(*args, **kwargs) -> Headed:
    return Headed(*args, **kwargs).double()


def batch(samples: int = 5):
    return torch.randn(samples, 4).double(), torch.randn(samples, 3).double(), torch.randint(3, (samples,))

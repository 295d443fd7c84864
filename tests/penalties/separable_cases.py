"""The separable penalties the laws are checked on, and the weights they are checked at."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fallow.penalties import (
    ARD,
    MCP,
    SCAD,
    GemanMcClure,
    HardConcrete,
    Log2Sum,
    LogSum,
    LpNorm,
    MolchanovFit,
    Ridge,
    Separable,
    Standout,
    TargetedThreshold,
    VariationalDropout,
    Welsch,
    from_eta,
)

PENALTIES: list[Separable] = [
    LogSum(2.0),
    LogSum(0.1),
    Log2Sum(1.0),
    Log2Sum(0.05),
    MCP(0.5, math.sqrt(2)),
    SCAD(3.7, 1.0),
    SCAD(2.1, 0.3),
    LpNorm(0.5),
    LpNorm(0.8),
    LpNorm(1.0),
    LpNorm(1.5),
    Standout(),
    Standout(kappa=3.0, beta=-1.0),
    VariationalDropout(),
    MolchanovFit(),
    HardConcrete(0.5),
    HardConcrete(0.1),
    TargetedThreshold(0.7, survival_rate=0.3),
    ARD(1.0),
    ARD(9.0),
    Welsch(),
    GemanMcClure(),
    Ridge(2.0),
]
STEPS = (0.05, 0.5, 1.0, 3.0, 10.0)

# Where slope or curvature jump; differences across them are no derivatives.
KINKS = {
    MCP: lambda p: [p.flat],
    SCAD: lambda p: [p.l, p.a * p.l],
    HardConcrete: lambda p: [p.flat],
    TargetedThreshold: lambda p: [p.threshold],
}


def kinks(penalty: Separable) -> list[float]:
    return KINKS.get(type(penalty), lambda p: [])(penalty)


def weights() -> Tensor:
    """Of both signs, from 1e-6 to 1e2, 0 among them, in double precision."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(300, dtype=torch.float64, generator=generator)
    spread = torch.logspace(-6, 2, 60, dtype=torch.float64)
    return torch.cat([2 * normal, spread, -spread, torch.zeros(1, dtype=torch.float64)])


def smooth_weights(penalty: Separable) -> Tensor:
    """Of order 1, away from 0 and from kinks."""
    w = weights()
    w = w[(w.abs() > 0.05) & (w.abs() < 6)]
    for kink in kinks(penalty):
        w = w[(w.abs() - kink).abs() > 1e-3]
    return w[:40]


def engine_of(penalty: Separable) -> Separable:
    return from_eta(penalty.eta, kinks=kinks(penalty))

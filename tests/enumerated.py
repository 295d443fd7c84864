"""Laws of masks written out: every outcome with its probability, from definitions and not from a matrix."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fallow.schemes import (
    Blocks,
    Correlated,
    Exchangeable,
    FixedSize,
    Gaussian,
    Layer,
    Scheme,
    Units,
    UnitsInBlocks,
)

_ROOT = torch.randn(7, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

# One of each kind for seven features, some with a last block that is smaller or a block that is too large.
SCHEMES: dict[str, Scheme] = {
    "units": Units(0.6),
    "unequal units": Units((0.5, 0.9, 0.3, 1.0, 0.7, 0.6, 0.8)),
    "blocks": Blocks(0.7, 3),
    "one block": Blocks(0.7, 9),
    "sliding": Blocks(0.6, 3, "sliding"),
    "sliding over the edge": Blocks(0.6, 8, "sliding"),
    "layer": Layer(0.4),
    "gaussian": Gaussian(0.5),
    "fixed size": FixedSize(3),
    "alike": Exchangeable(0.6, 0.3),
    "unlike": Exchangeable(3 / 7, -1 / 6),
    "units in blocks": UnitsInBlocks(0.75, 0.5, 3),
    "correlated": Correlated((1.0, 2.0, -1.0, 0.5, 1.0, 1.0, 3.0), (_ROOT @ _ROOT.T).tolist()),
}


def enumerated(scheme: Scheme, width: int) -> Iterator[tuple[float, Tensor]]:
    """Probabilities and multipliers; of normal ones the points of a quadrature exact for degree three."""
    total: dict[tuple[float, ...], float] = {}
    for chance, z in _outcomes(scheme, width):
        total[tuple(z)] = total.get(tuple(z), 0.0) + chance
    for z, chance in total.items():
        if chance > 0:
            yield chance, torch.tensor(z, dtype=torch.float64) / scheme.mean(width)


def expected(scheme: Scheme, width: int, value: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean of a function of the multipliers [width]."""
    return torch.stack([chance * value(z) for chance, z in enumerated(scheme, width)]).sum(0)


def _outcomes(scheme: Scheme, width: int) -> Iterator[tuple[float, list[float]]]:
    if isinstance(scheme, Units):
        rate = scheme.survival_rate
        yield from _independent(rate if isinstance(rate, tuple) else (rate,) * width)
    elif isinstance(scheme, Layer):
        yield from ((c, b * width) for c, b in _independent((scheme.survival_rate,)))
    elif isinstance(scheme, Blocks) and scheme.grid == "disjoint":
        r = scheme.block_size
        for chance, kept in _independent((scheme.survival_rate,) * math.ceil(width / r)):
            yield chance, [kept[i // r] for i in range(width)]
    elif isinstance(scheme, Blocks):
        r = scheme.block_size
        for chance, free in _independent((scheme.survival_rate ** (1 / r),) * (width + r - 1)):
            yield chance, [min(free[i : i + r]) for i in range(width)]
    elif isinstance(scheme, UnitsInBlocks):
        r = scheme.block_size
        for one, blocks in _independent((scheme.block_rate,) * math.ceil(width / r)):
            for two, units in _independent((scheme.unit_rate,) * width):
                yield one * two, [units[i] * blocks[i // r] for i in range(width)]
    elif isinstance(scheme, FixedSize):
        subsets = list(itertools.combinations(range(width), scheme.kept))
        yield from ((1 / len(subsets), [float(i in s) for i in range(width)]) for s in subsets)
    elif isinstance(scheme, Exchangeable) and scheme.correlation >= 0:
        share = scheme.correlation
        yield from ((share * c, z) for c, z in _outcomes(Layer(scheme.survival_rate), width))
        yield from (((1 - share) * c, z) for c, z in _outcomes(Units(scheme.survival_rate), width))
    elif isinstance(scheme, Exchangeable):
        # the least correlation, with a whole number kept
        yield from _outcomes(FixedSize(round(scheme.survival_rate * width)), width)
    else:
        mean, covariance = scheme.mean(width), _covariance(scheme, width)
        values, vectors = torch.linalg.eigh(covariance)
        root = vectors * values.clamp_min(0).sqrt()
        for signs in itertools.product((-1.0, 1.0), repeat=width):
            yield 0.5**width, (mean + root @ torch.tensor(signs, dtype=torch.float64)).tolist()


def _covariance(scheme: Scheme, width: int) -> Tensor:
    if isinstance(scheme, Gaussian):
        return scheme.variance * torch.eye(width, dtype=torch.float64)
    assert isinstance(scheme, Correlated)
    return scheme.covariance


def _independent(rates: tuple[float, ...]) -> Iterator[tuple[float, list[float]]]:
    for kept in itertools.product((0.0, 1.0), repeat=len(rates)):
        yield math.prod(p if k else 1 - p for k, p in zip(kept, rates, strict=True)), list(kept)

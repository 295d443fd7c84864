"""A control variate for the regulariser: what single sites alone would give in the same draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fallow.explaining._noise import Kept, Noise
from fallow.explaining._outputs import OutputLoss, Point, inner, minus, mixed

Pair = tuple[Point, Point]  # the output with a site on and with it off


def placed(mask: Tensor | bool, a: Point, b: Point, dims: Sequence[int | None]) -> Point:
    """A where the mask is True and b elsewhere, sample by sample or as a whole."""
    if not isinstance(mask, Tensor):
        return a if mask else b
    found = []
    for x, y, dim in zip(a, b, dims, strict=True):
        shape = [1] * x.dim()
        shape[dim or 0] = mask.numel()
        found.append(torch.where(mask.to(x.device).reshape(shape), x, y))
    return found


def alone(loss: OutputLoss, p: float, on: Point, off: Point) -> float:
    """One site's penalty: p loss(on) + (1 - p) loss(off) - loss(p on + (1 - p) off)."""
    return p * loss.value(on) + (1 - p) * loss.value(off) - loss.value(mixed(p, on, off))


class Control:
    """A number for each draw, of mean zero, that moves with the loss's divergence from the mean output.

    Formula: C = sum_l D(Y_l, m_l) - E D(Y_l, m_l), with Y_l the output where site l follows its mask and all
    others are kept, m_l its mean, D the Bregman divergence; the expectation is the site's penalty alone.

    Estimator:
        E C = 0 where one mask is for the whole batch, and with a mask a sample where the loss is a sum over
        samples. It is taken off with the factor 1: a fitted one is noise where rests are rare, just where C
        serves best. As p tends to 1 masks with two sites off become rare, and C takes all of the variance.
    """

    def __init__(
        self, loss: OutputLoss, noise: Noise, pairs: Mapping[str, Pair], dims: Sequence[int | None]
    ) -> None:
        self._loss, self._pairs, self._dims = loss, pairs, dims
        self._means = {name: mixed(noise.rates[name], *pair) for name, pair in pairs.items()}
        self._slopes = {name: loss.gradient(mean) for name, mean in self._means.items()}
        self._expected = math.fsum(
            loss.value(mean) + alone(loss, noise.rates[name], *pairs[name])
            for name, mean in self._means.items()
        )

    def __call__(self, kept: Kept) -> float:
        """C of one draw."""
        total = -self._expected
        for name, (on, off) in self._pairs.items():
            point = placed(kept[name], on, off, self._dims)
            slope = inner(self._slopes[name], minus(point, self._means[name]))
            total += self._loss.value(point) - slope
        return total

"""Rates and masks for the tests of growth and of laws over masks."""

import itertools
import math

RATES = [0.9, 0.35, 0.7, 0.5, 1.0, 0.2, 0.8]
KINDS = ["vanilla", "scaled", "batchnorm"]


def linear(depth: int, last: float) -> list[float]:
    return [1 - (i + 1) / depth * (1 - last) for i in range(depth)]


def every_mask(rates):
    for mask in itertools.product([False, True], repeat=len(rates)):
        yield mask, math.prod(p if on else 1 - p for p, on in zip(rates, mask, strict=True))

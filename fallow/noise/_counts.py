"""Uniform and Poisson numbers from a key, without a tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator

# splitmix64: number i of a key is the key plus i steps, mixed.
# Steele, Lea, Flood: Fast splittable pseudorandom number generators (2014).
STEP = 0x9E3779B97F4A7C15
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_WORD = (1 << 64) - 1


def number(key: int, i: int) -> int:
    """Number i of the key's sequence, 64 bits."""
    z = key + i * STEP & _WORD
    for shift, factor in MIX:
        z = (z ^ z >> shift) * factor & _WORD
    return z ^ z >> 31


def uniforms(key: int) -> Iterator[float]:
    """Numbers 0, -1, -2 and so on of the key's sequence, as numbers in (0, 1)."""
    i = 0
    while True:
        yield ((number(key, i) >> 11) + 0.5) * 2.0**-53
        i -= 1


def poisson(mean: float, numbers: Iterator[float]) -> int:
    """A Poisson number of that mean; the compiled kernel has the same from the same numbers.

    References:
        Hoermann: The transformed rejection method for generating Poisson random variables (1993), PTRS, as
        numpy and torch have it; below a mean of 10, Knuth's product of uniform numbers.
    """
    if mean < 10:
        count, product, least = 0, next(numbers), math.exp(-mean)
        while product > least:
            count += 1
            product *= next(numbers)
        return count
    b = 0.931 + 2.53 * math.sqrt(mean)
    a = -0.059 + 0.02483 * b
    while True:
        u, v = next(numbers) - 0.5, next(numbers)
        us = 0.5 - abs(u)
        count = math.floor((2 * a / us + b) * u + mean + 0.43)
        if us >= 0.07 and v <= 0.9277 - 3.6224 / (b - 2):
            return count
        if count < 0 or (us < 0.013 and v > us):
            continue
        height = math.log(v * (1.1239 + 1.1328 / (b - 3.4)) / (a / (us * us) + b))
        if height <= count * math.log(mean) - mean - _log_factorial(count):
            return count


def _log_factorial(n: int) -> float:
    """Stirling's series from 16 on, where its error is below 1e-13; a C library's lgamma may be another."""
    shift, k = 1.0, float(n)
    while k < 16:
        k += 1
        shift *= k
    r = 1 / k
    series = r * (1 / 12 - r * r * (1 / 360 - r * r * (1 / 1260 - r * r / 1680)))
    return (k + 0.5) * math.log(k) - k + 0.9189385332046727 + series - math.log(shift)

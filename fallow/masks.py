"""Which sites and which rows rest: draws that are a function of where they are used, not of when.

Every number here is a hash of (seed, draw, stream, site, index). Nothing is read from or written to a random
number generator, torch's own included, so a draw can be repeated, resumed and agreed on between processes, in
any order. A draw's number counts the training forwards; masks are bool, True = kept.

The hash. For a (seed, draw, stream, site) the state s is a chain of SplitMix64 finalisers, and the numbers at
index 0, 1, 2, ... are the outputs of SplitMix64 started at s: mix(s + (index + 1) g), g the odd constant
below. The finaliser is a bijection of the 64-bit words with full avalanche, so each output is uniform on them
and outputs of different sites, draws or seeds are independent as far as statistics can tell.

References:
    Steele, Lea, Flood: Fast splittable pseudorandom number generators (2014), with the constants of
    SplitMix64.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB

# The streams keep apart numbers that one (seed, draw, site) needs for different purposes.
_BATCH, _ROW, _SHUFFLE, _OFFSET, _COUNT, _START, _ROWS = range(1, 8)

# Rates as integers in batch_exact: 2^-40 is finer than any rate that a run could tell apart.
_BITS = 40
_ONE = 1 << _BITS

# p * rows or sum p this close to an integer is that integer: 0.1 * 30 is not 3 in floating point.
_SNAP = 1e-9


def site_key(name: str) -> int:
    """A 64-bit hash of a site's name, the same in every process and on every machine.

    Examples:
        >>> site_key("layer1.0") == site_key("layer1.0"), site_key("layer1.0") == site_key("layer1.1")
        (True, False)
    """
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def uniforms(
    seed: int, draw: int, keys: Sequence[int], index: Iterable[int] | Tensor, stream: int = 0
) -> Tensor:
    """Uniform numbers in [0, 1) with 53 bits, one for each key and index.

    Args:
        seed: Any integer.
        draw: The number of the draw.
        keys: One 64-bit integer a site, from `site_key`.
        index: Which numbers of each site; sample numbers, for instance.
        stream: Keeps apart numbers for different purposes.

    Returns:
        A float64 CPU tensor of shape [len(keys), len(index)].
    """
    return _shifted(_hash(seed, draw, keys, index, stream), 11).to(torch.float64) * 2.0**-53


def batch_bernoulli(
    rates: Sequence[float], keys: Sequence[int], seed: int, draw: int, rank: int = 0
) -> list[bool]:
    """Keep each site with its own rate, independently.

    Estimator:
        P(kept) = p_l to within 2^-53, since a uniform u of 53 bits is below p with that probability; a rate
        of 1 is always kept.

    Examples:
        >>> batch_bernoulli([1.0, 1.0], [site_key("a"), site_key("b")], seed=0, draw=0)
        [True, True]
    """
    base = _chain(seed, draw, _BATCH)
    return [_uniform(base, key, rank) < rate for rate, key in zip(rates, keys, strict=True)]


def batch_exact(
    rates: Sequence[float], keys: Sequence[int], seed: int, draw: int, rank: int = 0
) -> list[bool]:
    """Keep floor or ceil(sum p) sites, each with its own rate: shuffled systematic sampling.

    The sites are put in a random order, each as a segment of length p_l, end to end on a line that starts at
    a uniform offset u in [0, 1). A site is kept where its segment holds an integer in its half-open interval.

    Estimator:
        Given the order, the segment of site l starts at u + (what lies before it), uniform modulo 1, so an
        interval of length p_l <= 1 holds an integer with probability p_l, whatever the order: the marginals
        are right. The whole line has length sum p and holds floor or ceil(sum p) integers. In integers of
        2^-40 both statements are exact for the rounded rates, which differ from those asked by less than
        1e-9. The shuffle alone decides which sites rest together: without it neighbours hardly ever would.

    References:
        Madow: On the theory of systematic sampling, II (1949).

    Examples:
        >>> sum(batch_exact([0.5] * 6, range(6), seed=0, draw=0))
        3
    """
    base = _chain(seed, draw, _SHUFFLE)
    order = sorted(range(len(rates)), key=[_number(base, key, rank) for key in keys].__getitem__)
    offset = _number(_chain(seed, draw, _OFFSET), 0, rank) >> (64 - _BITS)
    return _systematic(_quantised(rates), order, offset)


def row_bernoulli(rate: float, key: int, seed: int, draw: int, first: int, count: int) -> Tensor:
    """Keep each of the samples `first` .. `first + count - 1` with the rate, independently.

    Samples are numbered over the global batch, so a sample's mask does not depend on how the batch is split
    over ranks or micro-batches.

    Estimator:
        P(kept) = p to within 2^-53, independently over samples and sites.
    """
    return uniforms(seed, draw, [key], torch.arange(first, first + count, device="cpu"), _ROW)[0] < rate


def row_exact(rate: float, rows: int, key: int, seed: int, draw: int, rank: int = 0) -> tuple[int, int]:
    """How many of the rows to keep and where the circular window of them starts.

    The rows kept are start, start + 1, ..., start + k - 1, modulo `rows`.

    Estimator:
        k = floor(p b) + [u < p b - floor(p b)] has mean p b. The start is uniform on the b rows, so the
        window holds any given row with probability E[k] / b = p, for every b, 1 included. Rows of one window
        are kept together, so this suits shuffled batches only. (The start is uniform to within b 2^-64.)

    Examples:
        >>> row_exact(0.5, 8, site_key("a"), seed=0, draw=0)[0]
        4
    """
    start = _number(_chain(seed, draw, _START), key, rank) * rows >> 64
    return _count(rate, rows, key, seed, draw, rank), start


def row_exact_scattered(rate: float, rows: int, key: int, seed: int, draw: int, rank: int = 0) -> Tensor:
    """The sorted numbers of the rows to keep, as many as `row_exact` keeps and uniform without replacement.

    Estimator:
        The k smallest of b independent uniform numbers are a uniform subset of size k, so a row is kept with
        probability E[k] / b = p. (Ties, with probability below b^2 2^-64, go to the lower row.)

    Returns:
        An int64 CPU tensor of shape [k].
    """
    kept = _count(rate, rows, key, seed, draw, rank)
    # One rank's rows must not be another's: the rank goes into the stream, the index is the row.
    scores = _hash(seed, draw, [key], torch.arange(rows, device="cpu"), _ROWS + 8 * rank)[0]
    return torch.sort(torch.argsort(scores, stable=True)[:kept]).values


def _count(rate: float, rows: int, key: int, seed: int, draw: int, rank: int) -> int:
    """floor(p b) or ceil(p b), with mean p b."""
    exact = rate * rows
    near = round(exact)
    if abs(exact - near) < _SNAP:
        return near
    floor = math.floor(exact)
    return floor + (_uniform(_chain(seed, draw, _COUNT), key, rank) < exact - floor)


def _systematic(sizes: Sequence[int], order: Sequence[int], offset: int) -> list[bool]:
    """Keep the segments that hold a multiple of 2^40, laid end to end in `order` from `offset` on."""
    kept = [False] * len(sizes)
    position = offset
    for site in order:
        end = position + sizes[site]
        kept[site] = end >> _BITS > position >> _BITS
        position = end
    return kept


def _quantised(rates: Sequence[float]) -> list[int]:
    """Rates in units of 2^-40; where sum p is an integer but for rounding, so is their sum."""
    sizes = [min(round(rate * _ONE), _ONE) for rate in rates]
    total = math.fsum(rates)
    if abs(total - round(total)) >= _SNAP:
        return sizes
    excess = round(total) * _ONE - sum(sizes)
    # Rates of 1 stay 1; the few units go to the rate nearest a half, and on from there if it should be full.
    for site in sorted(range(len(sizes)), key=lambda site: abs(sizes[site] - _ONE // 2)):
        moved = min(max(sizes[site] + excess, 0), _ONE) - sizes[site]
        sizes[site] += moved
        excess -= moved
    return sizes


def _mix(word: int) -> int:
    """SplitMix64's finaliser on a Python integer."""
    word &= _MASK
    word = (word ^ (word >> 30)) * _FIRST & _MASK
    word = (word ^ (word >> 27)) * _SECOND & _MASK
    return word ^ (word >> 31)


def _chain(*words: int) -> int:
    """A 64-bit state from several integers; the order counts."""
    state = 0
    for word in words:
        state = _mix((state ^ (word & _MASK)) + _GOLDEN)
    return state


def _number(base: int, key: int, index: int) -> int:
    """One 64-bit number, for hosts that need few; equal to `_hash` there."""
    state = _mix((base ^ (key & _MASK)) + _GOLDEN)
    return _mix(state + (index + 1) * _GOLDEN)


def _uniform(base: int, key: int, index: int) -> float:
    """One uniform number, equal to the one of `uniforms`."""
    return (_number(base, key, index) >> 11) * 2.0**-53


def _hash(seed: int, draw: int, keys: Sequence[int], index: Iterable[int] | Tensor, stream: int) -> Tensor:
    """The numbers of `_number` for every key and index, as int64 with the same bits, [keys, index]."""
    base = _chain(seed, draw, stream)
    states = torch.tensor(
        [_signed(_mix((base ^ (key & _MASK)) + _GOLDEN)) for key in keys], dtype=torch.int64, device="cpu"
    )
    listed = (
        index if isinstance(index, Tensor) else torch.tensor(list(index), dtype=torch.int64, device="cpu")
    )
    steps = listed.to(device="cpu", dtype=torch.int64) + 1
    word = states[:, None] + steps[None, :] * _signed(_GOLDEN)
    word = (word ^ _shifted(word, 30)) * _signed(_FIRST)
    word = (word ^ _shifted(word, 27)) * _signed(_SECOND)
    return word ^ _shifted(word, 31)


def _shifted(word: Tensor, places: int) -> Tensor:
    """A logical shift to the right; torch's own copies the sign."""
    return (word >> places) & ((1 << (64 - places)) - 1)


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned word."""
    return word - (1 << 64) if word >> 63 else word

"""The numbers that a key stands for."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch

from fallow.noise import _blocks, _counts


def test_the_sequence_is_splitmix64() -> None:
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [_counts.number(1234567, i) for i in range(1, 5)] == published


def test_uniform_numbers_come_from_those_that_no_cell_takes() -> None:
    numbers = list(itertools.islice(_counts.uniforms(9), 4))
    assert numbers == [((_counts.number(9, i) >> 11) + 0.5) / 2**53 for i in (0, -1, -2, -3)]
    assert all(0 < number < 1 for number in itertools.islice(_counts.uniforms(3), 1000))


def test_factorials_are_exact_to_the_last_digits() -> None:
    for n in (*range(40), 1000, 10**6, 10**9):
        assert _counts._log_factorial(n) == pytest.approx(math.lgamma(n + 1), rel=1e-14, abs=1e-12)


@pytest.mark.parametrize("mean", [1e-3, 0.7, 9.99, 10.0, 14.5, 60.0, 5000.0])
def test_poisson_numbers_have_their_law(mean: float) -> None:
    """Every count, or of counts that are likely so few that none says much, the share up to each."""
    draws, numbers = 20_000, _counts.uniforms(5)
    found = Counter(_counts.poisson(mean, numbers) for _ in range(draws))
    below = probability = 0.0
    for n in range(int(mean + 8 * math.sqrt(mean) + 8)):
        chance = math.exp(n * math.log(mean) - mean - math.lgamma(n + 1))
        assert abs(found[n] - draws * chance) <= 5 * math.sqrt(draws * chance) + 3
        below, probability = below + found[n], probability + chance
        spread = math.sqrt(draws * probability * max(1 - probability, 0))
        assert abs(below - draws * probability) <= 5 * spread + 3
    assert below == draws


def test_a_key_of_a_generator_leads_to_fresh_numbers_each_time() -> None:
    noise = torch.Generator().manual_seed(1)
    keys = {_blocks.draw(4, noise).key for _ in range(1000)}
    assert len(keys) == 1000
    first = [next(_counts.uniforms(key)) for key in sorted(keys)]
    assert abs(sum(first) / 1000 - 0.5) < 5 / math.sqrt(12_000)


def test_cells_on_a_device_are_those_of_whole_numbers() -> None:
    grid = _blocks.Grid((40, 30), 3, False, 0.5, 50)
    for key in (0, 1, (1 << 62) - 1):
        seeds = _blocks.Seeds(50, key)
        expected, low, numbers = [], 0, itertools.count(1)
        for span, count in zip(_blocks._spans(grid, 50), _blocks.counts(grid, seeds), strict=True):
            for i in itertools.islice(numbers, count):
                expected.append(low + int((_counts.number(key, i) >> 11) * (span * 2.0**-53)))
            low += span
        assert _blocks.cells(grid, seeds, torch.device("cpu")).tolist() == expected
        assert len(expected) > 4000 and low == 50 * grid.cells

"""The draws: against a naive generator, exhaustively where that is possible, and by their statistics.

Seeds are fixed, so a test either always passes or always fails; bounds are 5 standard errors.
"""

import itertools
import math
import subprocess
import sys
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fallow import masks

SIZES = (1, 2, 3, 8, 32)
RATES = (0.1, 0.3, 0.5, 0.77, 0.95)
WORD = st.integers(-(2**63), 2**64 - 1)
KEYS = [masks.site_key(f"block{i}") for i in range(12)]


def splitmix(state: int):
    """SplitMix64 as its authors wrote it."""
    while True:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        yield z ^ (z >> 31)


def naive_uniforms(seed: int, draw: int, key: int, count: int, stream: int) -> list[float]:
    state = 0
    for word in (seed, draw, stream, key):
        state = next(splitmix(state ^ (word % 2**64)))
    return [z / 2**11 // 1 / 2**53 for z in itertools.islice(splitmix(state), count)]


def within(successes: float, trials: int, probability: float, sigmas: float = 5.0) -> bool:
    """Whether a number of independent successes lies within some standard errors of its mean."""
    spread = sigmas * math.sqrt(trials * probability * (1 - probability))
    return abs(successes - trials * probability) <= spread + 1e-9


def rows_kept(sampler: str, rate: float, rows: int, draw: int, seed: int = 0) -> list[int]:
    key = KEYS[0]
    if sampler == "bernoulli":
        return masks.row_bernoulli(rate, key, seed, draw, draw * rows, rows).nonzero()[:, 0].tolist()
    if sampler == "scattered":
        return masks.row_exact_scattered(rate, rows, key, seed, draw).tolist()
    count, start = masks.row_exact(rate, rows, key, seed, draw)
    return [(start + i) % rows for i in range(count)]


def test_the_naive_generator_gives_the_published_numbers():
    """The first outputs for seed 1234567, as listed with the reference implementations of SplitMix64."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert list(itertools.islice(splitmix(1234567), 4)) == expected


@given(WORD, WORD, st.lists(WORD, min_size=1, max_size=4), st.integers(1, 20), st.integers(0, 50))
def test_uniforms_equal_the_naive_generator(seed, draw, keys, count, stream):
    found = masks.uniforms(seed, draw, keys, range(count), stream)
    assert found.dtype == torch.float64 and found.shape == (len(keys), count)
    for key, row in zip(keys, found.tolist(), strict=True):
        assert row == pytest.approx(naive_uniforms(seed, draw, key, count, stream), abs=2**-52)


@given(WORD, WORD, WORD, st.integers(0, 2**40))
def test_one_number_on_the_host_equals_the_one_in_a_tensor(seed, draw, key, index):
    base = masks._chain(seed, draw, 3)
    assert masks.uniforms(seed, draw, [key], [index], 3).item() == masks._uniform(base, key, index)


def test_uniforms_are_uniform_and_uncorrelated():
    numbers = masks.uniforms(0, 0, KEYS, range(20_000))
    assert 0 <= numbers.min() and numbers.max() < 1
    counts = torch.histc(numbers, bins=64, min=0, max=1)
    expected = numbers.numel() / 64
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi_square - 63) < 5 * math.sqrt(2 * 63)
    sites = torch.corrcoef(numbers) - torch.eye(len(KEYS))
    assert sites.abs().max() < 5 / math.sqrt(20_000)
    neighbours = torch.corrcoef(torch.stack([numbers[:, 1:].flatten(), numbers[:, :-1].flatten()]))[0, 1]
    assert abs(neighbours) < 5 / math.sqrt(numbers.numel())


@pytest.mark.parametrize("vary", ["seed", "draw", "stream"])
def test_consecutive_seeds_draws_and_streams_are_independent(vary):
    numbers = torch.stack(
        [
            masks.uniforms(**{"seed": 1, "draw": 1, "stream": 1, vary: i}, keys=KEYS[:1], index=[0])[0]
            for i in range(4000)
        ]
    )[:, 0]
    assert abs(numbers.mean() - 0.5) < 5 * math.sqrt(1 / 12 / 4000)
    assert abs(torch.corrcoef(torch.stack([numbers[1:], numbers[:-1]]))[0, 1]) < 5 / math.sqrt(4000)


def test_site_keys_are_the_same_in_every_process():
    code = "from fallow import masks; print(masks.site_key('layer1.0.conv'))"
    printed = {subprocess.check_output([sys.executable, "-c", code], text=True).strip() for _ in range(2)}
    assert printed == {str(masks.site_key("layer1.0.conv"))}
    assert len({masks.site_key(f"layer{i}.{j}") for i in range(50) for j in range(50)}) == 2500


@pytest.mark.parametrize("sampler", [masks.batch_bernoulli, masks.batch_exact])
def test_each_site_is_kept_with_its_own_rate(sampler):
    rates = [0.1, 0.3, 0.5, 0.77, 0.95, 1.0, 0.5, 0.2, 1e-3, 0.999, 0.6, 0.4]
    draws = 8000
    kept = torch.tensor([sampler(rates, KEYS, 3, draw) for draw in range(draws)]).sum(0).tolist()
    for count, rate in zip(kept, rates, strict=True):
        assert within(count, draws, rate), (count / draws, rate)


def test_bernoulli_sites_are_independent():
    draws = 8000
    kept = torch.tensor([masks.batch_bernoulli([0.5] * 12, KEYS, 4, draw) for draw in range(draws)])
    together = torch.corrcoef(kept.T.double()) - torch.eye(12)
    assert together.abs().max() < 5 / math.sqrt(draws)
    assert abs(kept.sum(1).double().var() - 3) < 5 * 3 * math.sqrt(2 / draws)  # 12 p (1 - p)


@given(st.lists(st.floats(1e-6, 1), max_size=70), st.integers(0, 2**63), st.integers(0, 10**9))
def test_exact_depth_is_the_floor_or_the_ceiling_at_every_draw(rates, seed, draw):
    depth = sum(masks.batch_exact(rates, range(len(rates)), seed, draw))
    total = math.fsum(rates)
    near = round(total)
    allowed = {near} if abs(total - near) < 1e-9 else {math.floor(total), math.ceil(total)}
    assert depth in allowed


@pytest.mark.parametrize(
    ("rates", "depth"), [([0.1] * 10, 1), ([0.7] * 10, 7), ([1 / 3] * 3, 1), ([1.0] * 4, 4)]
)
def test_sums_that_are_whole_but_for_rounding_give_one_depth(rates, depth):
    assert {sum(masks.batch_exact(rates, KEYS[: len(rates)], 0, draw)) for draw in range(300)} == {depth}


def test_exact_depth_has_the_asked_mean():
    rates = [1 - site / 54 / 2 for site in range(1, 55)]  # Huang's rule, ResNet-110: 40.25 of 54
    depths = Counter(sum(masks.batch_exact(rates, range(54), 0, draw)) for draw in range(4000))
    assert set(depths) == {40, 41} and within(depths[41], 4000, 0.25)


@given(st.lists(st.integers(1, 8), min_size=1, max_size=6), st.integers(0, 2**37 - 1), st.randoms())
def test_madows_marginals_exactly_for_any_order(eighths, below, random):
    """Over all offsets on a grid, each rate of m/8 is met exactly m times in 8, whatever the order."""
    sizes = [m << 37 for m in eighths]
    order = random.sample(range(len(sizes)), len(sizes))
    kept = [masks._systematic(sizes, order, (offset << 37) + below) for offset in range(8)]
    assert [sum(column) for column in zip(*kept, strict=True)] == eighths


@given(st.lists(st.floats(1e-12, 1), max_size=60))
def test_rounded_rates_stay_within_the_documented_distance(rates):
    sizes = masks._quantised(rates)
    for size, rate in zip(sizes, rates, strict=True):
        assert 0 <= size <= 2**40 and abs(size / 2**40 - rate) < 1.1e-9
        assert rate < 1 or size == 2**40


def test_the_shuffle_lets_every_pair_of_sites_rest_together():
    kept = torch.tensor([masks.batch_exact([0.5] * 6, KEYS[:6], 0, draw) for draw in range(6000)])
    for a, b in itertools.combinations(range(6), 2):
        resting = (~kept[:, a] & ~kept[:, b]).sum().item()
        # three of six rest; with all pairs alike, 3 of the 15 pairs rest at a draw
        assert within(resting, 6000, 0.2), (a, b)


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("sampler", ["bernoulli", "window", "scattered"])
def test_each_row_position_is_kept_with_the_rate(sampler, rows):
    draws = 1500
    for rate in RATES:
        kept = Counter(row for draw in range(draws) for row in rows_kept(sampler, rate, rows, draw))
        assert set(kept) <= set(range(rows))
        for row in range(rows):
            assert within(kept[row], draws, rate), (rate, row, kept[row] / draws)


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("sampler", ["window", "scattered"])
def test_exact_counts_are_the_floor_or_the_ceiling_with_the_right_mean(sampler, rows):
    draws = 1500
    for rate in RATES:
        counts = Counter(len(rows_kept(sampler, rate, rows, draw)) for draw in range(draws))
        floor, share = divmod(round(rate * rows, 9), 1)
        assert set(counts) <= {floor, floor + 1 if share else floor}
        assert within(counts[int(floor) + 1], draws, share)


@given(st.floats(0.01, 1), st.integers(0, 200), WORD, st.integers(0, 2**40), st.integers(0, 64))
def test_scattered_rows_are_sorted_distinct_and_as_many_as_in_the_window(rate, rows, seed, draw, rank):
    kept = masks.row_exact_scattered(rate, rows, KEYS[0], seed, draw, rank).tolist()
    assert kept == sorted(set(kept)) and all(0 <= row < rows for row in kept)
    count, start = masks.row_exact(rate, rows, KEYS[0], seed, draw, rank)
    assert len(kept) == count and (0 <= start < rows or rows == 0)


def test_window_starts_do_not_depend_on_the_count():
    """A longer window must not start elsewhere, or the rows' marginals would no longer be the rate."""
    draws = [masks.row_exact(0.55, 2, KEYS[0], 0, draw) for draw in range(4000)]
    for count in (1, 2):
        starts = [start for k, start in draws if k == count]
        assert within(sum(starts), len(starts), 0.5)


def test_scattered_subsets_are_all_equally_likely():
    draws = 6000
    subsets = Counter(tuple(rows_kept("scattered", 0.5, 4, draw)) for draw in range(draws))
    assert set(subsets) == set(itertools.combinations(range(4), 2))
    assert all(within(count, draws, 1 / 6) for count in subsets.values())


def test_a_samples_mask_does_not_depend_on_how_the_batch_is_split():
    whole = masks.row_bernoulli(0.5, KEYS[0], 1, 2, 0, 24)
    parts = [masks.row_bernoulli(0.5, KEYS[0], 1, 2, first, 8) for first in (0, 8, 16)]
    assert torch.equal(whole, torch.cat(parts))


def all_draws(seed=0, draw=0, key=KEYS[0], rank=0) -> list[list]:
    """What every sampler returns, each long enough that two agree by chance with probability below 1e-9."""
    keys = [key + i for i in range(64)]
    return [
        masks.batch_bernoulli([0.5] * 64, keys, seed, draw, rank),
        masks.batch_exact([0.5] * 64, keys, seed, draw, rank),
        masks.row_bernoulli(0.5, key, seed, draw, 64 * rank, 64).tolist(),
        [masks.row_exact(0.5, 10**12 + 1, key, seed, draw, rank)[1]],
        masks.row_exact_scattered(0.5, 64, key, seed, draw, rank).tolist(),
    ]


def test_draws_repeat():
    assert all_draws() == all_draws()


@pytest.mark.parametrize("change", [{"seed": 1}, {"seed": -1}, {"draw": 1}, {"key": KEYS[1]}, {"rank": 1}])
def test_draws_differ_over_seeds_draws_sites_and_ranks(change):
    for one, other in zip(all_draws(), all_draws(**change), strict=True):
        assert one != other


def test_nothing_reads_or_moves_torchs_generator():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = all_draws()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert all_draws() == first


def test_draws_stay_on_the_host_whatever_the_default_device_is():
    with torch.device("meta"):
        found = (
            masks.row_exact_scattered(0.5, 8, KEYS[0], 0, 0),
            masks.row_bernoulli(0.5, KEYS[0], 0, 0, 0, 8),
        )
        numbers = masks.uniforms(0, 0, KEYS, [0, 1])
    assert all(tensor.device.type == "cpu" for tensor in (*found, numbers))


def test_a_rate_of_one_keeps_everything():
    for draw in range(50):
        assert all(masks.batch_bernoulli([1.0] * 12, KEYS, 0, draw))
        assert all(masks.batch_exact([1.0] * 12, KEYS, 0, draw))
        for sampler in ("bernoulli", "window", "scattered"):
            assert sorted(rows_kept(sampler, 1.0, 7, draw)) == list(range(7))

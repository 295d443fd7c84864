"""Laws of masks: every probability by enumeration, every matrix by its definition, every draw by its law."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fallow.errors import FallowError, RateError, UsageError
from fallow.schemes import (
    Blocks,
    Correlated,
    Exchangeable,
    FixedSize,
    Gaussian,
    Layer,
    Masks,
    Scheme,
    Units,
    UnitsInBlocks,
    characteristic_matrix,
)

Law = dict[tuple[bool, ...], float]
WIDTH = 5
MASKS: list[Masks] = [
    Units(0.7),
    Units((0.2, 0.5, 0.9, 0.4, 1.0)),
    Blocks(0.6, 1),
    Blocks(0.6, 2),
    Blocks(0.3, 5),
    Blocks(0.3, 11),
    *(Blocks(0.6, size, "sliding") for size in (1, 2, 3, 4, 5, 6, 8)),
    Layer(0.3),
    *(FixedSize(kept) for kept in (1, 3, 5)),
    *(Exchangeable(0.7, correlation) for correlation in (0.4, 0, 1, -0.05, -0.19)),
    Exchangeable(0.4, -0.25),
    Exchangeable(0.1, -1 / 9),
    UnitsInBlocks(0.7, 0.8, 2),
    UnitsInBlocks(0.5, 0.9, 3),
]
MATRIX = torch.tensor(
    [[2.0, 0.5, 0, 0, -1], [0.5, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 3, 0], [-1, 0, 0, 0, 1]]
)
NORMAL: list[Scheme] = [
    Gaussian(0.5),
    Gaussian(0),
    Correlated([1.0, 2.0, 0.5, -1.0, 3.0], MATRIX),
    Correlated([1.0] * 5, [[2.0] * 5] * 5),
]
every_mask = pytest.mark.parametrize("scheme", MASKS, ids=str)
every_scheme = pytest.mark.parametrize("scheme", [*MASKS, *NORMAL], ids=str)


# --- the oracle: every mask with its probability, from the words of the law alone ---------------------------


def coins(rates: list[float]) -> Iterator[tuple[tuple[bool, ...], float]]:
    """Every outcome of independent coins."""
    for outcome in itertools.product((True, False), repeat=len(rates)):
        yield outcome, math.prod(p if kept else 1 - p for kept, p in zip(outcome, rates, strict=True))


def mixture(*parts: tuple[float, Law]) -> Law:
    law: Law = defaultdict(float)
    for weight, part in parts:
        for mask, probability in part.items():
            law[mask] += weight * probability
    return law


def subsets(width: int, size: int) -> Law:
    chosen = list(itertools.combinations(range(width), size))
    return {tuple(i in some for i in range(width)): 1 / len(chosen) for some in chosen}


def seeded(scheme: Blocks, width: int) -> Law:
    """One seed a cell of the padded grid; a seed drops `block_size` features from its cell on."""
    r, law = scheme.block_size, defaultdict(float)
    g = 1 - scheme.survival_rate ** (1 / r)
    for seeds, probability in coins([g] * (width + r - 1)):
        dropped = {cell - (r - 1) + i for cell, seed in enumerate(seeds) if seed for i in range(r)}
        law[tuple(i not in dropped for i in range(width))] += probability
    return law


def blocked(rate: float, size: int, width: int) -> Law:
    count = math.ceil(width / size)
    return {tuple(kept[i // size] for i in range(width)): q for kept, q in coins([rate] * count)}


def exchangeable(scheme: Exchangeable, width: int) -> Law:
    p, rho, free = scheme.survival_rate, scheme.correlation, dict(coins([scheme.survival_rate] * width))
    if width == 1:
        return free
    if rho >= 0:
        return mixture((1 - rho, free), (rho, {(True,) * width: p, (False,) * width: 1 - p}))
    floor = math.floor(p * width + 1e-9)
    share = p * width - floor
    counted = mixture((1 - share, subsets(width, floor)), (share, subsets(width, min(floor + 1, width))))
    pairs = sum(q for mask, q in counted.items() if mask[0] and mask[1])
    weight = rho / ((pairs - p * p) / (p * (1 - p)))  # correlations of laws with one rate mix linearly
    return mixture((weight, counted), (1 - weight, free))


def law_of(scheme: Scheme, width: int) -> Law:
    """Every mask that the scheme can draw, with its probability."""
    if isinstance(scheme, Units):
        rate = scheme.survival_rate
        return dict(coins(list(rate) if isinstance(rate, tuple) else [rate] * width))
    if isinstance(scheme, Blocks):
        sliding = scheme.grid == "sliding"
        return seeded(scheme, width) if sliding else blocked(scheme.survival_rate, scheme.block_size, width)
    if isinstance(scheme, Layer):
        return blocked(scheme.survival_rate, width, width)
    if isinstance(scheme, FixedSize):
        return subsets(width, scheme.kept)
    if isinstance(scheme, Exchangeable):
        return exchangeable(scheme, width)
    assert isinstance(scheme, UnitsInBlocks)
    law: Law = defaultdict(float)
    for blocks, q in blocked(scheme.block_rate, scheme.block_size, width).items():
        for units, s in coins([scheme.unit_rate] * width):
            law[tuple(a and b for a, b in zip(blocks, units, strict=True))] += q * s
    return law


def tensors(law: Law) -> tuple[Tensor, Tensor]:
    """Masks [n, d] and probabilities [n]."""
    return torch.tensor(list(law), dtype=torch.float64), torch.tensor(list(law.values()), dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- the matrix ---------------------------------------------------------------------------------------------


@every_mask
@pytest.mark.parametrize("width", [1, 2, WIDTH, 6])
def test_the_mean_and_the_matrix_are_those_of_all_masks_by_enumeration(scheme: Masks, width: int) -> None:
    try:
        scheme.check(width)
    except UsageError:
        pytest.skip("the scheme has no such width")
    z, probability = tensors(law_of(scheme, width))
    mean = probability @ z
    assert float(probability.sum()) == pytest.approx(1, abs=1e-13)
    torch.testing.assert_close(scheme.mean(width), mean, rtol=1e-12, atol=0)
    multipliers = z / mean
    expected = (multipliers - 1).T @ (probability[:, None] * (multipliers - 1))
    torch.testing.assert_close(characteristic_matrix(scheme, width), expected, rtol=1e-12, atol=1e-12)


@every_mask
def test_the_expected_squared_error_of_a_head_is_the_plain_one_and_the_matrix_of_it(scheme: Masks) -> None:
    noise = generator(1)
    y, u, h = (torch.randn(s, generator=noise, dtype=torch.float64) for s in ((3, 4), (3, WIDTH), (WIDTH, 4)))
    z, probability = tensors(law_of(scheme, WIDTH))
    outputs = torch.einsum("oi,ni,is->nos", u, z / scheme.mean(WIDTH), h)
    sampled = probability @ (y - outputs).square().sum((1, 2))
    penalty = (characteristic_matrix(scheme, WIDTH) * (u.T @ u) * (h @ h.T)).sum()
    plain = (y - u @ h).square().sum()
    assert float(sampled) == pytest.approx(float(plain + penalty), rel=1e-12)


@every_scheme
def test_the_matrix_is_symmetric_without_negative_eigenvalues_in_the_asked_dtype(scheme: Scheme) -> None:
    matrix = characteristic_matrix(scheme, WIDTH)
    assert matrix.dtype == torch.float64 and matrix.shape == (WIDTH, WIDTH)
    assert torch.equal(matrix, matrix.T)
    assert float(torch.linalg.eigvalsh(matrix)[0]) > -1e-12 * max(float(matrix.abs().amax()), 1)
    assert torch.equal(scheme.characteristic_matrix(WIDTH, dtype=torch.float32), matrix.float())


def test_special_cases_of_one_law_are_other_laws() -> None:
    same = [
        (Blocks(0.6, 1), Units(0.6)),
        (Blocks(0.6, 1, "sliding"), Units(0.6)),
        (Blocks(0.6, 12), Layer(0.6)),
        (Exchangeable(0.6, 0), Units(0.6)),
        (Exchangeable(0.6, 1), Layer(0.6)),
        (Exchangeable(0.6, -1 / 4), FixedSize(3)),
        (UnitsInBlocks(1, 0.6, 2), Blocks(0.6, 2)),
        (UnitsInBlocks(0.6, 1, 2), Units(0.6)),
        (Correlated([1.0] * 5, 0.5 * torch.eye(5)), Gaussian(0.5)),
    ]
    for one, other in same:
        torch.testing.assert_close(characteristic_matrix(one, 5), characteristic_matrix(other, 5))


def test_blocks_far_longer_than_the_width_are_the_layer() -> None:
    scheme = Blocks(0.6, 10**9, "sliding")
    torch.testing.assert_close(characteristic_matrix(scheme, 7), Layer(0.6).characteristic_matrix(7))
    assert scheme.masks(4000, 7, generator=generator()).float().std(1).eq(0).all()


# --- draws --------------------------------------------------------------------------------------------------


@every_mask
def test_every_mask_comes_as_often_as_the_law_says(scheme: Masks) -> None:
    rows, law = 40_000, law_of(scheme, WIDTH)
    masks = scheme.masks(rows, WIDTH, generator=generator(3))
    weights = 2 ** torch.arange(WIDTH)
    counts = torch.bincount((masks * weights).sum(1), minlength=2**WIDTH).double()
    expected = torch.zeros(2**WIDTH, dtype=torch.float64)
    for mask, probability in law.items():
        expected[sum(2**i for i, kept in enumerate(mask) if kept)] = probability
    error = (expected * (1 - expected).clamp_min(0) * rows).sqrt()
    # rare masks are Poisson numbers, whose tail is longer: three of them are never surprising
    assert ((counts - expected * rows).abs() <= 5 * error + 3 * (expected > 0)).all()
    assert masks.dtype == torch.bool and masks.shape == (rows, WIDTH)


@every_scheme
def test_multipliers_have_mean_one_and_the_covariance_of_the_matrix(scheme: Scheme) -> None:
    rows = 60_000
    centred = scheme.sample(rows, WIDTH, generator=generator(5), dtype=torch.float64) - 1
    matrix = characteristic_matrix(scheme, WIDTH)
    assert (centred.mean(0).abs() <= 5 * (matrix.diag() / rows).sqrt() + 1e-12).all()
    products = centred[:, :, None] * centred[:, None]
    error = products.std(0) / math.sqrt(rows)
    assert ((products.mean(0) - matrix).abs() <= 5 * error + 1e-12).all()


@every_mask
def test_multipliers_are_the_masks_over_their_mean(scheme: Masks) -> None:
    masks = scheme.masks(50, WIDTH, generator=generator(2))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        drawn = scheme.sample(50, WIDTH, generator=generator(2), dtype=dtype)
        assert torch.equal(drawn, torch.where(masks, (1 / scheme.mean(WIDTH)).to(dtype), 0))


@every_scheme
def test_draws_follow_the_generator_and_without_one_torchs_own(scheme: Scheme) -> None:
    state = torch.get_rng_state()
    first = scheme.sample(64, WIDTH, generator=generator(7))
    assert first.dtype == torch.float32 and first.shape == (64, WIDTH)
    assert torch.equal(first, scheme.sample(64, WIDTH, generator=generator(7)))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    default = scheme.sample(64, WIDTH)
    torch.manual_seed(7)
    assert torch.equal(default, scheme.sample(64, WIDTH))


def test_fixed_sizes_are_exact_in_every_row_and_exchangeable_ones_at_their_bound_too() -> None:
    assert FixedSize(3).masks(500, 9, generator=generator()).sum(1).eq(3).all()
    scheme = Exchangeable(0.35, Exchangeable(0.35, 0).least(10))
    assert set(scheme.masks(500, 10, generator=generator()).sum(1).tolist()) == {3, 4}


@pytest.mark.parametrize(
    "scheme",
    [Units(1), Units((1.0, 1.0)), Blocks(1, 2), Blocks(1, 2, "sliding"), Layer(1), Gaussian(0)]
    + [FixedSize(2), Exchangeable(1, -1), UnitsInBlocks(1, 1, 3)],
    ids=str,
)
def test_at_rate_one_every_multiplier_is_one(scheme: Scheme) -> None:
    assert scheme.sample(20, 2, generator=generator()).eq(1).all()
    assert characteristic_matrix(scheme, 2).eq(0).all()


def test_a_correlated_law_is_drawn_in_full_precision_under_autocast() -> None:
    scheme = Correlated([1.0, 2.0, 0.5, -1.0, 3.0], MATRIX)
    plain = scheme.sample(40, 5, generator=generator())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scheme.sample(40, 5, generator=generator()), plain)


# --- objects ------------------------------------------------------------------------------------------------


@every_scheme
def test_schemes_are_values(scheme: Scheme) -> None:
    for twin in (copy.deepcopy(scheme), pickle.loads(pickle.dumps(scheme))):
        assert twin == scheme and hash(twin) == hash(scheme) and repr(twin) == repr(scheme)
        assert torch.equal(
            twin.sample(9, 5, generator=generator()), scheme.sample(9, 5, generator=generator())
        )
    assert scheme != Units(0.123)
    with pytest.raises(AttributeError):
        scheme.survival_rate = 0.5  # type: ignore[attr-defined]


def test_all_schemes_of_this_file_differ() -> None:
    assert len({*MASKS, *NORMAL}) == len(MASKS) + len(NORMAL)
    assert Units([0.5, 0.6]) == Units((0.5, 0.6))  # type: ignore[arg-type]
    assert Correlated([1.0], [[2.0]]) != Correlated([1.0], [[3.0]])


def test_a_correlated_scheme_keeps_copies_of_its_numbers() -> None:
    mean = torch.ones(2, requires_grad=True)
    scheme = Correlated(mean, torch.eye(2))
    with torch.no_grad():
        mean.add_(1)
    scheme.mean(2).zero_()
    assert scheme.mean(2).tolist() == [1, 1] and not scheme.mean(2).requires_grad
    assert repr(scheme) == "Correlated(mean=[1.0, 1.0], covariance=[[1.0, 0.0], [0.0, 1.0]])"


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Units(0), RateError, "survival_rate must be in"),
        (lambda: Units((0.5, 1.5)), RateError, "got 1.5"),
        (lambda: Units((0.5, 0.6)).mean(3), UsageError, "2 numbers and the width is 3"),
        (lambda: Blocks(0.5, 0), UsageError, "block_size must be an integer of at least 1"),
        (lambda: Blocks(0.5, 2, "round"), UsageError, 'grid must be "disjoint" or "sliding"'),
        (lambda: Layer(math.nan), RateError, "nan"),
        (lambda: FixedSize(0), UsageError, "kept must be an integer of at least 1"),
        (lambda: FixedSize(6).sample(2, 5), UsageError, "got 6 of 5 features"),
        (lambda: Exchangeable(0.5, 1.5), UsageError, r"correlation must be in \[-1, 1\]"),
        (lambda: Exchangeable(0.5, -0.5).sample(2, 4), UsageError, "at least -0.333333 for 4 features"),
        (lambda: UnitsInBlocks(0.5, 2, 2), RateError, "block_rate must be in"),
        (lambda: Gaussian(-1), UsageError, "variance must be a number of at least 0"),
        (lambda: Gaussian(math.inf), UsageError, "got inf"),
        (lambda: Gaussian("1"), UsageError, "got '1'"),  # type: ignore[arg-type]
        (lambda: Correlated([1.0, 0.0], torch.eye(2)), UsageError, "no zeros"),
        (lambda: Correlated([], torch.eye(2)), UsageError, "mean must have"),
        (lambda: Correlated([1.0], torch.eye(2)), UsageError, r"shape \[2, 2\]"),
        (lambda: Correlated([1.0], [[math.nan]]), UsageError, "finite"),
        (lambda: Correlated([1.0, 1.0], [[1.0, 0.5], [0.0, 1.0]]), UsageError, "symmetric"),
        (
            lambda: Correlated([1.0, 1.0], [[1.0, 2.0], [2.0, 1.0]]),
            UsageError,
            "negative eigenvalues, got -1",
        ),
        (lambda: Correlated([1.0], [[1.0]]).sample(2, 3), UsageError, "1 numbers and the width is 3"),
        (lambda: Units(0.5).mean(0), UsageError, "width must be an integer of at least 1"),
    ],
)
def test_wrong_numbers_are_refused_in_words(
    make: Callable[[], object], error: type[FallowError], words: str
) -> None:
    with pytest.raises(error, match=words):
        make()

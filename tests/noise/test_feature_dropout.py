"""Dropout of features: values, laws, gradients, dtypes, graphs, modules, errors."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fallow.errors import ArgumentError, FallowError, RateError, UsageError
from fallow.noise import BlockDropout, FeatureDropout, block_dropout, feature_dropout
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

WIDTH = 6
MASKS: list[Masks] = [
    Units(0.7),
    Units((0.3, 0.5, 0.9, 0.4, 1.0, 0.7)),
    Layer(0.3),
    FixedSize(4),
    Exchangeable(0.7, 0.4),
    Exchangeable(0.7, -0.1),
    UnitsInBlocks(0.7, 0.8, 4),
]
BLOCKS = [
    Blocks(0.6, 3),
    Blocks(0.6, 4),
    Blocks(0.9, 9),
    Blocks(0.6, 3, "sliding"),
    Blocks(0.3, 4, "sliding"),
    Blocks(0.7, 9, "sliding"),
]
NORMAL: list[Scheme] = [Gaussian(0.5), Correlated([1.0, 2, 3, -1, 1, 1], torch.eye(6) + 0.5)]
every_mask = pytest.mark.parametrize("scheme", MASKS, ids=str)
every_block = pytest.mark.parametrize("scheme", BLOCKS, ids=str)
every_scheme = pytest.mark.parametrize("scheme", [*MASKS, *BLOCKS, *NORMAL], ids=str)
every_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features(*rows: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*rows, WIDTH, generator=generator(99), dtype=torch.float64).to(dtype)


def factors(scheme: Masks) -> Tensor:
    """1 / p of each feature, float64."""
    return 1 / scheme.mean(WIDTH)


# --- values -------------------------------------------------------------------------------------------------


@every_mask
@every_dtype
@pytest.mark.parametrize("rows", [(), (7,), (3, 5), (2, 3, 4)], ids=str)
def test_what_is_kept_is_x_over_p_rounded_once_and_the_rest_is_zero(
    scheme: Masks, dtype: torch.dtype, rows: tuple[int, ...]
) -> None:
    x = features(*rows, dtype=dtype)
    out = feature_dropout(x, scheme, generator=generator(3))
    kept = scheme.masks(math.prod(rows), WIDTH, generator=generator(3)).view(x.shape)
    exact = torch.where(kept, x.double() * factors(scheme), 0)
    assert out.dtype == dtype and out.shape == x.shape
    assert torch.equal(out == 0, exact == 0)
    # half a unit in the last place of a half type; float32 rounds the factor too
    assert (
        (out - exact).abs() <= torch.finfo(dtype).eps * (0.5005 if dtype.itemsize < 4 else 1) * exact.abs()
    ).all()


@every_block
@every_dtype
@pytest.mark.parametrize("rows", [(), (40,), (3, 5)], ids=str)
def test_blocks_are_exact_too_and_disjoint_ones_whole(
    scheme: Blocks, dtype: torch.dtype, rows: tuple[int, ...]
) -> None:
    x = features(*rows, dtype=dtype)
    for seed in range(5):
        out = feature_dropout(x, scheme, generator=generator(seed))
        assert torch.equal(out, torch.where(out != 0, x * (1 / scheme.survival_rate), 0))
        assert out.dtype == dtype and out.shape == x.shape
        if scheme.grid == "disjoint":
            for block in out.split(scheme.block_size, dim=-1):
                assert ((block != 0).all(-1) | (block == 0).all(-1)).all()


@pytest.mark.parametrize("scheme", NORMAL, ids=str)
@every_dtype
def test_normal_multipliers_are_not_rounded_before_the_product(scheme: Scheme, dtype: torch.dtype) -> None:
    x, wide = features(8, dtype=dtype), torch.promote_types(dtype, torch.float32)
    out = feature_dropout(x, scheme, generator=generator(3))
    multipliers = scheme.sample(8, WIDTH, generator=generator(3), dtype=wide)
    assert torch.equal(out, (x.to(wide) * multipliers).to(dtype))


@every_scheme
def test_the_mean_is_x_and_the_covariance_the_matrix_times_x_for_rows_on_their_own(scheme: Scheme) -> None:
    rows, x = 40_000, features()
    centred = feature_dropout(x.expand(rows, -1), scheme, generator=generator(4)) - x
    matrix = characteristic_matrix(scheme, WIDTH) * torch.outer(x, x)
    assert (centred.mean(0).abs() <= 5 * (matrix.diag() / rows).sqrt() + 1e-12).all()
    for shift, expected in ((0, matrix), (1, torch.zeros_like(matrix))):
        products = centred[:, :, None] * centred.roll(shift, 0)[:, None]
        error = products.std(0) / math.sqrt(rows)
        assert ((products.mean(0) - expected).abs() <= 5 * error + 1e-12).all()


def test_layouts_other_than_contiguous_have_the_same_values() -> None:
    x = features(8, 5)
    for scheme in (Units(0.7), Blocks(0.5, 4), Gaussian(0.5)):
        expected = feature_dropout(x, scheme, generator=generator(1))
        other = x.transpose(0, 1).contiguous().transpose(0, 1)
        assert torch.equal(feature_dropout(other, scheme, generator=generator(1)), expected)


@every_scheme
def test_evaluation_and_empty_tensors_give_x_and_draw_nothing(scheme: Scheme) -> None:
    x, state = features(4), torch.get_rng_state()
    assert feature_dropout(x, scheme, training=False) is x
    for empty in (x[:0], x[:, :0]):
        assert feature_dropout(empty, scheme) is empty
    assert torch.equal(torch.get_rng_state(), state)


def test_complex_features_have_real_multipliers() -> None:
    x = torch.complex(features(5), features(5).flip(0))
    for scheme in (Units(0.7), Blocks(0.6, 4), Gaussian(0.5), Units((0.5,) * WIDTH)):
        out = feature_dropout(x, scheme, generator=generator(1))
        real = feature_dropout(x.real, scheme, generator=generator(1))
        imaginary = feature_dropout(x.imag, scheme, generator=generator(1))
        assert torch.equal(out, torch.complex(real, imaginary))


def test_rate_one_gives_x() -> None:
    x, state = features(4), torch.get_rng_state()
    for scheme in (Units(1), Layer(1), Blocks(1, 2), FixedSize(WIDTH), UnitsInBlocks(1, 1, 2)):
        assert feature_dropout(x, scheme) is x
    assert block_dropout(x, survival_rate=1, block_size=3) is x
    assert block_dropout(x, survival_rate=0.5, block_size=3, training=False) is x
    assert torch.equal(torch.get_rng_state(), state)


def test_a_dropped_infinity_is_zero() -> None:
    x = torch.full((50, WIDTH), math.inf)
    for scheme in (*MASKS, *BLOCKS):
        assert not feature_dropout(x, scheme, generator=generator()).isnan().any()


@every_scheme
def test_a_generator_reproduces_and_without_one_torchs_own_moves(scheme: Scheme) -> None:
    x, state = features(30), torch.get_rng_state()
    first = feature_dropout(x, scheme, generator=generator(7))
    assert torch.equal(first, feature_dropout(x, scheme, generator=generator(7)))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    default = feature_dropout(x, scheme)
    torch.manual_seed(7)
    assert torch.equal(default, feature_dropout(x, scheme))


@pytest.mark.parametrize("grid", ["disjoint", "sliding"])
def test_block_dropout_is_feature_dropout_by_the_law_of_blocks(grid: str) -> None:
    x = features(20, 3)
    out = block_dropout(x, survival_rate=0.6, block_size=4, grid=grid, generator=generator(2))
    assert torch.equal(out, feature_dropout(x, Blocks(0.6, 4, grid), generator=generator(2)))


# --- gradients and graphs -----------------------------------------------------------------------------------


@every_scheme
def test_the_gradient_is_that_of_the_same_multipliers(scheme: Scheme) -> None:
    x = features(5, 4).requires_grad_()
    upstream = torch.randn(x.shape, dtype=x.dtype)
    out = feature_dropout(x, scheme, generator=generator(5))
    (grad,) = torch.autograd.grad(out, x, upstream)
    torch.testing.assert_close(grad * x.detach(), out.detach() * upstream, rtol=1e-13, atol=0)


@every_scheme
def test_checkpointing_draws_the_same_again(scheme: Scheme) -> None:
    x = features(8).requires_grad_()
    out = checkpoint(FeatureDropout(scheme), x, use_reentrant=False)
    out.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad * x.detach(), out.detach(), rtol=1e-13, atol=0)


@every_scheme
def test_it_compiles_to_one_graph_of_the_same_law(scheme: Scheme) -> None:
    torch.compiler.reset()  # each case starts without the graphs of the others
    layer = torch.compile(FeatureDropout(scheme), backend="aot_eager", fullgraph=True, dynamic=False)
    x = torch.ones(4000, WIDTH, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    assert torch.equal(out, x.grad)
    error = (characteristic_matrix(scheme, WIDTH).diag() / 4000).sqrt()
    assert ((out.mean(0) - 1).abs() <= 5 * error + 1e-12).all()
    if isinstance(scheme, Masks):
        assert torch.equal(out, torch.where(out != 0, factors(scheme), 0))


@every_scheme
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_changes_nothing(scheme: Scheme, dtype: torch.dtype) -> None:
    x = features(9, dtype=dtype)
    plain = feature_dropout(x, scheme, generator=generator())
    with torch.autocast("cpu", torch.bfloat16):
        out = feature_dropout(x, scheme, generator=generator())
    assert out.dtype == dtype and torch.equal(out, plain)


# --- modules ------------------------------------------------------------------------------------------------


@every_scheme
def test_the_module_is_the_function_without_state(scheme: Scheme) -> None:
    layer, x = FeatureDropout(scheme, generator=generator(3)), features(6)
    assert torch.equal(layer(x), feature_dropout(x, scheme, generator=generator(3)))
    assert layer.eval()(x) is x and not layer.state_dict()
    twin = pickle.loads(pickle.dumps(FeatureDropout(scheme)))
    assert repr(copy.deepcopy(twin)) == repr(twin) == f"FeatureDropout({scheme!r})"


def test_block_dropout_as_a_module_follows_its_numbers() -> None:
    layer, x = BlockDropout(survival_rate=0.5, block_size=2, generator=generator(3)), features(60)
    assert layer.scheme == Blocks(0.5, 2) and not layer.state_dict()
    assert torch.equal(layer(x), block_dropout(x, survival_rate=0.5, block_size=2, generator=generator(3)))
    layer.survival_rate, layer.block_size, layer.grid = 0.8, WIDTH, "sliding"
    assert layer.scheme == Blocks(0.8, WIDTH, "sliding")
    assert set((layer(x) / x).round(decimals=9).unique().tolist()) == {0, 1.25}
    assert layer.eval()(x) is x
    twin = pickle.loads(pickle.dumps(BlockDropout(survival_rate=0.9, block_size=8)))
    assert repr(twin) == "BlockDropout(survival_rate=0.9, block_size=8, grid='disjoint')"


X = torch.ones(2, 3)
SIZED: dict[str, Any] = {"survival_rate": 0.5, "block_size": 2}


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: feature_dropout(X, 0.9), ArgumentError, r"such as Units\(0.9\) for Dropout, got 0.9"),
        (lambda: FeatureDropout("units"), ArgumentError, "FeatureDropout takes a scheme"),
        (lambda: feature_dropout(torch.tensor(1.0), Units(0.5)), UsageError, r"add one with x\[None\]"),
        (lambda: feature_dropout(X.long(), Units(0.5)), UsageError, "got torch.int64; convert"),
        (lambda: feature_dropout(X, FixedSize(4)), UsageError, "got 4 of 3 features"),
        (lambda: feature_dropout(X, FixedSize(4), training=False), UsageError, "got 4 of 3 features"),
        (lambda: block_dropout(X.long(), **SIZED), UsageError, "block_dropout takes floating-point"),
        (lambda: block_dropout(X, block_size=2), ArgumentError, "block_dropout needs survival_rate"),
        (lambda: block_dropout(X, survival_rate=0.5), ArgumentError, "needs block_size"),
        (lambda: block_dropout(X, survival_rate=2, block_size=2), RateError, "survival_rate must be in"),
        (lambda: block_dropout(X, survival_rate=0.5, block_size=0), UsageError, "block_size must be"),
        (lambda: block_dropout(X, **SIZED, grid="any"), UsageError, 'grid must be "disjoint"'),
        (lambda: block_dropout(X, drop_prob=0.1, block_size=2), ArgumentError, "pass survival_rate=0.9"),
        (lambda: BlockDropout(p=0.1, block_size=2), ArgumentError, "BlockDropout takes survival_rate, not p"),
        (lambda: BlockDropout(**SIZED, training=True), ArgumentError, "does not take training"),
    ],
)
def test_wrong_use_is_refused_in_words(call: Callable[[], Any], error: type[FallowError], words: str) -> None:
    with pytest.raises(error, match=words):
        call()

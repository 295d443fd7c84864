"""DropBlock as functions and Modules: values, gradients, dtypes, memory, state, errors."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fallow
from benchmarks import _timing
from fallow import kernels
from fallow.noise import (
    DropBlock1d,
    DropBlock2d,
    DropBlock3d,
    drop_block1d,
    drop_block2d,
    drop_block3d,
    drop_block_mask,
)

FUNCTIONS = {1: drop_block1d, 2: drop_block2d, 3: drop_block3d}
MODULES = {1: DropBlock1d, 2: DropBlock2d, 3: DropBlock3d}
SIZES = {1: (40,), 2: (12, 9), 3: (5, 6, 4)}
WAYS: dict[str, dict[str, Any]] = {
    "sliding": {"survival_rate": 0.8, "block_size": 5},
    "disjoint": {"survival_rate": 0.8, "block_size": 4, "grid": "disjoint"},
    "larger than the map": {"survival_rate": 0.5, "block_size": 50},
    "single elements": {"survival_rate": 0.3, "block_size": 1},
    "shared": {"survival_rate": 0.7, "block_size": 3, "shared_channels": True},
    "shared, disjoint": {"survival_rate": 0.7, "block_size": 3, "shared_channels": True, "grid": "disjoint"},
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
every_dimension = pytest.mark.parametrize("dims", [1, 2, 3])
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "rows and channels swapped": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every other channel": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "expanded": lambda x: x[:, :1].expand(x.shape),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@pytest.fixture(autouse=True)
def plain() -> Iterator[None]:
    """Torch's own operations, wherever this runs; the compiled kernel's tests compare it with them."""
    with kernels.plain():
        yield


def maps(dims: int, rows: int = 4, channels: int = 6, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, channels, *SIZES[dims], dtype=torch.float64).to(dtype)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mask_of(x: Tensor, way: dict[str, Any], seed: int) -> Tensor:
    return drop_block_mask(x.shape, generator=generator(seed), **way)


# --- values -------------------------------------------------------------------------------------------------


@every_way
@every_dimension
@every_layout
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_kept_is_exactly_x_over_p_and_the_rest_zero(
    way: dict[str, Any], dims: int, layout: Any, dtype: torch.dtype
) -> None:
    x = layout(maps(dims, dtype=dtype))
    out = FUNCTIONS[dims](x, generator=generator(3), **way)
    mask = mask_of(x, way, 3).expand(x.shape)
    assert torch.equal(out, torch.where(mask, x * (1 / way["survival_rate"]), 0))
    assert out.dtype == dtype and mask.any()
    assert out.stride() == (x * 1.5).stride()


@every_way
@every_dimension
def test_evaluation_and_rate_one_give_x_and_draw_nothing(way: dict[str, Any], dims: int) -> None:
    x, state = maps(dims), torch.get_rng_state()
    assert FUNCTIONS[dims](x, training=False, **way) is x
    assert FUNCTIONS[dims](x, **{**way, "survival_rate": 1}) is x
    assert drop_block_mask(x.shape, **{**way, "survival_rate": 1}).all()
    assert torch.equal(torch.get_rng_state(), state)


@every_way
def test_a_generator_reproduces_and_leaves_the_global_one_alone(way: dict[str, Any]) -> None:
    x = maps(2)
    state = torch.get_rng_state()
    first = drop_block2d(x, generator=generator(7), **way)
    assert torch.equal(first, drop_block2d(x, generator=generator(7), **way))
    assert not torch.equal(first, drop_block2d(x, generator=generator(8), **way))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    default = drop_block2d(x, **way)
    assert not torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    assert torch.equal(default, drop_block2d(x, **way))


def test_large_half_precision_tensors_stay_finite_with_the_right_mean() -> None:
    x = torch.ones(16, 64, 16, 16, dtype=torch.float16)  # more kept elements than fp16 can count
    for way in ({}, {"normalise": "realised"}, {"shared_channels": True}):
        out = drop_block2d(x, survival_rate=0.9, block_size=3, generator=generator(), **way)
        assert out.isfinite().all() and abs(float(out.double().mean()) - 1) < 0.05


@every_layout
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("normalise", ["expected", "realised"])
def test_a_dropped_infinity_is_zero(layout: Any, shared: bool, normalise: str) -> None:
    x = layout(torch.full((8, 4, 8, 8), math.inf))
    for block, p in ((5, 0.9), (5, 0.5), (1, 0.3)):
        options = {"shared_channels": shared, "normalise": normalise}
        out = drop_block2d(x, survival_rate=p, block_size=block, **options)
        assert set(out.unique().tolist()) == {0, math.inf}


@pytest.mark.parametrize("shared", [True, False])
def test_realised_normalisation_keeps_the_batch_mean_and_nothing_is_zeros(shared: bool) -> None:
    x = torch.ones(4, 3, 9, 9, dtype=torch.float64)
    options = {"block_size": 3, "shared_channels": shared, "normalise": "realised"}
    for seed in range(5):
        out = drop_block2d(x, survival_rate=0.6, generator=generator(seed), **options)
        assert float(out.mean()) == pytest.approx(1, rel=1e-12)
    assert not drop_block2d(x, survival_rate=1e-12, **options).any()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("block", [7, 40])
@pytest.mark.parametrize("p", [0.9, 0.1, 1e-9])
def test_the_mask_of_a_large_tensor_is_that_of_its_forward(p: float, block: int, shared: bool) -> None:
    shape = (64, 40, 32, 32)  # more rows of blocks than are written at a time
    options = {"survival_rate": p, "block_size": block, "shared_channels": shared}
    out = drop_block2d(torch.ones(shape), generator=generator(3), **options)
    assert torch.equal(out != 0, drop_block_mask(shape, generator=generator(3), **options).expand(shape))


def test_an_empty_tensor_comes_back() -> None:
    for shape in ((0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)):
        x = torch.empty(shape)
        assert drop_block2d(x, survival_rate=0.5, block_size=3) is x
        assert drop_block_mask(shape, survival_rate=0.5, block_size=3).shape == shape


# --- gradients ----------------------------------------------------------------------------------------------


@every_way
@every_dimension
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_gradient_is_that_of_the_mask_over_p(way: dict[str, Any], dims: int, dtype: torch.dtype) -> None:
    x = maps(dims, dtype=dtype).requires_grad_()
    upstream = LAYOUTS["channels last"](maps(dims, dtype=dtype))
    out = FUNCTIONS[dims](x, generator=generator(5), **way)
    (grad,) = torch.autograd.grad(out, x, upstream)
    expected = torch.where(mask_of(x, way, 5), upstream * (1 / way["survival_rate"]), 0)
    assert torch.equal(grad, expected)


@every_way
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, in forward mode
def test_gradients_of_gradients_and_forward_mode_are_right(way: dict[str, Any]) -> None:
    def noisy(x: Tensor) -> Tensor:
        return drop_block2d(x, generator=generator(2), **way)

    x = torch.randn(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(noisy, (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(noisy, (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("block", [5, 7])
def test_little_memory_beside_the_result_and_less_kept_for_the_gradient(
    dtype: torch.dtype, shared: bool, block: int
) -> None:
    x = torch.randn(32, 64, 28, 28).to(dtype).requires_grad_()
    options = {"survival_rate": 0.9, "block_size": block, "shared_channels": shared}
    drop_block2d(x, **options)
    results: list[Tensor] = []
    peak = _timing.step_memory(lambda: results.append(drop_block2d(x, **options)))
    assert peak - x.nbytes <= 0.3 * x.nbytes
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        drop_block2d(x, **options)
    assert sum(tensor.nbytes for tensor in kept) <= 0.1 * x.nbytes


def test_autocast_leaves_the_dtype() -> None:
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        for options in ({}, {"shared_channels": True}):
            out = drop_block2d(x, survival_rate=0.8, block_size=3, **options)
            assert out.dtype == torch.float32
            out.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


def test_calls_in_inference_mode_and_out_of_it_do_not_disturb_each_other() -> None:
    x = torch.randn(2, 3, 11, 13)
    with torch.inference_mode():
        inside = drop_block2d(x, survival_rate=0.8, block_size=4, generator=generator())
    x.requires_grad_()
    out = drop_block2d(x, survival_rate=0.8, block_size=4, generator=generator())
    out.sum().backward()
    assert torch.equal(inside, out)


@every_way
def test_functional_gradients_are_those_of_autograd(way: dict[str, Any]) -> None:
    x = maps(2)

    def loss(x: Tensor) -> Tensor:
        return (drop_block2d(x, generator=generator(6), **way) ** 2).sum()

    expected = 2 * x * mask_of(x, way, 6) / way["survival_rate"] ** 2
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)


@every_way
def test_it_compiles_to_one_graph_of_the_same_law(way: dict[str, Any]) -> None:
    compiled = torch.compile(
        lambda x: drop_block2d(x, **way), backend="aot_eager", fullgraph=True, dynamic=False
    )
    x = torch.ones(600, 5, 4, 3, dtype=torch.float64, requires_grad=True)
    out = compiled(x)
    out.sum().backward()
    assert torch.equal(out, x.grad)
    p = way["survival_rate"]
    assert set(out.unique().tolist()) == {0, 1 / p}
    rates = (out[:, :1] if way.get("shared_channels") else out).flatten(0, 1).ne(0).double()
    assert ((rates.mean(0) - p).abs() < 5 * math.sqrt(p * (1 - p) / len(rates))).all()


def test_checkpointing_draws_the_same_mask_again() -> None:
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    layer = DropBlock2d(survival_rate=0.7, block_size=3)
    out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    out.sum().backward()
    assert torch.equal(x.grad != 0, out != 0)


# --- modules ------------------------------------------------------------------------------------------------


@every_way
@every_dimension
def test_the_module_is_the_function_and_has_no_state(way: dict[str, Any], dims: int) -> None:
    layer, x = MODULES[dims](**way, generator=generator(4)), maps(dims)
    assert torch.equal(layer(x), FUNCTIONS[dims](x, generator=generator(4), **way))
    assert layer.eval()(x) is x
    assert not layer.state_dict() and not list(layer.parameters())
    nn.Sequential(layer).load_state_dict({})
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(MODULES[dims](**way)))):
        torch.manual_seed(1)
        twin.generator = None
        out = twin.train()(x)
        torch.manual_seed(1)
        assert torch.equal(out, FUNCTIONS[dims](x, **way))


def test_the_representation_has_what_is_not_usual() -> None:
    assert (
        repr(DropBlock2d(survival_rate=0.9, block_size=7)) == "DropBlock2d(survival_rate=0.9, block_size=7)"
    )
    words = repr(DropBlock1d(survival_rate=0.9, block_size=7, shared_channels=True, grid="disjoint"))
    assert "shared_channels=True" in words and "grid='disjoint'" in words and "normalise" not in words


def test_a_schedule_moves_the_rate_by_steps_alone_and_is_saved() -> None:
    layer = DropBlock2d(survival_rate=0.6, block_size=1, schedule=fallow.schedules.warmup(10))
    x = torch.ones(50, 20, 6, 6)
    assert layer(x) is x and layer.current_rate == 1  # strength 0
    layer.step(5)
    layer(x)
    assert layer.current_rate == pytest.approx(0.8) and layer.time == 5
    assert float(layer(x).max()) == pytest.approx(1.25)
    layer.step()
    assert layer.time == 6
    model = nn.Sequential(layer)
    twin = nn.Sequential(DropBlock2d(survival_rate=0.6, block_size=1, schedule=fallow.schedules.warmup(10)))
    twin.load_state_dict(model.state_dict())
    assert twin[0].time == 6
    twin.load_state_dict({}, strict=True)  # from before there was a schedule
    layer.survival_rate = 0.2
    layer.step(100)
    assert layer.current_rate == 0.2 and float(layer(x).max()) == pytest.approx(5)
    with pytest.raises(fallow.UsageError, match="step"):
        layer.step(-1)


# --- errors -------------------------------------------------------------------------------------------------

X = torch.zeros(2, 3, 8, 8)
calls = pytest.mark.parametrize(
    "call",
    [lambda **k: drop_block2d(X, **k), DropBlock2d, lambda **k: drop_block_mask(X.shape, **k)],
    ids=["function", "module", "mask"],
)


@calls
@pytest.mark.parametrize(
    ("keyword", "value", "words"),
    [
        ("drop_prob", 0.1, r"takes survival_rate, not drop_prob: for drop_prob=0\.1 pass survival_rate=0\.9"),
        ("p", 0.1, r"(?=.*survival_rate=0\.9)(?=.*survival_rate=0\.1)"),
        ("keep_prob", 0.7, r"survival_rate=0\.7"),
        ("blocksize", 3, "did you mean block_size"),
    ],
)
def test_other_keywords_are_refused_with_the_conversion(
    call: Any, keyword: str, value: Any, words: str
) -> None:
    with pytest.raises(fallow.ArgumentError, match=words):
        call(block_size=3, **{keyword: value})


@calls
@pytest.mark.parametrize("p", [0, -0.1, 1.2, math.nan, True, "0.5"])
def test_rates_outside_the_interval_are_refused(call: Any, p: Any) -> None:
    with pytest.raises(fallow.RateError, match=r"\(0, 1\]"):
        call(survival_rate=p, block_size=3)


@calls
@pytest.mark.parametrize("block", [0, -3, 2.5, True, (3, 3)])
def test_block_sizes_are_positive_integers(call: Any, block: Any) -> None:
    with pytest.raises(fallow.UsageError, match="block_size must be an integer of at least 1"):
        call(survival_rate=0.5, block_size=block)


@calls
def test_both_numbers_are_needed(call: Any) -> None:
    with pytest.raises(fallow.ArgumentError, match="needs survival_rate"):
        call(block_size=3)
    with pytest.raises(fallow.ArgumentError, match="needs block_size"):
        call(survival_rate=0.5)


def test_other_words_are_refused() -> None:
    for call in (lambda **k: drop_block2d(X, **k), DropBlock2d):
        for option in ("grid", "normalise"):
            with pytest.raises(fallow.UsageError, match=f'{option} must be "'):
                call(survival_rate=0.5, block_size=3, **{option: "batch"})


@every_dimension
def test_another_number_of_axes_is_refused_with_the_remedy(dims: int) -> None:
    x = maps(dims)
    with pytest.raises(fallow.UsageError, match=rf"{dims + 2} axes, got {dims + 1} .*x\[None\]"):
        FUNCTIONS[dims](x[0], survival_rate=0.5, block_size=3)
    with pytest.raises(fallow.UsageError, match=f"{dims + 2} axes, got {dims + 3}"):
        FUNCTIONS[dims](x[None], survival_rate=0.5, block_size=3)
    with pytest.raises(fallow.UsageError, match="map of one to three axes"):
        drop_block_mask((2, 3), survival_rate=0.5, block_size=3)


def test_integers_are_refused() -> None:
    with pytest.raises(fallow.UsageError, match=r"torch\.int64.*x\.float"):
        drop_block2d(X.long(), survival_rate=0.5, block_size=3)

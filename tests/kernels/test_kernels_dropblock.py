"""The compiled DropBlock gives what torch's own operations give, bit for bit, or leaves the work to them."""

from __future__ import annotations

import math
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import _timing
from fallow import kernels
from fallow.kernels import _build, _dropblock
from fallow.noise import _blocks, _erasing, drop_block1d, drop_block2d, drop_block3d

FUNCTIONS = {1: drop_block1d, 2: drop_block2d, 3: drop_block3d}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SPARSE = {"survival_rate": 0.9, "block_size": 6}  # the seeds are fewer than a mask
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.fixture(autouse=True)
def compiled() -> None:
    found = kernels.available()
    if not found:
        assert "FALLOW_REQUIRE_KERNELS" not in os.environ, found.reason
        pytest.skip(found.reason)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel did the work, or left it."""
    counts: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., Tensor | None]:
        function = getattr(_dropblock, name)

        def call(*arguments: Any) -> Tensor | None:
            out = function(*arguments)
            counts[name if out is not None else "left"] += 1
            return out

        return call

    for name in ("drop_seeds", "drop_masked"):
        monkeypatch.setattr(_erasing, name, counted(name))
    return counts


def bits(x: Tensor) -> Tensor:
    """Bits, with all NaNs alike: torch's own differ between the vectors of a tensor and its rest."""
    canonical = x.detach().masked_fill(x.detach().isnan(), math.nan)
    return canonical.contiguous().view(INTEGERS[x.itemsize])


def assert_same(one: Tensor, other: Tensor) -> None:
    assert one.dtype == other.dtype and one.shape == other.shape
    assert torch.equal(bits(one), bits(other))


def both(call: Callable[[], Tensor], seed: int) -> tuple[Tensor, Tensor]:
    """The compiled result and that of torch's operations, from the same state of the generator."""
    torch.manual_seed(seed)
    one = call()
    torch.manual_seed(seed)
    with kernels.plain():
        return one, call()


def odd_numbers(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Of all magnitudes, with zeros of both signs, infinities, NaNs and subnormal numbers."""
    x = torch.randn(shape, dtype=torch.float64) * 10.0 ** torch.randint(-9, 6, shape)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-42, -6e-8, 65500.0])
    which = torch.rand(shape) < 0.2
    x[which] = special[torch.randint(len(special), (int(which.sum()),))].double()
    return x.to(dtype)


def way(choose: random.Random, dims: int) -> dict[str, Any]:
    return {
        "survival_rate": choose.choice([0.98, 0.9, 0.9, 0.5, 0.1]),
        "block_size": choose.choice([1, 2, 3, 5, 7, 8, 13, 25]),
        "grid": choose.choice(["sliding", "disjoint"]),
        "shared_channels": choose.random() < 0.5,
        "normalise": choose.choice(["expected", "expected", "realised"]),
    }


# --- the same result ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [lambda x: x, last], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_results_and_gradients_are_those_of_the_plain_form(
    dims: int, dtype: torch.dtype, layout: Callable[[Tensor], Tensor], used: Counter[str]
) -> None:
    choose = random.Random(dims)
    for seed in range(60):
        most = {1: 200, 2: 20, 3: 9}[dims]
        shape = (choose.randint(1, 4), choose.randint(1, 9), *(choose.randint(1, most) for _ in range(dims)))
        x, upstream = (layout(odd_numbers(shape, dtype)) for _ in range(2))
        x.requires_grad_(bool(seed % 2))
        options = way(choose, dims)

        def call(x: Tensor = x, options: dict[str, Any] = options) -> Tensor:
            return FUNCTIONS[dims](x, **options)

        one, other = both(call, seed)
        assert_same(one, other)
        assert one.stride() == other.stride() == (x * 1.5).stride()
        if x.requires_grad:
            one, other = (torch.autograd.grad(out, x, upstream)[0] for out in (one, other))
            assert_same(one, other)
    if dtype in _build.State.codes:
        assert min(used["drop_seeds"], used["drop_masked"]) > 10


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("shape", [(3, 40, 32, 32), (2, 33, 57, 31), (70, 64, 5, 5), (5, 3, 100, 90)])
def test_large_tensors_with_one_thread_and_with_several(
    shape: tuple[int, ...], shared: bool, used: Counter[str]
) -> None:
    x = torch.randn(shape)
    for layout, dtype, threads in (
        (None, torch.float32, 1),
        (None, torch.bfloat16, 3),
        (last, torch.float32, 3),
    ):
        y = (x if layout is None else layout(x)).to(dtype)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            one, other = both(
                lambda y=y: drop_block2d(y, survival_rate=0.9, block_size=5, shared_channels=shared), 1
            )
        finally:
            torch.set_num_threads(before)
        assert_same(one, other)
        assert 0.05 < float((one == 0).double().mean()) < 0.2
    assert used["drop_seeds"] == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 7, 5, 5), (2, 5, 4, 4), (2, 3, 16, 16), (3, 1, 30, 7), (1, 64, 9, 9)])
def test_results_written_past_the_caches_are_the_same(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_dropblock, "_last_cache", lambda: 0)
    _dropblock._spec.cache_clear()
    _blocks.grid_of.cache_clear()
    x = odd_numbers(shape, dtype)
    for seed in range(10):
        assert_same(
            *both(lambda: drop_block2d(x, survival_rate=0.7, block_size=3, shared_channels=True), seed)
        )
    _dropblock._spec.cache_clear()


@pytest.mark.parametrize("intensity", [0.004, 0.2, 3.0])
def test_the_seeds_are_those_of_the_plain_form_for_few_and_many(intensity: float) -> None:
    """One element a cell, so the result shows every seed; numbers by either way to a Poisson number."""
    planes, size = 6, 150
    for few in (True, False):
        grid = _blocks.Grid((size,), 1, True, math.exp(-intensity), planes)
        grid.__dict__["few"] = few
        for key in range(0, 1 << 62, 1 << 54):
            x = torch.ones(2, 3, size)
            seeds = _blocks.Seeds(planes, key)
            expected = x * 2
            _blocks.erase(expected, grid, seeds)
            out = _dropblock.drop_seeds(x, 2.0, grid.geometry, planes, key)
            assert out is not None and torch.equal(out, expected)


# --- where the kernel steps aside ---------------------------------------------------------------------------


class Marked(Tensor):
    pass


def left_to_torch(x: Tensor, used: Counter[str]) -> None:
    one, other = both(lambda: drop_block2d(x, **SPARSE), 0)
    assert used["drop_seeds"] == 0 and used["left"] == 2
    assert type(one) is type(other)
    assert torch.equal(torch.view_as_real(one), torch.view_as_real(other)) if x.is_complex() else True
    assert torch.equal(one.resolve_neg(), other.resolve_neg())


@pytest.mark.parametrize(
    "make",
    {
        "every other channel": lambda x: x[:, ::2],
        "rows and channels swapped": lambda x: x.transpose(0, 1),
        "expanded": lambda x: x[:, :1].expand(x.shape),
        "complex": lambda x: torch.complex(x, x),
        "negative bit": lambda x: torch.complex(x, x).conj().imag,
    }.items(),
    ids=lambda item: item[0],
)
def test_other_tensors_are_left_to_torch(make: tuple[str, Any], used: Counter[str]) -> None:
    left_to_torch(make[1](torch.randn(4, 6, 8, 7)), used)


def test_a_class_of_tensors_of_its_own_sees_plain_operations(used: Counter[str]) -> None:
    x = torch.randn(4, 6, 8, 7).as_subclass(Marked)
    one, other = both(lambda: drop_block2d(x, **SPARSE), 0)
    assert not used  # the kernel is not even asked
    assert type(one) is Marked
    assert_same(one, other)


def test_contiguous_parts_and_parameters_are_not(used: Counter[str]) -> None:
    x = torch.randn(5, 6, 8, 7)
    for y in (x[1:], x[2:3], x.flatten()[7:].view(-1)[:336].view(1, 6, 8, 7), torch.nn.Parameter(x)):
        assert_same(*both(lambda y=y: drop_block2d(y, **SPARSE), 0))
    assert used["drop_seeds"] == 4


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, in forward mode
def test_functional_transforms_modes_and_tracers_see_torch(used: Counter[str]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.randn(4, 3, 8, 7)

    def noisy(x: Tensor) -> Tensor:
        return drop_block2d(x, **SPARSE)

    with FlopCounterMode(display=False):
        noisy(x)
    with torch.device("meta"):
        assert noisy(x).device == x.device  # a mode of functions does not see what happens inside
    used.clear()
    torch.func.vmap(noisy, randomness="same")(x[None])
    torch.func.jvp(noisy, (x,), (x,))
    assert used["drop_seeds"] == 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("shared", [True, False])
def test_gradients_of_gradients_and_forward_mode(shared: bool, used: Counter[str]) -> None:
    def noisy(x: Tensor) -> Tensor:
        noise = torch.Generator().manual_seed(2)
        return drop_block2d(x, **SPARSE, shared_channels=shared, generator=noise)

    x = torch.randn(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(noisy, (x,))
    assert torch.autograd.gradgradcheck(noisy, (x,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x))
        out, tangent = torch.autograd.forward_ad.unpack_dual(noisy(dual))
    assert torch.equal(tangent != 0, out != 0)
    assert used["drop_seeds"] and not used["left"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [True, False])
def test_little_memory_beside_the_result_and_none_kept(dtype: torch.dtype, shared: bool) -> None:
    x = torch.randn(32, 64, 28, 28).to(dtype).requires_grad_()

    def call() -> Tensor:
        return drop_block2d(x, survival_rate=0.9, block_size=5, shared_channels=shared)

    call()
    results: list[Tensor] = []
    assert _timing.step_memory(lambda: results.append(call())) - x.nbytes <= 0.1 * x.nbytes
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call()
    assert kept == []


def test_more_cells_than_the_kernel_counts_are_left_to_torch() -> None:
    x = torch.ones(1, 1, 4, 4)
    for sizes, cells, classes in (
        ((4, 4), (1 << 16, 1 << 16), ()),
        ((4, 4), (4, 1 << 24), ()),
        ((4, 4), (4, 4), ((0, 0, 1, 1),) * 256),
    ):
        geometry = _dropblock.Geometry(sizes, cells, 1, False, classes, 1e-12)
        assert _dropblock.drop_seeds(x, 2.0, geometry, 1, 5) is None


# --- other processors ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A library for any processor of its kind, without threads."""
    state = {name: getattr(_build.State, name) for name in ("library", "codes", "reason", "asked")}
    patch = pytest.MonkeyPatch()
    patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("generic")))
    patch.setattr(_build, "_FLAGS", ((),))
    for name, value in {"library": None, "codes": {}, "reason": "", "asked": False}.items():
        patch.setattr(_build.State, name, value)
    yield
    patch.undo()
    assert {name: getattr(_build.State, name) for name in state} == state


@pytest.mark.usefixtures("generic")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_build_without_what_this_processor_has_is_the_same(dtype: torch.dtype) -> None:
    assert kernels.available()
    choose = random.Random(4)
    for seed in range(40):
        x = odd_numbers((3, 5, choose.randint(1, 40), choose.randint(1, 40)), dtype)
        x = last(x) if seed % 2 else x
        options = way(choose, 2)
        assert_same(*both(lambda x=x, options=options: drop_block2d(x, **options), seed))

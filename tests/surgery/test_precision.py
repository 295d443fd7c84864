"""The reference law in single and half precision, under autocast, in channels_last; dtypes and layouts."""

from __future__ import annotations

import copy

import laws
import pytest
import torch
from cases import POSITIVE
from torch import nn

import fallow

BY_NAME = {case.name: case for case in POSITIVE}
RATE = 0.5  # its inverse is exact in every precision
WAYS = {
    "batch": {"mode": "batch"},
    "rows, window": {"mode": "row", "sampler": "exact"},
    "rows, scattered": {"mode": "row", "sampler": "exact", "rows": "scattered"},
}
ALL = [c.name for c in POSITIVE if not c.big]
ONTO_BRANCH = "in place on the branch"
CONVOLUTIONS = ["resnet20", "pre-activation, fed by the raw input", "post-activation", "transitions"]
CONVOLUTIONS += [ONTO_BRANCH, "squeeze and excitation inside the branch", "timm resnet18"]
SOME = [
    "vit_small",
    "two branches",
    "parallel branches",
    "GPT-J: one sum of both branches",
    "HF GPT2",
    "HF Llama",
]
SOME += ["in place on the shortcut", "functional glue", "glue that reads the batch size", "layer scale"]
SOME += ["TransformerEncoderLayer, norm first", "HF ViTModel", "timm swin"]


def frozen(*models: nn.Module) -> None:
    """BatchNorm in eval: in half precision its statistics of few rows are all rounding."""
    for model in models:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ALL)
def test_single_precision(name: str, way: str) -> None:
    case = BY_NAME[name]
    model, dense = laws.pair(case, torch.float32)
    frozen(model, dense)
    feed = laws.cast(case.feed(5))
    handle = fallow.apply(model, fallow.rates.uniform(RATE), example=case.feed(2), seed=3, **WAYS[way])
    for _ in range(2):
        laws.assert_same_run(model, dense, case, feed, handle, 2e-4, 1 / RATE)


# whole convolutional models in float16 are too slow on a CPU
HALVES = [(name, torch.bfloat16) for name in (*SOME, *CONVOLUTIONS)]
HALVES += [(name, torch.float16) for name in (*SOME, *CONVOLUTIONS) if not BY_NAME[name].big]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "dtype"), HALVES)
def test_half_precision(name: str, way: str, dtype: torch.dtype) -> None:
    case = BY_NAME[name]
    model, dense = laws.pair(case, dtype)
    frozen(model, dense)
    feed = laws.cast(case.feed(4), dtype)
    example = laws.cast(case.feed(2), dtype)
    handle = fallow.apply(model, fallow.rates.uniform(RATE), example=example, seed=3, **WAYS[way])
    compare(model, dense, case, feed, handle, torch.finfo(dtype).eps)


def compare(model: nn.Module, dense: nn.Module, case, feed, handle: fallow.Handle, eps: float) -> None:
    """Outputs and gradients are as near to the reference as rounding lets them: by their norms."""
    mine, other = laws.cast(feed, requires_grad=True), laws.cast(feed, requires_grad=True)
    ours = laws.call(model, mine)
    theirs = laws.dense_run(
        dense, case, other, handle.masks(), dict.fromkeys((s.site for s in case.sums), 1 / RATE)
    )
    for a, b in zip(laws.floats(ours), laws.floats(theirs), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.isfinite(a).all()
        assert distance(a, b) < 8 * eps
    laws.backward(ours), laws.backward(theirs)
    pairs = zip(laws.grads(model, mine).items(), laws.grads(dense, other).values(), strict=True)
    kept = [(n, a, b) for (n, a), b in pairs if b is not None]
    largest = max(float(b.float().norm()) for _, _, b in kept)
    for name, a, b in kept:
        if float(b.float().norm()) > 0.02 * largest:
            assert a is not None and a.dtype == b.dtype and distance(a, b) < 40 * eps, name


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / (b.norm() + 1e-30))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [n for n in (*SOME, *CONVOLUTIONS) if n != ONTO_BRANCH])
def test_autocast(name: str, way: str) -> None:
    case = BY_NAME[name]
    model, dense = laws.pair(case, torch.float32)
    frozen(model, dense)
    feed = laws.cast(case.feed(4))
    handle = fallow.apply(model, fallow.rates.uniform(RATE), example=case.feed(2), seed=3, **WAYS[way])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compare(model, dense, case, feed, handle, torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("name", [n for n in ALL if n != ONTO_BRANCH])
def test_a_sum_at_rest_has_the_dtype_it_has_when_its_branch_runs(name: str) -> None:
    case = BY_NAME[name]
    for autocast in (False, True):
        model = case.model()
        seen: list[torch.dtype] = []
        for module in {s.module for s in case.sums}:
            model.get_submodule(module).register_forward_hook(
                lambda m, a, out, seen=seen: seen.append(laws.floats(out)[0].dtype)
            )
        handle = fallow.apply(model, fallow.rates.uniform(1e-9), example=case.feed(2))
        seen.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            rested, at_rest, depth = laws.call(model, case.feed(3)), list(seen), handle.last_depth
            seen.clear()
            with handle.dense():
                dense = laws.call(model, case.feed(3))
        assert depth == 0 and at_rest and at_rest == seen
        assert [t.dtype for t in laws.floats(rested)] == [t.dtype for t in laws.floats(dense)]


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_channels_last_stays_and_gives_the_same(name: str, way: str, rest: bool) -> None:
    case = BY_NAME[name]
    model, dense = laws.pair(case, torch.float64)
    model, dense = (m.to(memory_format=torch.channels_last) for m in (model, dense))
    feed = tuple(x.double().contiguous(memory_format=torch.channels_last) for x in case.feed(5))
    handle = fallow.apply(
        model,
        fallow.rates.uniform(1e-9 if rest and way == "batch" else RATE),
        example=feed,
        seed=3,
        **WAYS[way],
    )
    layouts: dict[str, bool] = {}
    for s in case.sums:
        model.get_submodule(s.module).register_forward_hook(
            lambda m, a, out, n=s.module: layouts.__setitem__(
                n, out.is_contiguous(memory_format=torch.channels_last)
            )
        )
    scale = 1e9 if rest and way == "batch" else 1 / RATE
    laws.assert_same_run(model, dense, case, feed, handle, 1e-6, scale)
    assert layouts and all(layouts.values())


def test_contiguous_stays_contiguous() -> None:
    case = BY_NAME["resnet20"]
    for way in WAYS.values():
        model = case.model()
        fallow.apply(model, fallow.rates.uniform(RATE), example=case.feed(2), **way)
        layouts: list[bool] = []
        for block in model.group1:
            block.register_forward_hook(lambda m, a, out, seen=layouts: seen.append(out.is_contiguous()))
        model(*case.feed(5))
        assert layouts and all(layouts)


def test_a_copy_of_the_model_follows_the_same_law() -> None:
    case = BY_NAME["two branches"]
    model, dense = laws.pair(case)
    feed = laws.cast(case.feed(5), torch.float64)
    fallow.apply(model, fallow.rates.uniform(RATE), example=feed, mode="row", sampler="exact")
    twin = copy.deepcopy(model)
    handle = fallow.handle_of(twin)
    assert handle is not fallow.handle_of(model)
    laws.assert_same_run(twin, dense, case, feed, handle, 1e-9, 1 / RATE)

"""Laws of the stochastic depth function and its Module."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fallow
from fallow import StochasticDepth, stochastic_depth

X = torch.linspace(-1, 1, 5 * 3, dtype=torch.float64).reshape(5, 3)
WAYS: dict[str, dict[str, Any]] = {
    "batch": {"mode": "batch"},
    "rows, independent": {"mode": "row"},
    "rows, window": {"mode": "row", "sampler": "exact"},
    "rows, scattered": {"mode": "row", "sampler": "exact", "rows": "scattered"},
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def branch(x: Tensor) -> Tensor:
    return torch.sin(3 * x) + 2


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@every_way
@pytest.mark.parametrize("scale", ["train", "eval"])
def test_evaluation_is_the_sum_with_the_branch_or_p_times_it(way: dict, scale: str) -> None:
    state = torch.get_rng_state()
    out = stochastic_depth(X, branch, survival_rate=0.3, training=False, scale=scale, **way)
    assert torch.equal(out, X + branch(X)) if scale == "train" else torch.allclose(out, X + 0.3 * branch(X))
    assert torch.equal(torch.get_rng_state(), state)


@every_way
@pytest.mark.parametrize("scale", ["train", "eval"])
@pytest.mark.parametrize("training", [True, False])
def test_rate_one_is_exactly_the_sum_and_draws_nothing(way: dict, scale: str, training: bool) -> None:
    state = torch.get_rng_state()
    out = stochastic_depth(X, branch, survival_rate=1, scale=scale, training=training, **way)
    assert torch.equal(out, X + branch(X))
    assert torch.equal(torch.get_rng_state(), state)


@every_way
@pytest.mark.parametrize("p", [0.25, 0.8])
def test_the_mean_is_the_dense_sum_and_the_variance_as_documented(way: dict, p: float) -> None:
    draws, noise = 4000, generator(3)
    outs = torch.stack(
        [stochastic_depth(X, branch, survival_rate=p, generator=noise, **way) for _ in range(draws)]
    )
    z = branch(X)
    variance = (1 - p) / p * z**2
    standard_error = (variance / draws).sqrt()
    assert ((outs.mean(0) - (X + z)).abs() < 4 * standard_error).all()
    # of a two-point variable that is z/p with probability p: its fourth central moment gives the error
    fourth = (z / p) ** 4 * (p * (1 - p) * ((1 - p) ** 3 + p**3))
    error = ((fourth - variance**2) / draws).sqrt()
    assert ((outs.var(0) - variance).abs() < 5 * error + variance / draws).all()


@every_way
def test_with_scale_eval_the_mean_in_training_is_what_evaluation_computes(way: dict) -> None:
    p, draws, noise = 0.4, 3000, generator(5)
    outs = [
        stochastic_depth(X, branch, survival_rate=p, generator=noise, scale="eval", **way)
        for _ in range(draws)
    ]
    z = branch(X)
    at_evaluation = stochastic_depth(X, branch, survival_rate=p, training=False, scale="eval", **way)
    error = (p * (1 - p) * z**2 / draws).sqrt()
    assert ((torch.stack(outs).mean(0) - at_evaluation).abs() < 4 * error).all()


@every_way
def test_rows_are_kept_whole_scaled_by_one_over_p_or_left_alone(way: dict) -> None:
    p, noise, z = 0.6, generator(1), branch(X)
    seen = set()
    for _ in range(50):
        out = stochastic_depth(X, branch, survival_rate=p, generator=noise, **way)
        kept = [bool(torch.allclose(o, x + b / p)) for o, x, b in zip(out, X, z, strict=True)]
        assert all(k or torch.equal(o, x) for k, o, x in zip(kept, out, X, strict=True))
        seen.add(tuple(kept))
        if way["mode"] == "batch":
            assert len(set(kept)) == 1
        if way.get("sampler") == "exact":
            assert sum(kept) == 3  # 0.6 of 5
    assert len(seen) == {"batch": 2}.get(way["mode"], len(seen)) and len(seen) > 1


@settings(deadline=None)
@given(st.integers(1, 9), st.floats(0.05, 0.95), st.sampled_from(["window", "scattered"]), st.integers(0, 99))
def test_exact_keeps_floor_or_ceil_of_p_b_rows(count: int, p: float, rows: str, seed: int) -> None:
    calls: list[int] = []

    def counting(x: Tensor) -> Tensor:
        calls.append(x.shape[0])
        return branch(x)

    options = {
        "survival_rate": p,
        "mode": "row",
        "sampler": "exact",
        "rows": rows,
        "generator": generator(seed),
    }
    out = stochastic_depth(torch.zeros(count, 2), counting, **options)
    kept = int((out != 0).all(1).sum())
    assert kept in (math.floor(p * count), math.ceil(p * count))
    assert calls == ([kept] if kept else [])


@every_way
def test_a_generator_reproduces_and_leaves_the_global_one_alone(way: dict) -> None:
    def run(noise: torch.Generator | None) -> Tensor:
        return torch.stack(
            [stochastic_depth(X, branch, survival_rate=0.5, generator=noise, **way) for _ in range(20)]
        )

    state = torch.get_rng_state()
    first = run(generator(7))
    assert torch.equal(first, run(generator(7))) and not torch.equal(first, run(generator(8)))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    default = run(None)
    assert not torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    assert torch.equal(default, run(None))


def test_a_branch_that_rests_is_not_called_and_x_comes_back() -> None:
    def never(x: Tensor) -> Tensor:
        raise AssertionError("called")

    for way in WAYS.values():
        assert stochastic_depth(X, never, survival_rate=1e-12, generator=generator(), **way) is X


def test_branch_modules_of_kept_rows_see_them_alone() -> None:
    module = StochasticDepth(nn.BatchNorm1d(3).double(), survival_rate=0.4, mode="row", sampler="exact")
    module.generator = generator(2)
    out = module(X)
    kept = (out != X).any(1)
    assert kept.sum() == 2
    mean = X[kept].mean(0)
    assert torch.allclose(module.branch.running_mean, 0.1 * mean)


@every_way
def test_gradients_are_those_of_the_masked_sum(way: dict) -> None:
    p, weight = 0.6, torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    for seed in range(6):
        x = X.clone().requires_grad_()
        out = stochastic_depth(
            x, lambda z: torch.tanh(z @ weight), survival_rate=p, generator=generator(seed), **way
        )
        kept = (out.detach() != X).any(1).double()[:, None]
        y = X.clone().requires_grad_()
        expected = y + kept / p * torch.tanh(y @ weight)
        seeds = torch.cos(torch.arange(15.0, dtype=torch.float64)).reshape(5, 3)
        ours = torch.autograd.grad(out, [x, weight], seeds, allow_unused=True, materialize_grads=True)
        theirs = torch.autograd.grad(expected, [y, weight], seeds)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a, b, atol=1e-12)


@every_way
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_and_layout_stay(way: dict, dtype: torch.dtype) -> None:
    x = torch.randn(6, 3, 4, 4).to(dtype).contiguous(memory_format=torch.channels_last)
    for seed in range(4):
        out = stochastic_depth(x, torch.sigmoid, survival_rate=0.5, generator=generator(seed), **way)
        assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
        assert torch.isfinite(out).all()


# --- the module --------------------------------------------------------------------------------------------


def test_the_module_is_the_function_with_its_parameters_below_branch() -> None:
    module = StochasticDepth(nn.Linear(3, 3).double(), survival_rate=0.5, mode="row", generator=generator(4))
    assert list(module.state_dict()) == ["branch.weight", "branch.bias"]
    expected = stochastic_depth(X, module.branch, survival_rate=0.5, mode="row", generator=generator(4))
    assert torch.equal(module(X), expected)
    assert torch.equal(module.eval()(X), X + module.branch(X))
    assert "survival_rate=0.5" in repr(module) and "mode='row'" in repr(module)


def test_the_module_copies_and_pickles() -> None:
    module = StochasticDepth(nn.Linear(3, 3).double(), survival_rate=0.5, scale="eval").eval()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(X), module(X))


# --- errors --------------------------------------------------------------------------------------------

calls = pytest.mark.parametrize(
    "call",
    [lambda **k: stochastic_depth(X, branch, **k), lambda **k: StochasticDepth(nn.Linear(3, 3), **k)],
    ids=["function", "module"],
)


@calls
@pytest.mark.parametrize(
    ("keyword", "value", "words"),
    [
        ("drop_prob", 0.1, r"takes survival_rate, not drop_prob: for drop_prob=0\.1 pass survival_rate=0\.9"),
        ("drop_path_rate", 0.2, r"survival_rate=0\.8"),
        ("keep_prob", 0.7, r"survival_rate=0\.7"),
        ("p", 0.1, r"(?=.*survival_rate=0\.9)(?=.*survival_rate=0\.1)"),
        ("survival_rates", 0.1, "survival_rate"),
        ("samplers", "exact", "sampler"),
    ],
)
def test_other_keywords_are_refused_with_the_conversion(
    call: Any, keyword: str, value: Any, words: str
) -> None:
    with pytest.raises(fallow.ArgumentError, match=words):
        call(**{keyword: value})


@calls
@pytest.mark.parametrize("p", [0, -0.1, 1.2, math.nan, True, "0.5"])
def test_rates_outside_the_interval_are_refused(call: Any, p: Any) -> None:
    with pytest.raises(fallow.RateError, match=r"\(0, 1\]"):
        call(survival_rate=p)


@calls
@pytest.mark.parametrize("option", ["mode", "sampler", "scale", "rows"])
def test_other_words_are_refused(call: Any, option: str) -> None:
    with pytest.raises(fallow.UsageError, match=f'{option} must be "'):
        call(survival_rate=0.5, **{option: "sample"})


@calls
def test_the_rate_is_needed(call: Any) -> None:
    with pytest.raises(fallow.ArgumentError, match="survival_rate"):
        call()


@pytest.mark.parametrize("x", [torch.tensor(1.0), torch.ones(3, 2, dtype=torch.int64)])
def test_what_has_no_rows_or_holds_integers_is_refused(x):
    with pytest.raises(fallow.UsageError, match=r"rows of real or complex numbers.*got torch"):
        fallow.stochastic_depth(x, lambda x: x, survival_rate=0.7, mode="row")

"""The masking form of stochastic depth: its law in every dtype, gradients, copies, refusals."""

from __future__ import annotations

import pickle
from itertools import pairwise

import pytest
import torch

from fallow.errors import ArgumentError, RateError, UsageError
from fallow.noise.drop_path import DropPath, drop_path


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("p", [0.9, 0.5, 0.1])
def test_the_realised_rate_is_the_asked_one_in_every_dtype(p, dtype):
    rows = 200_000
    y = drop_path(torch.ones(rows, 1, dtype=dtype), survival_rate=p, generator=seeded(1))
    share = float((y != 0).double().mean())
    assert abs(share - p) < 4 * (p * (1 - p) / rows) ** 0.5
    assert y.dtype == dtype and y.unique().tolist() == [0, float(torch.tensor(1 / p, dtype=dtype))]


def test_the_scale_is_rounded_once_in_half_precision():
    x = torch.randn(64, 100, generator=seeded(0)).bfloat16()
    y = drop_path(x, survival_rate=0.9, generator=seeded(1))
    kept = (y != 0).any(dim=1)
    assert torch.equal(y[kept], (x[kept].double() / 0.9).bfloat16())


def test_a_row_is_kept_or_dropped_whole_and_rows_are_independent():
    x = torch.rand(20_000, 2, 3) + 1
    kept = drop_path(x, survival_rate=0.7, generator=seeded(2)) != 0
    assert torch.equal(kept, kept[:, :1, :1].expand_as(kept))
    mask = kept[:, 0, 0].double()
    product = (mask[:-1] - 0.7) * (mask[1:] - 0.7)
    assert abs(float(product.mean())) < 4 * 0.21 / product.numel() ** 0.5


def test_batch_mode_draws_once_for_all_rows():
    g, x = seeded(3), torch.ones(5, 2)
    means = [
        float(drop_path(x, survival_rate=0.7, mode="batch", generator=g).mean()) * 0.7 for _ in range(4000)
    ]
    assert {round(m, 5) for m in means} == {0, 1}
    assert abs(sum(means) / 4000 - 0.7) < 4 * (0.21 / 4000) ** 0.5


def test_the_gradient_has_the_mask_of_the_forward():
    x = torch.rand(50, 3, requires_grad=True)
    y = drop_path(x, survival_rate=0.6, generator=seeded(4))
    y.sum().backward()
    assert torch.equal(x.grad != 0, y != 0)
    assert set(x.grad.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.6))}


def test_what_is_dropped_is_zero_whatever_it_was():
    x = torch.full((100, 2), float("inf"))
    y = drop_path(x, survival_rate=0.5, generator=seeded(5))
    assert set(y.unique().tolist()) == {0.0, float("inf")}


def test_nothing_is_drawn_at_evaluation_or_at_one():
    x, state = torch.rand(4, 2), torch.get_rng_state()
    assert DropPath(survival_rate=0.5).eval()(x) is x
    assert DropPath(survival_rate=1)(x) is x
    assert torch.equal(torch.get_rng_state(), state)


def test_torch_seeds_and_copies():
    x, module = torch.ones(64, 1), DropPath(survival_rate=0.5)
    runs = []
    for m in (module, module, pickle.loads(pickle.dumps(module))):
        torch.manual_seed(7)
        runs.append(m(x))
    assert all(torch.equal(a, b) for a, b in pairwise(runs))
    assert module.state_dict() == {}
    assert repr(module) == "DropPath(survival_rate=0.5, mode='row')"


def test_refusals_name_the_remedy():
    x = torch.ones(2, 2)
    with pytest.raises(ArgumentError, match="pass survival_rate=0.9"):
        DropPath(drop_prob=0.1)
    with pytest.raises(ArgumentError, match="needs survival_rate"):
        drop_path(x)
    with pytest.raises(RateError, match=r"in \(0, 1\]"):
        drop_path(x, survival_rate=0)
    with pytest.raises(UsageError, match='"row" or "batch"'):
        drop_path(x, survival_rate=0.5, mode="rows")
    for bad in (torch.ones(2, dtype=torch.long), torch.tensor(1.0)):
        with pytest.raises(UsageError, match="floating-point rows"):
            drop_path(bad, survival_rate=0.5)

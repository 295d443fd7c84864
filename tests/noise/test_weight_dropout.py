"""Weight dropout: the law of its masks, what it penalises, rates that follow the weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fallow.errors import ArgumentError, FallowError, RateError, RunError, UsageError
from fallow.noise import WeightDropout, weight_dropout, weight_dropout_

SIZE = 8


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(seed: int = 0, n: int = 30) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, targets, weights and rates of a linear regression, in double precision."""
    g = generator(seed)
    x, y = (torch.randn(n, size, generator=g, dtype=torch.float64) for size in (SIZE, 1))
    w = torch.randn(SIZE, generator=g, dtype=torch.float64)
    return x, y[:, 0], w, 0.2 + 0.7 * torch.rand(SIZE, generator=g, dtype=torch.float64)


def loss(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return (y - x @ w).square().mean() / 2


def tikhonov(x: Tensor, y: Tensor, w: Tensor, rates: Tensor) -> Tensor:
    """Equation (2) of the notes, with h the curvature."""
    return loss(x, y, w) + (x.square().mean(0) * w.square() * (1 - rates) / rates).sum() / 2


def drawing(monkeypatch: pytest.MonkeyPatch, kept: Tensor, rates: Tensor) -> None:
    """Let uniform draws keep just so: by the last number that keeps, or the first that does not."""
    draws = torch.where(kept, torch.nextafter(rates, 0 * rates), rates)
    monkeypatch.setattr(torch, "rand", lambda shape, **_: draws.expand(shape))


@pytest.mark.parametrize("shared", [False, True])
def test_the_expected_loss_over_all_masks_is_the_tikhonov_objective(
    monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    x, y, w, rates = problem()
    expected = torch.zeros((), dtype=torch.float64)
    for bits in itertools.product([False, True], repeat=SIZE):
        kept = torch.tensor(bits)
        with monkeypatch.context() as patch:
            drawing(patch, kept, rates)
            noisy = weight_dropout(w, rates, shared=shared)
        chance = torch.where(kept, rates, 1 - rates).prod()
        expected = expected + chance * loss(x, y, noisy)
    assert abs(float(expected - tikhonov(x, y, w, rates))) < 1e-12


def test_the_expected_loss_of_shared_masks_has_blocks_of_the_curvature(monkeypatch: Any) -> None:
    x, y, w, rates = problem(1)
    rates = rates[:2].unsqueeze(1)  # two groups of four
    expected = torch.zeros((), dtype=torch.float64)
    for bits in itertools.product([False, True], repeat=2):
        kept = torch.tensor(bits).unsqueeze(1)
        with monkeypatch.context() as patch:
            drawing(patch, kept, rates)
            noisy = weight_dropout(w.view(2, 4), rates, shared=True).reshape(-1)
        expected = expected + torch.where(kept, rates, 1 - rates).prod() * loss(x, y, noisy)
    curvature = x.T @ x / len(x)
    penalty = sum(
        float((1 - rates[g, 0]) / rates[g, 0] * w[part] @ curvature[part, part] @ w[part]) / 2
        for g, part in enumerate((slice(0, 4), slice(4, 8)))
    )
    assert abs(float(expected - loss(x, y, w)) - penalty) < 1e-12


@pytest.mark.parametrize("kind", ["bernoulli", "gaussian"])
def test_the_expected_gradient_is_that_of_the_tikhonov_objective(kind: str) -> None:
    x, y, w, rates = problem(2)
    layer = nn.Linear(SIZE, 1, bias=False).double()
    layer.weight.data = w.unsqueeze(0).clone()
    weight_dropout_(layer, rates, kind=kind, generator=generator(3))
    draws = []
    for _ in range(2000):
        layer.zero_grad()
        ((layer(x)[:, 0] - y).square().mean() / 2).backward()
        draws.append(layer.weight.grad[0])
    found = torch.stack(draws)
    w.requires_grad_()
    tikhonov(x, y, w, rates).backward()
    error = found.std(0) / math.sqrt(len(found))
    assert bool(((found.mean(0) - w.grad).abs() < 5 * error).all())


@pytest.mark.parametrize("kind", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_noise_has_mean_one_and_the_variance_of_its_rate(kind: str, dtype: torch.dtype) -> None:
    rates = torch.tensor([[0.2], [0.7], [1.0], [0.0]])
    count = 40000
    found = weight_dropout(torch.ones(4, count, dtype=dtype), rates, kind=kind, generator=generator(1))
    assert found.dtype == dtype
    s = found.double()
    variance = (1 - rates) / rates
    for row, var in zip(s[:2], variance[:2].double(), strict=True):
        rounding = 2**-9 if dtype == torch.bfloat16 else 0.0
        assert abs(float(row.mean()) - 1) < 5 * float(var / count) ** 0.5 + rounding
        squares = (row - 1).square()
        assert abs(float(squares.mean() - var)) < 5 * float(squares.std()) / count**0.5 + 5 * rounding
    assert set(s[2].tolist()) == {1.0} and set(s[3].tolist()) == {0.0}


def test_shared_draws_make_groups_live_and_die_as_a_whole() -> None:
    rates = torch.full((500, 1, 1), 0.5)
    found = weight_dropout(torch.ones(500, 2, 3), rates, shared=True, generator=generator())
    per_group = found.flatten(1)
    assert bool((per_group == per_group[:, :1]).all())
    alive = float((per_group[:, 0] > 0).double().mean())
    assert abs(alive - 0.5) < 5 * (0.25 / 500) ** 0.5
    apart = weight_dropout(torch.ones(500, 2, 3), rates, generator=generator()).flatten(1)
    assert not bool((apart == apart[:, :1]).all())


def test_no_gradient_goes_through_the_rates() -> None:
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    logits = torch.zeros(2, requires_grad=True)
    for kind in ("bernoulli", "gaussian"):
        out = weight_dropout(weight, torch.sigmoid(logits), kind=kind).square().sum()
        assert torch.autograd.grad(out, logits, allow_unused=True) == (None,)
    layer = nn.Linear(2, 1)
    drop = weight_dropout_(layer, torch.sigmoid(logits))
    out = layer(torch.ones(2)).sum()
    assert torch.autograd.grad(out, logits, allow_unused=True) == (None,)
    drop.update(lambda w: layer.weight.abs()[0] * (w + 2), 1.0)
    assert not any(rates.requires_grad for rates in drop.rates.values())


def test_the_slope_at_rates_that_follow_the_weight_is_that_of_the_penalty() -> None:
    """1/3 for LogSum(2) at w = 1; through the rates it would be 1/9: notes, 1.4 (iii)."""
    layer = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(layer.weight)
    drop = weight_dropout_(layer, generator=generator(5))
    drop.update(lambda w: w * (w + 2), strength=1.0)
    assert drop.rates["weight"].tolist() == [[0.75]]
    x = torch.ones(1, 1, dtype=torch.float64)  # loss w^2 / 2 beside which h = 1
    grads = []
    for _ in range(6000):
        layer.zero_grad()
        (layer(x).square() / 2).sum().backward()
        grads.append(float(layer.weight.grad))
    found = torch.tensor(grads, dtype=torch.float64)
    slope, error = float(found.mean()) - 1, float(found.std()) / math.sqrt(len(found))
    assert abs(slope - 1 / 3) < 5 * error < abs(slope - 1 / 9)


def test_adaptive_rates_lead_to_the_reweighted_ridge_solution() -> None:
    """Their stationary point is that of LogSum: found here by alternating ridge and eta."""
    x, y, _, _ = problem(4, 200)
    lam, eps = 0.1, 0.5
    gram, right = x.T @ x / len(x), x.T @ y / len(x)
    h = x.square().mean(0)
    w = torch.linalg.solve(gram, right)
    for _ in range(500):
        eta = w.abs() * (w.abs() + eps)
        root = (eta / h).sqrt()
        w = root * torch.linalg.solve(
            root[:, None] * gram * root + lam * torch.eye(SIZE, dtype=x.dtype), root * right
        )
    layer = nn.Linear(SIZE, 1, bias=False).double()
    layer.weight.data = torch.linalg.solve(gram, right).unsqueeze(0)
    drop = weight_dropout_(layer, kind="gaussian", generator=generator(6))
    total, count = torch.zeros(SIZE, dtype=x.dtype), 0
    for step in range(3000):
        drop.update(lambda w: w * (w + eps), lam)
        layer.zero_grad()
        ((layer(x)[:, 0] - y).square().mean() / 2).backward()
        with torch.no_grad():
            layer.weight -= 0.02 * layer.weight.grad
        if step >= 1000:
            total, count = total + layer.weight.detach()[0], count + 1
    assert bool(((total / count - w).abs() < 0.02).all())


def test_updated_rates_of_groups_come_from_root_mean_squares() -> None:
    layer = nn.Conv2d(3, 4, 2)
    drop = weight_dropout_(layer, torch.ones(4, 1, 1, 1), shared=True)
    drop.update(lambda n: n.square(), 0.5)
    square = layer.weight.detach().square().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(drop.rates["weight"], square / (square + 0.5))
    drop.update(lambda n: torch.full_like(n, torch.inf), 0.5)
    assert set(drop.rates["weight"].flatten().tolist()) == {1.0}
    drop.update(torch.zeros_like, 0.0)
    assert set(drop.rates["weight"].flatten().tolist()) == {1.0}
    drop.update(torch.zeros_like, 0.1)
    assert set(drop.rates["weight"].flatten().tolist()) == {0.0}
    x = torch.randn(2, 3, 4, 4)
    assert not bool((layer.eval()(x) - layer.bias[:, None, None]).any())


def test_one_rate_is_one_for_each_weight_unless_its_draw_is_shared() -> None:
    layer = nn.Linear(50, 60)
    drop = weight_dropout_(layer, 0.5)
    assert drop.rates["weight"].shape == (60, 50)
    drop.remove()
    drop = weight_dropout_(layer, 0.5, shared=True)
    assert drop.rates["weight"].shape == ()
    seen = {bool((layer(torch.eye(50)) - layer.bias).any()) for _ in range(30)}
    assert seen == {True, False}


def test_rates_are_set_by_name_and_a_refused_setting_changes_none() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    drop = weight_dropout_(model, {"0.weight": 0.5, "2.weight": torch.full((2, 1), 0.25)})
    assert {k: v.unique().tolist() for k, v in drop.rates.items()} == {"0.weight": [0.5], "2.weight": [0.25]}
    with pytest.raises(RateError, match=r"2.weight: survival rates must be in \[0, 1\], got 1.5"):
        drop.rates = {"0.weight": 0.9, "2.weight": 1.5}
    assert drop.rates["0.weight"].unique().tolist() == [0.5]
    drop.rates = 0.75
    assert [v.unique().tolist() for v in drop.rates.values()] == [[0.75], [0.75]]


def test_hardening_cuts_what_is_hardly_kept_and_leaves_the_plain_module() -> None:
    layer = nn.Linear(2, 2)
    before = layer.weight.detach().clone()
    drop = weight_dropout_(layer, torch.tensor([[0.04, 0.05], [0.0, 1.0]]))
    masks = drop.harden()
    assert masks["weight"].tolist() == [[False, True], [False, True]]
    assert torch.equal(layer.weight, before * masks["weight"])
    assert WeightDropout.of(layer) is None and not layer._forward_pre_hooks


def nan_eta(w: Tensor) -> Tensor:
    return w - 2


def with_nan() -> WeightDropout:
    layer = nn.Linear(3, 4)
    drop = weight_dropout_(layer)
    layer.weight.data[1, 1] = math.nan
    return drop


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: weight_dropout_(nn.Linear(3, 4), 1.5), RateError, r"in \[0, 1\], got 1.5"),
        (lambda: weight_dropout_(nn.Linear(3, 4), math.nan), RateError, "got nan"),
        (lambda: weight_dropout_(nn.Linear(3, 4), -0.1), RateError, "got -0.1"),
        (lambda: weight_dropout_(nn.Linear(3, 4), torch.ones(4)), RateError, r"broadcast with \[4, 3\]"),
        (lambda: weight_dropout_(nn.Linear(3, 4), "half"), RateError, "a number or a tensor, got 'half'"),
        (lambda: weight_dropout_(nn.Linear(3, 4), {"bias": 0.5}), RateError, "no weight 'bias'"),
        (lambda: weight_dropout_(nn.Linear(3, 4), p=0.1), ArgumentError, "takes rates, not p"),
        (lambda: weight_dropout_(nn.Linear(3, 4), kind="cauchy"), UsageError, "kind must be"),
        (lambda: weight_dropout(torch.ones(2), 0.5, kind="normal"), UsageError, "kind must be"),
        (lambda: weight_dropout(torch.ones(2), 2.0), RateError, "got 2"),
        (lambda: weight_dropout_(nn.Linear(3, 4)).update(nan_eta, 1.0), UsageError, "negative or NaN"),
        (lambda: weight_dropout_(nn.Linear(3, 4)).update(lambda w: 1.0, 1.0), ArgumentError, "a tensor"),
        (lambda: weight_dropout_(nn.Linear(3, 4)).update(torch.exp, -1.0), UsageError, "strength must be"),
        (lambda: with_nan().update(torch.exp, 1.0), RunError, "no rate was changed"),
        (lambda: with_nan().harden(), RunError, "nothing was changed"),
    ],
)
def test_wrong_use_is_refused_in_words(call: Callable[[], Any], error: type[FallowError], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


def test_a_refused_call_leaves_no_noise() -> None:
    layer = nn.Linear(3, 4)
    before = set(layer.__dict__)
    with pytest.raises(RateError):
        weight_dropout_(layer, 7.0)
    assert set(layer.__dict__) == before and not layer._forward_pre_hooks

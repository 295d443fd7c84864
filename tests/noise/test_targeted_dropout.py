"""Targeted dropout: what is targeted, the law of the masks, ramps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from fallow import penalties
from fallow.errors import ArgumentError, FallowError, RateError, UsageError
from fallow.noise import TargetedDropout, targeted_dropout, targeted_dropout_


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def naive(weight: Tensor, share: float, groups: str) -> list[tuple[int, int]]:
    """Row and column of what is targeted, by sorting."""
    rows = weight.flatten(1).tolist()
    if groups == "outputs":
        norms = sorted(range(len(rows)), key=lambda i: math.hypot(*rows[i]))
        chosen = norms[: math.floor(share * len(rows) + 1e-9)]
        return [(i, j) for i in chosen for j in range(len(rows[0]))]
    count = math.floor(share * len(rows[0]) + 1e-9)
    order = [sorted(range(len(row)), key=lambda j: abs(row[j])) for row in rows]  # noqa: B023
    return [(i, j) for i, columns in enumerate(order) for j in columns[:count]]


@pytest.mark.parametrize("groups", ["weights", "outputs"])
@pytest.mark.parametrize("share", [0.0, 0.29, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(10, 100), (100, 4, 5, 1)])
def test_at_evaluation_the_smallest_are_zero(shape: tuple[int, ...], share: float, groups: str) -> None:
    weight = torch.randn(shape, generator=generator())
    out = targeted_dropout(weight, share, survival_rate=0.3, groups=groups, training=False)
    expected = weight.flatten(1).clone()
    for i, j in naive(weight, share, groups):
        expected[i, j] = 0
    assert torch.equal(out.flatten(1), expected)


@pytest.mark.parametrize("groups", ["weights", "outputs"])
def test_in_training_what_is_targeted_survives_at_its_rate_and_unscaled(groups: str) -> None:
    weight, p, count = torch.randn(40, 50, generator=generator()), 0.3, 200
    where = torch.zeros(40, 50, dtype=torch.bool)
    for i, j in naive(weight, 0.5, groups):
        where[i, j] = True
    noise, alive = generator(1), []
    for _ in range(count):
        out = targeted_dropout(weight, 0.5, survival_rate=p, groups=groups, generator=noise)
        assert torch.equal(out[~where], weight[~where])
        assert bool(((out == weight) | (out == 0))[where].all())
        if groups == "outputs":  # a row dies as a whole
            rows = (out != 0)[where.any(1)]
            assert bool((rows == rows[:, :1]).all())
            alive.append(rows[:, 0].double().mean())
        else:
            alive.append((out != 0)[where].double().mean())
    draws = 20 if groups == "outputs" else 1000
    assert abs(float(torch.stack(alive).mean()) - p) < 5 * math.sqrt(p * (1 - p) / (draws * count))


def test_the_expected_loss_over_all_masks_is_the_trimmed_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    """At expected weights, and with the penalty's own computation beside it where the curvature is 1."""
    k, p, u = 5, 0.3, torch.randn(1, 8, generator=generator(2)).double()
    x = torch.linalg.qr(torch.randn(20, 8, generator=generator(3)).double())[0] * math.sqrt(20)  # h = 1
    y = torch.randn(20, generator=generator(4)).double()

    def loss(w: Tensor) -> Tensor:
        return (linear(x, w)[:, 0] - y).square().mean() / 2

    chosen = sorted(j for _, j in naive(u, k / 8, "weights"))
    expected, mean = torch.zeros((), dtype=torch.float64), u.clone()
    mean[0, chosen] *= p
    for bits in itertools.product([False, True], repeat=k):
        draws = torch.ones(1, 8, dtype=torch.float64)
        draws[0, chosen] = p - 1e-9 * torch.tensor(bits, dtype=torch.float64)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda *_, **__: draws)  # noqa: B023
            noisy = targeted_dropout(u, k / 8, survival_rate=p)
        expected = expected + math.prod(p if kept else 1 - p for kept in bits) * loss(noisy)
    penalty = penalties.Targeted(k, survival_rate=p)
    assert torch.equal(penalty.survival_rate(u, 1.0) < 1, mean != u)
    ridge = (1 - p) / (2 * p) * mean[0, chosen].square().sum()
    assert abs(float(expected - loss(mean) - ridge)) < 1e-12


def test_a_model_drops_while_training_and_is_cut_at_evaluation() -> None:
    layer = nn.Conv2d(3, 8, 2)
    twin = layer.weight.detach().clone()
    handle = targeted_dropout_(layer, 0.5, survival_rate=0.4, generator=generator(5))
    x = torch.randn(2, 3, 5, 5)
    noisy = targeted_dropout(twin, 0.5, survival_rate=0.4, generator=generator(5))
    assert torch.equal(layer(x), conv2d(x, noisy, layer.bias))
    cut = targeted_dropout(twin, 0.5, survival_rate=0.4, training=False)
    layer.eval()
    assert torch.equal(layer(x), conv2d(x, cut, layer.bias))
    rates = handle.survival_rates()["weight"]
    assert torch.equal(rates, torch.where(cut == 0, 0.4, 1.0))
    handle.harden()
    assert torch.equal(layer.weight, cut) and TargetedDropout.of(layer) is None


def test_the_ramp_is_that_of_the_published_code() -> None:
    layer = nn.Linear(10, 4)
    handle = targeted_dropout_(layer, 0.5, survival_rate=0.2, ramp_steps=40_000)
    for step, share, drop in [(0, 0.0, 0.0), (10_000, 0.2375, 0.2), (20_000, 0.475, 0.4), (40_000, 0.5, 0.8)]:
        handle.step(step)
        assert math.isclose(handle.share, share, abs_tol=1e-12)
        assert math.isclose(1 - handle.survival_rate, drop, abs_tol=1e-12)
    handle.step()
    assert handle.time == 40_001 and handle.share == 0.5
    handle.step(0)
    x = torch.randn(3, 10)
    assert torch.equal(layer(x), linear(x, layer.weight, layer.bias))


def test_share_and_rate_may_be_set() -> None:
    layer = nn.Linear(10, 4)
    handle = targeted_dropout_(layer, 0.5, survival_rate=0.2)
    handle.share, handle.survival_rate = 0.9, 0.0
    x = torch.eye(10)
    assert int(((layer(x) - layer.bias) != 0).sum()) == 4  # one of ten in each row, in training too
    with pytest.raises(RateError):
        handle.survival_rate = 2.0
    with pytest.raises(UsageError):
        handle.share = -0.5
    assert (handle.share, handle.survival_rate) == (0.9, 0.0)


def test_dropped_weights_get_no_gradient_and_the_others_theirs() -> None:
    weight = torch.randn(3, 4, requires_grad=True)
    out = targeted_dropout(weight, 0.5, survival_rate=0.0)
    out.sum().backward()
    assert torch.equal(weight.grad, (out != 0).float())


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: targeted_dropout_(nn.Linear(3, 4), 0.5), RateError, "a number or a tensor, got None"),
        (lambda: targeted_dropout_(nn.Linear(3, 4), 0.5, p=0.3), ArgumentError, "takes survival_rate"),
        (lambda: targeted_dropout_(nn.Linear(3, 4), 0.5, survival_rate=1.2), RateError, r"in \[0, 1\]"),
        (lambda: targeted_dropout_(nn.Linear(3, 4), 1.5, survival_rate=0.2), UsageError, "share must be"),
        (
            lambda: targeted_dropout_(nn.Linear(3, 4), 0.5, survival_rate=0.2, ramp_steps=-1),
            UsageError,
            "ramp_steps must be",
        ),
        (
            lambda: targeted_dropout_(nn.Linear(3, 4), 0.5, survival_rate=0.2, groups="inputs"),
            UsageError,
            "groups must be",
        ),
        (
            lambda: targeted_dropout_(nn.ConvTranspose1d(3, 4, 2), 0.5, survival_rate=0.2),
            UsageError,
            "no rows for outputs",
        ),
    ],
)
def test_wrong_use_is_refused_in_words(call: Callable[[], Any], error: type[FallowError], words: str) -> None:
    with pytest.raises(error, match=words):
        call()

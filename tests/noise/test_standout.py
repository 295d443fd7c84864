"""Standout: keep probabilities that follow activations, at the layer or behind its non-linearity."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fallow import penalties
from fallow.errors import ArgumentError, FallowError, RunError, UsageError
from fallow.noise import StandoutNoise, standout, standout_, weight_dropout_


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("kappa", "beta"), [(1.0, 0.0), (3.0, -1.0), (0.0, 0.5)])
def test_units_survive_with_the_probability_of_their_activation(kappa: float, beta: float) -> None:
    belief = torch.tensor([-2.0, -0.5, 0.0, 1.0, 3.0], dtype=torch.float64)
    count = 20000
    x = torch.full((count, 5), 2.0, dtype=torch.float64)
    out = standout(x, belief.expand(count, 5), kappa=kappa, beta=beta, generator=generator())
    assert set(out.unique().tolist()) == {0.0, 2.0}  # no scale
    rates = torch.sigmoid(kappa * belief + beta)
    error = (rates * (1 - rates) / count).sqrt()
    assert bool((((out > 0).double().mean(0) - rates).abs() < 5 * error).all())
    expected = standout(x, belief.expand(count, 5), kappa=kappa, beta=beta, training=False)
    torch.testing.assert_close(expected, x * rates)


def test_no_gradient_goes_through_the_belief() -> None:
    x, belief = (torch.randn(3, requires_grad=True) for _ in range(2))
    for training in (True, False):
        out = standout(x, belief, training=training).sum()
        gradient, none = torch.autograd.grad(out, (x, belief), allow_unused=True)
        assert none is None and gradient.shape == (3,)


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(4, 6), lambda: nn.Conv1d(4, 6, 1)], ids=["linear", "conv"]
)
def test_a_layer_decides_about_its_own_units(make: Callable[[], nn.Module]) -> None:
    layer = make()
    x = torch.randn((5, 4) if isinstance(layer, nn.Linear) else (5, 4, 3))
    plain = layer(x).detach()
    handle = standout_(layer, kappa=2.0, beta=0.5, generator=generator(1))
    assert torch.equal(layer(x), standout(plain, plain, kappa=2.0, beta=0.5, generator=generator(1)))
    layer.eval()
    torch.testing.assert_close(layer(x), plain * torch.sigmoid(2 * plain + 0.5))
    handle.kappa, handle.beta = 0.0, 40.0
    assert torch.equal(layer(x), plain)


def test_units_are_masked_behind_the_non_linearity_by_what_was_before_it() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Identity())
    x = torch.randn(5, 4)
    before = model[0](x).detach()
    handle = standout_(model[0], at=model[1], generator=generator(2))
    expected = standout(torch.sigmoid(before), before, generator=generator(2))
    assert torch.equal(model(x), expected)
    handle.remove()
    assert torch.equal(model(x), torch.sigmoid(before))
    assert not model[1]._forward_hooks and not model[0]._forward_hooks


def test_in_front_of_relu_it_is_the_same() -> None:
    layer, relu, x = nn.Linear(4, 6), nn.ReLU(), torch.randn(5, 4)
    handle = standout_(layer, generator=generator(3))
    one = relu(layer(x))
    handle.remove()
    standout_(layer, at=relu, generator=generator(3))
    assert torch.equal(relu(layer(x)), one)


def test_noise_on_the_weights_goes_along() -> None:
    layer = nn.Linear(4, 6)
    weights = weight_dropout_(layer, 0.5)
    units = standout_(layer)
    assert weights.names == ["weight"] and not torch.equal(layer(torch.ones(1, 4)), layer(torch.ones(1, 4)))
    assert list(units.plain_state_dict()) == ["weight", "bias"]
    weights.remove()
    assert StandoutNoise.of(layer) is not None


def test_weights_with_the_strategy_of_standout_survive_at_its_rates() -> None:
    layer = nn.Linear(4, 6)
    weights = weight_dropout_(layer)
    weights.update(penalties.Standout(kappa=2.0, beta=-1.0).eta, strength=1.0)
    expected = torch.sigmoid(2 * layer.weight.detach().abs() - 1)
    torch.testing.assert_close(weights.rates["weight"], expected)


def orphan() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    standout_(model[0], at=model[1])
    model[1](torch.ones(2, 3))


def twice() -> None:
    layer = nn.Linear(3, 3)
    standout_(layer)
    standout_(layer)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: standout_(nn.Sequential()), ArgumentError, "one by one"),
        (lambda: standout_(nn.Linear(3, 4), at=torch.relu), ArgumentError, "at must be a module"),
        (lambda: standout_(nn.Linear(3, 4), kappa=-1.0), UsageError, "kappa must be"),
        (lambda: standout_(nn.Linear(3, 4), beta=math.nan), UsageError, "beta must be a finite"),
        (lambda: standout(torch.ones(2), torch.ones(3)), UsageError, "a belief for each unit"),
        (lambda: standout(2.0, torch.ones(3)), ArgumentError, "takes tensors"),
        (lambda: standout_(nn.Linear(3, 4)).harden(), UsageError, r"use remove\(\)"),
        (lambda: standout_(nn.Linear(3, 4)).survival_rates(), UsageError, "follow the input"),
        (orphan, RunError, "ReLU, where standout drops, ran without Linear before it"),
        (twice, UsageError, "Linear has StandoutNoise already"),
    ],
)
def test_wrong_use_is_refused_in_words(call: Callable[[], Any], error: type[FallowError], words: str) -> None:
    with pytest.raises(error, match=words):
        call()

"""Hard concrete gates: their law, their gradient, what they cost, groups and bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fallow.errors import ArgumentError, FallowError, RateError, UsageError
from fallow.noise import HardConcreteGates, hard_concrete_, hard_concrete_gate, open_probability
from fallow.penalties.hard_concrete import gate_moments

COUNT = 100_000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(log_a: float, count: int = COUNT) -> Tensor:
    return hard_concrete_gate(torch.full((count,), log_a, dtype=torch.float64), generator=generator(1))


def near(samples: Tensor, expected: float) -> None:
    assert abs(float(samples.mean()) - expected) < 5 * float(samples.std()) / math.sqrt(len(samples))


def test_a_gate_in_the_middle_has_the_law_of_the_notes() -> None:
    s = drawn(0.0)
    for samples, expected in (
        ((s == 0).double(), 0.168178),
        ((s == 1).double(), 0.168178),
        (s, 0.5),
        (s.square(), 0.398018),
    ):
        near(samples, expected)


@pytest.mark.parametrize("log_a", [-4.0, -1.5, 0.7, 4.0])
def test_gates_have_the_moments_that_the_penalty_counts_with(log_a: float) -> None:
    """By quadrature on the other side, which knows nothing of the draws."""
    opened, mean, square = (float(m) for m in gate_moments(torch.tensor(log_a, dtype=torch.float64)))
    s = drawn(log_a)
    near((s > 0).double(), opened)
    near(s, mean)
    near(s.square(), square)
    assert math.isclose(
        float(open_probability(torch.tensor(log_a, dtype=torch.float64))), opened, rel_tol=1e-12
    )


@pytest.mark.parametrize("log_a", [-2.0, 0.0, 1.0])
def test_the_expected_gradient_is_that_of_the_expected_gate(log_a: float) -> None:
    location = torch.full((COUNT,), log_a, dtype=torch.float64, requires_grad=True)
    hard_concrete_gate(location, generator=generator(2)).sum().backward()
    step = 1e-4
    ends = [gate_moments(torch.tensor(log_a + side * step, dtype=torch.float64))[1] for side in (1, -1)]
    assert location.grad is not None
    near(location.grad, float(ends[0] - ends[1]) / (2 * step))


def test_draws_are_differentiable_where_gates_are_neither_open_nor_shut() -> None:
    noise = generator()

    def gate(log_a: Tensor) -> Tensor:
        return hard_concrete_gate(log_a, generator=noise.manual_seed(3))

    log_a = torch.linspace(-2, 2, 20, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(gate, (log_a,))
    assert torch.autograd.gradcheck(open_probability, (log_a,))


def test_the_gate_of_the_test_is_that_of_the_paper() -> None:
    log_a = torch.linspace(-4, 4, 41, dtype=torch.float64)
    found = hard_concrete_gate(log_a, training=False)
    expected = [min(max(1.2 / (1 + math.exp(-a)) - 0.1, 0.0), 1.0) for a in log_a.tolist()]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


SHAPES = {
    "weights": ((4, 3, 2), 24, 1),
    "outputs": ((4, 1, 1), 4, 6),
    "inputs": ((1, 3, 1), 3, 8),
}


@pytest.mark.parametrize("groups", SHAPES)
def test_groups_have_one_gate_each(groups: str) -> None:
    shape, count, members = SHAPES[groups]
    layer = nn.Conv1d(3, 4, 2, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    handle = hard_concrete_(layer, groups=groups, generator=generator())
    assert tuple(layer.weight_log_a.shape) == shape
    layer.weight_log_a.data.zero_()
    expected = count * members * 0.8318220
    assert math.isclose(float(handle.expected_l0().detach()), expected, rel_tol=1e-6)
    inside = layer(torch.eye(6).view(6, 3, 2)).squeeze(-1).T  # its effective weights
    flat = inside.reshape(4, 3, 2)
    first = flat[tuple(slice(0, 1) if size == 1 else slice(None) for size in shape)]
    assert torch.equal(flat, first.expand_as(flat)) and len(first.unique()) > 1


def test_the_penalty_counts_weights_and_their_squares_behind_open_gates() -> None:
    layer = nn.Linear(3, 2).double()
    handle = hard_concrete_(layer, groups="inputs")
    with torch.no_grad():
        layer.weight_log_a.copy_(torch.tensor([[-3.0, 0.0, 2.0]]))
    c = open_probability(layer.weight_log_a)[0]
    expected = (c * (0.3 * 2 + 0.05 / 2 * layer.weight.square().sum(0))).sum()
    torch.testing.assert_close(handle.penalty(0.3, weight_decay=0.05), expected)
    assert torch.autograd.gradcheck(lambda *_: handle.penalty(0.3, 0.05), (layer.weight, layer.weight_log_a))


def test_the_expected_loss_is_that_of_unscaled_masks() -> None:
    """Notes 1.1 and 6(b): the loss at mean gates plus half the curvature times the squares' variances."""
    x = torch.randn(20, 4, generator=generator(1)).double()
    y = torch.randn(20, generator=generator(2)).double()
    layer = nn.Linear(4, 1, bias=False).double()
    hard_concrete_(layer, generator=generator(3))
    layer.weight_log_a.data.copy_(torch.tensor([[-2.0, -0.5, 0.5, 3.0]]))
    _, mean, square = gate_moments(layer.weight_log_a.detach())
    u = layer.weight.detach()
    expected = (linear(x, mean * u)[:, 0] - y).square().mean() / 2
    expected = expected + (x.square().mean(0) * u.square() * (square - mean.square())).sum() / 2
    with torch.no_grad():
        losses = torch.stack([(layer(x)[:, 0] - y).square().mean() / 2 for _ in range(3000)])
    near(losses, float(expected))


def test_locations_stay_in_their_bounds_and_come_back() -> None:
    layer = nn.Linear(2, 2)
    handle = hard_concrete_(layer)
    layer.weight_log_a.data.copy_(torch.tensor([[-50.0, 50.0], [0.0, 1.0]]))
    first, second = layer(torch.ones(1, 2)), layer(torch.ones(1, 2))  # two forwards before one backward
    bound = math.log(100)
    torch.testing.assert_close(layer.weight_log_a[0].detach(), torch.tensor([-bound, bound]))
    (first.sum() + second.sum() + handle.penalty(1.0)).backward()
    assert bool((layer.weight_log_a.grad != 0).all())  # the penalty's, also at the bounds


def test_evaluation_is_the_gate_of_the_test_and_hardening_makes_it_the_weight() -> None:
    layer = nn.Linear(3, 1)
    before = layer.weight.detach().clone()
    handle = hard_concrete_(layer)
    layer.weight_log_a.data.copy_(torch.tensor([[-3.0, 0.0, 3.0]]))
    expected = before * torch.tensor([[0.0, 0.5, 1.0]])
    x = torch.randn(5, 3)
    layer.eval()
    torch.testing.assert_close(layer(x), linear(x, expected, layer.bias))
    torch.testing.assert_close(handle.gates()["weight"], torch.tensor([[0.0, 0.5, 1.0]]))
    masks = handle.harden()
    assert masks["weight"].tolist() == [[False, True, True]]
    torch.testing.assert_close(layer.weight.detach(), expected)
    assert HardConcreteGates.of(layer) is None and list(layer.state_dict()) == ["weight", "bias"]


def test_gates_begin_at_the_asked_location() -> None:
    layer = nn.Linear(50, 60)
    hard_concrete_(layer, survival_rate=0.8, generator=generator())
    found = layer.weight_log_a.detach()
    assert abs(float(found.mean()) - math.log(4)) < 5 * 0.01 / math.sqrt(3000)
    assert 0.009 < float(found.std()) < 0.011


def test_training_with_the_penalty_shuts_the_gates_that_do_not_matter() -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 6)
    y = 2 * x[:, :1] - 3 * x[:, 1:2] + 0.1 * torch.randn(300, 1)
    layer = nn.Linear(6, 1)
    handle = hard_concrete_(layer, survival_rate=0.9)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.05)
    for _ in range(500):
        optimiser.zero_grad()
        ((layer(x) - y).square().mean() + handle.penalty(0.05)).backward()
        optimiser.step()
    assert handle.harden()["weight"].tolist() == [[True, True, False, False, False, False]]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: hard_concrete_(nn.Linear(3, 4), survival_rate=1.0), UsageError, "to be learned"),
        (lambda: hard_concrete_(nn.Linear(3, 4), survival_rate=0.0), RateError, "survival_rate"),
        (lambda: hard_concrete_(nn.Linear(3, 4), drop_prob=0.5), ArgumentError, "survival_rate=0.5"),
        (lambda: hard_concrete_(nn.Linear(3, 4), groups="heads"), UsageError, "groups must be"),
        (lambda: hard_concrete_(nn.ConvTranspose1d(3, 4, 2), groups="outputs"), UsageError, "no rows"),
        (lambda: hard_concrete_(nn.Conv1d(4, 4, 2, groups=2), groups="inputs"), UsageError, "in groups"),
        (lambda: hard_concrete_(nn.Linear(3, 4)).penalty(-1.0), UsageError, "strength must be"),
        (lambda: hard_concrete_gate(torch.ones(2, dtype=torch.long)), ArgumentError, "floating-point"),
    ],
)
def test_wrong_use_is_refused_in_words(call: Callable[[], Any], error: type[FallowError], words: str) -> None:
    with pytest.raises(error, match=words):
        call()

"""Rates over time, and a run that is resumed: the same masks and scales as the uninterrupted one."""

from __future__ import annotations

import io
import json
from contextlib import nullcontext

import pytest
import torch
from kit import Net, kept, net, numbered, watched
from torch.optim import SGD

import fallow
from fallow import schedules

MODES = [
    {"mode": "batch"},
    {"mode": "batch", "sampler": "exact"},
    {"mode": "row"},
    {"mode": "row", "sampler": "exact"},
]


@pytest.mark.parametrize("options", MODES, ids=str)
def test_warm_up_and_decay_follow_the_steps_that_are_set(options):
    for schedule, ends in ((schedules.warmup(10), (1.0, 0.4)), (schedules.decay(10), (0.4, 1.0))):
        _, handle = net(rates=0.4, schedule=schedule, **options)
        for n in (0, 3, 10, 25):
            handle.step(n)
            assert handle.time == n
            assert set(handle.current_rates.values()) == {schedules.rate_at(0.4, schedule, n)}
        handle.step(0)
        assert list(handle.current_rates.values()) == [ends[0]] * 4
        handle.step(10)
        assert list(handle.current_rates.values()) == pytest.approx([ends[1]] * 4)
        assert set(handle.rates.values()) == {0.4}, "what was asked stays"


@pytest.mark.parametrize("options", MODES, ids=str)
def test_the_first_forward_of_a_warm_up_is_the_dense_network(options):
    model, handle = net(rates=0.2, schedule=schedules.warmup(3), **options)
    x = torch.randn(5, 4)
    out = model(x)
    with handle.dense():
        assert torch.allclose(out, model(x), atol=1e-6)
    outs = [model(x) for _ in range(5)]
    assert not any(torch.allclose(out, other) for other in outs[2:])


@pytest.mark.parametrize("options", MODES, ids=str)
def test_the_scale_is_that_of_the_rate_the_mask_was_drawn_with(options):
    """What runs is divided by the rate in force, at every step of a schedule that counts forwards."""
    model, handle = net(rates=0.3, schedule=schedules.decay(20), **options)
    plain = Net()
    plain.load_state_dict(model.state_dict())
    for t in range(22):
        x = torch.randn(4, 4)
        rate = schedules.rate_at(0.3, schedules.decay(20), t)
        assert set(handle.current_rates.values()) == {rate}
        out, z = model(x), plain.stem(x)
        for i, block in enumerate(plain.blocks):
            mask = handle.masks().get(f"blocks.{i}", torch.tensor(True)).reshape(-1, 1)
            z = z + mask * block.branch(z) / rate
        assert torch.allclose(out, plain.head(z), atol=1e-5), t


def test_realised_rates_follow_the_schedule():
    model, handle = watched(0.2, sites=20, schedule=schedules.warmup(100), seed=1)
    for n, expected in ((0, 20.0), (50, 12.0), (100, 4.0)):
        handle.step(n)
        depths = []
        for _ in range(60):
            model(numbered(2))
            depths.append(handle.last_depth)
        spread = (20 * (expected / 20) * (1 - expected / 20) / 60) ** 0.5
        assert abs(sum(depths) / 60 - expected) <= 4 * spread + 1e-9


@pytest.mark.parametrize("built", ["before", "after"])
def test_time_is_optimiser_steps_where_an_optimiser_is_seen(built):
    torch.manual_seed(0)
    model, other = Net(), torch.nn.Linear(2, 2)
    early = SGD(model.parameters(), lr=0.01)
    rule, schedule = fallow.rates.uniform(0.5), schedules.warmup(8)
    handle = fallow.apply(model, rule, example=torch.randn(2, 4), schedule=schedule)
    optimizer = early if built == "before" else SGD([model.head.weight], lr=0.01)
    stranger = SGD(other.parameters(), lr=0.01)
    for i in range(4):
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
        other(torch.randn(1, 2)).sum().backward()
        stranger.step()
        assert handle.time == i + 1, "steps of other models do not count"
        model(torch.randn(2, 4))
        assert handle.time == i + 1, "nor do forwards"
    handle.step(100)
    optimizer.step()
    assert handle.time == 100, "a step that was set stays"
    handle.step()
    assert handle.time == 101
    handle.remove()


@pytest.mark.parametrize("noisy", [True, False])
def test_optimisers_that_share_a_model_make_one_step_together(noisy):
    model, handle = net(schedule=schedules.warmup(8))
    matrices = SGD([p for p in model.parameters() if p.dim() > 1], lr=0.01)
    others = [SGD([p], lr=0.01) for p in model.parameters() if p.dim() == 1]
    model(torch.randn(2, 4))
    for i in range(4):
        with nullcontext() if noisy else handle.dense():
            model(torch.randn(2, 4)).sum().backward()
        for optimizer in (matrices, *others):
            optimizer.step()
            assert handle.time == i + 1
    late = SGD(model.parameters(), lr=0.01)
    model(torch.randn(2, 4)).sum().backward()
    late.step()
    assert handle.time == 5, "nor does time wait for an optimiser that comes later"


def test_time_is_forwards_where_no_optimiser_is_seen():
    model, handle = net(schedule=schedules.warmup(8))
    for i in range(4):
        assert handle.time == i
        model(torch.randn(2, 4))


def test_a_removed_handle_counts_no_more():
    model, handle = net(schedule=schedules.warmup(8))
    optimizer = SGD(model.parameters(), lr=0.01)
    handle.remove()
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    assert handle.time == 0


@pytest.mark.parametrize("schedule", [None, schedules.warmup(12), schedules.decay(12, start=2)], ids=str)
@pytest.mark.parametrize("options", MODES, ids=str)
def test_a_resumed_run_draws_and_scales_as_the_uninterrupted_one(options, schedule):
    def step(model, optimizer) -> torch.Tensor:
        loss = model(torch.ones(5, 4)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    model, handle = net(seed=9, schedule=schedule, **options)
    optimizer = SGD(model.parameters(), lr=0.01)
    for _ in range(4):
        step(model, optimizer)
    state = json.loads(json.dumps(handle.state_dict()))
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    file = io.BytesIO()
    torch.save(handle.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == handle.state_dict() == state

    other, resumed = net(rates=0.9, seed=0, schedule=schedule, **options)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    again = SGD(other.parameters(), lr=0.01)
    assert resumed.state_dict() == state and resumed.current_rates == handle.current_rates
    for _ in range(10):
        assert torch.equal(step(model, optimizer), step(other, again))
        assert kept(handle) == kept(resumed) and handle.time == resumed.time
    assert handle.report().as_dict() == resumed.report().as_dict()


def test_a_state_is_resumed_in_a_handle_that_has_drawn_already():
    model, handle = net(seed=9)
    x = torch.randn(5, 4)
    model(x)
    state, masks = handle.state_dict(), []
    for _ in range(5):
        model(x)
        masks.append(kept(handle))
    handle.load_state_dict(state)
    assert handle.draw == 1
    for before in masks:
        model(x)
        assert kept(handle) == before
    with handle.hold():
        model.forward_features(x)
        assert kept(handle) == masks[-1]


def test_rates_change_in_the_middle_of_training():
    model, handle = watched(1.0, sites=4)
    for rate, depth in ((1.0, 4), (1e-9, 0), (1.0, 4)):
        handle.set_rates(fallow.rates.uniform(rate))
        model.watch()
        for i in range(5):
            model(numbered(3))
            assert handle.last_depth == depth
            assert [len(b.seen) for b in model.branches] == [(i + 1) * (depth > 0)] * 4
    handle.set_rates({"branches.2": 1e-9})
    model(numbered(3))
    assert handle.last_depth == 3 and handle.draw == 16

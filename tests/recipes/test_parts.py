"""The parts of a run: batches, learning rates, what is measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_runs import same, settled, weights

from fallow import data
from fallow.recipes import _job
from fallow.recipes._arm import Arm, build
from fallow.recipes._batches import Batches
from fallow.recipes._measure import peak_memory, ratio, ratio_of_means
from fallow.recipes._optimise import learning_rate, optimiser
from fallow.recipes.train import Config, read_results

Small = Callable[..., Path]


# --- batches and learning rates ---------------------------------------------------------------------------


def test_every_epoch_shows_every_training_image_once():
    config = settled(augment=False)
    digits = data.load("digits", train_size=100)
    batches = Batches(digits, config)
    train_images = digits.split_validation(0.1)[0]
    want = sorted(digits.train_x[train_images].flatten(1).float().sum(1).tolist())
    mean, std = digits.mean.item(), digits.std.item()
    orders = []
    for epoch in range(2):
        got = [batches.at(epoch * batches.per_epoch + k) for k in range(batches.per_epoch)]
        assert [len(y) for _, y in got] == [20, 20, 20, 20, 10]
        sums = torch.cat([((x * std + mean) * 255).flatten(1).sum(1) for x, _ in got])
        assert sorted(sums.round().tolist()) == want
        orders.append(torch.cat([y for _, y in got]))
    assert not torch.equal(*orders)


def test_a_batch_is_a_function_of_its_step_alone():
    batches = [Batches(data.load("digits", train_size=100), settled()) for _ in range(2)]
    in_order = [batches[0].at(step)[0] for step in range(8)]
    assert all(torch.equal(in_order[step], batches[1].at(step)[0]) for step in (7, 2, 5, 0))


@pytest.mark.parametrize(("size", "steps"), [(225, 4), (29, 31), (449, 3), (2000, 1)])
def test_a_last_batch_of_one_image_is_left_out(size: int, steps: int):
    """900 images are 4 x 225, 31 x 29 + 1 and 2 x 449 + 2."""
    batches = Batches(data.load("digits").subset(1000), settled(batch_size=size))
    assert batches.sizes["train"] == 900 and batches.per_epoch == steps


def test_huangs_learning_rate_falls_at_half_and_three_quarters():
    config = Config(data="cifar10", preset="huang", epochs=8, threads=1).settled()
    assert (config.learning_rate, config.weight_decay, config.batch_size) == (0.1, 1e-4, 128)
    rates = [learning_rate(step, 10, config) for step in range(80)]
    assert rates[:40] == [0.1] * 40
    assert rates[40:60] == pytest.approx([0.01] * 20) and rates[60:] == pytest.approx([0.001] * 20)
    group = optimiser(torch.nn.Linear(2, 2), config).param_groups[0]
    assert (group["momentum"], group["nesterov"], group["dampening"]) == (0.9, True, 0)


def test_adamw_rises_then_follows_half_a_cosine_and_spares_vectors():
    config = Config(
        model="vit_small", epochs=10, learning_rate_warmup=2.0, data="cifar10", threads=1
    ).settled()
    assert config.preset == "adamw"
    rates = [learning_rate(step, 10, config) for step in range(100)]
    assert rates[:20] == pytest.approx([1e-3 * (k + 1) / 20 for k in range(20)])
    assert rates[60] == pytest.approx(5e-4) and all(
        a > b for a, b in zip(rates[20:], rates[21:], strict=False)
    )
    groups = optimiser(torch.nn.Linear(2, 2), config).param_groups
    assert [(g["weight_decay"], [p.dim() for p in g["params"]]) for g in groups] == [(0.05, [2]), (0.0, [1])]


def test_pieces_of_a_batch_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch):
    """Gradient accumulation, on a model without batch statistics: the same step but for rounding."""
    digits = data.load("digits", train_size=60)
    after = []
    for pieces in (1, 3):
        config = settled(model="vit_small", accumulate=pieces, batch_size=10, preset="huang")
        arm = Arm("twin", build(config, digits), config, 24)
        assert arm.step(Batches(digits, config).at(0), 0.1, 0) > 0
        after.append([p.detach().clone() for p in arm.model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*after, strict=True))


@pytest.mark.parametrize("images", [2, 3, 7, 10])
def test_no_piece_of_a_batch_is_a_single_image(images: int):
    digits = data.load("digits", train_size=60)
    config = settled(model="resnet20", accumulate=4, batch_size=10)
    arm, seen = Arm("twin", build(config, digits), config, 9), []
    arm.model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    x, y = Batches(digits, config).at(0)
    arm.step((x[:images], y[:images]), 0.1, 0)
    assert sum(seen) == images and min(seen) >= 2 and max(seen) - min(seen) <= 1


# --- measurements -----------------------------------------------------------------------------------------


def test_peak_memory_counts_what_lives_at_once():
    def work(keep: bool) -> int:
        held = torch.zeros(1000)
        with peak_memory("cpu", [held]) as peak:
            kept = []
            for _ in range(5):
                x = held + 1
                if keep:
                    kept.append(x)
                del x
        return peak.bytes

    assert work(keep=True) == 6 * 4000 and work(keep=False) == 2 * 4000


def test_peak_memory_sees_what_backward_keeps_and_changes_no_number():
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(6)))
    x, plain = torch.randn(128, 64), []
    for measured in (False, True):
        model.zero_grad()
        if measured:
            with peak_memory("cpu", model.parameters()) as peak:
                model(x).square().sum().backward()
            own = sum(p.nbytes for p in model.parameters())
            assert peak.bytes >= own + 6 * x.nbytes
            assert all(torch.equal(a, p.grad) for a, p in zip(plain, model.parameters(), strict=True))
        else:
            model(x).square().sum().backward()
            plain = [p.grad.clone() for p in model.parameters()]


def test_a_model_that_rests_needs_less_memory(small: Small):
    run = small(budget=None, survival_rate=0.05, sampler="exact", batch_size=90)
    assert read_results(run)["summary"]["memory_ratio"] < 0.9


def test_the_interval_holds_the_median_and_leaves_out_what_is_marked():
    ours, theirs = [1.0, 2.0, 3.0, math.nan, 9.0], [2.0, 2.0, 2.0, 1.0, math.nan]
    found = ratio(ours, theirs)
    assert found is not None and found["median"] == 1.0
    assert 0.5 <= found["low"] <= found["median"] <= found["high"] <= 1.5
    assert ratio([math.nan], [1.0]) is None
    mean = ratio_of_means([*ours, 10.0], [*theirs, 2.0])  # 16 of 8, by pairs 0.5, 1, 1.5, 5
    assert mean is not None and mean["ratio"] == 2.0
    assert 0.5 <= mean["low"] <= mean["ratio"] <= mean["high"] <= 5
    assert ratio_of_means([math.nan], [1.0]) is None
    for coarse in (ratio([1.0, 3.0], [2.0, 0.0]), ratio_of_means([1.0, 3.0], [2.0, 0.0])):
        assert coarse is not None and set(coarse.values()) == {0.5}  # the clock did not move in the other one


def test_the_interval_covers_the_truth_nineteen_times_in_twenty():
    generator = torch.Generator().manual_seed(3)
    inside = [0, 0]
    true = 0.75, 0.75 * math.exp(0.1**2 / 2)  # the median, and the mean of what is lognormal
    for _ in range(100):
        noise = torch.randn(40, generator=generator, dtype=torch.float64).mul(0.1).exp()
        times = (0.75 * noise).tolist(), [1.0] * 40
        for place, found in enumerate((ratio(*times), ratio_of_means(*times))):
            inside[place] += found is not None and found["low"] <= true[place] <= found["high"]
    assert min(inside) >= 84  # 95 expected, five standard errors of 2.2 below


def test_measuring_does_not_touch_the_run(small: Small, monkeypatch: pytest.MonkeyPatch):
    plain = small()
    monkeypatch.setattr(_job, "measure", lambda job: None)
    monkeypatch.setattr("fallow.recipes.train.measure", lambda job: None)
    monkeypatch.setattr("fallow.recipes.train._MEMORY_MEASURED", 1)
    assert same(weights(plain), weights(small()))

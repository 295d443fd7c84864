"""Laws that do not hold yet; move each to the file named in its section when it does."""

from __future__ import annotations

import copy
import functools
import gc
import random

import numpy as np
import pytest
import torch
from kit import Net, generators_untouched, gradients, net, same, snapshot, unchanged
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

import fallow
from fallow import models, schedules

REENTRANT = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
MODES = [{"mode": "batch"}, {"mode": "row", "sampler": "exact"}, {"mode": "row"}]
EVERY_MODE = pytest.mark.parametrize("options", MODES, ids=lambda o: "-".join(o.values()))
HALF = fallow.rates.uniform(0.5)


# --- test_time.py: a dropped handle breaks every optimiser of the process ---------------------------------
def test_an_applied_model_that_is_dropped_leaves_optimisers_working():
    model, handle = net(schedule=schedules.warmup(4))
    del model, handle
    gc.collect()
    model, handle = net(schedule=schedules.warmup(4))  # the next run of a sweep, say
    optimizer = SGD(model.parameters(), lr=0.1)
    for i in range(2):
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        assert handle.time == i + 1


# --- test_checkpointing.py: forwards that entered with the same memory --------------------------------------
def value_or_run_error(model: Net, reference: Net, step) -> None:
    step(reference, lambda m, x: m(x))
    try:
        model_step = step(model, getattr(model, "call", lambda m, x: m(x)))
    except fallow.RunError:
        return  # allowed where it cannot be told
    assert model_step is None and same(gradients(model), gradients(reference))


def same_input_twice(model, call):
    """R-Drop and its kin: one batch through two draws."""
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (call(model, x).square().sum() + call(model, x).pow(3).sum()).backward()


def chunks_of_a_batch(model, call):
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    sum((i + 1) * call(model, part).square().sum() for i, part in enumerate(x.chunk(2))).backward()


@EVERY_MODE
@REENTRANT
@pytest.mark.parametrize("step", [same_input_twice, chunks_of_a_batch], ids=lambda f: f.__name__)
@pytest.mark.parametrize("where", ["model", "blocks fed by the raw input"])
def test_two_forwards_that_share_their_input_memory(where, step, reentrant, options):
    for seed in range(4):
        torch.manual_seed(3)
        model = Net()
        if where != "model":
            model.stem = nn.Identity()
        fallow.apply(model, HALF, example=torch.randn(2, 4), grads="zero", seed=seed, **options)
        reference = copy.deepcopy(model)
        if where == "model":
            model.__dict__["call"] = functools.partial(checkpoint, use_reentrant=reentrant)
        else:
            model.run = lambda blocks, x: functools.reduce(
                lambda z, block: checkpoint(block, z, use_reentrant=reentrant), blocks, x
            )
        value_or_run_error(model, reference, step)


@EVERY_MODE
@REENTRANT
def test_a_region_without_a_known_entry_is_not_taken_for_the_root_forward_after_it(reentrant, options):
    """forward_features in a region that begins at the stem, then the whole model, then one backward."""

    def step(model, call):
        x, y = (
            torch.randn(6, 4, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in (1, 2)
        )
        features = model.blocks[1:](call(nn.Sequential(model.stem, model.blocks[0]), x))
        (features.square().sum() + model(y).pow(3).sum()).backward()

    for seed in range(4):
        model, _ = net(seed=seed, grads="zero", **options)
        reference = copy.deepcopy(model)
        model.__dict__["call"] = functools.partial(checkpoint, use_reentrant=reentrant)
        value_or_run_error(model, reference, step)


def test_running_backward_after_each_forward_is_a_remedy_as_the_error_says():
    """Forwards that need no backward (no_grad, discarded) do not count as waiting for one for ever."""
    torch.manual_seed(0)
    model = Net()
    fallow.apply(model, HALF, example=torch.randn(2, 4))

    def features(x):
        return checkpoint(nn.Sequential(model.stem, model.blocks), x, use_reentrant=False)

    with torch.no_grad():
        features(torch.randn(2, 4))
    for _ in range(3):
        features(torch.randn(2, 4)).sum().backward()


# --- test_copies.py / test_time.py: time
@pytest.mark.parametrize("how", ["copy", "resumed in a handle without a schedule"])
def test_time_goes_on_in_copies_and_resumed_handles(how):
    def train(model, steps):
        optimizer = SGD(model.parameters(), lr=0.01)
        for _ in range(steps):
            for _ in range(2):  # two micro-batches a step
                model(torch.randn(2, 4)).sum().backward()
            optimizer.step()

    model, handle = net(schedule=schedules.warmup(100))
    train(model, 3)
    assert handle.time == 3
    if how == "copy":
        other = copy.deepcopy(model)
    else:
        other, resumed = net()
        resumed.load_state_dict(handle.state_dict())
    train(other, 3)
    its = fallow.handle_of(other)
    assert its is not None and its.time == 6 and handle.time == 3


def test_time_never_runs_backwards_while_gradients_accumulate():
    model, handle = net(schedule=schedules.warmup(100))
    optimizer, times = SGD(model.parameters(), lr=0.01), []
    for _ in range(3):
        for _ in range(4):
            model(torch.randn(2, 4)).sum().backward()
            times.append(handle.time)
        optimizer.step()
    assert times == sorted(times)  # 1, 2, 3, 4, then 1


def test_step_without_a_number_counts_the_steps_of_the_loop():
    model, handle = net(schedule=schedules.warmup(100))
    optimizer, times = SGD(model.parameters(), lr=0.01), []
    for _ in range(3):
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
        handle.step()
        times.append(handle.time)
    assert times == [1, 2, 3]  # 2, 3, 4


# --- test_drawing.py / test_refusals.py: left as it was
def test_probing_leaves_buffers_that_a_forward_replaces():
    class Counting(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1
            return super().forward(x)

    model = Counting()
    before = snapshot(model)
    fallow.sites(model, torch.randn(2, 4))
    assert model.calls == 0 and unchanged(model, before)


def test_probing_leaves_the_generators_a_forward_uses():
    class Random(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0 * random.random() + 0 * float(np.random.rand())

    model, example = Random(), torch.randn(2, 4)
    with generators_untouched():
        fallow.sites(model, example)


# --- test_refusals.py
def test_an_example_without_rows_is_an_argument_error():
    with pytest.raises(fallow.ArgumentError, match=r"no rows: shape \(0, 4\)"):
        fallow.sites(Net(), torch.randn(0, 4))


@pytest.mark.parametrize(
    "options",
    [
        {"seed": "a"},
        {"seed": 1.5},
        {"seed": None},
        {"schedule": "warmup"},
        {"schedule": 0.5},
        {"include": 3},
        {"exclude": 3},
    ],
    ids=str,
)
def test_options_of_the_wrong_type(options):
    model = Net()
    before = snapshot(model)
    with pytest.raises(fallow.FallowError):
        fallow.apply(
            model, HALF, example=torch.randn(2, 4), **options
        )  # seed="a": no error before the first step
    assert unchanged(model, before)


def test_a_schedule_that_returns_nonsense_is_refused_before_training():
    with pytest.raises(fallow.UsageError, match="strength"):
        fallow.apply(Net(), HALF, example=torch.randn(2, 4), schedule=lambda t: 2.0)


@pytest.mark.parametrize("bad", ["a", -1, 1.5, float("nan"), True])
def test_steps_that_are_no_count(bad):
    _, handle = net(schedule=schedules.warmup(4))
    with pytest.raises(fallow.FallowError, match="step"):
        handle.step(bad)


@pytest.mark.parametrize(
    "change", [{"seed": "x"}, {"draw": -1}, {"draw": "x"}, {"schedule": 3}, {"rates": None}], ids=str
)
def test_a_state_with_bad_values_changes_nothing(change):
    _, handle = net()
    before = handle.state_dict()
    other = {**before, "rates": dict.fromkeys(before["rates"], 0.25), **change}
    with pytest.raises(fallow.FallowError):
        handle.load_state_dict(other)
    assert handle.state_dict() == before


@pytest.mark.parametrize("bad", [None, 3])
def test_a_state_that_is_none(bad):
    with pytest.raises(fallow.FallowError):
        net()[1].load_state_dict(bad)


def test_the_state_of_a_smaller_model_is_refused():
    """Documented as SiteError; now the sites it lacks silently get rate 1."""
    example, handles = torch.randn(2, 1, 8, 8), []
    for depth in (14, 20):
        model = models.CifarResNet(depth, channels=1, widths=(4, 4, 8))
        handles.append((model, fallow.apply(model, HALF, example=example)))
    with pytest.raises(fallow.SiteError):
        handles[1][1].load_state_dict(handles[0][1].state_dict())


def test_set_rates_refuses_by_row_what_apply_refuses_by_row():
    class Flattened(nn.Module):
        """Its second sum is over (rows * tokens, width): no dimension of it is the batch."""

        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = (x + torch.tanh(self.first(x))).reshape(-1, 4)
            return x + torch.tanh(self.second(x))

    example = torch.randn(4, 5, 4)
    with pytest.raises(fallow.SiteError, match="second.*row by row"):
        fallow.apply(Flattened(), HALF, example=example, mode="row")
    handle = fallow.apply(Flattened(), {"first": 0.5}, example=example, mode="row")
    with pytest.raises(fallow.SiteError, match="second.*row by row"):
        handle.set_rates({"second": 0.5})


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def test_too_few_values_are_told_at_the_first_forward_of_a_warm_up():
    """Now the error comes in the middle of the run, when the rate has fallen far enough."""
    model = nn.Sequential(Normed(), Normed())
    fallow.apply(
        model,
        fallow.rates.uniform(0.3),
        example=torch.randn(4, 4),
        mode="row",
        sampler="exact",
        schedule=schedules.warmup(1000),
    )
    with pytest.raises(fallow.RateError, match="batch size 4 and survival rate 0.3"):
        model(torch.randn(4, 4))


def test_metrics_are_floats():
    model, handle = net()
    model(torch.randn(2, 4))
    assert all(type(v) is float for v in handle.metrics().values())  # "draws" is an int


def test_a_note_on_zeroed_gradients_after_a_long_warm_up():
    """Only the first hundred draws are looked at."""
    model, handle = net(rates=0.5, schedule=schedules.warmup(100000), seed=1)
    optimizer = SGD(model.parameters(), lr=0.0)
    for i in range(150):
        if i == 120:
            handle.step(100000)
        optimizer.zero_grad(set_to_none=False)
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
    assert handle.report().notes

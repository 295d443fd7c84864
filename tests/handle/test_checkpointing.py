"""Activation checkpointing: gradients are those of the same draws without it, to rounding.

The oracle is a deep copy that made the same draws and keeps its activations. Rested branches get zeros
(``grads="zero"``) so that every parameter has a gradient to compare.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from kit import Net, gradients, kept, net, same
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fallow

MODES = [
    {"mode": "batch", "sampler": "bernoulli"},
    {"mode": "batch", "sampler": "exact"},
    {"mode": "row", "sampler": "bernoulli"},
    {"mode": "row", "sampler": "exact"},
]
REENTRANT = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
EVERY_MODE = pytest.mark.parametrize("options", MODES, ids=lambda o: "-".join(o.values()))
Call = Callable[[nn.Module, Tensor], Tensor]


def by(count: int, reentrant: bool) -> Callable[[nn.Sequential, Tensor], Tensor]:
    """Run blocks in checkpointed regions of ``count``."""

    def run(blocks: nn.Sequential, x: Tensor) -> Tensor:
        for i in range(0, len(blocks), count):
            x = checkpoint(blocks[i : i + count], x, use_reentrant=reentrant)
        return x

    return run


def plainly(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


def inputs(seed: int, rows: int = 6) -> Tensor:
    """Each call new memory, as a data loader gives; reentrant checkpointing wants inputs with gradients."""
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed)).requires_grad_()


# --- what a training step may do; `call` is the model, checkpointed as a whole or not -----------------------


def one_forward(model: Net, call: Call) -> None:
    call(model, inputs(1)).square().sum().backward()


def siamese(model: Net, call: Call) -> None:
    (call(model, inputs(1)) - 2 * call(model, inputs(2))).square().sum().backward()


def summed_micro_batches(model: Net, call: Call) -> None:
    losses = [(i + 1) * call(model, inputs(i)).square().mean() for i in range(3)]
    sum(losses[1:], losses[0]).backward()


def second_fed_by_the_first(model: Net, call: Call) -> None:
    call(model, call(model, inputs(1))).square().sum().backward()


def first_backward_last(model: Net, call: Call) -> None:
    a, b = call(model, inputs(1)), call(model, inputs(2))
    a.square().sum().backward()
    b.pow(3).sum().backward()


def backward_between(model: Net, call: Call) -> None:
    a = call(model, inputs(1))
    b = call(model, inputs(2))
    b.pow(3).sum().backward()
    c = call(model, inputs(3))
    (a.square().sum() + c.square().sum()).backward()


def evaluated_between(model: Net, call: Call) -> None:
    a = call(model, inputs(1))
    model.eval()
    model(inputs(5))
    model.train()
    a.square().sum().backward()


def held(model: Net, call: Call) -> None:
    handle = fallow.handle_of(model)
    assert handle is not None
    a = call(model, inputs(1))
    with handle.hold():
        b = call(model, inputs(2))
    (a.square().sum() + b.pow(3).sum() + call(model, inputs(3)).square().sum()).backward()


def features_twice(model: Net, call: Call) -> None:
    a, b = model.forward_features(inputs(1)), model.forward_features(inputs(2))
    (a.square().sum() + b.pow(3).sum()).backward()


def features_and_root(model: Net, call: Call) -> None:
    a, b = model.forward_features(inputs(1)), call(model, inputs(2))
    c = model.forward_features(inputs(3))
    (a.square().sum() + b.pow(3).sum() - c.square().sum()).backward()


def a_repeated_backward(model: Net, call: Call) -> None:
    a = call(model, inputs(1)).square().sum()
    a.backward(retain_graph=True)
    call(model, inputs(2)).square().sum().backward()
    (2 * a).backward()


STEPS = [
    one_forward,
    siamese,
    summed_micro_batches,
    second_fed_by_the_first,
    first_backward_last,
    backward_between,
    evaluated_between,
    held,
    features_twice,
    features_and_root,
]
# Through the root alone: the same steps where the whole model is one checkpointed region.
WHOLE = [s for s in STEPS if s not in (features_twice, features_and_root)]


@functools.cache
def applied(**options: str) -> Net:
    return net(seed=3, grads="zero", **options)[0]


def pair(**options: str) -> tuple[Net, Net]:
    """Two copies that draw alike."""
    return copy.deepcopy(applied(**options)), copy.deepcopy(applied(**options))


def compare(step: Callable, model: Net, reference: Net, call: Call) -> None:
    masks = []
    for m, how in ((reference, plainly), (model, call)):
        m.zero_grad()
        step(m, how)
        handle = fallow.handle_of(m)
        assert handle is not None
        masks.append((handle.draw, kept(handle)))
    assert masks[0] == masks[1], "checkpointing does not change the draws"
    expected, got = gradients(reference), gradients(model)
    assert any(g is not None and g.abs().sum() > 0 for n, g in got.items() if "blocks" in n)
    assert same(expected, got)


@EVERY_MODE
@REENTRANT
@pytest.mark.parametrize("count", [1, 2], ids=["each block", "two blocks"])
@pytest.mark.parametrize("step", STEPS, ids=lambda f: f.__name__)
def test_checkpointed_blocks(step, count, reentrant, options):
    model, reference = pair(**options)
    model.run = by(count, reentrant)
    compare(step, model, reference, plainly)


@EVERY_MODE
@REENTRANT
@pytest.mark.parametrize("step", WHOLE, ids=lambda f: f.__name__)
def test_a_checkpointed_model(step, reentrant, options):
    model, reference = pair(**options)
    compare(step, model, reference, functools.partial(checkpoint, use_reentrant=reentrant))


@EVERY_MODE
def test_a_graph_walked_twice(options):
    model, reference = pair(**options)
    model.run = by(1, False)
    compare(a_repeated_backward, model, reference, plainly)


@EVERY_MODE
@REENTRANT
def test_many_steps_of_one_run(options, reentrant):
    """No draw is mixed up with an earlier one that is over, memory that was freed included."""
    model, reference = pair(**options)
    model.run = by(2, reentrant)
    for step in (one_forward, siamese, features_twice, one_forward, held, features_and_root) * 2:
        compare(step, model, reference, plainly)


@EVERY_MODE
@REENTRANT
def test_the_scale_follows_the_schedule_of_the_forward(options, reentrant):
    """Time moves between a forward and its backward; the recomputation keeps the rates of the forward."""
    model, _handle = net(rates=0.4, grads="zero", schedule=fallow.schedules.warmup(4), **options)
    reference = copy.deepcopy(model)
    model.run = by(1, reentrant)
    for _ in range(3):
        compare(summed_micro_batches, model, reference, plainly)


class Stemmed(Net):
    """Its features in one region that begins before any residual block."""

    reentrant: bool | None = None

    def forward_features(self, x: Tensor) -> Tensor:
        whole = nn.Sequential(self.stem, nn.Tanh(), self.blocks)
        return whole(x) if self.reentrant is None else checkpoint(whole, x, use_reentrant=self.reentrant)


@functools.cache
def stemmed(**options: str) -> Stemmed:
    torch.manual_seed(3)
    model = Stemmed()
    fallow.apply(model, fallow.rates.uniform(0.5), example=torch.randn(2, 4), grads="zero", **options)
    return model


@EVERY_MODE
@REENTRANT
@pytest.mark.parametrize("step", WHOLE, ids=lambda f: f.__name__)
def test_a_region_that_begins_before_the_blocks(step, reentrant, options):
    model, reference = copy.deepcopy(stemmed(**options)), copy.deepcopy(stemmed(**options))
    model.reentrant = reentrant
    compare(step, model, reference, plainly)


@EVERY_MODE
@REENTRANT
def test_one_such_region_outside_the_root(options, reentrant):
    model, reference = copy.deepcopy(stemmed(**options)), copy.deepcopy(stemmed(**options))
    model.reentrant = reentrant
    for i in range(3):
        for m in (model, reference):
            m.zero_grad()
            m.forward_features(inputs(i)).square().sum().backward()
        assert same(gradients(model), gradients(reference))


@EVERY_MODE
@REENTRANT
def test_what_cannot_be_told_is_an_error(options, reentrant):
    """Two forwards outside the root, in regions whose entry no gate sees: nothing tells whose turn it is."""
    model = copy.deepcopy(stemmed(**options))
    model.reentrant = reentrant
    a, b = model.forward_features(inputs(1)), model.forward_features(inputs(2))
    with pytest.raises(fallow.RunError, match="cannot be told.*run backward after each forward"):
        (a.square().sum() + b.pow(3).sum()).backward()


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


@REENTRANT
def test_statistics_of_a_kept_branch_move_twice_and_of_a_rested_one_never(reentrant):
    """As in dense training: a recomputation is a second forward of what runs."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Normed() for _ in range(4)))
    handle = fallow.apply(model, fallow.rates.uniform(0.5), example=torch.randn(2, 4), seed=1)
    x = inputs(1)
    for block in model:
        x = checkpoint(block, x, use_reentrant=reentrant)
    x.sum().backward()
    masks = kept(handle)
    moved = {name: int(model[int(name)].branch[1].num_batches_tracked) for name in masks}
    assert moved == {name: 2 * mask[0] for name, mask in masks.items()}
    assert set(moved.values()) == {0, 2}

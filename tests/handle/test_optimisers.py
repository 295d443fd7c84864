"""Optimisers built before or after `apply`, and what they do to a branch that rests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kit import Net, kept, net
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import fallow

OPTIMISERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda p, **o: SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, **o),
    "nesterov": lambda p, **o: SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True, **o),
    "adamw": lambda p, **o: AdamW(p, lr=0.01, weight_decay=0.1, **o),
}
FORMS = {"default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}, "loop": {"foreach": False}}
# torch's fused SGD with momentum raises where a parameter's first gradient comes later than another's.
KNOWN = [
    (name, grads, form)
    for name in OPTIMISERS
    for grads in ("none", "zero")
    for form in FORMS
    if name == "adamw" or form != "fused" or grads == "zero"
]
EVERY_OPTIMISER = pytest.mark.parametrize("optimiser", OPTIMISERS)


def by_block(model: Net) -> list[Tensor]:
    return [torch.cat([p.detach().flatten() for p in block.parameters()]) for block in model.blocks]


def train(model: nn.Module, optimizer: Optimizer, steps: int, **clear: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        x = torch.randn(6, 4, generator=generator)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(**clear)


@pytest.mark.parametrize(("optimiser", "grads", "form"), KNOWN)
def test_before_and_after_apply_is_the_same(optimiser, grads, form):
    results = []
    for before in (True, False):
        torch.manual_seed(0)
        model = Net()
        optimizer = OPTIMISERS[optimiser](model.parameters(), **FORMS[form]) if before else None
        fallow.apply(model, fallow.rates.uniform(0.5), example=torch.randn(2, 4), grads=grads, seed=2)
        optimizer = optimizer or OPTIMISERS[optimiser](model.parameters(), **FORMS[form])
        train(model, optimizer, 8)
        results.append(torch.cat(by_block(model)))
    assert torch.equal(*results)


@EVERY_OPTIMISER
def test_with_none_what_rests_stands_still_and_what_runs_moves(optimiser):
    model, handle = net(seed=2)
    optimizer = OPTIMISERS[optimiser](model.parameters())
    seen = set()
    for _ in range(25):
        before = by_block(model)
        train(model, optimizer, 1)
        for old, new, (mask,) in zip(before, by_block(model), kept(handle).values(), strict=True):
            assert torch.equal(old, new) != mask
            seen.add(mask)
    assert seen == {True, False} and not handle.report().notes


@pytest.mark.parametrize("sampler", ["bernoulli", "exact"])
def test_row_mode_stands_still_where_no_row_is_kept(sampler):
    model, handle = net(rates=0.4, mode="row", sampler=sampler)
    optimizer = OPTIMISERS["sgd"](model.parameters())
    seen = set()
    for _ in range(20):
        before = by_block(model)
        model(torch.randn(2, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for old, new, mask in zip(before, by_block(model), kept(handle).values(), strict=True):
            assert torch.equal(old, new) != any(mask)
            seen.add(any(mask))
    assert seen == {True, False}


@pytest.mark.parametrize("mode", ["batch", "row"])
def test_with_zero_momentum_and_decay_still_act_as_the_optimiser_defines_them(mode):
    """The oracle is written out: v <- m v + (g + d w), w <- w - l v, with g = 0 where the branch rests."""
    model, handle = net(seed=2, grads="zero", mode=mode)
    optimizer = OPTIMISERS["sgd"](model.parameters())
    velocity: dict[str, Tensor] = {}
    rested = 0
    for _ in range(20):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        model(torch.randn(2, 4)).square().mean().backward()
        masks = kept(handle)
        for n, p in model.named_parameters():
            assert p.grad is not None
            if n.startswith("blocks") and not any(masks[n[:8]]):
                assert not p.grad.any()
                rested += 1
            push = p.grad + 0.1 * before[n]
            velocity[n] = 0.9 * velocity[n] + push if n in velocity else push
        optimizer.step()
        for n, p in model.named_parameters():
            assert torch.allclose(p, before[n] - 0.05 * velocity[n], atol=1e-6)
        optimizer.zero_grad()
    assert rested > 10


@pytest.mark.parametrize(
    "clear", ["before the forward", "between forward and backward", "after the step", "twice"]
)
def test_zeros_arrive_through_the_graph_wherever_gradients_are_cleared(clear):
    model, _ = net(seed=2, grads="zero")
    optimizer = OPTIMISERS["adamw"](model.parameters())
    for _ in range(5):
        if clear != "after the step":
            optimizer.zero_grad()
        loss = model(torch.randn(2, 4)).square().mean()
        if clear != "before the forward":
            optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()


def test_zeros_go_only_where_gradients_are_wanted():
    model, _ = net(seed=2, grads="zero", rates=0.2)
    for block in model.blocks:
        block.branch[0].requires_grad_(False)
    for _ in range(5):
        model(torch.randn(2, 4)).square().mean().backward()
    assert all((p.grad is None) != p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("when", ["first", "between", "last"])
def test_gradients_cleared_to_zeros_are_told_in_the_report(when):
    model, handle = net(seed=2)
    optimizer = OPTIMISERS["sgd"](model.parameters())
    assert not handle.report().notes
    for _ in range(25):
        if when == "first":
            optimizer.zero_grad(set_to_none=False)
        loss = model(torch.randn(2, 4)).square().mean()
        if when == "between":
            optimizer.zero_grad(set_to_none=False)
        loss.backward()
        optimizer.step()
        if when == "last":
            optimizer.zero_grad(set_to_none=False)
    (note,) = handle.report().notes
    assert (
        "set_to_none=False" in note and "weight decay and momentum" in note and note in str(handle.report())
    )


@pytest.mark.parametrize("accumulate", [1, 3])
def test_gradients_cleared_to_none_are_not_complained_about(accumulate):
    model, handle = net(seed=2)
    optimizer = OPTIMISERS["sgd"](model.parameters())
    for i in range(60):
        model(torch.randn(2, 4)).square().mean().backward()
        if i % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    assert not handle.report().notes


def test_accumulated_gradients_are_sums_over_the_masks_of_each_micro_batch():
    model, handle = net(seed=2)
    batches, expected = torch.randn(4, 3, 4), {}
    plain = Net()
    plain.load_state_dict(model.state_dict())
    for x in batches:
        model(x).square().mean().backward()
        masks = kept(handle)
        z = plain.stem(x)
        for i, block in enumerate(plain.blocks):
            if masks[f"blocks.{i}"][0]:
                z = z + 2 * block.branch(z)
        plain.head(z).square().mean().backward()
    for (n, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        expected[n] = q.grad
        assert (p.grad is None) == (q.grad is None), n
        assert p.grad is None or torch.allclose(p.grad, q.grad, atol=1e-6)
    assert handle.draw == 4

"""Autograd around an applied model: higher derivatives, graphs that are kept, errors, threads."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from kit import Net, gradients, kept, net, same
from torch import Tensor, nn

import fallow

MODES = [
    {"mode": "batch"},
    {"mode": "batch", "grads": "zero"},
    {"mode": "row"},
    {"mode": "row", "sampler": "exact"},
    {"mode": "row", "sampler": "exact", "rows": "scattered", "grads": "zero"},
]
EVERY_MODE = pytest.mark.parametrize("options", MODES, ids=lambda o: "-".join(o.values()))


def masked(plain: Net, masks: dict[str, Tensor], x: Tensor, rate: float = 0.5) -> Tensor:
    """The reference: every branch runs dense and is multiplied by its mask."""
    z = plain.stem(x)
    for i, block in enumerate(plain.blocks):
        z = z + masks[f"blocks.{i}"].reshape(-1, 1) * block.branch(z) / rate
    return plain.head(z)


def with_reference(**options: str) -> tuple[Net, Net]:
    model, _ = net(seed=2, **options)
    plain = copy.deepcopy(model)
    handle = fallow.handle_of(plain)
    assert handle is not None
    handle.remove()
    return model, plain


def handle_masks(model: nn.Module) -> dict[str, Tensor]:
    handle = fallow.handle_of(model)
    assert handle is not None
    return handle.masks()


@EVERY_MODE
def test_double_backward(options):
    """A gradient penalty, as critics are trained with."""
    model, plain = with_reference(**options)
    for _ in range(6):
        x = torch.randn(5, 4, requires_grad=True)
        out = model(x)
        results = []
        for m, y in ((model, out), (plain, masked(plain, handle_masks(model), x))):
            m.zero_grad()
            (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            (slope.square().sum() + y.sum()).backward()
            results.append((slope, {n: g for n, g in gradients(m).items() if g is not None}))
        (slope, grads), (expected, reference) = results
        assert torch.allclose(slope, expected, atol=1e-4)
        for name, g in reference.items():  # what rests has no gradient, or zeros
            assert torch.allclose(grads.get(name, torch.zeros_like(g)), g, rtol=1e-4, atol=1e-4), name


@EVERY_MODE
def test_gradients_of_single_parameters_and_of_a_graph_that_is_kept(options):
    model, plain = with_reference(**options)
    x = torch.randn(5, 4)
    loss = model(x).square().sum()
    reference = masked(plain, handle_masks(model), x).square().sum()
    every = list(model.parameters())
    for _ in range(2):
        got = torch.autograd.grad(loss, every, retain_graph=True, allow_unused=True)
        expected = torch.autograd.grad(reference, list(plain.parameters()), retain_graph=True)
        for a, b in zip(got, expected, strict=True):
            assert torch.allclose(torch.zeros_like(b) if a is None else a, b, atol=1e-4)
    model(torch.randn(3, 4))  # another draw in between
    loss.backward(retain_graph=True)
    once = gradients(model)
    loss.backward()
    assert same({n: None if g is None else 2 * g for n, g in once.items()}, gradients(model), 1e-4)


@EVERY_MODE
def test_accumulating_is_summing(options):
    model, plain = with_reference(**options)
    for i in range(4):
        x = torch.randn(2 + i, 4)
        model(x).square().sum().backward()
        masked(plain, handle_masks(model), x).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert q.grad is not None
        assert torch.allclose(torch.zeros_like(p) if p.grad is None else p.grad, q.grad, atol=1e-4), name


@EVERY_MODE
@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_training_forwards_without_a_graph_draw_and_rest(off, options):
    model, plain = with_reference(**options)
    x = torch.randn(5, 4)
    seen = set()
    for i in range(5):
        with off():
            out = model(x)
        assert not out.requires_grad
        assert torch.allclose(out, masked(plain, handle_masks(model), x), atol=1e-5)
        handle = fallow.handle_of(model)
        assert handle is not None and handle.draw == i + 1
        seen.add(str(kept(handle)))
    assert len(seen) > 1


@EVERY_MODE
def test_gradients_with_respect_to_the_input_alone(options):
    model, plain = with_reference(**options)
    model.requires_grad_(False)
    x = torch.randn(5, 4, requires_grad=True)
    (got,) = torch.autograd.grad(model(x).square().sum(), x)
    (expected,) = torch.autograd.grad(masked(plain, handle_masks(model), x).square().sum(), x)
    assert torch.allclose(got, expected, atol=1e-4)
    assert all(p.grad is None for p in model.parameters())


class Failing(Net):
    """Its head raises when told to."""

    fail = ""

    def forward(self, x: Tensor) -> Tensor:
        features = self.forward_features(x)
        if self.fail == "head":
            raise ZeroDivisionError
        return self.head(features)


@pytest.mark.parametrize("where", ["head", "branch", "input"])
@EVERY_MODE
def test_an_error_inside_a_forward_leaves_the_handle_usable(where, options):
    torch.manual_seed(0)
    model = Failing()
    handle = fallow.apply(model, fallow.rates.uniform(0.9), example=torch.randn(2, 4), **options)
    if where == "branch":

        def fail(module, args):
            if model.fail:
                raise ZeroDivisionError

        for block in model.blocks:
            block.branch[0].register_forward_pre_hook(fail)
    x = torch.randn(5, 4)
    model(x)
    for i in range(3):
        model.fail = where
        with pytest.raises((ZeroDivisionError, RuntimeError)):
            model(torch.randn(5, 3) if where == "input" else x)
        model.fail = ""
        assert handle.draw == 2 + 3 * i
        model(x)
        assert handle.draw == 3 + 3 * i, "the next forward is an outermost one again"
        model.forward_features(x)
        assert handle.draw == 4 + 3 * i, "and what is reached outside it draws afresh"


def test_training_in_another_thread():
    """Draws belong to the model, whichever thread runs it; what is a recomputation is asked per thread."""
    model, handle = net(mode="row", sampler="exact")
    reference = copy.deepcopy(model)
    x = torch.randn(5, 4)

    def work() -> None:
        for _ in range(3):
            model(x).square().sum().backward()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    for _ in range(3):
        reference(x).square().sum().backward()
    assert handle.draw == 3 and same(gradients(model), gradients(reference))

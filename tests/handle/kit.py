"""Small models whose branches can be watched, and the oracles the tests of the handle share."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fallow

RATES = (0.1, 0.3, 0.5, 0.77, 0.95)
HALF = fallow.rates.uniform(0.5)
X = torch.linspace(-1.3, 1.7, 12).reshape(3, 4)


class Watched(nn.Module):
    """A branch that notes which rows it runs on: column 0 of its input numbers them and is left as it is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width - 1)
        self.seen: list[list[int]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.seen is not None:
            self.seen.append(x[:, 0].detach().round().int().tolist())
        return nn.functional.pad(self.linear(x), (1, 0))


class Watching(nn.Module):
    """As many watched branches as asked for, one after the other; it costs next to nothing."""

    def __init__(self, sites: int = 5, width: int = 3) -> None:
        super().__init__()
        self.branches = nn.ModuleList(Watched(width) for _ in range(sites))

    def forward(self, x: Tensor) -> Tensor:
        for branch in self.branches:
            x = x + 0.1 * branch(x)
        return x

    def watch(self) -> None:
        for branch in self.branches:
            branch.seen = []


def numbered(rows: int, width: int = 3) -> Tensor:
    """Rows that carry their number in column 0."""
    x = torch.ones(rows, width)
    x[:, 0] = torch.arange(rows)
    return x


def watched(rates: Any, sites: int = 5, **options: Any) -> tuple[Watching, fallow.Handle]:
    model = Watching(sites)
    if not isinstance(rates, float):
        rates = {f"branches.{i}": p for i, p in enumerate(rates)}
    else:
        rates = fallow.rates.uniform(rates)
    handle = fallow.apply(model, rates, example=numbered(4), **options)
    model.watch()
    return model, handle


class Residual(nn.Module):
    """x + branch(x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Net(nn.Module):
    """A stem, residual blocks, a head; ``run`` calls the blocks, so that tests can checkpoint them."""

    def __init__(self, width: int = 4, depth: int = 4, inputs: int = 4, head: bool = True) -> None:
        super().__init__()
        self.stem = nn.Linear(inputs, width)
        self.blocks = nn.Sequential(*(Residual(width) for _ in range(depth)))
        self.head = nn.Linear(width, inputs) if head else nn.Identity()
        self.run: Callable[[nn.Sequential, Tensor], Tensor] = in_turn

    def forward_features(self, x: Tensor) -> Tensor:
        return self.run(self.blocks, self.stem(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))


def in_turn(blocks: nn.Sequential, x: Tensor) -> Tensor:
    return blocks(x)


def net(rates: float = 0.5, **options: Any) -> tuple[Net, fallow.Handle]:
    torch.manual_seed(3)
    model = Net()
    return model, fallow.apply(model, fallow.rates.uniform(rates), example=torch.randn(2, 4), **options)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def same(a: dict[str, Tensor | None], b: dict[str, Tensor | None], tolerance: float = 1e-6) -> bool:
    """Whether gradients agree; None only with None."""
    if a.keys() != b.keys():
        return False
    for name, x in a.items():
        y = b[name]
        if (x is None) != (y is None):
            return False
        if x is not None and y is not None and not torch.allclose(x, y, rtol=tolerance, atol=tolerance):
            return False
    return True


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that `apply` could leave behind: classes, attributes, hooks, values, flags."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        plain = {k: v for k, v in module.__dict__.items() if not k.startswith("_") or "hook" not in k}
        hooks = {k: dict(v) for k, v in module.__dict__.items() if k.endswith("_hooks") and v is not None}
        state[name] = (type(module), sorted(module.__dict__), module.training, hooks, sorted(map(str, plain)))
    values = {k: (v, v.detach().clone()) for k, v in model.state_dict(keep_vars=True).items()}
    return {"modules": state, "values": values, "grads": {n: p.grad for n, p in model.named_parameters()}}


def unchanged(model: nn.Module, before: dict[str, Any]) -> bool:
    now = snapshot(model)
    if now["modules"] != before["modules"] or list(now["values"]) != list(before["values"]):
        return False
    for name, (tensor, value) in before["values"].items():
        if now["values"][name][0] is not tensor or not torch.equal(tensor, value):
            return False
    return all(now["grads"][n] is g for n, g in before["grads"].items())


@contextmanager
def generators_untouched() -> Iterator[None]:
    """Fail where torch's, numpy's or Python's global generator moves."""
    before = torch.get_rng_state(), copy.deepcopy(np.random.get_state()), random.getstate()
    yield
    assert torch.equal(torch.get_rng_state(), before[0]), "torch's generator moved"
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[1], strict=True))
    assert random.getstate() == before[2], "Python's generator moved"


def kept(handle: fallow.Handle) -> dict[str, list[bool]]:
    """The masks of the latest draw as plain lists."""
    return {name: mask.reshape(-1).tolist() for name, mask in handle.masks().items()}


def refused(error: type[Exception], words: str, model: Any = None, rates: Any = HALF, **options: Any) -> str:
    """Apply; want this class and these words, in this order, and an untouched model."""
    model = Net() if model is None else model
    before = snapshot(model) if isinstance(model, nn.Module) else None
    options = {"example": X, **options}
    with generators_untouched(), pytest.raises(error) as caught:
        fallow.apply(model, rates, **options)
    assert type(caught.value) is error and issubclass(error, fallow.FallowError)
    assert re.search(words, str(caught.value), re.DOTALL), str(caught.value)
    assert "\n" not in str(caught.value)
    if before is not None:
        assert unchanged(model, before) and fallow.handle_of(model) is None
    return str(caught.value)

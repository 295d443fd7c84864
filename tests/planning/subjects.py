"""Models, losses and oracles that the tests of planning share."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from cases import POSITIVE
from casework import Case
from torch import Tensor, nn

from fallow.surgery import handle_of

BY_NAME: dict[str, Case] = {case.name: case for case in POSITIVE}
Loss = Callable[[Any, Any], Tensor]


def distance(output: Any, target: Any) -> Tensor:
    """A loss for whatever a model returns: each sample's own weighted sum, bent, and their mean."""
    first = next(t for t in _leaves(output) if t.is_floating_point() and t.dim() > 1)
    rows = first.flatten(1).double()
    weights = torch.cos(torch.arange(rows.shape[1], dtype=torch.float64, device=rows.device))
    return ((rows * weights).mean(1) - 0.3).square().mul(50).mean()


def _leaves(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _leaves(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _leaves(value)


class Residuals(nn.Module):
    """A stem, blocks x + f(x), a head."""

    def __init__(self, *branches: nn.Module, inputs: int = 4, width: int = 6, outputs: int = 3) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(inputs, width), nn.Linear(width, outputs)
        self.blocks = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def bent(width: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


def residuals(blocks: int = 4) -> Residuals:
    torch.manual_seed(5)
    return Residuals(*(bent() for _ in range(blocks)))


def everything(model: nn.Module) -> dict[str, Any]:
    """All that probing could leave behind, and the generators."""
    handle = handle_of(model)
    return {
        "values": {k: v.clone() for k, v in model.state_dict().items()},
        "same tensors": {k: id(v) for k, v in model.state_dict(keep_vars=True).items()},
        "grads": {
            n: (id(p.grad), None if p.grad is None else p.grad.clone()) for n, p in model.named_parameters()
        },
        "trainable": {n: p.requires_grad for n, p in model.named_parameters()},
        "flags": {n: m.training for n, m in model.named_modules()},
        "classes": {n: type(m) for n, m in model.named_modules()},
        "hooks": {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in model.named_modules()},
        "handle": handle and copy.deepcopy((handle.state_dict(), handle.report(), handle.masks())),
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1],
        "python": random.getstate(),
    }


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, tuple) and isinstance(b, tuple) and type(a) is type(b) is tuple:
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    return bool(np.array_equal(a, b)) if isinstance(a, np.ndarray) else bool(a == b)


@contextmanager
def nothing_changes(model: nn.Module) -> Iterator[None]:
    before = everything(model)
    try:
        yield
    finally:
        for what, after in everything(model).items():
            assert _same(before[what], after), f"{what} changed"

"""The size of a model: its parameters, and the work of one forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fallow.surgery.trace import _flops


@dataclass(frozen=True)
class Size:
    """Parameters, and FLOPs of a forward of one row (a multiplication and an addition count two)."""

    parameters: int
    flops: int


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.total += _flops(func, args, kwargs or {}, out)
        return out


def size_of(model: nn.Module, inputs: tuple[tuple, dict]) -> Size:
    """Count a model's parameters, and the products and convolutions of its forward on `inputs`."""
    counter = _Counter()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), counter:
            model(*inputs[0], **inputs[1])
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return Size(sum(p.numel() for p in model.parameters()), counter.total)

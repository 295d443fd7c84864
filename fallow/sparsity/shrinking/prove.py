"""Prove that two models compute the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fallow.sparsity.shrinking.record import named_calls

Inputs = tuple[tuple, dict]


def difference(dense: nn.Module, small: nn.Module, batches: Sequence[Inputs], stack: list[str]) -> float:
    """The largest difference of outputs, relative to the largest output.

    Args:
        dense: the reference.
        small: the candidate; an error it raises is passed on, with the running modules left in `stack`.
        batches: (args, kwargs) for both.
        stack: emptied first.
    """
    worst = 0.0
    for args, kwargs in batches:
        stack.clear()
        with torch.no_grad():
            expected = _tensors(dense(*args, **kwargs))
            with named_calls(small, stack):
                got = _tensors(small(*args, **kwargs))
        if [t.shape for t in expected] != [t.shape for t in got]:
            return float("inf")
        for a, b in zip(expected, got, strict=True):
            worst = max(worst, _distance(a, b))
    return worst


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def _distance(a: Tensor, b: Tensor) -> float:
    if not a.is_floating_point() or not a.numel():
        return 0.0 if torch.equal(a, b) else float("inf")
    a, b = a.double(), b.double()
    if not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    size = a.nan_to_num(0.0, 0.0, 0.0).abs().amax()
    gap = (a - b).nan_to_num(0.0, 0.0, 0.0).abs().amax()
    return float(gap / (size + 1e-3)) if gap else 0.0

"""What a case says: where a model is residual, written down by hand, and how to feed it.

Every `Sum` says which module's own code performs a residual addition, which of that module's additions of two
float tensors it is, and which operand is the branch. Tests derive the expected sites from it, and `laws.py`
masks the dense model there, so that neither asks `fallow.surgery` where a residual sum is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Sum:
    """A residual addition: the ``which``-th of ``module``'s own; operand ``branch`` rests along ``dim``."""

    site: str
    module: str
    which: int = 0
    branch: int = 1
    kind: str = "identity"
    dim: int = 0
    norms: tuple[str, ...] = ()  # BatchNorms of the branch


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    sums: tuple[Sum, ...]
    ambiguous: tuple[str, ...] = ()
    big: bool = False

    def model(self) -> nn.Module:
        """The same random model at every call, every parameter with some size, no dropout of its own."""
        torch.manual_seed(1)
        model = self.build().train()
        for module in model.modules():
            for key in ("p", "dropout"):
                if isinstance(getattr(module, key, None), float):
                    setattr(module, key, 0.0)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.05)
        return model

    def feed(self, rows: int, seed: int = 2) -> dict[str, Any] | tuple[Any, ...]:
        torch.manual_seed(seed)
        given = self.inputs(rows)
        return given if isinstance(given, (dict, tuple)) else (given,)

    def __str__(self) -> str:
        return self.name


# --- shorthand -------------------------------------------------------------------------------------------


def noise(*shape: int) -> Callable[[int], Tensor]:
    return lambda rows: torch.randn(rows, *shape)


def tokens(length: int, vocabulary: int = 50) -> Callable[[int], dict[str, Tensor]]:
    return lambda rows: {"input_ids": torch.randint(1, vocabulary, (rows, length))}


def masked_tokens(length: int) -> Callable[[int], dict[str, Tensor]]:
    def make(rows: int) -> dict[str, Tensor]:
        lengths = 1 + torch.arange(rows) % length
        mask = (torch.arange(length) < lengths[:, None]).long()
        return {"input_ids": torch.randint(1, 50, (rows, length)), "attention_mask": mask}

    return make


def each(count: int, *sums: Sum) -> tuple[Sum, ...]:
    """The sums of ``count`` blocks: ``{}`` is the block's number."""
    return tuple(
        replace(
            s, site=s.site.format(i), module=s.module.format(i), norms=tuple(n.format(i) for n in s.norms)
        )
        for i in range(count)
        for s in sums
    )

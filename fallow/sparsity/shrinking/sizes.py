"""Sizes that modules remember: which of a module's own numbers must follow when a tensor gets smaller."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from fallow.sparsity.shrinking.decide import Decision, _full
from fallow.sparsity.shrinking.facts import Sized

# These compute from their weights; their own sizes are set with them.
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.PReLU, nn.Embedding)
Attributes = dict[str, dict[str, int]]


@dataclass(frozen=True)
class _Change:
    """In this module, attributes of value `old` may have to become `new`."""

    module: str
    kind: type
    names: tuple[str, ...]
    old: int
    new: int


def _new_size(item: Sized, decision: Decision) -> int:
    mask = decision.goes(item.layer)
    away = _full(mask, item.dim).movedim(item.dim, 0).flatten(1)[:, 0]
    return item.old - int(away.sum())


def _changes(model: nn.Module, decision: Decision) -> list[_Change]:
    found: dict[_Change, None] = {}
    for item in decision.record.sized:
        module = model.get_submodule(item.module)
        if isinstance(module, _LAYERS) or (new := _new_size(item, decision)) == item.old:
            continue
        names = tuple(k for k, v in vars(module).items() if type(v) is int and v == item.old)
        if names:
            found[_Change(item.module, type(module), names, item.old, new)] = None
    return list(found)


def proposals(model: nn.Module, decision: Decision) -> Iterator[Attributes]:
    """Ways to set the modules' own numbers, the likeliest first; the right one is found by running the model.

    A number of a module that equals a size which its forward names, and which changes, is taken to be that
    size. Where several do (as many heads as channels in each), every one of them is tried alone too.
    """
    changes = _changes(model, decision)
    yield _chosen(changes, {})
    several: dict[type, set[str]] = {}
    for change in changes:
        if len(change.names) > 1:
            several.setdefault(change.kind, set()).update(change.names)
    for kind, names in several.items():
        for name in sorted(names):
            yield _chosen(changes, {kind: name})
    if changes:
        yield {}


def _chosen(changes: list[_Change], only: dict[type, str]) -> Attributes:
    attributes: Attributes = {}
    for change in changes:
        name = only.get(change.kind)
        for own in change.names:
            if len(change.names) == 1 or name in (None, own):
                attributes.setdefault(change.module, {})[own] = change.new
    return attributes


def suspects(model: nn.Module, decision: Decision, stack: list[str]) -> dict[int, str]:
    """Labels that go and pass, by size, through the module that failed (or, without one, through any)."""
    for depth in range(len(stack), -1, -1):
        names = _alike(model, stack[depth - 1]) if depth else None
        found: dict[int, str] = {}
        for item in decision.record.sized:
            module = model.get_submodule(item.module)
            if isinstance(module, _LAYERS) or (names is not None and item.module not in names):
                continue
            for label in item.layer[decision.goes(item.layer)].tolist():
                where = item.module or "the model itself"
                found[label] = f"the forward of {where} ({type(module).__name__}) fixes its sizes"
        if found:
            return found
    return {}


def _alike(model: nn.Module, name: str) -> set[str]:
    kind = type(model.get_submodule(name))
    return {n for n, m in model.named_modules() if type(m) is kind}

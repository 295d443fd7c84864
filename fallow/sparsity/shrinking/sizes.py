"""Sizes that modules remember: which of a module's own numbers must follow when a tensor gets smaller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from fallow.sparsity.shrinking.decide import Decision, slabs
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
    return item.old - int(slabs(mask, item.dim).sum())


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


def settle(
    model: nn.Module, decision: Decision, attempt: Callable[[Attributes], list[str] | None]
) -> list[str] | None:
    """Find the numbers of modules that must follow, by running the smaller model.

    A number of a module that equals a size which its forward names, and which changes, may be that size. None
    is changed before the model was seen to fail without: then those of the class of modules that failed,
    then all. Where several numbers of a module are equal (as many heads as channels in each), each is tried
    alone too.

    Args:
        model: the dense model.
        decision: what goes.
        attempt: runs the smaller model with these attributes: None if it is right to rounding, else the
            modules running when it failed, outermost first (none where it ran through).

    Returns:
        None where an attempt was right (the last one), else where the first failed.
    """
    changes = _changes(model, decision)
    chosen: dict[type, str | None] = {}  # None: all of its numbers
    first = failed = attempt({})
    while failed is not None:
        waiting = {c.kind for c in changes} - set(chosen)
        if not waiting:
            break
        running = [type(model.get_submodule(name)) for name in reversed(failed)]
        nearest = next((kind for kind in running if kind in waiting), None)
        chosen.update(dict.fromkeys({nearest} if nearest else waiting))
        failed = attempt(_attributes(changes, chosen))
    for kind in dict.fromkeys(c.kind for c in changes if len(c.names) > 1):
        for name in sorted({n for c in changes if c.kind is kind for n in c.names}):
            if failed is not None:
                failed = attempt(_attributes(changes, {**chosen, kind: name}))
    return None if failed is None else first


def _attributes(changes: list[_Change], chosen: dict[type, str | None]) -> Attributes:
    attributes: Attributes = {}
    for change in changes:
        if change.kind not in chosen:
            continue
        name = chosen[change.kind]
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
    return _owned(decision, stack)


def _owned(decision: Decision, stack: list[str]) -> dict[int, str]:
    """Labels that go from the parameters of the innermost module that was running and has any."""
    for name in reversed(stack):
        found: dict[int, str] = {}
        for leaf, info in decision.record.leaves.items():
            if not name or leaf.startswith(f"{name}."):
                for layer in info.layers:
                    why = f"the forward of {name or 'the model itself'} fails with fewer channels"
                    found.update(dict.fromkeys(layer[decision.goes(layer)].tolist(), why))
        if found:
            return found
    return {}


def _alike(model: nn.Module, name: str) -> set[str]:
    kind = type(model.get_submodule(name))
    return {n for n, m in model.named_modules() if type(m) is kind}

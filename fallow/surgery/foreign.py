"""Read the noise modules of timm, torchvision and transformers, none of which is imported."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fallow.surgery.counted import Counted, DropBlock2d, DropBlock3d, DropPath

KINDS = ("drop_path", "drop_block")
_LIBRARIES = ("timm", "torchvision", "transformers")
_NAMES = {
    "drop_path": re.compile(r"\w*(DropPath|StochasticDepth)"),
    "drop_block": re.compile(r"DropBlock([1-3][dD])?"),
}


@dataclass(frozen=True)
class Noise:
    """What a module of another library asks for; ``make`` builds the module of ours that does it."""

    survival_rate: float
    mode: str  # "row" | "batch" of a drop path
    make: Callable[[], Counted]


@dataclass
class Place:
    """One noise module in a model and everywhere it is held."""

    names: list[str]
    module: nn.Module
    kind: str
    read: Noise | str  # the reason where it has no counterpart
    holders: list[tuple[nn.Module, str]] = field(default_factory=list)


def places(model: nn.Module, kinds: tuple[str, ...]) -> list[Place]:
    """The active noise modules below a model, in its order; one that is held twice is one place.

    Modules that drop nothing, at a rate of zero, are passed over.
    """
    found: dict[int, Place] = {}
    for path, holder, attribute, module in _held(model):
        kind = _kind(type(module))
        if kind not in kinds:
            continue
        read = _read(module, kind)
        if read is not None:
            place = found.setdefault(id(module), Place([], module, kind, read))
            place.names.append(path)
            place.holders.append((holder, attribute))
    return list(found.values())


def _held(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    for path, holder in model.named_modules():
        for attribute, module in holder._modules.items():
            if module is not None:
                yield f"{path}.{attribute}" if path else attribute, holder, attribute, module


def _kind(cls: type) -> str:
    """By the name of the class or of one that it is made from; "" for others."""
    if any(base.__module__.startswith("fallow.") for base in cls.__mro__):
        return ""
    for base in cls.__mro__:
        for kind, names in _NAMES.items():
            if names.fullmatch(base.__name__):
                return kind
    return ""


def _read(module: nn.Module, kind: str) -> Noise | str | None:
    """What it asks for; why it has no counterpart; None where it drops nothing."""
    drop = _drop(module)
    if drop == 0:
        return None
    known = [c for c in type(module).__mro__ if c.__module__.partition(".")[0] in _LIBRARIES]
    if not known:
        return f"{type(module).__name__} of {type(module).__module__} is no class of {', '.join(_LIBRARIES)}"
    if getattr(type(module), "forward", None) is not getattr(known[0], "forward", None):
        return f"{type(module).__name__} has a forward of its own"
    if drop is None:
        return f"{type(module).__name__} does not say its rate in drop_prob or p"
    # timm: a factor of the chance that blocks start, so in first order of the share that is dropped
    drop *= float(getattr(module, "gamma_scale", 1.0))
    if not 0 < drop < 1:
        return f"it drops a share of {drop:g}, which leaves no survival rate in (0, 1]"
    option = next((o for o, why in _WITHOUT if getattr(module, o, why[0]) != why[0]), None)
    if option is not None:
        return f"{option}={getattr(module, option)!r} {dict(_WITHOUT)[option][1]}"
    return _block(module, 1 - drop) if kind == "drop_block" else _path(module, 1 - drop)


# Options that change the law: the value that we have a counterpart for, and what the others do.
_WITHOUT: tuple[tuple[str, tuple[Any, str]], ...] = (
    ("with_noise", (False, "puts noise where it drops, and ours puts zeros")),
    ("batchwise", (False, "drops the same blocks in all rows, and ours are drawn for each row")),
    ("scale_by_keep", (True, "does not scale what is kept, and ours is times 1/p")),
)


def _drop(module: nn.Module) -> float | None:
    """The chance to drop, as timm and transformers or torchvision call it; None where it does not say."""
    for attribute in ("drop_prob", "p"):
        if attribute in module.__dict__:
            value = module.__dict__[attribute]
            try:
                return 0.0 if value is None else float(value)
            except (TypeError, ValueError):
                return None
    return None


def _path(module: nn.Module, rate: float) -> Noise:
    mode = str(getattr(module, "mode", "row"))
    return Noise(rate, mode, lambda: DropPath(survival_rate=rate, mode=mode))


def _block(module: Any, rate: float) -> Noise:
    cls = DropBlock3d if any(c.__name__ == "DropBlock3d" for c in type(module).__mro__) else DropBlock2d
    shared, block = bool(getattr(module, "couple_channels", False)), module.block_size
    return Noise(rate, "row", lambda: cls(survival_rate=rate, block_size=block, shared_channels=shared))

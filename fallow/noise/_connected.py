"""Masks of a module's parameters while its forward runs."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fallow.errors import UsageError, check_rate, nearest
from fallow.noise import _row_masks

# Where a module keeps the handle of each of its masked parameters.
_MARK = "_fallow_drop_connect"


class DropConnect:
    """What `drop_connect_` has put on a module; made by it.

    Attributes:
        module: The module.
        names: Of its masked parameters.
        mode: "batch" or "row".
        generator: Of the draws, or None.
    """

    def __init__(
        self,
        module: nn.Module,
        survival_rate: float,
        names: tuple[str, ...],
        mode: str,
        generator: torch.Generator | None,
    ) -> None:
        self.module, self.names, self.mode, self.generator = module, names, mode, generator
        self.survival_rate = survival_rate
        self._hooks: list[Any] = []
        for owner, attribute in self._parameters(module):
            owner.__dict__.setdefault(_MARK, {})[attribute] = self
        if mode == "row":
            module.__dict__["forward"] = self._row
        else:
            after = module.register_forward_hook(self._leave, always_call=True)
            self._hooks = [module.register_forward_pre_hook(self._enter), after]

    @property
    def survival_rate(self) -> float:
        """The probability that a weight is kept."""
        return self._rate

    @survival_rate.setter
    def survival_rate(self, value: float) -> None:
        self._rate = check_rate(value)

    @staticmethod
    def of(module: nn.Module) -> DropConnect | None:
        """The handle of a module with masked parameters, that of a copy for instance; None without."""
        found = (handle for part in module.modules() for handle in part.__dict__.get(_MARK, {}).values())
        return next((handle for handle in found if handle.module is module), None)

    def remove(self) -> None:
        """Leave the module as it was before; again: nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self.module.__dict__.get("forward") == self._row:
            del self.module.__dict__["forward"]
        self._restore(self.module)
        for owner, attribute in self._parameters(self.module):
            marks = owner.__dict__.get(_MARK, {})
            if marks.get(attribute) is self:
                del marks[attribute]
            if not marks:
                owner.__dict__.pop(_MARK, None)

    def __repr__(self) -> str:
        return f"DropConnect(survival_rate={self.survival_rate}, names={self.names}, mode={self.mode!r})"

    def _parameters(self, module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
        """The module that has it, and the attribute, of each parameter."""
        for name in self.names:
            path, _, attribute = name.rpartition(".")
            yield module.get_submodule(path), attribute

    # An attribute of the instance is found before a parameter of the same name, and nothing else sees it.
    def _enter(self, module: nn.Module, _args: Any) -> None:
        self._restore(module)  # what an interrupt in the middle of a forward has left
        if not module.training or self._rate == 1:
            return
        for owner, attribute in self._parameters(module):
            owner.__dict__[attribute] = masked(getattr(owner, attribute), self._rate, self.generator)
            _tell_recurrent(owner)

    def _leave(self, module: nn.Module, _args: Any, _output: Any) -> None:
        self._restore(module)

    def _restore(self, module: nn.Module) -> None:
        for owner, attribute in self._parameters(module):
            if owner.__dict__.pop(attribute, None) is not None:
                _tell_recurrent(owner)

    def _row(self, x: Tensor) -> Tensor:
        layer: Any = self.module
        if not layer.training or self._rate == 1 or DropConnect.of(layer) is not self:
            return linear(x, layer.weight, layer.bias)
        return _row_masks.linear(x, layer.weight, layer.bias, self._rate, self.generator)


def _tell_recurrent(owner: nn.Module) -> None:
    """Bring the list of parameters up to date that a recurrent module reads in place of its attributes.

    Its own way to do so would also move parameters into one piece of memory, on a GPU and in every forward.
    """
    names = owner.__dict__.get("_flat_weights_names")
    if names is not None:
        flat = [getattr(owner, name, None) for name in names]
        owner.__dict__["_flat_weights"] = flat
        owner.__dict__["_flat_weight_refs"] = [w if w is None else weakref.ref(w) for w in flat]


def masked(weight: Tensor, p: float, generator: torch.Generator | None) -> Tensor:
    """``mask * weight / p``; the number is not rounded to a half type first."""
    rest = dropped(tuple(weight.shape), p, weight.device, generator)
    return (weight * (1 / p)).masked_fill_(rest, 0)


def dropped(
    shape: tuple[int, ...], p: float, device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """What a mask drops, bool, True = dropped."""
    place = device if generator is None else generator.device
    mask = torch.empty(shape, dtype=torch.bool, device=place)
    return mask.bernoulli_(1 - p, generator=generator).to(device)


def check_names(module: nn.Module, names: tuple[str, ...]) -> None:
    """Refuse names whose parameters cannot be masked."""
    kind = type(module).__name__
    known = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    if not names or len(set(names)) < len(names):
        raise UsageError(f"names must be different names of parameters, at least one, got {names!r}")
    for name in names:
        if name not in known:
            close = nearest(name, known)
            hint = f"did you mean {close}?" if close else f"it has {', '.join(known) or 'none'}"
            raise UsageError(f"{kind} has no parameter {name!r}; {hint}")
        path, _, attribute = name.rpartition(".")
        owner: Any = module.get_submodule(path)
        if attribute in owner.__dict__.get(_MARK, {}):
            raise UsageError(
                f"{name} of {kind} has DropConnect already; set survival_rate of DropConnect.of(module), or "
                "remove() it first"
            )
        if isinstance(owner, nn.Embedding | nn.EmbeddingBag) and (owner.sparse or owner.max_norm is not None):
            raise UsageError(
                f"{kind} with max_norm= or sparse=True writes to its weight itself, which a mask would hide; "
                "make it without them"
            )


def check_row(module: nn.Module, names: tuple[str, ...]) -> None:
    """Refuse what has no row mode."""
    if type(module).forward is not nn.Linear.forward or names != ("weight",):
        raise UsageError(
            f'mode="row" is for the weight of nn.Linear, got {", ".join(names)} of {type(module).__name__}; '
            'use mode="batch"'
        )
    if "forward" in module.__dict__:
        raise UsageError(
            'something has replaced the forward of this module; take it off, or use mode="batch"'
        )

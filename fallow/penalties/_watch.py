"""What one linear layer of a model was given in the last training forward, seen through hooks."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Watch:
    """Inputs of one layer, of the calls in the latest forward of the model in which it was training.

    A call outside a forward of the model counts as a forward of its own. Forwards that a checkpoint runs
    again inside backward do not count. Copies see nothing and hold nothing, so that a copied model has no
    graph in it.

    Attributes:
        inputs: In the order of the calls; whoever takes them empties the list.
        graph: Whether gradients were on in all of these calls.
        noise: Name of the dropout that made one of them, if any did.
        attached: Whether the hooks are in a model.
    """

    def __init__(self, model: nn.Module | None, layer: nn.Module | None) -> None:
        self.inputs: list[Tensor] = []
        self.graph = True
        self.noise: str | None = None
        self._depth, self._fresh = 0, True
        self._made: dict[str, weakref.ref[Tensor]] = {}
        self.attached, self._handles = model is not None, []
        if model is None or layer is None:
            return
        self._handles = [layer.register_forward_hook(self.see, with_kwargs=True)]
        if model is not layer:
            self._handles.append(model.register_forward_pre_hook(self.begin))
            self._handles.append(model.register_forward_hook(self.end, always_call=True))
        for name, module in model.named_modules():
            if is_dropout(module):
                self._handles.append(module.register_forward_hook(_Note(self, name)))

    def __reduce__(self) -> Any:
        return Watch, (None, None)

    def remove(self) -> None:
        """Take the hooks out and let go of the inputs."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.attached = [], False
        self.clear()

    def clear(self) -> None:
        """Let go of the inputs."""
        self.inputs, self.graph, self.noise = [], True, None

    def begin(self, _module: nn.Module, _args: Any) -> None:
        """A forward of the model begins."""
        if self.attached:
            self._fresh = self._fresh or self._depth == 0
            self._depth += 1

    def end(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        """It ended, with an error or without."""
        if self.attached:
            self._depth = max(self._depth - 1, 0)  # somebody else's hook may have failed before `begin`
            self._made = {}

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], _output: Any) -> None:
        """The layer was called."""
        # a compiled forward is not traced in a backward
        again = not torch.compiler.is_compiling() and _in_backward()
        if not self.attached or not module.training or again:
            return
        if self._fresh or not self._depth:
            self.clear()
        self._fresh = False
        x = args[0] if args else kwargs["input"]
        self.inputs.append(x)
        self.graph = self.graph and torch.is_grad_enabled()
        makers = (name for name, made in self._made.items() if made() is x)
        self.noise = self.noise or next(makers, None)


class _Note:
    """The hook of a dropout: remembers, weakly, what it made."""

    def __init__(self, watch: Watch, name: str) -> None:
        self.watch, self.name = watch, name

    def __call__(self, module: nn.Module, _args: Any, output: Any) -> None:
        if self.watch.attached and isinstance(output, Tensor) and module.training and drops(module):
            self.watch._made[self.name] = weakref.ref(output)


def is_dropout(module: nn.Module) -> bool:
    """Whether a module is noise by its name: torch's, fallow's and other libraries' all have it there."""
    return "drop" in type(module).__name__.lower() and next(module.children(), None) is None


def drops(module: nn.Module) -> bool:
    """Whether a dropout, in training, can change anything, as far as its rate can be read."""
    for holder in (module, getattr(module, "scheme", None)):
        for name, none in (("p", 0), ("drop_prob", 0), ("survival_rate", 1), ("variance", 0)):
            rate = getattr(holder, name, None)
            if isinstance(rate, int | float):
                return rate != none
    return True


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1

"""One operation while it is recorded, and the table of rules for operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fallow.sparsity.shrinking.facts import Info
from fallow.sparsity.shrinking.labels import Layers, reduced

if TYPE_CHECKING:
    from fallow.sparsity.shrinking.record import Recorder


@dataclass
class Step:
    """An operation: what it was called with, and what was known of that before it ran."""

    recorder: Recorder
    func: Any
    name: str  # "add" for aten.add_.Tensor
    args: tuple
    kwargs: dict
    tensors: list[Tensor]
    infos: list[Info]
    shapes: list[tuple[int, ...]] = field(init=False)

    def __post_init__(self) -> None:
        self.shapes = [tuple(t.shape) for t in self.tensors]

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        """An argument by position or name."""
        return self.args[index] if len(self.args) > index else self.kwargs.get(name, default)

    def dim(self, index: int, ndim: int, default: int = 0) -> int:
        """The dimension given at a position, counted from the front."""
        return self.arg(index, "dim", default) % max(ndim, 1)

    def say(self, what: str) -> str:
        """A reason, with the module."""
        return f"{what} in {self.recorder.place}"

    def mixed(self, layers: Layers, dims: Any, what: str) -> Layers:
        """The layers after an operation that mixes elements along `dims`."""
        return reduced(self.recorder.labels, layers, dims, self.say(what))


Rule = Callable[[Step, list[Tensor]], list[Info]]
RULES: dict[str, Rule] = {}


def rule(names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for operations of these names, in-place forms included."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names.split(), function))
        return function

    return register

"""Gates: modules of a branch that are not called while it rests, or are called on the kept rows only.

A gate is a dynamic subclass of the module's own class that overrides ``__call__``. Names, ``isinstance`` and
state_dict keys stay as they are, nobody's ``forward`` is copied, and hooks of a module that rests do not run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten, tree_map, tree_map_with_path, tree_unflatten

from fallow.rows import take
from fallow.saved import saved_as_rows
from fallow.surgery.branch import BranchState, Run
from fallow.surgery.found import Role
from fallow.surgery.standin import Rows, rest, unwrap, wrap
from fallow.surgery.trace import Slot

if TYPE_CHECKING:
    from fallow.surgery.decide import Decider


class Gated(nn.Module):
    """Mixin of gated modules; the gate itself is an instance attribute and travels with copies."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Ask the gate."""
        return self.__dict__["_fallow_gate"](super().__call__, args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Dynamic classes cannot be found by name: rebuild from the class below.

        One that something made a subclass of since (a parametrisation) is copied, or not, as that says.
        """
        if "_fallow_base" not in type(self).__dict__:
            return super().__reduce_ex__(protocol)
        return _rebuild, (_base(type(self)),), self.__getstate__()


def _base(cls: type) -> type:
    return cls.__dict__["_fallow_base"]


def _rebuild(base: type) -> nn.Module:
    cls = gated_class(base)
    return cls.__new__(cls)


@functools.cache
def gated_class(base: type) -> Any:
    """The gated subclass of a module class: one for each class, under the same name."""
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (Gated, base), {**names, "_fallow_base": base})


class Gate:
    """Decides, call by call, what a gated module does."""

    def __init__(self, decider: Decider, branch: BranchState, role: Role, first: bool) -> None:
        self.decider = decider
        self.branch = branch
        self.entry = role.entry
        self.first = first
        self.rows = role.rows
        self.template = role.template
        self.on_path, self.kept_before = role.on_path, role.kept_before
        self.shape_in, self.dim_in, self.shapes_out = role.shape_in, role.dim_in, role.shapes_out

    def __call__(self, call: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """Run the module as the current draw has it."""
        carried = _carried(args)
        if carried is None and kwargs:
            carried = _carried(tuple(kwargs.values()))
        if carried is not None:
            run = carried.run
        elif self.entry:
            run = self.decider.begin(self.branch, self._batched(args, kwargs), self.first)
        else:
            run = None
        if run is None:
            return call(*args, **kwargs)
        if run.rested:
            return self._at_rest(run, carried if carried is not None else self._batched(args, kwargs)[0])
        whole, (args, kwargs) = args, self._kept(run, args, kwargs)
        saving = nullcontext()
        if self.kept_before and carried is None and run.selection is not None and torch.is_grad_enabled():
            if whole and isinstance(whole[0], Tensor):
                saving = saved_as_rows(whole[0], args[0], run.selection, self.dim_in)
        with saving:
            out = call(*args, **kwargs)
        return self._wrapped(run, out)

    def _batched(self, args: tuple, kwargs: dict) -> tuple[Tensor, int]:
        """The first argument that has a batch dimension, and which it is."""
        if args and isinstance(args[0], Tensor):
            return args[0], self.rows.get("[0][0]") or 0
        fallback = None
        for path, leaf in _tensors((args, kwargs)):
            dim = self.rows.get(path)
            if dim is not None:
                return leaf, dim
            fallback = fallback if fallback is not None else leaf
        if fallback is None:
            raise TypeError(f"{self.branch.name}: its branch was called without a tensor")
        return fallback, 0

    def _kept(self, run: Run, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Arguments cut to the kept rows; what an earlier module cut already is only unwrapped."""

        def cut(path: str, leaf: Any) -> Any:
            if isinstance(leaf, Rows):
                return unwrap(leaf)
            if run.selection is None or not isinstance(leaf, Tensor):
                return leaf
            # Not seen in the example: whatever is as long as the batch goes with it.
            dim = self.rows.get(path, 0)
            fits = dim is not None and dim < leaf.dim() and leaf.shape[dim] == run.selection.total
            return take(leaf, run.selection, dim) if fits and dim is not None else leaf

        if not kwargs and all(isinstance(a, Tensor) or a is None for a in args):
            return tuple(cut(f"[0][{i}]", a) for i, a in enumerate(args)), kwargs
        return tree_map_with_path(lambda path, leaf: cut(keystr(path), leaf), (args, kwargs))

    def _wrapped(self, run: Run, out: Any) -> Any:
        if isinstance(out, Tensor):
            dim = self.on_path.get(self.template.value, -1) if isinstance(self.template, Slot) else -1
            return wrap(out, run, dim)
        leaves, spec = tree_flatten(out)
        slots, _ = tree_flatten(self.template)
        if len(slots) != len(leaves):  # an optional output that the example did not have
            slots = [next((s for s in slots if self._carries(s)), None), *[None] * (len(leaves) - 1)]
        marked = [
            wrap(leaf, run, self.on_path[slot.value])
            if isinstance(leaf, Tensor) and self._carries(slot)
            else leaf
            for leaf, slot in zip(leaves, slots, strict=True)
        ]
        return tree_unflatten(marked, spec)

    def _carries(self, slot: Any) -> bool:
        return isinstance(slot, Slot) and slot.value in self.on_path

    def _at_rest(self, run: Run, like: Tensor) -> Any:
        """The output's structure: stand-ins where the branch goes on, None for side results."""

        def fill(slot: Any) -> Any:
            if not isinstance(slot, Slot):
                return slot
            return rest(like, run, self._shape(like, slot.value)) if self._carries(slot) else None

        return fill(self.template) if isinstance(self.template, Slot) else tree_map(fill, self.template)

    def _shape(self, like: Tensor, value: int) -> tuple[int, ...]:
        """The shape the output would have: sizes the module passes on from here, others as in the example."""
        seen, dim, here = self.shapes_out[value], self.on_path[value], tuple(like.shape)
        if dim < 0 or len(here) != len(self.shape_in):
            return here
        batch = here[self.dim_in]
        passed = [d < len(here) and size == self.shape_in[d] for d, size in enumerate(seen)]
        return tuple(batch if d == dim else here[d] if passed[d] else n for d, n in enumerate(seen))


def install(module: nn.Module, gate: Gate) -> None:
    """Put a gate on a module."""
    module.__dict__["_fallow_gate"] = gate
    module.__class__ = gated_class(type(module))


def uninstall(module: nn.Module) -> None:
    """Take a module's gate off again."""
    if module.__dict__.pop("_fallow_gate", None) is not None:
        module.__class__ = _ungated(type(module))


def _ungated(cls: type) -> type:
    if "_fallow_base" in cls.__dict__:
        return _base(cls)
    # Something (a parametrisation, a sharding wrapper) made a subclass of the gated class since.
    bases = tuple(_ungated(b) if issubclass(b, Gated) else b for b in cls.__bases__)
    return type(
        cls.__name__, bases, {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    )


def _carried(values: tuple) -> Rows | None:
    for value in values:
        if isinstance(value, Rows):
            return value
        if isinstance(value, (tuple, list)) and (found := _carried(tuple(value))) is not None:
            return found
    return None


def _tensors(tree: Any) -> list[tuple[str, Tensor]]:
    found: list[tuple[str, Tensor]] = []
    tree_map_with_path(lambda p, x: found.append((keystr(p), x)) if isinstance(x, Tensor) else None, tree)
    return found

"""Record the data flow of one forward: every operation, every value, every module call.

A torch dispatch mode sees all operations, in-place ones and those inside libraries too; hooks on the modules
say which call each operation belongs to. Nothing here knows about residual sites: see `fallow.surgery.find`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry


@dataclass(slots=True)
class Value:
    """One tensor at one moment: an in-place operation makes a new value of the same tensor."""

    index: int
    op: int  # -1: not made by an operation (an input, a parameter, a constant)
    shape: tuple[int, ...]
    dtype: torch.dtype
    storage: int
    ancestors: int = 0  # bit set of the activations this value was computed from, itself included
    weights: frozenset[str] = frozenset()  # names of parameters, for values made of parameters alone
    trainable: bool = False  # some parameter that requires gradients is upstream
    readers: list[int] = field(default_factory=list)  # operations

    @property
    def activation(self) -> bool:
        """Whether it depends on the model's inputs (and not on parameters and constants alone)."""
        return self.ancestors != 0


@dataclass(slots=True)
class Op:
    """One aten operation."""

    index: int
    name: str
    inputs: list[int]
    outputs: list[int]
    call: int
    flops: int
    weights: frozenset[str]
    alpha: Any = 1
    arguments: tuple[Any, ...] = ()


@dataclass(slots=True)
class Call:
    """One call of one module; its operations are ``start <= index < end``."""

    index: int
    name: str
    module: nn.Module
    parent: int
    start: int
    end: int = -1
    inputs: dict[str, int] = field(default_factory=dict)  # path in (args, kwargs) -> value
    template: Any = None  # the output's structure, a `Slot` for each tensor


@dataclass(frozen=True, slots=True)
class Slot:
    """Stands for a tensor in a module's output."""

    value: int


@dataclass
class Trace:
    """What happened in one forward."""

    values: list[Value]
    ops: list[Op]
    calls: list[Call]
    outputs: set[int]
    rows: int
    batch: dict[int, int] = field(default_factory=dict)  # value -> its batch dimension

    def times_called(self) -> Counter[str]:
        """How often each module was called."""
        return Counter(call.name for call in self.calls)

    def chain(self, call: int) -> list[int]:
        """The call and the calls around it, innermost first."""
        chain = []
        while call >= 0:
            chain.append(call)
            call = self.calls[call].parent
        return chain


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    packet = func._overloadpacket
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=out))
    if "flash_attention_for_cpu" in str(packet):  # torch's own table leaves the CPU form out
        batch, heads, queries, width = args[0].shape
        return 4 * batch * heads * queries * args[1].shape[2] * width
    return 0


class Recorder(TorchDispatchMode):
    """Records operations and, through `hooks`, module calls."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.values: list[Value] = []
        self.ops: list[Op] = []
        self.calls: list[Call] = []
        self.stack: list[int] = []
        self.of_tensor: dict[int, int] = {}
        self.last_write: dict[int, int] = {}
        self.keep: list[Tensor] = []  # so that neither ids nor memory addresses come back during the trace
        self.parameters = {id(p): name for name, p in model.named_parameters()}

    # --- values -------------------------------------------------------------------------------------
    def new(self, tensor: Tensor, op: int, parents: list[int], source: bool = False) -> Value:
        """A value just made by an operation, or met for the first time."""
        value = Value(len(self.values), op, tuple(tensor.shape), tensor.dtype, _storage(tensor))
        for parent in parents:
            value.ancestors |= self.values[parent].ancestors
            value.trainable |= self.values[parent].trainable
        if value.ancestors or source:
            value.ancestors |= 1 << value.index
        else:
            value.weights = frozenset().union(*(self.values[p].weights for p in parents))
        self.values.append(value)
        self.of_tensor[id(tensor)] = value.index
        self.keep.append(tensor)
        return value

    def read(self, tensor: Tensor) -> int:
        """The value a tensor has now."""
        index = self.of_tensor.get(id(tensor))
        storage = _storage(tensor)
        if index is None:
            name = self.parameters.get(id(tensor))
            parents = [self.last_write[storage]] if storage in self.last_write else []
            value = self.new(tensor, -1, parents)
            if name is not None:
                value.weights, value.trainable = frozenset({name}), tensor.requires_grad
            return value.index
        written = self.last_write.get(storage, -1)
        if written > index:  # another view of the same memory was written to since
            return self.new(tensor, self.values[written].op, [index, written]).index
        return index

    # --- operations ---------------------------------------------------------------------------------
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: D105
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        inputs = [self.read(t) for t in tensors]
        out = func(*args, **kwargs)
        index = len(self.ops)
        names = [w for i in inputs for w in self.values[i].weights]
        outputs = []
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                value = self.new(t, index, inputs)
                outputs.append(value.index)
                if any(t is s for s in tensors):  # written in place
                    self.last_write[value.storage] = value.index
        forward = _flops(func, args, kwargs, out)
        # Backward repeats a product once per operand that needs a gradient (attention: 2.5 times in all).
        operands = sum(self.values[i].trainable for i in inputs[:2]) if forward else 0
        factor = 3.5 if "attention" in str(func) and operands else 1 + operands
        flops = round(forward * factor)
        call = self.stack[-1] if self.stack else -1
        plain = tuple(a for a in args if not isinstance(a, Tensor))
        op = Op(
            index, str(func), inputs, outputs, call, flops, frozenset(names), kwargs.get("alpha", 1), plain
        )
        self.ops.append(op)
        for i in set(inputs):
            self.values[i].readers.append(index)
        return out

    # --- modules ------------------------------------------------------------------------------------
    def enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A module is called."""
        parent = self.stack[-1] if self.stack else -1
        call = Call(len(self.calls), name, module, parent, len(self.ops))
        call.inputs = {p: self.read(t) for p, t in tensor_paths((args, kwargs))}
        self.calls.append(call)
        self.stack.append(call.index)

    def leave(self, output: Any) -> None:
        """It returns."""
        call = self.calls[self.stack.pop()]
        call.end = len(self.ops)
        call.template = tree_map(self._slot, output)

    def _slot(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return Slot(self.read(leaf))
        # Anything but plain data (a cache, say) belongs to this one forward and must not be handed out again.
        return leaf if isinstance(leaf, (bool, int, float, str, type(None))) else None


def tensor_paths(tree: Any) -> list[tuple[str, Tensor]]:
    """The tensors of a nested structure with the path of each."""
    if isinstance(tree, Tensor):
        return [("", tree)]
    return [
        (keystr(path), leaf) for path, leaf in tree_flatten_with_path(tree)[0] if isinstance(leaf, Tensor)
    ]


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse and opaque tensors have none
        return -id(tensor)


def record(model: nn.Module, args: tuple, kwargs: dict, rows: int) -> Trace:
    """Run ``model(*args, **kwargs)`` once and return its trace."""
    recorder = Recorder(model)
    removers: list[Callable[[], None]] = []
    for name, module in model.named_modules():

        def enter(m, a, k, name=name):
            recorder.enter(name, m, a, k)

        def leave(m, a, k, output):
            recorder.leave(output)

        removers.append(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        removers.append(module.register_forward_hook(leave, with_kwargs=True).remove)
    try:
        for _, t in tensor_paths((args, kwargs)):
            recorder.new(t, -1, [], source=True)
        with recorder:
            result = model(*args, **kwargs)
        outputs = {recorder.read(t) for _, t in tensor_paths(result)}
    finally:
        for remove in removers:
            remove()
    return Trace(recorder.values, recorder.ops, recorder.calls, outputs, rows)


def mark_batch(first: Trace, second: Trace) -> bool:
    """Find each value's batch dimension from two traces with different row counts.

    A dimension is the batch where it equals the row count in both. False (and nothing marked) where the two
    runs did not perform the same operations.
    """
    if [op.name for op in first.ops] != [op.name for op in second.ops] or len(first.values) != len(
        second.values
    ):
        return False
    for a, b in zip(first.values, second.values, strict=True):
        if len(a.shape) != len(b.shape):
            return False
        dims = [
            d
            for d, (m, n) in enumerate(zip(a.shape, b.shape, strict=True))
            if m == first.rows and n == second.rows
        ]
        if len(dims) == 1:
            first.batch[a.index] = dims[0]
    return True

"""Run a model once and record which channels go together, what is constant, and where channels are summed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fallow.sparsity.shrinking.facts import Info, Record, Site
from fallow.sparsity.shrinking.labels import Labels, Layers, support, vector
from fallow.sparsity.shrinking.rules import infer
from fallow.sparsity.shrinking.step import Step


class Recorder(TorchDispatchMode):
    """Follows labels and constants through every operation."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.record = Record(Labels())
        self.labels = self.record.labels
        self.info: dict[int, Info] = {}
        self.keep: list[Tensor] = []  # so that no id comes back during the run
        self.views: dict[int, list[int]] = {}  # memory -> tensors
        self.written: dict[int, Layers] = {}  # memory -> labels that were written through a view
        self.stack: list[str] = []
        self.site_of: dict[int, Site] = {}  # a sum's output -> the sum, while nothing else was done to it
        self.readers: Counter[int] = Counter()
        self.norms: list[tuple[int, str]] = []
        self.escaped = False  # a number was taken out of a tensor: nothing made from numbers is constant
        self._name_leaves(model)

    def _name_leaves(self, model: nn.Module) -> None:
        grouped = {
            m.weight: m.groups
            for m in model.modules()
            if isinstance(m, nn.modules.conv._ConvNd) and m.groups > 1 and not m.transposed
        }
        named: dict[int, str] = {}
        everything = [*model.named_parameters(remove_duplicate=False)]
        for name, tensor in everything + [*model.named_buffers(remove_duplicate=False)]:
            if id(tensor) in named:
                why = f"{named[id(tensor)]} and {name} are one parameter"
                for layer in self.info[id(tensor)].layers:
                    self.labels.freeze(layer, why)
                continue
            named[id(tensor)] = name
            info = Info(self._leaf_layers(tensor, grouped.get(tensor)), tensor.detach(), name)
            self.info[id(tensor)] = self.record.leaves[name] = info
            self.keep.append(tensor)

    def _leaf_layers(self, tensor: Tensor, groups: int | None) -> Layers:
        sizes, ndim = tensor.shape, tensor.dim()
        if groups is None:
            return [vector(self.labels.fresh(n), d, ndim) for d, n in enumerate(sizes) if n > 1]
        layers = [vector(self.labels.fresh(sizes[0]), 0, ndim)]
        if sizes[1] > 1:  # input i of group g: it varies over the rows too
            each = self.labels.fresh(groups * sizes[1]).reshape(groups, 1, sizes[1])
            rows = each.expand(groups, sizes[0] // groups, sizes[1]).reshape(sizes[0], sizes[1])
            layers.append(rows.reshape([sizes[0], sizes[1]] + [1] * (ndim - 2)))
        return layers

    # --- tensors ------------------------------------------------------------------------------------
    @property
    def where(self) -> str:
        """The module that is being run."""
        return self.stack[-1] if self.stack else ""

    @property
    def place(self) -> str:
        """The same in words."""
        return self.where or "the model itself"

    def of(self, tensor: Tensor) -> Info:
        """What is known of a tensor now."""
        info = self.info.get(id(tensor))
        if info is None:  # an input, or a constant that nobody registered: unknown either way
            info = self._put(tensor, Info([], fed=True))
        if info.stale:
            for layer in info.layers + self.written.get(_memory(tensor), []):
                self.labels.freeze(layer, f"memory written through another view is read in {self.place}")
            info.layers, info.known, info.fed = [], None, True
        return info

    def known(self, tensor: Tensor) -> Tensor | None:
        """Its constants."""
        return self.of(tensor).known

    def _put(self, tensor: Tensor, info: Info) -> Info:
        if self.info.get(id(tensor)) is None:
            self.keep.append(tensor)
            self.views.setdefault(_memory(tensor), []).append(id(tensor))
        self.info[id(tensor)] = info
        return info

    # --- operations ---------------------------------------------------------------------------------
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: D105
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        infos = [self.of(t) for t in tensors]
        for tensor, info in zip(tensors, infos, strict=True):
            self.readers[id(tensor)] += 1
            if info.leaf is not None:
                self.record.reads[info.leaf] += 1
        name = func._schema.name.split("::")[1]
        in_place = name.endswith("_") and not name.startswith("_")
        if in_place or name.startswith("_local_scalar"):
            self.escaped |= name.startswith("_local_scalar") and infos[0].known is None
        step = Step(self, func, name.rstrip("_") if in_place else name, args, kwargs, tensors, infos)
        out = func(*args, **kwargs)
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        results = infer(step, outputs)
        self.record.narrow |= any(t.is_floating_point() and t.dtype != torch.float64 for t in outputs)
        if in_place:
            self._write(outputs[0], results[0], _memory(tensors[0]))
        else:
            for tensor, info in zip(outputs, results, strict=True):
                self._put(tensor, info)
                for layer in info.layers:
                    if len(support(layer)) > 1:
                        self.record.slabs.append((self.place, layer))
        return out

    def _write(self, tensor: Tensor, info: Info, memory: int) -> None:
        self.site_of.pop(id(tensor), None)
        leaf = self.info[id(tensor)].leaf if id(tensor) in self.info else None
        if leaf is not None:  # a buffer written in the forward
            for layer in info.layers:
                self.labels.freeze(layer, f"{leaf} is written in the forward")
            info = Info([], None, leaf)
        self.info[id(tensor)] = info
        for other in self.views.get(memory, []):
            if other != id(tensor):
                self.info[other].stale = True
        self.written.setdefault(memory, []).extend(info.layers)

    # --- what rules record --------------------------------------------------------------------------
    def freeze(self, layers: Layers, why: str) -> None:
        """Nothing of these layers goes."""
        for layer in layers:
            self.labels.freeze(layer, why)

    def finish(self, result: Any) -> Record:
        """Freeze what comes out of the model, settle where constants can be folded, return the record."""
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                self.freeze(self.of(t).layers, "an output of the model")
        for tensor, mean in self.norms:
            site = self.site_of.get(tensor)
            if site is not None and site.target is None and self.readers[tensor] == 1:
                site.target, site.sign = mean, -1.0
        for site in self.record.sites:
            if site.target is not None and self.record.reads[site.target] != 1:
                site.target = None
            if site.matrix is not None and self.record.reads[site.matrix[0]] != 1:
                site.matrix = None
        for name, info in self.record.leaves.items():
            if not self.record.reads[name]:
                self.freeze(info.layers, f"{name} is not used in the forward")
        return self.record


def _memory(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return -id(tensor)


@contextmanager
def named_calls(model: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keep the names of the modules being run on `stack`; after an error it still shows where."""
    removers: list[Callable[[], None]] = []
    for name, module in model.named_modules():

        def enter(m: nn.Module, a: Any, name: str = name) -> None:
            stack.append(name)

        def leave(m: nn.Module, a: Any, out: Any) -> None:
            stack.pop()

        removers += [
            module.register_forward_pre_hook(enter).remove,
            module.register_forward_hook(leave).remove,
        ]
    try:
        yield
    finally:
        for remove in removers:
            remove()


def record(model: nn.Module, args: tuple, kwargs: dict) -> Record:
    """Run ``model(*args, **kwargs)`` in its present mode, without gradients, and record it."""
    recorder = Recorder(model)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # torch's fused encoder layer would hide what it does
    try:
        with torch.no_grad(), named_calls(model, recorder.stack), recorder:
            result = model(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return recorder.finish(result)

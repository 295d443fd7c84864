"""Probe a model: make small batches from an example, run them, and put everything back as it was."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fallow.errors import ArgumentError, SiteError
from fallow.surgery.root import ByModules
from fallow.surgery.trace import Trace, mark_batch, record

ROWS = 4, 3  # two batch sizes, so that a batch dimension is known and not guessed


def arguments(example: Any) -> tuple[tuple, dict]:
    """An example as (args, kwargs): a tensor, a tuple of positional or a dict of keyword arguments."""
    if isinstance(example, Tensor):
        args, kwargs = (example,), {}
    elif isinstance(example, (tuple, list)):
        args, kwargs = tuple(example), {}
    elif isinstance(example, dict) or hasattr(example, "keys"):
        args, kwargs = (), dict(example)
    else:
        raise ArgumentError(
            "example must be a tensor, a tuple of positional arguments or a dict of keyword arguments of the "
            f"model's forward, got {type(example).__name__}"
        )
    if not any(isinstance(t, Tensor) and t.dim() for t in tree_leaves((args, kwargs))):
        raise ArgumentError(
            "example holds no tensor with a batch dimension; pass a small batch as the model takes it"
        )
    return args, kwargs


def tiled(args: tuple, kwargs: dict, rows: int) -> tuple[tuple, dict]:
    """The example as a batch of ``rows`` rows that differ from each other.

    Whatever is as long as the first tensor in dimension 0 goes with it. Rows must differ, or a proof would
    not notice one taken for another: floats are disturbed a little, integers rotated along their last
    dimension, so that token ids stay valid ones.
    """
    first = next(t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim())
    batch = first.shape[0]
    if batch == 0:
        raise ArgumentError(f"example has no rows: shape {tuple(first.shape)}; pass at least one")
    generator = torch.Generator().manual_seed(0)

    def tile(t: Any) -> Any:
        if not isinstance(t, Tensor) or t.dim() == 0 or t.shape[0] != batch:
            return t
        out = t.detach()[torch.arange(rows, device=t.device) % batch]
        if t.dtype.is_floating_point:
            noise = torch.randn(out.shape, generator=generator).to(t)
            return out + noise * (0.1 * out.float().abs().mean().to(t.dtype) + 0.01)
        if t.dtype == torch.bool or t.dim() < 2 or t.dtype.is_complex:
            return out
        return torch.stack([row.roll(i, -1) for i, row in enumerate(out)])

    return tree_map(tile, (args, kwargs))


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Restore buffers, training flags, gradients and every random number generator afterwards."""
    flags = [(m, m.training) for m in model.modules()]
    held = [(m, dict(m._buffers)) for m in model.modules()]  # a forward may put new tensors there
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    generators = _host_generators()
    grads = [(p, p.grad) for p in model.parameters()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for module, training in flags:
                module.training = training
            for module, tensors in held:
                module._buffers.clear()
                module._buffers.update(tensors)
            with torch.no_grad():
                for buffer, was in buffers:
                    buffer.copy_(was)
            for restore, state in generators:
                restore(state)
            for p, grad in grads:
                p.grad = grad


def _host_generators() -> list[tuple[Any, Any]]:
    """Python's and numpy's generators: how to restore them, and their states."""
    found = [(random.setstate, random.getstate())]
    numpy = sys.modules.get("numpy")
    return [*found, (numpy.random.set_state, numpy.random.get_state())] if numpy is not None else found


@contextmanager
def by_modules() -> Iterator[None]:
    """Inside, torch's transformer layers call their modules also where no gradient is needed."""
    path = ByModules()
    path.enter()
    try:
        yield
    finally:
        path.leave()


@contextmanager
def no_silent_parameters(model: nn.Module) -> Iterator[None]:
    """Give parameters near zero (zero-initialised norms, layer scale) some size while a proof runs.

    Where a branch ends in a factor of zero, every way of resting it would look right.
    """
    generator = torch.Generator().manual_seed(1)
    saved = []
    with torch.no_grad():
        for p in model.parameters():
            if p.numel() and p.dtype.is_floating_point and float(p.detach().abs().amax()) < 1e-2:
                saved.append((p, p.detach().clone()))
                p.copy_((0.1 + 0.2 * torch.rand(p.shape, generator=generator)).to(p))
    try:
        yield
    finally:
        with torch.no_grad():
            for p, was in saved:
                p.copy_(was)


def run(model: nn.Module, args: tuple, kwargs: dict, rows: int, train: bool) -> Trace:
    """Record one forward; an example that the model cannot run becomes a clear error."""
    model.train(train)
    inputs = tiled(args, kwargs, rows)
    try:
        with torch.enable_grad():
            return record(model, *inputs, rows)
    except Exception as error:
        raise SiteError(
            f"the model cannot run the example (a batch of {rows} rows, {'training' if train else 'eval'} "
            f"mode): {type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}. "
            "Pass the inputs of one forward as example="
        ) from error


def traces(model: nn.Module, args: tuple, kwargs: dict) -> tuple[Trace, Trace, bool]:
    """Traces in eval mode (what rests) and training mode (what drops); whether batch dimensions are known."""
    run(model, args, kwargs, ROWS[0], train=False)  # so that what a model computes once and keeps is there
    first = run(model, args, kwargs, ROWS[0], train=False)
    known = mark_batch(first, run(model, args, kwargs, ROWS[1], train=False))
    return first, run(model, args, kwargs, ROWS[0], train=True), known


def dropping(trace: Trace, model: nn.Module) -> str | None:
    """The module that drops paths already, if one does.

    A path is dropped where a random tensor of one number a sample (or one in all) multiplies an activation.
    """
    for op in trace.ops:
        name = op.name.split(".")[1] if "." in op.name else op.name
        if not name.startswith(("bernoulli", "rand")) or name.startswith("randperm"):
            continue
        shape = trace.values[op.outputs[0]].shape
        numbers = 1
        for n in shape:
            numbers *= n
        single = name.startswith("bernoulli") and numbers == 1 and len(shape) > 1
        by_row = numbers == trace.rows and len(shape) > 0 and shape[0] == trace.rows
        module = trace.calls[op.call].module if op.call >= 0 else model
        if (
            (single or by_row)
            and not isinstance(module, nn.modules.dropout._DropoutNd)
            and _scales(trace, op.outputs[0])
        ):
            return trace.calls[op.call].name if op.call >= 0 else "the model"
    for name, module in model.named_modules():
        for attribute in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
            for holder in (module, getattr(module, "config", None)):
                rate = getattr(holder, attribute, 0)
                if isinstance(rate, float) and rate > 0:
                    return f"{name or 'the model'} ({attribute}={rate:g})"
    return None


def _scales(trace: Trace, value: int) -> bool:
    """Whether the value, within a few operations, multiplies an activation or selects rows of one."""
    todo = [(value, 0)]
    while todo:
        v, far = todo.pop()
        for reader in trace.values[v].readers:
            op = trace.ops[reader]
            product = any(word in op.name for word in (".mul", ".div", ".where"))
            if product and any(trace.values[i].activation for i in op.inputs if i != v):
                return True
            if far < 5:
                todo += [(o, far + 1) for o in op.outputs]
    return False

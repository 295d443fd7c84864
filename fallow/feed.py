"""What users pass to have a model tried on: batches, and a loss of output and target.

A batch is a pair ``(inputs, target)``, or a dict without a target that goes whole to
``loss_fn(output, batch)``. Inputs are a tensor, a tuple of positional arguments or a dict of keyword
arguments.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fallow.errors import ArgumentError, RunError, UsageError, check_count

LossFunction = Callable[[Any, Any], Tensor]
Pair = tuple[Any, Any]


def inputs_of(batch: Any) -> Any:
    """The model's inputs of a batch: of an (inputs, target) pair the first; else the batch itself."""
    return batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 2 else batch


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Call with a tensor, a tuple of positional or a dict of keyword arguments."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(**inputs)


def pairs(model: nn.Module, batches: Iterable[Any], limit: int, where: str) -> list[Pair]:
    """The first ``limit`` batches as (inputs, target), on the model's device.

    Args:
        model: whose device they go to.
        batches: as in the head of this file.
        limit: how many to take at most.
        where: the function that was called, for messages.

    Raises:
        ArgumentError: no module; something else than batches; a batch that is neither a pair nor a dict.
        UsageError: there is none, or one is empty.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"{where}: model must be a torch.nn.Module, got {type(model).__name__}")
    check_count(f"{where}: max_batches", limit, 1)
    if isinstance(batches, (Tensor, Mapping)) or not isinstance(batches, Iterable):
        raise ArgumentError(
            f"{where}: batches must be a list or loader of (inputs, target) pairs, got "
            f"{type(batches).__name__}: pass [(inputs, target)]"
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    found = [_pair(batch, where) for batch in itertools.islice(batches, limit)]
    if not found:
        raise UsageError(f"{where}: batches is empty: pass at least one (inputs, target) pair")
    for inputs, _ in found:
        if rows_of(inputs) == 0:
            raise UsageError(f"{where}: a batch has no rows: pass batches of at least one sample")

    def moved(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        if t.is_inference():  # such a tensor takes no part in a graph; its copy does
            with torch.inference_mode(False):
                t = t.clone()
        return t.to(device)

    return tree_map(moved, found)


def _pair(batch: Any, where: str) -> Pair:
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    if isinstance(batch, Mapping) or (hasattr(batch, "keys") and hasattr(batch, "__getitem__")):
        whole = dict(batch)
        return whole, whole
    raise ArgumentError(
        f"{where}: a batch must be an (inputs, target) pair or a dict, got {type(batch).__name__}"
        + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
    )


def rows_of(inputs: Any) -> int:
    """Samples in a batch's inputs: the length of its first tensor."""
    first = next((t for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.dim()), None)
    if first is None:
        raise ArgumentError("the inputs of a batch hold no tensor with a batch dimension")
    return first.shape[0]


def loss_of(loss_fn: LossFunction, output: Any, target: Any, where: str) -> Tensor:
    """The loss, checked: one finite number.

    Raises:
        ArgumentError: the loss function is no function.
        UsageError: it is no tensor, or has more than one element.
        RunError: it is not finite.
    """
    if not callable(loss_fn):
        raise ArgumentError(f"{where}: loss_fn must be a function of (output, target), got {loss_fn!r}")
    loss = loss_fn(output, target)
    if not isinstance(loss, Tensor):
        raise UsageError(f"{where}: loss_fn must return a tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise UsageError(
            f"{where}: loss_fn must return one number, got a tensor of shape {tuple(loss.shape)}: "
            "take its mean over the batch"
        )
    if not bool(torch.isfinite(loss.detach())):
        raise RunError(f"{where}: the loss is {loss.item()}: check the model's weights and the batches")
    return loss.reshape(())

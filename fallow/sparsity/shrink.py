"""Remove what is exactly zero from a trained model: a smaller one of plain modules with the same outputs."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fallow.errors import ArgumentError, RunError, UsageError
from fallow.sparsity.shrinking import left as leftovers
from fallow.sparsity.shrinking.count import Size, size_of
from fallow.sparsity.shrinking.decide import Decision, decide
from fallow.sparsity.shrinking.files import Saved, write
from fallow.sparsity.shrinking.left import Left
from fallow.sparsity.shrinking.plan import VERSION, Plan, apply_in_place, kept_indices, layer_attributes
from fallow.sparsity.shrinking.prove import Inputs, difference
from fallow.sparsity.shrinking.record import Record, record
from fallow.sparsity.shrinking.sizes import Attributes, settle, suspects
from fallow.surgery.probe import arguments, tiled

_ROWS = 3, 2
_TRIES = 24


@dataclass
class Shrunk:
    """A smaller model, and how it came out of the larger one.

    Attributes:
        model: in eval mode; the classes are the dense model's own, their tensors smaller, the keys the same.
        plan: kept indices of each tensor and dimension, attributes that follow; JSON throughout.
        left: units that are zero or constant and stay all the same, with the reason.
        before, after: parameters, and FLOPs of one row's forward.
        difference: largest difference of outputs in float64, relative to the largest output.
    """

    model: nn.Module
    plan: Plan
    left: list[Left]
    before: Size
    after: Size
    difference: float
    example: Any = field(repr=False)

    @property
    def removed(self) -> dict[str, int]:
        """For each layer that lost outputs, how many."""
        return dict(self.plan["removed"])

    def save(self, folder: str | Path, *, export: bool = True) -> Saved:
        """Write ``weights.pt``, ``plan.json`` and, where torch can export the model, ``model.pt2``.

        ``torch.load(weights_only=True)`` reads the first; the last loads without fallow and without the
        model's own code: ``torch.export.load(path).module()``. What became of it is in the result's `note`.

        Args:
            folder: made if it is not there; files of an earlier model are replaced.
            export: False leaves ``model.pt2`` out, which takes longest.
        """
        return write(self.model, self.plan, self.example if export else None, Path(folder))

    def __str__(self) -> str:
        lines = [
            f"parameters {self.before.parameters:,} -> {self.after.parameters:,}, "
            f"FLOPs {self.before.flops:,} -> {self.after.flops:,}",
            *(f"  {name}: {count} removed" for name, count in self.removed.items()),
            *(f"  {item}" for item in self.left),
        ]
        return "\n".join(lines)


def shrink(model: nn.Module, example: Any) -> Shrunk:
    r"""Remove every unit that is exactly zero or constant; outputs in eval mode stay the same to rounding.

    A unit is an output channel, neuron or attention head with everything that is tied to it: through
    elementwise operations, norms by running statistics, residual additions, concatenations, views, grouped
    and depthwise convolutions, attention. It goes if, wherever channels are summed, either no kept output
    reads it (its outgoing weights are zero) or it is a constant :math:`c`, which is folded exactly,
    :math:`b \mathrel{+}= W_{:,j}\,c`, into the bias there or the running mean of the BatchNorm that follows.
    Where neither takes it (behind zero padding :math:`c` meets fewer weights at the border) one constant
    channel stays and carries the weights of the others, times their constants over its own. The units that
    go are the largest set with this property, so that one that is read by removed units alone goes too. Under
    LayerNorm and GroupNorm channels depend on each other and stay.

    The model is run once and followed operation by operation; what an operation without a rule reads, stays.
    Sizes that a forward takes from attributes of its module (``num_heads``) follow. The result is run beside
    the dense model in float64; a part where they differ, or whose forward fixes its sizes, stays. What the
    forward does must not depend on the values of its input, or other inputs may take another way.

    Args:
        model: trained, with its zeros in place; it is left as it is.
        example: a tensor, a tuple of positional or a dict of keyword arguments of its forward.

    Returns:
        The small model with its plan; `Shrunk.left` names what is dead and stays, and why.

    Raises:
        ArgumentError: no module, or an example of another kind.
        UsageError: weights that are not finite, a model that cannot run the example or cannot be copied, or
            one in which no sum over channels was found.
        RunError: the smaller model differs from the dense one and no part can be blamed.

    References:
        Derived; notes on adaptive dropout, section 5, item 5 (chains).

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> _ = net[2].weight.data[:, 1].zero_()
        >>> shrink(net, torch.randn(1, 4)).model[0]
        Linear(in_features=4, out_features=2, bias=True)
    """
    args, kwargs = _checked(model, example)
    work = _copied(model).eval().double()
    batches = [_doubled(tiled(args, kwargs, rows)) for rows in _ROWS]
    run = _recorded(work, batches[0])
    decision, plan, cut, gap = _proved(work, run, batches)
    small = _copied(model).eval()
    _fold(small, decision)
    apply_in_place(small, plan)
    one = _doubled(tiled(args, kwargs, 1))
    before, after = size_of(work, one), size_of(cut, one)
    return Shrunk(small, plan, leftovers.left_over(decision), before, after, gap, example)


def _checked(model: object, example: Any) -> Inputs:
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"shrink takes a torch.nn.Module, got {type(model).__name__}")
    for name, tensor in _floats([*model.named_parameters(), *model.named_buffers()]):
        if not bool(torch.isfinite(tensor.detach()).all()):
            raise UsageError(
                f"{name} holds values that are not finite, so its zeros mean nothing: load a checkpoint from "
                "before the training diverged"
            )
    return arguments(example)


def _floats(named: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    return [(n, t) for n, t in named if t.is_floating_point() and not n.endswith("attn_mask")]


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:
        raise UsageError(
            f"the model cannot be copied ({error}): make masks permanent first, as by "
            "torch.nn.utils.prune.remove or parametrize.remove_parametrizations"
        ) from error


def _doubled(inputs: Inputs) -> Inputs:
    return tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, inputs)


def _recorded(model: nn.Module, inputs: Inputs) -> Record:
    try:
        run = record(model, *inputs)
    except Exception as error:
        first = (str(error).strip() or "-").splitlines()[0]
        raise UsageError(
            f"the model cannot run the example (eval mode, float64): {type(error).__name__}: {first}. "
            "Pass the inputs of one forward as example="
        ) from error
    if not run.sites:
        raise UsageError(
            f"no linear layer or convolution with weights was seen in the forward of {type(model).__name__}, "
            "so there is nothing to shrink: pass the eager model itself, not a compiled or scripted one"
        )
    return run


class _Trial:
    """Cuts the model as decided, compares, and keeps the closest."""

    def __init__(self, work: nn.Module, decision: Decision, batches: list[Inputs], rounding: float) -> None:
        self.work, self.decision, self.batches, self.rounding = work, decision, batches, rounding
        self.gap = float("inf")
        self.plan: Plan
        self.small: nn.Module

    def __call__(self, attributes: Attributes) -> list[str] | None:
        """None where the model with these attributes computes the same, else the modules then running."""
        plan = _plan(self.work, self.decision, attributes)
        small = copy.deepcopy(self.work)
        _fold(small, self.decision)
        apply_in_place(small, plan)
        stack: list[str] = []
        try:
            gap = difference(self.work, small, self.batches, stack)
        except Exception:  # sizes that a forward fixes: anything may be raised
            return stack
        if gap < self.gap:
            self.gap, self.plan, self.small = gap, plan, small
        return None if gap <= self.rounding else stack


def _proved(work: nn.Module, run: Record, batches: list[Inputs]) -> tuple[Decision, Plan, nn.Module, float]:
    """The largest decision whose small model computes the same as the dense one; that model, in float64."""
    stay: dict[int, str] = {}
    gap = float("inf")
    # wrong heads of attention over tokens that are nearly alike differ by little: what differs by more than
    # rounding is taken only where nothing else comes closer
    rounding, bound = (1e-6, 1e-4) if run.narrow else (1e-12, 1e-9)
    for _ in range(_TRIES):
        decision = decide(run, stay)
        trial = _Trial(work, decision, batches, rounding)
        failed = settle(work, decision, trial)
        gap = trial.gap
        if gap <= bound:
            return decision, trial.plan, trial.small, gap
        more = suspects(work, decision, failed or [])
        if not more:
            break
        stay.update(more)
    raise RunError(
        f"the smaller model's outputs differ by {gap:.3g} of the dense model's, and no part was found that "
        "explains it, so nothing was removed: check that the model draws no random numbers in eval mode"
    )


def _plan(model: nn.Module, decision: Decision, attributes: Attributes) -> Plan:
    kept = kept_indices(decision)
    merged = layer_attributes(model, kept)
    for name, values in attributes.items():
        merged.setdefault(name, {}).update(values)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "version": VERSION,
        "kept": kept,
        "attributes": merged,
        "shapes": {name: list(tensors[name].shape) for name in kept},
        "removed": leftovers.removed(decision),
    }


@torch.no_grad()
def _fold(model: nn.Module, decision: Decision) -> None:
    """Put the constants that go into the biases, running means and carriers behind them."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for number, site in enumerate(decision.record.sites):
        gone = torch.zeros(len(site.inside), dtype=torch.bool)
        inside = site.inside >= 0
        gone[inside] = decision.goes(site.inside[inside])
        constant = torch.where(gone, site.constant, 0.0).nan_to_num(0.0)
        if not bool((constant != 0).any()):
            continue
        if site.target is not None and site.folds:
            tensor = tensors[site.target]
            tensor.copy_(tensor.double() + site.sign * (site.weight @ constant).to(tensor.device))
        elif site.matrix is not None and number in decision.carriers:
            carrier, (name, dim) = decision.carriers[number], site.matrix
            share = (constant / site.constant[carrier]).to(tensors[name].device)
            weights = tensors[name].double().movedim(dim, -1)
            column = weights[..., carrier] + weights @ share
            tensors[name].select(dim, carrier).copy_(column)

"""Which weights of a model are made sparse, and in what groups they live or die."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fallow.errors import ArgumentError, UsageError, check_choice, nearest
from fallow.noise._attached import attached
from fallow.surgery.survey import matches, patterns

GROUPS = ("weights", "outputs", "inputs", "heads")
_BLOCKS = re.compile(r"([1-9]\d*):([1-9]\d*)")
_CONVOLUTIONS = nn.Conv1d | nn.Conv2d | nn.Conv3d
_NORMS = ("BatchNorm", "LayerNorm", "GroupNorm", "InstanceNorm", "RMSNorm", "LocalResponseNorm")


@dataclass(frozen=True, eq=False)
class Weight:
    """A parameter that is made sparse.

    Groups are numbered along one axis of the parameter seen as ``[before, groups, size, after]``; entries
    with the same number along ``groups`` are one group. Of single weights each entry stands for itself.

    Attributes:
        name: as in the model's state dict.
        parameter: the very tensor that the optimiser moves.
        groups: one of GROUPS, or "N:M".
        axis: the axis that is cut into groups; None for single weights.
        size: entries along the axis in one group; M of "N:M".
        keep: N of "N:M"; 0 otherwise.
    """

    name: str
    parameter: nn.Parameter
    groups: str = "weights"
    axis: int | None = None
    size: int = 1
    keep: int = 0

    @property
    def count(self) -> int:
        """Number of groups."""
        if self.axis is None:
            return self.parameter.numel()
        return self.parameter.shape[self.axis] // self.size

    @property
    def members(self) -> int:
        """Entries in a group."""
        return self.parameter.numel() // self.count

    def magnitude(self, value: Tensor | None = None) -> Tensor:
        """Root mean square of each group, of a shape that `spread` takes; ``|w|`` of single weights."""
        w = self.parameter.detach() if value is None else value
        if self.axis is None:
            return w.abs()
        parts = w.unflatten(self.axis, (-1, self.size))
        axes = [i for i in range(parts.dim()) if i != self.axis]
        norm = torch.linalg.vector_norm(parts, dim=axes) if axes else parts.abs()
        return norm / math.sqrt(self.members)

    def spread(self, groups: Tensor) -> Tensor:
        """One number for each group as a tensor that broadcasts with the parameter."""
        if self.axis is None:
            return groups
        wide = groups.repeat_interleave(self.size) if self.size > 1 else groups
        shape = [1] * self.parameter.dim()
        shape[self.axis] = -1
        return wide.view(shape)


def weights_of(
    model: nn.Module,
    *,
    groups: str = "weights",
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> list[Weight]:
    """The weights of linear layers, convolutions and attention that the patterns take.

    Biases, the parameters of norms and everything of fewer than two dimensions are left alone.

    Args:
        model: any module.
        groups: "weights": single ones; "outputs": neurons and filters, by their incoming weights; "inputs":
            what a layer takes, by its outgoing weights; "heads": the columns that an attention's output
            projection has for each head; "N:M": single weights of which N in each M neighbours along the
            inputs are kept.
        include: names or patterns of parameters; None: all.
        exclude: of those to leave out.

    Raises:
        UsageError: a pattern that matches nothing, or only what cannot be made sparse; another word.
    """
    if not _BLOCKS.fullmatch(groups):
        check_choice("groups", groups, (*GROUPS, "N:M"))
    found, others, seen = [], {}, set()
    heads = _head_projections(model) if groups == "heads" else {}
    learned = {name + noise.extra for name, noise, _ in attached(model) if noise.extra}
    for prefix, module in model.named_modules():
        for key, parameter in module.named_parameters(prefix, recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if key in learned:
                others[key] = "what noise on a weight has learned"
                continue
            weight = _weight(key, module, parameter, groups, heads)
            if isinstance(weight, Weight):
                found.append(weight)
            else:
                others[key] = weight
    wanted, left = patterns(include), patterns(exclude)
    _refuse_patterns(wanted, left, [w.name for w in found], others)
    chosen = [w for w in found if matches(w.name, wanted, left)]
    if not chosen:
        kind = "weights" if groups == "weights" else f"weights in groups of {groups}"
        raise UsageError(f"{type(model).__name__} has no {kind} to make sparse with these patterns")
    for weight in chosen:
        _refuse_not_finite(weight)
    return chosen


def _weight(
    name: str, module: nn.Module, parameter: nn.Parameter, groups: str, heads: dict[int, int]
) -> Weight | str:
    """The weight, or why there is none."""
    kind = type(module).__name__
    if any(norm in kind for norm in _NORMS):
        return f"a parameter of a norm ({kind}), which scales what others made"
    if parameter.dim() < 2 or name.rpartition(".")[2].endswith("bias"):
        return "a bias or another vector; only weights of two dimensions and more are made sparse"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "an embedding, whose rows are looked up and not multiplied"
    known = isinstance(module, nn.Linear | nn.MultiheadAttention | nn.Bilinear | nn.RNNBase | _CONVOLUTIONS)
    if not known and not hasattr(module, "in_features"):
        return f"a parameter of {kind}, which is no linear layer, convolution or attention"
    if groups == "weights":
        return Weight(name, parameter)
    if groups == "heads":
        if id(module) not in heads:
            return "no output projection of an attention with num_heads"
        return Weight(name, parameter, groups, 1, parameter.shape[1] // heads[id(module)])
    if not isinstance(module, nn.Linear | _CONVOLUTIONS):
        return f"a parameter of {kind}, whose outputs and inputs have no axis of their own"
    blocks = _BLOCKS.fullmatch(groups)
    if blocks:
        keep, size = int(blocks[1]), int(blocks[2])
        if keep >= size:
            raise UsageError(f"groups N:M keep N of M neighbours, N below M, got {groups}")
        if parameter.shape[1] % size:
            return f"of {parameter.shape[1]} inputs, which {size} does not divide"
        return Weight(name, parameter, groups, None, size, keep)
    if groups == "inputs" and getattr(module, "groups", 1) > 1:
        return "a convolution in groups, whose inputs are those of its group only"
    return Weight(name, parameter, groups, 0 if groups == "outputs" else 1)


def _head_projections(model: nn.Module) -> dict[int, int]:
    """The output projections of attentions: id of the linear layer -> number of heads."""
    found = {}
    for module in model.modules():
        heads = getattr(module, "num_heads", getattr(module, "heads", None))
        if not isinstance(heads, int) or heads < 1:
            continue
        for child in ("proj", "project", "out_proj", "o_proj"):
            layer = getattr(module, child, None)
            if isinstance(layer, nn.Linear) and layer.in_features % heads == 0:
                found[id(layer)] = heads
    return found


def _refuse_patterns(
    include: tuple[str, ...] | None,
    exclude: tuple[str, ...] | None,
    names: list[str],
    others: dict[str, str],
) -> None:
    for pattern in (*(include or ()), *(exclude or ())):
        if any(matches(name, (pattern,), None) for name in names):
            continue
        named = [name for name in others if matches(name, (pattern,), None)]
        if named:
            raise UsageError(f"{named[0]} is {others[named[0]]}: leave the pattern out")
        close = nearest(pattern, names)
        raise UsageError(f"no weight matches {pattern!r}" + (f"; did you mean {close!r}?" if close else ""))


def _refuse_not_finite(weight: Weight) -> None:
    if not weight.parameter.is_floating_point():
        raise ArgumentError(f"{weight.name} is {weight.parameter.dtype}: only floating point can be sparse")
    if not bool(weight.parameter.detach().isfinite().all()):
        raise UsageError(f"{weight.name} has NaN or infinite entries: the training has diverged before")

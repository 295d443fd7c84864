"""The plan of a smaller model: kept indices of each tensor, attributes that follow; and how it is applied."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fallow.errors import ArgumentError, UsageError
from fallow.sparsity.shrinking.decide import Decision
from fallow.sparsity.shrinking.labels import support

VERSION = 1
Plan = dict[str, Any]


def kept_indices(decision: Decision) -> dict[str, dict[str, Any]]:
    """For each tensor that gets smaller: dimension -> kept indices (a list for each kept row, if grouped)."""
    kept: dict[str, dict[str, Any]] = {}
    for name, info in decision.record.leaves.items():
        entry: dict[str, Any] = {}
        ragged = [layer for layer in info.layers if len(support(layer)) > 1]
        for layer in info.layers:
            away = decision.goes(layer)
            if bool(away.any()) and len(support(layer)) == 1:
                (dim,) = support(layer)
                entry[str(dim)] = (~away.flatten()).nonzero().flatten().tolist()
        for layer in ragged:  # (rows, inputs of the row's group)
            away = decision.goes(layer).flatten(1)
            rows = entry.get("0", list(range(len(away))))
            if bool(away[rows].any()):
                entry["1"] = [(~away[row]).nonzero().flatten().tolist() for row in rows]
        if entry:
            kept[name] = entry
    return kept


def sliced(tensor: Tensor, entry: Mapping[str, Any]) -> Tensor:
    """The kept part of a tensor."""
    for dim, indices in sorted(entry.items()):
        if indices and isinstance(indices[0], list):
            index = torch.tensor(indices, device=tensor.device)
            index = index.reshape(*index.shape, *[1] * (tensor.dim() - 2)).expand(-1, -1, *tensor.shape[2:])
            tensor = tensor.gather(1, index)
        else:
            tensor = tensor.index_select(int(dim), torch.tensor(indices, device=tensor.device))
    return tensor


def layer_attributes(model: nn.Module, kept: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """The sizes that torch's own layers remember, as they are once `kept` was applied."""
    found: dict[str, dict[str, int]] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        names = ("weight", "running_mean", "parametrizations.weight.original", "weight_orig")
        entry = next((kept[prefix + n] for n in names if prefix + n in kept), None)
        values = {} if entry is None else _sizes(module, entry)
        if values:
            found[name] = values
    return found


def _sizes(module: nn.Module, entry: Mapping[str, Any]) -> dict[str, int]:
    def count(dim: str) -> int:
        return len(entry[dim])

    if isinstance(module, nn.modules.conv._ConvNd):
        return _convolution_sizes(module, entry)
    if isinstance(module, (nn.Linear, nn.Bilinear)):
        names = {"0": "out_features", "1": "in_features"}
    elif isinstance(module, nn.Embedding):
        names = {"1": "embedding_dim"}
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        names = {"0": "num_features"}
    elif isinstance(module, nn.PReLU):
        names = {"0": "num_parameters"}
    elif isinstance(module, nn.GroupNorm):
        return {"num_channels": count("0"), "num_groups": count("0")}  # one channel a group
    else:
        return {}
    return {attribute: count(dim) for dim, attribute in names.items() if dim in entry}


def _convolution_sizes(module: Any, entry: Mapping[str, Any]) -> dict[str, int]:
    outputs, inputs = ("1", "0") if module.transposed else ("0", "1")
    groups = module.groups
    values: dict[str, int] = {}
    if outputs in entry:
        values["out_channels"] = len(entry[outputs])
    if groups > 1:
        per_group = module.out_channels // groups
        rows = entry.get("0", range(module.out_channels))
        groups = len({row // per_group for row in rows})
        inner = entry.get("1", [range(module.in_channels // module.groups)])[0]
        values |= {"groups": groups, "in_channels": groups * len(inner)}
    elif inputs in entry:
        values["in_channels"] = len(entry[inputs])
    return values


def apply_in_place(model: nn.Module, plan: Plan) -> None:
    """Make a dense model as small as the plan says, keeping the weights that stay."""
    shared: dict[int, Tensor] = {}
    for name, entry in plan["kept"].items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        tensor = getattr(module, leaf)
        small = shared.get(id(tensor))
        if small is None:
            small = sliced(tensor.detach(), entry).contiguous()
            if isinstance(tensor, nn.Parameter):
                small = nn.Parameter(small, requires_grad=tensor.requires_grad)
            shared[id(tensor)] = small
        store = module._parameters if leaf in module._parameters else module._buffers
        store[leaf] = small  # pyright: ignore[reportArgumentType]
    for name, values in plan["attributes"].items():
        module = model.get_submodule(name)
        for attribute, value in values.items():
            setattr(module, attribute, value)


def apply_plan(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of a dense model, cut to the shapes of a plan; `load_state_dict` of the small weights then fits.

    Args:
        model: built as the one that was shrunk; it stays as it is.
        plan: `Shrunk.plan`, or what `json.load` reads from ``plan.json``.

    Raises:
        ArgumentError: no module, or no plan.
        UsageError: a tensor or module that the model lacks, or that has another shape.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"apply_plan takes a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(plan, Mapping) or not {"version", "kept", "attributes", "shapes"} <= set(plan):
        raise ArgumentError("plan must be Shrunk.plan or the contents of plan.json")
    if plan["version"] != VERSION:
        raise UsageError(f"this fallow reads plans of version {VERSION}, got {plan['version']!r}")
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, shape in plan["shapes"].items():
        got = tuple(tensors[name].shape) if name in tensors else "nothing of that name"
        if got != tuple(shape):
            raise UsageError(
                f"the plan is for a model whose {name} has shape {tuple(shape)}, got {got}: "
                "build the dense model with the arguments of the one that was shrunk"
            )
    small = copy.deepcopy(model)
    apply_in_place(small, plan)
    return small

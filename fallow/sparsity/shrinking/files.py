"""A shrunken model as files, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fallow.errors import DataError
from fallow.sparsity.shrinking.plan import Plan, apply_plan
from fallow.surgery.probe import arguments, tiled

_WEIGHTS, _PLAN, _EXPORTED = "weights.pt", "plan.json", "model.pt2"


@dataclass(frozen=True)
class Saved:
    """The files of a shrunken model; `exported` is None where torch could not export it, `note` says more."""

    weights: Path
    plan: Path
    exported: Path | None
    note: str


def write(model: nn.Module, plan: Plan, example: Any, folder: Path) -> Saved:
    """Write a shrunken model to a folder, which is made if it is not there; no example, no export."""
    folder.mkdir(parents=True, exist_ok=True)
    weights, plan_file = folder / _WEIGHTS, folder / _PLAN
    torch.save(model.state_dict(), weights)
    plan_file.write_text(json.dumps(plan))
    if example is None:
        (folder / _EXPORTED).unlink(missing_ok=True)
        return Saved(weights, plan_file, None, f"no {_EXPORTED}: it was not asked for")
    exported, note = _export(model, example, folder / _EXPORTED)
    return Saved(weights, plan_file, exported, note)


def _export(model: nn.Module, example: Any, path: Path) -> tuple[Path | None, str]:
    args, kwargs = arguments(example)
    args, kwargs = _of_its_kind(model, tiled(args, kwargs, 3))
    path.unlink(missing_ok=True)
    reason = ""
    for dynamic in (True, False):
        shapes = _shapes(args, kwargs) if dynamic else None
        try:
            with torch.no_grad():
                program = torch.export.export(model.eval(), args, kwargs, dynamic_shapes=shapes)
            torch.export.save(program, path)
        except Exception as error:  # whatever torch.export meets in somebody's forward
            reason = reason or f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
            continue
        size = "any batch size" if dynamic else f"batches of 3 rows alone ({reason})"
        return path, f"{path.name} takes {size}"
    path.unlink(missing_ok=True)
    return None, f"no {path.name}: torch.export cannot take this model: {reason}"


def _of_its_kind(model: nn.Module, inputs: tuple[tuple, dict]) -> tuple[tuple, dict]:
    """The inputs in the model's floating point type, where it has but one."""
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if len(kinds) != 1:
        return inputs
    (dtype,) = kinds
    return tree_map(lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, inputs)


def _shapes(args: tuple, kwargs: dict) -> Any:
    """Dimension 0 is dynamic in whatever is as long as the first tensor."""
    rows = next(t.shape[0] for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim())
    batch = torch.export.Dim("batch", min=1)

    def of(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return None
        return {0: batch} if t.dim() and t.shape[0] == rows else {}

    return tree_map(of, kwargs) if kwargs else tree_map(of, args)


def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """A shrunken model from its folder.

    Args:
        folder: as `Shrunk.save` wrote it.
        model: a dense model built as the one that was shrunk; the result is a small copy of it with the saved
            weights. Without it the exported program is loaded.

    Raises:
        DataError: a file that is missing or cannot be read.
    """
    folder = Path(folder)
    if model is None:
        path = folder / _EXPORTED
        if not path.is_file():
            raise DataError(
                f"{folder} has no {_EXPORTED}: pass model=, built as the one that was shrunk, to load "
                f"{_WEIGHTS} into it"
            )
        return torch.export.load(path).module()
    try:
        plan = json.loads((folder / _PLAN).read_text())
        weights = torch.load(folder / _WEIGHTS, map_location="cpu", weights_only=True)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} does not hold a shrunken model: {error}") from error
    if not isinstance(plan, Mapping):
        raise DataError(f"{folder / _PLAN} is not the plan of a shrunken model")
    small = apply_plan(model, dict(plan))
    small.load_state_dict(weights)
    return small.eval()

"""What a sparsification leaves: the weights by layer, the smaller model, and what it takes."""

from __future__ import annotations

import dataclasses
import io
import math
import os
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fallow.errors import FallowError, RunError
from fallow.penalties.separable import Separable
from fallow.recipes._batches import Batches
from fallow.recipes._measure import median
from fallow.recipes._run import WEIGHTS, RunFolder
from fallow.sparsity import Sparsifier
from fallow.sparsity.shrink import Shrunk

SMALL, SPARSE = "small", "sparse.pt"
_LATENCY_ROWS, _LATENCY_PAIRS = 128, 15
_BINS, _POINTS = 60, 60
_DECADES = 4  # of magnitudes below the largest over which the curves are drawn at least


def weights(run: Sparsifier) -> dict[str, Any]:
    """The weights by layer: shape, how many are not zero, and the law of their logarithms."""
    layers, masks, short = [], run.masks(), run.shortfall()
    for weight in run.weights:
        mask = masks[weight.name]
        layers.append(
            {
                "name": weight.name,
                "shape": [*weight.parameter.shape],
                "groups": weight.count,
                "kept_groups": int(mask.sum()),
                "weights": weight.parameter.numel(),
                "kept": int((weight.spread(mask) & (weight.parameter != 0)).sum()),
            }
        )
    total, kept = (sum(layer[key] for layer in layers) for key in ("weights", "kept"))
    summary = {"weights": total, "kept": kept, "sparsity": 1 - kept / total}
    summary["compression"] = total / kept if kept else None
    return {
        "layers": layers,
        "summary": summary,
        "histogram": histogram([w.parameter for w in run.weights]),
        "rescued": list(run.rescued),
        "stayed": run.stayed(),
        "shortfall": None if short is None else dataclasses.asdict(short),
    }


def histogram(parameters: list[nn.Parameter]) -> dict[str, Any]:
    """How many weights have a magnitude between which powers of ten, and how many are zero.

    The thousandth of smallest magnitude stands in the first band.
    """
    flat = torch.cat([p.detach().abs().flatten().float().cpu() for p in parameters])
    logs = flat[flat > 0].log10()
    if not len(logs):
        return {"zeros": len(flat), "low": 0.0, "high": 0.0, "counts": []}
    low = float(logs.kthvalue(1 + len(logs) // 1000).values)
    high = max(float(logs.max()), low + 1e-6)
    counts = torch.histc(logs.clamp(min=low), _BINS, low, high)
    return {"zeros": len(flat) - len(logs), "low": low, "high": high, "counts": counts.int().tolist()}


def curves(run: Sparsifier, strategy: Any) -> dict[str, Any] | None:
    """The penalty and its strategy over the magnitudes there are; None where no weight has its own.

    The strategy is the survival rate ``eta / (eta + strength)`` at the strength in force.
    """
    if not isinstance(strategy, Separable):
        return None
    high = max(max(float(weight.magnitude().max()) for weight in run.weights), 1e-6)
    seen = 10.0 ** histogram([weight.parameter for weight in run.weights])["low"]
    low = min(max(seen, high * 1e-8), high * 10.0**-_DECADES)
    magnitude = torch.logspace(math.log10(low), math.log10(high), _POINTS, dtype=torch.float64)
    strength = run.current_strength
    rate = strategy.survival_rate(magnitude, strength) if strength > 0 else torch.ones_like(magnitude)
    return {
        "name": str(strategy),
        "of": "weights" if run.weights[0].axis is None else "groups",
        "strength": strength,
        "cut": None if run.target is not None else run.cut,
        "magnitude": magnitude.tolist(),
        "penalty": strategy.value(magnitude).tolist(),
        "survival_rate": rate.tolist(),
    }


def shrunk(run: Sparsifier, batches: Batches, folder: RunFolder) -> dict[str, Any]:
    """Shrink the model, write what is left into the folder, and measure both.

    What cannot be shrunk is said, not raised: the run has its masked weights in any case.
    """
    folder.write_bytes(SPARSE, sparse(run))
    found: dict[str, Any] = {"bytes": {"dense": _size(folder, WEIGHTS), "sparse": _size(folder, SPARSE)}}
    try:
        small = run.shrink(batches.example())
    except FallowError as error:
        return found | {"failed": str(error)}
    try:
        saved = small.save(folder.path / SMALL)
    except (OSError, RuntimeError) as error:  # torch hides a full disk in the latter
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"{folder.path / SMALL} could not be written ({first}): make room there, then continue with "
            f"{folder.again}"
        ) from error
    found["bytes"]["small"] = os.path.getsize(saved.weights)
    return found | {"exported": saved.note} | _compared(run.model, small, batches)


def _compared(model: nn.Module, small: Shrunk, batches: Batches) -> dict[str, Any]:
    """Sizes, times and outputs of the model with its zeros and of the smaller one."""
    images = [x for x, _ in batches.evaluated("test")]
    x = torch.cat(images)[:_LATENCY_ROWS]
    model, smaller = model.eval(), small.model.eval()
    with torch.no_grad():
        difference = max(float((model(b) - smaller(b)).abs().max()) for b in images)
        largest = max(float(model(b).abs().max()) for b in images)
    # on an accelerator the copy back waits for the end
    dense, less = latencies([lambda: model(x).cpu(), lambda: smaller(x).cpu()])
    return {
        "parameters": {
            "dense": sum(p.numel() for p in model.parameters()),
            "small": sum(p.numel() for p in smaller.parameters()),
        },
        "flops": {"dense": small.before.flops, "small": small.after.flops},
        "latency_ms": {"dense": dense, "small": less, "rows": len(x)},
        "largest_difference": difference,
        "largest_output": largest,
        "left": [{"name": item.name, "count": item.count, "reason": item.reason} for item in small.left],
        "shapes": {name: [*p.shape] for name, p in smaller.named_parameters() if p.dim() > 1},
    }


def sparse(run: Sparsifier) -> bytes:
    """A file of the state dict with sparse weights as CSR matrices, rows being outputs; for `torch.load`.

    A convolution's weight is its matrix of filters; the shapes stand under ``"shapes"``.
    """
    state: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    names = {weight.name for weight in run.weights}
    for name, value in run.model.state_dict().items():
        value = value.detach().cpu()
        if name in names:
            shapes[name] = [*value.shape]
            value = _rows(value.flatten(1).contiguous())
        state[name] = value
    content = io.BytesIO()
    torch.save({"state": state, "shapes": shapes}, content)
    return content.getvalue()


def _rows(matrix: Tensor) -> Tensor:
    """A matrix as CSR with 32-bit indices."""
    with warnings.catch_warnings():
        # Torch says at the first CSR tensor of a process that the layout is in beta, and that its invariants
        # are not checked: nothing here rests on either, and the user can do nothing about them.
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly disabled")
        csr = matrix.to_sparse_csr()
        rows, columns = csr.crow_indices().int(), csr.col_indices().int()
        return torch.sparse_csr_tensor(rows, columns, csr.values(), matrix.shape, check_invariants=True)


def _size(folder: RunFolder, name: str) -> int:
    return os.path.getsize(folder.path / name)


def latencies(calls: list[Callable[[], Any]]) -> list[float]:
    """Median wall milliseconds of each call, taken in turn after one to warm up."""
    times: list[list[float]] = [[] for _ in calls]
    with torch.no_grad():
        for i in range(_LATENCY_PAIRS + 1):
            for call, taken in zip(calls, times, strict=True):
                start = time.perf_counter()
                call()
                if i:
                    taken.append(1e3 * (time.perf_counter() - start))
    return [float(median(taken) or 0.0) for taken in times]

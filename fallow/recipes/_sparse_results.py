"""What a sparsification leaves: the weights by layer, the smaller model, and what it takes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fallow.errors import FallowError
from fallow.recipes._measure import median
from fallow.recipes._run import RunFolder
from fallow.sparsity import Sparsifier

if TYPE_CHECKING:
    from fallow.recipes.sparsify import Job

SMALL, SPARSE = "small", "sparse.pt"
_LATENCY_ROWS, _LATENCY_PAIRS = 128, 15
_BINS = 60


def weights(run: Sparsifier) -> dict[str, Any]:
    """The weights by layer: shape, how many are not zero, and the law of their logarithms."""
    layers, masks = [], run.masks()
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
    }


def histogram(parameters: list[nn.Parameter]) -> dict[str, Any]:
    """How many weights have a magnitude between which powers of ten, and how many are zero."""
    flat = torch.cat([p.detach().abs().flatten().float().cpu() for p in parameters])
    logs = flat[flat > 0].log10()
    if not len(logs):
        return {"zeros": len(flat), "low": 0.0, "high": 0.0, "counts": []}
    low, high = float(logs.quantile(0.001) if len(logs) < 1e7 else logs.min()), float(logs.max())
    counts = torch.histc(logs.clamp(min=low), _BINS, low, max(high, low + 1e-6))
    return {"zeros": len(flat) - len(logs), "low": low, "high": high, "counts": counts.int().tolist()}


def shrunk(job: Job, folder: RunFolder) -> dict[str, Any]:
    """Shrink the model, write what is left into the folder, and measure both.

    What cannot be shrunk is said, not raised: the run has its masked weights in any case.
    """
    example = job.batches.example()
    write_sparse(job.run, folder.path / SPARSE)
    found: dict[str, Any] = {"bytes": {"sparse": os.path.getsize(folder.path / SPARSE)}}
    try:
        small = job.run.shrink(example)
    except FallowError as error:
        return found | {"failed": str(error)}
    small.save(folder.path / SMALL)
    batches = [x for x, _ in job.batches.evaluated("test")]
    x = torch.cat(batches)[:_LATENCY_ROWS]
    model, smaller = job.model.eval(), small.model.eval()
    with torch.no_grad():
        difference = max(float((model(b) - smaller(b)).abs().max()) for b in batches)
        largest = max(float(model(b).abs().max()) for b in batches)
    dense, less = latencies([lambda: model(x), lambda: smaller(x)])
    found["bytes"] |= {
        "dense": _bytes(model),
        "small": _bytes(smaller),
    }
    return found | {
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


def write_sparse(run: Sparsifier, path: Path) -> None:
    """The state dict with sparse weights as CSR matrices, rows being outputs; for `torch.load`.

    A convolution's weight is its matrix of filters; the shapes stand under ``"shapes"``.
    """
    state: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    names = {weight.name for weight in run.weights}
    for name, value in run.model.state_dict().items():
        value = value.detach().cpu()
        if name in names:
            shapes[name] = [*value.shape]
            matrix = value.flatten(1).contiguous()
            csr = matrix.to_sparse_csr()
            value = torch.sparse_csr_tensor(
                csr.crow_indices().int(), csr.col_indices().int(), csr.values(), matrix.shape
            )
        state[name] = value
    torch.save({"state": state, "shapes": shapes}, path)


def _bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


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

"""A results file like those that `fallow train` writes, made without training anything."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SITES = 27
EPOCHS = 24
STEPS = 50  # an epoch


def _arm(label: str, slow: float, offset: float, *, epochs: int) -> dict[str, Any]:
    records = [
        {
            "epoch": e,
            "step": e * STEPS,
            "train_loss": 0.08 + 2.2 * math.exp(-0.21 * e) * (1 + offset),
            "train_error": 0.02 + 0.85 * math.exp(-0.26 * e) + offset / 5,
            "validation_error": 0.025 + 0.8 * math.exp(-0.3 * e) + 0.004 * math.sin(2.1 * e) - offset / 60,
            "learning_rate": 0.1 if e <= 12 else 0.01 if e <= 18 else 0.001,
            "gradient_first_convolution": (0.004 + offset / 60) * math.exp(-0.09 * e),
            "depth": 20.25,
            "cost": 0.75,
            "cpu_s_per_step": 0.0402 * slow,
            "wall_s_per_step": 0.0214 * slow,
        }
        for e in range(1, epochs + 1)
    ]
    summary = {
        "test_error": 0.0208 + (0.0028 if slow == 1 else 0),
        "test_images": 360,
        "validation_error": 0.027,
        "cpu_s_per_step": 0.0402 * slow,
        "wall_s_per_step": 0.0214 * slow,
        "peak_memory_mb": 412.3 * (0.82 if slow < 1 else 1),
        "realised_depth": 20.24 if slow < 1 else float(SITES),
    }
    return {"label": label, "parameters": 855_770, "epochs": records, "summary": summary}


def example_results(epochs: int = EPOCHS) -> dict[str, Any]:
    """A finished run with a twin; every call makes a new one, to be changed at will."""
    rates = [1 - (i + 1) / SITES * 0.5 for i in range(SITES)]
    sites = [
        {
            "name": f"stages.{i // 9}.{i % 9}",
            "kind": "transition" if i in (9, 18) else "identity",
            "cost": 0.0355,
            "asked": rate,
            "realised": rate + 0.012 * math.sin(3.3 * i),
        }
        for i, rate in enumerate(rates)
    ]
    # A pseudo-random walk over the depths around 20.25, the same on every machine.
    depths = [
        float(round(20.25 + 3.2 * math.sin(k * 12.9898) * math.sin(k * 78.233)))
        for k in range(epochs * STEPS)
    ]
    budget = {
        "asked": 0.75,
        "expected_cost": 0.7513,
        "droppable_flops": 0.96,
        "droppable_time": 0.93,
        "ideal_flops": 0.7513,
        "ideal_time": 0.768,
        "expected_depth": 20.25,
        "sites": SITES,
    }
    notes = [
        "1,797 images of 8 × 8 pixels, bundled with scikit-learn.",
        "One channel; the first convolution takes one.",
    ]
    data = {
        "name": "digits",
        "fingerprint": "sha256:5a1f",
        "train": 1294,
        "validation": 143,
        "test": 360,
        "notes": notes,
    }
    provenance = {
        "fallow": "0.1.0",
        "torch": "2.13.0",
        "python": "3.11.2",
        "platform": "Linux x86_64",
        "device": "cpu",
        "hardware": "2 cores, AVX-512",
        "threads": 2,
        "seed": 0,
        "command": "fallow train",
        "started": "2026-01-02T03:04:05Z",
        "finished": "2026-01-02T03:07:31Z",
        "data": data,
    }
    model, twin = (
        _arm("stochastic depth", 0.769, 0.05, epochs=epochs),
        _arm("constant depth", 1.0, 0.0, epochs=epochs),
    )
    return {
        "schema": 1,
        "kind": "train",
        "status": "done",
        "provenance": provenance,
        "config": {
            "data": "digits",
            "model": "resnet56",
            "budget": 0.75,
            "rates": "linear",
            "mode": "batch",
            "lr_drops": [0.5, 0.75],
        },
        "sites": sites,
        "budget": budget,
        "arms": {"model": model | {"depths": depths}, "twin": twin},
        "summary": {
            "time_ratio": {"median": 0.769, "low": 0.761, "high": 0.778},
            "wall_ratio": {"median": 0.783, "low": 0.765, "high": 0.802},
            "memory_ratio": 0.82,
            "realised_cost": 0.7508,
        },
    }


@pytest.fixture
def results() -> dict[str, Any]:
    """A finished run with a twin, to be changed at will."""
    return example_results()


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Write results as a run's folder of a given name."""

    def write(results: Any, name: str = "digits-resnet56") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps(results))
        return folder

    return write

"""What tests of training runs share: a small run's options, its weights, the program in another process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fallow.recipes._run import STATE
from fallow.recipes.train import Config

# 90 images train in five steps of 20 and 10 validate; three residual branches. A run takes about a second.
SMALL = {"model": "resnet8", "train_size": 100, "batch_size": 20, "epochs": 2, "threads": 1, "budget": 0.7}


def settled(**options: object) -> Config:
    return Config.of(SMALL | options).settled()


def weights(run: Path, arm: str = "model") -> dict[str, Tensor]:
    """The weights in a run's last checkpoint."""
    return torch.load(run / STATE, weights_only=True)["arms"][arm]["weights"]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two sets of weights are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


# What a child process runs: the program, with the small model known to it.
PROGRAM = """
import sys
from fallow import models
models.MODELS["resnet8"] = lambda **options: models.CifarResNet(8, **options)
from fallow.cli import run
sys.exit(run(sys.argv[1:]))
"""


def program(*arguments: str) -> list[str]:
    """The command that runs `fallow ARGUMENTS` in another process."""
    return [sys.executable, "-c", PROGRAM, *map(str, arguments)]


def flags(**options: Any) -> list[str]:
    """Options as the command line takes them."""
    return [part for k, v in (SMALL | options).items() for part in ("--" + k.replace("_", "-"), str(v))]


def call(*arguments: Any, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `fallow ARGUMENTS` to its end in another process."""

    return subprocess.run(
        program(*arguments),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )

"""Small runs: few digits, a shallow network, one or two epochs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import SMALL

from fallow.recipes.train import Config, train


@pytest.fixture(autouse=True)
def _small(resnet8: None) -> None:
    """Every test may name it."""


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., Path]:
    """Trains a small run with other options and returns its folder."""
    count = 0

    def run(**options: Any) -> Path:
        nonlocal count
        count += 1
        return train(Config.of(SMALL | options), tmp_path / f"run{count}")

    return run

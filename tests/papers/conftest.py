"""Papers of which tests train the smallest network."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _small(resnet8: None) -> None:
    """Every test may name it."""

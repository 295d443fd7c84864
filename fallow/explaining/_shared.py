"""What the results of `fallow.explain` share."""

from __future__ import annotations

import math

SCHEMA = 1


def with_error(value: float | None, error: float | None) -> str:
    """A number and its standard error."""
    if value is None:
        return "-"
    return f"{value:.4g}" + ("" if error is None or not math.isfinite(error) else f" +- {error:.2g}")

"""Compiled forms of what is slow as a series of torch operations; without a compiler nothing is lost but time."""

from fallow.kernels._build import Availability, available
from fallow.kernels._dropblock import Geometry, drop_masked, drop_seeds

__all__ = ["Availability", "Geometry", "available", "drop_masked", "drop_seeds"]

"""Compiled forms of what takes torch many operations; without a compiler nothing is lost but time."""

from fallow.kernels._build import Availability, available, plain
from fallow.kernels._dropblock import Geometry, drop_masked, drop_seeds

__all__ = ["Availability", "Geometry", "available", "drop_masked", "drop_seeds", "plain"]

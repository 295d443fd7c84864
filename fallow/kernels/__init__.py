"""Compiled forms of what takes torch many operations; without a compiler nothing is lost but time."""

from fallow.kernels._build import Availability, available, plain
from fallow.kernels._dropblock import Geometry, drop_masked, drop_seeds
from fallow.kernels._weights import logsum_adaprox_, logsum_total

__all__ = [
    "Availability",
    "Geometry",
    "available",
    "drop_masked",
    "drop_seeds",
    "logsum_adaprox_",
    "logsum_total",
    "plain",
]

"""Compiled forms of what takes torch many operations; without a compiler nothing is lost but time."""

from fallow.kernels._build import Availability, available, plain
from fallow.kernels._dropblock import Geometry, drop_masked, drop_seeds
from fallow.kernels._learned import disturbed, disturbed_back, diverged, eta_trick
from fallow.kernels._sums import gradients_of, readable, sum_of
from fallow.kernels._weights import WORTH, has_tangent, logsum_adaprox_, logsum_prox, logsum_total, takes

__all__ = [
    "WORTH",
    "Availability",
    "Geometry",
    "available",
    "disturbed",
    "disturbed_back",
    "diverged",
    "drop_masked",
    "drop_seeds",
    "eta_trick",
    "gradients_of",
    "has_tangent",
    "logsum_adaprox_",
    "logsum_prox",
    "logsum_total",
    "plain",
    "readable",
    "sum_of",
    "takes",
]

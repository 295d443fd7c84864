"""From training with a penalty or an adaptive dropout to a smaller dense model."""

from fallow.sparsity.curvature import Curvature
from fallow.sparsity.noise import Noise
from fallow.sparsity.regression import Fit, irls, proximal, variable_projection
from fallow.sparsity.run import Sparsifier
from fallow.sparsity.shrink import Shrunk, shrink
from fallow.sparsity.shrinking.files import Saved, load
from fallow.sparsity.shrinking.left import Left
from fallow.sparsity.shrinking.plan import apply_plan
from fallow.sparsity.sparsify import sparsify

__all__ = [
    "Curvature",
    "Fit",
    "Left",
    "Noise",
    "Saved",
    "Shrunk",
    "Sparsifier",
    "apply_plan",
    "irls",
    "load",
    "proximal",
    "shrink",
    "sparsify",
    "variable_projection",
]

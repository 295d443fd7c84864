"""From training with a penalty or an adaptive dropout to a smaller dense model."""

from fallow.sparsity.shrink import Shrunk, shrink
from fallow.sparsity.shrinking.files import Saved, load
from fallow.sparsity.shrinking.left import Left
from fallow.sparsity.shrinking.plan import apply_plan

__all__ = ["Left", "Saved", "Shrunk", "apply_plan", "load", "shrink"]

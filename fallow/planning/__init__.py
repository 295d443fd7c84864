"""Survival rates for a compute budget: what sites cost, how much the loss depends on them, who gets what."""

from fallow.planning.cost import costs
from fallow.planning.make import from_sensitivities, plan
from fallow.planning.plan import Plan
from fallow.planning.running import RunningSensitivities
from fallow.planning.sensitivity import Sensitivities, sensitivities

__all__ = [
    "Plan",
    "RunningSensitivities",
    "Sensitivities",
    "costs",
    "from_sensitivities",
    "plan",
    "sensitivities",
]

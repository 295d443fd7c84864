"""What noise does to a network: the loss it penalises, the signals it changes, the law it tends to."""

from fallow.explaining._head_result import HeadExplanation, HeadOptimum
from fallow.explaining._result import Explanation, SitePenalty, Totals
from fallow.explaining.depth import explain
from fallow.explaining.gaussian import GaussianLimit, gaussian_limit
from fallow.explaining.growth import growth_theory
from fallow.explaining.growth_simulation import simulate_growth
from fallow.explaining.head import explain_head
from fallow.explaining.law import law_over_masks, simulate_law
from fallow.explaining.signals import SignalGrowth, signal_growth

__all__ = [
    "Explanation",
    "GaussianLimit",
    "HeadExplanation",
    "HeadOptimum",
    "SignalGrowth",
    "SitePenalty",
    "Totals",
    "explain",
    "explain_head",
    "gaussian_limit",
    "growth_theory",
    "law_over_masks",
    "signal_growth",
    "simulate_growth",
    "simulate_law",
]

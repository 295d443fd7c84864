"""What noise does to a network: the loss it penalises, the signals it changes, the law it tends to."""

from fallow.explaining._result import Explanation, SitePenalty, Totals
from fallow.explaining.depth import explain

__all__ = ["Explanation", "SitePenalty", "Totals", "explain"]

"""Stochastic depth and dropout that really rest what they drop."""

from fallow import rates, schedules
from fallow._version import __version__
from fallow.errors import (
    ArgumentError,
    DataError,
    FallowError,
    MissingExtra,
    RateError,
    RunError,
    SiteError,
    UsageError,
)
from fallow.explaining import Explanation, SignalGrowth, explain, signal_growth
from fallow.noise import StochasticDepth, stochastic_depth
from fallow.planning import Plan, plan
from fallow.surgery import Handle, Report, Site, Sites, apply, handle_of, sites

__all__ = [
    "ArgumentError",
    "DataError",
    "Explanation",
    "FallowError",
    "Handle",
    "MissingExtra",
    "Plan",
    "RateError",
    "Report",
    "RunError",
    "SignalGrowth",
    "Site",
    "SiteError",
    "Sites",
    "StochasticDepth",
    "UsageError",
    "__version__",
    "apply",
    "explain",
    "handle_of",
    "plan",
    "rates",
    "schedules",
    "signal_growth",
    "sites",
    "stochastic_depth",
]

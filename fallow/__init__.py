"""Stochastic depth and dropout that really rest what they drop."""

from typing import TYPE_CHECKING, Any

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
from fallow.noise import StochasticDepth, stochastic_depth
from fallow.surgery import Handle, Report, Site, Sites, apply, handle_of, sites

if TYPE_CHECKING:
    from fallow import explaining, planning
    from fallow.explaining import Explanation, SignalGrowth, explain, signal_growth
    from fallow.planning import Plan, plan

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
    "explaining",
    "handle_of",
    "plan",
    "planning",
    "rates",
    "schedules",
    "signal_growth",
    "sites",
    "stochastic_depth",
]

# Imported when they are first used, so that a training script pays for what it trains with alone.
_LATER = {
    "explaining": ("explaining", "Explanation", "SignalGrowth", "explain", "signal_growth"),
    "planning": ("planning", "Plan", "plan"),
}


def __getattr__(name: str) -> Any:
    for package, names in _LATER.items():
        if name in names:
            from importlib import import_module

            module = import_module(f"fallow.{package}")
            return module if name == package else getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_LATER})

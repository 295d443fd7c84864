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

__all__ = [
    "ArgumentError",
    "DataError",
    "FallowError",
    "MissingExtra",
    "RateError",
    "RunError",
    "SiteError",
    "UsageError",
    "__version__",
    "rates",
    "schedules",
]

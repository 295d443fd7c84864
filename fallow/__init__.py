"""Stochastic depth and dropout that really rest what they drop."""

from . import rates, schedules
from .errors import (
    ArgumentError,
    DataError,
    FallowError,
    MissingExtra,
    RateError,
    RunError,
    SiteError,
    UsageError,
)

__version__ = "0.1.0"

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

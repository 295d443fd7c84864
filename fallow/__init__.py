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
from fallow.surgery import Handle, Report, Site, Sites, apply, handle_of, sites

if TYPE_CHECKING:
    from fallow import explaining, noise, penalties, planning, schemes, sparsity
    from fallow.explaining import (
        Explanation,
        HeadExplanation,
        SignalGrowth,
        explain,
        explain_head,
        signal_growth,
    )
    from fallow.noise import (
        BlockDropout,
        DropBlock1d,
        DropBlock2d,
        DropBlock3d,
        DropPath,
        FeatureDropout,
        StochasticDepth,
        block_dropout,
        drop_block1d,
        drop_block2d,
        drop_block3d,
        drop_connect,
        drop_connect_,
        drop_path,
        feature_dropout,
        stochastic_depth,
    )
    from fallow.planning import Plan, plan
    from fallow.sparsity import Shrunk, Sparsifier, shrink, sparsify
    from fallow.surgery.replace import replace
    from fallow.surgery.replaced import Replaced

__all__ = [
    "ArgumentError",
    "BlockDropout",
    "DataError",
    "DropBlock1d",
    "DropBlock2d",
    "DropBlock3d",
    "DropPath",
    "Explanation",
    "FallowError",
    "FeatureDropout",
    "Handle",
    "HeadExplanation",
    "MissingExtra",
    "Plan",
    "RateError",
    "Replaced",
    "Report",
    "RunError",
    "Shrunk",
    "SignalGrowth",
    "Site",
    "SiteError",
    "Sites",
    "Sparsifier",
    "StochasticDepth",
    "UsageError",
    "__version__",
    "apply",
    "block_dropout",
    "drop_block1d",
    "drop_block2d",
    "drop_block3d",
    "drop_connect",
    "drop_connect_",
    "drop_path",
    "explain",
    "explain_head",
    "explaining",
    "feature_dropout",
    "handle_of",
    "noise",
    "penalties",
    "plan",
    "planning",
    "rates",
    "replace",
    "schedules",
    "schemes",
    "shrink",
    "signal_growth",
    "sites",
    "sparsify",
    "sparsity",
    "stochastic_depth",
]

# Imported when they are first used, so that a training script pays for what it trains with alone.
_LATER = {
    "explaining": (
        "explaining",
        "Explanation",
        "HeadExplanation",
        "SignalGrowth",
        "explain",
        "explain_head",
        "signal_growth",
    ),
    "noise": (
        "noise",
        "BlockDropout",
        "DropBlock1d",
        "DropBlock2d",
        "DropBlock3d",
        "DropPath",
        "FeatureDropout",
        "StochasticDepth",
        "block_dropout",
        "drop_block1d",
        "drop_block2d",
        "drop_block3d",
        "drop_connect",
        "drop_connect_",
        "drop_path",
        "feature_dropout",
        "stochastic_depth",
    ),
    "penalties": ("penalties",),
    "planning": ("planning", "Plan", "plan"),
    "schemes": ("schemes",),
    "sparsity": ("sparsity", "Shrunk", "Sparsifier", "shrink", "sparsify"),
    "surgery.replace": ("replace",),
    "surgery.replaced": ("Replaced",),
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

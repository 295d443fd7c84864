"""The penalties by name, as a command line has them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from fallow.errors import ArgumentError, UsageError, nearest
from fallow.penalties.ard import ARD, VectorARD
from fallow.penalties.concave import MCP, SCAD, GemanMcClure, Welsch
from fallow.penalties.hard_concrete import HardConcrete
from fallow.penalties.hard_threshold import HardThreshold
from fallow.penalties.ksupport import KSupport
from fallow.penalties.logarithmic import Log2Sum, LogSum
from fallow.penalties.powers import LpNorm, Ridge
from fallow.penalties.separable import Separable
from fallow.penalties.standout import Standout
from fallow.penalties.targeted import Targeted, TargetedThreshold
from fallow.penalties.variational_dropout import MolchanovFit, VariationalDropout


@dataclass(frozen=True)
class Named:
    """A penalty of the registry.

    Attributes:
        make: The class that makes it.
        words: What it is, in one line.
    """

    make: Callable[..., Any]
    words: str

    @property
    def parameters(self) -> dict[str, Any]:
        """Its parameters and their defaults; `inspect.Parameter.empty` for those that must be given."""
        return {name: p.default for name, p in inspect.signature(self.make).parameters.items()}

    @property
    def separable(self) -> bool:
        """Whether it is a sum over the weights, so that every weight has its own value."""
        return isinstance(self.make, type) and issubclass(self.make, Separable)


NAMES: Mapping[str, Named] = MappingProxyType(
    {
        "logsum": Named(LogSum, "log(1 + |w| / eps): near to counting, and the dual of variational dropout"),
        "log2sum": Named(Log2Sum, "log(1 + w^2 / eps): Student's t, a ridge near 0"),
        "mcp": Named(MCP, "l1 that bends to a constant: minimax concave"),
        "scad": Named(SCAD, "l1, then a parabola, then a constant: smoothly clipped"),
        "lp": Named(LpNorm, "|w|^p / p for 0 < p < 2; p = 1 is l1"),
        "standout": Named(Standout, "kept with probability sigmoid(kappa |w| + beta)"),
        "vardrop": Named(VariationalDropout, "variational dropout, exactly"),
        "molchanov": Named(MolchanovFit, "variational dropout by the published fit"),
        "hardconcrete": Named(
            HardConcrete, "hard concrete gates, the l0 regularisation of Louizos and others"
        ),
        "hardthreshold": Named(HardThreshold, "at most k weights of a vector: magnitude pruning"),
        "targeted": Named(Targeted, "the k smallest weights of a vector kept with one probability"),
        "targetedthreshold": Named(TargetedThreshold, "weights below a threshold kept with one probability"),
        "ard": Named(ARD, "automatic relevance determination of single weights"),
        "vectorard": Named(
            VectorARD, "automatic relevance determination of a linear model with given inputs"
        ),
        "welsch": Named(Welsch, "(1 - exp(-w^2)) / 2: a ridge that lets go"),
        "gemanmcclure": Named(GemanMcClure, "w^2 / (2 + 2 w^2): a ridge that lets go"),
        "ridge": Named(Ridge, "w^2 / (2 eta0): weight decay, constant dropout"),
        "ksupport": Named(KSupport, "half the squared k-support norm of a vector"),
    }
)


def penalty(name: str, **parameters: Any) -> Any:
    """The penalty of that name; case, hyphens and underscores do not matter.

    Args:
        name: One of `NAMES`.
        **parameters: Those of its class; what has a default may be left out.

    Raises:
        UsageError: No penalty has this name; the message says which is nearest.
        ArgumentError: It does not take a parameter, or one that must be given is missing.

    Examples:
        >>> penalty("LogSum", eps=0.1)
        LogSum(eps=0.1)
        >>> penalty("logsun")
        Traceback (most recent call last):
        fallow.errors.UsageError: no penalty is called "logsun"; did you mean "logsum"?
    """
    key = str(name).lower().replace("-", "").replace("_", "")
    if key not in NAMES:
        close = nearest(key, NAMES)
        hint = f'did you mean "{close}"?' if close else f"the names are {', '.join(NAMES)}"
        raise UsageError(f'no penalty is called "{name}"; {hint}')
    entry = NAMES[key]
    known = entry.parameters
    for given in parameters:
        if given not in known:
            close = nearest(given, known)
            hint = f"did you mean {close}?" if close else f"it takes {', '.join(known) or 'none'}"
            raise ArgumentError(f"{key} has no parameter {given}; {hint}")
    missing = [
        p for p, default in known.items() if default is inspect.Parameter.empty and p not in parameters
    ]
    if missing:
        raise ArgumentError(f"{key} needs {' and '.join(missing)}: pass {missing[0]}=...")
    return entry.make(**parameters)

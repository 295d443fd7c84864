"""A law of masks in one word, as the command line takes it: blocks:8:0.5."""

from __future__ import annotations

from collections.abc import Callable

from fallow.errors import FallowError, UsageError, nearest
from fallow.schemes import (
    Blocks,
    Exchangeable,
    FixedSize,
    Gaussian,
    Layer,
    Scheme,
    Units,
    UnitsInBlocks,
)

# Name -> how it is written, and what it makes of the numbers.
_LAWS: dict[str, tuple[str, Callable[..., Scheme]]] = {
    "units": ("units:RATE", lambda p: Units(float(p))),
    "blocks": ("blocks:SIZE:RATE[:sliding]", lambda r, p, grid="disjoint": Blocks(float(p), int(r), grid)),
    "layer": ("layer:RATE", lambda p: Layer(float(p))),
    "gaussian": ("gaussian:VARIANCE", lambda v: Gaussian(float(v))),
    "fixed": ("fixed:KEPT", lambda s: FixedSize(int(s))),
    "exchangeable": (
        "exchangeable:RATE:CORRELATION",
        lambda p, rho: Exchangeable(float(p), float(rho)),
    ),
    "units-in-blocks": (
        "units-in-blocks:SIZE:UNIT_RATE:BLOCK_RATE",
        lambda r, p, q: UnitsInBlocks(float(p), float(q), int(r)),
    ),
}
WRITTEN = tuple(how for how, _ in _LAWS.values())


def scheme_of(text: str) -> Scheme:
    """The law of a text; rates are survival rates.

    Raises:
        UsageError: an unknown name, too few or too many numbers, numbers that cannot be.

    Examples:
        >>> scheme_of("blocks:8:0.5")
        Blocks(survival_rate=0.5, block_size=8, grid='disjoint')
        >>> scheme_of("layers:0.5")
        Traceback (most recent call last):
        fallow.errors.UsageError: --noise layers:0.5: there is no law layers; did you mean layer:RATE?
    """
    name, *numbers = text.split(":")
    if name not in _LAWS:
        close = nearest(name, _LAWS)
        hint = f"; did you mean {_LAWS[close][0]}?" if close else f"; there are {', '.join(WRITTEN)}"
        raise UsageError(f"--noise {text}: there is no law {name}{hint}")
    how, make = _LAWS[name]
    try:
        return make(*numbers)
    except FallowError as error:
        raise UsageError(f"--noise {text}: {error}") from None
    except (TypeError, ValueError):
        raise UsageError(f"--noise {text}: it is written {how}") from None

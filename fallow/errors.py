"""Every error fallow raises on purpose, and the checks that raise them.

A message says what came, what is allowed and what to do. Each class also inherits the built-in exception it
specialises, so that `except ValueError` in code that knows nothing of fallow still works.
"""

from __future__ import annotations

import importlib
import math
import numbers
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from types import ModuleType


class FallowError(Exception):
    """The base of all errors that fallow raises on purpose."""


class RateError(FallowError, ValueError):
    """A survival rate, mean or budget that cannot be."""


class SiteError(FallowError, ValueError):
    """A site that does not exist or cannot rest, or a model without sites."""


class DataError(FallowError, ValueError):
    """A data set or a file that is missing, truncated or corrupt."""


class UsageError(FallowError, ValueError):
    """A value, or a combination of values, that a function does not take."""


class ArgumentError(FallowError, TypeError):
    """An argument of the wrong type, or a keyword that a function does not know."""


class RunError(FallowError, RuntimeError):
    """A run that started and had to stop."""


class MissingExtra(FallowError, ImportError):
    """A feature that needs packages outside the core installation."""


# What other libraries call the chance that a branch is dropped, kept, or either of the two.
_DROPPED = ("drop_prob", "drop_rate", "drop_path_rate", "drop_path")
_KEPT = ("survival_prob", "keep_prob", "keep_rate")
_EITHER = ("p", "rate", "prob")


def check_rate(value: object, where: str = "", *, name: str = "survival_rate") -> float:
    """Return `value` as a float if it lies in (0, 1].

    Args:
        value: What the caller gave.
        where: What it was given for, usually a site; prefixed to the message.
        name: The keyword the caller used.

    Raises:
        RateError: For anything but a number in (0, 1]; booleans and NaN are refused.

    Examples:
        >>> check_rate(0.5)
        0.5
        >>> check_rate(1.2, where="layer1.0")
        Traceback (most recent call last):
        fallow.errors.RateError: layer1.0: survival_rate must be in (0, 1], got 1.2
    """
    number = _as_float(value)
    if number is None or not 0.0 < number <= 1.0:
        prefix = f"{where}: " if where else ""
        raise RateError(f"{prefix}{name} must be in (0, 1], got {value!r}")
    return number


def check_choice(name: str, value: object, allowed: Iterable[str]) -> str:
    """Return `value` if it is one of `allowed`.

    Examples:
        >>> check_choice("mode", "rows", ("batch", "row"))
        Traceback (most recent call last):
        fallow.errors.UsageError: mode must be "batch" or "row", got "rows"
    """
    choices = tuple(allowed)
    if isinstance(value, str) and value in choices:
        return value
    quoted = [f'"{choice}"' for choice in choices]
    listed = " or ".join(filter(None, [", ".join(quoted[:-1]), quoted[-1]]))
    got = f'"{value}"' if isinstance(value, str) else repr(value)
    raise UsageError(f"{name} must be {listed}, got {got}")


def check_count(name: str, value: object, minimum: int = 0) -> int:
    """Return `value` if it is an integer of at least `minimum`; booleans are refused."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or int(value) < minimum:
        raise UsageError(f"{name} must be an integer of at least {minimum}, got {value!r}")
    return int(value)


def check_number(name: str, value: object, low: float, high: float = math.inf) -> float:
    """Return `value` as a float if it is a finite number from `low` to `high`; booleans are refused.

    Examples:
        >>> check_number("cut", 2, 0, 1)
        Traceback (most recent call last):
        fallow.errors.UsageError: cut must be in [0, 1], got 2
    """
    number = _as_float(value)
    if number is None or not low <= number <= high or math.isinf(number):
        allowed = (
            f"in [{low:g}, {high:g}]" if math.isfinite(high) else f"a number of at least {low:g}, finite"
        )
        raise UsageError(f"{name} must be {allowed}, got {value!r}")
    return number


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The one of `names` most like `name`, or None where nothing is similar.

    Examples:
        >>> nearest("layer1.O", ["layer1.0", "layer2.0"])
        'layer1.0'
    """
    close = get_close_matches(str(name), list(names), n=1, cutoff=0.5)
    return close[0] if close else None


def refuse_unknown(
    function: str,
    kwargs: Mapping[str, object],
    allowed: Iterable[str] = (),
    *,
    rate: str | None = "survival_rate",
) -> None:
    """Raise for keywords that `function` does not take; say the conversion where they name a rate.

    Args:
        function: The public name of the function that got the keywords.
        kwargs: The keywords it does not know; an empty mapping passes.
        allowed: The keywords it does know.
        rate: The keyword under which it takes a survival rate; None: it takes none.

    Raises:
        ArgumentError: Where `kwargs` is not empty.

    Examples:
        >>> refuse_unknown("gate", {"drop_prob": 0.1})
        Traceback (most recent call last):
        fallow.errors.ArgumentError: gate takes survival_rate, not drop_prob: for drop_prob=0.1 pass \
survival_rate=0.9
    """
    for key, value in kwargs.items():
        if rate is not None and key in _DROPPED + _KEPT + _EITHER:
            raise ArgumentError(f"{function} takes {rate}, not {key}: {_conversion(key, value, rate)}")
        known = tuple(allowed)
        close = nearest(key, known)
        hint = f"; did you mean {close}?" if close else f"; it takes {', '.join(known)}" if known else ""
        raise ArgumentError(f"{function} does not take {key}{hint}")


def _conversion(key: str, value: object, rate: str) -> str:
    """The sentence that turns another library's keyword into ours, with numbers where they make sense."""
    number = _as_float(value)
    given, kept, dropped = key, key, f"1 - {key}"
    if number is not None and 0.0 < number < 1.0:
        given, kept, dropped = f"{key}={value}", f"{number:.6g}", f"{1.0 - number:.6g}"
    if key in _DROPPED:
        return f"for {given} pass {rate}={dropped}"
    if key in _KEPT:
        return f"for {given} pass {rate}={kept}"
    return (
        f"for {given} pass {rate}={kept} if it is the share kept, {rate}={dropped} if it is the share dropped"
    )


def _as_float(value: object) -> float | None:
    """The value of a real number; None for anything else, booleans included."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    return None


def need(module: str, extra: str) -> ModuleType:
    """Import `module`, which the optional dependencies `extra` bring.

    Raises:
        MissingExtra: Where it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != top:
            raise  # installed, but something that it needs itself is not: its own message says more
        raise MissingExtra(
            f"this needs {top}, which is not installed: pip install 'fallow[{extra}]'"
        ) from None

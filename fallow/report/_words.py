"""Numbers out of a results file, and the plain words made from them.

A results file may come from a run that failed, was interrupted or is still running, so nothing here assumes
that a field is present, of the right type or finite: `get` walks, `number` accepts finite numbers only, and
the writers of text say "–" for what is not there.
"""

from __future__ import annotations

import math
from typing import Any

MISSING = "–"
SPACE = "\u00a0"  # a number and its unit stay on one line
LARGEST = 1e60  # beyond float32's range by far: only a broken run gets there, and axes cannot hold it
MANY_IMAGES = 2000  # from here on, the second decimal of a test error in percent is not all noise


def get(tree: Any, *path: str) -> Any:
    """The value at `path` of nested mappings, None where any part of the way is missing."""
    for key in path:
        if not isinstance(tree, dict):
            return None
        tree = tree.get(key)
    return tree


def number(value: Any) -> float | None:
    """`value` as a float that can be drawn; None for all else (text, bool, NaN, infinite, absurdly large)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        result = float(value)
    except OverflowError:  # an integer beyond the range of floats
        return None
    return result if abs(result) <= LARGEST else None  # NaN compares false


def numbers(values: Any) -> list[float]:
    """The finite numbers of a list, in order; empty for anything that is not a list."""
    return [x for x in map(number, values) if x is not None] if isinstance(values, list) else []


def records(values: Any) -> list[dict[str, Any]]:
    """The mappings of a list, in order; empty for anything that is not a list."""
    return [x for x in values if isinstance(x, dict)] if isinstance(values, list) else []


def plain(value: Any, form: str = ".4g", scale: float = 1.0, unit: str = "") -> str:
    """A number as text; a number that is not finite by its name, anything else as a dash."""
    found = number(value)
    if found is not None:
        return f"{found * scale:{form}}".replace("-", "\u2212") + (SPACE + unit if unit else "")
    if isinstance(value, float):
        name = "NaN" if math.isnan(value) else f"{value:.2e}" if math.isfinite(value) else f"{value}"
        return name.replace("-", "\u2212").replace("inf", "∞")
    return MISSING


def percent(value: Any, digits: int = 2) -> str:
    """A share in [0, 1] in percent."""
    return plain(value, f".{digits}f", 100, "%")


def count(value: Any) -> str:
    """A whole number with its thousands apart."""
    found = number(value)
    return plain(value) if found is None else f"{found:,.0f}".replace(",", "\u202f")


def ratio(value: Any) -> str:
    """A ratio, to three decimals."""
    return plain(value, ".3f")


def milliseconds(value: Any) -> str:
    """Seconds, shown in milliseconds with three significant digits."""
    found = number(value)
    if found is None:
        return plain(value)
    thousandths = found * 1000
    digits = 0 if abs(thousandths) >= 100 else 1 if abs(thousandths) >= 10 else 2
    return plain(thousandths, f".{digits}f", unit="ms")


def megabytes(value: Any) -> str:
    """An amount of memory."""
    return plain(value, ",.0f", unit="MB").replace(",", "\u202f")


def standard_error(share: Any, trials: Any) -> float | None:
    """Binomial standard error sqrt(e (1 - e) / n) of an error share e counted on n images."""
    e, n = number(share), number(trials)
    if e is None or n is None or n <= 0 or not 0 <= e <= 1:
        return None
    return math.sqrt(e * (1 - e) / n)


def difference_in_errors(first: Any, first_trials: Any, second: Any, second_trials: Any) -> float | None:
    """How many standard errors lie between two error shares (absolute).

    The standard error is the pooled one, sqrt(e (1 - e) (1/n + 1/m)) with e the error over both counts: the
    one that holds when both nets are equally good, and that does not vanish when one of them made no mistake
    at all. Both nets see the same images, so their errors tend to be positively correlated, and the number of
    standard errors is then, if anything, too small: it errs on the side of "within noise".
    """
    a, b, n, m = (number(x) for x in (first, second, first_trials, second_trials))
    if a is None or b is None or not n or not m or n < 0 or m < 0 or not (0 <= a <= 1 and 0 <= b <= 1):
        return None
    pooled = (a * n + b * m) / (n + m)
    spread = math.sqrt(pooled * (1 - pooled) * (1 / n + 1 / m))
    return abs(a - b) / spread if spread > 0 else (0.0 if a == b else math.inf)


def with_error(share: Any, trials: Any) -> str:
    """An error share in percent with its binomial standard error in points, and the number of images."""
    digits = 2 if (number(trials) or 0) >= MANY_IMAGES else 1
    spread = standard_error(share, trials)
    if spread is None:
        return percent(share, digits)
    return f"{100 * (number(share) or 0):.{digits}f}{SPACE}±{SPACE}{100 * spread:.{digits}f}{SPACE}%"


def interval(value: Any, form: str = ".2f") -> str:
    """The words "low to high" of a measured ratio, empty where it has no interval."""
    low, high = number(get(value, "low")), number(get(value, "high"))
    return "" if low is None or high is None else f"{low:{form}} to {high:{form}}"


def rested_words(results: dict[str, Any]) -> str:
    """What share of the work rested: realised where known, else expected."""
    cost = number(get(results, "summary", "realised_cost"))
    if cost is None:
        cost = number(get(results, "budget", "expected_cost"))
    if cost is None:
        return "Resting branches"
    share = 100 * (1 - cost)
    return "Resting nothing" if abs(share) < 0.5 else f"Resting {share:.0f}{SPACE}% of the work"


def time_words(results: dict[str, Any]) -> str:
    """The time of a step against constant depth and against the ideal; empty without a twin's measurement."""
    measured = get(results, "summary", "time_ratio")
    median = number(get(measured, "median"))
    if median is None:
        return ""
    ideals = [
        f"{value:.2f} {source}"
        for source, value in (
            ("from counted FLOPs", number(get(results, "budget", "ideal_flops"))),
            ("from measured time", number(get(results, "budget", "ideal_time"))),
        )
        if value is not None
    ]
    asides = [f"interval {interval(measured)}"] if interval(measured) else []
    asides += ["ideal " + " and ".join(ideals)] if ideals else []
    aside = f" ({'; '.join(asides)})" if asides else ""
    return f"a step took {median:.2f} of constant depth's time{aside}"


def verdict(results: dict[str, Any]) -> str:
    """Whether the two test errors differ: "within noise" below two standard errors of the difference."""
    model, twin = (get(results, "arms", arm, "summary") for arm in ("model", "twin"))
    apart = difference_in_errors(
        get(model, "test_error"), get(model, "test_images"), get(twin, "test_error"), get(twin, "test_images")
    )
    if apart is None:
        return ""
    return "within noise" if apart < 2 else "more than noise"


def error_words(results: dict[str, Any]) -> str:
    """The test errors with their standard errors, in words; empty before there is one."""
    model, twin = (get(results, "arms", arm, "summary") for arm in ("model", "twin"))
    error, images = get(model, "test_error"), get(model, "test_images")
    if number(error) is None:
        return ""
    words = f"test error {with_error(error, images)}"
    if number(get(twin, "test_error")) is not None:
        words += f" against {with_error(get(twin, 'test_error'), get(twin, 'test_images'))}"
    if number(images) is not None:
        words += f" on {count(images)} images"
    return words + (f", a difference {verdict(results)}" if verdict(results) else "")


def headline(results: dict[str, Any]) -> str:
    """One sentence with what the run found, made of nothing but its results."""
    found = [words for words in (time_words(results), error_words(results)) if words]
    if not found:
        return f"{rested_words(results)}: no test error yet."
    return f"{rested_words(results)}: {', '.join(found)}."


def status_words(results: dict[str, Any]) -> str:
    """What a reader must know about a run that is not done; empty for one that is."""
    status = get(results, "status")
    if status == "done":
        return ""
    done = max((len(records(get(results, "arms", arm, "epochs"))) for arm in ("model", "twin")), default=0)
    reached = f"after {done} epoch{'' if done == 1 else 's'}"
    words = {
        "running": f"This run had not finished when its results were read: they stop {reached}.",
        "interrupted": f"This run was interrupted {reached}; fallow train --resume continues it.",
        "failed": f"This run failed {reached}; what it had found until then is below.",
    }
    said = words.get(str(status), f"This run has the unknown status {status!r}; its results stop {reached}.")
    reason = get(results, "message")
    return f"{said} {reason}" if isinstance(reason, str) and reason else said

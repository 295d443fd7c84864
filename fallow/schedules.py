"""Survival rates over training time.

A schedule gives the strength s(t) in [0, 1] of the noise at step t. A site whose full rate is p then has the
rate

    1 - s(t) (1 - p)

at that step: 1 where the strength is 0, p where it is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from fallow.errors import ArgumentError, UsageError, check_choice, check_count, refuse_unknown

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Constant:
    """Full strength at every step; made by `constant`."""

    def __call__(self, t: int) -> float:
        """Return the strength at step `t`."""
        return 1.0


@dataclass(frozen=True)
class Warmup:
    """From no noise to all of it over the first `steps` steps; made by `warmup`."""

    steps: int

    def __call__(self, t: int) -> float:
        """Return the strength at step `t`."""
        return min(max(t / self.steps, 0.0), 1.0)


@dataclass(frozen=True)
class Decay:
    """From all the noise to none over `steps` steps from step `start` on; made by `decay`."""

    steps: int
    start: int = 0

    def __call__(self, t: int) -> float:
        """Return the strength at step `t`."""
        return min(max(1.0 - (t - self.start) / self.steps, 0.0), 1.0)


_KINDS: dict[str, type[Constant] | type[Warmup] | type[Decay]] = {
    "constant": Constant,
    "warmup": Warmup,
    "decay": Decay,
}


def constant() -> Constant:
    """The full noise at every step.

    Examples:
        >>> constant()(12)
        1.0
    """
    return Constant()


def warmup(steps: int) -> Warmup:
    """A linear rise from no noise at step 0 to all of it at step `steps`.

    Raises:
        UsageError: For anything but a positive integer.

    Examples:
        >>> [warmup(4)(t) for t in (0, 1, 4, 9)]
        [0.0, 0.25, 1.0, 1.0]
    """
    return Warmup(check_count("warmup: steps", steps, minimum=1))


def decay(steps: int, start: int = 0) -> Decay:
    """All the noise up to step `start`, then a linear fall to none over `steps` steps.

    Raises:
        UsageError: For `steps` below 1 or `start` below 0.

    Examples:
        >>> [decay(4, start=2)(t) for t in (0, 2, 3, 6, 9)]
        [1.0, 1.0, 0.75, 0.0, 0.0]
    """
    return Decay(check_count("decay: steps", steps, minimum=1), check_count("decay: start", start))


def rate_at(p: float, schedule: Schedule | None, t: int) -> float:
    """The survival rate at step `t` of a site whose rate at full strength is `p`.

    Args:
        p: The rate at full strength.
        schedule: A schedule of this module or a function of the step; None is full strength throughout.
        t: The step, from 0.

    Raises:
        UsageError: Where a schedule returns a strength outside [0, 1].

    Examples:
        >>> rate_at(0.5, warmup(10), 5)
        0.75
    """
    strength = 1.0 if schedule is None else schedule(t)
    if not 0.0 <= strength <= 1.0:
        raise UsageError(f"a schedule must return a strength in [0, 1], got {strength!r} at step {t}")
    return p if strength == 1.0 else 1.0 - strength * (1.0 - p)  # p itself, not p but for rounding


def to_dict(schedule: Constant | Warmup | Decay) -> dict[str, object]:
    """A schedule as a dictionary that JSON holds.

    Raises:
        ArgumentError: For a schedule that is not one of this module's.

    Examples:
        >>> to_dict(warmup(100))
        {'kind': 'warmup', 'steps': 100}
    """
    for kind, cls in _KINDS.items():
        if type(schedule) is cls:
            return {"kind": kind, **asdict(schedule)}
    raise ArgumentError(
        f"only the schedules {', '.join(_KINDS)} can be saved, got {schedule!r}; use one of them"
    )


def from_dict(state: Mapping[str, object]) -> Constant | Warmup | Decay:
    """The schedule that `to_dict` wrote.

    Raises:
        UsageError: For an unknown kind or a value that the kind does not allow.
        ArgumentError: For a field that the kind does not have.

    Examples:
        >>> from_dict({"kind": "decay", "steps": 10, "start": 5})
        Decay(steps=10, start=5)
    """
    kind = check_choice("schedule", state.get("kind"), _KINDS)
    if kind == "constant":
        fields, allowed = [], ()
    elif kind == "warmup":
        fields, allowed = [state.get("steps")], ("steps",)
    else:
        fields, allowed = [state.get("steps"), state.get("start", 0)], ("steps", "start")
    refuse_unknown(kind, {key: state[key] for key in state if key not in ("kind", *allowed)}, allowed)
    makers: dict[str, Callable[..., Constant | Warmup | Decay]] = {
        "constant": constant,
        "warmup": warmup,
        "decay": decay,
    }
    return makers[kind](*fields)

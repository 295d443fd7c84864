"""The schedules against their definition, and through their dictionaries."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow import errors, schedules

STEPS = st.integers(1, 10_000)
SCHEDULES = st.one_of(
    st.builds(schedules.constant),
    st.builds(schedules.warmup, STEPS),
    st.builds(schedules.decay, STEPS, st.integers(0, 10_000)),
)


@given(SCHEDULES, st.integers(0, 10**9))
def test_strength_is_a_share(schedule, t):
    assert 0 <= schedule(t) <= 1


@given(STEPS, st.integers(0, 20_000))
def test_warmup_rises_to_full_strength_and_stays(steps, t):
    schedule = schedules.warmup(steps)
    assert schedule(0) == 0 and schedule(steps) == 1
    assert schedule(t + 1) >= schedule(t)
    if t < steps:
        assert schedule(t + 1) - schedule(t) == pytest.approx(1 / steps)


@given(STEPS, st.integers(0, 10_000), st.integers(0, 30_000))
def test_decay_is_a_warmup_in_reverse(steps, start, t):
    schedule = schedules.decay(steps, start)
    assert schedule(t) == pytest.approx(1 - schedules.warmup(steps)(max(t - start, 0)))
    assert schedule(start) == 1 and schedule(start + steps) == 0


@given(SCHEDULES, st.integers(0, 20_000), st.floats(0.01, 1))
def test_the_rate_moves_between_one_and_the_full_rate(schedule, t, p):
    rate = schedules.rate_at(p, schedule, t)
    assert rate == pytest.approx(1 - schedule(t) * (1 - p))
    assert p <= rate <= 1 or rate == pytest.approx(p)


def test_the_ends_are_exact():
    assert schedules.rate_at(0.1, schedules.warmup(3), 3) == 0.1
    assert schedules.rate_at(0.1, schedules.warmup(3), 0) == 1.0
    assert schedules.rate_at(0.1, None, 7) == 0.1
    assert schedules.rate_at(1.0, schedules.warmup(3), 1) == 1.0


def test_a_users_function_is_a_schedule_and_is_checked():
    assert schedules.rate_at(0.5, lambda t: 0.5, 0) == 0.75
    with pytest.raises(errors.UsageError, match=r"strength in \[0, 1\], got 1.5 at step 3"):
        schedules.rate_at(0.5, lambda t: t / 2, 3)


@given(SCHEDULES)
def test_schedules_survive_json(schedule):
    assert schedules.from_dict(json.loads(json.dumps(schedules.to_dict(schedule)))) == schedule


def test_only_our_own_schedules_are_saved():
    with pytest.raises(errors.ArgumentError, match="only the schedules constant, warmup, decay can be saved"):
        schedules.to_dict(lambda t: 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ({}, errors.UsageError, 'schedule must be "constant", "warmup" or "decay", got None'),
        ({"kind": "cosine"}, errors.UsageError, 'got "cosine"'),
        ({"kind": "warmup"}, errors.UsageError, "warmup: steps must be an integer of at least 1, got None"),
        ({"kind": "decay", "steps": 0}, errors.UsageError, "got 0"),
        ({"kind": "constant", "steps": 3}, errors.ArgumentError, "constant does not take steps"),
        ({"kind": "decay", "steps": 3, "stat": 3}, errors.ArgumentError, "did you mean start?"),
    ],
)
def test_damaged_states_are_refused(state, error, message):
    with pytest.raises(error, match=message):
        schedules.from_dict(state)


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, "3"])
def test_steps_are_positive_integers(steps):
    for make in (schedules.warmup, schedules.decay):
        with pytest.raises(errors.UsageError, match="steps must be an integer of at least 1"):
            make(steps)
    with pytest.raises(errors.UsageError, match="start must be an integer of at least 0"):
        schedules.decay(3, start=-1)

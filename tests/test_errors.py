"""The checks refuse what they should, with messages that say what to do."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow import errors


@given(st.floats(min_value=0, max_value=1, exclude_min=True))
def test_every_rate_in_the_interval_passes_unchanged(value: float):
    assert errors.check_rate(value) == value


@given(st.one_of(st.floats(max_value=0), st.floats(min_value=1, exclude_min=True), st.just(math.nan)))
def test_every_rate_outside_is_refused(value: float):
    with pytest.raises(errors.RateError, match=r"survival_rate must be in \(0, 1\], got"):
        errors.check_rate(value)


@pytest.mark.parametrize("value", [True, "0.5", None, 1j, [0.5]])
def test_only_numbers_are_rates(value: object):
    with pytest.raises(errors.RateError):
        errors.check_rate(value)


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), Fraction(1, 2)])
def test_other_kinds_of_number_become_floats(value: object):
    rate = errors.check_rate(value)
    assert rate == 0.5 and type(rate) is float


def test_a_rate_message_names_the_place_and_the_keyword():
    with pytest.raises(errors.RateError, match=r"^layer1: budget must be in \(0, 1\], got 1.2$"):
        errors.check_rate(1.2, "layer1", name="budget")


def test_choices_are_listed_in_the_message():
    assert errors.check_choice("mode", "row", ("batch", "row")) == "row"
    with pytest.raises(errors.UsageError, match='^mode must be "batch" or "row", got "rows"$'):
        errors.check_choice("mode", "rows", ("batch", "row"))
    with pytest.raises(errors.UsageError, match='^x must be "a", "b" or "c", got None$'):
        errors.check_choice("x", None, "abc")
    with pytest.raises(errors.UsageError, match='^x must be "a", got "b"$'):
        errors.check_choice("x", "b", ["a"])


@pytest.mark.parametrize("value", [0, -3, 1.5, True, "2", None])
def test_counts_are_integers_of_at_least_the_minimum(value: object):
    assert errors.check_count("steps", np.int64(3), 1) == 3
    with pytest.raises(errors.UsageError, match="steps must be an integer of at least 1, got"):
        errors.check_count("steps", value, 1)


@pytest.mark.parametrize("key", ["drop_prob", "drop_rate", "drop_path_rate"])
def test_a_drop_rate_is_converted(key: str):
    with pytest.raises(errors.ArgumentError) as caught:
        errors.refuse_unknown("stochastic_depth", {key: 0.1})
    expected = f"stochastic_depth takes survival_rate, not {key}: for {key}=0.1 pass survival_rate=0.9"
    assert str(caught.value) == expected


@pytest.mark.parametrize("key", ["survival_prob", "keep_prob"])
def test_a_keep_rate_is_only_renamed(key: str):
    with pytest.raises(errors.ArgumentError, match=f"for {key}=0.8 pass survival_rate=0.8$"):
        errors.refuse_unknown("f", {key: 0.8})


@pytest.mark.parametrize("key", ["p", "rate"])
def test_an_ambiguous_rate_gets_both_readings(key: str):
    with pytest.raises(errors.ArgumentError) as caught:
        errors.refuse_unknown("f", {key: 0.2})
    assert "survival_rate=0.2 if it is the share kept" in str(caught.value)
    assert "survival_rate=0.8 if it is the share dropped" in str(caught.value)


@pytest.mark.parametrize("value", ["a lot", None, 7, True, math.nan])
def test_a_conversion_of_no_rate_shows_the_formula(value: object):
    with pytest.raises(errors.ArgumentError, match="for drop_prob pass survival_rate=1 - drop_prob$"):
        errors.refuse_unknown("f", {"drop_prob": value})


def test_another_keyword_gets_the_nearest_allowed_one():
    errors.refuse_unknown("apply", {}, ("mode",))
    with pytest.raises(errors.ArgumentError, match="^apply does not take modus; did you mean mode?"):
        errors.refuse_unknown("apply", {"modus": "row"}, ("mode", "sampler"))
    with pytest.raises(errors.ArgumentError, match="^apply does not take zz; it takes mode, sampler$"):
        errors.refuse_unknown("apply", {"zz": 1}, ("mode", "sampler"))
    with pytest.raises(errors.ArgumentError, match="^apply does not take zz$"):
        errors.refuse_unknown("apply", {"zz": 1})


def test_nearest_finds_only_what_is_similar():
    names = ["layer1.0", "layer1.1", "head"]
    assert errors.nearest("layer1_1", names) == "layer1.1"
    assert errors.nearest("quite different", names) is None
    assert errors.nearest("x", []) is None


def test_need_imports_or_says_what_to_install():
    assert errors.need("math", "lab") is math
    with pytest.raises(errors.MissingExtra, match=r"needs no_such_package, .*pip install 'fallow\[lab\]'"):
        errors.need("no_such_package.part", "lab")


def test_need_keeps_the_message_of_a_package_that_is_itself_broken(tmp_path, monkeypatch):
    (tmp_path / "halfway.py").write_text("import something_it_lacks\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="something_it_lacks") as caught:
        errors.need("halfway", "lab")
    assert not isinstance(caught.value, errors.MissingExtra)


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.RateError, ValueError),
        (errors.SiteError, ValueError),
        (errors.DataError, ValueError),
        (errors.UsageError, ValueError),
        (errors.ArgumentError, TypeError),
        (errors.RunError, RuntimeError),
        (errors.MissingExtra, ImportError),
    ],
)
def test_each_error_is_ours_and_a_builtin(error: type[Exception], builtin: type[Exception]):
    assert issubclass(error, errors.FallowError) and issubclass(error, builtin)

import math
import random

import pytest

from fallow.report import _words as words

NOT_NUMBERS = [None, "0.5", True, [], {}, math.nan, math.inf, -math.inf, 1.7e308, 10**400]


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=lambda value: repr(value)[:8])
def test_what_is_not_a_finite_number_is_none_and_still_has_words(value):
    assert words.number(value) is None
    for write in (words.plain, words.percent, words.count, words.ratio, words.milliseconds, words.megabytes):
        assert write(value) in ("–", "NaN", "∞", "−∞", "1.70e+308")


@pytest.mark.parametrize(("errors", "images"), [(0, 5), (1, 5), (3, 10), (8, 30)])
def test_standard_error_is_the_deviation_of_the_binomial(errors, images):
    share = errors / images
    weights = [math.comb(images, k) * share**k * (1 - share) ** (images - k) for k in range(images + 1)]
    mean = sum(w * k / images for k, w in enumerate(weights))
    variance = sum(w * (k / images - mean) ** 2 for k, w in enumerate(weights))
    assert words.standard_error(share, images) == pytest.approx(math.sqrt(variance), abs=1e-12)


def test_equal_nets_differ_by_more_than_noise_once_in_twenty():
    generator = random.Random(3)
    images, found = 400, 0
    for _ in range(1000):
        first, second = (sum(generator.random() < 0.1 for _ in range(images)) / images for _ in "ab")
        found += words.difference_in_errors(first, images, second, images) >= 2
    # P(|N(0, 1)| > 2) = 0.0455; three of its standard errors over 1,000 trials are 0.02.
    assert 0.025 < found / 1000 < 0.066


def test_difference_in_errors_knows_the_ends():
    assert words.difference_in_errors(0.0, 360, 0.0, 360) == 0.0
    assert words.difference_in_errors(0.0, 360, 1 / 360, 360) < 2
    assert words.difference_in_errors(0.0, 360, 1.0, 360) > 20
    assert words.difference_in_errors(0.1, 0, 0.1, 360) is None
    assert words.difference_in_errors(1.7, 360, 0.1, 360) is None


def test_headline_says_what_the_results_say(results):
    assert words.headline(results).replace("\u00a0", " ") == (
        "Resting 25 % of the work: a step took 0.77 of constant depth's time (interval 0.76 to 0.78; "
        "ideal 0.75 from counted FLOPs and 0.77 from measured time), "
        "test error 2.1 ± 0.8 % against 2.4 ± 0.8 % on 360 images, a difference within noise."
    )


def test_headline_says_more_than_noise_where_it_is(results):
    results["arms"]["twin"]["summary"]["test_error"] = 0.09
    assert "more than noise" in words.headline(results)


def test_headline_without_a_twin_compares_nothing(results):
    del results["arms"]["twin"]
    results["summary"] = {"realised_cost": 0.7508}
    said = words.headline(results).replace("\u00a0", " ")
    assert said == "Resting 25 % of the work: test error 2.1 ± 0.8 % on 360 images."


def test_headline_of_a_run_that_rests_nothing(results):
    results["summary"]["realised_cost"] = 1.0
    assert words.headline(results).startswith("Resting nothing: ")


def test_a_large_test_set_gets_a_second_decimal():
    assert words.with_error(0.0525, 10_000).replace("\u00a0", " ") == "5.25 ± 0.22 %"


@pytest.mark.parametrize("status", ["running", "interrupted", "failed"])
def test_a_run_that_is_not_done_says_so_and_how_far_it_came(results, status):
    results |= {"status": status, "message": "The loss was NaN at step 17."}
    said = words.status_words(results)
    assert status in said or "had not finished" in said
    assert "after 24 epochs" in said
    assert said.endswith("The loss was NaN at step 17.")


def test_a_run_that_is_done_needs_no_words(results):
    assert words.status_words(results) == ""

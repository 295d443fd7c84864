"""`fallow train --rates sensemode`: rates planned from the run's own steps, within the budget, resumable."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import SMALL, call, flags, same, settled, weights
from test_resume import Stop, stop_after, untimed

from fallow.errors import RateError, UsageError
from fallow.planning import allocate
from fallow.recipes import _job
from fallow.recipes import train as training
from fallow.recipes.train import Config, read_results, resume, train

Small = Callable[..., Path]
SENSED = {"rates": "sensemode", "epochs": 3, "refresh": 1, "twin": False}


def cost(found: dict, rates: dict[str, float]) -> float:
    """Expected share of a dense step, from the costs of the sites that the results name."""
    shares = {site["name"]: site["cost"] for site in found["sites"]}
    assert list(rates) == list(shares)
    return 1 - math.fsum(shares[n] * (1 - p) for n, p in rates.items())


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"mode": "row", "sampler": "exact", "minimum_rate": 0.3},
        {"accumulate": 2, "grads": "zero", "scale": "eval", "budget": 0.5},
        {"model": "vit_small", "granularity": "block", "autocast": True, "refresh": 2},
    ],
)
def test_every_plan_keeps_the_budget_and_follows_the_sensitivities(small: Small, more: dict):
    found = read_results(small(**SENSED | more))
    budget, minimum = (SMALL | more)["budget"], more.get("minimum_rate", allocate.MINIMUM_RATE)
    assert [plan["epoch"] for plan in found["plans"]] == ([2] if "refresh" in more else [1, 2])
    shares = {site["name"]: site["cost"] for site in found["sites"]}
    for plan in found["plans"]:
        assert cost(found, plan["rates"]) == pytest.approx(budget, abs=1e-12)
        assert min(plan["sensitivities"].values()) > 0
        expected = allocate.sensemode(plan["sensitivities"], shares, budget=budget, minimum_rate=minimum)
        assert plan["rates"] == expected
    assert len({tuple(plan["rates"].values()) for plan in found["plans"]}) == len(found["plans"])
    assert {site["name"]: site["asked"] for site in found["sites"]} == pytest.approx(
        found["plans"][-1]["rates"]
    )


def test_it_starts_as_uniform_and_watching_changes_nothing(small: Small):
    """Without a refresh it is a run with uniform rates, bit for bit."""
    sensed, plain = small(**SENSED | {"refresh": 3}), small(rates="uniform", epochs=3, twin=False)
    assert read_results(sensed)["plans"] == [] and same(weights(sensed), weights(plain))
    planned = small(**SENSED)
    assert not same(weights(planned), weights(plain))
    first, second = (read_results(run)["arms"]["model"]["depths"][:5] for run in (planned, plain))
    assert first == second


def test_plans_come_every_refresh_and_never_after_the_last_step(small: Small):
    found = read_results(small(**SENSED | {"epochs": 6, "refresh": 2}))
    assert [plan["epoch"] for plan in found["plans"]] == [2, 4]
    assert (
        settled(rates="sensemode", epochs=40).refresh == 5
        and settled(rates="sensemode", epochs=3).refresh == 1
    )


def test_a_run_killed_anywhere_ends_with_the_same_bits(
    small: Small, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Inside an epoch, right before and right after new rates."""
    options = SENSED | {"checkpoint_every": 1, "twin": True}
    whole = small(**options)
    for checkpoint in (3, 5, 6, 10, 12):
        cut = tmp_path / f"killed{checkpoint}"
        with monkeypatch.context() as patch, pytest.raises(Stop):
            stop_after(patch, checkpoint, training, "checkpoint")
            train(Config.of(SMALL | options), cut)
        resume(cut)
        assert all(same(weights(whole, arm), weights(cut, arm)) for arm in ("model", "twin"))
        assert untimed(whole) == untimed(cut)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            {"budget": 0.1},
            RateError,
            "rates of at least 0.1 .* smallest feasible budget is .*lower minimum_rate",
        ),
        ({"budget": 0.5, "minimum_rate": 0.9}, RateError, "smallest feasible budget"),
        ({"budget": 1.5}, RateError, "--budget must be in"),
        ({"minimum_rate": 0.0}, RateError, "--minimum-rate must be in"),
        ({"minimum_rate": 1.2}, RateError, "--minimum-rate must be in"),
        ({"refresh": 0}, UsageError, "--refresh must be an integer of at least 1"),
        ({"mean": 0.5, "budget": None}, UsageError, "--mean does not go with sensemode rates"),
        ({"last": 0.5, "budget": None}, UsageError, "--last does not go with sensemode"),
        ({"survival_rate": 0.5, "budget": None}, UsageError, "--survival-rate does not go with sensemode"),
        (
            {"rates": "uniform", "minimum_rate": None},
            UsageError,
            "--refresh goes with --rates sensemode alone",
        ),
        ({"rates": None, "refresh": None, "minimum_rate": 0.2}, UsageError, "--minimum-rate goes with"),
        ({"rates": "sensmode"}, UsageError, "leave out --budget|no such file"),
    ],
)
def test_bad_options_are_refused_before_a_folder_is_made(tmp_path: Path, options: dict, error, words: str):
    with pytest.raises(error, match=words):
        train(Config.of(SMALL | SENSED | options), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_program_has_the_flags(tmp_path: Path):
    run = tmp_path / "run"
    asked = flags(rates="sensemode", refresh=1, minimum_rate=0.2, epochs=2)
    done = call("train", *asked, "--no-twin", "--out", run)
    assert done.returncode == 0, done.stderr
    found = read_results(run)
    assert found["config"]["minimum_rate"] == 0.2 and found["config"]["refresh"] == 1
    assert len(found["plans"]) == 1 and min(found["plans"][0]["rates"].values()) >= 0.2


def test_a_refresh_waits_until_every_site_was_seen(small: Small, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_job.RunningSensitivities, "update", lambda self: None)
    assert read_results(small(**SENSED))["plans"] == []

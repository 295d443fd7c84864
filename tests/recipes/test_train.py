"""The training recipe: the twin, what a run leaves, how it fails."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import SMALL, same, weights

import fallow
from fallow import data, models, schedules
from fallow.errors import RunError
from fallow.recipes import _arm, _job, _results
from fallow.recipes._arm import Arm, droppable_time
from fallow.recipes._job import prepared
from fallow.recipes._run import STATE
from fallow.recipes.train import Config, read_results, train

Small = Callable[..., Path]


# --- the twin ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"mode": "row"}, {"preset": "adamw", "accumulate": 3}, {"autocast": True, "grads": "zero"}],
)
def test_without_noise_the_model_is_its_twin_bit_for_bit(small: Small, options: dict):
    run = small(budget=None, survival_rate=1.0, **options)
    assert same(weights(run), weights(run, "twin"))
    found = read_results(run)
    assert [e["train_loss"] for e in found["arms"]["model"]["epochs"]] == [
        e["train_loss"] for e in found["arms"]["twin"]["epochs"]
    ]
    assert found["budget"]["ideal_flops"] == found["summary"]["realised_cost"] == 1


def test_test_errors_on_the_way_change_nothing_and_end_in_the_final_one(small: Small):
    plain, watched = small(epochs=4), small(epochs=4, test_every=2)
    assert same(weights(plain), weights(watched))
    for arm in read_results(watched)["arms"].values():
        assert ["test_error" in epoch for epoch in arm["epochs"]] == [False, True, False, True]
        assert arm["epochs"][-1]["test_error"] == arm["summary"]["test_error"]


def test_the_model_trains_alike_with_and_without_its_twin(small: Small):
    both, alone = small(), small(twin=False)
    assert same(weights(both), weights(alone))
    assert "twin" not in read_results(alone)["arms"] and not (alone / "twin.safetensors").exists()


def test_with_noise_they_differ_and_the_seed_decides_all(small: Small):
    one, again, other = small(), small(), small(seed=1)
    assert not same(weights(one), weights(one, "twin"))
    assert same(weights(one), weights(again)) and not same(weights(one), weights(other))


def test_a_run_leaves_torch_as_it_was(small: Small):
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    small(threads=1)
    assert torch.equal(before, torch.get_rng_state())
    assert (threads, False) == (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())


def test_a_models_own_dropout_is_alike_in_both_arms(small: Small, monkeypatch: pytest.MonkeyPatch):
    class WithDropout(models.CifarResNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.dropout(super().forward(x), 0.3, self.training)

    monkeypatch.setitem(models.MODELS, "resnet8", lambda **options: WithDropout(8, **options))
    run = small(budget=None, survival_rate=1.0)
    assert same(weights(run), weights(run, "twin"))


# --- what a run leaves ------------------------------------------------------------------------------------


def test_the_weights_load_into_the_plain_model_and_make_the_stated_error(small: Small):
    run = small(epochs=3)
    digits = data.load("digits", train_size=100)
    model = models.MODELS["resnet8"](classes=10, channels=1)
    model.load_state_dict(load_file(run / "model.safetensors"))
    mean, std = digits.mean, digits.std
    with torch.no_grad():
        out = model.eval()((digits.test_x.float() / 255 - mean[:, None, None]) / std[:, None, None])
    wrong = (out.argmax(1) != digits.test_y).float().mean().item()
    stated = read_results(run)["arms"]["model"]["summary"]
    assert stated["test_error"] == pytest.approx(wrong, abs=1e-6) and stated["test_images"] == 360


def test_the_results_hold_what_the_report_reads(small: Small):
    found = read_results(small(checkpoint_every=2))
    assert (found["schema"], found["kind"], found["status"]) == (1, "train", "done")
    assert found["config"]["budget"] == 0.7 and found["config"]["model"] == "resnet8"
    assert found["provenance"]["data"] | {"fingerprint": "", "notes": []} == {
        "name": "digits",
        "fingerprint": "",
        "train": 90,
        "validation": 10,
        "test": 360,
        "notes": [],
    }
    for arm, depth in (("model", None), ("twin", 3.0)):
        part = found["arms"][arm]
        assert len(part["depths"]) == 10 and [e["step"] for e in part["epochs"]] == [5, 10]
        for record in part["epochs"]:
            assert all(
                isinstance(value, (int, float)) for key, value in record.items() if "per_step" not in key
            )
            assert record["gradient_first_convolution"] > 0
            assert depth is None or record["depth"] == depth
        assert part["summary"]["realised_depth"] == pytest.approx(sum(part["depths"]) / 10, abs=1e-3)
    costs = {site["name"]: site["cost"] for site in found["sites"]}
    for site in found["sites"]:
        assert 0 < site["asked"] < 1 and 0 <= site["realised"] <= 1
    rested = sum(costs[site["name"]] * (1 - site["realised"]) for site in found["sites"])
    assert found["summary"]["realised_cost"] == pytest.approx(1 - rested)
    budget = found["budget"]
    assert budget["expected_cost"] == pytest.approx(0.7) == budget["ideal_flops"]
    assert budget["droppable_flops"] == pytest.approx(sum(costs.values()))
    most = max(1 - site["asked"] for site in found["sites"])
    assert 1 - most * budget["droppable_time"] < budget["ideal_time"] < 1


def test_the_ideal_time_counts_what_each_site_takes_and_how_often_it_rests():
    model = models.CifarResNet(8, channels=1)
    handle = fallow.apply(model, fallow.rates.linear(0.4), example=torch.randn(2, 1, 8, 8))
    times = dict(zip(handle.rates, (0.5, 0.3, 0.1), strict=True))
    for schedule, strength in (("constant", 1.0), ("warmup:10", 0.45)):
        config = Config(schedule=schedule).settled()
        found = _results.budget(handle, config, 10, times)
        rested = 0.5 * 0.2 + 0.3 * 0.4 + 0.1 * 0.6
        assert found["ideal_time"] == pytest.approx(1 - strength * rested)
        assert found["droppable_time"] == pytest.approx(0.9)
        assert _results.budget(handle, config, 10, None)["ideal_time"] is None
    with prepared(Config.of(SMALL).settled(), "test") as job:
        arm = job.arms[0]
        before = copy.deepcopy(arm.model.state_dict())
        shares = droppable_time(arm.model, job.config, job.batches.dataset, job.batches)
        assert shares is not None and shares.keys() == job.handle.rates.keys()
        assert all(share > 0 for share in shares.values()) and sum(shares.values()) < 1
        assert all(torch.equal(value, before[name]) for name, value in arm.model.state_dict().items())


def test_depths_are_those_of_the_draws(small: Small):
    """The realised depth of every step, drawn again by another handle of the same seed."""
    run = small(seed=5)
    model = models.MODELS["resnet8"](classes=10, channels=1).train()
    handle = fallow.apply(model, fallow.rates.linear(budget=0.7), example=torch.randn(2, 1, 8, 8), seed=5)
    depths = []
    for _ in range(10):
        model(torch.randn(4, 1, 8, 8))
        depths.append(handle.last_depth)
    assert read_results(run)["arms"]["model"]["depths"] == depths


def test_a_schedule_counts_in_the_ideal_cost(small: Small):
    budget = read_results(small(schedule="warmup:10"))["budget"]
    strength = sum(schedules.warmup(10)(t) for t in range(10)) / 10
    assert budget["expected_cost"] == pytest.approx(0.7)
    assert budget["ideal_flops"] == pytest.approx(1 - 0.3 * strength)


# --- failures ---------------------------------------------------------------------------------------------


def poison(monkeypatch: pytest.MonkeyPatch, at: int, value: float, arm: str = "model") -> None:
    """Let the images of one step, or the loss of one arm at it, become not finite."""
    original = Arm._forward_backward
    count = dict.fromkeys(("model", "twin", "rest", "dense"), 0)

    def poisoned(self: Arm, batch: tuple) -> tuple:
        count[self.name] += 1
        loss, *others = original(self, batch)
        return (value if self.name == arm and count[arm] == at else loss, *others)

    monkeypatch.setattr(_arm.Arm, "_forward_backward", poisoned)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
):
    poison(monkeypatch, at=8, value=value)
    with pytest.raises(RunError, match=f"the loss of the model became {value} at step 7.*learning-rate"):
        train(Config.of(SMALL | {"mode": "row"}), tmp_path / "run")
    found = read_results(tmp_path / "run")
    assert found["status"] == "failed" and "last good checkpoint is kept" in found["message"]
    assert (found["failure"]["step"], found["failure"]["arm"]) == (7, "model")
    names = {site["name"] for site in found["sites"]}
    assert found["failure"]["rested"] and set(found["failure"]["rested"]) <= names
    assert torch.load(tmp_path / "run" / STATE, weights_only=True)["step"] == 5


def test_the_sites_that_rested_are_those_of_that_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    poison(monkeypatch, at=4, value=math.nan)
    with pytest.raises(RunError, match="there is no checkpoint yet"):
        train(Config.of(SMALL | {"seed": 2}), tmp_path / "run")
    model = models.MODELS["resnet8"](classes=10, channels=1).train()
    handle = fallow.apply(model, fallow.rates.linear(budget=0.7), example=torch.randn(2, 1, 8, 8), seed=2)
    for _ in range(4):
        model(torch.randn(4, 1, 8, 8))
    rested = [name for name, kept in handle.masks().items() if not kept.all()]
    assert read_results(tmp_path / "run")["failure"]["rested"] == rested


def test_the_twins_loss_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    poison(monkeypatch, at=2, value=math.nan, arm="twin")
    with pytest.raises(RunError, match="the loss of the twin"):
        train(Config.of(SMALL), tmp_path / "run")


def test_weights_that_are_not_finite_never_become_a_checkpoint(tmp_path: Path):
    """A step may leave them behind a finite loss; the checkpoint before it must survive."""
    with pytest.raises(RunError, match="not finite|became"):
        train(Config.of(SMALL | {"learning_rate": 1e30, "checkpoint_every": 1}), tmp_path / "run")
    state = tmp_path / "run" / STATE
    if state.exists():
        assert all(torch.isfinite(v).all() for v in weights(tmp_path / "run").values())


def test_too_little_memory_is_said_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def exhausted(self: Arm, batch: tuple) -> tuple:
        raise MemoryError

    monkeypatch.setattr(_job, "measure", lambda job: None)
    monkeypatch.setattr("fallow.recipes.train.measure", lambda job: None)
    monkeypatch.setattr(_arm.Arm, "_forward_backward", exhausted)
    with pytest.raises(RunError, match="not enough memory at step 0.*--batch-size"):
        train(Config.of(SMALL), tmp_path / "run")

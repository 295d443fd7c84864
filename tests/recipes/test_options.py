"""Options: what cannot be is refused before any step, the rest reaches its place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_runs import SMALL, settled

from fallow import data, models, schedules
from fallow.errors import FallowError, RateError, SiteError, UsageError
from fallow.recipes import _arm, _job
from fallow.recipes._arm import Arm, build
from fallow.recipes._batches import Batches, seed_of
from fallow.recipes._run import CONFIG, first_free
from fallow.recipes.train import Config, read_results, sites_of, train

Small = Callable[..., Path]


# --- what is refused before any step ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"budget": 0.01}, RateError, "smallest feasible budget"),
        ({"budget": 1.5}, RateError, r"--budget must be in \(0, 1\], got 1.5"),
        ({"last": 0.5}, UsageError, "--budget and --last cannot go together"),
        ({"survival_rate": 0.5}, UsageError, "--budget and --survival-rate cannot go together"),
        ({"rates": "linear", "budget": None, "survival_rate": 0.5}, UsageError, "does not go with linear"),
        ({"rates": "uniform", "budget": None, "last": 0.5}, UsageError, "does not go with uniform"),
        ({"budget": None, "first": 0.5}, UsageError, "--first goes with --last"),
        ({"budget": None, "mean": 0.1}, RateError, "smallest feasible mean"),
        ({"rates": {"group1.O": 0.5}, "budget": None}, SiteError, "did you mean group1.0"),
        ({"rates": {"group1.0": 0.5}}, UsageError, "gives every rate: leave out --budget"),
        ({"rates": {"group1.0": 0}, "budget": None}, RateError, "group1.0"),
        ({"rates": "nowhere.json", "budget": None}, UsageError, "there is no such file"),
        ({"include": ["group9.*"]}, SiteError, "group9"),
        ({"mode": "rows"}, UsageError, '--mode must be "batch" or "row", got "rows"'),
        ({"model": "resnet21"}, UsageError, "did you mean resnet"),
        ({"data": "digit"}, UsageError, "--data must be"),
        ({"preset": "adam"}, UsageError, "--preset must be"),
        ({"schedule": "warmup"}, UsageError, "warmup:STEPS"),
        ({"schedule": "decay:-3"}, UsageError, "decay:STEPS"),
        ({"epochs": 0}, UsageError, "--epochs must be an integer of at least 1"),
        ({"train_size": 5000}, UsageError, "1437"),
        ({"train_size": 2}, UsageError, "too few"),
        ({"accumulate": 11}, UsageError, "at most 10"),
        ({"learning_rate": -1.0}, UsageError, "--learning-rate must be"),
        ({"label_smoothing": 1.0}, UsageError, "below 1"),
        ({"device": "gpu"}, UsageError, "device must be auto, cpu, cuda"),
        ({"device": "cuda:99"}, UsageError, "is not there"),
        ({"data": "cifar10", "data_dir": "/nowhere", "train_size": None}, FallowError, "nowhere"),
    ],
)
def test_what_cannot_be_is_refused_before_a_folder_is_made(tmp_path: Path, options: dict, error, words: str):
    with pytest.raises(error, match=words):
        train(Config.of(SMALL | options), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_unknown_options_are_refused_with_the_nearest():
    with pytest.raises(FallowError, match="did you mean epochs"):
        Config.of({"epoch": 3})


def test_one_process_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="one process"):
        Config().settled()


def test_a_folder_in_use_is_refused_and_an_empty_one_taken(small: Small, tmp_path: Path):
    run = small()
    with pytest.raises(UsageError, match=f"not empty: continue it with --resume {run}"):
        train(Config.of(SMALL), run)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty: name another place"):
        train(Config.of(SMALL), tmp_path / "notes")
    with pytest.raises(UsageError, match="is a file"):
        train(Config.of(SMALL), tmp_path / "notes" / "mine.txt")
    (tmp_path / "empty").mkdir()
    assert (train(Config.of(SMALL | {"epochs": 1}), tmp_path / "empty") / CONFIG).exists()


def test_without_a_name_the_first_free_number_is_taken(tmp_path: Path):
    (tmp_path / "digits-resnet8-1").mkdir()
    (tmp_path / "digits-resnet8-2").write_text("")
    assert first_free("digits", "resnet8", tmp_path).name == "digits-resnet8-3"
    assert first_free("svhn", "timm:x/y", tmp_path).name == "svhn-timm-x-y-1"


# --- options reach their place ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"budget": None, "last": 0.4}, [0.8, 0.6, 0.4]),
        ({"budget": None, "first": 1.0, "last": 0.5}, [1.0, 0.75, 0.5]),
        ({"budget": None, "mean": 0.8}, [0.9, 0.8, 0.7]),
        ({"budget": None, "survival_rate": 0.3}, [0.3, 0.3, 0.3]),
        ({"budget": None, "rates": "uniform", "mean": 0.6}, [0.6, 0.6, 0.6]),
        ({"budget": None, "rates": {"group2.*": 0.5}}, [1.0, 0.5, 1.0]),
    ],
)
def test_every_way_to_say_rates(small: Small, options: dict, want: list[float]):
    found = read_results(small(epochs=1, twin=False, **options))["sites"]
    assert [site["asked"] for site in found] == pytest.approx(want)


def test_rates_from_a_file_live_in_the_configuration(small: Small, tmp_path: Path):
    file = tmp_path / "rates.json"
    file.write_text('{"group1.0": 0.25}')
    run = small(epochs=1, budget=None, rates=str(file))
    assert json.loads((run / CONFIG).read_text())["rates"] == {"group1.0": 0.25}
    for text, words in (("[1]", "one JSON mapping"), ("{", "not a JSON file")):
        file.write_text(text)
        with pytest.raises(UsageError, match=words):
            small(budget=None, rates=str(file))


def test_every_option_of_apply_reaches_the_handle():
    options = {
        "mode": "row",
        "sampler": "exact",
        "scale": "eval",
        "grads": "zero",
        "rows": "scattered",
        "seed": 9,
    }
    job = _job.prepare(settled(**options, schedule="decay:7:3", exclude=["group2.*"]), "")
    try:
        assert {key: getattr(job.handle.options, key) for key in options} == options
        assert job.handle.schedule == schedules.decay(7, start=3)
        assert [site.name for site in job.handle.sites] == ["group1.0", "group3.0"]
    finally:
        job.handle.remove()


def test_rates_from_the_file_of_a_plan(tmp_path: Path):
    plan = {"schema": 1, "kind": "plan", "sites": [{"name": "group1.0", "rate": 0.25, "cost": 0.1}]}
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan))
    assert settled(budget=None, rates=str(file)).rates == {"group1.0": 0.25}
    for sites in ({}, [{"rate": 0.5}], [3]):
        file.write_text(json.dumps(plan | {"sites": sites} if sites else {"kind": "plan"}))
        with pytest.raises(UsageError, match="without sites and rates: write it anew"):
            settled(budget=None, rates=str(file))


def test_granularity_and_timm_models_reach_their_place():
    config = Config(model="vit_small", granularity="block", threads=1, train_size=50, twin=False).settled()
    job = _job.prepare(config, "")
    job.handle.remove()
    assert len(job.handle.sites) == 12
    pytest.importorskip("timm")
    assert len(sites_of(Config(model="timm:resnet18", threads=1))) == 8
    with pytest.raises(UsageError, match="timm cannot make the model nonesuch"):
        sites_of(Config(model="timm:nonesuch", threads=1))


def test_torchvision_models_train_on_one_channel_repeated(small: Small):
    pytest.importorskip("torchvision")
    run = small(model="torchvision:resnet18", epochs=1, twin=False, budget=None, last=0.5)
    found = read_results(run)
    assert found["status"] == "done" and len(found["sites"]) == 8
    assert "the one channel of the images is repeated to 3" in found["provenance"]["data"]["notes"]


@pytest.mark.parametrize("name", ["resnet8", "vit_small", "timm:test_resnet"])
def test_initial_weights_are_those_of_a_seeded_constructor(name: str):
    """Drawn apart from torch's own generator, yet the same as they always were."""
    dataset = data.load("digits")
    model = build(settled(model=name, seed=3), dataset)
    torch.manual_seed(seed_of(3, "weights"))
    if name.startswith("timm:"):
        want = pytest.importorskip("timm").create_model(name[5:], num_classes=10, in_chans=1)
    else:
        want = models.build(name, classes=10, channels=1, image=(8, 8))
    for key, value in want.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_precision_layout_and_smoothing_reach_the_step(monkeypatch: pytest.MonkeyPatch):
    seen: dict[str, object] = {}
    original = torch.nn.functional.cross_entropy

    def spy(out: torch.Tensor, target: torch.Tensor, **more: float) -> torch.Tensor:
        seen.update(dtype=out.dtype, **more)
        return original(out, target, **more)

    monkeypatch.setattr(_arm.F, "cross_entropy", spy)
    config = settled(autocast=True, channels_last=True, label_smoothing=0.1)
    digits = data.load("digits", train_size=100)
    arm, batches = Arm("twin", build(config, digits), config, 3), Batches(digits, config)
    arm.model.stem.register_forward_hook(lambda m, a, out: seen.update(layout=out))
    arm.step(batches.at(0), 0.1, 0)
    assert (seen["dtype"], seen["label_smoothing"]) == (torch.bfloat16, 0.1)
    assert seen["layout"].is_contiguous(memory_format=torch.channels_last)  # type: ignore[union-attr]

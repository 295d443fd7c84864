"""The training recipe: the twin, the schedule of learning rates, what is measured, and how a run fails."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import SMALL, same, weights

import fallow
from fallow import data, models, schedules
from fallow.errors import FallowError, RateError, RunError, SiteError, UsageError
from fallow.recipes import _arm, _job
from fallow.recipes._arm import Arm, build
from fallow.recipes._batches import Batches
from fallow.recipes._measure import peak_memory, ratio
from fallow.recipes._optimise import learning_rate, optimiser
from fallow.recipes._run import CONFIG, STATE, first_free
from fallow.recipes.train import Config, read_results, sites_of, train

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
    share = (1 - budget["expected_cost"]) / budget["droppable_flops"]
    assert budget["ideal_time"] == pytest.approx(1 - budget["droppable_time"] * share)


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


# --- batches and learning rates ---------------------------------------------------------------------------


def settled(**options: object) -> Config:
    return Config.of(SMALL | options).settled()


def test_every_epoch_shows_every_training_image_once():
    config = settled(augment=False)
    digits = data.load("digits", train_size=100)
    batches = Batches(digits, config)
    train_images = digits.split_validation(0.1)[0]
    want = sorted(digits.train_x[train_images].flatten(1).float().sum(1).tolist())
    mean, std = digits.mean.item(), digits.std.item()
    orders = []
    for epoch in range(2):
        got = [batches.at(epoch * batches.per_epoch + k) for k in range(batches.per_epoch)]
        assert [len(y) for _, y in got] == [20, 20, 20, 20, 10]
        sums = torch.cat([((x * std + mean) * 255).flatten(1).sum(1) for x, _ in got])
        assert sorted(sums.round().tolist()) == want
        orders.append(torch.cat([y for _, y in got]))
    assert not torch.equal(*orders)


def test_a_batch_is_a_function_of_its_step_alone():
    batches = [Batches(data.load("digits", train_size=100), settled()) for _ in range(2)]
    in_order = [batches[0].at(step)[0] for step in range(8)]
    assert all(torch.equal(in_order[step], batches[1].at(step)[0]) for step in (7, 2, 5, 0))


@pytest.mark.parametrize(("size", "steps"), [(225, 4), (29, 31), (449, 3), (2000, 1)])
def test_a_last_batch_of_one_image_is_left_out(size: int, steps: int):
    """900 images are 4 x 225, 31 x 29 + 1 and 2 x 449 + 2."""
    batches = Batches(data.load("digits").subset(1000), settled(batch_size=size))
    assert batches.sizes["train"] == 900 and batches.per_epoch == steps


def test_huangs_learning_rate_falls_at_half_and_three_quarters():
    config = Config(data="cifar10", preset="huang", epochs=8, threads=1).settled()
    assert (config.learning_rate, config.weight_decay, config.batch_size) == (0.1, 1e-4, 128)
    rates = [learning_rate(step, 10, config) for step in range(80)]
    assert rates[:40] == [0.1] * 40
    assert rates[40:60] == pytest.approx([0.01] * 20) and rates[60:] == pytest.approx([0.001] * 20)
    group = optimiser(torch.nn.Linear(2, 2), config).param_groups[0]
    assert (group["momentum"], group["nesterov"], group["dampening"]) == (0.9, True, 0)


def test_adamw_rises_then_follows_half_a_cosine_and_spares_vectors():
    config = Config(
        model="vit_small", epochs=10, learning_rate_warmup=2.0, data="cifar10", threads=1
    ).settled()
    assert config.preset == "adamw"
    rates = [learning_rate(step, 10, config) for step in range(100)]
    assert rates[:20] == pytest.approx([1e-3 * (k + 1) / 20 for k in range(20)])
    assert rates[60] == pytest.approx(5e-4) and all(
        a > b for a, b in zip(rates[20:], rates[21:], strict=False)
    )
    groups = optimiser(torch.nn.Linear(2, 2), config).param_groups
    assert [(g["weight_decay"], [p.dim() for p in g["params"]]) for g in groups] == [(0.05, [2]), (0.0, [1])]


def test_pieces_of_a_batch_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch):
    """Gradient accumulation, on a model without batch statistics: the same step but for rounding."""
    digits = data.load("digits", train_size=60)
    after = []
    for pieces in (1, 3):
        config = settled(model="vit_small", accumulate=pieces, batch_size=10, preset="huang")
        arm = Arm("twin", build(config, digits), config, 24)
        assert arm.step(Batches(digits, config).at(0), 0.1, 0) > 0
        after.append([p.detach().clone() for p in arm.model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*after, strict=True))


# --- measurements -----------------------------------------------------------------------------------------


def test_peak_memory_counts_what_lives_at_once():
    def work(keep: bool) -> int:
        held = torch.zeros(1000)
        with peak_memory("cpu", [held]) as peak:
            kept = []
            for _ in range(5):
                x = held + 1
                if keep:
                    kept.append(x)
                del x
        return peak.bytes

    assert work(keep=True) == 6 * 4000 and work(keep=False) == 2 * 4000


def test_peak_memory_sees_what_backward_keeps_and_changes_no_number():
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(6)))
    x, plain = torch.randn(128, 64), []
    for measured in (False, True):
        model.zero_grad()
        if measured:
            with peak_memory("cpu", model.parameters()) as peak:
                model(x).square().sum().backward()
            own = sum(p.nbytes for p in model.parameters())
            assert peak.bytes >= own + 6 * x.nbytes
            assert all(torch.equal(a, p.grad) for a, p in zip(plain, model.parameters(), strict=True))
        else:
            model(x).square().sum().backward()
            plain = [p.grad.clone() for p in model.parameters()]


def test_a_model_that_rests_needs_less_memory(small: Small):
    run = small(budget=None, survival_rate=0.05, sampler="exact", batch_size=90)
    assert read_results(run)["summary"]["memory_ratio"] < 0.9


def test_the_interval_holds_the_median_and_leaves_out_what_is_marked():
    ours, theirs = [1.0, 2.0, 3.0, math.nan, 9.0], [2.0, 2.0, 2.0, 1.0, math.nan]
    found = ratio(ours, theirs)
    assert found is not None and found["median"] == 1.0
    assert 0.5 <= found["low"] <= found["median"] <= found["high"] <= 1.5
    assert ratio([math.nan], [1.0]) is None


def test_the_interval_covers_the_true_median_nineteen_times_in_twenty():
    generator = torch.Generator().manual_seed(3)
    inside = 0
    for _ in range(100):
        noise = torch.randn(40, generator=generator, dtype=torch.float64).mul(0.1).exp()
        found = ratio((0.75 * noise).tolist(), [1.0] * 40)
        inside += found is not None and found["low"] <= 0.75 <= found["high"]
    assert inside >= 85  # 95 expected, five standard errors of 2.2 below


def test_measuring_does_not_touch_the_run(small: Small, monkeypatch: pytest.MonkeyPatch):
    plain = small()
    monkeypatch.setattr(_job, "measure", lambda job: None)
    monkeypatch.setattr("fallow.recipes.train.measure", lambda job: None)
    monkeypatch.setattr("fallow.recipes.train._MEMORY_MEASURED", 1)
    assert same(weights(plain), weights(small()))


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


def test_granularity_and_timm_models_reach_their_place():
    config = Config(model="vit_small", granularity="block", threads=1, train_size=50, twin=False).settled()
    job = _job.prepare(config, "")
    job.handle.remove()
    assert len(job.handle.sites) == 12
    pytest.importorskip("timm")
    assert len(sites_of(Config(model="timm:resnet18", threads=1))) == 8
    with pytest.raises(UsageError, match="timm cannot make the model nonesuch"):
        sites_of(Config(model="timm:nonesuch", threads=1))


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

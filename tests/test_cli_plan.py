"""`fallow plan`: a table and plan.json, for every kind of model; what cannot be is one paragraph."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_calls import Call, caller, refused
from safetensors.torch import load_file, save_file

import fallow
from fallow.errors import FallowError
from fallow.integrations.loading import load_model
from fallow.recipes._probe import Source, on_threads, probe
from fallow.recipes.examine import plan_of

FEW = ["--batches", "2", "--batch-size", "4", "--threads", "1"]
GPT = {"model_type": "gpt2", "vocab_size": 40, "n_positions": 16, "n_embd": 12, "n_layer": 2, "n_head": 2}
BERT = {
    "model_type": "bert",
    "vocab_size": 40,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
TRAIN = ["--train-size", "60", "--epochs", "1", "--batch-size", "20", "--threads", "1", "--no-twin"]


@pytest.fixture
def call(capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    return caller(capsys, tmp_path, monkeypatch)


def plan_json() -> dict:
    return json.loads(Path("plan.json").read_text())


def config(values: dict) -> str:
    """The name of a model of transformers with that configuration."""
    pytest.importorskip("transformers")
    Path("config").mkdir()
    Path("config/config.json").write_text(json.dumps(values))
    return "hf:config"


# --- what it does ----------------------------------------------------------------------------------------


def test_a_plan_is_printed_and_written(call: Call):
    code, out, err = call("plan", "resnet8", "--budget", 0.7, *FEW)
    assert (code, err) == (0, "")
    assert "group1.0" in out and "expected cost 0.7000" in out
    assert out.splitlines()[-1].split() == ["plan", "plan.json"]
    made = fallow.Plan.load("plan.json")
    assert list(made) == ["group1.0", "group2.0", "group3.0"]
    assert made.expected_cost == pytest.approx(0.7, abs=1e-12)
    assert str(made) in out
    settings = plan_json()["settings"]
    assert (settings["model"], settings["data"], settings["inputs"]) == ("resnet8", "digits", "1x8x8")
    assert (settings["weights"], settings["batches"], settings["batch_size"]) == ("random", 2, 4)


def test_the_plan_is_that_of_the_library(call: Call):
    call("plan", "resnet8", "--budget", 0.6, "--method", "sensemode", "--seed", 3, *FEW)
    found = probe("resnet8", Source(batches=2, batch_size=4, seed=3))
    want = fallow.plan(
        found.model, found.loss_fn, found.batches, budget=0.6, method="sensemode", seed=3, max_batches=2
    )
    assert dict(fallow.Plan.load("plan.json")) == dict(want)


@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        (["--method", "linear"], {"method": "linear"}),
        (["--cost", "count"], {"cost": "count"}),
        (["--minimum-rate", 0.5], {"minimum_rate": 0.5}),
        (["--gamma", 0.5], {"gamma": 0.5}),
        (["--reduction", "leave_one_out"], {"reduction": "leave_one_out"}),
        (["--granularity", "block"], {"granularity": "block"}),
        (["--include", "group1.*", "--include", "group2.*"], {"include": ("group1.*", "group2.*")}),
        (["--exclude", "group1.*"], {"exclude": ("group1.*",)}),
    ],
)
def test_every_option_reaches_the_plan(call: Call, monkeypatch: pytest.MonkeyPatch, flags: list, asked: dict):
    from fallow.recipes import examine

    seen: dict = {}

    def stop(*_: object, **options: object) -> None:
        seen.update(options)
        raise fallow.RunError("seen")

    monkeypatch.setattr(examine, "plan", stop)
    assert call("plan", "resnet8", "--budget", 0.7, *flags, *FEW)[0] == 1
    assert seen["budget"] == 0.7 and asked.items() <= seen.items()


def test_the_same_call_gives_the_same_plan(call: Call):
    call("plan", "resnet8", "--budget", 0.7, *FEW)
    first = Path("plan.json").read_bytes()
    call("plan", "resnet8", "--budget", 0.7, *FEW)  # a plan may be written over
    assert Path("plan.json").read_bytes() == first
    call("plan", "resnet8", "--budget", 0.7, "--seed", 1, *FEW)
    assert Path("plan.json").read_bytes() != first


def test_a_run_is_planned_with_its_weights_its_data_and_its_sites(call: Call):
    call("train", "--model", "resnet8", "--out", "run", "--exclude", "group2.*", *TRAIN)
    assert call("plan", "run", "--budget", 0.8, *FEW)[0] == 0
    assert list(fallow.Plan.load("plan.json")) == ["group1.0", "group3.0"]
    settings = plan_json()["settings"]
    assert (settings["model"], settings["weights"]) == ("run", "of the run")
    found = probe("run", Source(batches=1, batch_size=2))
    trained = load_model("run", classes=10, channels=1, image=8).state_dict()
    assert all(torch.equal(value, trained[key]) for key, value in found.model.state_dict().items())


def test_a_run_is_probed_on_images_it_trained_on(call: Call):
    call("train", "--model", "resnet8", "--out", "run", *TRAIN)
    found = probe("run", Source(batches=9, batch_size=10))
    assert sum(len(target) for _, target in found.batches) == 54  # sixty less a tenth that validates
    assert found.notes == ("there are images for 6 of the 9 batches",)


def test_training_takes_the_plan(call: Call):
    call("plan", "resnet8", "--budget", 0.6, *FEW)
    code, _, err = call("train", "--model", "resnet8", "--rates", "plan.json", "--out", "run", *TRAIN)
    assert (code, err) == (0, "")
    asked = {s["name"]: s["asked"] for s in json.loads(Path("run/results.json").read_text())["sites"]}
    assert asked == dict(fallow.Plan.load("plan.json"))


def test_weights_of_a_file_are_taken(call: Call):
    model = load_model("resnet8", classes=10, channels=1, image=8, seed=5)
    torch.save(model.state_dict(), "w.pt")
    plain = probe("resnet8", Source(batches=1, batch_size=2))
    other = probe("resnet8", Source(batches=1, batch_size=2, weights="w.pt"))
    assert not torch.equal(plain.model.stem.conv.weight, model.stem.conv.weight)  # type: ignore[union-attr]
    assert torch.equal(other.model.stem.conv.weight, model.stem.conv.weight)  # type: ignore[union-attr]
    call("plan", "resnet8", "--budget", 0.7, "--weights", "w.pt", *FEW)
    assert plan_json()["settings"]["weights"] == "w.pt"


def test_a_page_comes_with_it(call: Call):
    code, out, _ = call("plan", "resnet8", "--budget", 0.7, "--html", "page.html", *FEW)
    assert code == 0 and out.splitlines()[-1].split() == ["page", "page.html"]
    assert 'id="run-1-rates"' in Path("page.html").read_text()


def test_report_takes_the_file(call: Call):
    call("plan", "resnet8", "--budget", 0.7, "--out", "mine.json", *FEW)
    assert call("report", "mine.json") == (0, "mine.html\n", "")


# --- other libraries' models -----------------------------------------------------------------------------


def test_images_are_resized_for_a_model_that_takes_one_size(call: Call):
    pytest.importorskip("timm")
    code, out, _ = call("plan", "timm:test_vit", "--budget", 0.7, "--data", "digits", *FEW)
    assert code == 0 and "note: the images are resized from 8x8 to 160x160" in out
    assert "blocks.5.mlp" in out and plan_json()["settings"]["inputs"] == "1x160x160"


def test_one_channel_is_repeated_where_the_model_wants_three(call: Call):
    pytest.importorskip("torchvision")
    code, out, _ = call("plan", "torchvision:resnet18", "--budget", 0.7, "--resize", 16, *FEW)
    assert code == 0 and "note: the one channel of the images is repeated to 3" in out
    assert plan_json()["settings"]["inputs"] == "3x16x16"


@pytest.mark.parametrize("values", [GPT, BERT], ids=["next", "masked"])
def test_a_language_model_needs_no_data(call: Call, values: dict):
    name = config(values)
    code, out, err = call("plan", name, "--budget", 0.9, *FEW)
    assert (code, err) == (0, "")
    assert "random tokens, not a text" in out and len(fallow.Plan.load("plan.json")) == 4
    same = call("plan", name, "--budget", 0.9, "--data", "tokens", *FEW)
    assert same[1] == out


def test_batches_of_tokens_have_something_to_find(call: Call):
    name = config(BERT)
    found = probe(name, Source(batches=3, batch_size=5))
    for inputs, target in found.batches:
        hidden = target != -100
        assert bool(hidden.any(1).all()) and not bool(hidden.all())
        kept = inputs["input_ids"][~hidden]
        assert len(kept) and int(inputs["input_ids"].max()) < 40


def test_the_normalised_images_have_mean_zero_and_variance_one():
    found = probe("resnet20", Source(batches=1, batch_size=1437))
    x = found.batches[0][0]
    assert x.mean().abs() < 1e-5 and (x.std() - 1).abs() < 1e-3


def test_resizing_keeps_what_is_shown():
    plain = probe("resnet20", Source(batches=1, batch_size=8)).batches[0]
    large = probe("resnet20", Source(batches=1, batch_size=8, resize=32)).batches[0]
    assert large[0].shape == (8, 1, 32, 32) and torch.equal(plain[1], large[1])
    back = torch.nn.functional.avg_pool2d(large[0], 4)
    assert torch.corrcoef(torch.stack([back.flatten(), plain[0].flatten()]))[0, 1] > 0.97


def test_the_number_of_threads_is_put_back():
    with on_threads(2):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 1


# --- what cannot be --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "MODEL"),
        (["resnet8"], "--budget"),
        (["resnet8", "--budget", "much"], "--budget"),
        (["resnet8", "--budget", "1.5"], "--budget must be in (0, 1], got 1.5"),
        (["resnet8", "--budget", "0.01"], "smallest feasible budget"),
        (["resnet9", "--budget", "0.7"], "did you mean resnet"),
        (["nowhere/run", "--budget", "0.7"], "the folder of a run"),
        (["timm:resnet1", "--budget", "0.7"], "did you mean timm:"),
        (["torchvision:resnet1", "--budget", "0.7"], "did you mean torchvision:"),
        (["torchvision:alexnet", "--budget", "0.7", "--resize", "64"], "no residual site"),
        (["hf:google/vit", "--budget", "0.7"], "fallow downloads nothing"),
        (["resnet8", "--budget", "0.7", "--method", "best"], 'method must be "auto"'),
        (["resnet8", "--budget", "0.7", "--cost", "money"], 'cost must be "flops"'),
        (["resnet8", "--budget", "0.7", "--method", "sensemode", "--gamma", "-1"], "gamma"),
        (["resnet8", "--budget", "0.7", "--include", "nosuch*"], "nosuch"),
        (["resnet8", "--budget", "0.7", "--data", "digit"], 'did you mean "digits"'),
        (["resnet8", "--budget", "0.7", "--data", "tokens"], "is for language models"),
        (["resnet8", "--budget", "0.7", "--data", "cifar10", "--data-dir", "nowhere"], "nowhere"),
        (["resnet8", "--budget", "0.7", "--resize", "0"], "--resize must be an integer of at least 1"),
        (["resnet8", "--budget", "0.7", "--batches", "0"], "--batches must be"),
        (["resnet8", "--budget", "0.7", "--batch-size", "0"], "--batch-size must be"),
        (["resnet8", "--budget", "0.7", "--seed", "-1"], "--seed must be"),
        (["resnet8", "--budget", "0.7", "--threads", "0"], "--threads must be"),
        (["resnet8", "--budget", "0.7", "--device", "gpu"], "device must be auto"),
        (["resnet8", "--budget", "0.7", "--weights", "nowhere.pt"], "no file of weights"),
        (["resnet8", "--budget", "0.7", "--weights", "something.json"], "is not opened"),
        (["resnet8", "--budget", "0.7", "--out", "nowhere/plan.json"], "no folder nowhere"),
        (["resnet8", "--budget", "0.7", "--out", "something.json"], "is there and is no plan"),
        (["vit_small", "--budget", "0.7", "--resize", "7"], "patch must divide"),
        (["timm:test_vit", "--budget", "0.7", "--resize", "17"], "1x17x17"),
    ],
)
def test_bad_usage_is_one_paragraph(call: Call, arguments: list[str], words: str):
    if arguments and arguments[0].startswith("hf:"):
        pytest.importorskip("transformers")
    Path("something.json").write_text('{"kind": "train"}')
    extra = [] if "--batches" in arguments or "--batch-size" in arguments else FEW[:4]
    threads = [] if "--threads" in arguments else ["--threads", "1"]
    assert words in refused(call, "plan", *arguments, *extra, *threads)
    assert [path.name for path in Path().iterdir()] == ["something.json"]


def test_a_run_brings_its_own_data(call: Call):
    call("train", "--model", "resnet8", "--out", "run", *TRAIN)
    words = refused(call, "plan", "run", "--budget", 0.7, "--data", "digits", *FEW)
    assert "has its own data set, digits: leave out --data" in words


def test_a_language_model_takes_no_images(call: Call):
    name = config(GPT)
    assert "takes tokens" in refused(call, "plan", name, "--budget", 0.9, "--data", "digits", *FEW)
    assert "leave out --resize" in refused(call, "plan", name, "--budget", 0.9, "--resize", 8, *FEW)


def test_weights_that_are_not_finite_are_a_failed_run(call: Call):
    model = load_model("resnet8", classes=10, channels=1, image=8)
    torch.save({key: value * float("nan") for key, value in model.state_dict().items()}, "w.pt")
    code, out, err = call("plan", "resnet8", "--budget", 0.7, "--weights", "w.pt", *FEW)
    assert (code, out) == (1, "") and err.count("\n") == 1 and "is not finite" in err
    assert not Path("plan.json").exists()


def test_in_python_the_same_is_refused(call: Call):
    with pytest.raises(FallowError, match="--budget must be"):
        plan_of("resnet8", Source(), budget=0)


def test_a_run_of_sparsify_is_planned_and_explained_on_its_own_weights(call: Call):
    asked = ["--data", "digits", "--train-size", 200, "--model", "resnet20", "--target", 0.5, "--epochs", 1]
    assert call("sparsify", *asked, "--out", "sparse")[0] == 0
    found = probe("sparse", Source(batches=1, batch_size=4))
    weights = load_file("sparse/model.safetensors")
    assert all(torch.equal(p, weights[name]) for name, p in found.model.named_parameters())
    assert sum(int((w == 0).sum()) for w in weights.values()) > 100_000
    save_file(fallow.models.resnet20(channels=3).state_dict(), "colour.safetensors")
    assert call("sparsify", *asked, "--out", "colour", "--weights", "colour.safetensors")[0] == 0
    assert probe("colour", Source(batches=1, batch_size=4)).batches[0][0].shape[1] == 3
    code, out, err = call("plan", "sparse", "--budget", 0.8, "--method", "linear", "--batches", 1)
    assert (code, err) == (0, "") and "group1.0" in out
    words = "sparse is no run of fallow train, so the rates must be said"
    assert words in refused(call, "explain", "sparse")
    other = ["plan", "sparse", "--budget", 0.8, "--data", "mnist"]
    assert "has its own data set, digits" in refused(call, *other)
    Path("sparse/model.safetensors").unlink()
    assert "fallow sparsify --resume" in call("plan", "sparse", "--budget", 0.8)[2]

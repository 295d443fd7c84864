"""`fallow explain`: of a run with its own rates, of a model by name with those that are said, of heads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_calls import Call, caller, refused

import fallow
from fallow.explaining import explain, explain_head
from fallow.recipes import examine
from fallow.recipes._laws import WRITTEN, scheme_of
from fallow.recipes._probe import Source, probe
from fallow.schemes import (
    Blocks,
    Exchangeable,
    FixedSize,
    Gaussian,
    Layer,
    Scheme,
    Units,
    UnitsInBlocks,
)

FEW = ["--batches", "1", "--batch-size", "6", "--draws", "8", "--site-draws", "2", "--threads", "1"]
TRAIN = ["--train-size", "60", "--epochs", "1", "--batch-size", "20", "--threads", "1", "--no-twin"]
SITES = ["group1.0", "group2.0", "group3.0"]


@pytest.fixture
def call(capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    return caller(capsys, tmp_path, monkeypatch)


@pytest.fixture
def run(call: Call) -> str:
    """The folder of a small run, with rates of its own and Huang's scale."""
    Path("rates.json").write_text(json.dumps({"group1.0": 0.9, "group3.0": 0.6}))
    call("train", "--model", "resnet8", "--rates", "rates.json", "--scale", "eval", "--out", "run", *TRAIN)
    return "run"


def found() -> dict:
    return json.loads(Path("explanation.json").read_text())


def rates() -> dict[str, float]:
    return {site["name"]: site["rate"] for site in found()["sites"]}


# --- what it does ----------------------------------------------------------------------------------------


def test_a_run_is_explained_with_its_own_rates_and_scale(call: Call, run: str):
    code, out, err = call("explain", run, *FEW)
    assert (code, err) == (0, "")
    assert "penalty R = E loss - loss(mean output)" in out and "Monte Carlo" in out and "group3.0" in out
    assert out.splitlines()[-1].split() == ["result", "explanation.json"]
    assert {name: rate for name, rate in rates().items() if rate < 1} == {"group1.0": 0.9, "group3.0": 0.6}
    assert (found()["kind"], found()["scale"], found()["loss"]) == ("explanation", "eval", "cross_entropy")
    assert (found()["settings"]["model"], found()["settings"]["rates"]) == ("run", "of the run")


def test_the_explanation_is_that_of_the_library(call: Call, run: str):
    out = call("explain", run, *FEW)[1]
    tried = probe(run, Source(batches=1, batch_size=6))
    want = explain(
        tried.model,
        tried.loss_fn,
        tried.batches,
        rates={"group1.0": 0.9, "group3.0": 0.6},
        scale="eval",
        draws=8,
        site_draws=2,
    )
    assert found()["totals"] == want.as_dict()["totals"]
    assert str(want).splitlines()[1] in out


def test_other_rates_and_another_scale_may_be_said(call: Call, run: str):
    assert call("explain", run, "--rates", "uniform", "--budget", 0.8, "--scale", "train", *FEW)[0] == 0
    assert found()["scale"] == "train" and len(set(rates().values())) == 1
    assert found()["settings"]["budget"] == 0.8


def test_a_model_by_name_takes_linear_rates_for_a_budget(call: Call):
    assert call("explain", "resnet8", "--budget", 0.7, *FEW)[0] == 0
    tried = probe("resnet8", Source(batches=1, batch_size=2))
    sites = fallow.sites(tried.model, tried.batches[0][0])
    want = fallow.rates.linear(budget=0.7)({site.name: site.cost for site in sites})
    assert rates() == pytest.approx(dict(want))


def test_a_plan_brings_its_rates_and_its_sites(call: Call):
    plan = ["--budget", 0.8, "--exclude", "group2.*", "--granularity", "block", "--batches", 1]
    assert call("plan", "resnet8", *plan, "--threads", 1)[0] == 0
    assert call("explain", "resnet8", "--rates", "plan.json", *FEW)[0] == 0
    assert rates() == dict(fallow.Plan.load("plan.json"))
    assert found()["settings"]["rates"] == "plan.json"


@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        (["--draws", 9], {"draws": 9}),
        (["--site-draws", 0], {"site_draws": 0}),
        (["--label-draws", 0], {"label_draws": 0}),
        (["--granularity", "block"], {"granularity": "block"}),
        (["--include", "group1.*"], {"include": ("group1.*",)}),
        (["--exclude", "group1.*"], {"exclude": ("group1.*",)}),
        (["--seed", 3], {"seed": 3}),
        (["--head", "head"], {"head": "head"}),
        (["--noise", "blocks:8:0.5:sliding"], {"scheme": Blocks(0.5, 8, "sliding")}),
        (["--loss", "squared"], {}),
    ],
)
def test_every_option_reaches_its_place(
    call: Call, monkeypatch: pytest.MonkeyPatch, flags: list, asked: dict
):
    seen: dict = {}

    def stop(*_: object, **options: object) -> None:
        seen.update(options)
        raise fallow.RunError("seen")

    monkeypatch.setattr(examine, "explain", stop)
    few = [] if flags[0] in FEW else ["--batches", 1]
    assert call("explain", "resnet8", "--budget", 0.7, *flags, *few)[0] == 1
    assert asked.items() <= seen.items()


def test_noise_in_front_of_the_head_needs_no_rates_and_squared_loss_has_a_distance(call: Call):
    arguments = ["--noise", "blocks:8:0.5", "--loss", "squared", "--html", "page.html"]
    code, out, err = call("explain", "resnet8", *arguments, *FEW)
    assert (code, err) == (0, "")
    for words in ("head head: 64 features, 10 outputs", "penalty, exact", "the objective is at most"):
        assert words in out
    head = found()["head"]
    assert found()["sites"] == [] and found()["settings"]["rates"] == "none"
    assert (found()["settings"]["noise"], found()["settings"]["loss"]) == ("blocks:8:0.5", "squared")
    assert head["optimum"]["bound"] <= head["optimum"]["minimum"] <= head["optimum"]["objective"]
    assert 'id="run-1-spectrum"' in Path("page.html").read_text()
    tried = probe("resnet8", Source(batches=1, batch_size=6))
    mean = {"loss_fn": examine._squared, "batches": tried.batches, "scheme": Blocks(0.5, 8), "draws": 8}
    assert head == explain_head(tried.model, **mean).as_dict()


def test_a_run_has_both_parts(call: Call, run: str):
    code, out, _ = call("explain", run, "--noise", "units:0.5", *FEW)
    assert code == 0 and "penalty R = E loss" in out and "penalty, quadratic form" in out
    assert {name: rate for name, rate in rates().items() if rate < 1} == {"group1.0": 0.9, "group3.0": 0.6}
    assert found()["head"]["scheme"] == str(Units(0.5))


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("units:0.5", Units(0.5)),
        ("blocks:8:0.5", Blocks(0.5, 8)),
        ("blocks:8:0.5:sliding", Blocks(0.5, 8, "sliding")),
        ("layer:0.5", Layer(0.5)),
        ("gaussian:0.25", Gaussian(0.25)),
        ("fixed:3", FixedSize(3)),
        ("exchangeable:0.5:0.1", Exchangeable(0.5, 0.1)),
        ("units-in-blocks:8:0.9:0.8", UnitsInBlocks(0.9, 0.8, 8)),
    ],
)
def test_every_law_can_be_written(text: str, scheme: Scheme):
    assert scheme_of(text) == scheme
    assert {how.partition(":")[0] for how in WRITTEN} >= {text.partition(":")[0]}


def test_a_page_comes_with_it_and_report_takes_the_file(call: Call):
    code, out, _ = call("explain", "resnet8", "--budget", 0.7, "--html", "page.html", *FEW)
    assert code == 0 and out.splitlines()[-1].split() == ["page", "page.html"]
    assert 'id="run-1-penalties"' in Path("page.html").read_text()
    assert call("report", "explanation.json") == (0, "explanation.html\n", "")


def test_the_same_call_gives_the_same_explanation(call: Call):
    call("explain", "resnet8", "--budget", 0.7, *FEW)
    first = Path("explanation.json").read_bytes()
    call("explain", "resnet8", "--budget", 0.7, *FEW)
    assert Path("explanation.json").read_bytes() == first


# --- what cannot be --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "MODEL"),
        (["resnet8"], "is no run of fallow train, so the rates must be said: pass --rates plan.json"),
        (["nowhere"], "is no run"),
        (["nowhere", "--budget", "0.7"], "the folder of a run"),
        (["resnet8", "--budget", "2"], "--budget must be in (0, 1]"),
        (["resnet8", "--rates", "sensemode"], "make one with fallow plan --method sensemode"),
        (["resnet8", "--rates", "nowhere.json"], "there is no such file"),
        (["resnet8", "--rates", "something.json", "--budget", "0.7"], "leave out --budget"),
        (["resnet8", "--rates", "something.json"], "kind"),
        (["resnet8", "--budget", "0.7", "--scale", "both"], 'scale must be "train" or "eval"'),
        (["resnet8", "--budget", "0.7", "--draws", "1"], "draws must be an integer of at least 2"),
        (["resnet8", "--budget", "0.7", "--site-draws", "1"], "site_draws"),
        (["resnet8", "--budget", "0.7", "--exclude", "nosuch"], "nosuch"),
        (["resnet8", "--budget", "0.7", "--out", "something.json"], "is no explanation"),
        (["resnet8", "--noise", "block:8:0.5"], "there is no law block; did you mean blocks:SIZE:RATE"),
        (["resnet8", "--noise", "dropout"], "there is no law dropout; there are units:RATE"),
        (["resnet8", "--noise", "blocks:8"], "--noise blocks:8: it is written blocks:SIZE:RATE[:sliding]"),
        (["resnet8", "--noise", "blocks:8:0.5:round"], "grid must be"),
        (["resnet8", "--noise", "blocks:0:0.5"], "block_size must be an integer of at least 1"),
        (["resnet8", "--noise", "units:1.5"], "survival_rate must be in (0, 1], got 1.5"),
        (["resnet8", "--noise", "units:half"], "it is written units:RATE"),
        (["resnet8", "--noise", "fixed:65"], "kept must be at most the width"),
        (["resnet8", "--head", "fc", "--noise", "units:0.5"], "no linear layer fc; there are head"),
        (["resnet8", "--head", "head"], "no noise feeds head directly"),
        (["resnet8", "--noise", "units:0.5", "--loss", "l1"], '--loss must be "cross-entropy" or "squared"'),
    ],
)
def test_bad_usage_is_one_paragraph(call: Call, arguments: list[str], words: str):
    Path("something.json").write_text('{"kind": "train"}')
    assert words in refused(call, "explain", *arguments, "--batches", 1, "--batch-size", 4)
    assert [path.name for path in Path().iterdir()] == ["something.json"]


def test_a_run_without_results_says_how_it_gets_them(call: Call, run: str):
    Path("run/results.json").write_text('{"sites": [{}]}')
    assert "does not hold the run's rates (KeyError)" in refused(call, "explain", run)
    Path("run/results.json").unlink()
    assert "--resume run" in refused(call, "explain", run)

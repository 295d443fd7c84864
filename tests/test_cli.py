"""The program: what it prints, its exit codes, errors in one paragraph."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from cli_calls import Call, caller

import fallow
from fallow.cli import _commands
from fallow.recipes import train
from fallow.recipes.train import Config

QUICK = ["--train-size", "60", "--epochs", "1", "--batch-size", "20", "--threads", "1", "--model", "resnet8"]


@pytest.fixture
def call(capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    return caller(capsys, tmp_path, monkeypatch)


def elsewhere(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m fallow ARGUMENTS` in another process."""
    return subprocess.run(
        [sys.executable, "-m", "fallow", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


# --- a run ---------------------------------------------------------------------------------------------


def test_a_run_ends_with_its_table_and_the_path_of_the_report(call: Call, tmp_path: Path):
    code, out, err = call("train", *QUICK)
    assert (code, err) == (0, "")
    for words in (
        "epoch 1/1",
        "stochastic depth",
        "constant depth",
        "test error (360 images)",
        "±",
        "CPU time per step",
        "ideal, from counted FLOPs",
        "0.750",
        "ideal, from measured time",
        "peak memory of a step",
        "of 3",
    ):
        assert words in out
    assert "\x1b" not in out and max(map(len, out.splitlines())) <= 100
    assert out.splitlines()[-1].split() == ["report", "runs/digits-resnet8-1/report.html"]
    assert (tmp_path / "runs/digits-resnet8-1/report.html").read_text().startswith("<!doctype html>")
    assert call("train", *QUICK, "--no-twin")[1].count("runs/digits-resnet8-2/report.html") == 1


def test_without_a_twin_the_table_has_one_column(call: Call):
    _, out, _ = call("train", *QUICK, "--no-twin")
    assert "stochastic depth" in out and "constant depth" not in out and "twin" not in out
    assert "ideal, from counted FLOPs" in out


def test_a_finished_run_reports_again_when_resumed(call: Call):
    first = call("train", *QUICK, "--out", "run")[1]
    code, out, _ = call("train", "--resume", "run")
    assert code == 0 and "done already" in out
    assert first[first.index("stochastic depth") :] == out[out.index("stochastic depth") :]


def test_the_results_say_which_command_made_them(call: Call):
    call("train", *QUICK, "--out", "my run", "--no-twin")
    command = json.loads(Path("my run/results.json").read_text())["provenance"]["command"]
    assert command == f"fallow train {' '.join(QUICK)} --out 'my run' --no-twin"


def test_a_live_line_is_shown_on_a_terminal(call: Call, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    code, out, _ = call("train", *QUICK, "--no-twin")
    assert code == 0 and "\x1b" in out
    assert "step 0/3" in out and "epoch 1/1" in out and "stochastic depth" in out


def test_report_draws_from_results_alone(call: Call, monkeypatch: pytest.MonkeyPatch):
    call("train", *QUICK, "--out", "one")
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *_: pytest.fail("something was run"))
    assert call("report", "one", "--out", "page.html") == (0, "page.html\n", "")
    code, out, _ = call("report", "one", "one", "--out", "both.html")
    assert code == 0 and Path(out.strip()).stat().st_size > Path("page.html").stat().st_size


def test_sites_are_listed(call: Call):
    code, out, _ = call("sites", "resnet20")
    assert code == 0 and out.count("group") == 9 and "transition" in out


# --- every option reaches its place ------------------------------------------------------------------------


ODD = {  # for every option a value that is not its default
    "data": "mnist",
    "data_dir": "folder",
    "train_size": 17,
    "image_size": 19,
    "model": "vit_small",
    "preset": "adamw",
    "epochs": 3,
    "batch_size": 11,
    "learning_rate": 0.123,
    "learning_rate_warmup": 1.5,
    "weight_decay": 0.01,
    "label_smoothing": 0.2,
    "augment": False,
    "budget": 0.6,
    "rates": "uniform",
    "survival_rate": 0.7,
    "last": 0.3,
    "first": 0.9,
    "mean": 0.8,
    "refresh": 3,
    "minimum_rate": 0.2,
    "mode": "row",
    "sampler": "exact",
    "scale": "eval",
    "grads": "zero",
    "rows": "scattered",
    "granularity": "block",
    "schedule": "warmup:5",
    "include": ["a.*", "b"],
    "exclude": ["c"],
    "twin": False,
    "autocast": True,
    "channels_last": True,
    "accumulate": 2,
    "device": "cuda:1",
    "threads": 3,
    "seed": 4,
    "checkpoint_every": 9,
    "test_every": 5,
}


@pytest.mark.parametrize("name", [field.name for field in fields(Config)])
def test_every_option_is_a_flag_that_reaches_the_run(call: Call, monkeypatch: pytest.MonkeyPatch, name: str):
    seen: list[Config] = []

    def stop(config: Config, *_: object, **__: object) -> None:
        seen.append(config)
        raise fallow.RunError("seen")

    monkeypatch.setattr(train, "train", stop)
    value, flag = ODD[name], "--" + name.replace("_", "-")
    arguments = [flag if value else flag.replace("--", "--no-")] if isinstance(value, bool) else []
    for part in [] if arguments else value if isinstance(value, list) else [value]:
        arguments += [flag, str(part)]
    assert call("train", *arguments)[0] == 1
    want = Config.of({name: value})
    assert seen == [want] and want != Config()


def test_help_names_every_option_and_its_default(call: Call):
    code, out, _ = call("train", "--help")
    assert code == 0
    words = " ".join(out.split())
    for name in ODD:
        assert "--" + name.replace("_", "-") in words
    assert "[bernoulli]" in words and "[resnet56]" in words and "[0.75]" in words
    assert call()[1].startswith("Usage: fallow")
    assert call("--version")[1] == f"fallow {fallow.__version__}\n"


def test_the_flags_are_made_from_the_options():
    names = [
        p for p in inspect.signature(_commands._train).parameters if p not in ("context", "out", "resume")
    ]
    assert names == [field.name for field in fields(Config)] == list(ODD)


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--budget", "0.01"], "smallest feasible budget"),
        (["train", "--budget", "0.5", "--last", "0.5"], "cannot go together"),
        (["train", "--mode", "rows"], '--mode must be "batch" or "row"'),
        (["train", "--model", "resnet57"], "did you mean resnet5"),
        (["train", "--epochs", "many"], "--epochs"),
        (["train", "--epoch", "3"], "--epoch"),
        (["train", "--bogus"], "--bogus"),
        (["train", "--exclude", "nosuch*"], "nosuch"),
        (["train", "--data", "mnist", "--data-dir", "~nosuch/data"], "~nosuch/data does not exist"),
        (["train", "--data", "cifar10", "--data-dir", "nowhere"], "nowhere"),
        (["train", "--resume", "nowhere"], "no run to resume"),
        (["train", "--resume", "nowhere", "--epochs", "3"], "leave out --epochs"),
        (["train", "--resume", "nowhere", "--out", "there"], "leave out --out"),
        (["train", "--out", "."], "exists and is not empty"),
        (["report", "nowhere"], "not a folder"),
        (["report"], "RUN"),
        (["sites", "resnet21"], "did you mean"),
        (["plough"], "plough"),
    ],
)
def test_bad_usage_is_one_paragraph_and_exit_code_2(
    call: Call, tmp_path: Path, arguments: list[str], words: str
):
    (tmp_path / "something").write_text("")
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("fallow: ") and err.count("\n") == 1 and words in err
    assert [path.name for path in tmp_path.iterdir()] == ["something"]


def test_a_failed_run_is_one_paragraph_and_exit_code_1(call: Call):
    code, _, err = call("train", *QUICK, "--learning-rate", "1e30", "--out", "run")
    assert code == 1 and err.count("\n") == 1 and "became" in err and "run" in err
    assert json.loads(Path("run/results.json").read_text())["status"] == "failed"


def test_an_interruption_before_the_first_step_is_no_traceback(call: Call, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", interrupt)
    assert call("train") == (130, "", "fallow: interrupted\n")


def test_a_mistake_of_ours_keeps_its_traceback(call: Call, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(train, "train", fail)
    with pytest.raises(ZeroDivisionError):
        call("train")


def test_the_module_is_the_program():
    done = elsewhere("train", "--mode", "rows")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == 'fallow: --mode must be "batch" or "row", got "rows"\n'
    assert elsewhere("--version").stdout == f"fallow {fallow.__version__}\n"


def test_a_reader_that_goes_away_is_no_traceback():
    program = f"{sys.executable} -m fallow train --help | true"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("missing", ["typer", "rich", "sklearn", "jinja2"])
def test_a_core_installation_names_the_extra(missing: str):
    """In a process in which the package cannot be found."""
    code = f"""
import sys

class Gone:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == {missing!r}:
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Gone())
from fallow.cli import run
sys.exit(run(["train"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"fallow: this needs {missing}, which is not installed: pip install 'fallow[lab]'\n"
    )

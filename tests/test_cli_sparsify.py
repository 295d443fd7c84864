"""`fallow sparsify`: what it prints and leaves, its exit codes, and the issue's own call on MNIST."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from cli_calls import Call, caller, refused

from fallow import data
from fallow.cli import _commands, _sparsify
from fallow.recipes._batches import Batches
from fallow.recipes._sparse_config import SparseConfig

QUICK = ["--train-size", 200, "--batch-size", 30, "--epochs", 1, "--threads", 1]
MNIST = Path(__file__).parents[2] / "shared" / "data" / "mnist"


@pytest.fixture
def call(capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    return caller(capsys, tmp_path, monkeypatch)


def results(run: str) -> dict:
    return json.loads(Path(run, "results.json").read_text())


# --- a run -----------------------------------------------------------------------------------------------


def test_a_run_ends_with_its_table_and_the_path_of_the_report(call: Call):
    code, out, err = call("sparsify", *QUICK, "--target", 0.9, "--groups", "outputs")
    assert (code, err) == (0, "")
    for words in (
        "epoch 1/1",
        "zeros 8",
        "before / after",
        "test error (360 images)",
        "±",
        "weights that are not zero",
        "FLOPs of an image",
        "latency of 128 images",
        "file of weights",
        "file with sparse rows",
    ):
        assert words in out
    assert "\x1b" not in out and max(map(len, out.splitlines())) <= 110
    assert out.splitlines()[-1].split() == ["report", "runs/digits-lenet300-sparse-1/report.html"]
    page = Path("runs/digits-lenet300-sparse-1/report.html").read_text()
    assert page.startswith("<!doctype html>") and 'id="run-1-strategy"' in page


def test_a_finished_run_reports_again_when_resumed(call: Call):
    first = call("sparsify", *QUICK, "--target", 0.9, "--out", "run")[1]
    Path("run/report.html").unlink()
    code, out, _ = call("sparsify", "--resume", "run")
    assert code == 0 and "done already" in out and Path("run/report.html").exists()
    assert first[first.index("before") :] == out[out.index("before") :]


def test_report_lays_runs_of_several_strategies_side_by_side(call: Call):
    for name in ("logsum", "magnitude"):
        command = ["sparsify", *QUICK, "--target", 0.9, "--strategy", name, "--out", name]
        assert call(*command)[0] == 0
    code, out, err = call("report", "logsum", "magnitude", "--out", "page.html")
    assert (code, out, err) == (0, "page.html\n", "")
    page = Path("page.html").read_text()
    assert "2 runs compared" in page and 'id="compared-path"' in page
    assert "fallow sparsify" in results("logsum")["provenance"]["command"]


def test_nothing_is_warned_of(call: Call):
    """In a process of its own: torch says these things but once."""
    arguments = ["sparsify", *map(str, QUICK), "--target", "0.9"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "fallow", *arguments], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_layer_that_would_be_empty_and_what_stays_are_said():
    found = {
        "rescued": ["linear2.weight"],
        "small": {"left": [{"name": "linear3", "count": 5, "reason": "an output of the model"}] * 7},
    }
    lines = _sparsify.remarks(found)
    assert lines[0] == "linear2.weight would be empty: the largest of its groups stayed"
    assert lines[1] == "stays in linear3: 5 dead, an output of the model"
    assert lines[-1] == "and 2 more kinds, in the report" and len(lines) == 7
    failed = _sparsify.remarks({"rescued": [], "small": {"failed": "why"}})
    assert failed == ["the network could not be made smaller, its zeros are in the files: why"]


def test_a_target_that_was_missed_is_said_and_so_is_what_stayed_whole():
    found = {
        "rescued": ["first", "second"],
        "stayed": {"first": "would be empty: it has 16 groups and stayed whole"},
        "shortfall": {"asked": 0.8, "reached": 0.661, "reason": "16 outputs of each layer stay"},
        "small": {"left": []},
    }
    assert _sparsify.remarks(found) == [
        "first would be empty: it has 16 groups and stayed whole",
        "second would be empty: the largest of its groups stayed",
        "the target was not met: 66.10% zeros instead of 80.00%: 16 outputs of each layer stay",
    ]


def test_the_table_of_a_run_that_was_not_made_smaller_has_what_there_is():
    found = {
        "test": {"test_error": 0.1, "test_images": 100},
        "summary": {"weights": 1000, "kept": 0},
        "small": {"failed": "why", "bytes": {"dense": 4000, "sparse": 100}},
    }
    assert _sparsify.rows(found) == [
        ("test error (100 images)", "10.00 ± 3.00 %", "", ""),
        ("weights that are not zero", "1,000", "0", ""),
        ("file with sparse rows", "4.0 kB", "0.1 kB", "40.0"),
    ]


# --- options and errors ----------------------------------------------------------------------------------


def test_the_flags_are_made_from_the_options_and_help_lists_them(call: Call):
    names = [p for p in inspect.signature(_sparsify.sparsify).parameters if p not in ("context",)]
    assert names[:2] == ["out", "resume"] and names[2:] == [field.name for field in fields(SparseConfig)]
    assert "sparsify" in [command.name for command in _commands.app.registered_commands]
    code, out, _ = call("sparsify", "--help")
    assert code == 0 and all("--" + name.replace("_", "-") in out for name in names)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "1.5"], "--target is the share of the weights to be zero"),
        (["--target", "most"], "--target"),
        (["--strategy", "magnitude"], "--strategy magnitude needs --target"),
        (["--strategy", "logsum:eps=-1"], "--strategy logsum:eps=-1: eps must be a finite number above 0"),
        (["--strategy", "logsun"], 'did you mean "logsum"?'),
        (["--method", "proxy"], "--method must be"),
        (["--groups", "2:2"], "N below M"),
        (["--groups", "heads"], "no weights in groups of heads"),
        (["--groups", "2:4", "--target", "0.9"], "leave out --target"),
        (["--include", "linear9*"], "--include linear9*: no weight matches"),
        (["--exclude", "linear1.bias"], "--exclude linear1.bias: linear1.bias is a bias"),
        (["--model", "lenet30"], "did you mean lenet300"),
        (["--model", "timm:vit_tiny_patch16_224"], "cannot take images of 1 x 8 x 8"),
        (["--learning-rate", "0"], "--learning-rate must be above 0"),
        (["--optimiser", "lion"], '--optimiser must be "adam" or "sgd"'),
        (["--data", "mnist", "--data-dir", "nowhere"], "nowhere"),
        (["--resume", "nowhere"], "no run to resume"),
        (["--resume", "nowhere", "--epochs", "3"], "leave out --epochs"),
        (["--out", "."], "exists and is not empty"),
        (["--bogus"], "--bogus"),
    ],
)
def test_bad_usage_is_one_paragraph_and_exit_code_2(
    call: Call, tmp_path: Path, arguments: list[str], words: str
):
    (tmp_path / "something").write_text("")
    assert words in refused(call, "sparsify", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["something"]


def test_each_command_points_to_the_other_for_its_runs(call: Call):
    quick = ["--train-size", 60, "--epochs", 1, "--batch-size", 20, "--threads", 1]
    call("train", *quick, "--model", "resnet8", "--no-twin", "--out", "trained")
    call("sparsify", *quick, "--target", 0.5, "--out", "sparse")
    assert "fallow sparsify --resume sparse" in refused(call, "train", "--resume", "sparse")
    assert "fallow train --resume trained" in refused(call, "sparsify", "--resume", "trained")
    for begin, name in (("trained", "digits-resnet8-sparse-1"), ("sparse", "digits-lenet300-sparse-1")):
        code, out, _ = call("sparsify", *quick, "--target", 0.5, "--model", begin)
        assert code == 0 and name in out


@pytest.mark.parametrize("rate", ["100", "1e30"])
def test_a_run_that_diverges_is_one_paragraph_and_exit_code_1(call: Call, rate: str):
    code, _, err = call("sparsify", *QUICK, "--target", 0.9, "--learning-rate", rate, "--out", "run")
    assert code == 1 and err.count("\n") == 1
    assert "the loss became" in err and "there is no checkpoint yet in run" in err
    assert err.endswith("Start anew with a lower --learning-rate\n")
    assert results("run")["status"] == "failed"
    assert call("report", "run")[0] == 0 and "This run failed" in Path("run/report.html").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_a_checkpoint(call: Call, number: signal.Signals):
    """On 30,000 steps at most: the signal comes after the first checkpoint, long before the end."""
    options = ["--train-size", 200, "--batch-size", 2, "--epochs", 300, "--threads", 1, "--target", 0.9]
    command = [sys.executable, "-m", "fallow", "sparsify", *map(str, options), "--out", "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    )
    while not Path("run/state.pt").exists() and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(number)
    _, error = child.communicate(timeout=120)
    assert child.returncode == 128 + number
    assert error.count("\n") == 1 and "Continue with fallow sparsify --resume run" in error
    assert results("run")["status"] == "interrupted"
    assert torch.load("run/state.pt", weights_only=True)["step"] > 0
    call("report", "run")
    assert "fallow sparsify --resume continues it" in Path("run/report.html").read_text()


# --- the issue's own call --------------------------------------------------------------------------------

# What a user does with the smaller model, where fallow cannot be found.
ELSEWHERE = """
import sys
class Gone:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "fallow":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Gone())
import torch
x, y = torch.load("test.pt", weights_only=True)
print(int((torch.export.load("r/small/model.pt2").module()(x).argmax(1) != y).sum()))
"""


@pytest.mark.skipif(not MNIST.is_dir(), reason="MNIST is not beside the repository, in ../shared/data")
def test_mnist_to_98_percent_and_the_smaller_model_loads_without_fallow(call: Call, tmp_path: Path):
    """One epoch on a tenth of the images; the call is that of the issue else."""
    quick = ["--train-size", 6000, "--epochs", 3, "--threads", 1]
    where = ["--data", "mnist", "--data-dir", MNIST.parent, "--model", "lenet300"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        code, out, err = call(
            "sparsify", *where, "--strategy", "logsum", "--target", 0.98, *quick, "--out", "r"
        )
    assert (code, err) == (0, "")
    found = results("r")
    assert found["summary"]["sparsity"] == pytest.approx(0.98, abs=0.005)
    assert found["test"]["test_error"] < 0.15 and found["test"]["test_images"] == 10_000
    assert found["small"]["flops"]["small"] < found["small"]["flops"]["dense"]
    config = SparseConfig.of(found["config"])
    dataset = data.load("mnist", config.data_dir, train_size=config.train_size, seed=config.seed)
    parts = Batches(dataset, config).evaluated("test")
    torch.save(tuple(torch.cat([part[i] for part in parts]) for i in (0, 1)), tmp_path / "test.pt")
    done = subprocess.run(
        [sys.executable, "-I", "-c", ELSEWHERE], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) / 10_000 == found["test"]["test_error"]

"""The sparsification recipe: what it leaves, that it resumes bit for bit, what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import same
from torch import Tensor, nn

from fallow import data, models
from fallow.errors import FallowError, RunError, UsageError
from fallow.penalties import LogSum, LpNorm
from fallow.recipes import _sparse_results
from fallow.recipes import sparsify as module
from fallow.recipes._batches import Batches
from fallow.recipes._run import RESULTS, STATE, WEIGHTS
from fallow.recipes._sparse_config import SparseConfig, strategy_of
from fallow.recipes._sparse_job import prepare
from fallow.recipes.sparsify import error_of, resume, sparsify
from fallow.recipes.train import resume as resume_train
from fallow.sparsity import Sparsifier

SPARSE = {
    "model": "tiny",
    "train_size": 100,
    "batch_size": 20,
    "epochs": 2,
    "threads": 1,
    "target": 0.8,
    "strength": 1e-4,
}
Sparse = Callable[..., Path]


class Stop(BaseException):
    """Stands for SIGKILL: nothing in the program handles it."""


def tiny(*, classes: int, channels: int, image: Any) -> nn.Module:
    """With dropout, whose draws a resumed run must repeat, and a norm whose statistics it must keep."""
    del channels, image
    hidden = [nn.Linear(64, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Dropout(0.3)]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, classes))


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.FEEDFORWARD, "tiny", tiny)
    narrow = nn.Sequential(nn.Flatten(), nn.Linear(9, 10))
    monkeypatch.setitem(models.FEEDFORWARD, "narrow", lambda **_: narrow)


@pytest.fixture
def sparse(tmp_path: Path) -> Sparse:
    """Sparsifies a small network with other options and returns the run's folder."""
    count = 0

    def run(**options: Any) -> Path:
        nonlocal count
        count += 1
        return sparsify(SparseConfig.of(SPARSE | options), tmp_path / f"sparse{count}")

    return run


def found(run: Path) -> dict[str, Any]:
    return json.loads((run / RESULTS).read_text())


def batches_of(run: Path) -> Batches:
    config = SparseConfig.of(found(run)["config"])
    return Batches(data.load(config.data, train_size=config.train_size, seed=config.seed), config)


def killed(options: dict[str, Any], out: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: int) -> Path:
    """A run that was killed when it wanted to write its nth checkpoint."""
    original, count = module.checkpoint, 0

    def stop(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == checkpoint:
            raise Stop
        original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(module, "checkpoint", stop)
        sparsify(SparseConfig.of(SPARSE | options), out)
    return out


class Loud:
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.said = ""

    def say(self, text: str) -> None:
        self.said += text

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: None


# --- what it leaves --------------------------------------------------------------------------------------


def test_the_target_is_met_and_the_results_add_up(sparse: Sparse):
    run = sparse()
    results, weights = found(run), load_file(run / WEIGHTS)
    kept = {layer["name"]: layer["kept"] for layer in results["layers"]}
    assert kept == {name: int((weights[name] != 0).sum()) for name in kept}
    summary, histogram = results["summary"], results["histogram"]
    assert summary["weights"] == 64 * 30 + 30 * 20 + 20 * 10
    assert summary["sparsity"] == pytest.approx(0.8, abs=0.005)
    assert sum(histogram["counts"]) == summary["kept"] == sum(kept.values())
    assert histogram["zeros"] == summary["weights"] - summary["kept"]
    assert [record["epoch"] for record in results["epochs"]] == [1, 2]
    assert results["epochs"][-1]["sparsity"] == pytest.approx(summary["sparsity"])


def test_the_curves_are_those_of_the_penalty_at_the_strength_in_force(sparse: Sparse):
    run = sparse(strategy="logsum:eps=0.5", control="strength")
    results = found(run)
    curves = results["curves"]
    w = torch.tensor(curves["magnitude"], dtype=torch.float64)
    penalty = LogSum(eps=0.5)
    assert len(w) == 60 and bool((w.diff() > 0).all()) and curves["cut"] is None
    assert curves["strength"] != 1e-4  # the controller has moved it
    assert curves["penalty"] == pytest.approx(penalty.value(w).tolist())
    assert curves["survival_rate"] == pytest.approx(penalty.survival_rate(w, curves["strength"]).tolist())
    largest = max(float(v.abs().max()) for n, v in load_file(run / WEIGHTS).items() if v.dim() > 1)
    assert float(w[-1]) == pytest.approx(largest)
    assert found(sparse(strategy="magnitude"))["curves"] is None
    free = found(sparse(target=None, strength=0.0))
    assert set(free["curves"]["survival_rate"]) == {1.0} and free["curves"]["cut"] == 0.05


@pytest.mark.parametrize("values", [[0.0, 0.0], [0.0, 0.25], [1e-30, 1.0, 10.0]])
def test_a_histogram_has_a_place_for_every_weight(values: list[float]):
    histogram = _sparse_results.histogram([nn.Parameter(torch.tensor(values))])
    assert histogram["zeros"] == values.count(0.0)
    assert sum(histogram["counts"]) == len(values) - values.count(0.0)


# What a user does with the smaller model, where fallow is not installed.
ELSEWHERE = """
import json, sys
class Gone:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "fallow":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Gone())
import torch
small = torch.export.load(sys.argv[1]).module()
x, y = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    wrong = int((small(x).argmax(1) != y).sum())
assert "fallow" not in sys.modules
print(json.dumps([wrong, len(y)]))
"""


def error_elsewhere(run: Path, batches: Batches) -> float:
    """The test error of the exported model in a fresh interpreter without fallow."""
    parts = batches.evaluated("test")
    x, y = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    torch.save((x, y), run / "test.pt")
    call = [sys.executable, "-c", ELSEWHERE, str(run / "small" / "model.pt2"), str(run / "test.pt")]
    done = subprocess.run(call, capture_output=True, text=True, timeout=300, cwd=run, env={})
    assert done.returncode == 0, done.stderr
    wrong, images = json.loads(done.stdout)
    return wrong / images


def test_the_smaller_model_needs_no_fallow_and_makes_the_same_errors(sparse: Sparse):
    run = sparse(groups="outputs", target=0.5)
    results = found(run)
    assert results["small"]["parameters"]["small"] < 0.7 * results["small"]["parameters"]["dense"]
    assert results["small"]["largest_difference"] < 1e-5 * results["small"]["largest_output"]
    assert error_elsewhere(run, batches_of(run)) == results["test"]["test_error"]
    plain = tiny(classes=10, channels=1, image=8)
    plain.load_state_dict(load_file(run / WEIGHTS))
    assert module.error_of(plain, batches_of(run), "test") == results["test"]["test_error"]


def test_the_sparse_file_holds_the_same_weights_in_rows(sparse: Sparse, recwarn: pytest.WarningsRecorder):
    run = sparse()
    assert not recwarn.list
    content, weights = torch.load(run / "sparse.pt", weights_only=True), load_file(run / WEIGHTS)
    dense = {n: v.to_dense() if v.layout == torch.sparse_csr else v for n, v in content["state"].items()}
    assert same({n: v.view(content["shapes"].get(n, v.shape)) for n, v in dense.items()}, weights)
    assert {n for n, v in content["state"].items() if v.layout == torch.sparse_csr} == set(content["shapes"])


def test_a_target_that_the_multiple_does_not_allow_is_noted(sparse: Sparse):
    results = found(sparse(groups="outputs", target=0.9, multiple=500, epochs=1))
    short = results["shortfall"]
    assert short["asked"] == 0.9 and short["reached"] == results["summary"]["sparsity"] == 0
    assert "500 outputs of each layer stay" in short["reason"]
    assert [*results["stayed"]] == results["rescued"] != []
    assert all("and stayed whole" in words for words in results["stayed"].values())
    assert found(sparse(target=0.5, epochs=1))["shortfall"] is None


def test_widths_are_multiples_of_what_was_asked(sparse: Sparse):
    shapes = found(sparse(groups="outputs", target=0.5, multiple=5))["small"]["shapes"]
    assert [shape[0] % 5 for shape in shapes.values()] == [0, 0, 0]


@pytest.mark.parametrize("groups", ["outputs", "inputs", "2:4", "heads"])
def test_whole_groups_go(sparse: Sparse, groups: str):
    model = "vit_small" if groups == "heads" else "tiny"
    options: dict[str, Any] = {"target": None if groups == "2:4" else 0.5}
    options |= {"include": ["1.weight"]} if groups == "2:4" else {}
    run = sparse(groups=groups, model=model, epochs=1, train_size=40, **options)
    weights = load_file(run / WEIGHTS)
    for layer in found(run)["layers"]:
        w: Tensor = weights[layer["name"]]
        if groups == "2:4":
            assert bool(((w.unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all())
            continue
        parts = {"outputs": w, "inputs": w.T}.get(groups)
        if parts is None:
            parts = w.unflatten(1, (layer["groups"], -1)).movedim(1, 0).flatten(1)
        alive = (parts != 0).float().mean(1)
        assert int((alive > 0).sum()) == layer["kept_groups"] and bool(((alive == 0) | (alive > 0.9)).all())
    assert found(run)["summary"]["sparsity"] == pytest.approx(0.5, abs=0.1)


def test_no_class_is_taken_with_its_output_unless_it_is_asked_for(sparse: Sparse):
    run = sparse(groups="outputs", target=0.6)
    assert found(run)["spared"] == ["7.weight"]
    assert [layer["name"] for layer in found(run)["layers"]] == ["1.weight", "5.weight"]
    asked = sparse(groups="outputs", target=0.6, include=["1.weight", "7.weight"])
    assert [layer["name"] for layer in found(asked)["layers"]] == ["1.weight", "7.weight"]
    assert found(sparse(groups="inputs"))["spared"] == found(asked)["spared"] == []


def test_a_layer_that_the_target_would_empty_is_named(sparse: Sparse):
    run = sparse(target=0.999)
    rescued = found(run)["rescued"]
    assert rescued and set(rescued) <= {layer["name"] for layer in found(run)["layers"]}
    assert all(layer["kept"] >= 1 for layer in found(run)["layers"])


def test_a_model_that_cannot_be_made_smaller_keeps_its_zeros(sparse: Sparse, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise UsageError("no sum over channels was found")

    monkeypatch.setattr(Sparsifier, "shrink", refuse)
    run = sparse()
    results = found(run)
    assert results["status"] == "done"
    assert results["small"]["failed"] == "no sum over channels was found"
    assert set(results["small"]["bytes"]) == {"dense", "sparse"} and not (run / "small").exists()
    assert int((load_file(run / WEIGHTS)["1.weight"] == 0).sum()) > 1000
    assert (run / "sparse.pt").exists()


# --- from another run ------------------------------------------------------------------------------------


def test_it_begins_with_the_weights_of_a_training_run(small: Callable[..., Path], sparse: Sparse):
    trained = small(twin=False, epochs=1)
    job, begin = prepare(SparseConfig.of(SPARSE | {"model": str(trained)}).settled(), "test")
    assert begin.model == "resnet8"
    assert same(dict(job.model.state_dict()), load_file(trained / WEIGHTS))
    run = sparse(model=str(trained), epochs=1)
    assert found(run)["summary"]["sparsity"] == pytest.approx(0.8, abs=0.005)


def test_it_begins_with_the_weights_of_a_sparse_run_and_so_on(sparse: Sparse):
    first = sparse(target=0.5)
    second = sparse(model=str(first), target=0.7, epochs=1)
    job, begin = prepare(SparseConfig.of(SPARSE | {"model": str(second)}).settled(), "test")
    assert begin.model == "tiny"
    assert same(dict(job.model.state_dict()), load_file(second / WEIGHTS))


def test_a_run_without_weights_is_refused(sparse: Sparse):
    run = sparse()
    (run / WEIGHTS).unlink()
    with pytest.raises(
        UsageError, match=rf"no {WEIGHTS} yet: bring it to its end with fallow sparsify --res"
    ):
        sparse(model=str(run))


# --- resuming --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"checkpoint_every": 3, "method": "adaprox", "groups": "outputs", "optimiser": "sgd"},
        {"checkpoint_every": 2, "method": "eta", "control": "strength"},
        {"checkpoint_every": 4, "method": "tikhonov", "target": None, "augment": True},
        {"checkpoint_every": 4, "method": "prox", "groups": "2:4", "target": None, "include": ("1.weight",)},
        {"strategy": "magnitude", "weight_decay": 0.01},
        {"checkpoint_every": 4, "method": "calibrated", "target": None, "strength": None},
        {"checkpoint_every": 4, "method": "gaussian", "strength": 0.01},
        {"checkpoint_every": 4, "method": "variational", "control": "strength", "strength": None},
        {"checkpoint_every": 4, "method": "hardconcrete", "groups": "outputs", "target": None},
        {"checkpoint_every": 4, "method": "targeted"},
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(
    sparse: Sparse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
):
    whole, cut = sparse(**options), killed(options, tmp_path / "killed", monkeypatch, 2)
    assert 0 < torch.load(cut / STATE, weights_only=True)["step"] < 10
    resume(cut)
    assert (whole / WEIGHTS).read_bytes() == (cut / WEIGHTS).read_bytes()
    first, other = found(whole), found(cut)
    for key in (
        "config",
        "epochs",
        "layers",
        "summary",
        "histogram",
        "curves",
        "rescued",
        "shortfall",
        "test",
    ):
        assert first[key] == other[key]


@pytest.mark.parametrize("method", ["dropout", "variational", "hardconcrete", "targeted"])
def test_a_run_with_noise_leaves_plain_weights_that_compute_what_was_measured(sparse: Sparse, method: str):
    run = sparse(method=method, strength=None)
    model = tiny(classes=10, channels=1, image=8)
    model.load_state_dict(torch.load(run / WEIGHTS, weights_only=True))
    assert error_of(model, batches_of(run), "test") == found(run)["test"]["test_error"]
    zeros = sum(int((model.get_parameter(name) == 0).sum()) for name in ("1.weight", "5.weight"))
    assert zeros >= round(0.8 * (64 * 30 + 30 * 20))


def test_a_run_killed_before_its_first_checkpoint_starts_over(sparse, tmp_path, monkeypatch):
    whole, cut, show = sparse(), killed({}, tmp_path / "killed", monkeypatch, 1), Loud()
    assert not (cut / STATE).exists()
    resume(cut, show=show)
    assert "no checkpoint yet" in show.said
    assert (whole / WEIGHTS).read_bytes() == (cut / WEIGHTS).read_bytes()


def test_a_run_killed_while_it_is_measured_is_measured_again(sparse, tmp_path, monkeypatch):
    whole = sparse()
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(_sparse_results, "latencies", lambda *_: (_ for _ in ()).throw(Stop))
        sparsify(SparseConfig.of(SPARSE), tmp_path / "killed")
    assert found(tmp_path / "killed")["status"] == "running"
    resume(tmp_path / "killed")
    assert found(tmp_path / "killed")["test"] == found(whole)["test"]
    assert (whole / WEIGHTS).read_bytes() == (tmp_path / "killed" / WEIGHTS).read_bytes()


def test_a_finished_run_is_left_as_it_is(sparse: Sparse):
    run, show = sparse(), Loud()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    resume(run, show=show)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert "done already" in show.said


def test_a_run_resumes_only_on_the_images_it_began_with(tmp_path, monkeypatch):
    cut = killed({}, tmp_path / "killed", monkeypatch, 2)
    state = torch.load(cut / STATE, weights_only=True)
    torch.save(state | {"fingerprint": "other"}, cut / STATE)
    with pytest.raises(UsageError, match="fingerprint differs"):
        resume(cut)


def test_each_command_names_the_one_that_continues_the_others_run(small, sparse):
    trained, run = small(twin=False, epochs=1), sparse()
    with pytest.raises(UsageError, match=f"continue it with fallow train --resume {trained}"):
        resume(trained)
    with pytest.raises(UsageError, match=f"continue it with fallow sparsify --resume {run}"):
        resume_train(run)


# --- what goes wrong -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gradient", "adaprox", "tikhonov"])
def test_a_run_that_diverges_says_what_to_do(sparse: Sparse, tmp_path: Path, method: str):
    with pytest.raises(RunError, match=r"became .*there is no checkpoint yet in .*a lower --learning-rate$"):
        sparse(learning_rate=1e38, method=method, optimiser="sgd")
    results = found(tmp_path / "sparse1")
    assert results["status"] == "failed" and "--learning-rate" in results["message"]


def test_a_checkpoint_never_holds_what_is_not_finite(sparse: Sparse, monkeypatch: pytest.MonkeyPatch):
    original = module._step

    def poison(job: Any, rate: float) -> float:
        loss = original(job, rate)
        if job.step == 7:
            job.model[5].bias.data[0] = float("nan")
        return loss

    monkeypatch.setattr(module, "_step", poison)
    with pytest.raises(RunError, match=r"the weight 5.bias became .* at step 7: the last good checkpoint is"):
        sparse(checkpoint_every=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": 1.0}, r"--target is the share .* between 0 and 1, got 1.0"),
        ({"target": None, "strategy": "magnitude"}, "--strategy magnitude needs --target"),
        ({"target": None, "control": "strength"}, "--control strength follows a target"),
        ({"strategy": "magnitude", "control": "strength"}, "no strength to control"),
        ({"groups": "2:4"}, "--groups 2:4 says how many weights are zero, 0.5 of them: leave out --target"),
        ({"groups": "4:2"}, "keeps N of M neighbours, N below M, got 4:2"),
        ({"groups": "rows"}, '--groups must be "weights"'),
        ({"ramp_begin": 0.8}, "--ramp-begin and --ramp-end"),
        ({"multiple": 8}, "--multiple 8 needs --groups outputs or inputs"),
        ({"multiple": 0}, "--multiple must be"),
        ({"cut": 1.0}, "--cut must be a survival rate"),
        ({"method": "targeted", "target": None}, "--method targeted needs --target"),
        ({"method": "targeted", "control": "strength"}, "no strength to control"),
        ({"method": "variational", "strategy": "logsum"}, "has a penalty of its own: leave out --strategy"),
        ({"strength": -1.0}, "--strength must be a number of at least 0, got -1.0"),
        ({"learning_rate": 0.0}, "--learning-rate must be above 0"),
        ({"method": "proxy"}, '--method must be .*got "proxy"'),
        ({"strategy": "logsun"}, 'did you mean "logsum"'),
        ({"strategy": "logsum:eps"}, "NAME:KEY=VALUE.* with numbers, got 'eps'"),
        ({"strategy": "logsum:eps=-1"}, "--strategy logsum:eps=-1: eps must be a finite number above 0"),
        ({"strategy": "logsum:width=1"}, "logsum has no parameter width"),
        ({"strategy": "hardthreshold:k=5"}, "is a penalty of whole vectors: take one of single weights"),
        ({"strategy": "hardthreshold"}, "hardthreshold needs k"),
        ({"include": ("linear9",)}, "--include linear9: no weight matches 'linear9'"),
        ({"include": ("1.bias",)}, "--include 1.bias: 1.bias is a bias .*: leave the pattern out"),
        ({"exclude": ("2.weight",)}, "--exclude 2.weight: 2.weight is a parameter of a norm"),
        ({"groups": "heads"}, "no weights in groups of heads"),
        ({"model": "vit_small", "image_size": None, "weights": "no.pt"}, "no.pt"),
        ({"model": "narrow"}, r"narrow cannot take images of 1 x 8 x 8 \(.*\): take a data set of its size"),
        ({"model": "lenet30"}, "did you mean lenet300"),
        ({"epochs": 0}, "--epochs must be an integer of at least 1"),
        ({"batch_sise": 3}, "did you mean batch_size"),
    ],
)
def test_what_cannot_be_is_refused_before_there_is_a_folder(sparse, tmp_path, options, words):
    with pytest.raises(FallowError, match=words):
        sparse(**options)
    assert [*tmp_path.iterdir()] == []


def test_strategies_are_written_with_their_parameters():
    assert strategy_of("logsum:eps=0.25") == LogSum(eps=0.25)
    assert strategy_of("lp:p=1") == LpNorm(p=1)
    assert strategy_of("LogSum: eps = 1e-2") == LogSum(eps=0.01)

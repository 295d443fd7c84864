"""A run that is killed continues bit for bit; whatever it had written stays whole."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_runs import SMALL, flags, program, same, weights

from fallow.errors import RunError, UsageError
from fallow.recipes import _job, _run
from fallow.recipes._run import BROKEN, CONFIG, PREVIOUS, RESULTS, STATE, WEIGHTS, RunFolder
from fallow.recipes.train import Config, read_results, resume, train

Small = Callable[..., Path]


class Stop(BaseException):
    """Stands for SIGKILL inside a process: nothing in the program handles it."""


def stop_after(monkeypatch: pytest.MonkeyPatch, calls: int, module: object, name: str) -> None:
    """Let a function of the program end the run at one of its calls."""
    original, count = getattr(module, name), 0

    def counted(*arguments: object, **more: object) -> object:
        nonlocal count
        count += 1
        if count == calls:
            raise Stop
        return original(*arguments, **more)

    monkeypatch.setattr(module, name, counted)


class Loud:
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: None


@pytest.fixture
def killed(small: Small, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """A run that was killed when it wanted to write its nth checkpoint."""

    def run(checkpoint: int, **options: object) -> Path:
        with monkeypatch.context() as patch, pytest.raises(Stop):
            stop_after(patch, checkpoint, _job, "write_results" if checkpoint < 0 else "checkpoint")
            from fallow.recipes import train as module

            patch.setattr(module, "checkpoint", _job.checkpoint)
            train(Config.of(SMALL | options), tmp_path / "killed")
        return tmp_path / "killed"

    return run


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"checkpoint_every": 3, "mode": "row", "sampler": "exact", "schedule": "warmup:6"},
        {"preset": "adamw", "accumulate": 2, "grads": "zero", "scale": "eval", "twin": False},
        {"model": "vit_small", "autocast": True, "label_smoothing": 0.1, "mode": "row", "train_size": 40},
        {"channels_last": True, "checkpoint_every": 1, "sampler": "exact", "learning_rate_warmup": 0.5},
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(small: Small, killed: Callable[..., Path], options: dict):
    whole, cut = small(**options), killed(2, **options)
    assert 0 < torch.load(cut / STATE, weights_only=True)["step"] < 10
    resume(cut)
    for arm in read_results(whole)["arms"]:
        assert same(weights(whole, arm), weights(cut, arm))
    assert (whole / WEIGHTS).read_bytes() == (cut / WEIGHTS).read_bytes()


def untimed(run: Path) -> dict:
    """The results without times, dates and the program's command."""
    results = read_results(run)
    for arm in results["arms"].values():
        for record in [arm["summary"], *arm["epochs"]]:
            del record["cpu_s_per_step"], record["wall_s_per_step"]
    del results["provenance"]
    times = ("time_ratio", "wall_ratio", "timed_cost")  # the steps that are timed are others after a start
    results["summary"] = {k: v for k, v in results["summary"].items() if not k.endswith(times)}
    results["budget"] = {k: v for k, v in results["budget"].items() if not k.endswith("_time")}
    return results


def test_a_resumed_run_tells_the_same_story(small: Small, killed: Callable[..., Path]):
    """Curves, depths, realised rates, peak memory and test errors are those of a run that was never cut."""
    whole, cut = small(checkpoint_every=4), killed(2, checkpoint_every=4)
    resume(cut)
    assert untimed(whole) == untimed(cut)


def test_sigkill_at_any_moment_costs_nothing_but_time(tmp_path: Path, small: Small):
    """Whenever it comes: while Python starts, while sites are proved, inside a step or a checkpoint."""
    whole = small(epochs=3, checkpoint_every=2)
    moments, out = random.Random(7), tmp_path / "killed"
    arguments = ["train", *flags(epochs=3, checkpoint_every=2), "--out", out]
    kills = 0
    for _ in range(40):
        child = subprocess.Popen(program(*arguments), stdout=subprocess.DEVNULL)
        seen = _progress(out)
        patience = time.monotonic() + 60
        # Wait until it has got further than the one before, then a random moment longer.
        while child.poll() is None and _progress(out) == seen and time.monotonic() < patience:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.15))
        if child.poll() is not None:
            break
        child.send_signal(signal.SIGKILL)
        child.wait()
        kills += 1
        if (out / CONFIG).exists():
            arguments = ["train", "--resume", out]
    assert child.wait() == 0
    assert kills >= 3
    assert read_results(out)["status"] == "done"
    assert same(weights(whole), weights(out)) and same(weights(whole, "twin"), weights(out, "twin"))
    assert [p.name for p in out.iterdir() if p.name.startswith(".")] == []


def _progress(run: Path) -> object:
    """Changes whenever the run writes a checkpoint."""
    try:
        return (run / STATE).stat().st_mtime_ns
    except OSError:
        return None


def test_a_run_killed_before_its_first_checkpoint_starts_over(small: Small, killed: Callable[..., Path]):
    whole, cut, show = small(), killed(1), Loud()
    assert not (cut / STATE).exists()
    resume(cut, show=show)
    assert same(weights(whole), weights(cut))
    assert "no checkpoint yet" in " ".join(show.said)


def test_a_finished_run_is_left_as_it_is(small: Small):
    run, show = small(), Loud()
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    resume(run, show=show)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert "done already" in " ".join(show.said)


@pytest.mark.parametrize(
    "harm",
    [
        pytest.param(lambda data: data[: len(data) // 2], id="cut short"),
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data[:3000] + bytes([data[3000] ^ 1]) + data[3001:], id="one bit"),
        pytest.param(lambda data: b"\0" * len(data), id="zeros"),
    ],
)
def test_a_broken_checkpoint_gives_way_to_the_one_before(small, killed, harm):
    whole, cut, show = small(checkpoint_every=2), killed(4, checkpoint_every=2), Loud()
    (cut / STATE).write_bytes(harm((cut / STATE).read_bytes()))
    resume(cut, show=show)
    assert same(weights(whole), weights(cut))
    said = " ".join(show.said)
    assert f"{STATE} is broken" in said and PREVIOUS in said and "at step 4" in said
    assert (cut / BROKEN).exists()


def test_without_any_whole_checkpoint_a_run_says_so(killed: Callable[..., Path]):
    cut = killed(4, checkpoint_every=2)
    for name in (STATE, PREVIOUS):
        (cut / name).write_bytes(b"PK")
    with pytest.raises(RunError, match=f"{STATE} is broken.*{PREVIOUS} is broken.*start the run anew"):
        resume(cut)


def test_a_checkpoint_with_code_in_it_is_not_run(killed: Callable[..., Path], tmp_path: Path):
    cut = killed(3, checkpoint_every=2)
    torch.save({"step": 1, "evil": _Evil(tmp_path / "ran")}, cut / STATE)
    show = Loud()
    resume(cut, show=show)
    assert not (tmp_path / "ran").exists()
    assert "is broken" in " ".join(show.said)


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def full_disk(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Every write fails from the nth fsync on, after half of the bytes are in the file."""
    count, fsync = 0, os.fsync

    def refuse(handle: int) -> None:
        nonlocal count
        count += 1
        if count > after:
            os.ftruncate(handle, os.fstat(handle).st_size // 2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(_run.os, "fsync", refuse)


@pytest.mark.parametrize("after", [2, 3, 4, 5, 6, 7])
def test_a_full_disk_loses_nothing_that_was_written(small, tmp_path, monkeypatch, after):
    whole = small(checkpoint_every=3)
    with monkeypatch.context() as patch:
        full_disk(patch, after)
        with pytest.raises(RunError, match=r"could not be written \(No space left on device\).*--resume"):
            train(Config.of(SMALL | {"checkpoint_every": 3}), tmp_path / "full")
    left = sorted(path.name for path in (tmp_path / "full").iterdir())
    assert not [name for name in left if name.startswith(".")]
    json.loads((tmp_path / "full" / RESULTS).read_text())
    resume(tmp_path / "full")
    assert same(weights(whole), weights(tmp_path / "full"))


def test_a_full_disk_leaves_the_reason_in_the_results_where_they_still_fit(small, tmp_path, monkeypatch):
    original = RunFolder.write_state

    def refuse(self: RunFolder, state: dict) -> None:
        with monkeypatch.context() as patch:
            full_disk(patch, 0)
            original(self, state)

    monkeypatch.setattr(RunFolder, "write_state", refuse)
    with pytest.raises(RunError):
        train(Config.of(SMALL), tmp_path / "full")
    found = read_results(tmp_path / "full")
    assert found["status"] == "failed" and "No space left" in found["message"]


def test_a_run_resumes_only_on_the_images_it_began_with(killed: Callable[..., Path]):
    cut = killed(2)
    state = torch.load(cut / STATE, weights_only=True)
    torch.save(state | {"fingerprint": "other"}, cut / STATE)
    with pytest.raises(UsageError, match="fingerprint differs"):
        resume(cut)


def test_what_is_no_run_cannot_be_resumed(tmp_path: Path):
    with pytest.raises(UsageError, match=f"holds no {CONFIG}"):
        resume(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_a_checkpoint(tmp_path: Path, small: Small, number: signal.Signals):
    whole = small(epochs=20)
    out = tmp_path / "interrupted"
    child = subprocess.Popen(
        program("train", *flags(epochs=20), "--out", out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while _progress(out) is None and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(number)
    _, error = child.communicate(timeout=60)
    assert child.returncode == 128 + number
    assert error.count("\n") == 1 and f"--resume {out}" in error
    found = read_results(out)
    assert found["status"] == "interrupted" and str(out) in found["message"]
    step = torch.load(out / STATE, weights_only=True)["step"]
    assert len(found["arms"]["model"]["depths"]) == len(found["arms"]["twin"]["depths"]) == step
    resume(out)
    assert same(weights(whole), weights(out))
    assert "message" not in read_results(out)

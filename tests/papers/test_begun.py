"""Cells that were begun or ended elsewhere: folders, devices, failures, where numbers come from."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_papers import TRAIN, draw, fails, paper

from fallow.errors import RunError, UsageError
from fallow.papers import _cells, shelf
from fallow.papers._experiments import Cell, Paper
from fallow.papers._runner import Outcome, Watcher
from fallow.recipes import _arm, train
from fallow.recipes._arm import Arm
from fallow.recipes._stop import Interrupted
from fallow.report import write_report

DIGITS = Cell("train", {**TRAIN, "model": "resnet8"}, {"seed": 0})
IMAGES = Cell("train", {**DIGITS.options, "data": "fashion-mnist"}, {"seed": 0})


def results(home: Path) -> dict[str, Any]:
    return json.loads((home / "results.json").read_text())


def change(path: Path, **more: Any) -> None:
    """Put something else into a JSON file; None takes it out."""
    found = {**json.loads(path.read_text()), **more}
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def begun(cell: Cell, folder: Path, data_dir: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train a cell up to its first checkpoint."""
    write = train.checkpoint

    def once(*arguments: Any) -> None:
        write(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "checkpoint", once)
        _cells.run(cell, folder, None if data_dir is None else str(data_dir), "test")
    assert (folder / "state.pt").exists() and not _cells.is_done(cell, folder)


def images(folder: Path) -> Path:
    """A folder with a small Fashion-MNIST."""
    folder.mkdir(parents=True)
    draws, names = np.random.default_rng(0), ("x_train", "y_train", "x_test", "y_test")
    arrays = [draws.integers(0, 256, (count, 8, 8), dtype=np.uint8) for count in (100, 100, 20, 20)]
    arrays[1], arrays[3] = np.arange(100) % 10, np.arange(20) % 10
    np.savez(folder / "fashion-mnist.npz", **dict(zip(names, arrays, strict=True)))
    return folder


# --- other folders and devices ---------------------------------------------------------------------------


@pytest.mark.parametrize("default", [False, True], ids=["named", "by default"])
def test_a_cell_goes_on_where_its_images_are_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, default: bool
):
    monkeypatch.chdir(tmp_path)
    old = images(tmp_path / "old")
    _cells.run(IMAGES, tmp_path / "whole", str(old), "test")
    begun(IMAGES, tmp_path / "cell", old, monkeypatch)
    new = old.rename(tmp_path / "data")
    _cells.run(IMAGES, tmp_path / "cell", None if default else str(new), "test")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cell")]
    assert weights[0] == weights[1]
    kept = json.loads((tmp_path / "cell" / "config.json").read_text())
    assert kept["data_dir"] == (None if default else str(new))


def test_a_resumed_run_keeps_its_folder_of_images_unless_another_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    begun(IMAGES, tmp_path / "cell", images(tmp_path / "old"), monkeypatch)
    before = (tmp_path / "cell" / "config.json").read_bytes()
    train.resume(tmp_path / "cell")
    assert (tmp_path / "cell" / "config.json").read_bytes() == before


def test_a_cell_that_was_begun_on_another_kind_of_device_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "cell"
    begun(DIGITS, folder, None, monkeypatch)
    here, other = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu", "cuda:1")
    change(folder / "config.json", device=other)
    for _ in range(2):
        with pytest.raises(
            UsageError, match=f"begun on {other} and would go on on {here}.*with --out, or remove"
        ):
            _cells.run(DIGITS, folder, None, "test")
    with pytest.raises(
        UsageError, match=f"a checkpoint of {other}, from which it would not go on bit for bit"
    ):
        train.resume(folder, device=here)
    (folder / "state.pt").unlink()  # without a checkpoint there is no number yet
    _cells.run(DIGITS, folder, None, "test")
    assert json.loads((folder / "config.json").read_text())["device"] == here
    change(folder / "config.json", device=other)
    _cells.refuse_other(DIGITS, folder)  # what is done is not mixed with anything


def test_parts_of_another_kind_of_device_or_of_other_options_are_refused(tmp_path: Path):
    def cell(parts: int) -> Cell:
        return Cell("one", {"parts": parts, "log": str(tmp_path / "log")}, work=stops)

    with pytest.raises(Halted):
        _cells.run(cell(2), tmp_path / "one", None, "test")
    with pytest.raises(UsageError, match="was made with parts 2, and this asks for 3"):
        _cells.run(cell(3), tmp_path / "one", None, "test")
    change(tmp_path / "one/cell.json", device="abacus")
    with pytest.raises(UsageError, match="was begun on abacus and would go on on .*remove .*one, whose cell"):
        _cells.run(cell(2), tmp_path / "one", None, "test")
    (tmp_path / "one/cell.json").unlink()  # earlier versions left none
    _cells.refuse_other(cell(2), tmp_path / "one")


class Halted(Exception):
    """Stands for whatever ends a process."""


def stops(parts: int, log: str, pieces: Any) -> dict[str, Any]:
    """Keeps all parts but one, then ends."""
    draw(parts - 1, log, pieces)
    raise Halted


# --- failures ----------------------------------------------------------------------------------------------


def small(tmp_path: Path) -> Paper:
    """The small paper with a cell that trains the smallest net."""
    first, second = paper(tmp_path).items
    cells = {"tiny": [*first.cells["tiny"], DIGITS]}
    return dataclasses.replace(paper(tmp_path), items=(dataclasses.replace(first, cells=cells), second))


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (math.nan, "the loss of the model became nan at step 1.*The same command ends the same way.*remove"),
        (MemoryError(), "not enough memory at step 1: .*Take fewer --jobs or a machine with more memory"),
    ],
)
def test_a_training_that_fails_is_put_in_words_of_the_reproduction_and_stands_on_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: Any, words: str
):
    forward, steps = Arm._forward_backward, 0

    def broken(self: Arm, batch: Any) -> Any:
        nonlocal steps
        steps += self.name == "model"
        if self.name == "model" and steps == 2:
            if isinstance(loss, BaseException):
                raise loss
            return (loss, *forward(self, batch)[1:])
        return forward(self, batch)

    monkeypatch.setattr(_arm.Arm, "_forward_backward", broken)
    monkeypatch.setattr(train, "measure", lambda job: None)
    done = shelf.reproduce(small(tmp_path), jobs=1, out=tmp_path / "out")
    (failed,) = done.failed
    assert failed.name == "train" and re.search(words, failed.message)
    for flag in ("--learning-rate", "--batch-size", "--accumulate", "--resume"):
        assert flag not in failed.message
    page = write_report(done.folder).read_text()
    assert "Failed: train (" in page and failed.message.split(":")[0] in page


def test_work_that_runs_out_of_memory_says_what_to_do(tmp_path: Path):
    with pytest.raises(RunError, match="not enough memory for .*one. Take fewer --jobs"):
        _cells.run(Cell("one", {"log": ""}, work=hungry), tmp_path / "one", None, "test")


def hungry(log: str, pieces: Any) -> dict[str, Any]:
    """Wants more memory than there is."""
    raise RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"
    )


class Stop(Watcher):
    """Stops a reproduction once a cell is over."""

    def ended(self, outcome: Outcome) -> None:
        raise KeyboardInterrupt


def test_failures_stay_where_a_call_was_interrupted_or_ran_other_cells(tmp_path: Path):
    (tmp_path / "BROKEN").touch()
    chosen, home = paper(tmp_path, work=fails), tmp_path / "out"
    with pytest.raises(Interrupted):
        shelf.reproduce(chosen, jobs=1, out=home, watcher=Stop())
    assert [cell["status"] for cell in results(home)["cells"]] == ["failed", "open", "open"]
    (tmp_path / "BROKEN").unlink()
    shelf.reproduce(chosen, only=["second"], jobs=1, out=home)
    first, *others = results(home)["cells"]
    assert (first["status"], first["message"]) == ("failed", "it is broken")
    assert [cell["status"] for cell in others] == ["done", "done"]
    shelf.reproduce(chosen, jobs=1, out=home)
    assert {cell["status"] for cell in results(home)["cells"]} == {"done"}


# --- where numbers come from -----------------------------------------------------------------------------


def test_every_cell_says_where_it_comes_from_and_the_page_lists_what_differs(tmp_path: Path):
    chosen, home = small(tmp_path), tmp_path / "out"
    with pytest.raises(Interrupted):
        shelf.reproduce(chosen, only=["second"], jobs=1, out=home, watcher=Stop(), command="fallow early")
    (one,) = (cell for cell in results(home)["cells"] if cell["status"] == "done")
    change(home / "cells" / one["name"] / "cell.json", torch="1.0", hardware="an abacus", finished="1999")
    shelf.reproduce(chosen, jobs=1, out=home, command="fallow late")
    found = results(home)
    records = {cell["name"]: cell for cell in found["cells"]}
    assert (records[one["name"]]["torch"], records[one["name"]]["finished"]) == ("1.0", "1999")
    now = _cells.hardware("cuda" if torch.cuda.is_available() else "cpu")
    assert records["train"]["hardware"] == now
    provenance = found["provenance"]
    assert provenance["torch"] == f"1.0 and {torch.__version__}" and provenance["command"] == "fallow late"
    assert provenance["hardware"].startswith("an abacus and ")
    assert provenance["finished"] == max(cell["finished"] for cell in found["cells"])
    page = write_report(home, tmp_path / "page.md").read_text()
    assert f"torch 1.0 and {torch.__version__}" in page and "hardware an abacus and" in page


def test_an_interrupted_call_says_itself_what_it_ran(tmp_path: Path):
    chosen, home = paper(tmp_path), tmp_path / "out"
    shelf.reproduce(chosen, only=["first"], jobs=1, out=home, command="fallow early")
    with pytest.raises(Interrupted):
        shelf.reproduce(chosen, jobs=1, out=home, watcher=Stop(), command="fallow late")
    assert results(home)["provenance"]["command"] == "fallow late"


def test_what_earlier_versions_left_is_read_and_keeps_its_own_line(tmp_path: Path):
    chosen, home = small(tmp_path), tmp_path / "out"
    shelf.reproduce(chosen, only=["first"], jobs=1, out=home)
    before = results(home)
    for record in before["cells"]:
        for key in _cells.ORIGIN:
            record.pop(key, None)
    before["provenance"] |= {"hardware": "an abacus", "finished": "1999"}
    (home / "results.json").write_text(json.dumps(before))
    for path in home.glob("cells/*/cell.json"):
        change(path, hardware=None, finished=None, device=None)
    for _ in range(2):
        shelf.reproduce(chosen, jobs=1, out=home)
        found = results(home)
        assert [c.get("hardware") for c in found["cells"] if c["name"] in ("work0", "work1")] == [
            "an abacus"
        ] * 2
        assert found["provenance"]["hardware"].count("an abacus") == 1 and found["status"] == "done"
    (home / "results.json").unlink()  # then nobody knows of those cells
    shelf.reproduce(chosen, jobs=1, out=home)
    assert "abacus" not in results(home)["provenance"]["hardware"]

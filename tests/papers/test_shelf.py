"""The shelf's runner: finished cells stay, a kill costs one part, side by side is the same as in turn."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from small_papers import dies, draw, errs, fails, paper, process

from fallow.errors import DataError, RunError, UsageError
from fallow.papers import _cells, _progress, shelf
from fallow.papers._experiments import Cell, Known
from fallow.papers._runner import Outcome, Watcher, alone, expected_minutes
from fallow.recipes._stop import Interrupted


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def numbers(folder: Path) -> tuple[Any, Any]:
    """What must not depend on how a reproduction came about: items, and what each cell found."""
    found = results(folder)
    return found["items"], [(c["name"], c["status"], _steady(c.get("found", {}))) for c in found["cells"]]


def _steady(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key != "cpu_s_per_step"}


def lines(folder: Path) -> int:
    """Parts that were computed so far."""
    return sum(len(path.read_text().splitlines()) for path in folder.glob("log*"))


# --- finished cells ------------------------------------------------------------------------------------


def test_a_finished_reproduction_runs_nothing_again(tmp_path: Path):
    chosen = paper(tmp_path, training=True)
    home = shelf.reproduce(chosen, jobs=1, out=tmp_path / "out").folder
    before, weights = results(home), (home / "cells/train/model.safetensors").stat().st_mtime_ns
    assert before["status"] == "done" and lines(tmp_path) == 9
    shelf.reproduce(chosen, jobs=1, out=home)
    assert results(home) == before and lines(tmp_path) == 9
    assert (home / "cells/train/model.safetensors").stat().st_mtime_ns == weights


def test_the_page_is_made_anew_from_what_is_there(tmp_path: Path):
    chosen = paper(tmp_path)
    home = shelf.reproduce(chosen, jobs=1, out=tmp_path / "out").folder
    before = results(home)
    (home / "results.json").unlink()
    shelf.reproduce(chosen, jobs=1, out=home)
    assert numbers(home)[0] == before["items"] and lines(tmp_path) == 9


def test_a_shared_cell_runs_once_and_items_add_up(tmp_path: Path):
    chosen = paper(tmp_path)
    home = shelf.reproduce(chosen, only=["first"], jobs=1, out=tmp_path / "out").folder
    first, second = results(home)["items"]
    assert lines(tmp_path) == 6 and results(home)["status"] == "partial"
    assert (first["status"], second["status"]) == ("done", "partial")
    assert (second["cells_done"], second["cells"]) == (1, 2)
    shelf.reproduce(chosen, only=["second"], jobs=1, out=home)
    assert lines(tmp_path) == 9 and results(home)["status"] == "done"
    assert results(home)["items"][0] == first


def test_another_number_of_parts_is_refused_in_the_same_folder(tmp_path: Path):
    home = shelf.reproduce(paper(tmp_path), jobs=1, out=tmp_path / "out").folder
    with pytest.raises(UsageError, match=r"work0 was made with parts 3, and this asks for 4: name another"):
        shelf.reproduce(paper(tmp_path, parts=4), jobs=1, out=home)
    assert lines(tmp_path) == 9


def test_a_training_run_with_other_options_is_refused(tmp_path: Path):
    options = {"model": "resnet20", "train_size": 60, "epochs": 1, "batch_size": 20}
    _cells.run(Cell("run", options), tmp_path / "run", None, "test")
    _cells.refuse_other(Cell("run", options), tmp_path / "run")  # the same is not refused
    with pytest.raises(UsageError, match="was made with epochs 1, and this asks for 2"):
        _cells.run(Cell("run", {**options, "epochs": 2}), tmp_path / "run", None, "test")


# --- side by side, and killed ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The numbers of a reproduction that ran in one go, one cell after the other."""
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    return numbers(shelf.reproduce(paper(folder, training=True), jobs=1, out=folder / "out").folder)


def test_side_by_side_gives_the_same_numbers(tmp_path: Path, whole: tuple[Any, Any]):
    home = shelf.reproduce(paper(tmp_path, training=True), jobs=2, out=tmp_path / "out").folder
    assert numbers(home) == whole


@pytest.mark.parametrize("part", [0, 2])
def test_a_killed_reproduction_ends_with_the_same_numbers(tmp_path: Path, part: int, whole: tuple[Any, Any]):
    (tmp_path / "KILL").write_text(str(part))
    first = process(tmp_path, 1, "draw")
    assert first.wait(120) == -signal.SIGKILL
    done = lines(tmp_path)
    assert not (tmp_path / "out" / "results.json").exists()
    home = shelf.reproduce(paper(tmp_path, training=True), jobs=1, out=tmp_path / "out").folder
    assert numbers(home) == whole
    assert done == part and lines(tmp_path) == 9  # no part was computed twice


def test_a_killed_training_run_goes_on_to_the_same_numbers(tmp_path: Path, whole: tuple[Any, Any]):
    child = process(tmp_path, 1, "draw")
    state = tmp_path / "out/cells/train/state.pt"
    deadline = time.monotonic() + 120
    while not state.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    child.kill()
    child.wait(60)
    assert state.exists()
    home = shelf.reproduce(paper(tmp_path, training=True), jobs=1, out=tmp_path / "out").folder
    assert numbers(home) == whole


def _alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_the_process_that_started_them(tmp_path: Path, how: signal.Signals):
    said = tmp_path / "said"
    with said.open("wb") as file:
        child = process(tmp_path, 2, "sleeps", stderr=file, PATH=str(tmp_path))  # small images have no pgrep
    logs = [tmp_path / "log0", tmp_path / "log1"]
    deadline = time.monotonic() + 120
    while not all(log.exists() and log.read_text() for log in logs) and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = [int(log.read_text()) for log in logs]
    assert all(map(_alive, workers)) and child.pid not in workers
    child.send_signal(how)
    child.wait(60)
    while any(map(_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_alive, workers)) and "kill_process_tree" not in said.read_text()


def test_sigterm_ends_it_in_words_and_keeps_what_is_done(tmp_path: Path):
    class Stop(Watcher):
        def ended(self, outcome: Outcome) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="give the same command again") as caught:
        shelf.reproduce(paper(tmp_path), jobs=1, out=tmp_path / "out", watcher=Stop())
    assert caught.value.signal == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is before
    assert results(tmp_path / "out")["status"] == "partial" and 3 <= lines(tmp_path) < 9


def test_two_do_not_work_in_one_folder(tmp_path: Path):
    with alone(tmp_path / "out"), pytest.raises(UsageError, match="another fallow reproduce works in"):
        shelf.reproduce(paper(tmp_path), jobs=1, out=tmp_path / "out")
    assert shelf.reproduce(paper(tmp_path), jobs=1, out=tmp_path / "out").failed == ()


# --- parts -------------------------------------------------------------------------------------------------


def test_a_kept_part_leaves_the_generator_as_a_computed_one(tmp_path: Path):
    pieces = _cells.Pieces("cell", tmp_path)
    first = [pieces("a", lambda: torch.randn(2).tolist()), torch.randn(2).tolist()]
    torch.manual_seed(123)
    kept = _cells.Pieces("cell", tmp_path)
    assert [kept("a", lambda: pytest.fail("computed again")), torch.randn(2).tolist()] == first


def test_a_part_comes_back_as_json_holds_it(tmp_path: Path):
    pieces = _cells.Pieces("cell", tmp_path)
    assert pieces("a", lambda: {"x": (1, float("nan"))}) == {"x": [1, None]}


def test_work_leaves_torchs_generator_alone(tmp_path: Path):
    state = torch.get_rng_state()
    _cells.run(Cell("one", {"parts": 1, "log": str(tmp_path / "log")}, work=draw), tmp_path / "one", None, "")
    assert torch.equal(state, torch.get_rng_state())


# --- what goes wrong ---------------------------------------------------------------------------------------


def test_a_failing_cell_leaves_the_others_and_runs_again(tmp_path: Path):
    (tmp_path / "BROKEN").touch()
    chosen = paper(tmp_path, work=fails)
    done = shelf.reproduce(chosen, jobs=1, out=tmp_path / "out")
    assert [cell.name for cell in done.failed] == ["work0", "work1", "work2"]
    found = results(done.folder)
    assert found["cells"][0]["message"] == "it is broken" and found["items"][0]["status"] == "not run"
    (tmp_path / "BROKEN").unlink()
    assert shelf.reproduce(chosen, jobs=1, out=tmp_path / "out").failed == ()
    assert results(done.folder)["status"] == "done"


def test_a_cell_that_raises_anything_counts_as_failed(tmp_path: Path):
    done = shelf.reproduce(paper(tmp_path, work=errs), jobs=1, out=tmp_path / "out")
    assert [cell.message for cell in done.failed] == ["ZeroDivisionError: by nothing"] * 3


def test_a_worker_that_is_killed_is_said_in_words(tmp_path: Path):
    with pytest.raises(RunError, match="was killed, most often for want of memory.*fewer than --jobs 2"):
        shelf.reproduce(paper(tmp_path, work=dies), jobs=2, out=tmp_path / "out")
    assert results(tmp_path / "out")["status"] == "partial"


def test_a_folder_that_cannot_be_written_to_is_said_in_words(tmp_path: Path):
    (tmp_path / "out" / ".lock").mkdir(parents=True)  # what else refuses root a file there
    with pytest.raises(UsageError, match="out cannot be made or written to .*: name another with --out"):
        shelf.reproduce(paper(tmp_path), jobs=1, out=tmp_path / "out")


def test_unknown_papers_items_and_scales_list_what_there_is(tmp_path: Path):
    with pytest.raises(UsageError, match="no paper hayou21: did you mean hayou2021"):
        shelf.reproduce("hayou21", out=tmp_path)
    with pytest.raises(UsageError, match="no item firs: did you mean first. There are first, second"):
        shelf.reproduce(paper(tmp_path), only=["firs"], out=tmp_path)
    with pytest.raises(UsageError, match="no scale huge: there are tiny"):
        shelf.reproduce(paper(tmp_path), scale="huge", out=tmp_path)
    with pytest.raises(UsageError, match="lejeune2021 has tuning at --scale small alone, not at tiny"):
        shelf.reproduce("lejeune2021", only=["tuning"], out=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_scale_for_a_gpu_says_what_it_takes_and_goes_on_by_force(tmp_path: Path):
    chosen = paper(tmp_path, takes="a year")
    with pytest.raises(UsageError, match=r"is for a GPU and torch sees none here: a year.*--force"):
        shelf.reproduce(chosen, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert shelf.reproduce(chosen, out=tmp_path / "out", jobs=1, force=True).failed == ()


def test_missing_images_are_said_before_anything_runs(tmp_path: Path):
    with pytest.raises(
        DataError, match=r"(?s)CIFAR-10 was not found.*data_batch.*Missing too: fashion-mnist"
    ):
        shelf.reproduce("hayou2021", scale="small", out=tmp_path / "out", data_dir=tmp_path)
    with pytest.raises(DataError, match="--only growth, --only histogram, --only penalty"):
        shelf.reproduce("hayou2021", scale="small", out=tmp_path / "out", data_dir=tmp_path)
    with pytest.raises(DataError, match="nowhere does not exist"):
        shelf.reproduce("hayou2021", scale="small", out=tmp_path / "out", data_dir=tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def test_without_images_what_the_digits_are_enough_for_at_that_scale_is_named(tmp_path: Path):
    with pytest.raises(DataError, match="Fashion-MNIST was not found") as caught:
        shelf.reproduce("huang2016", out=tmp_path / "out", data_dir=tmp_path)
    assert str(caught.value).endswith(
        " Without them run: --only rates, --only depths, --only deep, --only ablation."
    )
    with pytest.raises(DataError, match="was not found") as caught:  # no item there does without
        shelf.reproduce("huang2016", scale="small", out=tmp_path / "out", data_dir=tmp_path)
    assert "--only" not in str(caught.value)


def test_a_folder_with_something_else_is_refused(tmp_path: Path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match="holds something else"):
        shelf.reproduce(paper(tmp_path), out=tmp_path)
    home = shelf.reproduce(paper(tmp_path), jobs=1, out=tmp_path / "out").folder
    with pytest.raises(UsageError, match="holds something else than hayou2021 at scale tiny"):
        shelf.reproduce("hayou2021", out=home)
    with pytest.raises(UsageError, match="is a file"):
        shelf.reproduce(paper(tmp_path), out=tmp_path / "thesis.tex")


@pytest.mark.parametrize(("change", "refused"), [({"paper": 3}, True), ({"provenance": 3}, False)])
def test_results_that_were_changed_are_of_something_else_or_made_anew(
    tmp_path: Path, change: dict[str, Any], refused: bool
):
    home = shelf.reproduce(paper(tmp_path), jobs=1, out=tmp_path / "out").folder
    before = results(home)
    (home / "results.json").write_text(json.dumps({**before, **change}))
    if refused:
        with pytest.raises(UsageError, match="holds something else"):
            shelf.reproduce(paper(tmp_path), jobs=1, out=home)
        return
    shelf.reproduce(paper(tmp_path), jobs=1, out=home)
    assert results(home)["items"] == before["items"] and "command" in results(home)["provenance"]


def test_a_label_that_nobody_knows_is_refused():
    with pytest.raises(UsageError, match="paper, lit, derived, memory"):
        Known("x", "certain", "y", 1.0)


# --- progress ----------------------------------------------------------------------------------------------


def test_time_left_scales_with_how_long_cells_took():
    cells = [Cell(f"c{i}", {}, minutes=1.0) for i in range(5)]
    assert expected_minutes(cells, 2) == 2.5 and expected_minutes(cells[:1], 2) == 1.0
    progress = _progress.Progress()
    progress.begin(cells, cells[1:], 2)
    assert progress.left() == 120.0 and progress.counts() == "1/5"
    progress.ended(Outcome("c1", "done", 30.0))  # half of what was expected
    assert progress.left() == 45.0 and progress.counts() == "2/5"


def test_plain_lines_say_how_each_cell_ended(tmp_path: Path):
    said: list[str] = []
    (tmp_path / "BROKEN").touch()
    shelf.reproduce(
        paper(tmp_path, work=fails), jobs=1, out=tmp_path / "out", watcher=_progress.Lines(said.append)
    )
    assert said[0].startswith("3 of 3 cells to run, 1 at a time") and len(said) == 4
    assert said[3].startswith("3/3 work2 failed in") and said[3].endswith(": it is broken")


def test_the_state_of_the_last_run_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    chosen = paper(tmp_path)
    assert [entry.state for entry in shelf.entries([chosen])] == ["not run", "not run"]
    shelf.reproduce(chosen, only=["first"], jobs=1)
    assert [entry.state for entry in shelf.entries([chosen])] == ["done", "1 of 2 cells"]
    first = shelf.entries([chosen])[0]
    assert first.command == "fallow reproduce small1999 --only first --scale tiny" and first.minutes > 0


def test_remarks_stay_with_the_results(tmp_path: Path):
    home = shelf.reproduce(
        paper(tmp_path), jobs=1, out=tmp_path / "out", remarks=["half of the images"]
    ).folder
    shelf.reproduce(paper(tmp_path), jobs=1, out=home, remarks=["half of the images", "and more"])
    assert results(home)["provenance"]["remarks"] == ["half of the images", "and more"]


def test_an_unreadable_cell_is_said_by_name(tmp_path: Path):
    home = shelf.reproduce(paper(tmp_path), jobs=1, out=tmp_path / "out").folder
    (home / "cells/work1/cell.json").write_text("{")
    with pytest.raises((DataError, RunError), match="work1/cell.json cannot be read"):
        shelf.reproduce(paper(tmp_path), jobs=1, out=home)

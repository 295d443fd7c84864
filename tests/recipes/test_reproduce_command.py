"""`fallow reproduce`: the list, a run that ends with the page's path, bad usage in one paragraph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_papers import draw, fails, paper

from fallow import cli
from fallow.recipes import shelf

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Runs the program in this process, in an empty folder: exit code, output, errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(shelf.PAPERS, "small1999", paper(tmp_path / "..", work=draw))

    def run(*arguments: object) -> tuple[int, str, str]:
        code = cli.run([str(argument) for argument in arguments])
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


def test_alone_it_lists_every_item_with_command_time_and_state(call: Call):
    code, out, err = call("reproduce")
    assert (code, err) == (0, "")
    for words in ("fallow reproduce hayou2021 --scale tiny", "small1999: A small paper", "two cores"):
        assert words in out
    items = [
        item for one in shelf.PAPERS.values() for item in one.items for cells in item.cells.values() if cells
    ]
    lines = Counter(item.name for item in items)
    for item in items:
        assert out.count(f"\n {item.name} ") == lines[item.name] and item.title in out
    assert lines["curves"] == 6 and out.count("not run") == len(items) == 3 * 7 + (3 * 4 + 1) + 3 * 6 + 2
    assert out.count("for a GPU") == 7 + 6
    assert not list(Path().iterdir())


def test_a_run_ends_with_the_path_of_the_page_and_again_runs_nothing(call: Call):
    code, out, err = call("reproduce", "small1999", "--jobs", 1, "--note", "few images")
    assert (code, err) == (0, "") and out.splitlines()[0].startswith("3 of 3 cells to run")
    assert out.splitlines()[-1].split() == ["report", "runs/small1999-tiny/report.html"]
    page = Path("runs/small1999-tiny/report.html")
    assert "few images" in page.read_text() and "fallow reproduce small1999 --jobs 1" in page.read_text()
    page.unlink()
    code, out, _ = call("reproduce", "small1999", "--jobs", 1)
    assert code == 0 and "to run" not in out and len(out.splitlines()) == 2 and page.exists()
    assert call("reproduce")[1].count(" done") == 2
    code, out, _ = call("report", "runs/small1999-tiny", "--out", "page.md")
    assert (code, out) == (0, "page.md\n")


def test_only_some_items_in_a_folder_of_ones_own(call: Call):
    code, out, _ = call("reproduce", "small1999", "--only", "first", "--out", "here", "--jobs", 1)
    assert code == 0 and "2 of 2 cells" in out and not Path("runs").exists()
    assert "2 of 3 cells are done" in Path("here/report.html").read_text()


def test_on_a_terminal_there_is_a_table(call: Call, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    code, out, _ = call("reproduce", "small1999", "--jobs", 1)
    assert code == 0 and "\x1b" in out and "3/3 cells" in out and "second" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["hayou2012"],
            "no paper hayou2012: did you mean hayou2021? There are hayou2021, lejeune2021, pal2020, "
            "small1999",
        ),
        (["small1999", "--only", "fist"], "no item fist: did you mean first? There are first, second"),
        (["small1999", "--scale", "huge"], "no scale huge: there are tiny"),
        (["small1999", "--jobs", "0"], "--jobs must be an integer of at least 1, got 0"),
        (["--only", "growth"], "--only goes with a paper"),
        (["small1999", "--parts", "3"], "No such option"),
    ],
)
def test_bad_usage_is_one_paragraph_and_exits_2(call: Call, arguments: list[str], words: str):
    code, out, err = call("reproduce", *arguments)
    assert code == 2 and out == "" and words in err and len(err.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_scale_for_a_gpu_says_what_it_would_take(call: Call):
    code, _, err = call("reproduce", "hayou2021", "--scale", "full")
    assert code == 2 and "is for a GPU" in err and "hours of one GPU" in err and "--force" in err
    assert not Path("runs").exists()


def test_failed_cells_end_it_with_1_and_the_page_of_the_rest(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    home = tmp_path / "logs"
    home.mkdir()
    (home / "BROKEN").touch()
    monkeypatch.setitem(shelf.PAPERS, "small1999", paper(home, work=fails))
    code, out, err = call("reproduce", "small1999", "--jobs", 1)
    assert code == 1 and "3 cells failed (work0: it is broken" in err and len(err.splitlines()) == 1
    assert "0 of 3 cells are done" in Path("runs/small1999-tiny/report.html").read_text()

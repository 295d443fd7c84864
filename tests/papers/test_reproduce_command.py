"""`fallow reproduce`: the list, a run that ends with the page's path, bad usage in one paragraph."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_papers import draw, fails, paper

from fallow import cli
from fallow.papers import _progress, shelf
from fallow.papers._experiments import Paper, Scale

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
    listed = [
        (one.scales[scale], item)
        for one in shelf.PAPERS.values()
        for item in one.items
        for scale, cells in item.cells.items()
        if cells
    ]
    lines = Counter(item.name for _, item in listed)
    for _, item in listed:
        assert out.count(f"\n {item.name} ") == lines[item.name] and item.title in out
    assert out.count("not run") == len(listed) > 0
    times = [("GPU; ", False), ("with a GPU ", True)]  # whose the minutes of the cells are
    for words, on_gpu in times:
        wanting = [scale for scale, _ in listed if scale.takes and scale.on_gpu == on_gpu]
        assert out.count(words) == len(wanting) > 0
    for one in shelf.PAPERS.values():
        for scale in one.scales.values():
            assert scale.about in out and (not scale.takes or f"\nFor a GPU: {scale.takes}.\n" in out)
    assert out.startswith("State: of runs/PAPER-SCALE;") and "GPU; 102 days on two cores" in out
    assert set(shelf.PAPERS) == {"huang2016", "hayou2021", "pal2020", "lejeune2021", "small1999"}
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


def test_on_a_terminal_there_is_a_table(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setitem(shelf.PAPERS, "small1999", paper(tmp_path, training=True))
    monkeypatch.setattr(_progress, "_OFTEN", 0.0)
    code, out, _ = call("reproduce", "small1999", "--jobs", 1)
    assert code == 0 and "\x1b" in out and "4/4 cells" in out and "second" in out
    assert "step 1/" in out and "loss" in out  # of the cell that trains


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["hayou2012"],
            "no paper hayou2012: did you mean hayou2021? There are huang2016, hayou2021, pal2020, "
            "lejeune2021, small1999, or all",
        ),
        (["small1999", "--only", "fist"], "no item fist: did you mean first? There are first, second"),
        (["small1999", "--scale", "huge"], "no scale huge: there are tiny"),
        (["small1999", "--jobs", "0"], "--jobs must be an integer of at least 1, got 0"),
        (["--only", "growth"], "--only goes with a paper"),
        (["small1999", "--parts", "3"], "No such option"),
        (["all", "--only", "first"], "--only goes with a paper: fallow reproduce PAPER --only"),
        (
            ["all", "--as-published"],
            "--as-published goes with a paper: fallow reproduce PAPER --as-published",
        ),
        (["--scale", "tiny"], "--scale goes with a paper"),
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
    page = Path("runs/small1999-tiny/report.html").read_text()
    assert "0 of 3 cells are done" in page and "Failed: work0, work1, work2 (it is broken)." in page
    assert call("reproduce")[1].count(" 0 of 2 cells, 2 failed") == 2


# --- all papers ------------------------------------------------------------------------------------------


def named(name: str, chosen: Paper, **changes: object) -> Paper:
    """The paper under another name."""
    return dataclasses.replace(chosen, name=name, title=f"Of {name}", **changes)


@pytest.fixture
def two(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shelf of two small papers; their cells leave lines in the logs of the folders `a1999` and `b1999`."""
    papers = {}
    for name in ("a1999", "b1999"):
        (home := tmp_path / "logs" / name).mkdir(parents=True)
        papers[name] = named(name, paper(home))
    monkeypatch.setattr(shelf, "PAPERS", papers)
    return tmp_path / "logs"


def computed(logs: Path) -> dict[str, int]:
    """Parts that were computed, by paper."""
    return {
        home.name: sum(len(log.read_text().splitlines()) for log in home.glob("log*"))
        for home in sorted(logs.iterdir())
    }


def test_all_runs_every_paper_into_a_folder_and_a_page_of_its_own(call: Call, two: Path):
    code, out, err = call("reproduce", "all", "--jobs", 1, "--note", "few images")
    assert (code, err) == (0, "") and computed(two) == {"a1999": 9, "b1999": 9}
    lines = out.splitlines()
    assert [line for line in lines if ": Of " in line] == ["a1999: Of a1999", "b1999: Of b1999"]
    assert lines.index("b1999: Of b1999") > lines.index("report  runs/a1999-tiny/report.html")
    assert lines[-1] == "all     runs/all-tiny.html"
    assert sorted(path.name for path in Path("runs").iterdir()) == [
        "a1999-tiny",
        "all-tiny.html",
        "b1999-tiny",
    ]
    for name in shelf.PAPERS:
        page = Path(f"runs/{name}-tiny/report.html").read_text()
        assert f"Of {name}" in page and "few images" in page and "fallow reproduce all --jobs 1" in page
    page = Path("runs/all-tiny.html").read_text()
    assert "Of a1999" in page and "Of b1999" in page


def test_all_again_runs_nothing_and_draws_the_pages(call: Call, two: Path):
    assert call("reproduce", "all", "--jobs", 1)[0] == 0
    pages = [Path("runs/all-tiny.html"), Path("runs/b1999-tiny/report.html")]
    before = [page.read_bytes() for page in pages]
    for page in pages:
        page.unlink()
    code, out, _ = call("reproduce", "all", "--jobs", 1)
    assert code == 0 and "to run" not in out and computed(two) == {"a1999": 9, "b1999": 9}
    assert [page.read_bytes() for page in pages] == before
    assert call("reproduce")[1].count(" done") == 4


def test_all_goes_below_a_folder_of_ones_own(call: Call, two: Path):
    code, out, _ = call("reproduce", "all", "--scale", "tiny", "--out", "here", "--jobs", 1)
    assert code == 0 and out.splitlines()[-1] == "all     here/all-tiny.html" and not Path("runs").exists()
    assert sorted(path.name for path in Path("here").iterdir()) == [
        "a1999-tiny",
        "all-tiny.html",
        "b1999-tiny",
    ]


def test_all_takes_up_what_one_paper_left(call: Call, two: Path):
    assert call("reproduce", "b1999", "--only", "first", "--jobs", 1)[0] == 0
    code, out, _ = call("reproduce", "all", "--jobs", 1)
    assert code == 0 and "1 of 3 cells to run" in out and computed(two) == {"a1999": 9, "b1999": 9}


def strange(logs: Path) -> Paper:
    """The second paper; its folder holds something else."""
    (Path("runs") / "b1999-tiny").mkdir(parents=True)
    (Path("runs") / "b1999-tiny" / "thesis.tex").touch()
    return shelf.PAPERS["b1999"]


def changed(logs: Path) -> Paper:
    """The second paper, run before with other options."""
    shelf.reproduce("b1999", only=["first"], jobs=1)
    return named("b1999", paper(logs / "b1999", parts=2))


@pytest.mark.parametrize(
    ("last", "words"),
    [
        (lambda logs: named("b1999", paper(logs), scales={"huge": Scale("x")}), "b1999 has no scale tiny"),
        (lambda logs: named("b1999", paper(logs, takes="a year")), "for a GPU and torch sees none here"),
        (lambda logs: named("b1999", paper(logs, data="cifar10")), "CIFAR-10 was not found"),
        (strange, "runs/b1999-tiny exists and holds something else"),
        (changed, "was made with parts 3, and this asks for 2"),
    ],
)
def test_what_the_last_paper_refuses_is_said_before_the_first_runs(
    call: Call, two: Path, monkeypatch: pytest.MonkeyPatch, last: Callable[[Path], Paper], words: str
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(shelf.PAPERS, "b1999", last(two))
    code, out, err = call("reproduce", "all", "--jobs", 1, "--data-dir", two)
    assert (code, out) == (2, "") and words in err
    assert computed(two)["a1999"] == 0 and not Path("runs/a1999-tiny").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data-dir", "nowhere"], "the data folder nowhere does not exist"),
        (["--jobs", 0], "--jobs must be an integer of at least 1, got 0"),
        (["--scale", "huge"], "a1999 has no scale huge: there are tiny"),
    ],
)
def test_what_all_cannot_do_is_one_line_and_leaves_nothing(
    call: Call, two: Path, arguments: list[object], words: str
):
    code, _, err = call("reproduce", "all", *arguments)
    assert code == 2 and words in err and len(err.splitlines()) == 1
    assert computed(two) == {"a1999": 0, "b1999": 0} and not Path("runs").exists()


def test_a_failing_cell_of_the_first_paper_does_not_keep_the_second_from_running(
    call: Call, two: Path, monkeypatch: pytest.MonkeyPatch
):
    (two / "a1999" / "BROKEN").touch()
    monkeypatch.setitem(shelf.PAPERS, "a1999", named("a1999", paper(two / "a1999", work=fails)))
    code, out, err = call("reproduce", "all", "--jobs", 1)
    assert code == 1 and "3 cells failed (work0: it is broken" in err and "runs/all-tiny.html" in err
    assert len(err.splitlines()) == 1 and computed(two)["b1999"] == 9
    assert (
        "report  runs/b1999-tiny/report.html" in out
        and "0 of 3 cells" in Path("runs/all-tiny.html").read_text()
    )
    (two / "a1999" / "BROKEN").unlink()
    code, out, _ = call("reproduce", "all", "--jobs", 1)
    assert code == 0 and out.count("to run") == 1 and computed(two)["b1999"] == 9

"""The page of a reproduced paper: drawn from its results alone, escaped, whatever is missing."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from fallow.errors import DataError, UsageError
from fallow.report import _charts, _markdown, _paper, read_results, write_report

NASTY = '<script>alert("x")</script> $x_1$ & | [a](b) *c*'


def example() -> dict[str, Any]:
    """Results of a paper like those that the shelf writes."""
    curve = {"name": "Uniform", "x": [0.3, 0.6, 0.9], "y": [0.5, 0.4, 0.45], "error": [0.01, 0.02, None]}
    line = {"name": "theory", "x": [0.3, 0.9], "y": [0.5, 0.4], "style": "dashed", "label": "derived"}
    panel = {"title": "Error", "x": "budget", "y": "error", "log": False, "note": "", "series": [curve, line]}
    table = {"caption": "Numbers", "columns": ["budget", "error"], "rows": [[0.3, 0.5], ["Standard", None]]}
    known = [
        {"name": "rate", "label": "derived", "source": "D8", "value": 2.0},
        {"name": "claim", "label": "paper", "source": "abstract", "value": None},
    ]
    item = {
        "name": "error",
        "title": "Error against budget",
        "shows": "what is seen",
        "status": "done",
        "cells_done": 1,
        "cells": 1,
        "panels": [panel],
        "tables": [table],
        "statements": ["It fell."],
        "known": known,
        "differences": ["ours is small"],
    }
    cell = {"name": "a-seed0", "status": "done", "seconds": 1.5, "found": {"error": 0.5}, "tags": {}}
    return {
        "schema": 1,
        "kind": "paper",
        "status": "done",
        "scale": "tiny",
        "paper": {
            "name": "small1999",
            "title": "A small paper",
            "cite": "Nobody, 1999",
            "notes": ["Every number is ours."],
            "labels": {"derived": "worked out here", "paper": "said by the paper"},
        },
        "settings": {"about": "small", "takes": ""},
        "items": [item],
        "cells": [cell],
        "provenance": {"command": "fallow reproduce small1999", "torch": "2", "remarks": ["half the images"]},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "results.json").write_text(json.dumps(example()))
    return tmp_path


def changed(**changes: Any) -> dict[str, Any]:
    return {**example(), **changes}


def test_the_page_holds_everything_that_the_results_do(folder: Path):
    page = write_report(folder).read_text()
    for words in (
        "A small paper",
        "Nobody, 1999",
        "Every number is ours.",
        "half the images",
        "Error against budget",
        "It fell.",
        "ours is small",
        "theory [derived]",
        "derived: worked out here",
        "paper: said by the paper",
        "a-seed0",
        "fallow reproduce small1999",
    ):
        assert words in page, words
    assert page.count("<svg") == 1 and '<th scope="row">Standard</th><td>–</td>' in page
    assert "0.500\u00a0±\u00a00.010" in page  # the table beside the plot
    assert "http:" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)


def test_the_same_results_give_the_same_page(folder: Path):
    assert write_report(folder).read_bytes() == write_report(folder).read_bytes()


@pytest.mark.parametrize("where", ["title", "statement", "series", "axis", "cell", "name", "note", "source"])
def test_text_is_escaped(where: str):
    results = example()
    item = results["items"][0]
    panel = item["panels"][0]
    places = {
        "title": lambda: results["paper"].update(title=NASTY),
        "statement": lambda: item.update(statements=[NASTY]),
        "series": lambda: panel["series"][0].update(name=NASTY),
        "axis": lambda: panel.update(y=NASTY, title=NASTY),
        "cell": lambda: item["tables"][0].update(rows=[[NASTY, 1.0]], caption=NASTY),
        "name": lambda: results["cells"][0].update(name=NASTY),
        "note": lambda: results["provenance"].update(remarks=[NASTY]),
        "source": lambda: item["known"][0].update(source=NASTY, label=NASTY),
    }
    places[where]()
    page = _paper.render([results])
    assert "<script" not in page and "&lt;script&gt;" in page
    text = _markdown.render([results])
    assert "<script" not in text and (where in ("series", "axis", "name") or "&lt;script&gt;" in text)
    rows = [line for line in text.splitlines() if line.startswith("|") and "alert" in line]
    assert all(len(re.findall(r"(?<!\\)\|", row)) in (3, 5) for row in rows)


@pytest.mark.parametrize(
    "changes",
    [
        {"items": None},
        {"items": [None, 3, {}]},
        {"paper": None, "provenance": None, "settings": None, "cells": None},
        {"items": [{"title": "x", "panels": [{}], "tables": [{}], "known": [{}], "statements": [1, None]}]},
        {
            "items": [
                {"panels": [{"series": [{"x": [1, 2], "y": [None, "a"]}]}], "tables": [{"columns": ["a"]}]}
            ]
        },
        {"items": [{"panels": [{"series": [{"x": "ab", "y": 3, "error": 4}]}], "differences": "none"}]},
        {"items": [{"tables": [{"columns": ["a", "b"], "rows": [[1], [1, 2, 3], None]}]}]},
        {"cells": [{"found": 3}, {}]},
    ],
)
def test_whatever_is_missing_or_odd_there_is_a_page(changes: dict[str, Any]):
    assert "<!doctype html>" in _paper.render([changed(**changes)])
    assert _markdown.render([changed(**changes)]).startswith("# ")


def test_what_is_not_done_is_said():
    cells = [
        {"name": "a", "status": "done"},
        {"name": "b", "status": "failed"},
        {"name": "c", "status": "open"},
    ]
    why = [{"name": name, "status": "failed", "message": "too hot"} for name in ("d", "e")]
    assert "Failed: b; d, e (too hot)." in _paper.render([changed(cells=cells + why, status="partial")])
    results = changed(cells=cells, status="partial")
    results["items"][0].update(status="partial", cells_done=1, cells=3)
    page = _paper.render([results])
    assert "1 of 3 cells are done" in page and "Failed: b." in page and "1 of 3 cells</span>" in page
    markdown = _markdown.render([results])
    assert "1 of 3 cells are done" in markdown and " (1 of 3 cells)\n" in markdown


def test_curves_take_their_colours_by_group_and_leave_out_what_is_no_number():
    series = [
        {"name": "theory", "group": "a", "x": [1, 2], "y": [1.0, float("nan")], "style": "dashed"},
        {"name": "ours", "group": "a", "x": [1, 2], "y": [1.0, 2.0], "style": "points"},
        {"name": "other", "x": [1], "y": [3.0]},
        {"name": "level", "x": [1], "y": [3.0], "style": "dashed"},
        {"name": "empty", "x": [], "y": []},
    ]
    found = _charts.curves({"series": series})
    assert [c.colour for c in found] == ["run-0", "run-0", "run-1", "ink"]
    assert found[0].points == ((1.0, 1.0, None),)
    assert [c.swatch.split()[0] for c in found] == ["dash", "point", "line", "dash"]


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (1.23456, 0.0123, "1.235\u00a0±\u00a00.012"),
        (123.456, 12.0, "123\u00a0±\u00a012"),
        (0.5, None, "0.5"),
        (0.5, 0.0, "0.5"),
    ],
)
def test_values_have_as_many_digits_as_their_errors_allow(value: float, error: float | None, text: str):
    assert _charts._with_error(value, error) == text


def test_a_logarithmic_axis_needs_positive_values():
    panel = copy.deepcopy(example()["items"][0]["panels"][0])
    panel.update(log=True)
    panel["series"][0].update(y=[0.001, 1.0, 10.0])
    drawn = _charts.chart(panel, "x")
    assert drawn is not None and "log scale" in drawn.svg
    panel["series"][0].update(y=[-1.0, 1.0, 10.0])
    drawn = _charts.chart(panel, "x")
    assert drawn is not None and "log scale" not in drawn.svg


def test_several_scales_and_results_files_by_name(folder: Path, tmp_path: Path):
    (tmp_path / "small.json").write_text(json.dumps(changed(scale="small")))
    page = write_report([folder, tmp_path / "small.json"], tmp_path / "both.html").read_text()
    assert page.count("<svg") == 2 and "small, done" in page and "tiny, done" in page
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    text = write_report([folder, tmp_path / "small.json"], tmp_path / "both.md").read_text()
    assert "## Scale tiny" in text and "## Scale small" in text and "<svg" not in text
    assert write_report(tmp_path / "small.json") == tmp_path / "report.html"


def test_runs_and_reproductions_do_not_mix(folder: Path, tmp_path: Path, results: dict[str, Any]):
    run = tmp_path / "run"
    run.mkdir()
    (run / "results.json").write_text(json.dumps(results))
    with pytest.raises(UsageError, match="one kind of results, got paper and train"):
        write_report([folder, run])


def test_markdown_is_of_one_paper(folder: Path, tmp_path: Path, results: dict[str, Any]):
    run, other = tmp_path / "run.json", tmp_path / "other.json"
    run.write_text(json.dumps(results))
    found = changed()
    other.write_text(json.dumps({**found, "paper": {**found["paper"], "name": "other1999"}}))
    for several in ([run], [folder, other]):
        with pytest.raises(UsageError, match="Markdown is of one reproduced paper: name .*page.html"):
            write_report(several, tmp_path / "page.md")
    assert not (tmp_path / "page.md").exists()


def test_a_results_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(DataError):
        read_results(tmp_path / "tiny.json")


def test_the_documentation_has_tables_that_markdown_reads(folder: Path):
    text = write_report(folder, folder / "page.md").read_text()
    assert "| budget | error |\n|---|---|\n| 0.3 | 0.5 |\n| Standard | – |" in text
    assert "- It fell." in text and text.endswith("\n") and "\n\n\n" not in text

import os
import stat

import pytest

from fallow.errors import DataError, RunError, UsageError
from fallow.report import _plots, read_results, write_report


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="nowhere is not a folder: name the folder of a run"):
        read_results(tmp_path / "nowhere")


def test_a_folder_without_results_and_a_file(tmp_path):
    with pytest.raises(DataError, match="holds no results.json"):
        read_results(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="file is not a folder"):
        read_results(tmp_path / "file")


BROKEN = [
    b"",
    b'{"schema": 1, "arms"',
    b"\xff\xfe\x00",
    b"[" * 100_000,
    b'{"schema": 1} more',
]


@pytest.mark.parametrize("content", BROKEN, ids=range(len(BROKEN)))
def test_results_that_are_not_json(tmp_path, content):
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(DataError, match="is not valid JSON") as caught:
        read_results(tmp_path)
    assert "\n" not in str(caught.value) and "--resume" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], "holds a list"),
        ({"kind": "train"}, "schema None"),
        ({"schema": 2, "kind": "train"}, "schema 2, this version of fallow reads schema 1"),
        ({"schema": True, "kind": "train"}, "schema True"),
        ({"schema": 1, "kind": "dance"}, "kind 'dance'"),
    ],
)
def test_results_of_an_unknown_schema(save, content, words):
    with pytest.raises(DataError, match=words):
        read_results(save(content))


def test_read_results_gives_back_what_was_written(results, save):
    assert read_results(save(results)) == results


def test_no_run_is_refused():
    with pytest.raises(UsageError, match="at least one run"):
        write_report([])


def test_out_may_be_a_folder_or_a_new_path(results, save, tmp_path, monkeypatch):
    monkeypatch.setattr(_plots, "of_run", lambda *_: [])
    folder = save(results)
    assert write_report(str(folder), tmp_path) == tmp_path / "report.html"
    deep = write_report(folder, tmp_path / "new" / "page.html")
    assert deep.read_bytes() == (tmp_path / "report.html").read_bytes()
    assert stat.S_IMODE(deep.stat().st_mode) & stat.S_IRGRP


def test_a_full_disk_leaves_the_old_page(results, save, monkeypatch):
    monkeypatch.setattr(_plots, "of_run", lambda *_: [])
    folder = save(results)
    (folder / "report.html").write_text("the old page")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left on device"):
        write_report(folder)
    assert (folder / "report.html").read_text() == "the old page"
    assert sorted(p.name for p in folder.iterdir()) == ["report.html", "results.json"]

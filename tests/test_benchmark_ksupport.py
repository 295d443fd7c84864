"""The arithmetic of benchmarks/ksupport.py: the bound, the peer, and what it writes."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import _timing, ksupport
from benchmarks._timing import Times
from fallow.penalties import ksupport_prox


def clocked(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> None:
    """Every arm takes the seconds it is said to take; it is run once."""

    def interleave(arms, pairs, **_):
        for step in arms.values():
            step()
        return {name: Times([seconds[name]] * pairs, [seconds[name]] * pairs) for name in arms}

    monkeypatch.setattr(_timing, "interleave", interleave)


@pytest.mark.parametrize(("takes", "size", "holds"), [(8.0, 50, True), (8.1, 50, False), (8.1, 40, True)])
def test_the_prox_is_bound_by_one_sort_at_one_size(monkeypatch, takes: float, size: int, holds: bool):
    clocked(monkeypatch, {"sort": 2.0, "prox": takes, "prox and backward": 12.0, "squared norm": 3.0})
    options = ksupport.parse(["--bound-size", "50", "--pairs", "3"])
    row = ksupport.against_sort(size, "fp32", options)
    assert row["holds"] is holds and row["prox"]["median"] == pytest.approx(takes / 2)
    assert (row["prox_and_backward"]["median"], row["squared_norm"]["median"]) == (6.0, 1.5)
    assert row["bound"] == (4.0 if size == 50 else None)


@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_the_peer_finds_the_same_prox(k: int):
    for w in (torch.randn(8).double(), torch.tensor([9.0, 8.0, 1.0, 1.0, 0.5, 0.0, 0.0, 0.0]).double()):
        torch.testing.assert_close(
            ksupport.search(w, 0.5, k), ksupport_prox(w, 0.5, k), rtol=1e-13, atol=1e-14
        )


def test_a_peer_that_differs_fails(monkeypatch):
    clocked(monkeypatch, {"prox": 1.0, "search": 30.0})
    options = ksupport.parse(["--pairs", "2"])
    row = ksupport.against_search(20, options)
    assert row["holds"] and row["ratio"]["median"] == 30.0
    monkeypatch.setattr(ksupport, "search", lambda w, step, k: w)
    assert not ksupport.against_search(20, options)["holds"]


def test_the_program_measures_prints_and_writes(tmp_path, capsys):
    file = tmp_path / "ksupport.json"
    words = [
        "--size",
        "40",
        "60",
        "--peer-size",
        "12",
        "--pairs",
        "2",
        "--bound-size",
        "7",
        "--json",
        str(file),
    ]
    assert ksupport.main(words) == 0
    report = json.loads(file.read_text())
    assert [(r["size"], r["dtype"]) for r in report["sort"]] == [
        (40, "fp32"),
        (40, "fp64"),
        (60, "fp32"),
        (60, "fp64"),
    ]
    assert report["kind"] == "ksupport" and [r["size"] for r in report["search"]] == [12]
    printed = capsys.readouterr().out
    assert "every bound holds" in printed and "d = 60, fp64" in printed


def test_a_bound_that_fails_is_named_and_exits_with_1(monkeypatch, capsys):
    clocked(monkeypatch, {"sort": 1.0, "prox": 5.0, "prox and backward": 1.0, "squared norm": 1.0})
    words = ["--size", "40", "--dtype", "fp64", "--bound-size", "40", "--pairs", "2", "--peer-size"]
    assert ksupport.main(words) == 1
    assert "bounds that fail: d = 40, fp64" in capsys.readouterr().out


@pytest.mark.parametrize("words", ["--pairs 0", "--size 0", "--threads 0", "--dtype int8"])
def test_bad_options_are_refused(words: str, capsys):
    with pytest.raises(SystemExit) as stop:
        ksupport.parse(words.split())
    assert stop.value.code == 2


def test_a_quick_look_takes_the_largest_size():
    options = ksupport.parse(["--quick"])
    assert options.size == [ksupport.BOUND_SIZE] and options.pairs == 5

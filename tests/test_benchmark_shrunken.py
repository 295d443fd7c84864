"""benchmarks/shrunken.py: what it trains, what it compares, its bounds, and that it can measure again."""

from __future__ import annotations

import json
import shlex

import pytest

from benchmarks import _timing, shrunken
from benchmarks._timing import Times
from fallow import cli
from fallow.errors import DataError

QUICK = "--data digits --train-size 60 --epochs 1 --seeds 1 --pairs 2 --batch-size 4".split()
QUICK += "--target 0.5 --multiple 1 8".split()


def clocked(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> None:
    """Every arm takes the seconds it is said to take."""

    def interleave(arms, pairs, **_):
        for step in arms.values():
            step()
        return {name: Times([seconds[name]] * pairs, [1.0] * pairs) for name in arms}

    monkeypatch.setattr(_timing, "interleave", interleave)


def seed(*, flops: float = 0.25, over: float = 1.0, error: float = 0.1, dense: float = 0.1) -> dict:
    row = {"flops": flops, "error": error, "over_proportional": {shrunken.FROZEN: {"low": over}}}
    return {shrunken.DENSE: {"error": dense}, "small": row}


@pytest.mark.parametrize(
    ("seeds", "fails"),
    [
        ([seed(over=1.2)], []),
        ([seed(), seed(over=1.21)], ["time"]),
        ([seed(flops=0.251), seed()], ["FLOPs"]),
        ([seed(error=0.12), seed(error=0.1)], []),  # the mean counts
        ([seed(error=0.121), seed(error=0.1)], ["error"]),
        ([seed(error=0.12, dense=0.115)], []),
    ],
)
def test_each_bound_is_of_its_own(seeds: list, fails: list[str]) -> None:
    assert shrunken.fails_of("small", seeds) == fails


def test_the_standard_error_is_that_of_a_mean() -> None:
    assert shrunken.mean_error([1.0, 2.0, 3.0]) == pytest.approx((2.0, 3**-0.5))
    assert shrunken.mean_error([1.0])[1] != shrunken.mean_error([1.0])[1]  # NaN


def test_it_trains_measures_writes_and_measures_again(tmp_path, monkeypatch, capsys) -> None:
    clocked(monkeypatch, {"dense": 4.0, "any width": 2.0, "multiples of 8": 1.0})
    runs, file = tmp_path / "runs", tmp_path / "shrunken.json"
    shrunken.main([*QUICK, "--runs", str(runs), "--json", str(file)])
    first = json.loads(file.read_text())
    dense, free, even = (first["seeds"][0][name] for name in ("dense", "any width", "multiples of 8"))
    assert dense["widths"] == [32, 32, 64, 64, 128, 128] and dense["flops"] == 1.0
    assert even["widths"] != dense["widths"] and not any(width % 8 for width in even["widths"])
    assert free["flops"] < 0.5 and even["flops"] < 0.5
    for form in shrunken.FORMS:
        assert even["time"][form]["median"] == 0.25 and free["time"][form]["median"] == 0.5
        over = even["over_proportional"][form]["median"]
        assert over == pytest.approx(0.25 / even["flops"], abs=1e-3)
    results = json.loads((runs / "dense-0" / "results.json").read_text())
    assert dense["error"] == results["test"]["test_error"] and first["test_images"] == 360
    assert "multiples of 8, seed 0" in capsys.readouterr().out
    shrunken.main([*QUICK, "--runs", str(runs), "--json", str(file), "--measure"])
    second = json.loads(file.read_text())
    assert second["seeds"] == first["seeds"] and second["commands"] == first["commands"]


def test_what_is_not_there_is_not_measured(tmp_path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        shrunken.main([*QUICK, "--runs", str(tmp_path), "--measure"])


def test_the_commands_are_those_of_the_command_line(tmp_path, monkeypatch) -> None:
    options = {**shrunken.arms_of(shrunken.parse(QUICK))["multiples of 8"], "seed": 0}
    words = shlex.split(shrunken.command_of(options))
    assert words[:2] == ["fallow", "sparsify"] and "--channels-last" in words
    assert cli.run([*words[1:], "--out", str(tmp_path / "run")]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert {name: config[name] for name in options} == options


@pytest.mark.parametrize("words", ["--seeds 0", "--pairs 0", "--groups heads"])
def test_bad_options_are_refused(words: str) -> None:
    with pytest.raises(SystemExit) as stop:
        shrunken.parse(words.split())
    assert stop.value.code == 2

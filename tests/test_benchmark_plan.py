"""The arithmetic of benchmarks/plan.py: ratios to the right arm, bounds, and what it writes."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import _timing, plan
from benchmarks._timing import Times
from fallow.models import CifarResNet


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = lambda: CifarResNet(14, widths=(4, 4, 8))  # noqa: E731
    monkeypatch.setattr(plan, "SUBJECTS", {"tiny": (tiny, 4), "other": (tiny, 2)})


def clocked(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> None:
    """Every arm takes the seconds it is said to take, in each of its rounds; it is run once."""

    def interleave(arms, pairs, **_):
        for step in arms.values():
            step()
        return {name: Times([seconds[name]] * pairs, [seconds[name]] * pairs) for name in arms}

    monkeypatch.setattr(_timing, "interleave", interleave)


@pytest.mark.parametrize(("takes", "holds"), [(2.6, True), (2.62, False)])
def test_probing_is_compared_with_one_forward_and_backward(monkeypatch, takes: float, holds: bool):
    clocked(monkeypatch, {"forward and backward": 2.0, "gate gradients": takes, "leave one out": 14.0})
    row = plan.probing("tiny", plan.parse(["--subject", "tiny", "--pairs", "3"]))
    assert (row["sites"], row["batch"], row["bound"], row["holds"]) == (6, 4, 1.3, holds)
    assert row["gate_gradients"]["median"] == pytest.approx(takes / 2)
    assert row["leave_one_out"]["median"] == pytest.approx(7.0)


@pytest.mark.parametrize(
    ("takes", "memory", "holds"), [(1.03, 1030, True), (1.04, 1000, False), (1.0, 1031, False)]
)
def test_watching_is_bound_in_time_and_memory(monkeypatch, takes: float, memory: float, holds: bool):
    clocked(monkeypatch, {"unwatched": 1.0, "watched": takes})
    peaks = iter([1000] * 8 + [memory] * 8)
    monkeypatch.setattr(_timing, "step_memory", lambda step: next(peaks))
    row = plan.running("tiny", plan.parse(["--subject", "tiny", "--batch-size", "2"]))
    assert row["batch"] == 2 and row["memory"] == pytest.approx(memory / 1000)
    assert row["time"]["median"] == pytest.approx(takes) and row["holds"] is holds


def test_both_arms_of_running_start_alike_and_make_the_same_steps(monkeypatch):
    made = []
    step = plan._step
    monkeypatch.setattr(plan, "_step", lambda model, x, y: made.append(model) or step(model, x, y))
    clocked(monkeypatch, {"unwatched": 1.0, "watched": 1.0})
    monkeypatch.setattr(_timing, "step_memory", lambda step: 1)
    plan.running("tiny", plan.parse(["--subject", "tiny"]))
    one, other = made
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in one.state_dict().items())


def test_the_program_measures_prints_and_writes(tmp_path, capsys):
    file = tmp_path / "plan.json"
    code = plan.main(["--subject", "tiny", "other", "--pairs", "2", "--json", str(file)])
    report = json.loads(file.read_text())
    rows = report["probing"] + report["running"]
    assert [row["subject"] for row in rows] == ["tiny", "other"] * 2
    assert code == (0 if all(row["holds"] for row in rows) else 1)
    printed = capsys.readouterr().out
    assert "gate gradients" in printed and ("every bound holds" in printed) == (code == 0)
    assert all(row["subject"] in printed for row in rows if not row["holds"])


@pytest.mark.parametrize("words", ["--pairs 0", "--subject resnet9", "--threads 0", "--batch-size -1"])
def test_bad_options_are_refused(words: str, capsys):
    with pytest.raises(SystemExit) as stop:
        plan.parse(words.split())
    assert stop.value.code == 2


def test_a_quick_look_takes_the_first_subject():
    options = plan.parse(["--quick"])
    assert options.subject == ["tiny"] and options.pairs == 5

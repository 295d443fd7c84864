"""What is said of the time of a training step: table 2 of the paper."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fallow.papers._panels import Found, Gathered, gathered, mean_and_error, pick, table, tasks

NEAR = 0.03  # of the ideal ratio of times
# (image set, augmented) -> minutes of training with constant and with stochastic depth, table 2.
MINUTES: Mapping[tuple[str, bool], tuple[float, float]] = {
    ("cifar10", True): (20 * 60 + 42, 15 * 60 + 7),
    ("cifar100", True): (20 * 60 + 51, 15 * 60 + 20),
    ("svhn", False): (33 * 60 + 43, 25 * 60 + 33),
}


def times(found: Found, *, paper: bool = True) -> Gathered:
    """Time of a step against constant depth's, beside the ideal and, if `paper`, the paper's ratio."""
    rows, said = [], []
    for task in tasks(found):
        mine = [(cell, result) for cell, result in pick(found, task=task) if _ratio(result)]
        if not mine:
            continue
        of = [result for _, result in mine]
        ratio, spread = _over_seeds([_ratio(result) for result in of])
        ideals = [_mean([_ideal(result, kind) for result in of]) for kind in ("flops", "time")]
        depth = _mean([result["realised_depth"] for result in of])
        expected, memory = of[0]["expected_depth"], _mean([result["memory_ratio"] for result in of])
        seconds = [1000 * _mean(of_arm) for of_arm in zip(*map(_seconds, of), strict=True)]
        tags = mine[0][0].tags
        theirs = MINUTES.get((tags["data"], tags["augmented"])) if paper else None
        rows.append([task, *seconds, ratio, spread, *ideals, memory, depth, expected, len(of)])
        if paper:
            rows[-1].append(None if theirs is None else theirs[1] / theirs[0])
        said.append(_time_words(task, of, ideals))
    columns = ["task", "constant, ms a step", "stochastic, ms", "ratio", "s.e.", "ideal by FLOPs"]
    columns += ["ideal by time", "memory ratio", "depth", "expected", "seeds"]
    columns += ["paper: ratio"] if paper else []
    note = (
        "processor time (on a GPU wall clock), steps of the two taking turns in one process. ms: medians "
        "over the steps; ratio: of the means; s.e.: over seeds or from a bootstrap over steps, the larger "
        "one. Ideal: 1 less each site's share, of FLOPs or of measured time, times how often it rested. The "
        "share of time is what a step is short of where every branch rests by fallow's own means, so what "
        "these cost is not in it. Memory: peaks of a step"
    )
    if paper:
        note += (
            ". The paper's ratio is of ResNet-110 (SVHN: 152 layers) on a GPU, wall clock with data loading"
        )
    return gathered([], [table("Time of a training step", columns, rows, note)], said)


def _on_gpu(result: Mapping[str, Any]) -> bool:
    """There processor time says little of what a step takes."""
    return result["config"]["device"].startswith("cuda")


def _ratio(result: Mapping[str, Any]) -> dict[str, float]:
    """The ratio of mean times of a step with its interval; empty where none was measured."""
    return result["mean_wall_ratio" if _on_gpu(result) else "mean_time_ratio"] or {}


def _seconds(result: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Of a step of constant and of stochastic depth."""
    if _on_gpu(result):
        ours, theirs = result["wall_s_per_step"]
        return theirs, ours
    return result["twin_cpu_s_per_step"], result["cpu_s_per_step"]


def _ideal(result: Mapping[str, Any], kind: str) -> float | None:
    """The ideal at the draws that fell in timed steps, which miss the expected ones a little."""
    ideal, expected = result["ideal"][kind], result["ideal"]["flops"]
    if ideal is None or expected == 1:
        return ideal
    return 1 - (1 - ideal) * (1 - result["timed_cost"]) / (1 - expected)


def _over_seeds(
    ratios: Sequence[Mapping[str, float]], less: Sequence[float] | None = None
) -> tuple[float, float]:
    """Mean of ratios, each `less` a number, and its error: between seeds or within them, the larger."""
    own = [one["ratio"] - by for one, by in zip(ratios, less or [0.0] * len(ratios), strict=True)]
    mean, between = mean_and_error(own)
    within = math.hypot(*((one["high"] - one["low"]) / (2 * 1.96) for one in ratios)) / len(ratios)
    return mean, max(between or 0.0, within)


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def _time_words(task: str, of: Sequence[Mapping[str, Any]], ideals: Sequence[float]) -> str:
    ratio, _ = _over_seeds([_ratio(result) for result in of])
    words = f"{task}: a step takes {ratio:.3f} of constant depth's time"
    timed = [result for result in of if result["ideal"]["time"] is not None]
    if not timed:
        return f"{words}, the ideal by FLOPs is {ideals[0]:.3f}."
    over, error = _over_seeds(
        [_ratio(result) for result in timed], [_ideal(result, "time") or 0.0 for result in timed]
    )
    near = "within" if abs(over) <= NEAR else "not within"
    sure = "" if abs(abs(over) - NEAR) >= 2 * error else ", though not by two standard errors"
    return (
        f"{words}; the ideal by FLOPs is {ideals[0]:.3f}, by time {ideals[1]:.3f}: {over:+.3f} ± "
        f"{error:.3f}, {near} {NEAR:g} of it{sure}."
    )

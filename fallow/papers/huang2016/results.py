"""What is plotted and tabled of `huang2016` where constant and stochastic depth were trained side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fallow.papers._panels import (
    Found,
    compared,
    data_words,
    gathered,
    mean_and_error,
    over_epochs,
    panel,
    pick,
    series,
    table,
    tasks,
    verdict,
)

Gathered = dict[str, list[Any]]
CONSTANT, STOCHASTIC = "constant depth", "stochastic depth"
GRADIENT = "gradient_first_convolution"  # of an epoch's record
NEAR = 0.03  # of the ideal ratio of times
# (image set, augmented) -> test errors in % of constant and of stochastic depth at p_L = 0.5, table 1.
ERRORS: Mapping[tuple[str, bool], tuple[float, float]] = {
    ("cifar10", True): (6.41, 5.25),
    ("cifar10", False): (13.63, 11.66),
    ("cifar100", True): (27.76, 24.98),
    ("cifar100", False): (44.74, 37.80),
    ("svhn", False): (1.80, 1.75),
}
# (image set, augmented) -> minutes of training with constant and with stochastic depth, table 2.
MINUTES: Mapping[tuple[str, bool], tuple[float, float]] = {
    ("cifar10", True): (20 * 60 + 42, 15 * 60 + 7),
    ("cifar100", True): (20 * 60 + 51, 15 * 60 + 20),
    ("svhn", False): (33 * 60 + 43, 25 * 60 + 33),
}


def pairs(found: Found) -> Found:
    """The cells that trained constant depth beside stochastic depth."""
    return [(cell, result) for cell, result in found if "twin_test_error" in result]


def both(found: Found) -> tuple[dict[int, float], dict[int, float]]:
    """Test errors in % of constant and of stochastic depth, by seed."""
    constant = {cell.tags["seed"]: 100 * result["twin_test_error"] for cell, result in found}
    stochastic = {cell.tags["seed"]: 100 * result["test_error"] for cell, result in found}
    return constant, stochastic


# --- table 1 ----------------------------------------------------------------------------------------------


def errors(found: Found) -> Gathered:
    """Test errors of both, their difference in pairs of a seed, and the paper's numbers."""
    rows, said = [], []
    for task in tasks(found):
        mine = pick(found, task=task)
        constant, stochastic = both(mine)
        result = compared(stochastic, constant)
        judged = verdict(result, STOCHASTIC, CONSTANT)
        numbers = [*mean_and_error(list(constant.values())), *mean_and_error(list(stochastic.values()))]
        between = [result["difference"], result["error"], result["chance"]] if result else [None] * 3
        tags = mine[0][0].tags
        paper = ERRORS.get((tags["data"], tags["augmented"]), (None, None))
        rows.append([task, *numbers, *between, len(constant), judged, *paper])
        if result:
            said.append(_difference_words(task, result, judged))
    columns = ["task", "constant", "s.e.", "stochastic", "s.e.", "difference", "s.e.", "chance", "seeds"]
    columns += ["shown", "paper: constant", "paper: stochastic"]
    note = (
        "test error in %, at the end of training; difference: stochastic minus constant depth in pairs of "
        "the same seed, which share images, order and initial weights; chance: of a difference this large "
        "where there is none (Student's t). The paper's numbers are of its own training of ResNet-110 for "
        "500 epochs (SVHN: 152 layers, 50 epochs)"
    )
    return gathered([], [table("Test error", columns, rows, note)], [*said, *data_words(found)])


def _difference_words(task: str, result: Mapping[str, Any], judged: str) -> str:
    more = "less" if result["difference"] < 0 else "more"
    words = f"{task}: {abs(result['difference']):.2f} ± {result['error']:.2f} points {more} with {STOCHASTIC}"
    tail = "too little to tell them apart" if judged == "not shown" else judged
    return f"{words} over {result['seeds']} seeds: {tail}."


# --- table 2 ----------------------------------------------------------------------------------------------


def times(found: Found) -> Gathered:
    """Time of a step against constant depth's, beside the ideal."""
    rows, said = [], []
    for task in tasks(found):
        mine = pick(found, task=task)
        of = [result for _, result in mine]
        timed = [_time(result) for result in of]
        ratios = [found["median"] for found, *_ in timed if found]
        if not ratios:
            continue
        ratio, spread = mean_and_error(ratios)
        ideals = [_mean([result["ideal"][kind] for result in of]) for kind in ("flops", "time")]
        depth = _mean([result["realised_depth"] for result in of])
        expected, memory = of[0]["expected_depth"], _mean([result["memory_ratio"] for result in of])
        seconds = [1000 * _mean(of_arm) for of_arm in list(zip(*timed, strict=True))[1:]]
        tags = mine[0][0].tags
        paper = MINUTES.get((tags["data"], tags["augmented"]))
        theirs = None if paper is None else paper[1] / paper[0]
        rows.append([task, *seconds, ratio, spread, *ideals, memory, depth, expected, len(ratios), theirs])
        said.append(_time_words(task, ratio, ideals))
    columns = ["task", "constant, ms a step", "stochastic, ms", "ratio", "s.e.", "ideal by FLOPs"]
    columns += ["ideal by time", "memory ratio", "depth", "expected", "seeds", "paper: ratio"]
    note = (
        "medians over the steps, processor time (on a GPU wall clock); steps of the two take turns in one "
        "process. Ideal: 1 less each site's share, of FLOPs or of measured time, times how often it rests. "
        "Memory: peaks of a step. The paper's ratio is of wall clock, data loading included"
    )
    return gathered([], [table("Time of a training step", columns, rows, note)], said)


def _time(result: Mapping[str, Any]) -> tuple[Mapping[str, float] | None, float | None, float | None]:
    """The ratio of steps' times, and seconds of a step of constant and of stochastic depth."""
    if result["config"]["device"].startswith("cuda"):  # processor time says little of what a GPU does
        ours, theirs = result["wall_s_per_step"]
        return result["wall_ratio"], theirs, ours
    return result["time_ratio"], result["twin_cpu_s_per_step"], result["cpu_s_per_step"]


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def _time_words(task: str, ratio: float, ideals: Sequence[float]) -> str:
    words = f"{task}: a step takes {ratio:.3f} of constant depth's time"
    if math.isnan(ideals[1]):
        return f"{words}, the ideal by FLOPs is {ideals[0]:.3f}."
    over = ratio - ideals[1]
    near = "within" if abs(over) <= NEAR else "not within"
    return f"{words}, {over:+.3f} of the ideal by time ({ideals[1]:.3f}): {near} {NEAR:g} of it."


# --- curves -----------------------------------------------------------------------------------------------

_ARMS = ((CONSTANT, "twin_epochs"), (STOCHASTIC, "epochs"))


def _curves(found: Found, key: str, factor: float = 1.0) -> list[dict[str, Any]]:
    """Means over seeds by epoch, of both."""
    return [over_epochs(name, [result[arm] for _, result in found], key, factor) for name, arm in _ARMS]


def curves(found: Found) -> Gathered:
    """Training loss and validation error over epochs."""
    panels = []
    for task in tasks(found):
        mine = pick(found, task=task)
        lines = _curves(mine, "validation_error", 100)
        epochs, tags = lines[0]["x"], mine[0][0].tags
        for name, level in zip((CONSTANT, STOCHASTIC), _levels(tags) if epochs else (), strict=False):
            ends = [epochs[0], epochs[-1]]
            lines.append(series(f"test error, {name}", ends, [level] * 2, style="dashed", label="paper"))
        panels.append(panel(f"Error, {task}", "epoch", "validation error in %", lines))
        note = "With stochastic depth it is that of the shortened nets."
        loss = _curves(mine, "train_loss")
        panels.append(
            panel(f"Training loss, {task}", "epoch", "mean loss of an epoch", loss, log=True, note=note)
        )
    return gathered(panels, [], [])


def _levels(tags: Mapping[str, Any]) -> tuple[float, ...]:
    return ERRORS.get((tags["data"], tags["augmented"]), ())


# --- gradients --------------------------------------------------------------------------------------------


def gradients(found: Found) -> Gathered:
    """Mean magnitude of the first convolution's gradient over epochs."""
    panels, rows = [], []
    for task in tasks(found):
        mine = pick(found, task=task)
        lines = _curves(mine, GRADIENT)
        panels.append(panel(task, "epoch", "mean |gradient| of the first convolution", lines, log=True))
        logs, larger, count = [], 0, 0
        for _, result in mine:
            sides = zip(result["epochs"], result["twin_epochs"], strict=True)
            of = [(ours[GRADIENT], theirs[GRADIENT]) for ours, theirs in sides]
            ratios = [ours / theirs for ours, theirs in of if ours and theirs]
            larger, count = larger + sum(ratio > 1 for ratio in ratios), count + len(ratios)
            if ratios:
                logs.append(sum(map(math.log, ratios)) / len(ratios))
        if not logs:
            continue
        mean, error = mean_and_error(logs)
        rows.append(
            [task, math.exp(mean), math.exp(mean) * error if error else None, larger, count, len(logs)]
        )
    columns = ["task", "stochastic over constant", "s.e.", "epochs in which it is larger", "of", "seeds"]
    note = "geometric mean over epochs of the ratio of gradients, then over seeds"
    return gathered(panels, [table("Gradient of the first convolution", columns, rows, note)], [])


# --- the very deep net ------------------------------------------------------------------------------------


def deep(found: Found) -> Gathered:
    """The 1202-layer net: what a step costs, and the losses."""
    made = times(found)
    rows = []
    for cell, result in found:
        for name, arm in _ARMS:
            last = result[arm][-1]
            memory = result["memory_mb"][arm != "epochs"]
            error = result["test_error" if arm == "epochs" else "twin_test_error"]
            steps = last["step"]
            rows.append([name, cell.tags["seed"], steps, result[arm][0]["train_loss"], last["train_loss"]])
            rows[-1] += [100 * error, memory]
    columns = ["1202 layers", "seed", "steps", "loss, first epoch", "loss, last epoch", "test error in %"]
    note = "after a few steps the error says nothing yet: see its number of steps"
    own = table("Training of the very deep net", [*columns, "peak memory in MB"], rows, note)
    return gathered([], [*made["tables"], own], [*made["statements"], *data_words(found)])

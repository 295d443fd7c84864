"""What is plotted and tabled of `huang2016` where constant and stochastic depth were trained side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fallow.papers._panels import (
    FEW,
    NOT_SHOWN,
    Found,
    Gathered,
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
    told,
    verdict,
)
from fallow.papers.huang2016.times import times

CONSTANT, STOCHASTIC = "constant depth", "stochastic depth"
GRADIENT = "gradient_first_convolution"  # of an epoch's record
# (image set, augmented) -> test errors in % of constant and of stochastic depth at p_L = 0.5, table 1.
ERRORS: Mapping[tuple[str, bool], tuple[float, float]] = {
    ("cifar10", True): (6.41, 5.25),
    ("cifar10", False): (13.63, 11.66),
    ("cifar100", True): (27.76, 24.98),
    ("cifar100", False): (44.74, 37.80),
    ("svhn", False): (1.80, 1.75),
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
    tail = {NOT_SHOWN: "too little to tell them apart", FEW: "too few to tell"}.get(judged, judged)
    return f"{words} over {result['seeds']} seeds: {tail}."


# --- curves -----------------------------------------------------------------------------------------------

# The paper's training, elsewhere and of SVHN.
_TRAINING = "110 layers, 500 epochs", "152 layers, 50 epochs"
_ARMS = ((CONSTANT, "twin_epochs"), (STOCHASTIC, "epochs"))


def _curves(found: Found, key: str, factor: float = 1.0) -> list[dict[str, Any]]:
    """Means over seeds by epoch, of both."""
    return [over_epochs(name, [result[arm] for _, result in found], key, factor) for name, arm in _ARMS]


def curves(found: Found) -> Gathered:
    """Training loss, validation and test error over epochs."""
    panels, tables = [], []
    for task in tasks(found):
        mine = pick(found, task=task)
        valid, tested = _curves(mine, "validation_error", 100), _curves(mine, "test_error", 100)
        loss = _curves(mine, "train_loss")
        tables.append(_milestones(task, valid, tested, loss))
        lines = [{**line, "name": f"validation, {line['name']}"} for line in valid]
        lines += [
            {**line, "name": f"test, {line['name']}", "style": "points"} for line in tested if line["x"]
        ]
        epochs, tags = valid[0]["x"], mine[0][0].tags
        for name, level in zip((CONSTANT, STOCHASTIC), _levels(tags) if epochs else (), strict=False):
            ends, theirs = [epochs[0], epochs[-1]], _TRAINING["svhn" == tags["data"]]
            lines.append(series(f"test, {name}, {theirs}", ends, [level] * 2, style="dashed", label="paper"))
        panels.append(panel(f"Error, {task}", "epoch", "error in %", lines))
        note = "With stochastic depth it is that of the shortened nets."
        panels.append(
            panel(f"Training loss, {task}", "epoch", "mean loss of an epoch", loss, log=True, note=note)
        )
    return gathered(panels, [made for made in tables if made["rows"]], [])


def _milestones(task: str, *curves: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The curves at the epochs that were tested."""
    at = [[dict(zip(line["x"], line["y"], strict=True)) for line in of] for of in curves]
    places = sorted({*at[1][0], *at[1][1]})
    rows = [[epoch, *(line.get(epoch) for of in at for line in of)] for epoch in places]
    short = "constant", "stochastic"
    columns = [f"{what}, {name}" for what in ("validation error", "test error", "loss") for name in short]
    note = "errors in %; the loss of stochastic depth is that of the shortened nets; means over seeds"
    return table(task, ["epoch", *columns], rows, note)


def _levels(tags: Mapping[str, Any]) -> tuple[float, ...]:
    return ERRORS.get((tags["data"], tags["augmented"]), ())


# --- gradients --------------------------------------------------------------------------------------------


def gradients(found: Found) -> Gathered:
    """Mean magnitude of the first convolution's gradient over epochs."""
    panels, rows, said = [], [], []
    for task in tasks(found):
        mine = pick(found, task=task)
        lines = _curves(mine, GRADIENT)
        panels.append(panel(task, "epoch", "mean |gradient| of the first convolution", lines, log=True))
        logs: dict[int, float] = {}
        larger = count = 0
        for cell, result in mine:
            sides = zip(result["epochs"], result["twin_epochs"], strict=True)
            of = [(ours[GRADIENT], theirs[GRADIENT]) for ours, theirs in sides]
            ratios = [ours / theirs for ours, theirs in of if ours and theirs]
            larger, count = larger + sum(ratio > 1 for ratio in ratios), count + len(ratios)
            if ratios:
                logs[cell.tags["seed"]] = sum(map(math.log, ratios)) / len(ratios)
        if not logs:
            continue
        mean, error = mean_and_error(list(logs.values()))
        rows.append(
            [task, math.exp(mean), math.exp(mean) * error if error else None, larger, count, len(logs)]
        )
        judged = told(compared(logs, dict.fromkeys(logs, 0.0)), "smaller, the paper's is larger", "larger")
        said.append(
            f"{task}: {math.exp(mean):.2f} times constant depth's, larger in {larger} of {count} epochs: "
            f"{judged}."
        )
    columns = ["task", "stochastic over constant", "s.e.", "epochs in which it is larger", "of", "seeds"]
    note = "geometric mean over epochs of the ratio of gradients, then over seeds"
    return gathered(panels, [table("Gradient of the first convolution", columns, rows, note)], said)


# --- the very deep net ------------------------------------------------------------------------------------


def deep(found: Found) -> Gathered:
    """The 1202-layer net: what a step costs, and the losses."""
    made = times(found, paper=False)
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

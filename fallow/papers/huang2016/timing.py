"""Time of a training step in several ways of stochastic depth, all of them in turn within one process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from fallow.recipes._arm import Arm
from fallow.recipes._config import Config
from fallow.recipes._job import Job, prepared
from fallow.recipes._measure import mean, ratio_of_means
from fallow.recipes._optimise import learning_rate

CONSTANT = "constant depth"


def timing_cell(
    data: str,
    options: Mapping[str, Any],
    ways: Mapping[str, Mapping[str, Any]],
    rounds: int,
    pieces: Callable[[str, Callable[[], Any]], Any],
    data_dir: str | None = None,
) -> dict[str, Any]:
    """Paired ratios of a step's time to constant depth's.

    Every round takes one step of each way and one of constant depth on the same batch, in an order that
    changes from round to round.

    Args:
        data: the image set that `options` name.
        options: of `fallow train`, common to all ways.
        ways: name -> options that differ.
        rounds: of steps that count; one more comes first.
        pieces: unused, the measurement is one piece.
        data_dir: where image sets are.

    Returns:
        By way: the ratio of times with its interval, the mean share of FLOPs that ran, and survival rates'
        expected share.
    """
    del pieces
    base = {**options, "data": data, "data_dir": data_dir, "threads": 1}
    with contextlib.ExitStack() as stack:
        jobs: dict[str, Job] = {}
        for place, (name, own) in enumerate(ways.items()):
            config = Config.of({**base, **own, "twin": not place}).settled()
            jobs[name] = stack.enter_context(prepared(config, "timing"))
        arms = {name: job.arms[0] for name, job in jobs.items()}
        first = next(iter(jobs.values()))
        arms[CONSTANT] = first.arms[1]
        for step in range(rounds + 1):
            _round(jobs, arms, step)
    constant = arms.pop(CONSTANT)
    clock = "wall" if first.config.device.startswith("cuda") else "cpu"
    return {
        "ways": {
            name: {
                "time": ratio_of_means(arm.log[clock], constant.log[clock]),
                "realised_cost": mean(arm.log["cost"][1:]),
                "expected_cost": jobs[name].results["budget"]["expected_cost"],
            }
            for name, arm in arms.items()
        },
        "steps": rounds,
    }


def _round(jobs: Mapping[str, Job], arms: Mapping[str, Arm], step: int) -> None:
    """One step of every arm on one batch, beginning with another arm each time."""
    first = next(iter(jobs.values()))
    batch, order = first.batches.at(step), [*arms.items()]
    rate = learning_rate(step, first.batches.per_epoch, first.config)
    turn = step % len(order)
    for name, arm in order[turn:] + order[:turn]:
        if name in jobs:
            jobs[name].handle.step(step)
        arm.step(batch, rate, step, how="time" if step else "warm")

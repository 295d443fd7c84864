"""A run in memory: its data, its arms, where it stands; from options, and to and from its folder."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fallow import data
from fallow.errors import UsageError
from fallow.integrations.loading import channels_taken
from fallow.planning import RunningSensitivities, allocate, from_sensitivities
from fallow.recipes import _results
from fallow.recipes._arm import Arm, build, droppable_time
from fallow.recipes._batches import Batches
from fallow.recipes._config import Config, Surroundings
from fallow.recipes._run import RESULTS, RunFolder
from fallow.recipes._sparse_config import SparseConfig
from fallow.surgery import Handle, apply


@dataclass
class Job:
    """A run in memory.

    Attributes:
        arms: the model, then its twin where there is one.
        handle: of the model's stochastic depth.
        step: steps done.
        total: steps in all.
        results: the parts of results.json that are not made anew at each writing.
        tests: test error and number of images by arm, once tested.
    """

    config: Config
    batches: Batches
    handle: Handle
    arms: list[Arm]
    step: int
    total: int
    results: dict[str, Any]
    tests: dict[str, dict[str, Any]]


def prepare(config: Config, command: str) -> Job:
    """Data, models and draws of a settled configuration; refuses what cannot be before any step."""
    dataset = images(config)
    batches = Batches(dataset, config)
    model = build(config, dataset)
    twin = copy.deepcopy(model) if config.twin else None
    handle = apply(
        model,
        config.rule(),
        example=batches.example(),
        mode=config.mode,
        sampler=config.sampler,
        scale=config.scale,
        grads=config.grads,
        rows=config.rows,
        granularity=config.granularity,
        schedule=config.schedule_over_steps(),
        seed=config.seed,
        include=config.include or None,
        exclude=config.exclude or None,
    )
    arms = [Arm("model", model, config, len(handle.sites))]
    if config.rates == "sensemode":
        _refuse_infeasible(handle, config)
        arms[0].running = RunningSensitivities(handle)
    if twin is not None:
        arms.append(Arm("twin", twin, config, len(handle.sites)))
    assert config.epochs is not None
    total = config.epochs * batches.per_epoch
    results = {
        "provenance": _results.provenance(config, batches, command, _results.now()),
        "budget": _results.budget(handle, config, total, None),
        "plans": [],
    }
    return Job(config, batches, handle, arms, 0, total, results, {})


def images(config: Config | SparseConfig, weights: str | Path | None = None) -> data.Dataset:
    """The data set of a run, with as many channels as its model, or a file of its weights, takes."""
    dataset = data.load(
        config.data, config.data_dir, train_size=config.train_size, seed=config.seed, size=config.image_size
    )
    return dataset.with_channels(channels_taken(config.model, dataset.channels, weights))


def _refuse_infeasible(handle: Handle, config: Config) -> None:
    """Refuse a budget below the smallest rate before the first step, not at the first new plan."""
    assert config.budget is not None
    assert config.minimum_rate is not None
    alike = dict.fromkeys(handle.costs, 1.0)
    allocate.sensemode(alike, handle.costs, budget=config.budget, minimum_rate=config.minimum_rate)


def replan(job: Job, epoch: int) -> None:
    """New survival rates from the sensitivities that the steps showed, where it is time for them."""
    config, running = job.config, job.arms[0].running
    if running is None or not config.refresh or epoch % config.refresh or job.step == job.total:
        return
    known = running.update()
    if known is None:  # a site was not seen yet: the next refresh has more
        return
    assert config.budget is not None
    assert config.minimum_rate is not None
    plan = from_sensitivities(job.handle.costs, known, budget=config.budget, minimum_rate=config.minimum_rate)
    job.handle.set_rates(plan)
    job.results["plans"].append({"epoch": epoch, "rates": dict(plan), "sensitivities": known})


def measure(job: Job) -> None:
    """Measure what share of a dense step's time can rest; leaves the run itself as it is."""
    share = droppable_time(job.arms[0].model, job.config, job.batches.dataset, job.batches)
    job.results["budget"] = _results.budget(job.handle, job.config, job.total, share)


def restore(job: Job, state: Mapping[str, Any]) -> None:
    """Bring a prepared run to where a checkpoint was written.

    Raises:
        UsageError: the images are not those the run began with.
    """
    if state["fingerprint"] != job.batches.dataset.fingerprint:
        raise UsageError(
            f"the images of {job.config.data} are not those the run began with (their fingerprint differs): "
            "restore the files, or start a new run"
        )
    for arm in job.arms:
        arm.load(state["arms"][arm.name])
    job.step = int(state["step"])
    job.results |= {key: state[key] for key in ("budget", "provenance")}
    job.results["plans"] = state.get("plans", [])  # older checkpoints have none


def checkpoint(job: Job, folder: RunFolder) -> None:
    """Write the state and the results so far.

    Raises:
        NotFinite: a weight is not finite; the checkpoint before stays.
        RunError: the disk refused.
    """
    for arm in job.arms:
        arm.refuse_not_finite(job.step - 1)
    folder.write_state(
        {
            "step": job.step,
            "arms": {arm.name: arm.state() for arm in job.arms},
            "fingerprint": job.batches.dataset.fingerprint,
            **job.results,
        }
    )
    write_results(job, folder, "running")


def write_results(job: Job, folder: RunFolder, status: str, *, ended: bool = False, **more: Any) -> None:
    """Write results.json; `ended` adds what takes a while, and `more` goes in as it is."""
    results: dict[str, Any] = {"schema": _results.SCHEMA, "kind": "train", "status": status, **more}
    results |= job.results | {"config": job.config.as_dict(), "sites": _results.sites(job.handle)}
    results["arms"] = {arm.name: arm.results() for arm in job.arms}
    for name, found in job.tests.items():
        results["arms"][name]["summary"].update(found)
    results["summary"] = _results.summary(job.arms, with_ratios=ended)
    if ended:
        results["provenance"] = {**results["provenance"], "finished": _results.now()}
    folder.write_json(RESULTS, results)


@contextlib.contextmanager
def prepared(config: Config, command: str) -> Iterator[Job]:
    """`prepare` in its `surroundings`; afterwards the handle lets go of what it watched."""
    with surroundings(config):
        job = prepare(config, command)
        try:
            yield job
        finally:
            job.handle.remove()


@contextlib.contextmanager
def surroundings(config: Surroundings) -> Iterator[None]:
    """Threads, generators and deterministic kernels of a run; all as before afterwards."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    cuda = config.device.startswith("cuda")
    try:
        if config.threads is not None and config.threads != threads:
            torch.set_num_threads(config.threads)
        if cuda:  # sums in a changing order would keep a resumed run from being bit-identical
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
        with torch.random.fork_rng(devices=[torch.device(config.device).index or 0] if cuda else []):
            yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)

"""The training recipe: a model under stochastic depth beside its constant-depth twin, in one flat loop.

Both arms start from the same weights and see the same batches. Their steps alternate, so that whatever slows
the machine down slows both. Whatever is drawn is a function of the seed and the step; a run that is killed at
any moment continues from its last checkpoint and ends with bit-identical weights.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from fallow import data
from fallow.errors import DataError, FallowError, RunError, UsageError
from fallow.recipes import _results
from fallow.recipes._arm import Arm, NotFinite, build, droppable_time
from fallow.recipes._batches import Batches
from fallow.recipes._config import Config
from fallow.recipes._optimise import learning_rate
from fallow.recipes._run import RESULTS, WEIGHTS, RunFolder, first_free
from fallow.surgery import Handle, Sites, apply, sites

TWIN_WEIGHTS = "twin.safetensors"
_MEMORY_MEASURED = 16  # steps, spread over the run


class Interrupted(RunError):
    """A run that was asked to stop, after it wrote a checkpoint.

    Attributes:
        signal: the number of the signal that asked.
    """

    signal: int = signal.SIGINT


class Show(Protocol):
    """How a run shows its progress; see `fallow.recipes.show`."""

    def say(self, text: str) -> None:
        """One sentence for the user."""

    def begin(self, step: int, total: int) -> None:
        """The loop starts at `step` of `total`."""

    def step(self, done: int, loss: float, depth: float, cost: float) -> None:
        """A step is over."""

    def epoch(self, records: dict[str, dict[str, Any]], epochs: int) -> None:
        """An epoch is over; one record an arm."""

    def end(self) -> None:
        """The loop is over, one way or another."""


class Silent:
    """Shows nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def begin(self, step: int, total: int) -> None:
        """Nothing."""

    def step(self, done: int, loss: float, depth: float, cost: float) -> None:
        """Nothing."""

    def epoch(self, records: dict[str, dict[str, Any]], epochs: int) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""


@dataclass
class Job:
    """A run in memory.

    Attributes:
        arms: the model, then its twin where there is one.
        step: steps done.
        total: steps in all.
        results: what goes into results.json.
    """

    config: Config
    batches: Batches
    handle: Handle
    arms: list[Arm]
    step: int
    total: int
    results: dict[str, Any]


def train(config: Config, out: str | os.PathLike[str] | None = None, *, show: Show | None = None,
          command: str = "fallow train") -> Path:
    """Train a model, and its twin, from the start.

    Args:
        config: the options.
        out: the run's folder, new or empty; None: runs/DATA-MODEL-N with the first free N.
        show: where progress goes; None: nowhere.
        command: what the user called, for the results.

    Returns:
        The run's folder.

    Raises:
        FallowError: before any step, for options that cannot be; RunError: the run had to stop.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was written.
    """
    show = show or Silent()
    config = config.settled()
    folder = RunFolder(out if out is not None else first_free(config.data, config.model))
    folder.refuse_used()
    with _surroundings(config):
        job = _prepare(config, command)
        folder.create(config.as_dict())
        _measure_droppable(job)
        _loop(job, folder, show)
    return folder.path


def resume(run: str | os.PathLike[str], *, show: Show | None = None) -> Path:
    """Continue a run from its last whole checkpoint, bit for bit; from the start where it has none yet.

    Args:
        run: its folder. A run that is done is left as it is.
        show: where progress goes; None: nowhere.

    Returns:
        The run's folder.

    Raises:
        UsageError: no run is there, or the data set is not the one it began with.
        RunError: as in `train`; also where no checkpoint is whole.
    """
    show = show or Silent()
    folder = RunFolder(run)
    config = Config.of(folder.config()).settled()
    if folder.status() == "done":
        show.say(f"the run in {folder.path} is done already")
        return folder.path
    folder.remove_temporaries()
    with _surroundings(config):
        state = folder.read_state(show.say)
        job = _prepare(config, "fallow train")
        if state is None:
            show.say(f"{folder.path} has no checkpoint yet: starting over")
            _measure_droppable(job)
        else:
            show.say(f"going on from step {state['step']} of {job.total}")
            _restore(job, state)
        _loop(job, folder, show)
    return folder.path


def read_results(run: str | os.PathLike[str]) -> dict[str, Any]:
    """What `results.json` in a run's folder holds."""
    try:
        return dict(json.loads((Path(run) / RESULTS).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DataError(f"{Path(run) / RESULTS} cannot be read ({error}): continue the run with --resume") from None


# --- the loop ----------------------------------------------------------------------------------------------


def _loop(job: Job, folder: RunFolder, show: Show) -> None:
    """Train from `job.step` on; every way out leaves whole files and says how the run ended."""
    config, batches = job.config, job.batches
    every = config.checkpoint_every or batches.per_epoch
    warm = job.step  # the first step after a start pays for what later ones find ready
    measured = {1 + i * max((job.total - 1) // _MEMORY_MEASURED, 1) for i in range(_MEMORY_MEASURED)}
    _write_results(job, folder, "running")
    show.begin(job.step, job.total)
    try:
        with _asked_to_stop() as asked:
            for step in range(job.step, job.total):
                batch = batches.at(step)
                rate = learning_rate(step, batches.per_epoch, config)
                how = "memory" if step in measured else "warm" if step == warm else "time"
                job.handle.step(step)
                losses = {}
                for arm in job.arms if step % 2 == 0 else reversed(job.arms):
                    losses[arm.name] = arm.step(batch, rate, step, how=how)
                job.step = step + 1
                ours = job.arms[0]
                show.step(job.step, losses["model"], ours.log["depth"][-1], ours.log["cost"][-1])
                if job.step % batches.per_epoch == 0:
                    epoch = job.step // batches.per_epoch
                    records = {a.name: a.close_epoch(epoch, job.step, rate, batches) for a in job.arms}
                    show.epoch(records, config.epochs or 0)
                if asked or job.step % every == 0 or job.step == job.total:
                    _checkpoint(job, folder)
                if asked and job.step < job.total:
                    raise _interrupted(job, folder, asked[0])
        _finish(job, folder)
    except Interrupted as stop:
        _end(job, folder, "interrupted", str(stop))
        raise
    except (RunError, torch.OutOfMemoryError, MemoryError) as error:
        failure = _failure(error, job, folder)
        _end(job, folder, "failed", str(failure), error.record if isinstance(error, NotFinite) else None)
        raise failure from error
    finally:
        show.end()


def _checkpoint(job: Job, folder: RunFolder) -> None:
    for arm in job.arms:
        arm.refuse_not_finite(job.step - 1)
    folder.write_state(
        {
            "step": job.step,
            "arms": {arm.name: arm.state() for arm in job.arms},
            "fingerprint": job.batches.dataset.fingerprint,
            "budget": job.results["budget"],
            "provenance": job.results["provenance"],
        }
    )
    _write_results(job, folder, "running")


def _finish(job: Job, folder: RunFolder) -> None:
    """Test both arms, write their weights, then say that the run is done."""
    for arm, name in zip(job.arms, (WEIGHTS, TWIN_WEIGHTS), strict=False):
        found = {"test_error": arm.error(job.batches, "test"), "test_images": job.batches.sizes["test"]}
        job.results["tests"][arm.name] = found
        folder.write_weights(name, arm.model.state_dict())
    _write_results(job, folder, "done", ended=True)


def _end(job: Job, folder: RunFolder, status: str, message: str, record: dict[str, Any] | None = None) -> None:
    """Note how a run ended; a full disk must not hide why."""
    job.results["message"] = message
    if record is not None:
        job.results["failure"] = record
    with contextlib.suppress(FallowError):
        _write_results(job, folder, status, ended=True)


def _write_results(job: Job, folder: RunFolder, status: str, *, ended: bool = False) -> None:
    results = {"schema": _results.SCHEMA, "kind": "train", "status": status, **job.results}
    tests = results.pop("tests")
    results["config"] = job.config.as_dict()
    results["sites"] = _results.sites(job.handle)
    results["arms"] = {arm.name: arm.results() for arm in job.arms}
    for name, found in tests.items():
        results["arms"][name]["summary"].update(found)
    results["summary"] = _results.summary(job.arms, with_ratios=ended)
    if ended:
        results["provenance"] = {**results["provenance"], "finished": _results.now()}
    folder.write_json(RESULTS, results)


# --- before and around it ----------------------------------------------------------------------------------


def _prepare(config: Config, command: str) -> Job:
    """Data, models and draws; refuses whatever cannot be before any step is taken."""
    dataset = data.load(
        config.data, config.data_dir, train_size=config.train_size, seed=config.seed, size=config.image_size
    )
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
    if twin is not None:
        arms.append(Arm("twin", twin, config, len(handle.sites)))
    assert config.epochs is not None
    total = config.epochs * batches.per_epoch
    origin = _results.provenance(config, batches, command, _results.now())
    results = {"provenance": origin, "budget": _results.budget(handle, config, total, None), "tests": {}}
    return Job(config, batches, handle, arms, 0, total, results)


def _measure_droppable(job: Job) -> None:
    share = droppable_time(job.arms[0].model, job.config, job.batches.dataset, job.batches)
    job.results["budget"] = _results.budget(job.handle, job.config, job.total, share)


def _restore(job: Job, state: dict[str, Any]) -> None:
    if state["fingerprint"] != job.batches.dataset.fingerprint:
        raise UsageError(
            f"the images of {job.config.data} are not those the run began with (their fingerprint differs): "
            "restore the files, or start a new run"
        )
    for arm in job.arms:
        arm.load(state["arms"][arm.name])
    job.step = int(state["step"])
    job.results |= {"budget": state["budget"], "provenance": state["provenance"]}


@contextlib.contextmanager
def _surroundings(config: Config) -> Iterator[None]:
    """Threads, generators and deterministic kernels of a run; all as before afterwards."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    cuda = config.device.startswith("cuda")
    try:
        if config.threads is not None and config.threads != threads:
            torch.set_num_threads(config.threads)
        if cuda:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
        with torch.random.fork_rng(devices=[torch.device(config.device).index or 0] if cuda else []):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """A list that gets the first SIGINT or SIGTERM; a second one acts as it did before."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _frame: object) -> None:
        asked.append(number)
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        restore()


def _interrupted(job: Job, folder: RunFolder, number: int) -> Interrupted:
    stop = Interrupted(
        f"interrupted after step {job.step} of {job.total}; a checkpoint is written. "
        f"Continue with fallow train --resume {folder.path}"
    )
    stop.signal = number
    return stop


def _failure(error: BaseException, job: Job, folder: RunFolder) -> RunError:
    """The error in words that say what is left and what to do."""
    kept = "the last good checkpoint is kept" if job.step else "no checkpoint was written yet"
    if isinstance(error, NotFinite):
        return RunError(f"{error}: {kept} in {folder.path}. Start anew with a lower --learning-rate")
    if isinstance(error, RunError):
        return error
    return RunError(
        f"not enough memory at step {job.step}: {kept} in {folder.path}. Take a smaller --batch-size, "
        "or --accumulate to take each batch in pieces"
    )


def sites_of(config: Config) -> Sites:
    """The sites of the model of a run, proved on the images of its data set."""
    config = config.settled()
    with _surroundings(config):
        dataset = data.load(config.data, config.data_dir, size=config.image_size)
        return sites(build(config, dataset), Batches(dataset, config).example())

"""The sparsification recipe: train under a penalty or a ramp, set to zero, shrink, measure.

Whatever is drawn is a function of the seed and the step; a run that is killed continues from its last
checkpoint and ends with bit-identical weights. It leaves the folder of a run, with what is left of the
model in `small/`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fallow.errors import FallowError, UsageError
from fallow.recipes import _sparse_results
from fallow.recipes._batches import error_of, seed_of
from fallow.recipes._ending import NotFinite, noted, stop_if_asked
from fallow.recipes._job import surroundings
from fallow.recipes._run import WEIGHTS, RunFolder, first_free
from fallow.recipes._sparse_config import SparseConfig
from fallow.recipes._sparse_job import (
    KIND,
    Job,
    checkpoint,
    prepare,
    refuse_not_finite,
    restore,
    write,
)
from fallow.recipes._stop import Interrupted, asked_to_stop
from fallow.recipes.show import Show, Silent

__all__ = ["Interrupted", "SparseConfig", "resume", "sparsify"]

_DIVERGED = 1e4  # nats; guessing among a million classes costs 14


def sparsify(
    config: SparseConfig,
    out: str | os.PathLike[str] | None = None,
    *,
    show: Show | None = None,
    command: str = "fallow sparsify",
) -> Path:
    """Train a model towards zeros, and shrink it.

    Args:
        config: the options.
        out: the run's folder, new or empty; None: runs/DATA-MODEL-sparse-N with the first free N.
        show: where progress goes; None: nowhere.
        command: what the user called, for the results.

    Returns:
        The run's folder.

    Raises:
        FallowError: before any step, for options that cannot be; RunError: the run had to stop.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was written.
    """
    config = config.settled()
    if out is not None:
        _folder(out).refuse_used()
    with surroundings(config):
        job, begin = prepare(config, command)
        folder = _folder(out if out is not None else first_free(config.data, f"{begin.model}-sparse"))
        folder.create({"recipe": KIND, "network": begin.model, **config.as_dict()})
        _run(job, folder, show or Silent())
    return folder.path


def resume(run: str | os.PathLike[str], *, show: Show | None = None) -> Path:
    """Continue a run from its last whole checkpoint, bit for bit; from the start where it has none yet.

    Args:
        run: its folder. A run that is done is left as it is.
        show: where progress goes; None: nowhere.

    Returns:
        The run's folder.

    Raises:
        UsageError: no such run is there, or the data set is not the one it began with.
        RunError: as in `sparsify`; also where no checkpoint is whole.
    """
    show = show or Silent()
    folder = _folder(run)
    given = folder.config()
    if given.pop("recipe", None) != KIND:
        raise UsageError(f"{run} is no run of fallow sparsify: continue it with fallow train --resume {run}")
    given.pop("network", None)
    config = SparseConfig.of(given).settled()
    if folder.status() == "done":
        show.say(f"the run in {folder.path} is done already")
        return folder.path
    folder.remove_temporaries()
    state = folder.read_state(show.say)
    with surroundings(config):
        job, _ = prepare(config, "fallow sparsify")
        if state is None:
            show.say(f"{folder.path} has no checkpoint yet: starting over")
        else:
            show.say(f"going on from step {state['step']} of {job.total}")
            restore(job, state)
        _run(job, folder, show)
    return folder.path


def _folder(path: str | os.PathLike[str]) -> RunFolder:
    return RunFolder(path, f"fallow sparsify --resume {path}")


def _run(job: Job, folder: RunFolder, show: Show) -> None:
    """The loop, and the note of how it ended; every way out leaves whole files."""
    write(job, folder, "running")
    show.begin(job.step, job.total)

    def note(status: str, **more: Any) -> None:
        write(job, folder, status, **more)

    try:
        with noted(folder, note, lambda: job.step, less="a smaller --batch-size"):
            _loop(job, folder, show)
            found = _finish(job, folder)
            write(job, folder, "done", **found)
    finally:
        show.end()


def _loop(job: Job, folder: RunFolder, show: Show) -> None:
    """Train from `job.step` to the last step."""
    batches = job.batches
    every = job.config.checkpoint_every or batches.per_epoch
    with asked_to_stop() as asked:
        while job.step < job.total:
            rate = _rate(job.config, job.step // batches.per_epoch)
            loss = _step(job, rate)
            show.step(job.step, f"loss {loss:.4f}")
            if job.step % batches.per_epoch == 0:
                show.epoch(_close_epoch(job, rate))
            if asked or job.step % every == 0 or job.step == job.total:
                checkpoint(job, folder)
            stop_if_asked(asked, job.step, job.total, folder)


def _step(job: Job, rate: float) -> float:
    """One step of the optimiser and of the strategy; the loss without the penalty.

    Raises:
        NotFinite: of the loss, before any weight has moved; or of a weight.
    """
    x, y = job.batches.at(job.step)
    for group in job.optimiser.param_groups:
        group["lr"] = rate
    job.optimiser.zero_grad(set_to_none=True)
    torch.manual_seed(seed_of(job.config.seed, "dropout", job.step))
    error = F.cross_entropy(job.model(x), y)
    loss = float(error.detach())
    if not loss < _DIVERGED:  # nor NaN
        raise NotFinite(f"the loss became {loss:.3g} at step {job.step + 1}")
    (error + job.run.penalty()).backward()
    job.optimiser.step()
    job.step += 1
    try:
        job.run.update()
    except FallowError:  # as a rule weights that are NaN; else what it says is for us to know
        refuse_not_finite(job)
        raise
    job.loss = [job.loss[0] + loss, job.loss[1] + 1]
    return loss


def _rate(config: SparseConfig, epoch: int) -> float:
    """The learning rate of an epoch, on a line to zero."""
    assert config.learning_rate is not None
    return config.learning_rate * (1 - epoch / config.epochs)


def _close_epoch(job: Job, rate: float) -> str:
    """Validate the model with what is cut set to zero; note it and put it in words."""
    run = job.run
    refuse_not_finite(job)
    with _as_cut(job) as model:
        error = error_of(model, job.batches, "validation")
    record = {
        "epoch": len(job.epochs) + 1,
        "train_loss": job.loss[0] / max(job.loss[1], 1),
        "validation_error": error,
        "sparsity": run.sparsity(),
        "strength": run.current_strength,
        "learning_rate": rate,
    }
    job.loss = [0.0, 0.0]
    job.epochs.append(record)
    return (
        f"{record['epoch']}/{job.config.epochs}  loss {record['train_loss']:.4f}  "
        f"validation error {record['validation_error']:.1%}  zeros {record['sparsity']:.2%}"
    )


@contextlib.contextmanager
def _as_cut(job: Job) -> Iterator[nn.Module]:
    """The model with zeros where it is cut, for as long as this lasts."""
    rescued = job.run.rescued
    try:
        yield job.run.hardened()
    finally:
        job.run.rescued = rescued


def _finish(job: Job, folder: RunFolder) -> dict[str, Any]:
    """Set to zero what is cut, test, shrink, measure, and write what is left."""
    plain = job.run.hardened().state_dict()
    job.run.remove()
    job.model.load_state_dict(plain)
    model = job.model.eval()
    folder.write_weights(WEIGHTS, model.state_dict())
    test = {"test_error": error_of(model, job.batches, "test"), "test_images": job.batches.sizes["test"]}
    small = _sparse_results.shrunk(job.run, job.batches, folder)
    return {"test": test, "small": small}

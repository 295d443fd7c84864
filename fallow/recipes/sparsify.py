"""The sparsification recipe: train under a penalty or a ramp, set to zero, shrink, measure.

Whatever is drawn is a function of the seed and the step; a run that is killed continues from its last
checkpoint and ends with bit-identical weights. It leaves the folder of a run, with what is left of the
model in `small/`.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fallow import data
from fallow.errors import FallowError, RunError, UsageError
from fallow.integrations.loading import channels_taken, load_model, run_config
from fallow.recipes import _results, _sparse_results
from fallow.recipes._batches import Batches, seed_of
from fallow.recipes._job import surroundings
from fallow.recipes._run import RESULTS, WEIGHTS, RunFolder, first_free
from fallow.recipes._sparse_config import SparseConfig
from fallow.recipes._stop import Interrupted, asked_to_stop
from fallow.recipes.show import Show, Silent
from fallow.sparsity import Sparsifier
from fallow.sparsity import sparsify as start

__all__ = ["Interrupted", "SparseConfig", "resume", "sparsify"]

KIND = "sparsify"


@dataclass
class Job:
    """A sparsification in memory.

    Attributes:
        run: what makes the model sparse.
        step: steps done.
        total: steps in all.
        epochs: a record of each epoch.
        loss: sum of the batch losses of this epoch, and how many.
        provenance: of the results.
    """

    config: SparseConfig
    batches: Batches
    model: nn.Module
    optimiser: torch.optim.Optimizer
    run: Sparsifier
    step: int
    total: int
    epochs: list[dict[str, Any]]
    loss: list[float]
    provenance: dict[str, Any]


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
    name = Path(config.model).name if run_config(config.model) else config.model
    folder = _folder(out if out is not None else first_free(config.data, f"{name}-sparse"))
    folder.refuse_used()
    with surroundings(config):
        job = _prepare(config, command)
        folder.create({"recipe": KIND, **config.as_dict()})
        _run(job, folder, show or Silent())
    return folder.path


def resume(run: str | os.PathLike[str], *, show: Show | None = None) -> Path:
    """Continue a run from its last whole checkpoint, bit for bit; from the start where it has none yet.

    Raises:
        UsageError: no such run is there, or the data set is not the one it began with.
        RunError: as in `sparsify`; also where no checkpoint is whole.
    """
    show = show or Silent()
    folder = _folder(run)
    given = folder.config()
    if given.pop("recipe", None) != KIND:
        raise UsageError(f"{run} is no run of fallow sparsify: continue it with fallow train --resume {run}")
    config = SparseConfig.of(given).settled()
    if folder.status() == "done":
        show.say(f"the run in {folder.path} is done already")
        return folder.path
    folder.remove_temporaries()
    state = folder.read_state(show.say)
    with surroundings(config):
        job = _prepare(config, "fallow sparsify")
        if state is None:
            show.say(f"{folder.path} has no checkpoint yet: starting over")
        else:
            show.say(f"going on from step {state['step']} of {job.total}")
            _restore(job, state)
        _run(job, folder, show)
    return folder.path


def _folder(path: str | os.PathLike[str]) -> RunFolder:
    return RunFolder(path, f"fallow sparsify --resume {path}")


def _prepare(config: SparseConfig, command: str) -> Job:
    """Data, model and strategy of a settled configuration; refuses what cannot be before any step."""
    before = run_config(config.model)
    source = config.model if before is None else str(before.get("model"))
    dataset = data.load(
        config.data, config.data_dir, train_size=config.train_size, seed=config.seed, size=config.image_size
    )
    dataset = dataset.with_channels(channels_taken(source, dataset.channels))
    batches = Batches(dataset, config)
    model = load_model(
        config.model,
        classes=dataset.classes,
        channels=dataset.channels,
        image=dataset.size,
        weights=config.weights,
        seed=seed_of(config.seed, "weights"),
    )
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model = model.to(device=config.device, memory_format=layout).train()  # type: ignore[call-overload]
    total = config.epochs * batches.per_epoch
    optimiser = _optimiser(model, config)
    run = start(
        model,
        strategy=config.penalty(),
        strength=config.strength,
        method=config.method,
        groups=config.groups,
        target=config.target,
        steps=total,
        control=config.control,
        ramp=(config.ramp_begin, config.ramp_end),
        cut=config.cut,
        include=config.include or None,
        exclude=config.exclude or None,
        optimiser=optimiser,
    )
    own = [*run.parameters()]
    if own:
        optimiser.add_param_group({"params": own, "weight_decay": 0.0})
    provenance = _results.provenance(config, batches, command, _results.now())
    return Job(config, batches, model, optimiser, run, 0, total, [], [0.0, 0.0], provenance)


def _optimiser(model: nn.Module, config: SparseConfig) -> torch.optim.Optimizer:
    assert config.learning_rate is not None
    if config.optimiser == "sgd":
        return torch.optim.SGD(
            model.parameters(), config.learning_rate, momentum=0.9, weight_decay=config.weight_decay
        )
    return torch.optim.Adam(model.parameters(), config.learning_rate, weight_decay=config.weight_decay)


def _run(job: Job, folder: RunFolder, show: Show) -> None:
    """The loop, and the note of how it ended; every way out leaves whole files."""
    _write(job, folder, "running")
    show.begin(job.step, job.total)
    try:
        _loop(job, folder, show)
        found = _finish(job, folder)
        _write(job, folder, "done", **found)
    except Interrupted as stop:
        _note(job, folder, "interrupted", str(stop))
        raise
    except (RunError, torch.OutOfMemoryError, MemoryError) as error:
        kept = "the last good checkpoint is kept" if folder.has_state() else "there is no checkpoint yet"
        text = str(error) if isinstance(error, RunError) else f"not enough memory at step {job.step}"
        _note(job, folder, "failed", text)
        raise RunError(f"{text}: {kept} in {folder.path}") from error
    finally:
        show.end()


def _loop(job: Job, folder: RunFolder, show: Show) -> None:
    """Train from `job.step` to the last step."""
    config, batches, run = job.config, job.batches, job.run
    every = config.checkpoint_every or batches.per_epoch
    with asked_to_stop() as asked:
        for step in range(job.step, job.total):
            x, y = batches.at(step)
            rate = _rate(config, step // batches.per_epoch)
            for group in job.optimiser.param_groups:
                group["lr"] = rate
            job.optimiser.zero_grad(set_to_none=True)
            error = F.cross_entropy(job.model(x), y)
            (error + run.penalty()).backward()
            job.optimiser.step()
            run.update()
            loss = float(error.detach())
            if not math.isfinite(loss):
                raise RunError(
                    f"the loss is {loss} at step {step + 1}: start anew with a lower --learning-rate"
                )
            job.loss = [job.loss[0] + loss, job.loss[1] + 1]
            job.step = step + 1
            show.step(job.step, f"loss {loss:.4f}")
            if job.step % batches.per_epoch == 0:
                show.epoch(_close_epoch(job, rate))
            if asked or job.step % every == 0 or job.step == job.total:
                _checkpoint(job, folder)
            if asked and job.step < job.total:
                raise Interrupted(
                    f"interrupted after step {job.step} of {job.total}; a checkpoint is written. "
                    f"Continue with {folder.again}",
                    asked[0],
                )


def _rate(config: SparseConfig, epoch: int) -> float:
    """The learning rate of an epoch, on a line to zero."""
    assert config.learning_rate is not None
    return config.learning_rate * (1 - epoch / config.epochs)


def _close_epoch(job: Job, rate: float) -> str:
    """Validate the model with what is cut set to zero; note it and put it in words."""
    run = job.run
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
    before = [weight.parameter.detach().clone() for weight in job.run.weights]
    rescued = job.run.rescued
    try:
        job.run.harden()
        yield job.model
    finally:
        job.run.rescued = rescued
        with torch.no_grad():
            for weight, value in zip(job.run.weights, before, strict=True):
                weight.parameter.copy_(value)


def error_of(model: nn.Module, batches: Batches, part: str) -> float:
    """Share of the images of a part that the model at evaluation gets wrong."""
    was = model.training
    model.eval()
    wrong = 0
    with torch.no_grad():
        for x, y in batches.evaluated(part):
            wrong += int((model(x).argmax(1) != y).sum())
    model.train(was)
    return wrong / batches.sizes[part]


def _finish(job: Job, folder: RunFolder) -> dict[str, Any]:
    """Set to zero what is cut, test, shrink, measure, and write what is left."""
    job.run.harden()
    model = job.model.eval()
    folder.write_weights(WEIGHTS, model.state_dict())
    test = {"test_error": error_of(model, job.batches, "test"), "test_images": job.batches.sizes["test"]}
    small = _sparse_results.shrunk(job, folder)
    return {"test": test, "small": small}


# --- checkpoints and results -------------------------------------------------------------------------------


def _checkpoint(job: Job, folder: RunFolder) -> None:
    state = {
        "step": job.step,
        "model": job.model.state_dict(),
        "optimiser": job.optimiser.state_dict(),
        "run": job.run.state_dict(),
        "epochs": job.epochs,
        "loss": job.loss,
        "provenance": job.provenance,
        "fingerprint": job.batches.dataset.fingerprint,
    }
    folder.write_state(state)
    _write(job, folder, "running")


def _restore(job: Job, state: dict[str, Any]) -> None:
    if state["fingerprint"] != job.batches.dataset.fingerprint:
        raise UsageError(
            f"the images of {job.config.data} are not those the run began with (their fingerprint differs): "
            "restore the files, or start a new run"
        )
    job.model.load_state_dict(state["model"])
    job.optimiser.load_state_dict(state["optimiser"])
    job.run.load_state_dict(state["run"])
    job.step, job.epochs, job.loss = int(state["step"]), state["epochs"], state["loss"]
    job.provenance = state["provenance"]


def _write(job: Job, folder: RunFolder, status: str, **more: Any) -> None:
    results: dict[str, Any] = {"schema": _results.SCHEMA, "kind": KIND, "status": status, **more}
    results |= {"config": job.config.as_dict(), "provenance": job.provenance, "epochs": job.epochs}
    results |= _sparse_results.weights(job.run)
    if status == "done":
        results["provenance"] = {**job.provenance, "finished": _results.now()}
    folder.write_json(RESULTS, results)


def _note(job: Job, folder: RunFolder, status: str, message: str) -> None:
    """Note in the results how a run ended; a full disk must not hide why."""
    with contextlib.suppress(FallowError):
        _write(job, folder, status, message=message)

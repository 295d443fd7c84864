"""A sparsification in memory: from its options, and to and from its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fallow import data
from fallow.errors import UsageError
from fallow.integrations.loading import SPARSIFY, channels_taken, load_model, run_config
from fallow.paths import expanded
from fallow.recipes import _results, _sparse_results
from fallow.recipes._batches import Batches, seed_of
from fallow.recipes._ending import NotFinite
from fallow.recipes._run import RESULTS, WEIGHTS, RunFolder
from fallow.recipes._sparse_config import SparseConfig
from fallow.sparsity import Sparsifier
from fallow.sparsity import sparsify as start
from fallow.sparsity.weights import weights_of

KIND = SPARSIFY


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
        spared: the layer of the classes, where outputs are taken and nobody asked for its own.
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
    spared: tuple[str, ...] = ()


# --- what it starts from -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """What `--model` names.

    Attributes:
        model: a name that `load_model` makes a network from.
        weights: what it begins with; None: random ones, or what `--weights` says.
    """

    model: str
    weights: Path | None = None


def origin(config: SparseConfig) -> Origin:
    """The network's own name, and the weights of the run that trained it where there is one.

    Raises:
        UsageError: a run that has no weights yet.
        DataError: a configuration that cannot be read.
    """
    before = run_config(config.model)
    if before is None:
        return Origin(config.model)
    command = f"fallow {before.get('recipe', 'train')}"
    return Origin(str(before["model"]), _weights_in(expanded(config.model), command))


def _weights_in(folder: Path, command: str) -> Path:
    if not (folder / WEIGHTS).is_file():
        raise UsageError(
            f"the run in {folder} has no {WEIGHTS} yet: bring it to its end with {command} --resume {folder}"
        )
    return folder / WEIGHTS


def prepare(config: SparseConfig, command: str) -> tuple[Job, Origin]:
    """Data, model and strategy of a settled configuration; refuses what cannot be before any step."""
    begin = origin(config)
    dataset = data.load(
        config.data, config.data_dir, train_size=config.train_size, seed=config.seed, size=config.image_size
    )
    weights = config.weights if config.weights is not None else begin.weights
    dataset = dataset.with_channels(channels_taken(begin.model, dataset.channels, weights))
    batches = Batches(dataset, config)
    model = load_model(
        begin.model,
        classes=dataset.classes,
        channels=dataset.channels,
        image=dataset.size,
        weights=weights,
        seed=seed_of(config.seed, "weights"),
    )
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model = model.to(device=config.device, memory_format=layout).train()  # type: ignore[call-overload]
    _try(model, begin.model, batches)
    _refuse_patterns(model, config)
    spared = _classes_of(model, config, dataset.classes)
    total = config.epochs * batches.per_epoch
    optimiser = _optimiser(model, config)
    torch.manual_seed(seed_of(config.seed, "noise"))  # of what gates begin with
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
        multiple=config.multiple,
        cut=config.cut,
        include=config.include or None,
        exclude=(*config.exclude, *spared) or None,
        optimiser=optimiser,
        samples=batches.sizes["train"],
    )
    own = [*run.parameters()]
    if own:
        optimiser.add_param_group({"params": own, "weight_decay": 0.0})
    provenance = _results.provenance(config, batches, command, _results.now())
    job = Job(config, batches, model, optimiser, run, 0, total, [], [0.0, 0.0], provenance, spared)
    return job, begin


def _try(model: nn.Module, name: str, batches: Batches) -> None:
    """Refuse a model that cannot take the images, before there is a folder."""
    x = batches.example()
    try:
        with torch.no_grad():
            found = model.eval()(x)
    except Exception as error:  # whatever somebody's forward raises
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        size = " x ".join(map(str, x.shape[1:]))
        raise UsageError(
            f"{name} cannot take images of {size} ({first.rstrip('.')}): take a data set of its size, an "
            "imagefolder with --image-size, or another model"
        ) from error
    finally:
        model.train()
    if not isinstance(found, torch.Tensor) or found.dim() != 2:
        raise UsageError(f"{name} is no classifier of images: it does not return a row of logits for each")


def _refuse_patterns(model: nn.Module, config: SparseConfig) -> None:
    """Refuse what matches nothing, or what cannot be made sparse, by the name of the flag."""
    for flag, patterns in (("--include", config.include), ("--exclude", config.exclude)):
        for pattern in patterns:
            try:
                weights_of(model, groups=config.groups, include=pattern)
            except UsageError as error:
                raise UsageError(f"{flag} {pattern}: {error}") from None


def _classes_of(model: nn.Module, config: SparseConfig, classes: int) -> tuple[str, ...]:
    """The last layer where its outputs are the classes: without one of them no image of it is ever right."""
    if config.groups != "outputs" or config.include:
        return ()
    found = weights_of(model, groups=config.groups, exclude=config.exclude or None)
    last = found[-1]
    return (last.name,) if len(found) > 1 and last.parameter.shape[0] == classes else ()


def _optimiser(model: nn.Module, config: SparseConfig) -> torch.optim.Optimizer:
    assert config.learning_rate is not None
    if config.optimiser == "sgd":
        return torch.optim.SGD(
            model.parameters(), config.learning_rate, momentum=0.9, weight_decay=config.weight_decay
        )
    return torch.optim.Adam(model.parameters(), config.learning_rate, weight_decay=config.weight_decay)


# --- checkpoints and results -------------------------------------------------------------------------------


def checkpoint(job: Job, folder: RunFolder) -> None:
    """Write the state and the results so far.

    Raises:
        NotFinite: a weight is not finite; the checkpoint before stays.
        RunError: the disk refused.
    """
    refuse_not_finite(job)
    folder.write_state(
        {
            "step": job.step,
            "model": job.model.state_dict(),
            "optimiser": job.optimiser.state_dict(),
            "run": job.run.state_dict(),
            "epochs": job.epochs,
            "loss": job.loss,
            "provenance": job.provenance,
            "fingerprint": job.batches.dataset.fingerprint,
        }
    )
    write(job, folder, "running")


def refuse_not_finite(job: Job) -> None:
    """Refuse weights that are not finite, before they become a checkpoint or a result.

    Raises:
        NotFinite: which, and after which step.
    """
    for name, value in job.model.state_dict().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise NotFinite(f"the weight {name} became infinite or NaN at step {job.step}")


def restore(job: Job, state: dict[str, Any]) -> None:
    """Bring a prepared run to where a checkpoint was written.

    Raises:
        UsageError: the images are not those the run began with.
    """
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


def write(job: Job, folder: RunFolder, status: str, **more: Any) -> None:
    """Write results.json; `more` goes in as it is."""
    results: dict[str, Any] = {"schema": _results.SCHEMA, "kind": KIND, "status": status, **more}
    results |= {"config": job.config.as_dict(), "provenance": job.provenance, "epochs": job.epochs}
    results |= {"spared": list(job.spared), **_sparse_results.weights(job.run)}
    results["curves"] = _sparse_results.curves(job.run, job.config.penalty())
    if status == "done":
        results["provenance"] = {**job.provenance, "finished": _results.now()}
    folder.write_json(RESULTS, results)

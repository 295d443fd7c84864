"""The training recipe: a model under stochastic depth beside its constant-depth twin, in one flat loop.

Both arms start from the same weights and see the same batches. Their steps alternate, so that whatever slows
the machine down slows both. Whatever is drawn is a function of the seed and the step; a run that is killed at
any moment continues from its last checkpoint and ends with bit-identical weights.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import EllipsisType
from typing import Any

from fallow.errors import DataError, UsageError
from fallow.recipes._arm import build
from fallow.recipes._batches import Batches
from fallow.recipes._config import Config
from fallow.recipes._ending import Advice, noted, stop_if_asked
from fallow.recipes._job import (
    Job,
    checkpoint,
    images,
    measure,
    prepared,
    replan,
    restore,
    surroundings,
    write_results,
)
from fallow.recipes._optimise import learning_rate
from fallow.recipes._run import CONFIG, RESULTS, WEIGHTS, RunFolder, first_free
from fallow.recipes._stop import Interrupted, asked_to_stop
from fallow.recipes.show import Show, Silent, epoch_words
from fallow.surgery import Sites, sites

__all__ = ["Config", "Interrupted", "read_results", "resume", "sites_of", "train"]

TWIN_WEIGHTS = "twin.safetensors"
_MEMORY_MEASURED = 16  # steps at most, spread over the run
_ADVICE = Advice("a smaller --batch-size, or --accumulate to take each batch in pieces")


def train(
    config: Config,
    out: str | os.PathLike[str] | None = None,
    *,
    show: Show | None = None,
    command: str = "fallow train",
    advice: Advice = _ADVICE,
) -> Path:
    """Train a model, and its twin, from the start.

    Args:
        config: the options.
        out: the run's folder, new or empty; None: runs/DATA-MODEL-N with the first free N.
        show: where progress goes; None: nowhere.
        command: what the user called, for the results.
        advice: what to do about a failure, in the words of that command.

    Returns:
        The run's folder.

    Raises:
        FallowError: before any step, for options that cannot be; RunError: the run had to stop.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was written.
    """
    config = config.settled()
    folder = RunFolder(out if out is not None else first_free(config.data, config.model), advice.again)
    folder.refuse_used()
    with prepared(config, command) as job:
        folder.create(config.as_dict())
        _run(job, folder, show or Silent(), advice, fresh=True)
    return folder.path


def resume(
    run: str | os.PathLike[str],
    *,
    show: Show | None = None,
    data_dir: str | os.PathLike[str] | EllipsisType | None = ...,
    device: str | None = None,
    advice: Advice = _ADVICE,
) -> Path:
    """Continue a run from its last whole checkpoint, bit for bit; from the start where it has none yet.

    Args:
        run: its folder. A run that is done is left as it is.
        show: where progress goes; None: nowhere.
        data_dir: where its image set is now; None: where one is looked for by default. Left out: where it
            was. Kept with the run's options once it goes on.
        device: where it goes on, of the kind that it began on; None: where it was. Kept likewise.
        advice: what to do about a failure, in the words of the command that was called.

    Returns:
        The run's folder.

    Raises:
        UsageError: no run is there, the data set is not the one it began with, or a run that has a
            checkpoint is to go on on another kind of device.
        RunError: as in `train`; also where no checkpoint is whole.
    """
    show = show or Silent()
    folder = RunFolder(run, advice.again)
    given = folder.config()
    if "recipe" in given:
        other = f"fallow {given['recipe']}"
        raise UsageError(f"{run} is a run of {other}: continue it with {other} --resume {run}")
    moved = began = Config.of(given)
    if not isinstance(data_dir, EllipsisType):
        moved = replace(moved, data_dir=None if data_dir is None else os.fspath(data_dir))
    if device is not None:
        moved = replace(moved, device=device)
    config = moved.settled()
    if folder.status() == "done":
        show.say(f"the run in {folder.path} is done already")
        return folder.path
    if device is not None and folder.has_state() and not same_kind(began.device, config.device):
        raise UsageError(
            f"the run in {folder.path} has a checkpoint of {began.device}, from which it would not go on bit "
            f"for bit on {config.device}: continue it where it began, or start a new run"
        )
    folder.remove_temporaries()
    state = folder.read_state(show.say)
    with prepared(config, "fallow train") as job:
        if state is None:
            show.say(f"{folder.path} has no checkpoint yet: starting over")
        else:
            show.say(f"going on from step {state['step']} of {job.total}")
            restore(job, state)
        if (config.data_dir, config.device) != (began.data_dir, began.device):  # whoever is next finds it too
            folder.write_json(CONFIG, config.as_dict())
        _run(job, folder, show, advice, fresh=state is None)
    return folder.path


def same_kind(one: str, other: str) -> bool:
    """Whether two devices are of one kind, as cuda:0 and cuda:1 are."""
    return one.partition(":")[0] == other.partition(":")[0]


def _run(job: Job, folder: RunFolder, show: Show, advice: Advice, *, fresh: bool) -> None:
    """The loop, before a fresh one what is measured once, and the note of how it ended: files stay whole."""
    write_results(job, folder, "running")
    show.begin(job.step, job.total)

    def note(status: str, **more: Any) -> None:
        write_results(job, folder, status, ended=True, **more)

    try:
        with noted(folder, note, lambda: job.step, less=advice.less, diverged=advice.diverged):
            if fresh:
                measure(job)
            _loop(job, folder, show)
            _finish(job, folder)
        if job.config.rates == "sensemode" and not job.results["plans"]:
            show.say("the rates stayed uniform: the run was too short to see every site")
    finally:
        show.end()


def _loop(job: Job, folder: RunFolder, show: Show) -> None:
    """Train from `job.step` to the last step."""
    config, batches = job.config, job.batches
    every = config.checkpoint_every or batches.per_epoch
    warm = job.step  # the first step after a start pays for what later ones find ready
    count = max(min(_MEMORY_MEASURED, job.total // 4), 1)
    measured = {1 + i * (job.total - 1) // count for i in range(count)}
    with asked_to_stop() as asked:
        for step in range(job.step, job.total):
            batch = batches.at(step)
            rate = learning_rate(step, batches.per_epoch, config)
            how = "memory" if step in measured else "warm" if step == warm else "time"
            job.handle.step(step)
            losses = {}
            for arm in job.arms if step % 2 == 0 else reversed(job.arms):
                losses[arm.name] = arm.step(batch, rate, step, how=how)
            job.step = step + 1
            model = job.arms[0]
            depth, cost = model.log["depth"][-1], model.log["cost"][-1]
            show.step(job.step, f"loss {losses['model']:.4f}  depth {depth:.1f}  cost {cost:.3f}")
            if job.step % batches.per_epoch == 0:
                epoch = job.step // batches.per_epoch
                records = {arm.name: arm.close_epoch(epoch, job.step, rate, batches) for arm in job.arms}
                show.epoch(epoch_words(records, job.total // batches.per_epoch))
                replan(job, epoch)
            if asked or job.step % every == 0 or job.step == job.total:
                checkpoint(job, folder)
            stop_if_asked(asked, job.step, job.total, folder)


def _finish(job: Job, folder: RunFolder) -> None:
    """Test both arms, write their weights, then say that the run is done."""
    for arm, name in zip(job.arms, (WEIGHTS, TWIN_WEIGHTS), strict=False):
        images = job.batches.sizes["test"]
        known = arm.epochs[-1].get("test_error")  # of these very weights, where the last epoch was tested
        error = arm.error(job.batches, "test") if known is None else known
        job.tests[arm.name] = {"test_error": error, "test_images": images}
        folder.write_weights(name, arm.model.state_dict())
    write_results(job, folder, "done", ended=True)


# --- what a run leaves, and what it would train ------------------------------------------------------------


def read_results(run: str | os.PathLike[str]) -> dict[str, Any]:
    """What `results.json` in a run's folder holds."""
    path = Path(run) / RESULTS
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): continue the run with --resume") from None


def sites_of(config: Config) -> Sites:
    """The sites of the model of a run, proved on the images of its data set."""
    config = config.settled()
    with surroundings(config):
        dataset = images(config)
        return sites(build(config, dataset), Batches(dataset, config).example())

"""One cell in its folder: run or resumed, never twice; what it found is read from the folder alone.

A cell that trains is an ordinary run folder. Any other has a `cell.json` from its beginning on, and the
parts of a long one stay in `pieces/` until it is done. Every file is written whole or not at all.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fallow._version import __version__
from fallow.errors import DataError, RunError, UsageError
from fallow.jsonable import finite
from fallow.papers._experiments import Cell
from fallow.recipes import _results, train
from fallow.recipes._batches import seed_of
from fallow.recipes._config import Config
from fallow.recipes._ending import Advice, of_memory
from fallow.recipes._run import CONFIG, RunFolder
from fallow.recipes.show import Show

CELL, PIECES = "cell.json", "pieces"
SCHEMA = 1
AGAIN = "the same fallow reproduce"
# Options that say where and with what a run works, not what it computes.
_ELSEWHERE = ("data_dir", "device")
# What a cell's files say of where its numbers come from; files of earlier versions lack some of it.
ORIGIN = ("fallow", "torch", "hardware", "finished")
_THREADS = "one thread a cell"
_LESS = "fewer --jobs or a machine with more memory, then give the same command again: what is done stays"


def is_done(cell: Cell, folder: Path) -> bool:
    """Whether the cell has run to its end in this folder."""
    if cell.work is None:
        return RunFolder(folder).status() == "done"
    return _read(folder / CELL).get("status") == "done"


def run(cell: Cell, folder: Path, data_dir: str | None, command: str, show: Show | None = None) -> None:
    """Run a cell, or what is left of it; one that is done is left alone.

    Raises:
        UsageError: the folder holds a cell of the same name with other options, or one that was begun on
            another kind of device.
        DataError: a file of it, or its image set, cannot be read.
        RunError: it had to stop.
        Interrupted: on request; what is done is kept.
    """
    refuse_other(cell, folder)
    if is_done(cell, folder):
        return
    if cell.work is None:
        config, advice = _config(cell, data_dir), _advice(folder)
        if (folder / CONFIG).exists():
            where: Any = {key: getattr(config, key) for key in _ELSEWHERE}
            train.resume(folder, show=show, advice=advice, **where)
        else:
            train.train(config, folder, show=show, command=command, advice=advice)
    else:
        _compute(cell, folder, data_dir)


def refuse_other(cell: Cell, folder: Path) -> None:
    """Refuse a folder in which a cell of this name was run, or begun, in another way.

    Raises:
        UsageError: it has other options, or it was begun, not ended, on another kind of device: the numbers
            of one cell are of one.
        DataError: its file cannot be read.
    """
    if cell.work is None:
        if not (folder / CONFIG).exists():
            return
        before, asked = _read(folder / CONFIG), _config(cell, None).as_dict()
        began, here = before.get("device"), asked["device"]
        before = {**before, "device": here}
        before = Config.of({k: v for k, v in before.items() if k in asked}).settled().as_dict()
        other = [key for key in asked if key not in _ELSEWHERE and before.get(key) != asked[key]]
        kept = RunFolder(folder).has_state()
    else:
        found, kept = _read(folder / CELL), any((folder / PIECES).glob("*.json"))
        if found.get("status") != "done" and not kept:
            return
        before, asked = found.get("options", {}), _json(dict(cell.options))
        began, here = found.get("device"), _device()
        other = [key for key in {**before, **asked} if found and before.get(key) != asked.get(key)]
    if other:
        key = other[0]
        raise UsageError(
            f"{folder} was made with {key} {before.get(key)}, and this asks for {asked.get(key)}: name "
            "another folder with --out, or remove that one"
        )
    if kept and began and not train.same_kind(began, here) and not is_done(cell, folder):
        raise UsageError(
            f"{folder} was begun on {began} and would go on on {here}, and the numbers of a cell must not be "
            f"of both: give the command where there is {began}, name another folder with --out, or remove "
            f"{folder}, whose cell then begins anew"
        )


def result(cell: Cell, folder: Path) -> dict[str, Any]:
    """What a cell that is done found."""
    if cell.work is not None:
        return _read(folder / CELL)["result"]
    found = train.read_results(folder)
    arm, data = found["arms"]["model"], found["provenance"]["data"]
    return {
        **_beside(found),
        "test_error": arm["summary"]["test_error"],
        "test_images": arm["summary"]["test_images"],
        "realised_cost": found["summary"]["realised_cost"],
        "expected_cost": found["budget"]["expected_cost"],
        "cpu_s_per_step": arm["summary"]["cpu_s_per_step"],
        "epochs": arm["epochs"],
        "sites": found["sites"],
        "data": data,
        "config": found["config"],
    }


def _beside(found: Mapping[str, Any]) -> dict[str, Any]:
    """What a training run found of its constant-depth twin; nothing where it had none."""
    twin = found["arms"].get("twin")
    if twin is None:
        return {}
    ours, theirs, budget = found["arms"]["model"]["summary"], twin["summary"], found["budget"]
    return {
        "twin_test_error": theirs["test_error"],
        "twin_cpu_s_per_step": theirs["cpu_s_per_step"],
        "twin_epochs": twin["epochs"],
        "time_ratio": found["summary"]["time_ratio"],
        "wall_ratio": found["summary"]["wall_ratio"],
        **{key: found["summary"].get(key) for key in ("mean_time_ratio", "mean_wall_ratio", "timed_cost")},
        "wall_s_per_step": [ours["wall_s_per_step"], theirs["wall_s_per_step"]],
        "memory_ratio": found["summary"].get("memory_ratio"),
        "memory_mb": [ours["peak_memory_mb"], theirs["peak_memory_mb"]],
        "ideal": {"flops": budget["ideal_flops"], "time": budget["ideal_time"]},
        "realised_depth": ours["realised_depth"],
        "expected_depth": budget["expected_depth"],
    }


def seconds(cell: Cell, folder: Path) -> float | None:
    """Processor seconds of a finished cell's steps or work."""
    if cell.work is not None:
        return _read(folder / CELL).get("seconds")
    took = [
        (arm["summary"]["cpu_s_per_step"], len(arm["depths"]))
        for arm in train.read_results(folder)["arms"].values()
    ]
    return None if any(step is None for step, _ in took) else sum(step * steps for step, steps in took)


def origin(cell: Cell, folder: Path) -> dict[str, str]:
    """Where the numbers of a finished cell come from: those of `ORIGIN` that its files say."""
    found = _read(folder / CELL) if cell.work is not None else train.read_results(folder)["provenance"]
    said = {key: str(found[key]) for key in ORIGIN if found.get(key)}
    if "hardware" in said:  # in the words of a reproduction, or one machine would look like two
        said["hardware"] = said["hardware"].replace(", 1 threads", f", {_THREADS}")
    return said


def hardware(device: str) -> str:
    """What a device of that kind is, in words."""
    return _results.hardware(device, _THREADS)


class Pieces:
    """Keeps the parts of a long cell, so that a kill loses at most one of them.

    Before and after each part torch's generator is set to what its name says, so that a part that was kept
    and one that is computed leave the same behind.
    """

    def __init__(self, cell: str, folder: Path) -> None:
        self._cell, self._folder = cell, RunFolder(folder / PIECES, AGAIN)
        self._folder.path.mkdir(parents=True, exist_ok=True)
        self._folder.remove_temporaries()

    def __call__(self, name: str, compute: Callable[[], Any]) -> Any:
        """The result of a part, from its file where it is there."""
        path = self._folder.path / f"{name}.json"
        found = _read(path)
        if not found:
            torch.manual_seed(seed_of(0, f"{self._cell}/{name}"))
            found = {"result": _json(compute())}
            self._folder.write_json(path.name, found)
        torch.manual_seed(seed_of(1, f"{self._cell}/{name}"))
        return found["result"]


def _compute(cell: Cell, folder: Path, data_dir: str | None) -> None:
    assert cell.work is not None
    home = RunFolder(folder, AGAIN)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"the folder {folder} cannot be made ({error.strerror})") from None
    home.remove_temporaries()
    record = {
        "schema": SCHEMA,
        "kind": "cell",
        "status": "begun",
        "name": cell.name,
        "work": f"{cell.work.__module__}.{cell.work.__qualname__}",
        "options": dict(cell.options),
        "device": _device(),
    }
    home.write_json(CELL, record)  # or nobody could tell what the parts of it are parts of
    start, allocated = time.process_time(), _allocated()
    where = {"data_dir": data_dir} if cell.data else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(0, cell.name))
        try:
            found = cell.work(**cell.options, **where, pieces=Pieces(cell.name, folder))
        except (MemoryError, RuntimeError) as error:
            if not of_memory(error):
                raise
            raise RunError(f"not enough memory for {folder}. Take {_LESS}") from error
    record |= {
        "status": "done",
        "result": found,
        "seconds": time.process_time() - start,
        "fallow": __version__,
        "torch": str(torch.__version__),
        "hardware": hardware("cuda" if _allocated() > allocated else "cpu"),
        "finished": _results.now(),
    }
    home.write_json(CELL, record)
    for path in (folder / PIECES).glob("*.json"):  # they are in the result now
        path.unlink()


def _advice(folder: Path) -> Advice:
    """What to do about a training run that failed: a reproduction has no flags for how it trains."""
    again = (
        "The same command ends the same way, for all that is drawn is fixed: only if the software has "
        f"changed since, remove {folder} and give it again"
    )
    return Advice(_LESS, again, AGAIN)


def _device() -> str:
    """The kind of device that work takes where it can, as a training run does."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _allocated() -> int:
    """How often memory of a GPU was taken so far: not at all by work that runs on a CPU alone."""
    counts = torch.cuda.memory_stats() if torch.cuda.is_initialized() else {}
    return counts.get("allocation.all.allocated", 0)


def _config(cell: Cell, data_dir: str | None) -> Config:
    here = {"data_dir": data_dir, "threads": 1, "twin": False}
    return Config.of({**here, **cell.options}).settled()


def _json(value: Any) -> Any:
    """The value as it comes back from a file, so that a kept and a computed one are the same."""
    return json.loads(json.dumps(finite(value)))


def _read(path: Path) -> dict[str, Any]:
    """The mapping in a file; empty where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): remove it, and its cell runs again") from None
    return dict(found) if isinstance(found, Mapping) else {}

"""Plans and explanations of models by name and of runs: what the command line calls."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fallow.errors import DataError, UsageError, check_rate
from fallow.planning import Plan, plan
from fallow.recipes._probe import Probe, Source, probe
from fallow.recipes._run import RESULTS

__all__ = ["Source", "file_to_write", "plan_of", "rates_of"]


def plan_of(name: str, source: Source, *, budget: float, **options: Any) -> Plan:
    """A plan for the model of a name, or of a run's folder.

    Args:
        name: as in `fallow.integrations.loading.load_model`.
        source: its batches.
        budget: expected share of a dense step.
        **options: of `fallow.plan`. A run's own granularity and patterns hold where they are not said.

    Raises:
        FallowError: as in `probe` and `fallow.plan`.
    """
    check_rate(budget, name="--budget")
    found = probe(name, source)
    chosen = _sites_as_in(found, options)
    made = plan(
        found.model,
        found.loss_fn,
        found.batches,
        budget=budget,
        max_batches=len(found.batches),
        seed=source.seed,
        **chosen,
    )
    settings = made.settings | {key: _listed(value) for key, value in chosen.items() if value is not None}
    return replace(
        made, notes=(*made.notes, *found.notes), settings=settings | _settings(name, found, source)
    )


def _settings(name: str, found: Probe, source: Source) -> dict[str, Any]:
    """What a reader needs to know of the model and the batches, and to have them again."""
    inputs = found.batches[0][0]
    shape = [*inputs.shape[1:]] if hasattr(inputs, "shape") else [*inputs["input_ids"].shape[1:]]
    return {
        "model": name,
        "weights": source.weights or ("of the run" if found.run is not None else _weights_of(name)),
        "data": found.data,
        "inputs": "x".join(map(str, shape)),
        "batches": len(found.batches),
        "batch_size": source.batch_size,
        "seed": source.seed,
    }


def _weights_of(name: str) -> str:
    local = name.startswith("hf:") and Path(name.removeprefix("hf:")).expanduser().is_dir()
    return "of the folder, random where it has none" if local else "random"


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _sites_as_in(found: Probe, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options; where they are silent, the run's own choice of sites."""
    chosen = dict(options)
    for key in ("granularity", "include", "exclude"):
        said = chosen.pop(key, None) or (getattr(found.run, key) if found.run is not None else None)
        if said:
            chosen[key] = said
    return chosen


# --- rates -------------------------------------------------------------------------------------------------


def rates_of(run: str | Path) -> dict[str, float]:
    """The survival rates that a run was asked to take, by site.

    Raises:
        DataError: its results are missing or damaged.
    """
    path = Path(run).expanduser() / RESULTS
    try:
        sites = json.loads(path.read_text(encoding="utf-8"))["sites"]
        return {str(site["name"]): float(site["asked"]) for site in sites}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} does not hold the run's rates ({type(error).__name__}): continue it with fallow train "
            f"--resume {run}"
        ) from None


# --- files -------------------------------------------------------------------------------------------------


def file_to_write(path: Path, kind: str) -> Path:
    """The file to write: a folder gets `kind.json`; anything that is there and not of the kind is left alone.

    Raises:
        UsageError: a file of something else, or a folder that is not there.
    """
    path = path / f"{kind}.json" if path.is_dir() else path
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent} to write {path.name} to: make it first")
    if path.exists() and _kind(path) != kind:
        raise UsageError(f"{path} is there and is no {kind}: name another place with --out")
    return path


def _kind(path: Path) -> object:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found.get("kind") if isinstance(found, dict) else None

"""Plans and explanations of models by name and of runs: what the command line calls."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fallow.errors import DataError, UsageError, check_choice, check_rate
from fallow.explaining import Explanation, explain
from fallow.integrations.loading import run_config
from fallow.paths import expanded
from fallow.planning import Plan, plan
from fallow.recipes._config import Config
from fallow.recipes._laws import scheme_of
from fallow.recipes._probe import TOKENS, Probe, Source, logits_of, probe
from fallow.recipes._run import RESULTS, RunFolder

__all__ = ["LOSSES", "Source", "explanation_of", "file_to_write", "plan_of", "rates_of", "write_explanation"]

LOSSES = ("cross-entropy", "squared")
_SITES = ("granularity", "include", "exclude")  # what says which sites there are


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
    local = name.startswith("hf:") and expanded(name.removeprefix("hf:")).is_dir()
    return "of the folder, random where it has none" if local else "random"


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _sites_as_in(found: Probe, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options; where they are silent, the run's own choice of sites."""
    chosen = dict(options)
    for key in _SITES:
        said = chosen.pop(key, None) or (getattr(found.run, key) if found.run is not None else None)
        if said:
            chosen[key] = said
    return chosen


# --- explanations ------------------------------------------------------------------------------------------


def explanation_of(
    name: str,
    source: Source,
    *,
    rates: str | None = None,
    budget: float | None = None,
    scale: str | None = None,
    head: str | None = None,
    noise: str | None = None,
    loss: str = LOSSES[0],
    **options: Any,
) -> Explanation:
    """What stochastic depth and noise in front of the head penalise in the model of a name, or of a run.

    Args:
        name: as in `fallow.integrations.loading.load_model`.
        source: its batches.
        rates: "linear", "uniform", or a file of rates or of a plan. Default: those of the run, else linear
            ones that meet the budget.
        budget: expected share of a dense step, for a rule of rates.
        scale: "train" or "eval". Default: the run's, else "train".
        head: name of the last linear layer. Default: it is found.
        noise: law of the masks in front of it, as `scheme_of` reads it. Default: that of the model's own
            noise. With one of these two a model that is no run needs no rates, and has that part alone.
        loss: "cross-entropy", or "squared": of the logits from the labels' indicators, a mean.
        **options: of `fallow.explain`.

    Raises:
        UsageError: no run, and no rates; FallowError: as in `probe` and `fallow.explain`.
    """
    scheme = None if noise is None else scheme_of(noise)
    check_choice("--loss", loss, LOSSES)
    headed = head is not None or noise is not None
    taken = _rates(name, rates, budget, headed)
    said = {key: options.pop(key) for key in _SITES if key in options}
    planned = _choice_of_plan(rates) if rates else {}
    chosen = planned | {key: value for key, value in said.items() if value}
    found = probe(name, source)
    made = explain(
        found.model,
        _loss(found, loss),
        found.batches,
        head=head,
        scheme=scheme,
        rates=taken,
        scale=scale or (found.run.scale if found.run is not None else None),
        max_batches=len(found.batches),
        seed=source.seed,
        **options,
        **_sites_as_in(found, chosen),
    )
    unsaid = "of the run" if found.run is not None and budget is None else "linear"
    about = {"rates": rates or ("none" if taken is None else unsaid)}
    given = {"budget": budget, "head": head, "noise": noise, "loss": None if loss == LOSSES[0] else loss}
    about |= {key: value for key, value in given.items() if value is not None}
    settings = made.settings | about | _settings(name, found, source)
    return replace(made, notes=(*made.notes, *found.notes), settings=settings)


def _loss(found: Probe, kind: str) -> Any:
    """The loss function of a kind."""
    if kind == LOSSES[0]:
        return found.loss_fn
    if found.data == TOKENS:
        raise UsageError("--loss squared is for labels of images: leave it out for language models")
    return _squared


def _squared(output: Any, target: Tensor) -> Tensor:
    """Mean squared distance from the labels' indicators."""
    logits = logits_of(output)
    return F.mse_loss(logits, F.one_hot(target, logits.shape[-1]).to(logits))


def _rates(name: str, rates: str | None, budget: float | None, headed: bool) -> Any:
    """A rule of rates, or a mapping; None where the noise is in front of the head."""
    if rates is None and budget is None:
        run = run_config(name)
        if run is None or "rates" not in run:
            if headed:
                return None
            raise UsageError(
                f"{name} is no run of fallow train, so the rates must be said: pass --rates plan.json (of "
                "fallow plan), or --budget for linear ones; for noise in front of the last linear layer, "
                "--noise blocks:8:0.9"
            )
        return rates_of(name)
    if rates == "sensemode":
        raise UsageError(
            "--rates sensemode needs a plan: make one with fallow plan --method sensemode, and pass its file"
        )
    return Config(rates=rates, budget=budget).settled().rule()


def _choice_of_plan(file: str) -> dict[str, Any]:
    """The granularity and the patterns of sites that a plan was made with."""
    try:
        settings = json.loads(expanded(file).read_text(encoding="utf-8"))["settings"]
        return {key: settings[key] for key in _SITES if settings.get(key)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write_explanation(found: Explanation, target: Path) -> None:
    """Write it as JSON, whole or not at all.

    Raises:
        RunError: the disk refused.
    """
    RunFolder(target.parent, "fallow explain").write_json(target.name, found.as_dict())


# --- rates -------------------------------------------------------------------------------------------------


def rates_of(run: str | Path) -> dict[str, float]:
    """The survival rates that a run was asked to take, by site.

    Raises:
        DataError: its results are missing or damaged.
    """
    path = expanded(run) / RESULTS
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

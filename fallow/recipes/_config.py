"""What a training run is asked to do: every option, its default, and the checks that need no data."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from fallow import rates, schedules
from fallow.data import NAMES
from fallow.errors import ArgumentError, UsageError, check_choice, check_count, check_rate, nearest
from fallow.models import MODELS
from fallow.paths import expanded
from fallow.planning.allocate import MINIMUM_RATE

PRESETS = ("huang", "adamw")
# 8x8 images gain little from a second thread, and on a busy machine lose thirtyfold: digits take one.
# Epochs and batch size: of the bundled digits, trained in a minute or two on two cores, and of other sets.
_DIGITS = (40, 64)
_OTHERS = (30, 128)
# Peak learning rate of "huang": with the digits' 21 steps an epoch, 0.1 is too much for a branch that rests.
_HUANG_RATE = {"digits": 0.02}
_CHOICES = {
    "preset": PRESETS,
    "mode": ("batch", "row"),
    "sampler": ("bernoulli", "exact"),
    "scale": ("train", "eval"),
    "grads": ("none", "zero"),
    "rows": ("window", "scattered"),
    "granularity": ("branch", "block"),
}
_AT_LEAST = {
    "epochs": 1,
    "batch_size": 2,
    "accumulate": 1,
    "threads": 1,
    "checkpoint_every": 1,
    "test_every": 1,
    "train_size": 1,
    "refresh": 1,
    "seed": 0,
}


def option(text: str, default: Any = None) -> Any:
    """A field of `Config` with the help text that its flag shows."""
    return field(default=default, metadata={"help": text})


class Surroundings(Protocol):
    """What the options of all kinds of runs say of images, device and draws."""

    @property
    def seed(self) -> int:
        """Of everything that is drawn."""
        ...

    @property
    def device(self) -> str:
        """Settled: cpu, cuda or cuda:N."""
        ...

    @property
    def threads(self) -> int | None:
        """CPU threads."""
        ...

    @property
    def batch_size(self) -> int | None:
        """Images to a step."""
        ...

    @property
    def augment(self) -> bool:
        """Whether training images are shifted and flipped."""
        ...

    @property
    def channels_last(self) -> bool:
        """The memory format of images and weights."""
        ...


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every option of a training run; the command line has a flag of the same name for each.

    None means "not said": `settled` replaces it by what follows from the other options.
    """

    data: str = option(f"Data set: {', '.join(NAMES)}.", "digits")
    data_dir: str | None = option("Folder that holds the data set's files.")
    train_size: int | None = option("Keep this many training images, drawn class by class.")
    image_size: int | None = option("Side to which the images of an imagefolder are brought [32].")
    model: str = option(f"Model: {', '.join(MODELS)}, timm:NAME or torchvision:NAME.", "resnet56")
    preset: str | None = option("Optimiser and its settings: huang or adamw [adamw for transformers].")
    epochs: int | None = option(f"Passes over the training images [digits {_DIGITS[0]}, else {_OTHERS[0]}].")
    batch_size: int | None = option(f"Images to a step [digits {_DIGITS[1]}, else {_OTHERS[1]}].")
    learning_rate: float | None = option("Peak learning rate [huang 0.1, for digits 0.02; adamw 0.001].")
    learning_rate_warmup: float | None = option(
        "Epochs of linear rise [digits a tenth, huang 0, adamw a twentieth]."
    )
    weight_decay: float | None = option("Weight decay [huang 0.0001, adamw 0.05].")
    label_smoothing: float = option("Label smoothing in [0, 1).", 0.0)
    augment: bool = option("Shift, and where the set allows it flip, the training images.", True)
    budget: float | None = option("Expected share of a dense step's FLOPs [0.75].")
    rates: str | dict[str, float] | None = option(
        "linear, uniform, a plan.json, or a JSON file site -> rate [linear]."
    )
    survival_rate: float | None = option("Survival rate of every site (uniform).")
    last: float | None = option("Survival rate of the last site (linear).")
    first: float | None = option("Survival rate of the first site (linear, with --last).")
    mean: float | None = option("Mean survival rate over the sites.")
    refresh: int | None = option("Epochs between new rates of sensemode [an eighth of the run].")
    minimum_rate: float | None = option("Smallest survival rate that sensemode gives [0.1].")
    mode: str = option("batch: a branch rests for the whole batch; row: for each image.", "batch")
    sampler: str = option(
        "bernoulli: independent draws; exact: the same rates at constant cost.", "bernoulli"
    )
    scale: str = option("train: z/p in training; eval: p z at evaluation (Huang).", "train")
    grads: str = option("What a rested branch's parameters get: none or zero.", "none")
    rows: str = option("Kept rows of the exact sampler: window or scattered.", "window")
    granularity: str = option("What rests together: branch or block.", "branch")
    schedule: str = option("constant, warmup:STEPS or decay:STEPS[:START].", "constant")
    include: tuple[str, ...] = option("Only sites that match this pattern; may be repeated.", ())
    exclude: tuple[str, ...] = option("Leave out sites that match this pattern; may be repeated.", ())
    twin: bool = option("Train the constant-depth twin too, step by step in turn.", True)
    autocast: bool = option("bfloat16 autocast.", False)
    channels_last: bool = option("channels_last memory format.", False)
    accumulate: int = option("Take each batch in this many pieces (less memory).", 1)
    device: str = option("auto, cpu, cuda or cuda:N.", "auto")
    threads: int | None = option("CPU threads [digits 1, else what torch takes].")
    seed: int = option("Seed of everything that is drawn.", 0)
    checkpoint_every: int | None = option("Steps between checkpoints [each epoch].")
    test_every: int | None = option("Epochs between test errors, for a curve [at the end alone].")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Config:
        """A configuration from names and values; lists become tuples, unknown names are refused."""
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                close = nearest(name, known)
                hint = f"; did you mean {close}?" if close else ""
                raise ArgumentError(f"a run has no option {name}{hint}")
        values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in given.items()}
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return json.loads(json.dumps(asdict(self)))

    def settled(self) -> Config:
        """The same with everything said and checked, as far as that needs no data and no model.

        Raises:
            UsageError: a value or a combination that cannot be.
            RateError: a rate or a budget outside (0, 1].
        """
        digits = self.data == "digits"
        preset = self.preset or ("adamw" if "vit" in self.model else "huang")
        epochs = (_DIGITS if digits else _OTHERS)[0] if self.epochs is None else self.epochs
        full = replace(
            self,
            data_dir=None if self.data_dir is None else str(expanded(self.data_dir).absolute()),
            preset=preset,
            epochs=epochs,
            batch_size=(_DIGITS if digits else _OTHERS)[1] if self.batch_size is None else self.batch_size,
            threads=_or(self.threads, 1 if digits else torch.get_num_threads()),
            device=device_of(self.device),
            **_settled_rates(self),
            **_settled_sensemode(self, epochs),
        )
        _check(full)
        sgd = preset == "huang"
        rise = epochs / 10 if digits else 0.0 if sgd else epochs / 20
        return replace(
            full,
            learning_rate=_or(self.learning_rate, _HUANG_RATE.get(self.data, 0.1) if sgd else 1e-3),
            learning_rate_warmup=_or(self.learning_rate_warmup, rise),
            weight_decay=_or(self.weight_decay, 1e-4 if sgd else 0.05),
        )

    def rule(self) -> Any:
        """The rate rule; of a settled configuration."""
        if isinstance(self.rates, dict):
            return rates.explicit(self.rates)
        if self.rates == "sensemode":  # where nothing is known yet
            return rates.uniform(budget=self.budget)
        if self.rates == "uniform":
            return rates.uniform(self.survival_rate, mean=self.mean, budget=self.budget)
        return rates.linear(self.last, first=self.first, mean=self.mean, budget=self.budget)

    def schedule_over_steps(self) -> Any:
        """The schedule object; None where it is constant."""
        kind, _, numbers = self.schedule.partition(":")
        parts = numbers.split(":") if numbers else []
        if kind == "constant" and not parts:
            return None
        takes = {"warmup": 1, "decay": 2}.get(kind, 0)
        if not takes or not 1 <= len(parts) <= takes or not all(part.isdigit() for part in parts):
            raise UsageError(
                f'schedule must be constant, warmup:STEPS or decay:STEPS[:START], got "{self.schedule}"'
            )
        make = schedules.warmup if kind == "warmup" else schedules.decay
        return make(*map(int, parts))


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def device_of(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not (kind == "cuda" and number.isdigit())):
        raise UsageError(f'device must be auto, cpu, cuda or cuda:N, got "{name}"')
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device {name} is not there: torch sees {torch.cuda.device_count()} CUDA devices; "
            "take --device auto"
        )
    return name


def _settled_rates(config: Config) -> dict[str, Any]:
    """The rule's name or mapping, and the budget where nothing else was said; refuses what contradicts."""
    numbers = ("budget", "survival_rate", "last", "first", "mean")
    given = [name for name in numbers if getattr(config, name) is not None]
    for name in given:
        check_rate(getattr(config, name), name=_flag(name))
    if config.rates not in (None, "linear", "uniform", "sensemode"):
        if given:
            raise UsageError(f"--rates from a file gives every rate: leave out {_flag(given[0])}")
        return {"rates": _mapping(config.rates)}
    rule = config.rates or ("uniform" if "survival_rate" in given else "linear")
    allowed = {
        "uniform": ("budget", "mean", "survival_rate"),
        "linear": ("budget", "mean", "last", "first"),
        "sensemode": ("budget",),
    }[rule]
    for name in given:
        if name not in allowed:
            raise UsageError(
                f"{_flag(name)} does not go with {rule} rates, which take "
                f"{'one of ' if len(allowed) > 1 else ''}"
                f"{', '.join(_flag(n) for n in allowed if n != 'first')}"
            )
    if "first" in given and "last" not in given:
        raise UsageError("--first goes with --last: linear rates need both ends")
    chosen = [name for name in given if name != "first"]
    if len(chosen) > 1 or ("first" in given and chosen != ["last"]):
        both = " and ".join(map(_flag, given))
        raise UsageError(f"{both} cannot go together, each settles the rates alone: pass one of them")
    return {"rates": rule, "budget": config.budget if chosen else 0.75}


def _settled_sensemode(config: Config, epochs: int) -> dict[str, Any]:
    if config.rates != "sensemode":
        for name in ("refresh", "minimum_rate"):
            if getattr(config, name) is not None:
                raise UsageError(f"{_flag(name)} goes with --rates sensemode alone")
        return {}
    least = check_rate(_or(config.minimum_rate, MINIMUM_RATE), name="--minimum-rate")
    return {"refresh": _or(config.refresh, max(epochs // 8, 1)), "minimum_rate": least}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _mapping(source: str | Mapping[str, float] | None) -> dict[str, float]:
    if isinstance(source, Mapping):
        return dict(source)
    path = expanded(str(source))
    if not path.is_file():
        raise UsageError(
            f"--rates must be linear, uniform, sensemode or a JSON file, got {source}: there is no such file"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not a JSON file of survival rates ({error})") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path} must hold one JSON mapping from site name to survival rate")
    return _planned(found, path) if found.get("kind") == "plan" else found


def _planned(plan: Mapping[str, Any], path: Path) -> dict[str, float]:
    """The rates of a plan's file, by site."""
    try:
        return {str(site["name"]): site["rate"] for site in plan["sites"]}
    except (KeyError, TypeError):
        raise UsageError(
            f"{path} is the file of a plan without sites and rates: write it anew with fallow plan"
        ) from None


def _check(config: Config) -> None:
    """Refuse single values that cannot be, each by the name of its flag."""
    for name, allowed in _CHOICES.items():
        check_choice(_flag(name), getattr(config, name), allowed)
    if config.data not in NAMES:
        check_choice("--data", config.data, NAMES)
    if config.model not in MODELS and not config.model.startswith(("timm:", "torchvision:")):
        close = nearest(config.model, MODELS)
        hint = f"; did you mean {close}?" if close else ""
        listed = f"{', '.join(MODELS)}, timm:NAME or torchvision:NAME"
        raise UsageError(f"--model must be {listed}, got {config.model}{hint}")
    for name, least in _AT_LEAST.items():
        value = getattr(config, name)
        if value is not None:
            check_count(_flag(name), value, least)
    if config.batch_size is not None and config.accumulate > config.batch_size // 2:
        raise UsageError(
            f"--accumulate {config.accumulate} leaves pieces of less than two images of a batch of "
            f"{config.batch_size}: take at most {config.batch_size // 2}"
        )
    for name in ("learning_rate", "learning_rate_warmup", "weight_decay", "label_smoothing"):
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise UsageError(f"{_flag(name)} must be a number of at least 0, got {value}")
    if config.label_smoothing >= 1:
        raise UsageError(f"--label-smoothing must be below 1, got {config.label_smoothing}")
    if config.learning_rate == 0:
        raise UsageError("--learning-rate must be above 0")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "a run is one process: start it without torchrun, or use fallow.apply in a loop of your own"
        )
    config.schedule_over_steps()
    config.rule()

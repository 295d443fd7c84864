"""What a sparsification is asked to do: every option, its default, and the checks that need no data."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from fallow.data import NAMES
from fallow.errors import ArgumentError, FallowError, UsageError, check_choice, check_count, nearest
from fallow.models import FEEDFORWARD, MODELS
from fallow.paths import expanded
from fallow.penalties.registry import NAMES as PENALTIES
from fallow.penalties.registry import penalty
from fallow.penalties.separable import Separable
from fallow.recipes._config import device_of, option
from fallow.sparsity.control import CONTROLS
from fallow.sparsity.methods import METHODS
from fallow.sparsity.noisy import NOISY
from fallow.sparsity.weights import GROUPS

OPTIMISERS = ("adam", "sgd")
MAGNITUDE = "magnitude"
_SINGLE = [name for name, entry in PENALTIES.items() if entry.separable and name != "vectorard"]
_AT_LEAST = {
    "epochs": 1,
    "batch_size": 2,
    "multiple": 1,
    "threads": 1,
    "checkpoint_every": 1,
    "train_size": 1,
    "seed": 0,
}
_LISTED = f"{', '.join((*FEEDFORWARD, *MODELS))}, timm:NAME, torchvision:NAME or the folder of a run"


@dataclass(frozen=True, kw_only=True)
class SparseConfig:
    """Every option of `fallow sparsify`; the command line has a flag of the same name for each."""

    data: str = option(f"Data set: {', '.join(NAMES)}.", "digits")
    data_dir: str | None = option("Folder that holds the data set's files.")
    train_size: int | None = option("Keep this many training images, drawn class by class.")
    image_size: int | None = option("Side to which the images of an imagefolder are brought [32].")
    model: str = option(f"Model: {_LISTED}.", "lenet300")
    weights: str | None = option("Local .safetensors or .pt file to begin with [random; the run's].")
    strategy: str | None = option(
        f"Penalty or strategy, NAME or NAME:KEY=VALUE,...: {MAGNITUDE}, {', '.join(_SINGLE)} "
        "[logsum; of method calibrated vardrop].",
    )
    strength: float | None = option(
        "What the penalty is multiplied by [1e-4; of methods calibrated and variational 1]."
    )
    method: str = option(f"How it acts: {', '.join(METHODS)}.", "gradient")
    groups: str = option("What lives or dies together: weights, outputs, inputs, heads or N:M.", "weights")
    target: float | None = option("Share of the weights to be zero [what the survival rates say].")
    control: str = option(f"How a target is reached: {' or '.join(CONTROLS)}.", "ramp")
    ramp_begin: float = option("Part of the training at which the ramp begins.", 0.1)
    ramp_end: float = option("Part of the training at which the target is reached.", 0.7)
    multiple: int = option("With a target of outputs or inputs: how many of a layer go at a time.", 1)
    cut: float = option("Without a target: the survival rate below which a weight is zero.", 0.05)
    include: tuple[str, ...] = option("Only weights that match this pattern; may be repeated.", ())
    exclude: tuple[str, ...] = option("Leave out weights that match this pattern; may be repeated.", ())
    epochs: int = option("Passes over the training images.", 20)
    batch_size: int = option("Images to a step.", 128)
    optimiser: str = option("adam or sgd, with a learning rate that falls linearly to zero.", "adam")
    learning_rate: float | None = option(
        f"First learning rate [adam 0.001, of {', '.join(FEEDFORWARD)} 0.003; sgd 0.05]."
    )
    weight_decay: float = option("Weight decay.", 0.0)
    augment: bool = option("Shift, and where the set allows it flip, the training images.", False)
    channels_last: bool = option("channels_last memory format.", False)
    device: str = option("auto, cpu, cuda or cuda:N.", "auto")
    threads: int | None = option("CPU threads [what torch takes].")
    seed: int = option("Seed of everything that is drawn.", 0)
    checkpoint_every: int | None = option("Steps between checkpoints [each epoch].")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> SparseConfig:
        """A configuration from names and values; lists become tuples, unknown names are refused."""
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                close = nearest(name, known)
                hint = f"; did you mean {close}?" if close else ""
                raise ArgumentError(f"a sparsification has no option {name}{hint}")
        values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in given.items()}
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return json.loads(json.dumps(asdict(self)))

    def settled(self) -> SparseConfig:
        """The same with everything said and checked, as far as that needs no data and no model.

        Raises:
            UsageError: a value or a combination that cannot be.
        """
        adam = 3e-3 if self.model in FEEDFORWARD else 1e-3
        rate = {"adam": adam, "sgd": 0.05}.get(self.optimiser)
        default = "vardrop" if self.method == "calibrated" else "logsum"
        strategy = None if owns_penalty(self.method) else default
        strength = 1.0 if self.method in ("calibrated", "variational") else 1e-4
        full = replace(
            self,
            data_dir=None if self.data_dir is None else str(expanded(self.data_dir).absolute()),
            strategy=strategy if self.strategy is None else self.strategy,
            strength=strength if self.strength is None else self.strength,
            learning_rate=rate if self.learning_rate is None else self.learning_rate,
            device=device_of(self.device),
        )
        _check(full)
        return full

    def penalty(self) -> Any:
        """The strategy as `fallow.sparsify` takes it; of a configuration that was settled."""
        if self.strategy is None or self.strategy == MAGNITUDE:
            return self.strategy
        return strategy_of(self.strategy)


def owns_penalty(method: str) -> bool:
    """Whether a method's noise says what is penalised, so that there is no strategy to choose."""
    return method in NOISY and NOISY[method].owns


def strategy_of(text: str) -> Any:
    """A penalty from ``NAME`` or ``NAME:KEY=VALUE,...``.

    Raises:
        UsageError: an unknown name or parameter, a value that it cannot have, a penalty of whole vectors.

    Examples:
        >>> strategy_of("logsum:eps=0.5")
        LogSum(eps=0.5)
    """
    name, _, rest = text.partition(":")
    values: dict[str, float | int] = {}
    for part in rest.split(",") if rest else ():
        key, _, value = part.partition("=")
        number = _number(value.strip())
        if number is None or not key.strip():
            raise UsageError(f"--strategy takes NAME:KEY=VALUE,... with numbers, got {part!r} in {text!r}")
        values[key.strip()] = number
    try:
        found = penalty(name, **values)
    except FallowError as error:
        raise UsageError(f"--strategy {text}: {error}") from None
    if not isinstance(found, Separable):
        raise UsageError(
            f"--strategy {text} is a penalty of whole vectors: take one of single weights, "
            f"{', '.join(_SINGLE)}, or {MAGNITUDE}, which keeps the largest"
        )
    return found


def _number(text: str) -> float | int | None:
    """A number, whole where it is written so; None where it is none."""
    try:
        return int(text) if re.fullmatch(r"[-+]?\d+", text) else float(text)
    except ValueError:
        return None


def _check(config: SparseConfig) -> None:
    """Refuse single values that cannot be, each by the name of its flag."""
    if config.data not in NAMES:
        check_choice("--data", config.data, NAMES)
    check_choice("--method", config.method, METHODS)
    check_choice("--control", config.control, CONTROLS)
    check_choice("--optimiser", config.optimiser, OPTIMISERS)
    for name, least in _AT_LEAST.items():
        value = getattr(config, name)
        if value is not None:
            check_count("--" + name.replace("_", "-"), value, least)
    for name in ("strength", "learning_rate", "weight_decay"):
        value = getattr(config, name)
        if not (math.isfinite(value) and value >= 0):
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} must be a number of at least 0, got {value}")
    if not 0 <= config.cut < 1:
        raise UsageError(f"--cut must be a survival rate in [0, 1), got {config.cut}")
    if owns_penalty(config.method) and config.strategy is not None:
        raise UsageError(f"--method {config.method} has a penalty of its own: leave out --strategy")
    if config.learning_rate == 0:
        raise UsageError("--learning-rate must be above 0")
    _check_target(config)
    config.penalty()


def _check_target(config: SparseConfig) -> None:
    """Refuse groups, targets and ramps that cannot be or that contradict each other."""
    blocks = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", config.groups)
    if blocks is None:
        check_choice("--groups", config.groups, (*GROUPS, "N:M"))
    elif int(blocks[1]) >= int(blocks[2]):
        raise UsageError(f"--groups N:M keeps N of M neighbours, N below M, got {config.groups}")
    elif config.target is not None:
        raise UsageError(
            f"--groups {config.groups} says how many weights are zero, "
            f"{1 - int(blocks[1]) / int(blocks[2]):.4g} of them: leave out --target"
        )
    if config.target is not None and not 0 < config.target < 1:
        raise UsageError(
            f"--target is the share of the weights to be zero, between 0 and 1, got {config.target}"
        )
    if not 0 <= config.ramp_begin <= config.ramp_end <= 1:
        raise UsageError(
            "--ramp-begin and --ramp-end are parts of the training, 0 <= begin <= end <= 1, got "
            f"{config.ramp_begin} and {config.ramp_end}"
        )
    if config.multiple > 1 and (config.target is None or config.groups not in ("outputs", "inputs")):
        raise UsageError(f"--multiple {config.multiple} needs --groups outputs or inputs, and a --target")
    if config.method == "targeted" and config.target is None:
        raise UsageError("--method targeted needs --target: nothing else says how many weights go")
    if config.method == "targeted" and config.control == "strength":
        raise UsageError("--method targeted has no strength to control: leave out --control")
    if config.strategy == MAGNITUDE and config.target is None and blocks is None:
        raise UsageError(
            f"--strategy {MAGNITUDE} needs --target, the share of weights to be zero: nothing else says how "
            "many go"
        )
    if config.control == "strength" and config.target is None and blocks is None:
        raise UsageError("--control strength follows a target: pass --target, the share to be zero")
    if config.control == "strength" and config.strategy == MAGNITUDE:
        raise UsageError(f"--strategy {MAGNITUDE} has no strength to control: leave out --control")

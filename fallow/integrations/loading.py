"""From a name to a model: ours, timm's, torchvision's, transformers', or one of a run of fallow.

Nothing is downloaded: weights are random, or come from a local file.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fallow import models
from fallow.errors import DataError, UsageError, nearest, need
from fallow.integrations import _hugging_face
from fallow.integrations._weights import put_weights, read_weights
from fallow.integrations.torchvision import mend_torchvision, need_timm
from fallow.paths import expanded

__all__ = ["SPARSIFY", "channels_taken", "inputs_taken", "load_model", "run_config", "side_taken"]

SOURCES = ("timm:", "torchvision:", "hf:")
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
SPARSIFY = "sparsify"  # the recipe of a run that has no survival rates
_COLOUR = 3
# These would return a tuple while training.
_PLAIN = {"googlenet": {"init_weights": True}, "inception_v3": {"init_weights": True}}


def load_model(
    name: str,
    *,
    classes: int,
    channels: int,
    image: int | tuple[int, int],
    weights: str | Path | None = None,
    seed: int = 0,
) -> nn.Module:
    """The model of a name, on the CPU.

    Args:
        name: one of `fallow.models.MODELS` or `FEEDFORWARD`; timm:NAME; torchvision:NAME, a classifier;
            hf:CONFIG, where CONFIG is a local folder or config.json, a model type or a configuration class;
            or the folder of a run.
        classes: outputs. A language model has its own.
        channels: of the images; torchvision's models and transformers' configurations have their own
            (`channels_taken`).
        image: side of the images or (height, width); only our transformer is built for it.
        weights: a local .safetensors or .pt file with the whole state dict. Default: those of the run or of
            the folder of transformers, else random ones.
        seed: of random weights; the same seed gives the same ones, and the global generator stays as it is.

    Raises:
        UsageError: an unknown name (the nearest is suggested), sizes the model cannot take, weights that do
            not fit.
        DataError: a file of weights that is missing or damaged.
        MissingExtra: the library that has the model is not installed.

    Examples:
        >>> model = load_model("resnet20", classes=10, channels=1, image=8)
        >>> sum(p.numel() for p in model.parameters())
        269434
    """
    run = run_config(name)
    if run is not None:
        weights = Path(name) / _WEIGHTS if weights is None else weights
        name = str(run["model"])
        if not expanded(weights).is_file():
            raise DataError(
                f"the run has no weights {weights} yet: bring it to its end with fallow "
                f"{run.get('recipe', 'train')} --resume"
            )
    with _drawn_from(seed):
        model = _make(name, classes, channels, image)
    if weights is not None:
        put_weights(model, read_weights(weights), str(weights))
    return model


def _make(name: str, classes: int, channels: int, image: int | tuple[int, int]) -> nn.Module:
    source, _, rest = name.partition(":")
    if f"{source}:" not in SOURCES:
        return _own(name, classes, channels, image)
    if source == "timm":
        return _of_timm(rest, classes, channels)
    if source == "torchvision":
        return _of_torchvision(rest, classes, channels)
    return _hugging_face.build(rest, classes)


def _own(name: str, classes: int, channels: int, image: int | tuple[int, int]) -> nn.Module:
    known = {**models.MODELS, **models.FEEDFORWARD}
    if name not in known:
        if (expanded(name) / _CONFIG).is_file():
            raise UsageError(f"{name} is not the folder of a run: for one of transformers say hf:{name}")
        listed = f"{', '.join(known)}, {', '.join(s + 'NAME' for s in SOURCES)} or the folder of a run"
        source, colon, _ = name.partition(":")
        close = nearest(source + colon, SOURCES if colon else known)
        hint = f"; did you mean {close}?" if close else ""
        raise UsageError(f"the model must be {listed}, got {name}{hint}")
    return models.build(name, classes=classes, channels=channels, image=image)


def _of_timm(name: str, classes: int, channels: int) -> nn.Module:
    timm = need_timm()
    if not timm.is_model(name.partition(".")[0]):  # else a name on a hub would be looked up there
        close = nearest(name, timm.list_models())
        hint = f"did you mean timm:{close}?" if close else "timm.list_models() lists them."
        raise UsageError(f"timm cannot make the model {name}: it has none of that name; {hint}")
    try:
        return timm.create_model(name, num_classes=classes, in_chans=channels)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"timm cannot make the model {name}: {_line(error)}") from None


def _of_torchvision(name: str, classes: int, channels: int) -> nn.Module:
    mend_torchvision()
    library = need("torchvision.models", "models")
    known = library.list_models(module=library)
    if name not in known:
        close = nearest(name, known)
        hint = f"did you mean torchvision:{close}?" if close else f"it has {', '.join(known[:5])}, ..."
        raise UsageError(f"torchvision has no classifier {name}: {hint}")
    if channels != _COLOUR:
        raise UsageError(
            f"torchvision:{name} takes images of three channels, got {channels}: repeat the channel"
        )
    plain = {"aux_logits": False, **_PLAIN[name]} if name in _PLAIN else {}
    return library.get_model(name, weights=None, num_classes=classes, **plain)


# --- what a model takes ------------------------------------------------------------------------------------


def inputs_taken(name: str) -> str:
    """What its inputs are: "images", or of a language model of transformers "tokens" or "masked tokens"."""
    if name.startswith("hf:"):
        return _hugging_face.takes(_hugging_face.read_config(name.removeprefix("hf:")))
    return "images"


def channels_taken(name: str, channels: int, weights: str | Path | None = None) -> int:
    """Channels of the images that a model of this name takes where the images at hand have `channels`.

    Ours and timm's are built for the images, unless the weights come from a file whose first convolution has
    three.
    """
    if name.startswith("torchvision:"):
        return _COLOUR
    if name.startswith("hf:"):
        config = _hugging_face.read_config(name.removeprefix("hf:"))
        return int(getattr(config, "num_channels", None) or _COLOUR)
    if weights is not None and channels != _COLOUR:
        shapes = (value.shape for value in _four_sided(read_weights(weights)))
        return _COLOUR if any(shape[1] == _COLOUR for shape in shapes) else channels
    return channels


def _four_sided(weights: Mapping[str, Tensor]) -> list[Tensor]:
    return [value for value in weights.values() if value.dim() == 4]


def side_taken(model: nn.Module) -> int | None:
    """Side of the only images a model of another library takes; None where it takes any, or does not say."""
    config = getattr(model, "config", None)
    card = getattr(model, "default_cfg", None) or {}
    side = getattr(config, "image_size", None) or getattr(model, "image_size", None)
    if side is None and card.get("fixed_input_size"):
        side = card["input_size"]
    if isinstance(side, (list, tuple)):
        side = side[-1]
    return int(side) if isinstance(side, int) else None


def run_config(folder: str | Path) -> dict[str, Any] | None:
    """The configuration of a run's folder; None for what is no such folder, or the name of a model.

    One of `fallow sparsify` has its "recipe", and as "model" the network's own name whatever it began with.

    Raises:
        DataError: there is one that cannot be read.
    """
    path = expanded(folder) / _CONFIG
    if str(folder) in models.MODELS or str(folder).startswith(SOURCES) or not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): restore it") from None
    if not isinstance(found, dict) or not {"model", "data"} <= found.keys():
        return None
    if "network" in found:
        return {**found, "model": found["network"]} if found.get("recipe") == SPARSIFY else None
    return found if "rates" in found else None


@contextlib.contextmanager
def _drawn_from(seed: int) -> Iterator[None]:
    """The CPU's generator starts at a seed, and afterwards goes on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

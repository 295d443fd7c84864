"""Weights out of a local file, and whether they fit."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fallow.errors import DataError, UsageError, need
from fallow.paths import expanded

_NESTED = ("state_dict", "model")  # where training scripts keep the weights inside their checkpoints
_NAMED = 3  # keys that a message names of each kind


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors file or in one that torch.save wrote; nothing in it is executed.

    Raises:
        DataError: it is missing, damaged, or holds something else than tensors by name.
        MissingExtra: safetensors is not installed.
    """
    path = expanded(path)
    if not path.is_file():
        raise DataError(
            f"there is no file of weights {path}: name a local .safetensors or .pt file, none is downloaded"
        )
    found = _safe(path) if path.suffix == ".safetensors" else _pickled(path)
    for key in _NESTED:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise DataError(f"{path} does not hold tensors by name: save model.state_dict() there")
    return {str(name): value for name, value in found.items()}


def _safe(path: Path) -> object:
    error = need("safetensors", "lab").SafetensorError
    try:
        return need("safetensors.torch", "lab").load_file(path)
    except (error, OSError, ValueError) as reason:
        raise DataError(f"{path} is not a whole .safetensors file ({reason}): restore a copy") from None


def _pickled(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise DataError(
            f"{path} holds more than weights, or none, and is not opened: save model.state_dict() with "
            "torch.save or as .safetensors"
        ) from None
    except Exception as reason:  # unpickling broken bytes may raise anything
        raise DataError(f"{path} cannot be read ({_line(reason)}): restore a copy") from None


def put_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into a model, all of them.

    Raises:
        UsageError: keys that are missing, unknown or of another shape; the model is left as it was.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in weights]
    unknown = [key for key in weights if key not in own]
    misfits = [
        f"{key} {tuple(weights[key].shape)} for {tuple(own[key].shape)}"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    refuse_misfits(source, missing, unknown, misfits)
    model.load_state_dict(dict(weights))


def refuse_misfits(source: str, missing: list[str], unknown: list[str], misfits: list[str]) -> None:
    """Raise UsageError where any of the lists holds something, with the first of each."""
    found = [("missing", missing), ("not in the model", unknown), ("of another shape", misfits)]
    words = [f"{len(keys)} {what} ({_some(keys)})" for what, keys in found if keys]
    if words:
        raise UsageError(
            f"the weights of {source} do not fit the model: {'; '.join(words)}. Take the model, classes and "
            "channels they were trained with"
        )


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:_NAMED]) + (", ..." if len(keys) > _NAMED else "")


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

"""Models of Hugging Face's transformers from a configuration; nothing is downloaded."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fallow.errors import UsageError, nearest, need
from fallow.integrations._weights import refuse_misfits
from fallow.integrations.torchvision import need_transformers
from fallow.paths import expanded

_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# What a configuration makes, the first that it can: head, mapping's name, what the model takes.
_HEADS = (
    ("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING", "images"),
    ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING", "masked tokens"),
    ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING", "tokens"),
)


def read_config(source: str) -> Any:
    """The configuration that a text names.

    Args:
        source: a local folder with a config.json, such a file, a model type ("vit", "gpt2") or the name of a
            configuration class ("ViTConfig"); the last two give that class's defaults.

    Raises:
        UsageError: nothing local of that name; a name on a hub is refused.
        MissingExtra: transformers is not installed.
    """
    auto = need_transformers().AutoConfig
    path = expanded(source)
    if (path / "config.json").is_file() or (path.is_file() and path.suffix == ".json"):
        try:
            with _quietly():
                return auto.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # whatever a file that is no configuration may lead to
            raise UsageError(f"{path} holds no configuration of transformers ({_line(error)})") from None
    kinds = _kinds()
    kind = source if source in kinds else next((k for k, name in kinds.items() if name == source), None)
    if kind is None:
        raise UsageError(_unknown(source, path, kinds))
    return auto.for_model(kind)


def _kinds() -> dict[str, str]:
    """Model type to the name of its configuration class."""
    need_transformers()
    return dict(need("transformers.models.auto.configuration_auto", "models").CONFIG_MAPPING_NAMES)


def _unknown(source: str, path: Path, kinds: dict[str, str]) -> str:
    if path.is_dir():
        return f"{path} holds no config.json: name a folder that save_pretrained wrote"
    if "/" in source:
        return (
            f"there is no folder {source}, and fallow downloads nothing: hf: takes a local folder with a "
            "config.json, or a model type such as hf:vit"
        )
    close = nearest(source, [*kinds, *kinds.values()])
    hint = f"did you mean hf:{close}?" if close else "name a local folder, or a type such as hf:vit, hf:gpt2."
    return f"transformers has no model type or configuration {source}: {hint}"


def takes(config: Any) -> str:
    """What the model of a configuration takes: "images", "masked tokens" or "tokens".

    Raises:
        UsageError: transformers has neither an image classifier nor a language model for it.
    """
    return _head(config)[1]


def _head(config: Any) -> tuple[Any, str]:
    transformers = need_transformers()
    for head, mapping, inputs in _HEADS:
        if type(config) in getattr(transformers, mapping):
            return getattr(transformers, head), inputs
    raise UsageError(
        f"transformers makes neither an image classifier nor a language model of {type(config).__name__}: "
        "load the model yourself and call fallow.plan"
    )


def build(source: str, classes: int) -> nn.Module:
    """The model of a configuration, with the weights beside it where it is a folder that has them.

    Raises:
        UsageError: as in `read_config`, a model too large for this machine, or weights that do not fit.
    """
    config = read_config(source)
    head, inputs = _head(config)
    if inputs == "images":
        config.num_labels = classes
    if hasattr(config, "use_cache"):
        config.use_cache = False  # training keeps no keys and values of earlier calls
    folder = expanded(source)
    try:
        with _quietly():
            _refuse_too_large(head, config, source)
            if any((folder / name).is_file() for name in _WEIGHTS):
                return _trained(head, config, folder)
            return head.from_config(config)
    except UsageError:
        raise
    except Exception as error:  # configurations can be wrong in as many ways as there are models
        raise UsageError(f"transformers cannot make the model of {source}: {_line(error)}") from None


def _trained(head: Any, config: Any, folder: Path) -> nn.Module:
    model, found = head.from_pretrained(
        str(folder),
        config=config,
        local_files_only=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,  # they are refused below, with their names
        output_loading_info=True,
        dtype=torch.float32,
    )
    misfits = [f"{key} {tuple(got)} for {tuple(own)}" for key, got, own in sorted(found["mismatched_keys"])]
    refuse_misfits(str(folder), sorted(found["missing_keys"]), [], misfits)
    return model


def _refuse_too_large(head: Any, config: Any, source: str) -> None:
    """The defaults of many a type are models of billions of weights, and a process that asks is killed."""
    try:
        with torch.device("meta"):
            size = sum(p.numel() * 4 for p in head.from_config(config).parameters())
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except Exception:  # not every model can be made without memory, not every system says what it has
        return
    if size > memory / 2:
        raise UsageError(
            f"the model of {source} has {size / 1e9:.1f} GB of weights, this machine {memory / 1e9:.1f} GB "
            "of memory: name a folder with a smaller configuration"
        )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """No notes and no progress bars of transformers; the misfits are reported as errors."""
    logging = need_transformers().utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

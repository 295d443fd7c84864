"""A model by its name, with a few batches and a loss to try it on: what `plan` and `explain` need."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fallow import data as sets
from fallow.data import Dataset, augment
from fallow.errors import FallowError, RunError, UsageError, check_count
from fallow.feed import call_model
from fallow.integrations.loading import (
    SPARSIFY,
    channels_taken,
    inputs_taken,
    load_model,
    run_config,
    side_taken,
)
from fallow.recipes._batches import generator, seed_of
from fallow.recipes._config import Config, device_of
from fallow.recipes._job import images
from fallow.recipes._run import WEIGHTS
from fallow.recipes._sparse_config import SparseConfig

TOKENS = "tokens"
_LENGTH = 32  # tokens of a row
_MASKED = 0.15  # share of tokens that a masked language model has to find, as in BERT
_IGNORED = -100  # the target that torch's cross entropy leaves out


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the batches come from.

    Attributes:
        data: name of a data set, or "tokens". Default: the run's, digits, or for a language model tokens.
        data_dir: folder with its files.
        resize: side to which images are brought. Default: what the model takes, else as they are.
        batches: how many.
        batch_size: rows of each.
        weights: local file of weights in place of random ones or the run's.
        device: where the model goes, as in `fallow train`.
        seed: of random weights, of the choice of images and of random tokens.
    """

    data: str | None = None
    data_dir: str | None = None
    resize: int | None = None
    batches: int = 4
    batch_size: int = 32
    weights: str | None = None
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("--batches", self.batches, 1)
        check_count("--batch-size", self.batch_size, 1)
        check_count("--seed", self.seed, 0)
        if self.resize is not None:
            check_count("--resize", self.resize, 1)


@dataclass(frozen=True)
class Probe:
    """A model with batches and a loss.

    Attributes:
        model: on its device.
        loss_fn: mean cross entropy of the classes, or of the tokens.
        batches: (inputs, target) each.
        notes: what to know about them, in words.
        data: what they are, in a word.
        run: the configuration of the run that the model comes from; None where it comes from a name.
    """

    model: nn.Module
    loss_fn: Callable[[Any, Tensor], Tensor]
    batches: list[tuple[Any, Tensor]]
    notes: tuple[str, ...]
    data: str
    run: Config | None = None


def probe(name: str, source: Source) -> Probe:
    """The model of a name, or of a run's folder, with batches for it.

    Raises:
        FallowError: of `load_model` and of `fallow.data.load`.
        UsageError: data that do not go with the model.
    """
    run = run_config(name)
    if run is None and inputs_taken(name) != "images":
        return _of_tokens(name, source)
    if source.data == TOKENS:
        raise UsageError(f"--data tokens is for language models such as hf:gpt2, and {name} takes images")
    config = None if run is None else _of_run(name, run, source)
    weights = source.weights
    if weights is None and isinstance(config, SparseConfig) and (Path(name) / WEIGHTS).is_file():
        weights = str(Path(name) / WEIGHTS)  # it may have begun from those of colour images
    chosen = _dataset(source, name) if config is None else images(config, weights)
    model = load_model(
        name,
        classes=chosen.classes,
        channels=chosen.channels,
        image=source.resize or chosen.size,
        weights=source.weights,
        seed=seed_of(source.seed, "weights"),
    )
    notes = [note for note in chosen.notes if "repeated" in note]
    side = source.resize or (side_taken(model) if config is None else None)
    size = chosen.size if side is None else (side, side)
    if size != chosen.size:
        notes.append(f"the images are resized from {_by(chosen.size)} to {_by(size)}")
    found = list(_batches(chosen, _places(chosen, config, source), source.batch_size, size))
    if len(found) < source.batches:
        notes.append(f"there are images for {len(found)} of the {source.batches} batches")
    model = model.to(device_of(source.device))
    _try(model, name, found[0][0])
    trained = config if isinstance(config, Config) else None
    return Probe(model, _of_classes, found, tuple(notes), chosen.name, trained)


# --- images ------------------------------------------------------------------------------------------------


def _of_run(name: str, run: dict[str, Any], source: Source) -> Config | SparseConfig:
    if source.data is not None:
        raise UsageError(f"the run {name} has its own data set, {run['data']}: leave out --data")
    config: Any
    if run.get("recipe") == SPARSIFY:
        asked = {key: value for key, value in run.items() if key not in ("recipe", "network")}
        config = SparseConfig.of({**asked, "weights": None})
    else:
        config = Config.of(run)
    return replace(config, data_dir=source.data_dir or config.data_dir, device="cpu").settled()


def _dataset(source: Source, name: str) -> Dataset:
    chosen = source.data or "digits"
    size = source.resize if chosen == "imagefolder" else None
    found = sets.load(chosen, source.data_dir, size=size)
    return found.with_channels(channels_taken(name, found.channels, source.weights))


def _places(dataset: Dataset, config: Config | SparseConfig | None, source: Source) -> Tensor:
    """Which training images, in an order of the seed; of a run none that it validates on."""
    train = torch.arange(len(dataset.train_y))
    if config is not None:
        train = dataset.split_validation(0.1, config.seed)[0]
    order = torch.randperm(len(train), generator=generator(source.seed, "probe"))
    return train[order[: source.batches * source.batch_size]]


def _batches(
    dataset: Dataset, places: Tensor, rows: int, size: tuple[int, int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised images and their labels."""
    for chosen in places.split(rows):
        x = augment.normalise(dataset.train_x[chosen], dataset.mean, dataset.std)
        if size != dataset.size:
            x = F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
        yield x.contiguous(), dataset.train_y[chosen]


def _try(model: nn.Module, name: str, inputs: Tensor) -> None:
    """One small forward: whether the model takes images of this size, and gives numbers."""
    was = model.training
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        with torch.no_grad():
            output = logits_of(call_model(model.eval(), inputs[:2].to(device)))
    except FallowError:
        raise
    except Exception as error:  # whatever a model says of images of the wrong size
        shape = "x".join(map(str, inputs.shape[1:]))
        raise UsageError(
            f"{name} does not take images of {shape} ({_line(error)}): bring them to its size with --resize"
        ) from None
    finally:
        model.train(was)
    if not bool(torch.isfinite(output).all()):
        raise RunError(f"the output of {name} is not finite: its weights are of no use, take others")


def _of_classes(output: Any, target: Tensor) -> Tensor:
    """Mean cross entropy of the labels."""
    return F.cross_entropy(logits_of(output), target)


def logits_of(output: Any) -> Tensor:
    """The output, or its logits where it has more."""
    return output if isinstance(output, Tensor) else output.logits


# --- tokens ------------------------------------------------------------------------------------------------


def _of_tokens(name: str, source: Source) -> Probe:
    """A language model on random tokens: enough to count costs, and to see how gradients run."""
    if source.data not in (None, TOKENS):
        raise UsageError(
            f"{name} takes tokens, not the images of {source.data}: leave out --data, or pass --data tokens"
        )
    if source.resize is not None:
        raise UsageError(f"{name} takes tokens: leave out --resize")
    model = load_model(
        name, classes=2, channels=3, image=32, weights=source.weights, seed=seed_of(source.seed, "weights")
    )
    masked = inputs_taken(name) == "masked tokens"
    config: Any = model.config
    length = min(_LENGTH, getattr(config, "max_position_embeddings", None) or _LENGTH)
    draws = generator(source.seed, "tokens")
    found = []
    for _ in range(source.batches):
        shape = (source.batch_size, length)
        tokens = torch.randint(config.vocab_size, shape, generator=draws)
        if not masked:
            found.append(({"input_ids": tokens}, tokens))
            continue
        hidden = torch.rand(shape, generator=draws) < _MASKED
        hidden[:, 0] = True  # a row without a target would have no loss
        others = torch.randint(config.vocab_size, shape, generator=draws)
        inputs = {"input_ids": torch.where(hidden, others, tokens)}
        found.append((inputs, tokens.masked_fill(~hidden, _IGNORED)))
    task = "finding replaced tokens again" if masked else "the next token"
    note = f"the batches are random tokens, not a text; the loss is the model's own, of {task}"
    return Probe(
        model.to(device_of(source.device)), _of_masked if masked else _of_next, found, (note,), TOKENS
    )


def _of_next(output: Any, target: Tensor) -> Tensor:
    """Mean cross entropy of each token after those before it."""
    return F.cross_entropy(logits_of(output)[:, :-1].flatten(0, 1), target[:, 1:].flatten())


def _of_masked(output: Any, target: Tensor) -> Tensor:
    """Mean cross entropy of the hidden tokens."""
    return F.cross_entropy(logits_of(output).flatten(0, 1), target.flatten(), ignore_index=_IGNORED)


# --- around it ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def on_threads(count: int | None) -> Iterator[None]:
    """Torch takes that many threads, and afterwards as many as before; None leaves it alone."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(check_count("--threads", count, 1))
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

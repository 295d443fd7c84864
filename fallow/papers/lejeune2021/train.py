"""A training of `lejeune2021`: LeNet-300-100, the image set in memory, resumable every few epochs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fallow import data as sets
from fallow.data import augment
from fallow.errors import RunError
from fallow.models import lenet300
from fallow.papers._packed import pack, unpack
from fallow.papers.lejeune2021.methods import METHODS
from fallow.papers.lejeune2021.trainee import Plan, Trainee
from fallow.recipes._batches import seed_of

Pieces = Callable[[str, Callable[[], Any]], Any]
VALIDATED, SPLIT = 0.2, 42  # share of the training images, and the seed of which
_PARTS, _SHORTEST = 20, 10  # at most so many parts of a training, none of fewer epochs
_AT_ONCE = 2000  # images in an evaluation


@dataclass(frozen=True)
class Images:
    """One part of an image set, normalised, in the memory of this process.

    Attributes:
        x: [n, pixels].
        y: [n].
        windows: every placement of the images moved by whole pixels, a view [n, c, 2s+1, 2s+1, h, w]; None:
            they stay where they are.
    """

    x: Tensor
    y: Tensor
    windows: Tensor | None = None

    def batches(self, size: int, draws: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """All of them once in random order; the last batch may be shorter."""
        order = torch.randperm(len(self.y), generator=draws)
        offsets = None
        if self.windows is not None:
            offsets = torch.randint(self.windows.shape[2], (2, len(order)), generator=draws)
        for first in range(0, len(order), size):
            chosen = order[first : first + size]
            if self.windows is None or offsets is None:
                x = self.x[chosen]
            else:
                down, right = offsets[:, first : first + size]
                x = self.windows[chosen, :, down, right].flatten(1)
            yield x, self.y[chosen]


def train_cell(
    method: str,
    data: str,
    validation: bool,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    shift: int,
    settings: Mapping[str, Any],
    seed: int,
    pieces: Pieces,
    data_dir: str | None = None,
) -> dict[str, Any]:
    """Train LeNet-300-100 by a method, and test it with what is cut set to zero.

    Args:
        method: of `METHODS`.
        data: an image set.
        validation: hold a fifth of the training images out, and look at them after each epoch.
        epochs: over the others.
        batch_size: images a step.
        learning_rate: Adam's at the start.
        shift: images move by up to so many pixels, drawn anew for each epoch.
        settings: of the method's own.
        seed: of weights, order, shifts and noise; the split is the same for all.
        pieces: keeps parts of the training.
        data_dir: where image sets are.

    Returns:
        By epoch the fraction of nonzero weights and the errors; at the end the test error, and what is left.
    """
    train, held, test = _parts(data, data_dir, validation, shift)
    dataset_size = len(train.y) + len(held.y)
    draws = torch.Generator().manual_seed(seed_of(seed, "weights"))
    plan = Plan(
        epochs, epochs * math.ceil(len(train.y) / batch_size), dataset_size, learning_rate, draws, settings
    )
    trainee = METHODS[method].make(_network(train.x.shape[1], seed), plan)
    each = max(_SHORTEST, math.ceil(epochs / _PARTS))
    curve: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    for first in range(0, epochs, each):
        some = range(first, min(first + each, epochs))

        def stretch(some: range = some) -> dict[str, Any]:
            looks = [_epoch(trainee, train, held, epoch, batch_size, seed) for epoch in some]
            ended = some.stop == epochs
            end = _end(trainee, train, test) if ended else {}
            return {"looks": looks, "end": end, "state": "" if ended else pack(trainee.state())}

        found = pieces(f"epochs{first}", stretch)
        curve += found["looks"]
        if found["state"]:
            trainee.load(unpack(found["state"]))
    images = {"trained_on": len(train.y), "validated_on": len(held.y), "tested_on": len(test.y)}
    return {**found["end"], **images, "curve": {key: [look[key] for look in curve] for key in curve[0]}}


def _parts(name: str, data_dir: str | None, validation: bool, shift: int) -> tuple[Images, Images, Images]:
    """Images to train on, to validate on and to test on."""
    dataset = sets.load(name, data_dir)
    some, others = torch.arange(len(dataset.train_y)), torch.arange(0)
    if validation:
        some, others = dataset.split_validation(VALIDATED, SPLIT)

    def ready(x: Tensor) -> Tensor:
        return augment.normalise(x, dataset.mean, dataset.std)

    windows = None
    if shift:
        wide = ready(F.pad(dataset.train_x[some], (shift,) * 4))
        windows = wide.unfold(2, dataset.size[0], 1).unfold(3, dataset.size[1], 1)
    train = Images(ready(dataset.train_x[some]).flatten(1), dataset.train_y[some], windows)
    held = Images(ready(dataset.train_x[others]).flatten(1), dataset.train_y[others])
    return train, held, Images(ready(dataset.test_x).flatten(1), dataset.test_y)


def _network(pixels: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "weights"))
        return lenet300(channels=pixels, image=1)


def _epoch(trainee: Trainee, train: Images, held: Images, epoch: int, size: int, seed: int) -> dict[str, Any]:
    """Train for one epoch and look; what is drawn is a function of the seed and the epoch."""
    trainee.plan.draws.manual_seed(seed_of(seed, "noise", epoch))
    order = torch.Generator().manual_seed(seed_of(seed, "order", epoch))
    trainee.begin(epoch)
    trainee.model.train()
    left, total = math.ceil(len(train.y) / size), torch.zeros(())
    for x, y in train.batches(size, order):
        error = F.cross_entropy(trainee.model(x), y)
        trainee.optimiser.zero_grad()
        trainee.loss(error).backward()
        trainee.optimiser.step()
        left -= 1
        trainee.update(not left)
        total += error.detach() * len(y)
    loss = float(total) / len(train.y)
    if not math.isfinite(loss):
        raise RunError(
            f"the loss is {loss} in epoch {epoch + 1}: this training diverges, and does so every time, "
            "for all that is drawn is fixed; the page leaves it out"
        )
    masks = trainee.masks()
    fraction = sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    wrong = _error(_network_of(trainee, masks), held) if len(held.y) else None
    return {"fraction": fraction, "validation_error": wrong, "train_loss": loss}


def _network_of(trainee: Trainee, masks: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of each layer, with what is cut set to zero."""
    own = {name: p.detach() for name, p in trainee.model.named_parameters()}
    return [(own[name] * mask, own[name.replace("weight", "bias")]) for name, mask in masks.items()]


@torch.no_grad()
def _error(layers: list[tuple[Tensor, Tensor]], images: Images) -> float:
    """Share of the images that the network gets wrong."""
    wrong = 0
    for x, y in zip(images.x.split(_AT_ONCE), images.y.split(_AT_ONCE), strict=True):
        for weight, bias in layers[:-1]:
            x = F.linear(x, weight, bias).relu_()
        wrong += int((F.linear(x, *layers[-1]).argmax(1) != y).sum())
    return wrong / len(images.y)


def _end(trainee: Trainee, train: Images, test: Images) -> dict[str, Any]:
    """Errors, and how many weights and neurons are left."""
    masks = trainee.masks()
    layers = _network_of(trainee, masks)
    kept = [int(mask.sum()) for mask in masks.values()]
    of = [mask.numel() for mask in masks.values()]
    found = [*masks.values()]
    # a neuron counts where something comes in and something goes out
    alive = [int((a.any(1) & b.any(0)).sum()) for a, b in zip(found, found[1:], strict=False)]
    more: dict[str, Any] = {}
    if other := trainee.masks_by_strength():
        fraction = sum(int(mask.sum()) for mask in other.values()) / sum(of)
        more["by_strength"] = {"test_error": _error(_network_of(trainee, other), test), "fraction": fraction}
    return {
        **more,
        "test_error": _error(layers, test),
        "train_error": _error(layers, train),
        "weights": sum(kept),
        "fraction": sum(kept) / sum(of),
        "all_weights": sum(of),
        "layers": [a / b for a, b in zip(kept, of, strict=True)],
        "neurons": alive,
    }

"""Mini-batches as a pure function of the seed and the step: nothing to save, everything resumes."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from fallow.data import Dataset, augment
from fallow.errors import UsageError
from fallow.recipes._config import Surroundings

# Mirror images of digits and letters are other signs; (flip, largest shift in pixels).
_AUGMENTATION = {"digits": (False, 1), "mnist": (False, 2), "svhn": (False, 0)}
_HUANG = (True, 4)
_EVALUATED_AT_ONCE = 512


def seed_of(seed: int, purpose: str, count: int = 0) -> int:
    """The seed of one purpose at one moment: 63 bits of a hash, so that neighbours have nothing in common."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{count}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, purpose: str, count: int = 0) -> torch.Generator:
    """A fresh generator for one purpose at one moment."""
    return torch.Generator().manual_seed(seed_of(seed, purpose, count))


class Batches:
    """The training, validation and test images of a run, on its device.

    A tenth of the training images validates (45,000 + 5,000 of CIFAR's 50,000). The last batch of an epoch is
    shorter, as in Huang's code, and left out only where it is a single image.

    Attributes:
        dataset: where they come from.
        sizes: images to train, validate and test on.
        per_epoch: steps in an epoch.
    """

    def __init__(self, dataset: Dataset, config: Surroundings) -> None:
        self.dataset, self.config = dataset, config
        train, validation = dataset.split_validation(0.1, config.seed)
        device = torch.device(config.device)
        self._mean, self._std = dataset.mean.to(device), dataset.std.to(device)
        x, y = dataset.train_x, dataset.train_y
        self._parts = {
            "train": (x[train].to(device), y[train].to(device)),
            "validation": (x[validation].to(device), y[validation].to(device)),
            "test": (dataset.test_x.to(device), dataset.test_y.to(device)),
        }
        self.sizes = {name: len(labels) for name, (_, labels) in self._parts.items()}
        assert config.batch_size is not None
        full, rest = divmod(self.sizes["train"], config.batch_size)
        self.per_epoch = full + (rest > 1)
        if not self.per_epoch:
            raise UsageError(f"{self.sizes['train']} training image is too few: take a larger --train-size")
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch of a step: normalised, augmented images and their labels."""
        epoch, place = divmod(step, self.per_epoch)
        if self._order[0] != epoch:
            order = torch.randperm(self.sizes["train"], generator=generator(self.config.seed, "order", epoch))
            self._order = epoch, order
        size = self.config.batch_size
        assert size is not None
        images, labels = self._parts["train"]
        chosen = self._order[1][place * size : (place + 1) * size].to(images.device)
        return self._ready(self._augmented(images[chosen], step)), labels[chosen]

    def example(self) -> Tensor:
        """A few images as the model takes them, to find its sites with."""
        return self._ready(self._parts["train"][0][:4])

    def evaluated(self, part: str) -> list[tuple[Tensor, Tensor]]:
        """The images and labels of "validation" or "test" in large batches."""
        images, labels = self._parts[part]
        size = _EVALUATED_AT_ONCE
        return [
            (self._ready(images[i : i + size]), labels[i : i + size]) for i in range(0, len(labels), size)
        ]

    def _augmented(self, x: Tensor, step: int) -> Tensor:
        if not self.config.augment:
            return x
        flipped, pixels = _AUGMENTATION.get(self.dataset.name, _HUANG)
        draws = generator(self.config.seed, "augmentation", step)
        x = augment.flip(x, draws) if flipped else x
        return augment.shift(x, pixels, draws)

    def _ready(self, x: Tensor) -> Tensor:
        x = augment.normalise(x, self._mean, self._std)
        return (
            x.contiguous(memory_format=torch.channels_last) if self.config.channels_last else x.contiguous()
        )


def error_of(model: nn.Module, batches: Batches, part: str) -> float:
    """Share of the images of a part that the model at evaluation gets wrong."""
    was = model.training
    model.eval()
    wrong = 0
    with torch.no_grad():
        for x, y in batches.evaluated(part):
            wrong += int((model(x).argmax(1) != y).sum())
    model.train(was)
    return wrong / batches.sizes[part]

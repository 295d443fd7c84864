"""What every reader and the public face of `fallow.data` share: the data set, the checks, the file access."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fallow.errors import DataError, UsageError

Folder = Mapping[str, Path]
"""The files of one folder (or, for image folders, its subfolders): name -> path."""


@dataclass(frozen=True, eq=False)
class Raw:
    """What a reader returns: uint8 images (n, c, h, w) and int64 labels as numpy arrays."""

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels in memory.

    Attributes:
        name: the name it was loaded by.
        train_x: uint8 (n, c, h, w).
        train_y: int64 (n,).
        test_x: uint8 (m, c, h, w).
        test_y: int64 (m,).
        classes: number of classes.
        class_names: one word a class.
        fingerprint: sha256 over shapes, images and labels, in hexadecimal.
        notes: what a reader of the results must know about these data.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    class_names: tuple[str, ...]
    fingerprint: str
    notes: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.train_x.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image."""
        return self.train_x.shape[2], self.train_x.shape[3]

    @property
    def mean(self) -> Tensor:
        """Mean of each channel of the training images, on the scale 0..1."""
        return self._moments()[0]

    @property
    def std(self) -> Tensor:
        """Standard deviation of each channel of the training images, on the scale 0..1."""
        return self._moments()[1]

    def subset(self, count: int, seed: int = 0) -> Dataset:
        """The set with `count` training images, drawn class by class in proportion; the test set stays."""
        count = check_count("train_size", count, len(self.train_y))
        keep = torch.from_numpy(stratified(self.train_y.numpy(), count, seed))
        train_x, train_y = self.train_x[keep], self.train_y[keep]
        digest = fingerprint(train_x, train_y, self.test_x, self.test_y)
        return replace(self, train_x=train_x, train_y=train_y, fingerprint=digest)

    def split_validation(self, share: float | int = 0.1, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Sorted indices of the training images to train on, and of those to validate on; they are disjoint.

        Args:
            share: a share of the training images (a float in (0, 1)) or a number of them (an int).
            seed: which images; the split is a function of it and of the number of images alone.
        """
        total = len(self.train_y)
        if isinstance(share, int) and not isinstance(share, bool):
            count = share
        elif isinstance(share, float) and 0 < share < 1:
            count = max(1, round(share * total))
        else:
            raise UsageError(f"the validation share must be in (0, 1) or a number of images, got {share!r}.")
        count = check_count("the number of validation images", count, total - 1)
        order = torch.from_numpy(generator(seed, stream=1).permutation(total))
        return order[count:].sort().values, order[:count].sort().values

    def with_channels(self, channels: int) -> Dataset:
        """The set as a model with that many input channels wants it, with a note; copies nothing."""
        if channels == self.channels:
            return self
        note = f"the one channel of the images is repeated to {channels}"
        train_x, test_x = repeat_channels(self.train_x, channels), repeat_channels(self.test_x, channels)
        return replace(self, train_x=train_x, test_x=test_x, notes=(*self.notes, note))

    def _moments(self) -> tuple[Tensor, Tensor]:
        # Counting the 256 values is exact and needs no copy of the images as floats.
        values = torch.arange(256, dtype=torch.float64) / 255
        planes = (self.train_x[:, channel].reshape(-1) for channel in range(self.channels))
        counts = torch.stack([torch.bincount(plane, minlength=256) for plane in planes]).double()
        share = counts / counts.sum(1, keepdim=True)
        mean = share @ values
        variance = (share * (values - mean[:, None]).square()).sum(1)
        return mean.float(), variance.sqrt().float()


def repeat_channels(x: Tensor, channels: int) -> Tensor:
    """(n, 1, h, w) seen as (n, channels, h, w), a view; images that have `channels` already pass through."""
    if x.shape[1] == channels:
        return x
    if x.shape[1] != 1:
        raise UsageError(
            f"images of {x.shape[1]} channels cannot serve a model of {channels}: only one channel repeats; "
            f"build the model for {x.shape[1]} channels."
        )
    return x.expand(-1, channels, -1, -1)


def generator(seed: int, stream: int) -> np.random.RandomState:
    """A generator for a seed of any size and a purpose; numpy keeps RandomState's stream for ever."""
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed % 2**64, stream])))


def stratified(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Sorted indices of `count` labels in which each class has its share, up to one image or so.

    The images of a class of m get the random order 0..m-1 and the keys (order + u) / m with one random u a
    class; the `count` smallest keys win, so every class gives about the same share of its images.
    """
    random = generator(seed, stream=0)
    keys = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        keys[members] = (random.permutation(len(members)) + random.uniform()) / len(members)
    return np.sort(np.argsort(keys, kind="stable")[:count])


def fingerprint(*arrays: Tensor | np.ndarray) -> str:
    """sha256 over the shapes and the bytes of the arrays, in order."""
    digest = hashlib.sha256()
    for array in arrays:
        data = array.numpy() if isinstance(array, Tensor) else array
        digest.update(repr((str(data.dtype), tuple(data.shape))).encode())
        digest.update(np.ascontiguousarray(data).data)
    return digest.hexdigest()


def check_count(name: str, count: int, most: int) -> int:
    """A whole number in 1..most, or an error that says so."""
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= most:
        raise UsageError(f"{name} must be a whole number from 1 to {most}, got {count!r}.")
    return count


def check_labels(labels: np.ndarray, classes: int, where: object) -> np.ndarray:
    """The labels as int64, all in 0..classes-1."""
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise DataError(
            f"{where}: labels must be whole numbers in one row, got {labels.dtype} of shape {labels.shape}: "
            "the file is not what its name says; fetch it again."
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise DataError(
            f"{where}: label {labels[wrong[0]]} of record {wrong[0]} is not in 0..{classes - 1} "
            f"({len(wrong)} such labels): the file is corrupt or of another set; fetch it again."
        )
    return labels.astype(np.int64)


def check_pairs(images: np.ndarray, labels: np.ndarray, where: object) -> None:
    """As many images as labels, and at least one."""
    if len(images) != len(labels):
        raise DataError(
            f"{where}: {len(images)} images but {len(labels)} labels: the files do not belong together "
            "or one is cut short; fetch both again."
        )
    if not len(images):
        raise DataError(f"{where}: no images in it: the file is empty; fetch it again.")


def check_records(size: int, record: int, where: object) -> int:
    """How many records of `record` bytes a file of `size` bytes holds: any number, but no partial one."""
    if size % record or not size:
        rest = f"{size // record} whole records and {size % record} bytes more" if size else "it is empty"
        raise DataError(
            f"{where}: {size} bytes is not a whole number of {record}-byte records ({rest}): "
            "the file is cut short or of another format; fetch it again."
        )
    return size // record


def files_in(folder: Path) -> Folder:
    """The entries of a folder by name; none where it does not exist or is no folder."""
    try:
        return {entry.name: entry for entry in sorted(folder.iterdir())} if folder.is_dir() else {}
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}): check its permissions.") from error


def read_bytes(path: Path) -> bytes:
    """The whole content of a file, unpacked where its name ends in .gz."""
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}: not a whole gzip file ({error}): it is corrupt or cut short; fetch it again."
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check its permissions.") from error


def present(files: Folder, *names: str) -> Path | None:
    """The first of the names that the folder has as a file."""
    return next((files[name] for name in names if name in files and files[name].is_file()), None)


def published(raw: Raw, train: int, test: int) -> Raw:
    """The same, with a note for each part whose number of images is not the published one."""
    notes = []
    for part, have, whole in (("training", len(raw.train_y), train), ("test", len(raw.test_y), test)):
        if have != whole:
            notes.append(f"{have} {part} images are there, the published set has {whole}")
    return replace(raw, notes=(*raw.notes, *notes))


Reader = Callable[[Path], Raw | None]
"""Reads a folder: the data, or None where the folder does not hold this format."""


@dataclass(frozen=True)
class Source:
    """How one named set is found and read.

    Attributes:
        title: its name in prose.
        folders: the folder names the set unpacks to, below the searched ones.
        wants: the files it is read from, in words.
        get: where they come from, in words.
        readers: tried in order in every folder.
    """

    title: str
    folders: Sequence[str]
    wants: str
    get: str
    readers: Sequence[Reader]


class Incomplete(DataError):
    """Some of a set's files are in a folder, others are missing; the search goes on and tells at its end."""

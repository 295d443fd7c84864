"""Image sets in memory: `load` finds a set by name, reads the format it is distributed in and checks it.

Whole records are counted and accepted, however many there are; a partial record, a label out of range or a
truncated archive is a `DataError` that names the file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fallow.data._common import Dataset, check_count, fingerprint, stratified
from fallow.data._digits import read_digits
from fallow.data._search import find
from fallow.errors import UsageError, nearest

__all__ = ["NAMES", "Dataset", "load"]

NAMES = ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "svhn", "imagefolder")


def load(
    name: str,
    data_dir: str | Path | None = None,
    *,
    train_size: int | None = None,
    seed: int = 0,
    size: int | None = None,
) -> Dataset:
    """Read an image set.

    Args:
        name: one of NAMES.
        data_dir: where its files are. Searched are this folder, `name` below it, and below both the folder
            that the set unpacks to. None: fallow's folder in the user's cache, then ./data; "digits" needs
            neither.
        train_size: keep that many training images, drawn class by class in proportion.
        seed: which ones; it touches nothing else.
        size: side to which an image folder's images are cropped and resized (32 where None); no other set
            takes it.

    Raises:
        UsageError: an unknown name or an impossible size.
        DataError: files that are missing, cut short or corrupt.
        MissingExtra: a package that this set's reader needs is not installed.

    Examples:
        >>> digits = load("digits", train_size=100)
        >>> digits.train_x.shape, digits.test_x.shape, digits.classes
        (torch.Size([100, 1, 8, 8]), torch.Size([360, 1, 8, 8]), 10)
    """
    if name not in NAMES:
        near = nearest(str(name), NAMES)
        hint = f'did you mean "{near}"?' if near else "choose one of these."
        raise UsageError(f'the data set must be one of {", ".join(NAMES)}, got "{name}": {hint}')
    if size is not None and name != "imagefolder":
        raise UsageError(f'size is for "imagefolder" alone, got size={size} for "{name}": leave it out.')
    raw = read_digits() if name == "digits" else find(name, data_dir, size)
    train_x, train_y = raw.train_x, raw.train_y
    if train_size is not None:
        keep = stratified(train_y, check_count("train_size", train_size, len(train_y)), seed)
        train_x, train_y = train_x[keep], train_y[keep]
    return Dataset(
        name,
        _tensor(train_x),
        _tensor(train_y),
        _tensor(raw.test_x),
        _tensor(raw.test_y),
        classes=len(raw.class_names),
        class_names=raw.class_names,
        fingerprint=fingerprint(train_x, train_y, raw.test_x, raw.test_y),
        notes=raw.notes,
    )


def _tensor(array: np.ndarray) -> torch.Tensor:
    # Arrays that are views of a file's bytes are read-only; torch wants memory it may write to.
    return torch.from_numpy(np.require(array, requirements=("C", "W")))

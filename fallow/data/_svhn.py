"""SVHN, cropped digits: the MATLAB files train_32x32.mat, test_32x32.mat and, where present, extra."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fallow.data._common import Incomplete, Raw, check_labels, check_pairs, files_in, present, published
from fallow.data._names import DIGITS
from fallow.errors import DataError, need

_TRAIN, _EXTRA, _TEST = 73257, 531131, 26032


def read_svhn(folder: Path) -> Raw | None:
    """The .mat files of a folder, or None; the extra images join the training images, as in Huang et al."""
    files = files_in(folder)
    train, test, extra = (present(files, f"{part}_32x32.mat") for part in ("train", "test", "extra"))
    if train is None and test is None:
        return None
    if train is None or test is None:
        raise Incomplete(f"{folder} lacks {'train' if train is None else 'test'}_32x32.mat")
    train_x, train_y = parse_svhn(train)
    notes: tuple[str, ...] = ()
    if extra is not None:
        extra_x, extra_y = parse_svhn(extra)
        train_x, train_y = np.concatenate([train_x, extra_x]), np.concatenate([train_y, extra_y])
        notes = (f"the training images include {len(extra_y)} of extra_32x32.mat",)
    raw = Raw(train_x, train_y, *parse_svhn(test), class_names=DIGITS, notes=notes)
    return published(raw, _TRAIN + (_EXTRA if extra is not None else 0), _TEST)


def parse_svhn(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """X (32, 32, 3, n) and y (n, 1) with labels 1..10, where 10 stands for the digit 0."""
    loadmat = need("scipy.io", "lab").loadmat
    try:
        content = loadmat(path, variable_names=["X", "y"])
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(
            f"{path}: cannot be read ({reason}): fetch it again or check its permissions."
        ) from error
    except Exception as error:  # scipy fails on corrupt bytes in many ways
        raise DataError(
            f"{path}: not a whole MATLAB file ({type(error).__name__}: {error}): "
            "it is corrupt or cut short; fetch it again."
        ) from error
    x, y = content.get("X"), content.get("y")
    if not isinstance(x, np.ndarray) or not isinstance(y, np.ndarray):
        raise DataError(f"{path}: lacks X or y: it is not a file of the cropped digits; fetch that one.")
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[:3] != (32, 32, 3):
        raise DataError(f"{path}: X must be uint8 (32, 32, 3, n), got {x.dtype} {x.shape}: fetch it again.")
    y = check_labels(y.reshape(-1), 11, path)
    if (y == 0).any():
        raise DataError(f"{path}: label 0 is not in 1..10 (10 stands for the digit 0): fetch it again.")
    images = np.ascontiguousarray(x.transpose(3, 2, 0, 1))
    check_pairs(images, y, path)
    return images, y % 10

"""NAME.npz with x_train, y_train, x_test and y_test, as Keras distributes MNIST, for every set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fallow.data._common import Raw, check_labels, check_pairs, files_in, present
from fallow.errors import DataError

_KEYS = ("x_train", "y_train", "x_test", "y_test")


def read_npz(folder: Path, name: str, names: Sequence[str] | None = None) -> Raw | None:
    """NAME.npz of a folder, or None.

    Args:
        folder: where to look.
        name: the set, and the file without its ending.
        names: the classes; where None, `class_names` in the file or 0, 1, ... up to the largest label.
    """
    path = present(files_in(folder), f"{name}.npz")
    if path is None:
        return None
    content = _arrays(path)
    missing = [key for key in _KEYS if key not in content]
    if missing:
        raise DataError(
            f"{path}: lacks {', '.join(missing)} (it has {', '.join(content) or 'nothing'}): "
            f"save it with the keys {', '.join(_KEYS)}."
        )
    classes = _class_names(content, names, path)
    parts = []
    for part in ("train", "test"):
        x = _images(content[f"x_{part}"], f"{path}: x_{part}")
        y = content[f"y_{part}"]
        y = check_labels(y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y, len(classes), f"{path}: y_{part}")
        check_pairs(x, y, f"{path}: {part}")
        parts += [x, y]
    if parts[0].shape[1:] != parts[2].shape[1:]:
        shapes = f"{parts[0].shape[1:]} and {parts[2].shape[1:]}"
        raise DataError(f"{path}: training and test images have the shapes {shapes}: make them equal.")
    return Raw(*parts, class_names=classes)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of the file; objects, which would be pickles, are refused."""
    try:
        # The file is opened here because numpy leaves it open where it is no zip archive.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files if key in (*_KEYS, "class_names")}
    except Exception as error:  # zip, zlib, header and memory errors alike: the file cannot be used
        raise DataError(
            f"{path}: not a whole .npz file of plain arrays ({type(error).__name__}: {error}): "
            "it is corrupt, cut short or holds Python objects; save or fetch it again."
        ) from error


def _class_names(content: dict[str, np.ndarray], names: Sequence[str] | None, path: Path) -> tuple[str, ...]:
    if names is not None:
        return tuple(names)
    if "class_names" in content:
        return tuple(map(str, content["class_names"].reshape(-1)))
    labels = [content[key] for key in ("y_train", "y_test")]
    if any(array.dtype.kind not in "iu" or not array.size for array in labels):
        raise DataError(f"{path}: labels must be whole numbers, at least one: save it again.")
    return tuple(map(str, range(1 + max(int(array.max()) for array in labels))))


def _images(x: np.ndarray, where: str) -> np.ndarray:
    """uint8 (n, c, h, w) of (n, h, w), (n, h, w, c) or (n, c, h, w); c is 1 or 3."""
    if x.ndim == 3:
        x = x[:, None]
    last, first = (x.ndim == 4 and x.shape[axis] in (1, 3) for axis in (3, 1))
    if last == first:
        raise DataError(
            f"{where}: shape {x.shape} must be (n, h, w), (n, h, w, c) or (n, c, h, w) with c 1 or 3, and "
            "tell which: reshape it."
        )
    if not np.prod(x.shape[1:]):
        raise DataError(f"{where}: shape {x.shape} gives images without pixels: save it again.")
    if x.dtype != np.uint8:
        whole = x.dtype.kind in "iu" and x.size and x.min() >= 0 and x.max() <= 255
        if not whole:
            raise DataError(
                f"{where}: images must be whole numbers 0..255 (uint8), got {x.dtype}: convert them."
            )
        x = x.astype(np.uint8)
    return x.transpose(0, 3, 1, 2) if last else x

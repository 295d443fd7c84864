"""Image folders: train/CLASS/*.png and val/CLASS/*.png (or test/), in any format Pillow reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fallow.data._common import Incomplete, Raw, check_count, files_in
from fallow.errors import DataError, need

_ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
_MOST = 4096


def read_imagefolder(folder: Path, size: int) -> Raw | None:
    """RGB images of side `size`, centre-cropped to a square and resized; None where there is no train folder.

    Classes are the folders below train/, in alphabetical order; those below val/ or test/ must be among them.
    """
    size = check_count("size", size, _MOST)
    files = files_in(folder)
    if "train" not in files or not files["train"].is_dir():
        return None
    test = next((files[name] for name in ("val", "test") if name in files and files[name].is_dir()), None)
    if test is None:
        raise Incomplete(f"{folder} has train but lacks val or test")
    train_classes, test_classes = _classes(files["train"]), _classes(test)
    names = tuple(train_classes)
    unknown = [name for name in test_classes if name not in train_classes]
    if unknown:
        raise DataError(
            f"{test}: the classes {', '.join(unknown[:5])} have no folder in {files['train']}: "
            "the folders must have the same names."
        )
    train_x, train_y = _read(train_classes, names, size)
    test_x, test_y = _read(test_classes, names, size)
    notes = () if test.name == "test" else ("the images of val/ serve as the test set",)
    return Raw(train_x, train_y, test_x, test_y, names, notes)


def _classes(folder: Path) -> dict[str, list[Path]]:
    """Class name -> its images, both in alphabetical order; names that start with a dot are left out."""
    classes = {}
    for name, path in files_in(folder).items():
        if not path.is_dir() or name.startswith("."):
            continue
        found = (entry for entry in path.rglob("*") if entry.suffix.lower() in _ENDINGS and entry.is_file())
        classes[name] = sorted(entry for entry in found if not entry.name.startswith("."))
        if not classes[name]:
            endings = ", ".join(sorted(_ENDINGS))
            raise DataError(f"{path}: no images in it ({endings}): fill the class folder or remove it.")
    if not classes:
        raise DataError(f"{folder}: no class folders in it: it wants one folder of images for each class.")
    return classes


def _read(classes: dict[str, list[Path]], names: tuple[str, ...], size: int) -> tuple[np.ndarray, np.ndarray]:
    paths = [path for found in classes.values() for path in found]
    labels = np.repeat([names.index(name) for name in classes], [len(found) for found in classes.values()])
    try:
        images = np.empty((len(paths), 3, size, size), np.uint8)
    except MemoryError as error:
        raise DataError(
            f"{paths[0].parent.parent}: {len(paths)} images of {size}x{size} do not fit into memory: "
            "pass a smaller size."
        ) from error
    for row, path in enumerate(paths):
        images[row] = read_image(path, size)
    return images, labels.astype(np.int64)


def read_image(path: Path, size: int) -> np.ndarray:
    """One image as uint8 (3, size, size): turned upright, cropped to its central square, resized."""
    pillow, operations = need("PIL.Image", "lab"), need("PIL.ImageOps", "lab")
    try:
        with pillow.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"mode {image.mode}, where images have 8 bits a channel")
            upright = operations.exif_transpose(image).convert("RGB")
            square = operations.fit(upright, (size, size), method=pillow.Resampling.BILINEAR)
            return np.asarray(square).transpose(2, 0, 1)
    except Exception as error:  # Pillow's plugins fail on corrupt bytes in many ways, SyntaxError among them
        raise DataError(
            f"{path}: not an image that can be used ({type(error).__name__}: {error}): replace or remove it."
        ) from error

"""CIFAR-10 and CIFAR-100: the binary and the Python version, in a folder or still in their archive."""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Callable, Mapping
from gzip import BadGzipFile
from gzip import open as gzip_open
from pathlib import Path, PurePosixPath

import numpy as np

from fallow.data._common import (
    Incomplete,
    Raw,
    check_labels,
    check_pairs,
    check_records,
    files_in,
    published,
    read_bytes,
)
from fallow.data._names import CifarLayout
from fallow.data._pickle import load_arrays
from fallow.errors import DataError

_PIXELS = 3 * 32 * 32

Parse = Callable[[bytes, CifarLayout, str], tuple[np.ndarray, np.ndarray]]


def read_binary(folder: Path, layout: CifarLayout) -> Raw | None:
    """The binary version: records of label bytes and 3,072 pixels, red plane first."""
    return _read(folder, layout, ".bin", f"{layout.stem}-binary.tar.gz", parse_binary)


def read_python(folder: Path, layout: CifarLayout) -> Raw | None:
    """The Python version: pickled dicts of arrays."""
    return _read(folder, layout, "", f"{layout.stem}-python.tar.gz", parse_python)


def parse_binary(data: bytes, layout: CifarLayout, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of one file of the binary version, however many whole records it has."""
    record = layout.labels + _PIXELS
    count = check_records(len(data), record, where)
    rows = np.frombuffer(data, np.uint8).reshape(count, record)
    labels = check_labels(rows[:, layout.labels - 1], len(layout.names), where)
    return rows[:, layout.labels :].reshape(count, 3, 32, 32), labels


def parse_python(data: bytes, layout: CifarLayout, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of one file of the Python version."""
    content = load_arrays(data, where)
    if not isinstance(content, dict):
        raise DataError(f"{where}: holds a {type(content).__name__} where a dict belongs: fetch it again.")
    fields = {
        key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in content.items()
    }
    missing = [key for key in ("data", layout.key) if key not in fields]
    if missing:
        raise DataError(
            f"{where}: lacks {', '.join(missing)}: it is a file of another set; fetch the right one."
        )
    images = fields["data"]
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        raise DataError(f"{where}: its data are not an array of unsigned bytes: fetch it again.")
    count = check_records(images.size, _PIXELS, where)
    try:
        labels = np.asarray(fields[layout.key])
    except ValueError as error:
        raise DataError(f"{where}: its labels are not one row of numbers: fetch it again.") from error
    labels = check_labels(labels, len(layout.names), where)
    images = images.reshape(count, 3, 32, 32)
    check_pairs(images, labels, where)
    return images, labels


def _read(folder: Path, layout: CifarLayout, end: str, archive: str, parse: Parse) -> Raw | None:
    """All batches of one version in a folder, or in the archive that lies in it, or None."""
    wanted = re.compile(f"({layout.train}|{layout.test}){re.escape(end)}")
    files = files_in(folder)
    batches: Mapping[str, Path | bytes]
    batches = {name: path for name, path in files.items() if wanted.fullmatch(name) and path.is_file()}
    place = str(folder)
    if not batches and archive in files:
        batches = _unpack(files[archive], wanted)
        place = str(files[archive])
        if not batches:
            raise DataError(
                f"{place}: no {layout.example}{end} in it: it is of another set; fetch the right one."
            )
    if not batches:
        return None
    test = layout.test + end
    train = sorted((name for name in batches if name != test), key=lambda name: (len(name), name))
    missing = [name for name, there in ((layout.example + end, train), (test, test in batches)) if not there]
    if missing:
        raise Incomplete(f"{place} lacks {' and '.join(missing)}")

    def batch(name: str) -> tuple[np.ndarray, np.ndarray]:
        source = batches[name]
        data = source if isinstance(source, bytes) else read_bytes(source)
        return parse(data, layout, f"{place}/{name}")

    parts = [batch(name) for name in train]
    train_x, train_y = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return published(Raw(train_x, train_y, *batch(test), class_names=layout.names), 50000, 10000)


def _unpack(path: Path, wanted: re.Pattern[str]) -> dict[str, bytes]:
    """The wanted members of a .tar.gz by their base name; nothing is written to disk."""
    found = {}
    try:
        with gzip_open(path) as stream:
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                for member in archive:
                    name = PurePosixPath(member.name).name
                    content = (
                        archive.extractfile(member) if member.isfile() and wanted.fullmatch(name) else None
                    )
                    if content is not None:
                        found[name] = content.read()
            # tarfile takes a broken header for the end; gzip's check sum at the very end tells the truth.
            while stream.read(1 << 20):
                pass
    except (tarfile.TarError, BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: not a whole .tar.gz archive ({error}): it is corrupt or cut short; fetch it again."
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check its permissions.") from error
    return found

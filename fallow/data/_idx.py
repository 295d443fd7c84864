"""The idx format of MNIST and Fashion-MNIST: four files, gzipped as distributed or plain."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fallow.data._common import (
    Incomplete,
    Raw,
    check_labels,
    check_pairs,
    check_records,
    files_in,
    present,
    published,
    read_bytes,
)
from fallow.errors import DataError

_STEMS = ("train-images", "train-labels", "t10k-images", "t10k-labels")
_UNSIGNED_BYTE = 0x08


def read_idx(folder: Path, names: Sequence[str]) -> Raw | None:
    """The four idx files of a folder, or None where none of them is there."""
    files = files_in(folder)
    paths = {}
    for stem in _STEMS:
        rank = 3 if stem.endswith("images") else 1
        plain = (f"{stem}-idx{rank}-ubyte", f"{stem}.idx{rank}-ubyte")
        paths[stem] = present(files, *(name + end for name in plain for end in (".gz", "")))
    missing = [stem for stem, path in paths.items() if path is None]
    if len(missing) == len(paths):
        return None
    if missing:
        raise Incomplete(f"{folder} lacks {', '.join(missing)}")
    parts = []
    for part in ("train", "t10k"):
        images, labels = paths[f"{part}-images"], paths[f"{part}-labels"]
        x = parse_idx(read_bytes(images), 3, images)[:, None]
        y = check_labels(parse_idx(read_bytes(labels), 1, labels), len(names), labels)
        check_pairs(x, y, f"{images} and {labels.name}")
        parts += [x, y]
    if parts[0].shape[1:] != parts[2].shape[1:]:
        raise DataError(
            f"{folder}: training images are {parts[0].shape[2:]}, test images {parts[2].shape[2:]} pixels: "
            "the files do not belong together; fetch them again."
        )
    return published(Raw(*parts, class_names=tuple(names)), 60000, 10000)


def parse_idx(data: bytes, rank: int, where: object) -> np.ndarray:
    """The uint8 array of an idx file.

    The file is: two zero bytes, the type (8: unsigned byte), the rank, the sizes as big-endian 32-bit
    numbers, then the bytes in row-major order.
    """
    head = 4 + 4 * rank
    if len(data) < head or data[:4] != bytes((0, 0, _UNSIGNED_BYTE, rank)):
        raise DataError(
            f"{where}: starts with {data[:4].hex() or 'nothing'}, an idx file of unsigned bytes with {rank} "
            f"dimensions starts with 0000080{rank} and is at least {head} bytes long: fetch it again."
        )
    shape = struct.unpack(f">{rank}I", data[4:head])
    record = int(np.prod(shape[1:], dtype=object)) if rank > 1 else 1
    if not record:
        raise DataError(f"{where}: its header gives images of {shape[1:]} pixels: fetch it again.")
    size = len(data) - head
    count = check_records(size, record, where)
    if count != shape[0]:
        raise DataError(
            f"{where}: its header promises {shape[0]} records of {record} bytes and {count} are there "
            f"({size} bytes): the file is cut short or corrupt; fetch it again."
        )
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)

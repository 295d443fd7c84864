"""Where the sets are looked for, which files each wants, and what is said where they are missing."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from fallow.data._cifar import read_binary, read_python
from fallow.data._common import Incomplete, Raw, Source
from fallow.data._idx import read_idx
from fallow.data._imagefolder import read_imagefolder
from fallow.data._names import CIFAR10, CIFAR100, DIGITS, FASHION, CifarLayout
from fallow.data._npz import read_npz
from fallow.data._svhn import read_svhn
from fallow.errors import DataError, need
from fallow.paths import expanded

_DEFAULT_SIZE = 32


def find(name: str, data_dir: str | Path | None, size: int | None = None) -> Raw:
    """Read the set from the first searched folder that holds it.

    Raises:
        DataError: no folder holds it (the message says where it looked, what it wants and where to get that),
            or the files found are not whole.
    """
    source = _source(name, size)
    roots, below = _roots(data_dir), _below(name, source)
    lacking = []
    for folder in (root / path for root in roots for path in ("", *below)):
        for reader in source.readers:
            try:
                raw = reader(folder)
            except Incomplete as error:
                lacking.append(str(error))
                continue
            if raw is not None:
                return raw
    raise DataError(_missing(source, roots, below, lacking))


def _roots(data_dir: str | Path | None) -> list[Path]:
    if data_dir is None:
        return [Path(need("platformdirs", "lab").user_cache_dir("fallow")) / "data", Path("data")]
    root = expanded(data_dir)
    if not os.path.exists(root):
        raise DataError(f"the data folder {root} does not exist: pass the folder that holds the files.")
    if not os.path.isdir(root):
        raise DataError(f"the data folder {root} is a file: pass the folder that holds it.")
    return [root]


def _below(name: str, source: Source) -> list[str]:
    """Where to look below DIR: NAME, then the folder names the set unpacks to, below DIR and below NAME."""
    return [name, *(base + unpacked for unpacked in source.folders for base in ("", f"{name}/"))]


def _missing(source: Source, roots: list[Path], below: list[str], lacking: list[str]) -> str:
    places = f"{' and '.join(map(str, roots))}, and below in {', '.join(below)}"
    partly = f" There, {'; '.join(lacking)}." if lacking else ""
    example = roots[0] if roots[0].is_dir() else "DIR"
    return (
        f"{source.title} was not found: looked in {places}.{partly} Wanted are {source.wants}. "
        f"Get them from {source.get} and put them into {example}, or name their folder (--data-dir DIR)."
    )


def _source(name: str, size: int | None) -> Source:
    if name == "imagefolder":
        side = _DEFAULT_SIZE if size is None else size
        return Source(
            "an image folder",
            (),
            "train/CLASS/ and val/CLASS/ (or test/CLASS/) with images, or imagefolder.npz",
            "your own images, a folder for each class,",
            (partial(read_imagefolder, size=side), partial(read_npz, name=name)),
        )
    return _SOURCES[name]


def _idx_source(name: str, title: str, unpacked: str, classes: tuple[str, ...], url: str) -> Source:
    return Source(
        title,
        (f"{unpacked}/raw", "raw"),
        "train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz and "
        f"t10k-labels-idx1-ubyte.gz (gzipped or plain), or {name}.npz",
        url,
        (partial(read_idx, names=classes), partial(read_npz, name=name, names=classes)),
    )


def _cifar_source(name: str, title: str, layout: CifarLayout, folders: tuple[str, str]) -> Source:
    train, test = layout.example, layout.test
    return Source(
        title,
        folders,
        f"{train}.bin and {test}.bin (binary version), or {train} and {test} (Python version), or the "
        f"archive {layout.stem}-binary.tar.gz or {layout.stem}-python.tar.gz as it is, or {name}.npz",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        (
            partial(read_binary, layout=layout),
            partial(read_python, layout=layout),
            partial(read_npz, name=name, names=layout.names),
        ),
    )


_SOURCES = {
    "mnist": _idx_source(
        "mnist", "MNIST", "MNIST", DIGITS, "https://ossci-datasets.s3.amazonaws.com/mnist/ (the four files)"
    ),
    "fashion-mnist": _idx_source(
        "fashion-mnist",
        "Fashion-MNIST",
        "FashionMNIST",
        FASHION,
        "https://github.com/zalandoresearch/fashion-mnist (data/fashion)",
    ),
    "cifar10": _cifar_source("cifar10", "CIFAR-10", CIFAR10, ("cifar-10-batches-bin", "cifar-10-batches-py")),
    "cifar100": _cifar_source("cifar100", "CIFAR-100", CIFAR100, ("cifar-100-binary", "cifar-100-python")),
    "svhn": Source(
        "SVHN",
        (),
        "train_32x32.mat and test_32x32.mat (extra_32x32.mat joins the training images where present), "
        "or svhn.npz",
        "http://ufldl.stanford.edu/housenumbers/ (format 2, cropped digits)",
        (read_svhn, partial(read_npz, name="svhn", names=DIGITS)),
    ),
}

"""Every reader gives back what was written, in every format its set is distributed in."""

import shutil

import numpy as np
import pytest
import torch
import written_sets as w

from fallow.data import NAMES, load
from fallow.data._names import CIFAR10, CIFAR100, FASHION
from fallow.errors import MissingExtra


def same(dataset, expected):
    got = (dataset.train_x, dataset.train_y, dataset.test_x, dataset.test_y)
    for tensor, array in zip(got, expected, strict=True):
        assert np.array_equal(tensor.numpy(), array)
    assert [tensor.dtype for tensor in got] == [torch.uint8, torch.int64] * 2
    assert len(dataset.class_names) == dataset.classes


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("zipped", [True, False])
def test_idx(tmp_path, name, zipped):
    data = w.arrays(shape=(1, 28, 28))
    w.write_idx(tmp_path, data, zipped)
    dataset = load(name, tmp_path)
    same(dataset, data)
    assert dataset.notes == (
        "23 training images are there, the published set has 60000",
        "11 test images are there, the published set has 10000",
    )
    assert (dataset.class_names == FASHION) is (name == "fashion-mnist")


@pytest.mark.parametrize(("name", "coarse", "classes"), [("cifar10", False, 10), ("cifar100", True, 100)])
@pytest.mark.parametrize("version", ["binary", "python2", "python3-2", "python3-4", "python3-5"])
@pytest.mark.parametrize("packed", [False, True])
def test_cifar(tmp_path, name, coarse, classes, version, packed):
    data = w.arrays(train=110, test=11, classes=classes)
    folder = tmp_path / "unpacked"
    if version == "binary":
        w.write_cifar_binary(folder, data, coarse)
    elif version == "python2":
        w.write_cifar_python(folder, data, coarse)
    else:
        w.write_cifar_python(folder, data, coarse, w.python3_pickle(int(version[-1])))
    if packed:
        kind = "binary" if version == "binary" else "python"
        w.archive(folder, tmp_path / f"{'cifar-100' if coarse else 'cifar-10'}-{kind}.tar.gz")
        shutil.rmtree(folder)
    dataset = load(name, tmp_path if packed else folder)
    same(dataset, data)
    assert dataset.class_names == (CIFAR100 if coarse else CIFAR10).names
    assert dataset.notes[1] == "11 test images are there, the published set has 10000"


def test_cifar_batches_come_in_numeric_order(tmp_path):
    data = w.arrays(train=12)
    for number in range(12):
        (tmp_path / f"data_batch_{number + 1}.bin").write_bytes(
            w.cifar_records(data[0][number : number + 1], data[1][number : number + 1])
        )
    (tmp_path / "test_batch.bin").write_bytes(w.cifar_records(*data[2:]))
    same(load("cifar10", tmp_path), data)


def test_cifar_names_are_the_published_ones():
    assert CIFAR10.names[3] == "cat" and len(CIFAR10.names) == 10
    assert CIFAR100.names == tuple(sorted(set(CIFAR100.names))) and len(CIFAR100.names) == 100


@pytest.mark.parametrize("with_extra", [False, True])
def test_svhn(tmp_path, with_extra):
    data = w.arrays()
    extra = w.arrays(train=5, seed=3)[:2]
    w.write_svhn(tmp_path, data, extra if with_extra else None)
    dataset = load("svhn", tmp_path)
    if with_extra:
        data = [np.concatenate([data[0], extra[0]]), np.concatenate([data[1], extra[1]]), *data[2:]]
        assert dataset.notes[0] == "the training images include 5 of extra_32x32.mat"
    same(dataset, data)


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_imagefolder(tmp_path, held_out):
    w.write_imagefolder(tmp_path, held_out)
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "ants" / "notes.txt").write_text("not an image")
    dataset = load("imagefolder", tmp_path, size=10)
    assert dataset.train_x.shape == (5, 3, 10, 10) and dataset.class_names == ("ants", "bees")
    assert dataset.train_y.tolist() == [0, 0, 0, 1, 1] and dataset.test_y.tolist() == [0, 1]
    for x, y in ((dataset.train_x, dataset.train_y), (dataset.test_x, dataset.test_y)):
        colour = torch.tensor([[255, 0, 0], [0, 0, 255]], dtype=torch.uint8)[y]
        assert torch.equal(x, colour[:, :, None, None].expand_as(x))
    assert bool(dataset.notes) is (held_out == "val")


def test_imagefolder_crops_the_centre_and_reads_any_mode(tmp_path):
    from PIL import Image

    w.write_imagefolder(tmp_path)
    stripes = np.repeat(np.array([10, 10, 200, 200, 10, 10], np.uint8)[None], 2, axis=0)
    Image.fromarray(stripes).save(tmp_path / "train" / "ants" / "0.png")
    assert (load("imagefolder", tmp_path, size=2).train_x[0] == 200).all()
    assert load("imagefolder", tmp_path).train_x.shape[2:] == (32, 32)


def test_imagefolder_of_nested_folders(tmp_path):
    w.write_imagefolder(tmp_path)
    inner = tmp_path / "train" / "ants" / "images"
    inner.mkdir()
    (inner / "9.JPEG").write_bytes(w.png((255, 0, 0), kind="JPEG"))
    assert len(load("imagefolder", tmp_path, size=4).train_y) == 6


@pytest.mark.parametrize("name", NAMES[1:])
def test_npz_serves_every_set(tmp_path, name):
    data = w.arrays(shape=(1, 6, 7) if "mnist" in name else (3, 6, 7), classes=4)
    w.write_npz(tmp_path / f"{name}.npz", data)
    same(load(name, tmp_path), data)


@pytest.mark.parametrize("layout", ["rows and columns", "channels last", "wide integers", "label column"])
def test_npz_layouts(tmp_path, layout):
    data = w.arrays(shape=(3, 6, 7), classes=10)
    written = list(data)
    if layout == "rows and columns":
        data[0], data[2] = data[0][:, :1], data[2][:, :1]
        written[0], written[2] = data[0][:, 0], data[2][:, 0]
    elif layout == "channels last":
        written[0], written[2] = (x.transpose(0, 2, 3, 1) for x in (data[0], data[2]))
    elif layout == "wide integers":
        written[0] = data[0].astype(np.int32)
    else:
        written[1] = data[1][:, None]
    w.write_npz(tmp_path / "mnist.npz", written)
    same(load("mnist", tmp_path), data)


def test_npz_class_names(tmp_path):
    data = w.arrays(classes=3)
    path = tmp_path / "imagefolder.npz"
    w.write_npz(path, data)
    assert load("imagefolder", tmp_path).class_names == ("0", "1", "2")
    keys = dict(zip(("x_train", "y_train", "x_test", "y_test"), data, strict=True))
    np.savez(path, **keys, class_names=np.array(["ant", "bee", "cow"]))
    assert load("imagefolder", tmp_path).class_names == ("ant", "bee", "cow")


@pytest.mark.parametrize(
    ("name", "module"), [("digits", "sklearn"), ("svhn", "scipy"), ("imagefolder", "PIL")]
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, name, module):
    import sys

    w.write_svhn(tmp_path, w.arrays())
    w.write_imagefolder(tmp_path)
    for loaded in [key for key in sys.modules if key.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=r"fallow\[lab\]"):
        load(name, tmp_path)

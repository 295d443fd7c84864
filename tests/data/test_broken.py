"""Corrupt, truncated and wrong files: one DataError that names the file, whatever is wrong with it."""

import codecs
import gzip
import os
import pickle
import shutil
import struct

import numpy as np
import pytest
import written_sets as w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fallow.data import load
from fallow.data._cifar import parse_binary
from fallow.data._idx import parse_idx
from fallow.data._names import CIFAR10, CIFAR100
from fallow.data._pickle import load_arrays
from fallow.errors import DataError

IMAGES, LABELS = w.DIGIT_STEMS[:2]
SMALL = w.arrays(train=4, test=2, shape=(1, 5, 3))


def refused(name, folder, *words):
    with pytest.raises(DataError) as caught:
        load(name, folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(("layout", "record"), [(CIFAR10, 3073), (CIFAR100, 3074)])
@given(count=st.integers(0, 3), extra=st.integers(0, 3073))
def test_whole_records_pass_and_partial_ones_do_not(layout, record, count, extra):
    data = bytes(count * record + extra)
    if count and extra in (0, record):
        images, labels = parse_binary(data, layout, "x.bin")
        assert images.shape == (count + extra // record, 3, 32, 32) and not labels.any()
    elif extra == record:
        assert len(parse_binary(data, layout, "x.bin")[0]) == 1
    else:
        with pytest.raises(DataError, match=f"x.bin: {len(data)} bytes .* {record}-byte records"):
            parse_binary(data, layout, "x.bin")


@given(rows=st.integers(1, 4), height=st.integers(1, 4), width=st.integers(1, 4), change=st.integers(-70, 70))
def test_an_idx_file_of_any_other_length_is_refused(rows, height, width, change):
    array = np.arange(rows * height * width).reshape(rows, height, width) % 256
    data = w.idx_bytes(array)
    assert np.array_equal(parse_idx(data, 3, "x"), array)
    changed = data[:change] if change < 0 else data + bytes(change)
    if change:
        with pytest.raises(DataError, match="^x: "):
            parse_idx(changed, 3, "x")


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"", "starts with nothing"),
        (b"\x1f\x8b\x08\x00", "starts with 1f8b0800"),
        (struct.pack(">I3I", 0x00000D03, 1, 5, 3), "starts with 00000d03"),
        (struct.pack(">I3I", 0x00000803, 1, 0, 3), "images of (0, 3) pixels"),
        (struct.pack(">I3I", 0x00000803, 2**32 - 1, 2**32 - 1, 2**32 - 1), "0 bytes is not a whole number"),
    ],
)
def test_idx_headers(head, words):
    with pytest.raises(DataError) as caught:
        parse_idx(head, 3, "x")
    assert words in str(caught.value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), cut=st.booleans())
def test_a_damaged_gz_file_is_refused_or_read_as_it_was(tmp_path, place, flip, cut):
    w.write_idx(tmp_path, SMALL)
    path = tmp_path / f"{IMAGES}.gz"
    data = bytearray(path.read_bytes())
    at = int(place * len(data))
    data = data[:at] if cut else data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :]
    path.write_bytes(data)
    try:
        dataset = load("mnist", tmp_path)
    except DataError as error:
        assert str(path) in str(error)
    else:  # only bytes of the gzip header that carry nothing may differ
        assert not cut and at < 10 and np.array_equal(dataset.train_x.numpy(), SMALL[0])


def test_idx_parts_that_do_not_belong_together(tmp_path):
    w.write_idx(tmp_path, SMALL)
    path = tmp_path / f"{LABELS}.gz"
    path.write_bytes(gzip.compress(w.idx_bytes(np.zeros(3))))
    refused("mnist", tmp_path, "4 images but 3 labels", LABELS)
    path.write_bytes(gzip.compress(w.idx_bytes(np.array([0, 1, 10, 255]))))
    refused("mnist", tmp_path, "label 10 of record 2 is not in 0..9 (2 such labels)", str(path))
    w.write_idx(tmp_path, [*SMALL[:2], *w.arrays(test=2, shape=(1, 5, 4))[2:]])
    refused("mnist", tmp_path, "training images are (5, 3), test images (5, 4) pixels")


def test_cifar_binary_labels_and_empty_batches(tmp_path):
    w.write_cifar_binary(tmp_path, w.arrays())
    good = (tmp_path / "data_batch_2.bin").read_bytes()
    (tmp_path / "data_batch_2.bin").write_bytes(b"\x0a" + good[1:])
    refused("cifar10", tmp_path, "data_batch_2.bin: label 10 of record 0")
    (tmp_path / "data_batch_2.bin").write_bytes(b"")
    refused("cifar10", tmp_path, "data_batch_2.bin: 0 bytes", "it is empty")
    (tmp_path / "data_batch_2.bin").write_bytes(good[:-1])
    refused(
        "cifar10", tmp_path, "data_batch_2.bin", "3073-byte records (11 whole records and 3072 bytes more)"
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "holds a list where a dict belongs"),
        ({b"data": np.zeros((1, 3072), np.uint8)}, "lacks labels"),
        ({b"data": np.zeros((2, 3000), np.uint8), b"labels": [0, 1]}, "3072-byte records"),
        ({b"data": np.zeros((1, 3072), np.float32), b"labels": [0]}, "not an array of unsigned bytes"),
        ({b"data": b"no array", b"labels": [0]}, "not an array of unsigned bytes"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}, "2 images but 1 labels"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [-1]}, "label -1 of record 0"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": ["cat"]}, "labels must be whole numbers"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [[1], [1, 2]]}, "not one row of numbers"),
    ],
)
def test_cifar_python_contents(tmp_path, content, words):
    w.write_cifar_python(tmp_path, w.arrays())
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(content))
    refused("cifar10", tmp_path, "data_batch_1: ", words)


class Runs:
    """A pickle of it calls a function when it is read."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("thing", "words"),
    [
        (Runs(os.mkdir, "ran"), ".mkdir, and only"),
        (Runs(eval, "1"), ".eval, and only"),
        (Runs(np.load, "x"), "asks for numpy.load"),
        (np.array([{}], object), "asks for an array of object"),
        (np.zeros(1, "V8"), "asks for an array of |V8"),
        (Runs(codecs.encode, "abc", "rot13"), "asks for the codec rot13"),
        (Runs(np.ndarray, (1 << 40,)), "not a whole pickle"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 5])
def test_a_pickle_gets_at_nothing_but_arrays(tmp_path, monkeypatch, thing, words, protocol):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        load_arrays(pickle.dumps(thing, protocol), "batch")
    assert words in str(caught.value) and not (tmp_path / "ran").exists()


def test_a_persistent_reference_is_refused():
    with pytest.raises(DataError, match="an object outside itself"):
        load_arrays(b"Pabc\n.", "batch")


@given(cut=st.integers(0, 10_000), garbage=st.binary(max_size=40))
def test_a_cut_or_random_pickle_is_a_data_error(cut, garbage):
    whole = w.python2_pickle(np.zeros((1, 3072), np.uint8), [1], b"labels")
    for data in (whole[: cut % len(whole)], garbage):
        try:
            load_arrays(data, "batch")
        except DataError as error:
            assert "batch: " in str(error)
        else:
            assert data is garbage


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.99])
@pytest.mark.parametrize("kind", ["binary", "python"])
def test_a_cut_archive_is_refused(tmp_path, share, kind):
    folder = tmp_path / "unpacked"
    (w.write_cifar_binary if kind == "binary" else w.write_cifar_python)(folder, w.arrays())
    path = tmp_path / f"cifar-10-{kind}.tar.gz"
    w.archive(folder, path)
    shutil.rmtree(folder)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    refused("cifar10", tmp_path, str(path), "corrupt or cut short")


def test_an_archive_with_a_wrong_check_sum_is_refused(tmp_path):
    folder = tmp_path / "unpacked"
    w.write_cifar_binary(folder, w.arrays(train=400))
    path = tmp_path / "cifar-10-binary.tar.gz"
    w.archive(folder, path)
    shutil.rmtree(folder)
    data = path.read_bytes()
    path.write_bytes(data[:-8] + bytes([data[-8] ^ 1]) + data[-7:])  # the CRC of the whole
    refused("cifar10", tmp_path, str(path), "corrupt or cut short")


def test_an_archive_of_another_set(tmp_path):
    folder = tmp_path / "unpacked"
    w.write_cifar_binary(folder, w.arrays(), coarse=True)
    w.archive(folder, tmp_path / "cifar-10-binary.tar.gz")
    refused("cifar10", tmp_path, "no data_batch_*.bin in it: it is of another set")


def test_svhn(tmp_path):
    from scipy.io import savemat

    w.write_svhn(tmp_path, w.arrays(train=3, test=2))
    path = tmp_path / "train_32x32.mat"
    good = path.read_bytes()
    for cut in (0, 60, 200, len(good) // 2, len(good) - 8):
        path.write_bytes(good[:cut])
        refused("svhn", tmp_path, str(path))
    x = np.zeros((32, 32, 3, 2), np.uint8)
    for content, words in (
        ({"X": x}, "lacks X or y"),
        ({"X": x.astype(float), "y": [[1], [2]]}, "X must be uint8"),
        ({"X": x[:16], "y": [[1], [2]]}, "X must be uint8 (32, 32, 3, n)"),
        ({"X": x, "y": [[1], [11]]}, "label 11 of record 1"),
        ({"X": x, "y": [[1], [0]]}, "label 0 is not in 1..10"),
        ({"X": x, "y": [[1], [2], [3]]}, "2 images but 3 labels"),
    ):
        savemat(path, content)
        refused("svhn", tmp_path, str(path), words)


def test_image_folders(tmp_path):
    w.write_imagefolder(tmp_path)
    path = tmp_path / "train" / "bees" / "1.png"
    good = path.read_bytes()
    for content in (b"", b"no image", good[: len(good) // 2]):
        path.write_bytes(content)
        refused("imagefolder", tmp_path, str(path), "not an image that can be used")
    path.write_bytes(w.png(1000, mode="I;16"))
    refused("imagefolder", tmp_path, "mode I;16, where images have 8 bits a channel")
    path.write_bytes(good)
    (tmp_path / "val" / "wasps").mkdir()
    refused("imagefolder", tmp_path, "wasps: no images in it")
    (tmp_path / "val" / "wasps" / "0.png").write_bytes(good)
    refused("imagefolder", tmp_path, "the classes wasps have no folder in")
    shutil.rmtree(tmp_path / "train")
    (tmp_path / "train").mkdir()
    refused("imagefolder", tmp_path, "no class folders in it")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"y_test": None}, "lacks y_test (it has x_train, y_train, x_test)"),
        ({"x_train": np.zeros((23, 28, 28))}, "must be whole numbers 0..255 (uint8), got float64"),
        ({"x_train": np.full((23, 28, 28), 256)}, "must be whole numbers 0..255 (uint8), got int64"),
        ({"x_train": np.zeros((23, 784), np.uint8)}, "shape (23, 784) must be"),
        ({"x_train": np.zeros((23, 3, 3, 3), np.uint8)}, "tell which: reshape it"),
        ({"x_train": np.zeros((23, 0, 28), np.uint8)}, "images without pixels"),
        ({"x_train": np.zeros((22, 28, 28), np.uint8)}, "22 images but 23 labels"),
        ({"x_train": np.zeros((23, 28, 27), np.uint8)}, "the shapes (1, 28, 27) and (1, 28, 28)"),
        ({"x_train": np.zeros((0, 28, 28), np.uint8), "y_train": np.zeros(0, int)}, "no images in it"),
        ({"y_train": np.zeros(23)}, "labels must be whole numbers"),
        ({"y_train": np.full(23, 10)}, "label 10 of record 0 is not in 0..9"),
        ({"y_train": np.array([{}] * 23, object)}, "holds Python objects"),
    ],
)
def test_npz_contents(tmp_path, change, words):
    content = dict(zip(("x_train", "y_train", "x_test", "y_test"), w.arrays(shape=(1, 28, 28)), strict=True))
    content = {key: value for key, value in (content | change).items() if value is not None}
    np.savez(tmp_path / "mnist.npz", **content)
    refused("mnist", tmp_path, "mnist.npz", words)


def test_npz_files_that_are_none(tmp_path):
    path = tmp_path / "mnist.npz"
    w.write_npz(path, w.arrays(shape=(1, 28, 28)))
    good = path.read_bytes()
    for content in (b"", b"no zip", good[: len(good) // 2], good[:-30]):
        path.write_bytes(content)
        refused("mnist", tmp_path, str(path), "not a whole .npz file")

"""Where sets are looked for, in which order, and what is said where they are missing."""

import pytest
import written_sets as w

from fallow.data import NAMES, load
from fallow.errors import DataError, UsageError

UNPACKED = {
    "mnist": "MNIST/raw",
    "fashion-mnist": "FashionMNIST/raw",
    "cifar10": "cifar-10-batches-bin",
    "cifar100": "cifar-100-binary",
}


def write(name, folder, seed=0):
    shape = (1, 28, 28) if "mnist" in name else (3, 32, 32)
    data = w.arrays(seed=seed, shape=shape, classes=100 if name == "cifar100" else 10)
    if "mnist" in name:
        w.write_idx(folder, data)
    else:
        w.write_cifar_binary(folder, data, coarse=name == "cifar100")
    return data


@pytest.mark.parametrize("name", UNPACKED)
def test_the_order_of_the_places(tmp_path, name):
    # Each place written later comes earlier in the search, so it must win.
    unpacked = UNPACKED[name]
    for seed, place in enumerate([f"{name}/{unpacked}", unpacked, name, "."]):
        data = write(name, tmp_path / place, seed)
        assert load(name, tmp_path).train_x[0].numpy().tolist() == data[0][0].tolist()


def test_without_a_folder_the_cache_and_then_data_are_searched(tmp_path, monkeypatch):
    import platformdirs

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / "cache" / name))
    with pytest.raises(DataError, match=r"cache/fallow/data and data, and below in mnist, MNIST/raw"):
        load("mnist")
    for seed, place in enumerate(["data/mnist", "cache/fallow/data/mnist"]):
        data = write("mnist", tmp_path / place, seed)
        assert load("mnist").train_x[0].numpy().tolist() == data[0][0].tolist()


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_missing_set_says_where_it_looked_what_it_wants_and_how_to_get_it(tmp_path, name):
    with pytest.raises(DataError) as caught:
        load(name, tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message and name in message and f"{name}.npz" in message
    assert "https://" in message or "http://" in message or "your own images" in message
    assert "\n" not in message


def test_missing_parts_are_named(tmp_path):
    write("mnist", tmp_path / "mnist")
    (tmp_path / "mnist" / f"{w.DIGIT_STEMS[3]}.gz").unlink()
    with pytest.raises(DataError, match="mnist lacks t10k-labels"):
        load("mnist", tmp_path)
    write("cifar10", tmp_path)
    (tmp_path / "test_batch.bin").unlink()
    with pytest.raises(DataError, match="lacks test_batch.bin"):
        load("cifar10", tmp_path)
    w.write_svhn(tmp_path, w.arrays(train=2, test=2))
    (tmp_path / "test_32x32.mat").unlink()
    with pytest.raises(DataError, match="lacks test_32x32.mat"):
        load("svhn", tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="has train but lacks val or test"):
        load("imagefolder", tmp_path)


def test_a_partial_set_does_not_hide_a_whole_one(tmp_path):
    write("cifar10", tmp_path)
    (tmp_path / "test_batch.bin").unlink()
    data = w.arrays(seed=5)
    w.write_cifar_python(tmp_path / "cifar-10-batches-py", data)
    assert load("cifar10", tmp_path).train_y.tolist() == data[1].tolist()


@pytest.mark.parametrize(("name", "near"), [("fashion_mnist", "fashion-mnist"), ("cifar", "cifar10")])
def test_an_unknown_name(name, near):
    with pytest.raises(UsageError, match=f'got "{name}": did you mean "{near}"'):
        load(name)


def test_folders_that_cannot_be(tmp_path):
    for nowhere in (tmp_path / "nowhere", "~nobody-of-this-name/nowhere"):
        with pytest.raises(DataError, match="nowhere does not exist"):
            load("mnist", nowhere)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="file is a file: pass the folder that holds it"):
        load("mnist", tmp_path / "file")


@pytest.mark.parametrize("size", [0, -1, 2.5, 5000])
def test_sizes_that_cannot_be(tmp_path, size):
    w.write_imagefolder(tmp_path)
    with pytest.raises(UsageError, match="size must be a whole number from 1 to 4096"):
        load("imagefolder", tmp_path, size=size)


def test_size_is_refused_where_it_would_do_nothing(tmp_path):
    with pytest.raises(UsageError, match='size is for "imagefolder" alone'):
        load("digits", size=32)

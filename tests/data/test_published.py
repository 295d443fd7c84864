"""The published sets where a copy lies beside the repository: counts, moments, order."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fallow.data import load

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def needs(*names):
    missing = [name for name in names if not (SHARED / name).exists()]
    return pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)} in {SHARED}")


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        pytest.param("mnist", 0.1307, 0.3081, marks=needs("mnist")),
        pytest.param("fashion-mnist", 0.28604, 0.35302, marks=needs("fashion-mnist")),
    ],
)
def test_idx_sets(name, mean, std):
    dataset = load(name, SHARED)
    assert dataset.train_x.shape == (60000, 1, 28, 28) and dataset.test_x.shape == (10000, 1, 28, 28)
    assert dataset.notes == ()
    digits = len(str(mean)) - 2
    assert round(dataset.mean.item(), digits) == mean and round(dataset.std.item(), digits) == std
    if name == "mnist":
        assert dataset.train_y[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    else:
        assert dataset.train_y.bincount().tolist() == [6000] * 10
        assert dataset.class_names[dataset.train_y[0]] == "ankle boot"


@needs("cifar10", "unpack_cifar10.py")
def test_cifar10_with_the_test_images_that_are_there(tmp_path):
    command = [sys.executable, str(SHARED / "unpack_cifar10.py"), str(tmp_path), "--train", "2000"]
    subprocess.run(command, check=True, capture_output=True)
    dataset = load("cifar10", tmp_path)
    assert dataset.train_x.shape == (2000, 3, 32, 32) and dataset.test_x.shape == (1000, 3, 32, 32)
    assert dataset.notes == (
        "2000 training images are there, the published set has 50000",
        "1000 test images are there, the published set has 10000",
    )
    names = [dataset.class_names[label] for label in dataset.train_y[:4]]
    assert names == ["frog", "truck", "truck", "deer"]
    # The whole set's published mean is .4914, .4822, .4465; 2,000 images come within a few thousandths.
    published = torch.tensor([0.4914, 0.4822, 0.4465])
    torch.testing.assert_close(dataset.mean, published, atol=0.01, rtol=0)

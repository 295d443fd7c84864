"""The program on real images, where a copy of the published sets lies beside the repository."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import call

from fallow.recipes.train import read_results

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
OPTIONS = [
    "--train-size",
    "200",
    "--model",
    "resnet20",
    "--epochs",
    "1",
    "--batch-size",
    "50",
    "--threads",
    "1",
]


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not (SHARED / name).exists(), reason=f"no {name} in {SHARED}")


@needs("fashion-mnist")
def test_fashion_mnist_from_its_idx_files(tmp_path: Path):
    done = call("train", "--data", "fashion-mnist", "--data-dir", SHARED, *OPTIONS, "--no-twin", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    found = read_results(tmp_path / "runs/fashion-mnist-resnet20-1")
    assert found["provenance"]["data"]["test"] == found["arms"]["model"]["summary"]["test_images"] == 10_000
    assert len(found["sites"]) == 9


@needs("unpack_cifar10.py")
def test_cifar10_from_its_binary_version(tmp_path: Path):
    subprocess.run(
        [sys.executable, SHARED / "unpack_cifar10.py", tmp_path / "set", "--train", "400"],
        check=True,
        capture_output=True,
    )
    done = call(
        "train", "--data", "cifar10", "--data-dir", tmp_path / "set", *OPTIONS, "--out", tmp_path / "run"
    )
    assert (done.returncode, done.stderr) == (0, "")
    data = read_results(tmp_path / "run")["provenance"]["data"]
    assert (data["train"], data["validation"], data["test"]) == (180, 20, 1000)
    assert any("400 training images" in note for note in data["notes"])

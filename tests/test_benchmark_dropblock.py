"""The DropBlock benchmark: its peers are those they are named after, and it measures what it says."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import dropblock
from fallow import kernels


@pytest.mark.parametrize("block", [3, 7])
def test_the_rules_are_those_of_the_packages(block: int) -> None:
    tv = pytest.importorskip("torchvision.ops")
    timm = pytest.importorskip("timm.layers.drop")
    x = torch.randn(3, 4, 9, 8)
    pairs = [
        (lambda: dropblock.torchvision_rule(x, 0.2, block), lambda: tv.drop_block2d(x, 0.2, block)),
        *(
            (
                lambda shared=shared: dropblock.timm_rule(x, 0.2, block, shared),
                lambda shared=shared: timm.drop_block_2d(x, 0.2, block, couple_channels=shared),
            )
            for shared in (True, False)
        ),
    ]
    for ours, theirs in pairs:
        results = []
        for form in (ours, theirs):
            torch.manual_seed(4)
            results.append(form())
        torch.testing.assert_close(*results)


def test_a_run_writes_every_row_and_its_bounds(tmp_path, capsys) -> None:
    path = tmp_path / "out.json"
    arguments = ["--shape", "2x16x9x9", "--pairs", "1", "--block", "3", "--dtype", "bfloat16"]
    assert dropblock.main([*arguments, "--json", str(path)]) in (0, 1)
    report = json.loads(path.read_text())
    assert [row["backward"] for row in report["rows"]] == [False, True]
    for row in report["rows"]:
        assert set(row["ms"]) == set(row["memory"]) == set(dropblock.arms(0.9, 3))
        assert all(value > 0 for value in row["ms"].values())
    assert "fallow, shared" in capsys.readouterr().out


def test_the_bounds_are_judged_by_the_interval_that_reaches_furthest() -> None:
    row = {
        "backward": False,
        "over": {
            dropblock.OURS: {"torchvision": {"low": 15, "high": 20.1}, "F.dropout": {"low": 1, "high": 2}},
            dropblock.PLAIN: {"torchvision": {"low": 5, "high": 5.9}, "F.dropout": {"low": 0.5, "high": 1.1}},
            dropblock.SCALAR: {
                dropblock.OURS: {"low": 2.6, "high": 2.7},
                dropblock.SHARED: {"low": 1.1, "high": 1.4},
            },
        },
        "memory": {dropblock.OURS: 0.4, dropblock.PLAIN: 0.3},
    }
    plain = {
        "torchvision >= 6 fallow, plain": False,
        "F.dropout >= 1 fallow, plain": True,
        "memory of fallow <= 0.3": False,
        "memory of fallow, plain <= 0.3": True,
    }
    assert dropblock.verdicts(row, False) == plain
    assert dropblock.verdicts(row, True) == plain | {
        "torchvision >= 20 fallow": True,
        "fallow <= 2.5 x * scalar": False,
        "fallow, shared <= 1.15 x * scalar": True,
    }
    memory = {name: holds for name, holds in plain.items() if name.startswith("memory")}
    assert dropblock.verdicts({**row, "backward": True}, True) == memory


def test_plain_arms_do_without_the_kernel() -> None:
    seen = []
    dropblock.without_kernel(lambda x: seen.append(kernels.available().used) or x)(torch.ones(1))
    assert seen == [False]
    assert len(set(dropblock.pairs_of(dropblock.arms(0.9, 3)))) >= 5 + 2 * 4


@pytest.mark.parametrize("wrong", [["--shape", "3x4"], ["--shape", "axb"], ["--rate", "1"], ["--pairs", "0"]])
def test_wrong_numbers_are_refused(wrong: list[str], capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        dropblock.parse(wrong)
    assert wrong[0] in capsys.readouterr().err

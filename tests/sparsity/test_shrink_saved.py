"""Files of a shrunken model, and the way back from them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shrink_cases import (
    Dense,
    Grouped,
    InvertedResidual,
    LeNet5,
    deaden,
    lively,
    mlp,
    outputs,
    unread,
    vgg,
)
from torch import Tensor, nn

from fallow.errors import ArgumentError, DataError, UsageError
from fallow.sparsity.shrink import Shrunk, shrink
from fallow.sparsity.shrinking.files import load
from fallow.sparsity.shrinking.plan import apply_plan

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def grouped() -> tuple[nn.Module, Shrunk]:
    net = lively(Grouped())
    deaden(net, "stem", [0, 5, 11])
    return net, shrink(net, IMAGE)


@pytest.mark.parametrize(
    ("build", "x", "dead", "layer", "norm"),
    [
        (mlp, torch.randn(2, 20), [1, 2], "0", None),
        (LeNet5, torch.randn(2, 1, 28, 28), [1, 2], "conv2", None),
        (vgg, IMAGE, [0, 5], "3", "4"),
        (InvertedResidual, IMAGE, [0, 5], "depthwise", "norm2"),
        (Grouped, IMAGE, [0, 5, 11], "stem", None),
        (Dense, IMAGE, [2], "two", None),
    ],
)
def test_a_fresh_dense_model_takes_the_plan_and_the_weights(build, x, dead, layer, norm, tmp_path) -> None:
    net = lively(build())
    deaden(net, layer, dead, norm)
    result = shrink(net, x)
    assert result.removed
    (tmp_path / "model.pt2").write_text("of an earlier model")
    saved = result.save(tmp_path, export=False)
    assert saved.exported is None and not (tmp_path / "model.pt2").exists()
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan == result.plan
    fresh = build()
    small = apply_plan(fresh, plan)
    small.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    for a, b in zip(outputs(result.model, x), outputs(small, x), strict=True):
        assert torch.equal(a, b)
    assert repr(small) == repr(result.model)
    assert [p.shape for p in fresh.parameters()] == [p.shape for p in net.parameters()]
    again = load(tmp_path, build())
    assert torch.equal(outputs(again, x)[0], outputs(result.model, x)[0])


def test_the_exported_model_runs_without_fallow_and_with_any_batch(tmp_path: Path) -> None:
    net = lively(vgg())
    deaden(net, "3", [0, 5], "4")
    result = shrink(net, IMAGE)
    saved = result.save(tmp_path)
    assert saved.exported == tmp_path / "model.pt2" and "any batch size" in saved.note
    x = torch.randn(5, 3, 8, 8)
    torch.save((x, outputs(result.model, x)[0]), tmp_path / "expected.pt")
    script = """
import sys, torch
sys.modules["fallow"] = None  # any import of it fails
net = torch.export.load("model.pt2").module()
x, expected = torch.load("expected.pt", weights_only=True)
assert (net(x) - expected).abs().max() < 1e-5
assert net(x[:1]).shape == (1, 10)
weights = torch.load("weights.pt", weights_only=True)
assert weights["3.weight"].shape == (6, 8, 3, 3)
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_model_that_torch_cannot_export_is_saved_all_the_same(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).relu()
            return self.b(y) if float(x.sum()) > -99 else self.b(-y)

    net = lively(Branching())
    unread(net, "b", [1])
    result = shrink(net, torch.randn(2, 4))
    (tmp_path / "model.pt2").write_text("of an earlier run")
    saved = result.save(tmp_path)
    assert saved.exported is None and "torch.export cannot take this model" in saved.note
    assert not (tmp_path / "model.pt2").exists()
    with pytest.raises(DataError, match="has no model.pt2: pass model="):
        load(tmp_path)
    assert load(tmp_path, Branching()).a.out_features == 5  # pyright: ignore


def test_keyword_arguments_are_exported_too(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
            return self.b(self.a(x).relu()) * scale

    net = lively(Two()).double()
    unread(net, "b", [1])
    example = {"x": torch.randn(2, 4), "scale": torch.tensor(2.0)}
    saved = shrink(net, example).save(tmp_path)
    assert saved.exported is not None and "any batch size" in saved.note
    x = {"x": torch.randn(7, 4).double(), "scale": torch.tensor(2.0).double()}
    assert torch.allclose(load(tmp_path)(**x), net(**x))


def test_a_plan_for_another_model_is_refused_by_name() -> None:
    net, result = grouped()
    other = Grouped()
    other.stem = nn.Conv2d(3, 24, 1)
    with pytest.raises(UsageError, match=r"stem.weight has shape \(12, 3, 1, 1\), got \(24, 3, 1, 1\)"):
        apply_plan(other, result.plan)
    with pytest.raises(UsageError, match="nothing of that name"):
        apply_plan(mlp(), result.plan)
    with pytest.raises(ArgumentError, match="plan must be"):
        apply_plan(net, {})
    with pytest.raises(ArgumentError, match="takes a torch.nn.Module"):
        apply_plan("net", result.plan)  # pyright: ignore
    with pytest.raises(UsageError, match="version 1, got 2"):
        apply_plan(net, {**result.plan, "version": 2})


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not hold a shrunken model"):
        load(tmp_path, mlp())
    (tmp_path / "plan.json").write_text("[1]")
    torch.save({}, tmp_path / "weights.pt")
    with pytest.raises(DataError, match="is not the plan"):
        load(tmp_path, mlp())

"""Laws of what shrinking is made of: labels, constants, and random zeros in networks of all kinds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from shrink_cases import Dense, Grouped, InvertedResidual, LeNet5, UNet, assert_same, lively, mlp, vgg
from torch import Tensor, nn

from fallow.models import CifarResNet, SmallViT
from fallow.sparsity.shrink import shrink
from fallow.sparsity.shrinking.facts import Info
from fallow.sparsity.shrinking.labels import Labels, along, reduced, reshaped, support, vector
from fallow.sparsity.shrinking.prove import difference
from fallow.sparsity.shrinking.record import Recorder, record

IMAGE = (3, 8, 8)
NETS: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (mlp, (20,)),
    (LeNet5, (1, 28, 28)),
    (vgg, IMAGE),
    (InvertedResidual, IMAGE),
    (Dense, IMAGE),
    (UNet, (1, 8, 8)),
    (Grouped, IMAGE),
    (lambda: CifarResNet(8, widths=(4, 5, 6)), IMAGE),
    (lambda: SmallViT(width=12, depth=1, heads=2, patch=4, image=8), IMAGE),
]


def scatter_zeros(net: nn.Module, seed: int, share: float) -> None:
    """Zero rows, columns and single weights at random, some with their biases and norms."""
    generator = torch.Generator().manual_seed(seed)

    def some(n: int) -> Tensor:
        return torch.rand(n, generator=generator) < share

    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear, nn.ConvTranspose2d)):
                rows = some(module.weight.shape[0])
                module.weight[rows] = 0.0
                module.weight[:, some(module.weight.shape[1])] = 0.0
                module.weight[torch.rand(module.weight.shape, generator=generator) < share / 2] = 0.0
                if module.bias is not None:
                    module.bias[some(len(module.bias))] = 0.0
            elif isinstance(module, nn.BatchNorm2d):
                module.weight[some(len(module.weight))] = 0.0
                module.bias[some(len(module.bias))] = 0.0


@pytest.mark.parametrize(("build", "shape"), NETS)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.sampled_from([0.1, 0.3, 0.5, 0.8]))
@example(seed=255, share=0.5)  # wrong heads differ by 1e-9: attention over tokens nearly alike
def test_random_zeros_never_change_outputs_and_leave_nothing_for_a_second_time(
    build: Callable[[], nn.Module], shape: tuple[int, ...], seed: int, share: float
) -> None:
    torch.manual_seed(seed)
    net = lively(build(), seed).double()
    scatter_zeros(net, seed, share)
    x = torch.randn(3, *shape, dtype=torch.float64)
    result = shrink(net, x[:1])
    assert_same(net, result.model, x, tolerance=1e-11)
    # attention that has no effect keeps equal pieces of its heads, smaller ones the second time
    assert all("attention" in name for name in shrink(result.model, x[:1]).removed)
    assert all(p.numel() for p in result.model.parameters())


class _Watched(Recorder):
    """Compares what it takes for constant with what is computed."""

    compared = 0

    def _put(self, tensor: Tensor, info: Info) -> Info:
        self._compare(tensor, info)
        return super()._put(tensor, info)

    def _write(self, tensor: Tensor, info: Info, memory: int) -> None:
        self._compare(tensor, info)
        super()._write(tensor, info, memory)

    def _compare(self, tensor: Tensor, info: Info) -> None:
        for layer in info.layers:
            assert layer.dim() == tensor.dim()
            assert all(n in (1, m) for n, m in zip(layer.shape, tensor.shape, strict=True))
        if info.known is None or not tensor.is_floating_point():
            return
        assert info.known.shape == tensor.shape
        there = ~info.known.isnan()
        assert torch.allclose(info.known[there], tensor[there], rtol=1e-12, atol=1e-12)
        type(self).compared += int(there.sum())


@pytest.mark.parametrize(("build", "shape"), NETS)
@pytest.mark.parametrize("share", [0.3, 0.8])
def test_what_is_taken_for_constant_is_what_is_computed(
    build: Callable[[], nn.Module], shape: tuple[int, ...], share: float
) -> None:
    net = lively(build()).double()
    scatter_zeros(net, 1, share)
    _Watched.compared = 0
    with torch.no_grad(), _Watched(net):
        net(torch.randn(3, *shape, dtype=torch.float64))
    assert _Watched.compared > 100


@pytest.mark.parametrize(
    "function",
    [
        lambda x: nn.functional.glu(x, 1),
        lambda x: x.flip(2).roll(1, 2).softmax(2),
        lambda x: torch.stack([x, x], 2)[:, :, 0],
        lambda x: nn.functional.pad(x, (1, 2), value=0.5).unsqueeze(1).squeeze(1),
        lambda x: nn.functional.interpolate(x, scale_factor=2),
        lambda x: torch.where(x > 0, x, x * 0.1).clamp(-0.5, 0.5),
        lambda x: nn.functional.group_norm(x, 6),
        lambda x: torch.einsum("bct,bcs->bcts", x, x).sum(3),
        lambda x: x.transpose(1, 2).reshape(x.shape[0], -1, 3, 2).flatten(2).transpose(1, 2),
        lambda x: torch.cat([x[:, :, :2], x.new_zeros(x.shape[0], 6, 1)], 2),
        lambda x: x - x.amax(2, keepdim=True),
        lambda x: x / (x.square().mean(1, keepdim=True) + 1).sqrt(),
    ],
)
def test_glue_of_all_kinds_is_followed_or_stays(function: Callable[[Tensor], Tensor]) -> None:
    class Glued(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv1d(2, 6, 1), nn.LazyConv1d(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(function(self.first(x)))

    net = Glued().double()
    x = torch.randn(3, 2, 5, dtype=torch.float64)
    net(x)
    net = lively(net)
    with torch.no_grad():
        net.last.weight[:, [0, 2]] = 0.0  # pyright: ignore[reportIndexIssue]
        net.first.weight[[1, 2]] = 0.0
    with torch.no_grad(), _Watched(net):
        net(x)
    result = shrink(net, x)
    assert_same(net, result.model, x)
    assert result.removed or result.left


def test_labels_are_tied_and_frozen_in_whole_trees() -> None:
    labels = Labels()
    a, b, c = labels.fresh(3), labels.fresh(3), labels.fresh(1)
    labels.tie(a, b)
    labels.tie(c, b[:1])
    assert torch.equal(labels.roots(a), labels.roots(b)) and labels.find(int(c)) == labels.find(int(a[0]))
    labels.freeze(c, "first")
    labels.freeze(a, "second")
    assert [labels.frozen(labels.find(i)) for i in a.tolist()] == ["first", "second", "second"]
    d = labels.fresh(1)
    labels.tie(d, a[1])
    assert labels.frozen(labels.find(int(d))) == "second"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_reshaped_layer_labels_each_element_as_before(data: st.DataObject) -> None:
    old = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    count = int(torch.tensor(old).prod())
    new: list[int] = []
    while count > 1:
        n = data.draw(st.sampled_from([d for d in range(2, count + 1) if count % d == 0]))
        new.append(n)
        count //= n
    for _ in range(data.draw(st.integers(0, 2))):
        new.insert(data.draw(st.integers(0, len(new))), 1)
    new = new or [1]
    labels = Labels()
    layers = [vector(labels.fresh(n), d, len(old)) for d, n in enumerate(old) if n > 1]
    for before, after in zip(layers, reshaped(labels, layers, old, new), strict=True):
        assert torch.equal(before.expand(old).reshape(new), after.expand(new))


def test_mixing_along_a_dimension_ties_slabs_and_freezes_the_rest() -> None:
    labels = Labels()
    both, alone = labels.fresh(6).reshape(2, 3), labels.fresh(3).reshape(1, 3)
    (left,) = reduced(labels, [both, alone], [1], "softmax")
    assert support(left) == (0,) and along([left], [0]) is left
    assert len(torch.unique(labels.roots(both))) == 2
    assert all(labels.frozen(labels.find(i)) == "softmax" for i in alone.flatten().tolist())
    assert labels.frozen(labels.find(int(left[0, 0]))) is None


def test_a_difference_is_seen_and_an_error_leaves_its_place() -> None:
    net = lively(mlp()).double()
    other: Any = copy.deepcopy(net)
    x = ((torch.randn(4, 20, dtype=torch.float64),), {})
    stack: list[str] = []
    assert difference(net, other, [x], stack) == 0.0
    with torch.no_grad():
        other[2].bias[0] += 1e-3
    assert 1e-6 < difference(net, other, [x], stack) < 1e-1
    other[2] = nn.Linear(3, 3)
    with pytest.raises(RuntimeError):
        difference(net, other, [x], stack)
    assert stack == ["", "2"]
    assert difference(net, nn.Linear(20, 4).double(), [x], stack) == float("inf")


def test_a_recorded_run_knows_its_sums() -> None:
    net = lively(mlp()).double()
    run = record(net, (torch.randn(2, 20, dtype=torch.float64),), {})
    assert [site.name for site in run.sites] == ["0", "2", "4"]
    assert [site.target for site in run.sites] == ["0.bias", "2.bias", "4.bias"]
    assert run.reads["2.weight"] == 1
    assert torch.equal(run.labels.roots(run.sites[0].outside), run.labels.roots(run.sites[1].inside))

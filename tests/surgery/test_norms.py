"""BatchNorm in training: the branch sees the kept rows, against blocks written out by hand."""

from __future__ import annotations

import copy

import laws
import pytest
import torch
import toys
from torch import Tensor, nn
from torch.nn import functional as F

import fallow

CHANNELS, ROWS, RATE = 4, 6, 0.5


def rows_of(branch: nn.Module, x: Tensor, kept: Tensor, shape: torch.Size) -> Tensor:
    """The dense branch on the kept rows, scattered into zeros."""
    index = kept.expand(ROWS).nonzero().flatten()
    if not index.numel():
        return x.new_zeros(shape)
    return x.new_zeros(shape).index_copy(0, index, branch(x[index]))


def pre_activation(block: toys.PreActivation, x: Tensor, kept: Tensor) -> Tensor:
    def branch(z: Tensor) -> Tensor:
        return block.conv2(F.relu(block.norm2(block.conv1(F.relu(block.norm1(z))))))

    return x + rows_of(branch, x, kept, x.shape) / RATE


def post_activation(block: toys.PostActivation, x: Tensor, kept: Tensor) -> Tensor:
    def branch(z: Tensor) -> Tensor:
        return block.norm2(block.conv2(block.relu(block.norm1(block.conv1(z)))))

    return F.relu(x + rows_of(branch, x, kept, x.shape) / RATE)


def projected(block: toys.Projected, x: Tensor, kept: Tensor) -> Tensor:
    shortcut = block.shortcut(x)
    return F.relu(shortcut + rows_of(block.branch, x, kept, shortcut.shape) / RATE)


BLOCKS = {
    "pre-activation": (lambda: toys.PreActivation(CHANNELS), pre_activation),
    "post-activation": (lambda: toys.PostActivation(CHANNELS), post_activation),
    "transition": (lambda: toys.Projected(CHANNELS, CHANNELS), projected),
}
WAYS = {
    "batch": {"mode": "batch"},
    "rows, window": {"mode": "row", "sampler": "exact"},
    "rows, scattered": {"mode": "row", "sampler": "exact", "rows": "scattered"},
    "rows, independent": {"mode": "row"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_branch_sees_the_kept_rows_and_only_they_move_its_statistics(
    block: str, way: str, dtype: torch.dtype
) -> None:
    make, by_hand = BLOCKS[block]
    model = nn.Sequential(make(), make(), make()).to(dtype)
    written = copy.deepcopy(model)
    x = torch.randn(ROWS, CHANNELS, 5, 5, dtype=dtype)
    handle = fallow.apply(model, fallow.rates.uniform(RATE), example=x, seed=1, **WAYS[way])
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4
    shares = []
    for _ in range(4):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        model.zero_grad(), written.zero_grad()
        ours, masks = model(a), handle.masks()
        theirs = b
        for i, part in enumerate(written):
            theirs = by_hand(part, theirs, masks[str(i)])
        laws.backward(ours), laws.backward(theirs)
        laws.assert_close(ours, theirs, tolerance, "output")
        laws.assert_close(a.grad, b.grad, tolerance, "input")
        size = max(float(p.grad.abs().max()) for p in written.parameters() if p.grad is not None)
        for (name, p), q in zip(model.named_parameters(), written.parameters(), strict=True):
            if q.grad is None or float(q.grad.abs().max()) > 1e-4 * size:
                laws.assert_close(p.grad, q.grad, tolerance * 10, name)
        for (name, p), q in zip(model.named_buffers(), written.buffers(), strict=True):
            laws.assert_close(p.double(), q.double(), tolerance, name)
        shares += [float(m.double().mean()) for m in masks.values()]
    assert min(shares) < 1 and max(shares) > 0


def test_the_statistics_of_a_branch_that_rests_do_not_move() -> None:
    model = nn.Sequential(*(toys.PostActivation(CHANNELS) for _ in range(4)))
    handle = fallow.apply(model, fallow.rates.uniform(RATE), example=torch.randn(2, CHANNELS, 5, 5))
    before = {name: b.clone() for name, b in model.named_buffers()}
    model(torch.randn(ROWS, CHANNELS, 5, 5))
    masks = handle.masks()
    assert len({bool(m) for m in masks.values()}) == 2
    for name, b in model.named_buffers():
        assert torch.equal(b, before[name]) == (not masks[name.split(".")[0]]), name


def test_one_value_to_train_on_is_an_error_before_it_happens() -> None:
    model = nn.Sequential(toys.PostActivation(CHANNELS), toys.PostActivation(CHANNELS))
    model.append(nn.AdaptiveAvgPool2d(1)).append(toys.PostActivation(CHANNELS))
    x = torch.randn(3, CHANNELS, 5, 5)
    handle = fallow.apply(model, {"3": 0.4}, example=x, mode="row", sampler="exact")
    with pytest.raises(fallow.RateError, match=r"3: at batch size 3 and survival rate 0\.4 as few as 1 row"):
        model(x)
    model.eval()(x)
    handle.set_rates({"3": 0.7})
    model.train()(x)  # two rows of one value each


def test_recalibrate_averages_over_the_batches_and_restores_what_it_touches() -> None:
    model = nn.Sequential(toys.PostActivation(CHANNELS), nn.BatchNorm2d(CHANNELS, track_running_stats=False))
    model.append(toys.PostActivation(CHANNELS))
    model[2].norm2.eval()
    model[0].norm1.momentum = 0.3
    x = [torch.randn(ROWS, CHANNELS, 5, 5) for _ in range(3)]
    handle = fallow.apply(model, fallow.rates.uniform(RATE), example=x[0])
    for batch in x:
        model(batch)
    flags = [m.training for m in model.modules()]
    weights = [p.clone() for p in model.parameters()]
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    reference = copy.deepcopy(model)
    fallow.handle_of(reference).remove()
    reference.train()
    for name in ("0.norm1", "0.norm2", "2.norm1", "2.norm2"):
        reference.get_submodule(name).register_forward_hook(
            lambda m, a, out, name=name: seen.setdefault(name, []).append(
                (a[0].mean((0, 2, 3)), a[0].var((0, 2, 3), unbiased=True))
            )
        )
    with torch.no_grad():
        for batch in x:
            reference(batch)
    draws = handle.draw
    handle.recalibrate([(x[0], torch.zeros(ROWS)), x[1], (x[2],)])
    assert handle.draw == draws
    assert flags == [m.training for m in model.modules()]
    assert model[0].norm1.momentum == 0.3
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    for name, moments in seen.items():
        norm = model.get_submodule(name)
        for buffer, values in zip(
            (norm.running_mean, norm.running_var), zip(*moments, strict=True), strict=True
        ):
            assert torch.allclose(buffer, torch.stack(values).mean(0), rtol=1e-4, atol=1e-6), name

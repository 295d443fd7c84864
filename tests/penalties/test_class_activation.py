"""The regulariser of DropBlock before pooling: all masks of tiny maps, and the layers themselves."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fallow.errors import ArgumentError, RateError, UsageError
from fallow.noise.dropblock import drop_block1d, drop_block2d, drop_block3d
from fallow.penalties import class_activation_omega, omega
from fallow.schemes import Blocks, Layer, Units


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def masks_of(shape: tuple[int, ...], rate: float, k: int, grid: str) -> tuple[Tensor, Tensor]:
    """Chances [masks] and masks over the rate [masks, positions], from seeds that are in or not."""
    positions = list(itertools.product(*map(range, shape)))
    if grid == "disjoint":
        seeds = sorted({tuple(i // k for i in s) for s in positions})
        covers = [[tuple(i // k for i in s) == seed for seed in seeds] for s in positions]
        none = rate
    else:
        seeds = list(itertools.product(*(range(size + k - 1) for size in shape)))
        covers = [
            [all(i <= a < i + k for i, a in zip(s, seed, strict=True)) for seed in seeds] for s in positions
        ]
        none = rate ** (1 / k ** len(shape))
    drawn = torch.tensor(list(itertools.product((0.0, 1.0), repeat=len(seeds))), dtype=torch.float64)
    chances = (drawn * (1 - none) + (1 - drawn) * none).prod(1)
    hit = drawn @ torch.tensor(covers, dtype=torch.float64).T
    return chances, (hit == 0).double() / rate


@pytest.mark.parametrize("grid", ["sliding", "disjoint"])
@pytest.mark.parametrize(
    ("shape", "k"), [((5,), 1), ((5,), 2), ((3,), 6), ((2, 3), 2), ((3, 1), 3), ((2, 2), 1), ((1, 2, 1), 2)]
)
def test_with_it_the_plain_loss_is_the_mean_over_all_masks(shape: tuple[int, ...], k: int, grid: str):
    w, f, y, rate = randn(3, 4), randn(2, 4, *shape), randn(2, 3), 0.7
    chances, masks = masks_of(shape, rate, k, grid)
    torch.testing.assert_close((chances[:, None] * masks).sum(0), torch.ones(math.prod(shape)).double())
    pooled = torch.einsum("ms,ncs->mnc", masks, f.flatten(2)) / math.prod(shape)
    mean = (chances * (y - pooled @ w.T).square().sum((1, 2))).sum()
    plain = (y - f.flatten(2).mean(2) @ w.T).square().sum()
    added = class_activation_omega(w, f, survival_rate=rate, block_size=k, grid=grid)
    torch.testing.assert_close(plain + added, mean, rtol=1e-12, atol=0)


@pytest.mark.parametrize("grid", ["sliding", "disjoint"])
def test_with_a_mask_for_each_channel_too(grid: str):
    w, f, y, rate = randn(3, 2), randn(2, 2, 3), randn(2, 3), 0.6
    chances, masks = masks_of((3,), rate, 2, grid)
    mean = torch.zeros((), dtype=torch.float64)
    for one, two in itertools.product(range(len(masks)), repeat=2):
        pooled = (f * torch.stack([masks[one], masks[two]])).mean(2)
        mean += chances[one] * chances[two] * (y - pooled @ w.T).square().sum()
    plain = (y - f.mean(2) @ w.T).square().sum()
    added = class_activation_omega(w, f, survival_rate=rate, block_size=2, grid=grid, shared_channels=False)
    torch.testing.assert_close(plain + added, mean, rtol=1e-12, atol=0)


@pytest.mark.parametrize("grid", ["sliding", "disjoint"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("layer", "shape", "k"),
    [
        (drop_block2d, (7, 7), 3),
        (drop_block2d, (5, 8), 4),
        (drop_block2d, (4, 4), 7),
        (drop_block1d, (12,), 5),
        (drop_block3d, (3, 4, 3), 2),
    ],
)
def test_it_is_what_the_layers_add(layer, shape: tuple[int, ...], k: int, shared: bool, grid: str):
    w, f, y = torch.randn(3, 2), torch.rand(2, 2, *shape) + 0.2, torch.randn(2, 3)
    generator, copies, losses = torch.Generator().manual_seed(2), 2000, []
    options = {"survival_rate": 0.8, "block_size": k, "grid": grid, "shared_channels": shared}
    for _ in range(4):
        noisy = layer(f.repeat(copies, *[1] * (f.dim() - 1)), generator=generator, **options)
        error = y.repeat(copies, 1) - noisy.flatten(2).mean(2) @ w.T
        losses.append(error.square().sum(1).view(copies, -1).sum(1))
    values = torch.cat(losses).double()
    plain = (y - f.flatten(2).mean(2) @ w.T).square().sum()
    exact = plain + class_activation_omega(w, f, **options)
    assert abs(float(values.mean() - exact)) < 5 * float(values.std()) / len(values) ** 0.5


def test_one_block_over_the_map_is_a_mask_of_the_pooled_features():
    w, f = randn(3, 4), randn(5, 4, 2, 3)
    options = {"survival_rate": 0.6, "block_size": 3, "grid": "disjoint"}
    pooled = f.mean((2, 3))
    torch.testing.assert_close(class_activation_omega(w, f, **options), omega(w, pooled, Layer(0.6)))
    torch.testing.assert_close(
        class_activation_omega(w, f, **options, shared_channels=False), omega(w, pooled, Units(0.6))
    )


def test_along_one_axis_it_is_the_form_of_features():
    """Positions of a map with one channel and one output are features with weights 1 / S."""
    f = randn(4, 1, 9)
    for grid in ("sliding", "disjoint"):
        value = class_activation_omega(
            torch.ones(1, 1).double(), f, survival_rate=0.7, block_size=4, grid=grid
        )
        torch.testing.assert_close(
            value, omega(torch.full((1, 9), 1 / 9).double(), f[:, 0], Blocks(0.7, 4, grid))
        )


@pytest.mark.parametrize("shared", [False, True])
def test_its_gradients_are_right(shared: bool):
    w, f = randn(2, 3).requires_grad_(), randn(2, 3, 2, 3).requires_grad_()
    call = lambda w, f: class_activation_omega(  # noqa: E731
        w, f, survival_rate=0.6, block_size=2, shared_channels=shared
    )
    assert torch.autograd.gradcheck(call, (w, f))
    assert torch.autograd.gradgradcheck(call, (w, f))


def test_precision_rate_one_and_no_samples():
    w, f = randn(3, 4).bfloat16(), randn(5, 4, 6, 6).bfloat16()
    options = {"survival_rate": 0.6, "block_size": 3}
    with torch.autocast("cpu", torch.bfloat16):
        value = class_activation_omega(w, f, **options)
    assert value.dtype == torch.float32
    exact = class_activation_omega(w.double(), f.double(), **options)
    assert float(value) == pytest.approx(float(exact), rel=1e-5)
    assert class_activation_omega(w, f, survival_rate=1.0, block_size=3) == 0
    assert class_activation_omega(w, f[:0], **options) == 0


def test_what_does_not_fit_is_refused_in_words():
    w, f = randn(3, 4), randn(5, 4, 6, 6)
    with pytest.raises(UsageError, match=r"as many channels, got shapes \[3, 4\] and \[5, 3, 6, 6\]"):
        class_activation_omega(w, f[:, :3], survival_rate=0.5, block_size=2)
    with pytest.raises(UsageError, match="maps must have at least 3 dimensions"):
        class_activation_omega(w, f[..., 0, 0], survival_rate=0.5, block_size=2)
    with pytest.raises(ArgumentError, match="maps must be real floating point"):
        class_activation_omega(w, f.long(), survival_rate=0.5, block_size=2)
    with pytest.raises(RateError):
        class_activation_omega(w, f, survival_rate=1.5, block_size=2)
    with pytest.raises(UsageError, match="block_size must be an integer of at least 1"):
        class_activation_omega(w, f, survival_rate=0.5, block_size=0)
    with pytest.raises(UsageError, match="grid must be"):
        class_activation_omega(w, f, survival_rate=0.5, block_size=2, grid="valid")

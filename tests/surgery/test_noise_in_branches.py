"""Noise of fallow inside a branch of which rows rest, followed by an operation in place."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fallow
from fallow import noise, schemes

RATE, KEPT, WIDTH = 0.5, 0.6, 6

NOISES: dict[str, Callable[[], nn.Module]] = {
    "seeds": lambda: noise.DropBlock2d(survival_rate=KEPT, block_size=3),
    "seeds of rows": lambda: noise.DropBlock2d(survival_rate=KEPT, block_size=3, shared_channels=True),
    "a mask": lambda: noise.DropBlock2d(survival_rate=KEPT, block_size=1),
    "blocks of features": lambda: noise.BlockDropout(survival_rate=KEPT, block_size=3),
    "features": lambda: noise.FeatureDropout(schemes.Units(KEPT)),
}


class Block(nn.Module):
    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.conv, self.drop, self.act = nn.Conv2d(4, 4, 1), drop, nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.drop(self.conv(x)))


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("make", NOISES.values(), ids=NOISES)
def test_values_and_gradients_are_those_of_masking(make: Callable[[], nn.Module], mode: str) -> None:
    torch.manual_seed(0)
    block, x = Block(make()), torch.randn(5, 4, 7, WIDTH)
    model = nn.Sequential(copy.deepcopy(block))
    fallow.apply(model, {"0": RATE}, example=x, mode=mode, seed=3)
    seen = set()
    for _ in range(4):
        model.zero_grad(set_to_none=False)
        y = model(x.clone().requires_grad_())  # a rested block has no other graph
        y.square().sum().backward()
        kept = y != x
        seen |= set(kept.flatten(1).any(1).tolist())
        want = x + kept * block.conv(x).relu() / (RATE * KEPT)
        torch.testing.assert_close(y, want)
        grads = torch.autograd.grad(want.square().sum(), list(block.parameters()))
        for got, ref in zip(model.parameters(), grads, strict=True):
            torch.testing.assert_close(torch.zeros_like(ref) if got.grad is None else got.grad, ref)
    assert seen == {True, False}


@pytest.mark.parametrize("make", NOISES.values(), ids=NOISES)
def test_it_runs_without_gradients_too(make: Callable[[], nn.Module]) -> None:
    block, x = nn.Sequential(Block(make())), torch.randn(5, 4, 7, WIDTH)
    fallow.apply(block, {"0": RATE}, example=x, mode="row")
    with torch.no_grad():
        y = block(x)
    assert type(y) is Tensor and (y >= x).all()

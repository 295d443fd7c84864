"""Networks to shrink, and ways to zero parts of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


@torch.no_grad()
def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random norms, statistics and biases, so that nothing is zero or one by initialisation."""
    generator = torch.Generator().manual_seed(seed)

    def fill(t: Tensor, low: float, high: float) -> None:
        t.copy_(low + (high - low) * torch.rand(t.shape, generator=generator))

    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            fill(module.running_mean, -0.5, 0.5)
            fill(module.running_var, 0.5, 1.5)  # pyright: ignore
    for name, p in model.named_parameters():
        if p.dim() == 1:
            fill(p, 0.5, 1.5) if name.endswith("weight") else fill(p, -0.5, 0.5)
    return model.eval()


@torch.no_grad()
def deaden(model: nn.Module, layer: str, units: Iterable[int], norm: str | None = None) -> None:
    """Output channels that are zero: no weights, no bias, and nothing from the norm behind."""
    module, units = model.get_submodule(layer), list(units)
    module.weight[units] = 0.0  # pyright: ignore
    for owner in [module] + ([model.get_submodule(norm)] if norm else []):
        if getattr(owner, "bias", None) is not None:
            owner.bias[units] = 0.0  # pyright: ignore
    if norm:
        model.get_submodule(norm).weight[units] = 0.0  # pyright: ignore


@torch.no_grad()
def unread(model: nn.Module, layer: str, units: Iterable[int]) -> None:
    """Input channels that a layer does not read."""
    model.get_submodule(layer).weight[:, list(units)] = 0.0  # pyright: ignore


def outputs(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    model.eval()
    with torch.no_grad():
        return [t for t in tree_leaves(model(*inputs)) if isinstance(t, Tensor)]


def assert_same(dense: nn.Module, small: nn.Module, *inputs: Tensor, tolerance: float = 1e-12) -> None:
    for a, b in zip(outputs(dense, *inputs), outputs(small, *inputs), strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().amax()) <= tolerance * max(1.0, float(a.abs().amax()))


def shape(model: nn.Module, layer: str) -> tuple[int, ...]:
    return tuple(model.get_submodule(layer).weight.shape)  # pyright: ignore


def reasons(result: Any) -> dict[str, str]:
    """The reason of each layer that has something left."""
    return {item.name: item.reason for item in result.left}


# --- networks -----------------------------------------------------------------------------------------------


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 5))


class LeNet5(nn.Module):
    """Caffe's: 20-50-500-10 by default, here smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.conv2 = nn.Conv2d(6, 8, 5)
        self.fc1 = nn.Linear(8 * 4 * 4, 30)
        self.fc2 = nn.Linear(30, 10)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.conv1(x).relu())
        x = self.pool(self.conv2(x).relu())
        x = self.fc1(x.view(x.size(0), -1)).relu()
        return self.fc2(x)


def vgg() -> nn.Sequential:
    def stage(i: int, o: int) -> list[nn.Module]:
        return [nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True)]

    return nn.Sequential(
        *stage(3, 8), *stage(8, 8), nn.MaxPool2d(2), *stage(8, 12), nn.AvgPool2d(2), nn.Dropout(),
        nn.Flatten(), nn.Linear(12 * 4, 10),
    )  # fmt: skip


class InvertedResidual(nn.Module):
    """MobileNetV2's block between a stem and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.expand, self.norm1 = nn.Conv2d(6, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.depthwise, self.norm2 = (
            nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False),
            nn.BatchNorm2d(12),
        )
        self.project, self.norm3 = nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = nn.functional.relu6(self.norm1(self.expand(x)))
        y = nn.functional.relu6(self.norm2(self.depthwise(y)))
        return self.head((x + self.norm3(self.project(y))).mean((2, 3)))


class Dense(nn.Module):
    """Two layers, each of which reads everything before it."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.two = nn.Conv2d(4, 5, 3, padding=1)
        self.three = nn.Conv2d(9, 6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.norm(self.one(x)).relu()
        b = self.two(a).relu()
        return self.head(self.three(torch.cat([a, b], 1)).relu().amax((2, 3)))


class UNet(nn.Module):
    """Down, up by a transposed convolution, and across."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(1, 4, 3, padding=1)
        self.down2 = nn.Conv2d(4, 6, 3, padding=1)
        self.up = nn.ConvTranspose2d(6, 5, 2, 2)
        self.join = nn.Conv2d(9, 4, 3, padding=1)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x).relu()
        b = self.down2(nn.functional.max_pool2d(a, 2)).relu()
        return self.out(self.join(torch.cat([self.up(b), a], 1)).relu())


class Grouped(nn.Module):
    """A grouped convolution of three groups of four between two plain ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 1)
        self.grouped = nn.Conv2d(12, 6, 3, groups=3)
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.grouped(self.stem(x).relu()).relu())

"""Networks without residual branches, as the literature on sparsity uses them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from fallow.errors import UsageError


def _size(image: int | tuple[int, int]) -> tuple[int, int]:
    return (image, image) if isinstance(image, int) else (image[0], image[1])


def lenet300(
    *,
    classes: int = 10,
    channels: int = 1,
    image: int | tuple[int, int] = 28,
    widths: Sequence[int] = (300, 100),
) -> nn.Sequential:
    """LeNet-300-100: pixels, hidden layers of ReLUs, classes; 266,200 weights for 28x28 images.

    References:
        LeCun et al. 1998, section III.B; the input is as large as the images.
    """
    height, width = _size(image)
    sizes = (channels * height * width, *widths, classes)
    layers: list[tuple[str, nn.Module]] = [("flatten", nn.Flatten())]
    for i in range(len(sizes) - 1):
        layers.append((f"linear{i + 1}", nn.Linear(sizes[i], sizes[i + 1])))
        if i < len(sizes) - 2:
            layers.append((f"relu{i + 1}", nn.ReLU()))
    return nn.Sequential(OrderedDict(layers))


def lenet5(
    *,
    classes: int = 10,
    channels: int = 1,
    image: int | tuple[int, int] = 28,
    widths: Sequence[int] = (20, 50, 500),
) -> nn.Sequential:
    """LeNet-5 as Caffe has it: two 5x5 convolutions with pooling, a hidden layer; 20-50-500 units.

    Raises:
        UsageError: images of less than 16 pixels a side.

    References:
        LeCun et al. 1998, in the form of Caffe's example, which the literature on sparsity measures.
    """
    if min(_size(image)) < 16:
        raise UsageError(f"lenet5 takes images of at least 16x16 pixels, got {_size(image)}")
    height, width = (((side - 4) // 2 - 4) // 2 for side in _size(image))
    first, second, hidden = widths
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, first, 5),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(first, second, 5),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            linear1=nn.Linear(second * height * width, hidden),
            relu=nn.ReLU(),
            linear2=nn.Linear(hidden, classes),
        )
    )


def vgg_small(
    *,
    classes: int = 10,
    channels: int = 3,
    image: int | tuple[int, int] = 32,
    widths: Sequence[int] = (32, 64, 128),
) -> nn.Sequential:
    """Pairs of 3x3 convolutions with BatchNorm, halved in between, then a mean over positions and a linear.

    Raises:
        UsageError: images too small to be halved so often.

    References:
        Simonyan, Zisserman 2015, in the small form with BatchNorm that is usual for 32x32 images.
    """
    if min(_size(image)) < 2 ** len(widths):
        raise UsageError(f"vgg_small halves images {len(widths)} times: {_size(image)} is too small")
    layers: list[tuple[str, nn.Module]] = []
    before = channels
    for i, width in enumerate(widths, start=1):
        for j in (1, 2):
            layers += [
                (f"conv{i}_{j}", nn.Conv2d(before, width, 3, padding=1, bias=False)),
                (f"norm{i}_{j}", nn.BatchNorm2d(width)),
                (f"relu{i}_{j}", nn.ReLU()),
            ]
            before = width
        layers.append((f"pool{i}", nn.MaxPool2d(2)))
    layers += [
        ("mean", nn.AdaptiveAvgPool2d(1)),
        ("flatten", nn.Flatten()),
        ("head", nn.Linear(before, classes)),
    ]
    return nn.Sequential(OrderedDict(layers))

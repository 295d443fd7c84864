"""The networks that fallow knows by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from fallow.errors import UsageError, nearest
from fallow.models.feedforward import lenet5, lenet300, vgg_small
from fallow.models.residual import BasicBlock, CifarResNet, PoolPad
from fallow.models.transformer import Attention, Block, Mlp, SmallViT

__all__ = [
    "FEEDFORWARD",
    "MODELS",
    "Attention",
    "BasicBlock",
    "Block",
    "CifarResNet",
    "Mlp",
    "PoolPad",
    "SmallViT",
    "build",
    "lenet5",
    "lenet300",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
    "resnet152",
    "resnet1202",
    "vgg_small",
    "vit_small",
]

resnet20: Callable[..., CifarResNet] = partial(CifarResNet, 20)
resnet32: Callable[..., CifarResNet] = partial(CifarResNet, 32)
resnet44: Callable[..., CifarResNet] = partial(CifarResNet, 44)
resnet56: Callable[..., CifarResNet] = partial(CifarResNet, 56)
resnet110: Callable[..., CifarResNet] = partial(CifarResNet, 110)
resnet152: Callable[..., CifarResNet] = partial(CifarResNet, 152)
resnet1202: Callable[..., CifarResNet] = partial(CifarResNet, 1202)
vit_small: Callable[..., SmallViT] = SmallViT

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
    "resnet110": resnet110,
    "resnet152": resnet152,
    "resnet1202": resnet1202,
    "vit_small": vit_small,
}


# Networks without residual branches: nothing in them rests, but their weights can be made sparse.
FEEDFORWARD: dict[str, Callable[..., nn.Module]] = {
    "lenet300": lenet300,
    "lenet5": lenet5,
    "vgg_small": vgg_small,
}


def build(
    name: str, *, classes: int = 10, channels: int = 3, image: int | tuple[int, int] = 32, **options: Any
) -> nn.Module:
    """The model of that name in MODELS or FEEDFORWARD for images of that kind.

    Args:
        name: a key of one of the two.
        classes: outputs.
        channels: input channels.
        image: side of the images or (height, width); a CIFAR ResNet takes any.
        **options: the model's own arguments (`widths`, `width`, `heads`, ...).

    Raises:
        UsageError: an unknown name (the nearest is suggested) or sizes the model cannot take.
    """
    known = {**MODELS, **FEEDFORWARD}
    if name not in known:
        near = nearest(name, known)
        hint = f'did you mean "{near}"?' if near else "choose one of these."
        raise UsageError(f'model must be one of {", ".join(known)}, got "{name}": {hint}')
    if not name.startswith("resnet"):
        options["image"] = image
    return known[name](classes=classes, channels=channels, **options)

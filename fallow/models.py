"""The networks the training recipe knows by name: CIFAR ResNets and a small vision transformer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fallow.errors import UsageError, nearest

__all__ = [
    "MODELS",
    "Attention",
    "BasicBlock",
    "Block",
    "CifarResNet",
    "Mlp",
    "PoolPad",
    "SmallViT",
    "build",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
    "resnet1202",
    "vit_small",
]


class PoolPad(nn.Module):
    """Shortcut of option A: 2x2 average pool, then zero channels; it has no parameters.

    A side of n becomes ceil(n / 2), as in a 3x3 convolution of stride 2 and padding 1, so odd sizes work;
    a window over the border averages the pixels that exist.

    References:
        He et al. 2016, section 3.3 (option A); Huang et al. 2016, whose code pools where He subsamples.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int = 2) -> None:
        super().__init__()
        if channels_out < channels_in:
            raise UsageError(
                f"widths must not decrease, got {channels_in} then {channels_out}: "
                "a shortcut without parameters can only add channels."
            )
        self.extra = channels_out - channels_in
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Pool and pad: (n, c, h, w) to (n, c + extra, ceil(h / stride), ceil(w / stride))."""
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride, ceil_mode=True)
        return F.pad(x, (0, 0, 0, 0, 0, self.extra)) if self.extra else x

    def extra_repr(self) -> str:
        """The two numbers that define it."""
        return f"extra={self.extra}, stride={self.stride}"


class BasicBlock(nn.Module):
    """ReLU(shortcut(x) + branch(x)) with branch = conv3x3-BN-ReLU-conv3x3-BN, as He and Huang."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False),
                norm1=nn.BatchNorm2d(channels_out),
                relu=nn.ReLU(),
                conv2=nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False),
                norm2=nn.BatchNorm2d(channels_out),
            )
        )
        same = stride == 1 and channels_in == channels_out
        self.shortcut = nn.Identity() if same else PoolPad(channels_in, channels_out, stride)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels_in, h, w) to (n, channels_out, ceil(h / stride), ceil(w / stride))."""
        return self.relu(self.shortcut(x) + self.branch(x))


class CifarResNet(nn.Module):
    """Residual network of depth 6n + 2: a stem, three groups of n basic blocks, average pool, linear.

    Args:
        depth: 6n + 2 layers with weights on the main path; L = 3n residual branches.
        classes: outputs.
        channels: input channels; the input size is free.
        widths: channels of the three groups.

    Raises:
        UsageError: a depth that is not 6n + 2, or widths that are not three or that decrease.

    References:
        He et al. 2016, section 4.2; Huang et al. 2016, section 4 (the same network).
    """

    def __init__(
        self, depth: int, *, classes: int = 10, channels: int = 3, widths: Sequence[int] = (16, 32, 64)
    ) -> None:
        super().__init__()
        blocks = max(1, round((depth - 2) / 6))
        if depth != 6 * blocks + 2:
            raise UsageError(
                f"depth must be 6n + 2 (8, 14, 20, ...), got {depth}: the nearest is {6 * blocks + 2}."
            )
        if len(widths) != 3:
            raise UsageError(f"widths must be three numbers, one a group, got {tuple(widths)}.")
        self.stem = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(channels, widths[0], 3, padding=1, bias=False),
                norm=nn.BatchNorm2d(widths[0]),
                relu=nn.ReLU(),
            )
        )
        self.group1 = _group(blocks, widths[0], widths[0], stride=1)
        self.group2 = _group(blocks, widths[0], widths[1], stride=2)
        self.group3 = _group(blocks, widths[1], widths[2], stride=2)
        self.head = nn.Linear(widths[2], classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He initialisation: convolutions normal with variance 2 / fan_out; the head's bias 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, (nn.BatchNorm2d, nn.Linear)):
                module.reset_parameters()
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, h, w) to (n, classes)."""
        x = self.group3(self.group2(self.group1(self.stem(x))))
        return self.head(x.mean((2, 3)))


def _group(blocks: int, channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    first = BasicBlock(channels_in, channels_out, stride)
    return nn.Sequential(first, *(BasicBlock(channels_out, channels_out) for _ in range(blocks - 1)))


class Attention(nn.Module):
    """Multi-head self-attention over (n, tokens, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise UsageError(f"width must be a multiple of heads, got width {width} and {heads} heads.")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(n, tokens, width) to the same shape."""
        rows, tokens, width = x.shape
        qkv = self.qkv(x).view(rows, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.project(mixed.transpose(1, 2).reshape(rows, tokens, width))


class Mlp(nn.Module):
    """Linear, GELU, linear, with a hidden layer of `hidden` units."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, hidden)
        self.activation = nn.GELU()
        self.project = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to the same shape."""
        return self.project(self.activation(self.expand(x)))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)): two branches."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        """(n, tokens, width) to the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SmallViT(nn.Module):
    """Vision transformer with learned positions and a mean over tokens in place of a class token.

    The defaults give 64 tokens of width 192 on 32x32 images and 5.4 M parameters.

    Args:
        width: channels of a token; a multiple of `heads`.
        depth: blocks, with two residual branches each.
        heads: attention heads.
        patch: side of the square patches; it must divide both sides of the image.
        image: side of the square images, or (height, width).
        channels: input channels.
        classes: outputs.

    Raises:
        UsageError: a patch that does not divide the image, heads that do not divide the width, or, in
            forward, images of another size.

    References:
        Dosovitskiy et al. 2021; Beyer et al. 2022 (mean pooling).
    """

    def __init__(
        self,
        width: int = 192,
        depth: int = 12,
        heads: int = 3,
        patch: int = 4,
        image: int | tuple[int, int] = 32,
        channels: int = 3,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.size = (image, image) if isinstance(image, int) else tuple(image)
        if any(side < patch or side % patch for side in self.size):
            raise UsageError(
                f"patch must divide the image, got patch {patch} and image {self.size[0]}x{self.size[1]}: "
                "choose another patch or resize the images."
            )
        tokens = (self.size[0] // patch) * (self.size[1] // patch)
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.positions = nn.Parameter(torch.zeros(1, tokens, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights and positions truncated normal of standard deviation .02, biases 0; norms the identity."""
        nn.init.trunc_normal_(self.positions, std=0.02)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, h, w) to (n, classes)."""
        if tuple(x.shape[2:]) != self.size:
            got, want = "x".join(map(str, x.shape[2:])), "x".join(map(str, self.size))
            raise UsageError(f"this SmallViT takes {want} images, got {got}: build it with image={got}.")
        # Laid out token by token: the stream would keep the transposed layout through every block.
        tokens = self.patches(x).flatten(2).transpose(1, 2).contiguous() + self.positions
        return self.head(self.norm(self.blocks(tokens)).mean(1))


resnet20: Callable[..., CifarResNet] = partial(CifarResNet, 20)
resnet32: Callable[..., CifarResNet] = partial(CifarResNet, 32)
resnet44: Callable[..., CifarResNet] = partial(CifarResNet, 44)
resnet56: Callable[..., CifarResNet] = partial(CifarResNet, 56)
resnet110: Callable[..., CifarResNet] = partial(CifarResNet, 110)
resnet1202: Callable[..., CifarResNet] = partial(CifarResNet, 1202)
vit_small: Callable[..., SmallViT] = SmallViT

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
    "resnet110": resnet110,
    "resnet1202": resnet1202,
    "vit_small": vit_small,
}


def build(
    name: str, *, classes: int = 10, channels: int = 3, image: int | tuple[int, int] = 32, **options: Any
) -> nn.Module:
    """The model of that name in MODELS for images of that kind.

    Args:
        name: a key of MODELS.
        classes: outputs.
        channels: input channels.
        image: side of the images or (height, width); only the transformer needs it.
        **options: the model's own arguments (`widths`, `width`, `heads`, ...).

    Raises:
        UsageError: an unknown name (the nearest is suggested) or sizes the model cannot take.
    """
    if name not in MODELS:
        near = nearest(name, MODELS)
        hint = f'did you mean "{near}"?' if near else "choose one of these."
        raise UsageError(f'model must be one of {", ".join(MODELS)}, got "{name}": {hint}')
    if MODELS[name] is vit_small:
        options["image"] = image
    return MODELS[name](classes=classes, channels=channels, **options)

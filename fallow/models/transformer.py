"""A small vision transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fallow.errors import UsageError


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
        # sizes follow from the weights, so that heads can be taken out of them
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.project(mixed.transpose(1, 2).flatten(2))


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

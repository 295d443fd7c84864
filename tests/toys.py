"""Small residual blocks of every form, and forms that only look residual."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def mlp(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
    )


class Attention(nn.Module):
    """Single-head attention over (rows, tokens, width); with a mask it returns its weights too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor, *, mask: Tensor | None = None):
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -1e4)
        weights = scores.softmax(-1)
        out = self.project(weights @ v)
        return out if mask is None else (out, weights)


# --- residual ones ---------------------------------------------------------------------------------------


class PreActivation(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


class PostActivation(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        return self.relu(z + x)


class Projected(nn.Module):
    """A transition: a 1x1 convolution and a norm on the shortcut."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 3, stride, padding=1),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
            nn.Conv2d(channels_out, channels_out, 3, padding=1),
            nn.BatchNorm2d(channels_out),
        )
        self.shortcut = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.branch(x))


class Pooled(Projected):
    """A transition without parameters: pool and pad."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, stride=2)
        self.shortcut = nn.AvgPool2d(2)
        self.extra = channels_out - channels_in

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.pad(self.shortcut(x), (0, 0, 0, 0, 0, self.extra)) + self.branch(x))


class TwoBranches(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = Attention(width)
        self.mlp = mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm(x))
        return x + self.mlp(x)


class Parallel(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width)
        self.mlp = mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm1(x)) + self.mlp(self.norm2(x))


class GptJ(Parallel):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        return self.attention(h) + self.mlp(h) + x


class OntoShortcut(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x += self.outer(torch.tanh(self.inner(torch.relu(x))))
        return x


class Alpha(OntoShortcut):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(self.outer(torch.tanh(self.inner(torch.relu(x)))), alpha=0.5)


class OntoBranch(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        out = self.conv2(torch.tanh(self.conv1(x)))
        out += shortcut
        return torch.relu_(out)


class Glue(nn.Module):
    """Splits, gates, pads, cats and permutes between its modules."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.down = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(self.norm(x)).chunk(2, dim=-1)
        h = F.silu(a) * torch.sigmoid(b)
        h = torch.cat([self.token.expand(h.shape[0], -1, -1), h], dim=1)
        h = h.transpose(1, 2).softmax(-1).transpose(1, 2)[:, 1:]
        return x + self.down(h.contiguous())


class Heads(nn.Module):
    """Reshapes with the batch size it read from its own input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        qkv = self.qkv(x).reshape(rows, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, length, width)
        return x + self.project(y)


class Scaled(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = mlp(width)
        self.gamma = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.mlp(x)


class Masked(nn.Module):
    """Keyword arguments in, a tuple out of the attention and out of the block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width)
        self.mlp = mlp(width)

    def forward(self, x: Tensor, *, mask: Tensor):
        z, weights = self.attention(self.norm(x), mask=mask)
        x = x + z
        return x + self.mlp(x), weights.detach().amax()


class Stack(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x, _ = layer(x, mask=mask)
        return {"last": x, "pooled": x.mean(1)}


class Squeezed(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.squeeze = nn.Linear(channels, 2)
        self.excite = nn.Linear(2, channels)
        self.conv2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = F.relu(self.norm(self.conv1(x)))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(z.mean((2, 3))))))
        return x + self.conv2(z * gate[:, :, None, None])


class Flat(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = mlp(width), mlp(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        x = x + self.second(x)
        return self.head(x)


class BatchSecond(nn.Module):
    """(rows, tokens, width) in and out, the batch in dimension 1 inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(0, 1)).transpose(0, 1)

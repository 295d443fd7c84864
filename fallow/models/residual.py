"""Residual networks for small images."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from fallow.errors import UsageError


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

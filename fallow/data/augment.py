"""Augmentation on tensors: pure functions of images, numbers and a generator, over the whole batch at once.

The draws come from the generator alone, on its own device; the global generators are untouched. Images keep
their type, so uint8 batches can be augmented before they are normalised.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fallow.data._common import repeat_channels
from fallow.errors import DataError, UsageError

__all__ = ["flip", "normalise", "repeat_channels", "shift"]


def flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability 1/2.

    Args:
        x: (n, c, h, w).
        generator: n draws are taken from it.
    """
    mirrored = torch.rand(len(x), generator=generator, device=generator.device) < 0.5
    return torch.where(mirrored.to(x.device)[:, None, None, None], x.flip(-1), x)


def shift(x: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Move each image by its own whole offset, uniform on -pixels..pixels down and across.

    What moves in from outside is zero. At pixels=4 this is He's crop of the image padded by 4.

    Args:
        x: (n, c, h, w).
        pixels: largest offset; 0 returns x and draws nothing.
        generator: 2n draws are taken from it.

    Raises:
        UsageError: a negative or fractional number of pixels.
    """
    if isinstance(pixels, bool) or not isinstance(pixels, int) or pixels < 0:
        raise UsageError(f"pixels must be a whole number of at least 0, got {pixels!r}.")
    if not pixels:
        return x
    draws = torch.randint(2 * pixels + 1, (2, len(x)), generator=generator, device=generator.device)
    top, left = draws.to(x.device)
    height, width = x.shape[2:]
    # Every placement of an image on its padded self is a window of one strided view; n of them are copied.
    windows = F.pad(x, (pixels,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(x), device=x.device), :, top, left]


def normalise(x: Tensor, mean: Tensor | Sequence[float], std: Tensor | Sequence[float]) -> Tensor:
    """(x - mean) / std by channel, as float32; uint8 images come to the scale 0..1 first.

    Raises:
        DataError: a standard deviation that is not positive, as a channel that is constant has.
    """
    mean, std = (torch.as_tensor(value, dtype=torch.float32, device=x.device) for value in (mean, std))
    if not bool((std > 0).all()):
        raise DataError(f"std must be positive, got {std.tolist()}: a constant channel cannot be normalised.")
    scaled = x.float() / 255 if x.dtype == torch.uint8 else x.float()
    return (scaled - mean[:, None, None]) / std[:, None, None]

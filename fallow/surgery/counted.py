"""Our noise modules as `replace` puts them into models: counted, and at home in a branch that rests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fallow import noise
from fallow.surgery.standin import Rows, unwrap, wrap


class Tally:
    """Counts what a noise module keeps in training.

    It looks where the input is not 0, at one slice of the tensor and at the next one in the next forward:
    every slice has the same law, and counting costs next to nothing.
    """

    def __init__(self) -> None:
        self.forwards = 0
        self.seen: Tensor | None = None  # [places looked at, places kept], on the input's device

    def count(self, x: Tensor, y: Tensor) -> None:
        """Count one forward."""
        before, after = self._slice(x.detach()), self._slice(y.detach())
        looked = before != 0
        counts = torch.stack([looked.sum(), (looked & (after != 0)).sum()])
        self.seen = counts if self.seen is None else self.seen.to(counts.device) + counts
        self.forwards += 1

    def _slice(self, x: Tensor) -> Tensor:
        """One channel; one line of a map whose channels lie side by side in memory."""
        if x.dim() < 2:
            return x
        dim = 2 if x.dim() > 2 and x.stride(1) == 1 else 1
        return x.select(dim, self.forwards % x.shape[dim]) if x.shape[dim] else x

    @property
    def share(self) -> float | None:
        """The share that was kept; None where nothing was seen."""
        looked, kept = (0, 0) if self.seen is None else self.seen.tolist()
        return kept / looked if looked else None


class Counted(nn.Module):
    """Mixin of a noise module: counts, and works in a branch of which some or all rows rest."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.tally = Tally()

    def forward(self, x: Tensor) -> Tensor:
        """The noise, on the rows that do not rest."""
        run = x.run if isinstance(x, Rows) else None
        if run is not None and run.rested and not run.done:
            return x
        plain = unwrap(x)
        y = super().forward(plain)  # pyright: ignore[reportAttributeAccessIssue] - the module mixed in
        if self.training and not torch.compiler.is_compiling():
            self.tally.count(plain, y)
        return wrap(y, run, x.batch_dim) if isinstance(x, Rows) and run is not None and not run.done else y


class DropPath(Counted, noise.DropPath):
    """`fallow.noise.DropPath`, counted."""


class DropBlock2d(Counted, noise.DropBlock2d):
    """`fallow.noise.DropBlock2d`, counted."""


class DropBlock3d(Counted, noise.DropBlock3d):
    """`fallow.noise.DropBlock3d`, counted."""

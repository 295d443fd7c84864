"""The noise that is explained: masks of the sites, and what they make each branch do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fallow import masks
from fallow.surgery.branch import BranchState, Run
from fallow.surgery.tap import Decide, gated

# `fallow.masks` numbers its streams 1 to 7, and on in steps of 8 with the rank: training never draws these.
_STREAM = 9

Kept = Mapping[str, Tensor | bool]


def weight(rate: float, scale: str) -> float:
    """Variance of a site's gate: p (1 - p) for ``scale="eval"``, (1 - p)/p for "train" (derived, D6)."""
    return rate * (1 - rate) if scale == "eval" else (1 - rate) / rate


@dataclass
class Noise:
    """Stochastic depth with its rates: masks as functions of (seed, draw, site, sample).

    Attributes:
        rates: site -> survival rate.
        scale: "eval": a kept branch as it is; "train": divided by its rate.
        mode: "row": each sample has its mask; "batch": one for all, and a branch really rests.
        seed: of the masks.
    """

    rates: Mapping[str, float]
    scale: str
    mode: str
    seed: int
    keys: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.keys = [masks.site_key(name) for name in self.active]

    @property
    def active(self) -> list[str]:
        """Sites that ever rest."""
        return [name for name, p in self.rates.items() if p < 1]

    def on(self, site: str) -> float:
        """The gate of a branch that is kept."""
        return 1 / self.rates[site] if self.scale == "train" else 1.0

    def weight(self, site: str) -> float:
        """Variance of the gate."""
        return weight(self.rates[site], self.scale)

    def draw(self, number: int, first: int, rows: int) -> dict[str, Tensor | bool]:
        """The masks of one draw for the samples ``first`` on (row), or for a batch known by ``first``.

        Returns:
            Site -> bool tensor of shape (rows,), or a bool.
        """
        if not self.keys:
            return {}
        count = rows if self.mode == "row" else 1
        index = torch.arange(first, first + count, device="cpu")
        numbers = masks.uniforms(self.seed, number, self.keys, index, _STREAM)
        kept = {n: u < self.rates[n] for n, u in zip(self.active, numbers, strict=True)}
        return {n: k if self.mode == "row" else bool(k) for n, k in kept.items()}

    def decide(self, kept: Kept) -> Decide:
        """Every branch as its site's mask says."""

        def choose(branch: BranchState) -> Run | None:
            mask = kept.get(branch.site, True)
            if isinstance(mask, Tensor):
                return gated(branch, mask.double() * self.on(branch.site))
            return gated(branch, self.on(branch.site) if mask else 0.0)

        return choose

    def evaluated(self, branch: BranchState) -> Run | None:
        """The network at evaluation: gate p for ``scale="eval"``, 1 for "train"."""
        return gated(branch, self.rates[branch.site]) if self.scale == "eval" else None


def resting(site: str) -> Decide:
    """The full network without one site."""
    return lambda branch: gated(branch, 0.0) if branch.site == site else None


def kept_alone(site: str, gate: float) -> Decide:
    """The full network with one site multiplied by a number."""
    return lambda branch: gated(branch, gate) if branch.site == site else None


def inverted(kept: Kept, site: str) -> dict[str, Tensor | bool]:
    """The masks with one site's turned over."""
    mask = kept[site]
    return {**kept, site: ~mask if isinstance(mask, Tensor) else not mask}

"""DropBlock in one, two and three dimensions, with the asked survival rate at every position."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fallow.errors import ArgumentError, UsageError, check_choice, check_count, check_rate, refuse_unknown
from fallow.noise import _blocks, _erasing
from fallow.noise._blocks import Grid
from fallow.schedules import Schedule, rate_at

_KEYWORDS = (
    "survival_rate",
    "block_size",
    "shared_channels",
    "grid",
    "normalise",
    "training",
    "generator",
    "schedule",
)
_GRIDS, _NORMALISERS = ("sliding", "disjoint"), ("expected", "realised")
_AXES = {1: "length", 2: "height, width", 3: "depth, height, width"}


def drop_block2d(
    x: Tensor,
    *,
    survival_rate: float | None = None,
    block_size: int | None = None,
    shared_channels: bool = False,
    grid: str = "sliding",
    normalise: str = "expected",
    training: bool = True,
    generator: torch.Generator | None = None,
    **unknown: Any,
) -> Tensor:
    """Zeros in random blocks of every map, and the rest times ``1 / survival_rate``.

    Formula: in training ``y = m x / p``. m is 0 in the block of every seed and 1 elsewhere; seeds are
    independent with probability ``g = 1 - p^(1/k^2)`` on a grid padded by k - 1, so k^2 places of a seed
    cover every position and it is kept with probability ``(1 - g)^(k^2) = p``, at the border as in the middle
    and for any k, larger than the map included. At evaluation, and at p = 1, y is x.

    Shape:
        x: (rows, channels, height, width); so is the result, in x's dtype and memory format.

    Args:
        x: the maps.
        survival_rate: p in (0, 1], the probability that a position is kept.
        block_size: k, the side of a block; even and larger than the map are as good as others.
        shared_channels: one mask for all channels of a row (timm), not one for each (the paper).
        grid: "sliding": blocks anywhere, overlapping (the original); "disjoint": the map is cut into blocks
            of side k from the origin, the last ones smaller, each kept or dropped whole.
        normalise: "expected": times 1/p; "realised": times the number of elements of the mask over the number
            that it keeps, over the whole batch, as timm and torchvision do (see Estimator).
        training: drop or not.
        generator: of the draws; None: torch's default ones, of the CPU where seeds are few.
        unknown: refused, with the conversion for p=, drop_prob= and the like.

    Returns:
        A new tensor; x itself at evaluation and at a rate of 1.

    Raises:
        RateError: a rate outside (0, 1].
        ArgumentError: an unknown keyword, or one of the two numbers missing.
        UsageError: another number of dimensions, a block size below 1, an integer tensor, another word than
            those above.

    Estimator:
        ``normalise="expected"``: unbiased, ``E[y] = x``; variance ``(1-p)/p x^2`` elementwise; two positions
        of a map of which c places of a seed cover both have ``Cov[m_i, m_j] = p^(2 - c/k^2) - p^2``.
        ``"realised"``: the mean of ``y / x`` over all positions is 1 unless everything is dropped (y is then
        0), but that of one position is not: ``E[m_i / mean(m)]`` is near ``1 + (Var[mean m] - Cov[m_i, mean
        m]) / p^2``, below 1 in the middle of a map and above at its border. It also couples the rows of a
        batch, takes off the variation that they share, and differs between data-parallel ranks.

    Note:
        On the CPU a compiled kernel does it in one pass where there is a compiler; without, the result is the
        same (`fallow.kernels.available`). Where seeds are few, as for blocks of 3 and more at usual rates,
        nothing of x's size is kept for the gradient, and a generator's state is one mask on every device.

    References:
        Ghiasi, Lin, Le: DropBlock (2018), algorithm 1, whose seeds lie where blocks fit and whose g is of
        first order in 1 - p; the padded grid and its g are derived here. Pal et al. 2020 analyse the disjoint
        grid.

    Examples:
        >>> x = torch.ones(2, 3, 8, 8)
        >>> drop_block2d(x, survival_rate=0.5, block_size=3).unique().tolist()
        [0.0, 2.0]
    """
    refuse_unknown("drop_block2d", unknown, _KEYWORDS[:-1])
    return _drop(
        x, 2, survival_rate, block_size, shared_channels, grid, normalise, training, generator, "drop_block2d"
    )


def drop_block1d(
    x: Tensor,
    *,
    survival_rate: float | None = None,
    block_size: int | None = None,
    shared_channels: bool = False,
    grid: str = "sliding",
    normalise: str = "expected",
    training: bool = True,
    generator: torch.Generator | None = None,
    **unknown: Any,
) -> Tensor:
    """`drop_block2d` for sequences (rows, channels, length); a seed has ``g = 1 - p^(1/k)``."""
    refuse_unknown("drop_block1d", unknown, _KEYWORDS[:-1])
    return _drop(
        x, 1, survival_rate, block_size, shared_channels, grid, normalise, training, generator, "drop_block1d"
    )


def drop_block3d(
    x: Tensor,
    *,
    survival_rate: float | None = None,
    block_size: int | None = None,
    shared_channels: bool = False,
    grid: str = "sliding",
    normalise: str = "expected",
    training: bool = True,
    generator: torch.Generator | None = None,
    **unknown: Any,
) -> Tensor:
    """`drop_block2d` for volumes (rows, channels, depth, height, width); a seed has ``g = 1 - p^(1/k^3)``."""
    refuse_unknown("drop_block3d", unknown, _KEYWORDS[:-1])
    return _drop(
        x, 3, survival_rate, block_size, shared_channels, grid, normalise, training, generator, "drop_block3d"
    )


def drop_block_mask(
    shape: Sequence[int],
    *,
    survival_rate: float | None = None,
    block_size: int | None = None,
    shared_channels: bool = False,
    grid: str = "sliding",
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
    **unknown: Any,
) -> Tensor:
    """The mask of `drop_block1d`, `drop_block2d` or `drop_block3d`, as the shape has it: bool, True = kept.

    Args:
        shape: (rows, channels, *map) of the tensor that it is for.
        survival_rate: as in `drop_block2d`, like the other keywords.
        block_size: k.
        shared_channels: the mask has one channel.
        grid: "sliding" or "disjoint".
        device: of the mask.
        generator: of the draws; in the same state it gives the mask of a forward on that device.
        unknown: refused.

    Raises:
        RateError: a rate outside (0, 1].
        ArgumentError: an unknown keyword, or one of the two numbers missing.
        UsageError: a shape of other than three to five numbers, and as in `drop_block2d`.

    Examples:
        >>> drop_block_mask((2, 3, 8, 8), survival_rate=0.9, block_size=3, shared_channels=True).shape
        torch.Size([2, 1, 8, 8])
    """
    keywords = (*_KEYWORDS[:4], "device", "generator")
    refuse_unknown("drop_block_mask", unknown, keywords)
    rate, block = _checked("drop_block_mask", survival_rate, block_size, grid, "expected")
    if not 3 <= len(shape) <= 5:
        raise UsageError(
            f"drop_block_mask takes a shape (rows, channels, *map) with a map of one to three axes, "
            f"got {tuple(shape)}"
        )
    shape = (shape[0], 1 if shared_channels else shape[1], *shape[2:])
    where = torch.device("cpu" if device is None else device)
    mask = torch.ones(shape, dtype=torch.bool, device=where)
    return mask if rate == 1 else _blocks.paint(mask, _grid(shape, block, grid, rate), generator)


def _drop(
    x: Tensor,
    dims: int,
    survival_rate: float | None,
    block_size: int | None,
    shared_channels: bool,
    grid: str,
    normalise: str,
    training: bool,
    generator: torch.Generator | None,
    name: str,
) -> Tensor:
    p, block = _checked(name, survival_rate, block_size, grid, normalise)
    if x.dim() != dims + 2:
        hint = "; add the axis of rows with x[None]" if x.dim() == dims + 1 else ""
        raise UsageError(
            f"{name} takes (rows, channels, {_AXES[dims]}), {dims + 2} axes, got {x.dim()} in "
            f"{tuple(x.shape)}{hint}"
        )
    if not (x.is_floating_point() or x.is_complex()):
        raise UsageError(f"{name} takes floating-point numbers, got {x.dtype}; convert with x.float()")
    if not training or p == 1 or not x.numel():
        return x
    shape = (x.shape[0], 1, *x.shape[2:]) if shared_channels else tuple(x.shape)
    if torch.compiler.is_compiling() and normalise == "expected":
        # a graph has no number of seeds: the same law with a number for every cell
        cells = Grid(shape[2:], block, grid == "disjoint", p, shape[0] * shape[1])
        dropped = _blocks.dilated(cells, cells.planes, x.device, generator).view(shape)
        return (x * (1 / p)).masked_fill(dropped, 0)
    cells = _grid(shape, block, grid, p)
    if cells.sparse and normalise == "expected":
        return _erasing.scaled(x, 1 / p, cells, _blocks.draw(cells.planes, generator))
    kept = _blocks.paint(torch.ones(shape, dtype=torch.bool, device=x.device), cells, generator)
    factor = 1 / p if normalise == "expected" else kept.numel() / max(int(kept.sum()), 1)
    return _erasing.masked(x, factor, kept)


def _grid(shape: Sequence[int], block: int, grid: str, p: float) -> Grid:
    return _blocks.grid_of(tuple(shape), block, grid == "disjoint", p)


def _checked(
    name: str, survival_rate: float | None, block_size: int | None, grid: str, normalise: str
) -> tuple[float, int]:
    if type(survival_rate) is float and type(block_size) is int and 0 < survival_rate <= 1 and block_size > 0:
        if grid in _GRIDS and normalise in _NORMALISERS:  # the checks below cost as much as small tensors
            return survival_rate, block_size
    check_choice("grid", grid, _GRIDS)
    check_choice("normalise", normalise, _NORMALISERS)
    if survival_rate is None:
        raise ArgumentError(f"{name} needs survival_rate, the probability in (0, 1] that a position is kept")
    if block_size is None:
        raise ArgumentError(f"{name} needs block_size, the side of a block; 7 is what the paper uses")
    return check_rate(survival_rate), check_count("block_size", block_size, minimum=1)


class _DropBlock(nn.Module):
    """What the three have in common."""

    _function: Callable[..., Tensor]

    def __init__(
        self,
        *,
        survival_rate: float | None = None,
        block_size: int | None = None,
        shared_channels: bool = False,
        grid: str = "sliding",
        normalise: str = "expected",
        schedule: Schedule | None = None,
        generator: torch.Generator | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        refuse_unknown(name, unknown, [k for k in _KEYWORDS if k != "training"])
        self.survival_rate, self.block_size = _checked(name, survival_rate, block_size, grid, normalise)
        self.shared_channels, self.grid, self.normalise = shared_channels, grid, normalise
        self.schedule, self.generator = schedule, generator
        self.time = 0

    @property
    def current_rate(self) -> float:
        """The survival rate in force now, the schedule applied."""
        return rate_at(self.survival_rate, self.schedule, self.time)

    def step(self, n: int | None = None) -> None:
        """Set the schedule's time to ``n`` optimiser steps; without ``n``, one step on.

        Raises:
            UsageError: ``n`` is not a whole number from 0 on.
        """
        self.time = self.time + 1 if n is None else check_count("step: n", n)

    def forward(self, x: Tensor) -> Tensor:
        """The maps, with blocks dropped while training."""
        return type(self)._function(
            x,
            survival_rate=self.current_rate if self.training else self.survival_rate,
            block_size=self.block_size,
            shared_channels=self.shared_channels,
            grid=self.grid,
            normalise=self.normalise,
            training=self.training,
            generator=self.generator,
        )

    def extra_repr(self) -> str:
        """The numbers, and the words that are not as usual."""
        words = f"survival_rate={self.survival_rate}, block_size={self.block_size}"
        usual = {"shared_channels": False, "grid": "sliding", "normalise": "expected", "schedule": None}
        others = [
            f"{name}={getattr(self, name)!r}" for name, value in usual.items() if getattr(self, name) != value
        ]
        return ", ".join([words, *others])

    # A schedule's time is state; without a schedule there is none, so the keys of a model that had another
    # DropBlock in this place stay as they are.
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.schedule is not None:
            destination[prefix + "time"] = torch.tensor(self.time)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        time = state_dict.pop(prefix + "time", None) if self.schedule is not None else None
        super()._load_from_state_dict(state_dict, prefix, *others)
        if time is not None:
            self.time = int(time)


class DropBlock2d(_DropBlock):
    """The Module of `drop_block2d`.

    Args:
        survival_rate: p in (0, 1], at full strength; may be set at any time.
        block_size: k, the side of a block.
        shared_channels: one mask for all channels of a row.
        grid: "sliding" or "disjoint".
        normalise: "expected" or "realised".
        schedule: of `fallow.schedules`, or a function of the step to a strength in [0, 1]; the rate is then
            ``1 - strength (1 - p)``. Its time moves by `step` alone, so call that once an optimiser step; it
            is kept in the state dict, which without a schedule has no keys.
        generator: of the draws; None: torch's default ones.
        unknown: refused, with the conversion for p=, drop_prob= and the like.

    Raises:
        RateError: a rate outside (0, 1].
        ArgumentError: an unknown keyword, or one of the two numbers missing.
        UsageError: a block size below 1, another word than those above.

    Examples:
        >>> DropBlock2d(survival_rate=0.9, block_size=7)
        DropBlock2d(survival_rate=0.9, block_size=7)
    """

    _function = staticmethod(drop_block2d)


class DropBlock1d(_DropBlock):
    """The Module of `drop_block1d`; arguments as in `DropBlock2d`."""

    _function = staticmethod(drop_block1d)


class DropBlock3d(_DropBlock):
    """The Module of `drop_block3d`; arguments as in `DropBlock2d`."""

    _function = staticmethod(drop_block3d)

"""What a recorded forward says: labels and constants of tensors, sums over channels, shapes to keep."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor

from fallow.sparsity.shrinking.labels import Labels, Layers


@dataclass(slots=True)
class Info:
    """What is known of one tensor: labels of its elements, its constants, its name if it is a parameter."""

    layers: Layers
    known: Tensor | None = None
    leaf: str | None = None
    turned: str | None = None  # the matrix that this is the transpose of
    stale: bool = False  # its memory was written through another view
    fed: bool = False  # made from the model's input: other inputs give it other sizes


@dataclass(slots=True)
class Site:
    """A sum over channels: ``out[o] = bias[o] + sum_i weight[o, i] x[i]``.

    Attributes:
        name: the module that computes it.
        weight: (O, I), summed over a kernel's positions.
        used: (O, I), whether any weight from i to o is not zero.
        inside, outside: labels of the I inputs and O outputs; -1 where there is none.
        constant: (I,) the input's constant, NaN where it is none.
        folds: whether a constant adds the same everywhere (no padding, say), so that a bias can take it.
        seen: (I,) the input is known, though it may differ between positions.
        flat: (O,) the output is a constant as it is.
        matrix: the name of the weights and their dimension of inputs, where nothing else reads them.
        target: the name of the bias or running mean that takes folded constants.
        sign: how it takes them: -1 for a running mean.
    """

    name: str
    weight: Tensor
    used: Tensor
    inside: Tensor
    outside: Tensor
    constant: Tensor
    seen: Tensor
    flat: Tensor
    folds: bool = True
    matrix: tuple[str, int] | None = None
    target: str | None = None
    sign: float = 1.0


@dataclass(slots=True)
class Grouped:
    """A grouped convolution: labels of its inputs and outputs, a row for each group."""

    name: str
    inside: Tensor
    outside: Tensor


@dataclass(slots=True)
class Sized:
    """An operation with explicit sizes: what goes along `dim` of `layer` must go from the size `old` too."""

    module: str
    layer: Tensor
    dim: int
    old: int


@dataclass(slots=True)
class Pieces:
    """A tensor taken apart along `dim`: each piece must lose the same number; none if `whole`."""

    name: str
    layer: Tensor
    dim: int
    size: int
    whole: bool


@dataclass
class Record:
    """Everything that `fallow.sparsity.shrinking.decide` needs."""

    labels: Labels
    leaves: dict[str, Info] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    grouped: list[Grouped] = field(default_factory=list)
    sized: list[Sized] = field(default_factory=list)
    pieces: list[Pieces] = field(default_factory=list)
    slabs: list[tuple[str, Tensor]] = field(default_factory=list)
    reads: Counter[str] = field(default_factory=Counter)
    narrow: bool = False  # something was computed in less than float64

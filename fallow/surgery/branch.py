"""A branch of an applied model at work: its state, and one run of it in one forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fallow.rows import Selection
from fallow.surgery.found import Branch


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype autocast works in right now on this kind of device; None where it is off."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


@dataclass
class BranchState:
    """What a handle keeps for one branch of one model.

    Holds modules and not parameters, because sharding replaces parameters.
    """

    name: str
    site: str
    order: int
    block: nn.Module
    dim: int | None
    inner_sums: int
    copy: bool
    parameters: list[tuple[nn.Module, str]]
    norms: list[tuple[nn.Module, int]]  # BatchNorm, and its values per row and channel
    dtypes: dict[tuple[torch.dtype | None, torch.dtype], torch.dtype] = field(default_factory=dict)
    run: Run | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A run belongs to one forward and holds its tensors: copies start without."""
        return {**self.__dict__, "run": None}

    def trainable(self) -> list[Tensor]:
        """The branch's parameters as they are now."""
        return [p for m, name in self.parameters if (p := getattr(m, name)).requires_grad]


@dataclass
class Run:
    """One branch in one forward: which rows are kept, and how the sum is scaled.

    ``rested``: no row is kept. ``selection`` None: every row is kept. ``gate`` changes the branch's value
    before it is added; ``watch`` sees shortcut, that value (None at rest; with the alpha of ``add_(z,
    alpha=)`` in it) and the sum.
    """

    branch: BranchState
    scale: float
    selection: Selection | None
    rested: bool
    zeros: list[Tensor] = field(default_factory=list)
    gate: Callable[[Run, Tensor], Tensor] | None = None
    watch: Callable[[Run, Tensor, Tensor | None, Tensor], None] | None = None
    inner_sums: int = 0
    done: bool = False  # its sum is made

    def __post_init__(self) -> None:
        self.inner_sums = self.branch.inner_sums

    @property
    def dim(self) -> int:
        """The batch dimension of the sum."""
        return self.branch.dim or 0

    @property
    def copy(self) -> bool:
        """Whether the sum or the shortcut is written into later, so that they must not be one tensor."""
        return self.branch.copy

    def sum_dtype(self, shortcut: Tensor) -> torch.dtype:
        """The dtype the dense sum would have: known from the probe, for each autocast dtype."""
        key = (autocast_dtype(shortcut.device.type), shortcut.dtype)
        return self.branch.dtypes.get(key, shortcut.dtype)

    def finish(self, shortcut: Tensor, value: Tensor | None, out: Tensor) -> None:
        """The sum is made; whoever watches is told."""
        self.done = True
        if self.watch is not None:
            self.watch(self, shortcut, value, out)


def branch_state(model: nn.Module, branch: Branch, site: str, order: int) -> BranchState:
    """Bind a found branch to the modules of a model."""
    modules = dict(model.named_modules())
    owners = []
    for name in branch.parameters:
        owner, _, leaf = name.rpartition(".")
        owners.append((modules[owner], leaf))
    norms = [(modules[name], size) for name, size in branch.norm_values.items()]
    return BranchState(
        name=branch.name,
        site=site,
        order=order,
        block=modules[branch.block],
        dim=branch.dim,
        inner_sums=branch.inner_sums,
        copy=branch.copy,
        parameters=owners,
        norms=norms,
    )

"""Masks of a module's parameters while its forward runs."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fallow.errors import UsageError, check_rate
from fallow.noise import _row_masks
from fallow.noise._attached import Attached, attached


class DropConnect(Attached):
    """What `drop_connect_` has put on a module; made by it.

    Attributes:
        module: The module.
        names: Of its masked parameters.
        mode: "batch" or "row".
        generator: Of the draws, or None.
    """

    words: ClassVar[str] = "DropConnect"

    def __init__(
        self,
        module: nn.Module,
        survival_rate: float,
        names: tuple[str, ...],
        mode: str,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__(module, names, generator)
        self.mode = mode
        self.survival_rate = survival_rate
        if mode == "row":
            module.__dict__["forward"] = self._row
        else:
            self.put()

    @property
    def survival_rate(self) -> float:
        """The probability that a weight is kept."""
        return self._rate

    @survival_rate.setter
    def survival_rate(self, value: float) -> None:
        self._rate = check_rate(value)

    @staticmethod
    def of(module: nn.Module, name: str | None = None) -> DropConnect | None:
        """The handle of a module with masked parameters, that of a copy for instance; None without.

        Args:
            module: Of whose forward it is.
            name: Of a masked parameter; None: of any, the first where handles are several.
        """
        for own, noise, _ in attached(module):
            if isinstance(noise, DropConnect) and noise.module is module and name in (None, own):
                return noise
        return None

    def remove(self) -> None:
        """Leave the module as it was before; again: nothing."""
        if self.module.__dict__.get("forward") == self._row:
            del self.module.__dict__["forward"]
        super().remove()

    def __repr__(self) -> str:
        return f"DropConnect(survival_rate={self.survival_rate}, names={self.names}, mode={self.mode!r})"

    def seen(self, name: str, weight: Tensor) -> Tensor:
        """The masked weight, in training."""
        if not self.module.training or self._rate == 1:
            return weight
        return masked(weight, self._rate, self.generator)

    def rates(self, name: str) -> Tensor:
        """The one rate."""
        return torch.tensor(self._rate)

    def _row(self, x: Tensor) -> Tensor:
        layer: Any = self.module
        if not layer.training or self._rate == 1 or DropConnect.of(layer, "weight") is not self:
            return linear(x, layer.weight, layer.bias)
        return _row_masks.linear(x, layer.weight, layer.bias, self._rate, self.generator)


def masked(weight: Tensor, p: float, generator: torch.Generator | None) -> Tensor:
    """``mask * weight / p``; the number is not rounded to a half type first."""
    rest = dropped(tuple(weight.shape), p, weight.device, generator)
    return (weight * (1 / p)).masked_fill_(rest, 0)


def dropped(
    shape: tuple[int, ...], p: float, device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """What a mask drops, bool, True = dropped."""
    place = device if generator is None else generator.device
    mask = torch.empty(shape, dtype=torch.bool, device=place)
    return mask.bernoulli_(1 - p, generator=generator).to(device)


def check_row(module: nn.Module, names: tuple[str, ...]) -> None:
    """Refuse what has no row mode."""
    if type(module).forward is not nn.Linear.forward or names != ("weight",):
        raise UsageError(
            f'mode="row" is for the weight of nn.Linear, got {", ".join(names)} of {type(module).__name__}; '
            'use mode="batch"'
        )
    if "forward" in module.__dict__:
        raise UsageError(
            'something has replaced the forward of this module; take it off, or use mode="batch"'
        )

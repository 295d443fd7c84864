"""What a law of masks must answer, and the checks and draws that all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from fallow.errors import UsageError, check_count


class Scheme(ABC):
    """The law of one mask; frozen, hashable, and checked where it is made."""

    def check(self, width: int) -> None:
        """Refuse a width that the law cannot have.

        Raises:
            UsageError: Where the numbers of the scheme and the width do not fit.
        """
        check_count("width", width, minimum=1)

    @abstractmethod
    def mean(self, width: int) -> Tensor:
        """The mean mu of z, [width], float64: the survival rate of each feature where z is a mask."""

    @abstractmethod
    def characteristic_matrix(self, width: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
        """The covariance of the multipliers, [width, width]."""

    @abstractmethod
    def sample(
        self,
        rows: int,
        width: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Independent draws of the multipliers ``z / mu``, [rows, width].

        They are drawn in float32 or better and rounded once to `dtype`. Draws come from the generator, on its
        own device; without one from torch's default generator of `device`.
        """


class Masks(Scheme):
    """A law of masks: z is 0 or 1."""

    @abstractmethod
    def rate(self, width: int) -> float | tuple[float, ...]:
        """The survival rate of every feature, or one for each."""

    @abstractmethod
    def masks(
        self,
        rows: int,
        width: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Independent masks, bool, True = kept: [rows, width]; maybe an expanded view."""

    def mean(self, width: int) -> Tensor:
        """The survival rate of each feature, [width], float64."""
        return torch.tensor(self.rate(width), dtype=torch.float64).expand(width).clone()

    def sample(
        self,
        rows: int,
        width: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Independent draws of the multipliers, as in `Scheme`."""
        kept = self.masks(rows, width, generator=generator, device=device)
        return torch.where(kept, self.mean(width).reciprocal().to(kept.device, dtype), 0)


def characteristic_matrix(scheme: Scheme, width: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """The characteristic matrix of a scheme, [width, width]: the covariance of its multipliers.

    With ``C`` and ``mu`` the covariance and mean of z it is ``C_ij / (mu_i mu_j)``, and for features H [d, N]
    and weights U [outputs, d]: ``E|Y - U diag(z / mu) H|^2 = |Y - U H|^2 + <matrix, U'U * HH'>``.

    Estimator:
        Exact for every scheme and width.

    References:
        Derived; Pal et al. 2020 name the framework.

    Examples:
        >>> from fallow.schemes import Blocks
        >>> characteristic_matrix(Blocks(0.5, 2), 3).tolist()
        [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    return scheme.characteristic_matrix(width, dtype=dtype)


def same_length(name: str, length: int, width: int) -> None:
    """Refuse numbers for another width.

    Raises:
        UsageError: With both lengths.
    """
    if length != width:
        raise UsageError(f"{name} has {length} numbers and the width is {width}; give one for each feature")


def odds(rate: float) -> float:
    """``c = (1 - p) / p``, the variance of a multiplier."""
    return (1 - rate) / rate


def drawn_on(generator: torch.Generator | None, device: torch.device | str | None) -> torch.device:
    """Where numbers are drawn: a generator draws on its own device alone."""
    return generator.device if generator is not None else torch.device(device or "cpu")


def bernoulli(
    shape: tuple[int, ...],
    rate: float,
    generator: torch.Generator | None,
    device: torch.device | str | None,
) -> Tensor:
    """Independent masks of one rate, bool."""
    place = drawn_on(generator, device)
    mask = torch.empty(shape, dtype=torch.bool, device=place).bernoulli_(rate, generator=generator)
    return mask.to(device or place)

"""Normal multipliers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fallow.errors import UsageError, check_number
from fallow.schemes._base import Scheme, drawn_on, same_length


@dataclass(frozen=True)
class Gaussian(Scheme):
    """Gaussian dropout: each multiplier is normal with mean 1.

    Args:
        variance: At least 0; that of Dropout at a survival rate p is ``(1 - p) / p``.
    """

    variance: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "variance", check_number("variance", self.variance, 0, math.inf))

    def mean(self, width: int) -> Tensor:
        """1 everywhere."""
        self.check(width)
        return torch.ones(width, dtype=torch.float64)

    def characteristic_matrix(self, width: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
        """``variance I``."""
        self.check(width)
        return self.variance * torch.eye(width, dtype=dtype)

    def sample(
        self, rows: int, width: int, *, generator: Any = None, device: Any = None, dtype: Any = torch.float32
    ) -> Tensor:
        """Independent draws of the multipliers."""
        self.check(width)
        noise = _normal((rows, width), generator, device, dtype)
        return (1 + math.sqrt(self.variance) * noise).to(dtype)


@dataclass(frozen=True, init=False, eq=False, repr=False)
class Correlated(Scheme):
    """A multivariate normal z of any mean and covariance; the multipliers are ``z / mean``.

    Args:
        mean: One number for each feature, none of them 0.
        covariance: A symmetric matrix without negative eigenvalues; it may be singular.

    Attributes:
        mu: The mean, [d], float64.
        covariance: [d, d], float64.

    Raises:
        UsageError: For numbers that are no mean and covariance.

    Examples:
        >>> Correlated([1.0, 2.0], [[1.0, 1.0], [1.0, 4.0]]).characteristic_matrix(2).tolist()
        [[1.0, 0.5], [0.5, 1.0]]
    """

    mu: Tensor
    covariance: Tensor

    def __init__(
        self, mean: Tensor | Sequence[float], covariance: Tensor | Sequence[Sequence[float]]
    ) -> None:
        mu, matrix = _doubles("mean", mean, 1), _doubles("covariance", covariance, 2)
        if not mu.numel() or (mu == 0).any():
            raise UsageError("mean must have no zeros: masks are divided by it; leave such features out")
        if matrix.shape != (len(mu), len(mu)):
            raise UsageError(
                f"covariance must have a row and a column for each of the {len(mu)} numbers of mean, "
                f"got shape {list(matrix.shape)}"
            )
        object.__setattr__(self, "mu", mu)
        object.__setattr__(self, "covariance", matrix)
        object.__setattr__(self, "_root", _root(matrix) / mu[:, None])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Correlated):
            return NotImplemented
        return torch.equal(self.mu, other.mu) and torch.equal(self.covariance, other.covariance)

    def __hash__(self) -> int:
        return hash((tuple(self.mu.tolist()), tuple(self.covariance.diag().tolist())))

    def __repr__(self) -> str:
        words = (f"{name}={getattr(self, of).tolist()}" for name, of in (("mean", "mu"), ("covariance",) * 2))
        return (
            f"Correlated({', '.join(words)})" if len(self.mu) <= 4 else f"Correlated({len(self.mu)} features)"
        )

    def check(self, width: int) -> None:
        """Refuse another width than that of the mean."""
        super().check(width)
        same_length("mean", len(self.mu), width)

    def mean(self, width: int) -> Tensor:
        """The mean of z."""
        self.check(width)
        return self.mu.clone()

    def characteristic_matrix(self, width: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
        """``covariance / (mu mu')``."""
        self.check(width)
        return (self.covariance / self.mu / self.mu[:, None]).to(dtype)

    def sample(
        self, rows: int, width: int, *, generator: Any = None, device: Any = None, dtype: Any = torch.float32
    ) -> Tensor:
        """Independent draws of the multipliers."""
        self.check(width)
        noise = _normal((rows, width), generator, device, dtype)
        with torch.autocast(
            noise.device.type, enabled=False
        ):  # which would take the product in half precision
            return (1 + noise @ self._root.T.to(noise)).to(dtype)  # pyright: ignore[reportAttributeAccessIssue]


def _normal(shape: tuple[int, int], generator: Any, device: Any, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers in float32 or better."""
    place = drawn_on(generator, device)
    wide = torch.promote_types(dtype, torch.float32)
    return torch.randn(shape, generator=generator, device=place, dtype=wide).to(device or place)


def _doubles(name: str, value: Any, axes: int) -> Tensor:
    """A copy in float64, on the CPU and without a graph."""
    tensor = torch.as_tensor(value, dtype=torch.float64).detach().cpu().clone()
    if tensor.dim() != axes or not tensor.isfinite().all():
        raise UsageError(f"{name} must be finite numbers on {axes} axes, got shape {list(tensor.shape)}")
    return tensor


def _root(matrix: Tensor) -> Tensor:
    """L with ``L L' = matrix``, of singular matrices too.

    Raises:
        UsageError: Where the matrix is no covariance.
    """
    slack = 64 * torch.finfo(torch.float32).eps * float(matrix.abs().amax())  # may come from float32
    if float((matrix - matrix.T).abs().amax()) > slack:
        raise UsageError("covariance must be symmetric; pass (covariance + covariance.T) / 2")
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    if float(values[0]) < -slack:
        raise UsageError(f"covariance must have no negative eigenvalues, got {float(values[0]):.6g}")
    return vectors * values.clamp_min(0).sqrt()

"""Quadratic forms of characteristic matrices, without the matrices where a scheme has structure.

Most are a diagonal plus blocks, ``C = diag(a) + e (same block)``; sliding blocks are a band of one number a
lag; only a covariance that somebody gives is a full matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fallow.errors import ArgumentError, UsageError
from fallow.penalties._checks import check_floats
from fallow.schemes import (
    Blocks,
    Exchangeable,
    FixedSize,
    Gaussian,
    Layer,
    Scheme,
    Units,
    UnitsInBlocks,
    odds,
)


def check_scheme(scheme: object) -> Scheme:
    """Return `scheme` if it is one."""
    if not isinstance(scheme, Scheme):
        raise ArgumentError(
            f"scheme must be one of fallow.schemes, got {type(scheme).__name__}: say schemes.Units(0.9)"
        )
    return scheme


def checked(weight: Tensor, features: Tensor, scheme: object) -> tuple[Tensor, Tensor, Form]:
    """Weight [outputs, d] and features [N, d], in float32 at least, and the form of the scheme."""
    law = check_scheme(scheme)
    w, g = check_floats("weight", weight, 2), check_floats("features", features, 2)
    if w.dim() != 2 or w.shape[-1] != g.shape[-1]:
        raise UsageError(
            "weight must be [outputs, d] and features [N, d] of the same width d, got shapes "
            f"{list(w.shape)} and {list(g.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(w.dtype, g.dtype), torch.float32)
    return w.to(dtype), g.flatten(0, -2).to(dtype), form_of(law, w.shape[-1])


@dataclass(frozen=True)
class Form:
    """``x' C x`` for one characteristic matrix; made by `form_of`.

    Attributes:
        width: d.
        diagonal: a, a number or [d] in double precision.
        block: The number e that is added within a block.
        block_size: Of these blocks, the last of which may be smaller.
        band: Numbers for lags 0, 1, ... of a Toeplitz matrix, in double precision; None where there is none.
        dense: The matrix, where it has no such structure.
    """

    width: int
    diagonal: float | Tensor = 0.0
    block: float = 0.0
    block_size: int = 1
    band: Tensor | None = None
    dense: Tensor | None = None

    def total(self, weight: Tensor, features: Tensor) -> Tensor:
        """``sum_ij C_ij (w_i' w_j) (g_i' g_j)`` over columns of weight [outputs, d] and features [N, d]."""
        if self.dense is not None:
            return (self.dense.to(weight) * (weight.T @ weight) * (features.T @ features)).sum()
        if self.band is not None:
            return _band_total(self.band.to(weight), weight, features)
        result = weight.new_zeros(())
        if self._has_diagonal:
            result = (self._diagonal(weight) * weight.square().sum(0) * features.square().sum(0)).sum()
        if not self.block:
            return result
        w, g = self._blocks(weight).transpose(0, 1), self._blocks(features).transpose(0, 1)
        if self.block_size * (len(weight) + len(features)) <= len(weight) * len(features):
            return result + self.block * ((g.mT @ g) * (w.mT @ w)).sum()
        return result + self.block * (g @ w.mT).square().sum()

    def outputs(self, weight: Tensor, features: Tensor) -> Tensor:
        """``sum_ij C_ij (w_ci g_ni) (w_cj g_nj)`` for each sample n and output c, [N, outputs]."""
        if self.dense is not None or self.band is not None:
            return torch.stack([self.rows(features * row) for row in weight], 1)
        result = features.new_zeros(())
        if self._has_diagonal:
            result = (features.square() * self._diagonal(weight)) @ weight.square().T
        if not self.block:
            return result
        return result + self.block * self.logits(weight, features).square().sum(1)

    def rows(self, x: Tensor) -> Tensor:
        """``x' C x`` for each row of x, [N, d]."""
        if self.dense is not None:
            return ((x @ self.dense.to(x)) * x).sum(1)
        if self.band is not None:
            same, following = _corners(self.band.to(x))
            chunks = _chunks(x, len(self.band))
            return ((chunks[:-1] @ same + 2 * chunks[1:] @ following.T) * chunks[:-1]).sum((0, 2))
        result = (self._diagonal(x) * x.square()).sum(1) if self._has_diagonal else x.new_zeros(())
        return result + self.block * self._blocks(x).sum(2).square().sum(1) if self.block else result

    def logits(self, weight: Tensor, features: Tensor) -> Tensor:
        """The share of each block in the outputs, [N, blocks, outputs]."""
        return torch.einsum("nkr,ckr->nkc", self._blocks(features), self._blocks(weight))

    @property
    def _has_diagonal(self) -> bool:
        """Whether to take it; it stands for a form that is 0 too, so that there is a graph."""
        return isinstance(self.diagonal, Tensor) or self.diagonal != 0 or not self.block

    def _diagonal(self, like: Tensor) -> Tensor | float:
        return self.diagonal.to(like) if isinstance(self.diagonal, Tensor) else self.diagonal

    def _blocks(self, x: Tensor) -> Tensor:
        return pad(x, (0, -self.width % self.block_size)).unflatten(1, (-1, self.block_size))


def form_of(scheme: Scheme, width: int) -> Form:
    """The form of a scheme; of any other than these the matrix itself."""
    scheme.check(width)
    if isinstance(scheme, Units):
        rate = torch.tensor(scheme.survival_rate, dtype=torch.float64)
        return Form(width, diagonal=(1 - rate) / rate if rate.dim() else odds(float(rate)))
    if isinstance(scheme, Gaussian):
        return Form(width, diagonal=scheme.variance)
    if isinstance(scheme, Layer):
        return Form(width, block=odds(scheme.survival_rate), block_size=width)
    if isinstance(scheme, Exchangeable):
        c, rho = odds(scheme.survival_rate), scheme.correlation
        return Form(width, diagonal=c * (1 - rho), block=c * rho, block_size=width)
    if isinstance(scheme, FixedSize):
        scale = (width - scheme.kept) / (scheme.kept * max(width - 1, 1))
        return Form(width, diagonal=scale * width, block=-scale, block_size=width)
    if isinstance(scheme, UnitsInBlocks):
        diagonal = odds(scheme.unit_rate) / scheme.block_rate
        size = min(scheme.block_size, width)
        return Form(width, diagonal=diagonal, block=odds(scheme.block_rate), block_size=size)
    if isinstance(scheme, Blocks):
        size = min(scheme.block_size, width)
        if scheme.grid == "disjoint":
            return Form(width, block=odds(scheme.survival_rate), block_size=size)
        places = scheme.block_size - torch.arange(size, dtype=torch.float64)
        share = -math.log(scheme.survival_rate) / scheme.block_size
        return Form(width, band=torch.expm1(share * places))
    return Form(width, dense=scheme.characteristic_matrix(width, dtype=torch.float64))


def _band_total(lags: Tensor, weight: Tensor, features: Tensor) -> Tensor:
    """Gram matrices of chunks as long as the band, each with itself and with the next."""
    w, g = (_chunks(t, len(lags)) for t in (weight, features))
    same, following = _corners(lags)
    first = (w[:-1].mT @ w[:-1]) * (g[:-1].mT @ g[:-1]) * same
    second = (w[:-1].mT @ w[1:]) * (g[:-1].mT @ g[1:]) * following
    return first.sum() + 2 * second.sum()


def _corners(lags: Tensor) -> tuple[Tensor, Tensor]:
    """The Toeplitz matrix between a chunk and itself, and between it and the next."""
    here = torch.arange(len(lags), device=lags.device)
    lag = here[None, :] - here[:, None]
    return lags[lag.abs()], pad(lags, (0, len(lags)))[len(lags) + lag]


def _chunks(x: Tensor, length: int) -> Tensor:
    """[chunks and one of zeros, rows, length]."""
    return pad(x, (0, -x.shape[1] % length + length)).unflatten(1, (-1, length)).transpose(0, 1)

"""The spectral k-support norm: that of the singular values of a matrix in the last two dimensions.

It is the convex envelope of what disjoint DropBlock with blocks of k units costs in terms of the predictions;
k = 1 is the nuclear norm (Dropout) and k = rank or more the Frobenius norm. Every function is one singular
value decomposition and the function of `fallow.penalties.ksupport` on its values; by von Neumann's trace
inequality this gives the prox and the dual norm too.

References:
    McDonald, Pontil, Stamos: Spectral k-support norm regularization (2014). The derivative of the prox is the
    usual one of a spectral function (Lewis, Sendov), written here for rectangular matrices; derived.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fallow.errors import UsageError
from fallow.penalties._checks import check_floats, check_step, check_support
from fallow.penalties.ksupport import (
    KSupport,
    ksupport_dual_norm,
    ksupport_gradient,
    ksupport_prox,
    ksupport_sq,
    pieces,
    solve,
)


def spectral_ksupport_sq(w: Tensor, k: float) -> Tensor:
    """The squared norm of each matrix, of shape w.shape[:-2]; differentiable.

    Raises:
        ArgumentError: `w` is no real floating-point tensor.
        UsageError: `k` is not in (0, min(rows, columns)], `w` has fewer than two dimensions or is not finite.

    Examples:
        >>> spectral_ksupport_sq(torch.diag(torch.tensor([3.0, 1.0, 1.0])), 2)
        tensor(13.)
    """
    return ksupport_sq(torch.linalg.svdvals(_matrix(w, k)), k)


def spectral_ksupport_gradient(w: Tensor, k: float) -> Tensor:
    """The gradient of `spectral_ksupport_sq`, ``P diag(2 a / eta) Q^T``, 0 where `w` is."""
    p, values, q = torch.linalg.svd(_matrix(w, k), full_matrices=False)
    return (p * ksupport_gradient(values, k).unsqueeze(-2)) @ q


def spectral_ksupport_dual_norm(w: Tensor, k: float) -> Tensor:
    """The dual norm: the Euclidean one of the k largest singular values; k = 1 is the spectral norm."""
    return ksupport_dual_norm(torch.linalg.svdvals(_matrix(w, k)), k)


def spectral_ksupport_prox(w: Tensor, step: float | Tensor, k: float) -> Tensor:
    """``argmin_x |x - w|_F^2 / 2 + step |x|_(k)^2 / 2`` for each matrix; differentiable, once.

    Its derivative needs no distinct singular values and no full rank, unlike that of the decomposition.

    Args:
        w: The matrices, along the last two dimensions.
        step: A number, or a tensor with one for each matrix.
        k: In (0, min(rows, columns)].
    """
    check = check_step(step, _matrix(w, k).shape[:-2], w)
    result: Tensor = _SpectralProx.apply(w, check, k)  # type: ignore[assignment]
    return result


class _SpectralProx(torch.autograd.Function):
    """The prox with the derivative of a spectral function of which each value is phi(s) = min(.., max(..)).

    In the bases of the decomposition, off the diagonal, the symmetric part of a direction is multiplied by
    (phi_i - phi_j) / (s_i - s_j) and the antisymmetric one by (phi_i + phi_j) / (s_i + s_j); what lies
    outside the bases by phi_i / s_i; the diagonal follows the prox of the vector. The map is its own adjoint.
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor, gamma: Tensor, k: float) -> Tensor:
        p, values, q = torch.linalg.svd(w, full_matrices=False)
        ctx.save_for_backward(p, values, q, gamma)
        ctx.k = k
        return (p * ksupport_prox(values, gamma.squeeze(-1), k).unsqueeze(-2)) @ q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        p, values, q, gamma = ctx.saved_tensors
        (grad,) = grads
        core = p.mT @ grad @ q.mT
        with torch.enable_grad():
            leaf, step = values.detach().requires_grad_(), gamma.detach().requires_grad_()
            shrunk = ksupport_prox(leaf, step.squeeze(-1), ctx.k)
        diagonal = core.diagonal(dim1=-2, dim2=-1)
        along, by_step = torch.autograd.grad(shrunk, (leaf, step), diagonal)
        over, under, outside = _slopes(values, shrunk.detach(), gamma, ctx.k)
        inner = over * (core + core.mT) / 2 + under * (core - core.mT) / 2
        inner = inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1)) + torch.diag_embed(along)
        result = p @ inner @ q
        scaled = outside.unsqueeze(-1)
        result = result + p @ (scaled * (p.mT @ grad - core @ q))
        result = result + ((grad @ q.mT - p @ core) * scaled.mT) @ q
        return result, by_step, None


def _slopes(values: Tensor, shrunk: Tensor, gamma: Tensor, k: float) -> tuple[Tensor, Tensor, Tensor]:
    """Divided differences of phi, over differences and over sums of pairs, and phi(s) / s."""
    threshold = solve(values, gamma, k)[0].to(values.dtype)
    gamma = gamma.to(values.dtype)
    head, tail = pieces(values, threshold, gamma)
    piece = head.long() + 2 * tail.long()
    slope = torch.where(head, 1 / (1 + gamma), tail.to(values.dtype))
    difference = values.unsqueeze(-1) - values.unsqueeze(-2)
    total = values.unsqueeze(-1) + values.unsqueeze(-2)
    one = torch.ones_like(total)
    same = (piece.unsqueeze(-1) == piece.unsqueeze(-2)) | (difference == 0)
    # Of one piece the slope is known; between two it lies in [0, 1], whatever rounding makes of a quotient.
    quotient = (shrunk.unsqueeze(-1) - shrunk.unsqueeze(-2)) / torch.where(same, one, difference)
    over = torch.where(same, slope.unsqueeze(-1), quotient.clamp(0, 1))
    # Where values are 0 the threshold is what decides, and phi is linear there.
    at_zero = torch.where(values > 0, shrunk / torch.where(values > 0, values, 1), slope)
    sums = (shrunk.unsqueeze(-1) + shrunk.unsqueeze(-2)) / torch.where(total > 0, total, one)
    under = torch.where(total > 0, sums, slope.unsqueeze(-1))
    return over, under, at_zero


def _matrix(w: Tensor, k: float) -> Tensor:
    """`w` where it is a finite matrix with room for k; the decomposition of others fails in its own words."""
    check_floats("w", w, 2)
    check_support(k, min(w.shape[-2:]))
    if not bool(w.isfinite().all()):
        raise UsageError("w must be finite, got NaN or infinite entries: see where they come from")
    return w


class SpectralKSupport(KSupport):
    """Half the squared spectral k-support norm as a penalty on matrices in the last two dimensions.

    ``value(w) = |sigma(w)|_(k)^2 / 2``, with the factor of `KSupport`.

    Examples:
        >>> SpectralKSupport(1).value(2 * torch.eye(3))  # half the squared nuclear norm
        tensor(18.)
    """

    def value(self, w: Tensor) -> Tensor:
        """Half the squared norm of each matrix, of shape w.shape[:-2]."""
        return spectral_ksupport_sq(w, self.k) / 2

    def squared_norm(self, w: Tensor) -> Tensor:
        """The squared norm of each matrix."""
        return spectral_ksupport_sq(w, self.k)

    def dual_norm(self, w: Tensor) -> Tensor:
        """The dual norm of each matrix; half its square is the conjugate of `value`."""
        return spectral_ksupport_dual_norm(w, self.k)

    def gradient(self, w: Tensor) -> Tensor:
        """The gradient of `value`, without autograd."""
        return spectral_ksupport_gradient(w, self.k) / 2

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        """``argmin_x |x - w|_F^2 / 2 + step value(x)``."""
        return spectral_ksupport_prox(w, step, self.k)

    def eta(self, w: Tensor) -> Tensor:
        """The weights of the singular values, in descending order of these."""
        return super().eta(torch.linalg.svdvals(_matrix(w, self.k)))

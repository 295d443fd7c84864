"""Explicit factors at which the spectral k-support norm is attained, in equal blocks.

A = P diag(a) Q^T is the mean of k matrices of rank r and Frobenius norm |A|_(r). With the head of q values
and the level tau of the norm, and eta_i = a_i / tau on the tail, it is enough that

    (1 / k) sum_b F_b F_b^T = diag(eta),     F_b of r - q orthonormal columns

since then ``P diag(a_head, tau F_b F_b^T) Q^T`` are such matrices.

References:
    Derived; the rotations are those of Dhillon, Heath, Sustik, Tropp: Generalized finite algorithms for
    constructing Hermitian matrices with prescribed diagonals and spectra (2005).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fallow.errors import UsageError
from fallow.penalties._checks import check_blocks, check_floats
from fallow.penalties.ksupport import level

_TOLERANCE, _ROUNDS = 1e-13, 20000


def balanced_factors(predictions: Tensor, block_size: int, width: int) -> tuple[Tensor, Tensor]:
    """Features G [N, d] and weights W [outputs, d] with ``G W^T = A`` and equal, least blocks.

    Each of the k = d / r blocks has ``|G_b W_b^T|_F = |A|_(r) / k``, so that the regulariser of DropBlock is
    the least that these predictions can have, (1 - theta) / theta |A|_(r)^2 / k.

    Args:
        predictions: A, [N, outputs].
        block_size: r.
        width: d, a multiple of r; at least r times the size of the tail of A's spectrum.

    Estimator:
        Exact but for rounding where the tail has one free direction (any width) or k is a sum of orders of
        Hadamard matrices of at least the tail's size (any multiple of a power of 2 of that size); for other
        widths an iteration, until blocks are equal to 1e-13.

    Raises:
        UsageError: a width that does not divide, or is too small.

    References:
        Derived.

    Examples:
        >>> g, w = balanced_factors(torch.diag(torch.tensor([2.0, 1.0, 1.0])), 2, 8)
        >>> torch.allclose(g @ w.T, torch.diag(torch.tensor([2.0, 1.0, 1.0])), atol=1e-6)
        True
    """
    d, r, k = check_blocks(width, block_size)
    a = check_floats("predictions", predictions, 2).detach().double()
    if a.dim() != 2 or not bool(a.isfinite().all()):
        raise UsageError(f"predictions must be finite and of shape [N, outputs], got {list(a.shape)}")
    p, values, qt = torch.linalg.svd(a, full_matrices=False)
    rank = int((values > torch.finfo(predictions.dtype).eps * max(a.shape) * values[:1]).sum())
    p, values, q = p[:, :rank], values[:rank], qt[:rank].T
    if rank <= r:
        roots = torch.nn.functional.pad(values.sqrt().diag(), (0, r - rank)).expand(k, rank, r)
    else:
        tau = level(values, r)
        head = int((values > tau).sum())
        frames = _frames(values[head:] / tau, r - head, k, r) * tau.sqrt()
        roots = frames.new_zeros(k, rank, r)
        roots[:, :head, :head] = values[:head].sqrt().diag()
        roots[:, head:, head:] = frames
    columns = roots.transpose(0, 1).reshape(rank, d) / math.sqrt(k)
    return (p @ columns).to(predictions.dtype), (q @ columns).to(predictions.dtype)


def _frames(eta: Tensor, columns: int, blocks: int, block_size: int) -> Tensor:
    """So many matrices of orthonormal columns, [tail, columns], whose projections have the mean diag(eta)."""
    tail = len(eta)
    if blocks < tail:
        raise UsageError(
            f"width must be at least {block_size * tail} for exact factors, {tail} blocks of {block_size} "
            f"for as many values in the tail of the spectrum, got {block_size * blocks}"
        )
    if columns == 1:
        rows = eta.new_zeros(blocks, tail)
        rows[range(tail), range(tail)] = (blocks * eta).sqrt()
        return _rotated(rows, eta.new_ones(blocks)).unsqueeze(-1)
    start = eta.new_zeros(tail, columns)
    start[range(columns), range(columns)] = 1.0
    frame = _rotated(start, eta)
    signs = _signs(blocks, tail)
    if signs is not None:
        return signs.to(eta).unsqueeze(-1) * frame
    return _iterated(frame, eta, blocks, block_size)


def _rotated(rows: Tensor, targets: Tensor) -> Tensor:
    """Rows turned in pairs until their squared norms are the targets, which their own majorise; same Gram.

    One below its target and the next above it, with none but met ones between, are turned so that the one
    that is nearer to its target meets it: at most n - 1 turns.
    """
    order, place = rows.square().sum(1).argsort(), targets.argsort()
    rows, goal = rows[order].clone(), targets[place].tolist()
    norms = rows.square().sum(1).tolist()
    eps = 4 * torch.finfo(rows.dtype).eps * max(max(norms), 1.0)
    for _ in range(len(goal)):
        low = [i for i, (z, a) in enumerate(zip(norms, goal, strict=True)) if z < a - eps]
        i = low[-1] if low else -1
        above = [j for j in range(i + 1, len(goal)) if norms[j] > goal[j] + eps]
        if not low or not above:
            break
        j = above[0]
        if goal[i] - norms[i] <= norms[j] - goal[j]:
            met, other, want = i, j, goal[i]
        else:
            met, other, want = j, i, goal[j]
        one, two = rows[met].clone(), rows[other].clone()
        c, s = _turn(float(one @ one), float(two @ two), float(one @ two), want)
        rows[met], rows[other] = c * one + s * two, c * two - s * one
        norms[met], norms[other] = want, norms[met] + norms[other] - want
    result = torch.empty_like(rows)
    result[place] = rows
    return result


def _turn(own: float, other: float, product: float, want: float) -> tuple[float, float]:
    """Cosine and sine with ``c^2 own + 2 c s product + s^2 other = want``, want between the two."""
    a, c = other - want, own - want
    root = math.sqrt(max(product * product - a * c, 0.0))
    tangent = -c / (product + math.copysign(root, product)) if product or root else 0.0
    cosine = 1 / math.hypot(1.0, tangent)
    return cosine, tangent * cosine


def _signs(rows: int, columns: int) -> Tensor | None:
    """Signs with orthogonal columns, stacked from Hadamard matrices; None where none fit."""
    # Fewest matrices that stack to each number of rows.
    reach: dict[int, list[int]] = {0: []}
    orders = [n for n in range(columns, rows + 1) if _order(n)]
    for total in range(1, rows + 1):
        best = [reach[total - n] + [n] for n in orders if total - n in reach]
        if best:
            reach[total] = min(best, key=len)
    if rows not in reach:
        return None
    return torch.cat([_hadamard(n)[:, :columns] for n in reach[rows]])


def _order(n: int) -> bool:
    """Whether `_hadamard` has one: powers of 2 times 1 or p + 1, p a prime of the form 4 m + 3."""
    while n > 2 and n % 2 == 0 and not _paley(n):
        n //= 2
    return n in (1, 2) or _paley(n)


def _paley(n: int) -> bool:
    p = n - 1
    return p % 4 == 3 and all(p % f for f in range(2, math.isqrt(p) + 1))


def _hadamard(n: int) -> Tensor:
    """A Hadamard matrix by doubling (Sylvester) from 1 or from quadratic residues (Paley)."""
    if n == 1:
        return torch.ones(1, 1)
    if not _paley(n):
        half = _hadamard(n // 2)
        return torch.cat([torch.cat([half, half], 1), torch.cat([half, -half], 1)])
    p = n - 1
    squares = {i * i % p for i in range(1, p)}
    residue = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, p)])
    index = torch.arange(p)
    skew = torch.zeros(n, n)
    skew[0, 1:], skew[1:, 0] = 1.0, -1.0
    skew[1:, 1:] = residue[(index[None, :] - index[:, None]) % p]
    return skew + torch.eye(n)


def _iterated(frame: Tensor, eta: Tensor, blocks: int, block_size: int) -> Tensor:
    """By turns the nearest orthonormal columns of each block and the nearest stack with the right mean."""
    tail, columns = frame.shape
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(blocks, tail, tail, generator=generator, dtype=torch.float64)).Q
    now = turn.to(frame.device) @ frame
    root = (blocks * eta).sqrt().unsqueeze(-1)
    for _ in range(_ROUNDS):
        p, _, q = torch.linalg.svd(now, full_matrices=False)
        flat = (p @ q).transpose(0, 1).reshape(tail, blocks * columns)
        p, _, q = torch.linalg.svd(root * flat, full_matrices=False)
        now = (root * (p @ q)).reshape(tail, blocks, columns).transpose(0, 1)
        error = (now.mT @ now - torch.eye(columns, dtype=now.dtype, device=now.device)).abs().amax()
        if float(error) < _TOLERANCE:
            return now
    near = block_size * 2 ** math.ceil(math.log2(tail))
    raise UsageError(
        f"no exact factors found for a width of {block_size * blocks}: take a multiple of {near}"
    )

"""The k-support norm of vectors: squared norm, gradient, prox, dual norm; O(d log d), batched, any real k.

The unit ball is the convex hull of the vectors of Euclidean norm 1 with at most k entries that are not 0, so
that the squared norm falls from |w|_1^2 at k = 1 to |w|_2^2 at k = d. With weights eta,

    |w|_(k)^2 = min { sum_i w_i^2 / eta_i : 0 < eta_i <= 1, sum_i eta_i <= k },  eta_i = min(1, |w_i| / tau)

which is the box norm and makes sense for any real k > 0. Vectors lie along the last dimension. Sums over
sorted entries are taken in double precision whatever the type of the input is.

References:
    Argyriou, Foygel, Srebro: Sparse prediction with the k-support norm (2012). McDonald, Pontil, Stamos: New
    perspectives on k-support and cluster norms (2016), for the box norm. The smallest-index form of the norm,
    the counts of the prox and its spectral-gap case are derived.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fallow.penalties._checks import check_finite, check_floats, check_positive, check_step, check_support


def ksupport_sq(w: Tensor, k: float) -> Tensor:
    """The squared norm of each vector, of shape w.shape[:-1]; differentiable, twice too.

    ``sum_{i<p} z_i^2 + T_p^2 / (k - p + 1)`` with z the absolute values in descending order, T_p the sum from
    z_p on, and p the smallest index with ``(k - p + 1) z_p <= T_p``. The subgradient at 0 is 0.

    Raises:
        ArgumentError: `w` is no real floating-point tensor.
        UsageError: `k` is not in (0, d], or `w` is not finite.

    Examples:
        >>> w = torch.tensor([3.0, -1.0, 1.0])
        >>> ksupport_sq(w, 1), ksupport_sq(w, 2), ksupport_sq(w, 3)
        (tensor(25.), tensor(13.), tensor(11.))
    """
    magnitude = check_floats("w", w).abs()
    head = magnitude > level(magnitude, k)
    zero = magnitude.new_zeros(())
    left = k - head.sum(-1, dtype=magnitude.dtype)
    tail = torch.where(head, zero, magnitude).sum(-1)
    return torch.where(head, magnitude, zero).square().sum(-1) + tail.square() / left


def ksupport_gradient(w: Tensor, k: float) -> Tensor:
    """The gradient of `ksupport_sq`, ``2 w / eta = 2 sgn(w) max(|w|, tau)``, and 0 where w is."""
    magnitude = check_floats("w", w).abs()
    return 2 * w.sign() * torch.maximum(magnitude, level(magnitude, k))


def ksupport_dual_norm(w: Tensor, k: float) -> Tensor:
    """The dual norm: the Euclidean one of the k largest entries, the next one counted by the fraction of k.

    Examples:
        >>> ksupport_dual_norm(torch.tensor([3.0, -4.0, 1.0]), 2)
        tensor(5.)
    """
    number = check_support(k, check_floats("w", w).shape[-1])
    top = w.abs().topk(math.ceil(number), -1).values
    check_finite("w", top[..., 0])
    weights = (number - torch.arange(top.shape[-1], dtype=w.dtype, device=w.device)).clamp(max=1)
    return torch.linalg.vector_norm(top * weights.sqrt(), dim=-1)


def ksupport_prox(w: Tensor, step: float | Tensor, k: float) -> Tensor:
    """``argmin_x |x - w|^2 / 2 + step |x|_(k)^2 / 2`` for each vector; differentiable in `w` and `step`.

    With a threshold t, entries above ``t (1 + step) / step`` are divided by 1 + step, the others lose t, and
    those below t are 0:  ``|x| = min(|w| / (1 + step), max(|w| - t, 0))``.

    Args:
        w: The vectors, along the last dimension.
        step: A number, or a tensor with one for each vector; 0 leaves `w` as it is.
        k: In (0, d].

    Estimator:
        Exact but for rounding: one sort, one cumulative sum and two bisections, each over at most d counts.
        The derivative is that of the formula at fixed counts, the derivative of the prox wherever it has one.

    Raises:
        ArgumentError: `w` is no real floating-point tensor, or `step` no number.
        UsageError: a `k` outside (0, d], a `step` below 0 or of the wrong shape, entries that are not finite.

    References:
        Derived, from the box-norm form of McDonald and others: a breakpoint search in which sums over sorted
        prefixes stand for the sums over breakpoints.

    Examples:
        >>> ksupport_prox(torch.tensor([5.0, -2.0, 1.0]), 1.0, 1)
        tensor([2.5000, 0.0000, 0.0000])
    """
    check_floats("w", w)
    gamma = check_step(step, w.shape[:-1], w)
    magnitude = w.abs()
    with torch.no_grad():
        threshold, head, kept = solve(magnitude, gamma, k)
    t, gamma = threshold.to(w.dtype), gamma.to(w.dtype)
    if torch.is_grad_enabled() and (w.requires_grad or gamma.requires_grad):
        t = _traced(t, magnitude, gamma, head, kept, k)
    is_head, is_tail = pieces(magnitude, t, gamma)
    return torch.where(is_head, w / (1 + gamma), torch.where(is_tail, w - w.sign() * t, torch.zeros_like(w)))


def pieces(magnitude: Tensor, threshold: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Which entries the prox divides and from which it takes the threshold, two masks; the rest becomes 0."""
    less = magnitude - threshold
    head = magnitude / (1 + gamma) <= less
    return head, (less > 0) & ~head


def _traced(t: Tensor, magnitude: Tensor, gamma: Tensor, head: Tensor, kept: Tensor, k: float) -> Tensor:
    """The threshold with the derivative of ``gamma sum_tail |w| / (k - q + gamma (rho - q))``."""
    _, tail = pieces(magnitude, t, gamma)
    share = k - head.to(gamma.dtype) + gamma * (kept - head)
    total = torch.where(tail, magnitude, torch.zeros_like(magnitude)).sum(-1, keepdim=True)
    formula = gamma * total / torch.where(share > 0, share, torch.ones_like(share))
    return formula + (t - formula).detach()


def level(magnitude: Tensor, k: float) -> Tensor:
    """The level tau of the norm, [..., 1], above which entries are its head; without gradient."""
    size = magnitude.shape[-1]
    number = check_support(k, size)
    with torch.no_grad():
        ascending, sums = _sorted(magnitude)
        count = math.ceil(number)
        top = ascending[..., size - count :].flip(-1)
        left = number - torch.arange(count, dtype=top.dtype, device=top.device)
        levels = sums[..., size - count + 1 :].flip(-1) / left
        # Once an entry is at most its level, so are those after it; the last always is.
        head = (top > levels).sum(-1, keepdim=True).clamp(max=count - 1)
        return levels.gather(-1, head).to(magnitude.dtype)


def solve(magnitude: Tensor, gamma: Tensor, k: float) -> tuple[Tensor, Tensor, Tensor]:
    """Threshold t and the counts q (head) and rho (kept) of the prox, each of shape [..., 1].

    With S(alpha) = sum_i clip(alpha z_i - gamma, 0, 1), which does not decrease, and z in descending order,
    q = #{i: S((1 + gamma) / z_i) <= k} and rho = #{i: S(gamma / z_i) < k}; each is found by bisection. Where
    S = k on an interval (a gap after the k-th entry, or at most k that are not 0) both counts are the number
    of entries kept, and t is the first one that is not.

    Args:
        magnitude: Absolute values, [..., d].
        gamma: In double precision, [..., 1].
        k: In (0, d].

    References:
        Derived: the closed form of the structured-dropout minimiser, its explicit counts and its gap case.
    """
    size = magnitude.shape[-1]
    number = check_support(k, size)
    ascending, sums = _sorted(magnitude)
    whole, floor = math.ceil(number), math.floor(number)
    up = gamma / (1 + gamma)

    def largest(i: Tensor | int) -> Tensor:
        """The i-th largest entry, counted from 0."""
        index = i if isinstance(i, Tensor) else torch.full_like(gamma, i, dtype=torch.int64)
        return ascending.gather(-1, size - 1 - index)

    def balance(above: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the tail between two counts, and what S leaves to it."""
        kept = torch.maximum(above, kept)
        tail = sums.gather(-1, size - above) - sums.gather(-1, size - kept)
        return tail, number - above.double() + gamma * (kept - above)

    def is_head(i: Tensor) -> Tensor:
        z = largest(i)
        tail, share = balance(_at_least(ascending, z), _above(ascending, z * up))
        return (1 + gamma) * tail <= z * share

    def is_kept(i: Tensor) -> Tensor:
        z = largest(i)
        tail, share = balance(_at_least(ascending, z / up), _above(ascending, z))
        return gamma * tail < z * share

    # A head of k entries or fewer than k kept ones cannot be outside a gap: the bounds keep rounding out.
    head = _first_false(is_head, torch.zeros_like(gamma, dtype=torch.int64), whole - 1)
    kept = _first_false(is_kept, torch.full_like(head, whole), size)
    rank = torch.arange(size, device=ascending.device)
    inside = (rank >= size - kept) & (rank < size - head)
    total = torch.where(inside, ascending, torch.zeros_like(ascending)).sum(-1, keepdim=True)
    threshold = gamma * total / (number - head.double() + gamma * (kept - head))
    following = largest(floor) if floor < size else torch.zeros_like(gamma)
    gap = following == 0
    if floor == number:
        gap = gap | (gamma * largest(floor - 1) >= (1 + gamma) * following)
    count = _above(ascending, torch.zeros_like(gamma)).clamp(max=floor)
    return (
        torch.where(gap, following, threshold),
        torch.where(gap, count, head),
        torch.where(gap, count, kept),
    )


def _sorted(magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """Entries in ascending order, [..., d], and sums of the m smallest, [..., d + 1], in double precision.

    Sums from the small end: those of a tail do not see the head, however large it is.
    """
    ascending = magnitude.detach().sort(-1).values
    check_finite("w", ascending[..., -1])
    ascending = ascending.to(torch.float64).contiguous()
    sums = ascending.new_zeros((*ascending.shape[:-1], ascending.shape[-1] + 1))
    torch.cumsum(ascending, -1, out=sums[..., 1:])
    return ascending, sums


def _at_least(ascending: Tensor, bound: Tensor) -> Tensor:
    return ascending.shape[-1] - torch.searchsorted(ascending, bound.contiguous())


def _above(ascending: Tensor, bound: Tensor) -> Tensor:
    return ascending.shape[-1] - torch.searchsorted(ascending, bound.contiguous(), right=True)


def _first_false(holds: Callable[[Tensor], Tensor], low: Tensor, high: int) -> Tensor:
    """The first index from `low` on at which `holds` fails, for good, and `high` where it never does."""
    steps = int(high - low.amin()).bit_length() if low.numel() else 0
    top = torch.full_like(low, high)
    for _ in range(steps):
        open_ = low < top
        middle = torch.where(open_, (low + top) // 2, 0)
        yes = holds(middle)
        low, top = (
            torch.where(open_ & yes, middle + 1, low),
            torch.where(open_ & ~yes, middle, top),
        )
    return low


@dataclass(frozen=True)
class KSupport:
    """Half the squared k-support norm as a penalty on vectors along the last dimension.

    ``value(w) = |w|_(k)^2 / 2``: the factor 1/2 of the eta-trick, so that ``k = d`` is the ridge w^2 / 2, and
    ``prox(w, s)`` minimises ``|x - w|^2 / 2 + s value(x)`` and shrinks by the survival rate at its result.

    Attributes:
        k: Any real number in (0, d]; checked against d where a vector comes.

    Examples:
        >>> penalty = KSupport(2)
        >>> w = torch.tensor([3.0, -1.0, 1.0])
        >>> penalty.value(w), penalty.squared_norm(w)
        (tensor(6.5000), tensor(13.))
    """

    k: float

    def __post_init__(self) -> None:
        check_positive("k", self.k)

    def value(self, w: Tensor) -> Tensor:
        """Half the squared norm of each vector, of shape w.shape[:-1]."""
        return ksupport_sq(w, self.k) / 2

    def total(self, w: Tensor) -> Tensor:
        """The sum of the values, a scalar."""
        return self.value(w).sum()

    def squared_norm(self, w: Tensor) -> Tensor:
        """The squared norm of each vector."""
        return ksupport_sq(w, self.k)

    def dual_norm(self, w: Tensor) -> Tensor:
        """The dual norm of each vector; half its square is the conjugate of `value`."""
        return ksupport_dual_norm(w, self.k)

    def gradient(self, w: Tensor) -> Tensor:
        """The gradient of `value`, without autograd."""
        return ksupport_gradient(w, self.k) / 2

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        """``argmin_x |x - w|^2 / 2 + step value(x)``."""
        return ksupport_prox(w, step, self.k)

    def eta(self, w: Tensor) -> Tensor:
        """``min(1, |w| / tau)``, which attains the minimum in `value`; sums to k unless fewer are not 0."""
        magnitude = check_floats("w", w).detach().abs()
        tau = level(magnitude, self.k)
        return torch.where(magnitude > 0, magnitude / tau.clamp_min(torch.finfo(w.dtype).tiny), 0).clamp(
            max=1
        )

    def dual(self, eta: Tensor) -> Tensor:
        """0 for each vector with entries in [0, 1] and a sum of at most k, infinity for all others."""
        slack = 8 * torch.finfo(check_floats("eta", eta).dtype).eps * max(self.k, 1)
        inside = ((eta >= 0) & (eta <= 1 + slack)).all(-1) & (eta.sum(-1) <= self.k + slack)
        return torch.where(inside, 0.0, math.inf).to(eta.dtype)

    def survival_rate(self, w: Tensor, strength: float) -> Tensor:
        """Keep probability ``eta / (eta + strength)`` of the adaptive dropout that this is dual to."""
        eta = self.eta(w)
        return eta / (eta + check_positive("strength", strength))

"""What training with disjoint DropBlock (and Dropout, DropConnect: blocks of 1) converges to, in closed form.

A linear head ``predictions = features @ weight.T`` of width d, with blocks of r features kept at a survival
rate theta and divided by it, has the expected squared error

    |Y - A|_F^2 + (1 - theta) / theta sum_b |A_b|_F^2,     A = sum_b A_b, the parts of k = d / r blocks   (1)

Where features may move too, the least of the second term for given predictions A has the convex envelope
``gamma |A|_(r)^2``, the squared spectral k-support norm, ``gamma = (1 - theta) / theta / k``, and is equal to
it for k at least the size of the spectrum's tail. So

    min_A |Y - A|_F^2 + gamma |A|_(r)^2                                                                   (2)

is what training can reach, a bound of it at any width, and one prox on the singular values of Y.

Rows are samples throughout, as in torch; sums of squares are sums and no means, which scales both terms
alike. Everything is computed in double precision.

References:
    Pal, Lane, Vidal, Haeffele: On the regularization properties of structured dropout (2020), for the
    statement that there is such a closed form; Cavazza and others (2017) for blocks of 1. The formulas are
    derived.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fallow.errors import UsageError, check_rate
from fallow.penalties._checks import check_blocks, check_floats
from fallow.penalties._factors import balanced_factors
from fallow.penalties._problem import check_problem, check_shapes, reduced
from fallow.penalties.ksupport import ksupport_sq, solve


def adaptive_survival_rate(*, survival_rate: float, width: int, block_size: int) -> float:
    """The rate at which a layer of this width has the penalty that a single block has at the rate given.

    ``theta(d) = r theta / (d - (d - r) theta)``: with a fixed rate a wider layer is regularised less, without
    end; with this one ``gamma = (1 - theta) / theta`` at every width.

    Args:
        survival_rate: Of a layer of one block.
        width: Hidden units d, a multiple of `block_size`.
        block_size: Units r that rest together; 1 is Dropout.

    References:
        Cavazza and others (2017) for blocks of 1; derived for larger ones.

    Examples:
        >>> adaptive_survival_rate(survival_rate=0.9, width=160, block_size=160)
        0.9
        >>> round(adaptive_survival_rate(survival_rate=0.9, width=160, block_size=10), 4)
        0.36
    """
    rate = check_rate(survival_rate)
    d, r, _ = check_blocks(width, block_size)
    return r * rate / (d - (d - r) * rate)


def effective_gamma(*, survival_rate: float, width: int, block_size: int) -> float:
    """Weight of the squared spectral norm that training at a fixed rate has: ``(1 - theta) / theta r / d``.

    Examples:
        >>> effective_gamma(survival_rate=0.5, width=160, block_size=8)
        0.05
    """
    rate = check_rate(survival_rate)
    d, r, _ = check_blocks(width, block_size)
    return (1 - rate) / rate * r / d


def dropblock_objective(
    targets: Tensor,
    features: Tensor,
    weight: Tensor,
    *,
    survival_rate: float,
    block_size: int,
    bias: Tensor | None = None,
) -> Tensor:
    """Expected squared error (1) over the masks of a head, a scalar; differentiable.

    Args:
        targets: [N, outputs].
        features: [N, d].
        weight: [outputs, d], as in nn.Linear.
        survival_rate: Of a block; the rest is divided by it.
        block_size: Features r in a block; divides d.
        bias: [outputs], added after the mask.

    Estimator:
        Exact for all values, for one mask for the batch and for one for each sample. A sum over samples and
        outputs: divide by what the loss divides by.

    References:
        Derived; for blocks of 1 Cavazza and others (2017).
    """
    rate = check_rate(survival_rate)
    check_floats("features", features, 2)
    check_floats("weight", weight, 2)
    if features.shape[1] != weight.shape[1]:
        raise UsageError(
            "features and weight must have the same width, got shapes "
            f"{list(features.shape)} and {list(weight.shape)}"
        )
    _, r, k = check_blocks(features.shape[1], block_size)
    output = features @ weight.T if bias is None else features @ weight.T + bias
    check_shapes(targets, output)
    g, w = (t.unflatten(1, (k, r)).transpose(0, 1) for t in (features, weight))
    penalty = ((g.mT @ g) * (w.mT @ w)).sum()
    return (targets - output).square().sum() + (1 - rate) / rate * penalty


@dataclass(frozen=True)
class Minimiser:
    """The global minimiser of (2), or of it with ``beta |A|_F^2`` added; made by `closed_form` and the like.

    Attributes:
        predictions: A* and the bias, [N, outputs].
        bias: [outputs], or None where there is none.
        spectrum: Singular values of A*, in descending order.
        target_spectrum: Those of what is to be fitted: the targets, centred and projected.
        head: Count q of values that are only divided, by 1 + gamma + beta.
        kept: Count rho of values that are not 0, the rank of A*.
        threshold: What the values between these two lose (before a division by 1 + beta); those at most that
            become 0.
        value: The least value of the objective.
        block_size: r.
        gamma: Weight of the squared norm.
        inputs: [N, features] or None where predictions are free.
        beta: Weight of the squared Frobenius norm, 0 but for `closed_form_mixed`.
    """

    predictions: Tensor
    bias: Tensor | None
    spectrum: Tensor
    target_spectrum: Tensor
    head: int
    kept: int
    threshold: float
    value: float
    block_size: int
    gamma: float
    inputs: Tensor | None
    beta: float = 0.0

    @property
    def reachable_width(self) -> int:
        """A width from which on training can reach `value` exactly: r times the size of the tail."""
        return self.block_size * max(self.kept - self.head, 1)

    def layers(self, width: int) -> tuple[Tensor, Tensor]:
        """Weights [width, features] and [outputs, width] of a linear network whose objective (1) is `value`.

        Where there are no inputs the first is that for one-hot ones, [width, N]. Blocks have equal shares.

        Raises:
            UsageError: for a width below `reachable_width` or that the blocks do not divide.
        """
        free = self.predictions if self.bias is None else self.predictions - self.bias
        hidden, outgoing = balanced_factors(free, self.block_size, width)
        if self.inputs is None:
            return hidden.T.contiguous(), outgoing
        double = torch.linalg.pinv(self.inputs.double()) @ hidden.double()
        return double.T.to(hidden.dtype), outgoing


def closed_form(
    targets: Tensor, block_size: int, gamma: float, inputs: Tensor | None = None, *, bias: bool = False
) -> Minimiser:
    """The global minimiser of ``|Y - A|_F^2 + gamma |A|_(r)^2``, with its spectrum, counts and value.

    Values m of the targets become ``m / (1 + gamma)`` (the first q), ``m - t`` (up to the rho-th) and 0, with
    ``t = gamma sum_{q < i <= rho} m_i / (r - q + gamma (rho - q))``. Values below rounding count as 0.

    Args:
        targets: Y, [N, outputs].
        block_size: r, an integer of at least 1; above the number of singular values it acts like that number.
        gamma: At least 0; `effective_gamma` of a network trained at a fixed rate.
        inputs: X, [N, features]: predictions are X times a matrix. None: any predictions, X = 1.
        bias: Whether predictions have an output bias that no mask touches.

    Estimator:
        Exact; with inputs the targets are projected on their span, and the rest is added to the value. With
        a bias too, the inputs must be centred or have a constant among their combinations, or there is no
        closed form.

    Raises:
        UsageError: targets or inputs that are not finite or do not fit, gamma below 0, inputs as above.

    References:
        Derived; it agrees with the thresholding of Cavazza and others (2017) for blocks of 1.

    Examples:
        >>> found = closed_form(torch.diag(torch.tensor([4.0, 3.0, 0.5])), 1, 0.5)
        >>> found.head, found.kept, round(found.threshold, 6)
        (0, 2, 1.75)
    """
    r, number = check_problem(block_size, gamma)
    return minimise(targets, r, number, 0.0, inputs, bias)


def minimise(
    targets: Tensor, r: int, gamma: float, beta: float, inputs: Tensor | None, bias: bool
) -> Minimiser:
    """`closed_form` with ``beta |A|_F^2`` added: that of ``Y / (1 + beta)`` and ``gamma / (1 + beta)``."""
    centred, basis, mean = reduced(targets, inputs, bias)
    inner = centred if basis is None else basis.T @ centred
    p, m, q = torch.linalg.svd(inner, full_matrices=False)
    m = torch.where(m > torch.finfo(targets.dtype).eps * max(inner.shape) * m.amax(), m, 0)
    scale = 1 + beta
    weight = torch.full((1,), gamma / scale, dtype=torch.float64, device=m.device)
    threshold, head, _ = (float(v) for v in solve(m / scale, weight, min(r, len(m))))
    spectrum = torch.minimum(m / (scale + gamma), (m / scale - threshold).clamp_min(0))
    # A value that is equal to the threshold is not kept, whatever rounding leaves of it.
    spectrum = torch.where(spectrum > 16 * torch.finfo(m.dtype).eps * m.amax(), spectrum, 0)
    kept = int((spectrum > 0).sum())
    best = (p * spectrum) @ q
    best = best if basis is None else basis @ best
    penalty = gamma * ksupport_sq(spectrum, min(r, len(m))) + beta * spectrum.square().sum()
    predictions = best if mean is None else best + mean
    return Minimiser(
        predictions=predictions.to(targets.dtype),
        bias=None if mean is None else mean.to(targets.dtype),
        spectrum=spectrum.to(targets.dtype),
        target_spectrum=m.to(targets.dtype),
        head=min(int(head), kept),
        kept=kept,
        threshold=scale * threshold,
        value=float((centred - best).square().sum() + penalty),
        block_size=r,
        gamma=gamma,
        inputs=inputs,
        beta=beta,
    )

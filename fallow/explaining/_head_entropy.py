"""A head under cross-entropy: the quadratic form of its penalty and Jensen's bound, beside Monte Carlo.

A cross-entropy is ``sum_n w_n (logsumexp(z_n) - <t_n, z_n>)`` plus a constant, and its curvature says w.
Noise of mean 0 in z does not change the mean of the second term, so that neither form needs the targets t.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fallow.explaining._head_noise import HeadNoise
from fallow.explaining._head_readings import Head, Reading
from fallow.explaining._head_squared import as_blocks
from fallow.penalties import jensen_bound, quadratic_surrogate

_GROUPS = 64  # of equal weights; where there are more, the forms are left out
_AT_ONCE = 1 << 24  # shares of features in logits
_TOO_MANY = 1 << 34  # of them in all, each of which the bound takes a logarithm


def quadratic_form(head: Head, noise: HeadNoise) -> float | None:
    """The second-order form of the penalty; None where weights differ between too many samples.

    Formula: ``sum_n w_n / 2 [sum_j p_j V_jj - sum_jl p_j p_l V_jl]``, V the covariance of the logits. Masks
    of weights leave only its diagonal: ``sum_n w_n / 2 sum_j p_j (1 - p_j) V_jj``.
    """
    total = 0.0
    for reading in head.readings:
        groups = _groups(reading, head.weight)
        if groups is None:
            return None
        for weight, rows in groups:
            g = reading.features[rows]
            total += weight * float(
                _of_weights(head, g, noise)
                if noise.weights
                else quadratic_surrogate(head.weight, g, noise.scheme, bias=head.bias)
            )
    return total


def _of_weights(head: Head, features: Tensor, noise: HeadNoise) -> Tensor:
    rate = noise.scheme.mean(len(head.weight[0])).to(features)
    logits = features @ head.weight.T
    p = (logits if head.bias is None else logits + head.bias).softmax(1)
    variance = (features.square() * ((1 - rate) / rate)) @ head.weight.square().T
    return (p * (1 - p) * variance).sum() / 2


def jensen(head: Head, noise: HeadNoise) -> float | None:
    """Jensen's bound of the penalty; None for other laws than independent blocks, and where it is dear."""
    if sum(len(r.features) for r in head.readings) * head.weight.numel() > _TOO_MANY:
        return None
    like = None if noise.weights else as_blocks(noise.scheme, head.weight.shape[1], exactly=True)
    if like is None:
        return None
    rate, size = like
    total = 0.0
    for reading in head.readings:
        groups = _groups(reading, head.weight)
        if groups is None:
            return None
        for weight, rows in groups:
            z = reading.output[rows]
            any_class = z.argmax(1)
            plain = (z.logsumexp(1) - z.gather(1, any_class[:, None])[:, 0]).sum()
            bound = jensen_bound(
                head.weight,
                reading.features[rows],
                any_class,
                survival_rate=rate,
                block_size=size,
                bias=head.bias,
            )
            total += weight * float(bound - plain)
    return total


def _groups(reading: Reading, weight: Tensor) -> Iterator[tuple[float, Tensor]] | None:
    """Rows of equal weight, with that weight and the batch's share in it; not too many at once."""
    w = reading.curvature.weights[0].double().reshape(len(reading.features))
    # weights are fitted to a product with the Hessian: equal ones are so to the root of the precision
    unit = float(w.amax()) * 1e-6
    levels, which = torch.round(w / unit).unique(return_inverse=True)
    if len(levels) > _GROUPS:
        return None
    alike = [(which == i).nonzero()[:, 0] for i in range(len(levels)) if float(levels[i]) > 0]
    size = max(_AT_ONCE // weight.numel(), 1)
    return ((reading.share * float(w[rows].mean()), part) for rows in alike for part in rows.split(size))

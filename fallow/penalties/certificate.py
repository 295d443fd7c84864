"""How far a trained network is from the global minimum of its dropout objective at most, by weak duality.

The objectives (1) and (2) and the notation are those of `fallow.penalties.minimiser`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fallow.errors import UsageError
from fallow.penalties._problem import check_problem, check_shapes, reduced
from fallow.penalties.ksupport import ksupport_dual_norm, ksupport_sq
from fallow.penalties.minimiser import dropblock_objective, effective_gamma


@dataclass(frozen=True)
class Certificate:
    """How far an objective is from its global minimum at most; made by `duality_gap`.

    Attributes:
        objective: What the network has.
        bound: What no network of any width can be below, by weak duality.
    """

    objective: float
    bound: float

    @property
    def gap(self) -> float:
        """Objective less bound: at least the distance to the global minimum."""
        return self.objective - self.bound

    @property
    def relative(self) -> float:
        """The gap as a share of the objective; 0 where that is 0."""
        return self.gap / self.objective if self.objective > 0 else 0.0

    def __str__(self) -> str:
        """One line."""
        return f"objective {self.objective:.6g}, at most {self.relative:.2%} above the global minimum"


def duality_gap(
    targets: Tensor,
    predictions: Tensor,
    block_size: int,
    gamma: float,
    *,
    inputs: Tensor | None = None,
    bias: Tensor | None = None,
    penalty: float | None = None,
) -> Certificate:
    """A bound of how far any predictions are from the global minimum, from one decomposition.

    For every Z, ``2 <Z, Y> - |Z|_F^2 - sum_{i<=r} sigma_i(Z)^2 / gamma`` is at most the minimum; Z is the
    residual (centred with a bias, projected with inputs) times the best scalar.

    Args:
        targets: Y, [N, outputs].
        predictions: Of the network without masks, the bias included.
        block_size: r.
        gamma: `effective_gamma` of the network.
        inputs: X where the whole network is linear, for a tighter bound; None holds for every network.
        bias: The output bias in the predictions, which no mask touches.
        penalty: What the regulariser is in the network; None: the least it can be, gamma |A|_(r)^2.

    Estimator:
        A bound for every input, less an allowance for rounding of 64 eps |Y|_F^2; the gap is 0 (but for that)
        exactly at the minimiser.

    References:
        Derived.
    """
    r, number = check_problem(block_size, gamma)
    check_shapes(targets, predictions)
    free = predictions.detach().double()
    free = free if bias is None else free - bias.detach().double()
    if not bool(free.isfinite().all()):
        raise UsageError("predictions must be finite, got NaN or infinite entries: training has diverged")
    centred, basis, _ = reduced(targets, inputs, bias is not None)
    error = (targets.detach().double() - predictions.detach().double()).square().sum()
    support = min(r, *free.shape)
    if penalty is None:
        penalty = number * float(ksupport_sq(torch.linalg.svdvals(free), support))
    z = centred - free if bias is None else centred - (free - free.mean(0))
    outside = 0.0
    if basis is not None:
        inner = basis.T @ centred
        outside = float((centred - basis @ inner).square().sum())
        z, centred = basis.T @ z, inner
    total, product = float(centred.square().sum()), float((z * centred).sum())
    bound = outside
    if number > 0 and bool(z.any()):
        norm = float(ksupport_dual_norm(torch.linalg.svdvals(z), min(r, *z.shape)))
        bound += product * product / (float(z.square().sum()) + norm * norm / number)
    rounding = 64 * torch.finfo(torch.float64).eps * (total + outside)
    return Certificate(float(error) + penalty, max(bound - rounding, 0.0))


def network_gap(
    targets: Tensor,
    features: Tensor,
    weight: Tensor,
    *,
    survival_rate: float,
    block_size: int,
    bias: Tensor | None = None,
    inputs: Tensor | None = None,
) -> Certificate:
    """`duality_gap` of a head trained with DropBlock: its objective (1) and the bound, for any features.

    Args:
        targets: [N, outputs].
        features: [N, d], what the masks act on.
        weight: [outputs, d], as in nn.Linear.
        survival_rate: Of a block.
        block_size: r; 1 for Dropout and DropConnect.
        bias: [outputs].
        inputs: [N, features] where the features are linear in them.
    """
    parts = [None if t is None else t.detach().double() for t in (targets, features, weight, bias)]
    y, g, w, b = parts
    assert y is not None and g is not None and w is not None
    value = dropblock_objective(y, g, w, survival_rate=survival_rate, block_size=block_size, bias=b)
    output = g @ w.T if b is None else g @ w.T + b
    gamma = effective_gamma(survival_rate=survival_rate, width=g.shape[1], block_size=block_size)
    penalty = float(value - (y - output).square().sum())
    return duality_gap(y, output, block_size, gamma, inputs=inputs, bias=b, penalty=penalty)

"""What masks do to the output of a network at initialisation: its variance, and training beside evaluation.

The networks and the strength h are those of `fallow.explaining.growth`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fallow.errors import UsageError
from fallow.explaining._growth_common import Rates, checked, gate_moments
from fallow.explaining.depth_profiles import arc_cosine


@dataclass(frozen=True)
class NoiseVariance:
    """Second moment of a unit of y_L, and its parts; made by `noise_variance`.

    Attributes:
        total: q_L, mean over weights and masks of the square.
        between: m_L, mean over weights of the squared mean over masks.
        noise: q_L - m_L, mean over weights of the variance over masks.
    """

    total: float
    between: float

    @property
    def noise(self) -> float:
        """The variance over masks."""
        return self.total - self.between


def noise_variance(
    rates: Rates, *, kind: str = "scaled", scale: str = "eval", gain: float = 2.0, start: float = 1.0
) -> NoiseVariance:
    """Variance over masks of a unit of y_L at initialisation, by the recursion of two replicas.

    ``q_l = q_(l-1) (1 + h E g^2)``, ``m_l = m_(l-1) + h (E g)^2 q_(l-1) kappa_1(m_(l-1) / q_(l-1))``, from
    q_0 = m_0 = ``start``. Its units are those of ``start``, E y_0^2.

    Estimator:
        Approximate even at infinite width: it puts the mean over masks of each replica's second moment
        where its law belongs. Against all pairs of masks enumerated (``scale="eval"``, equal rates, L = 8)
        the noise is off by less than .4 % at h = 1/L, but by 3 % at h = 1, growing with depth: use it for
        scaled nets. Not for BatchNorm.

    References:
        Derived, D17.
    """
    ps, h = checked(rates, kind, scale, gain)
    if kind == "batchnorm":
        raise UsageError('noise_variance knows kind="vanilla" and "scaled"; BatchNorm mixes the rows')
    q = m = float(start)
    for p in ps:
        first, second = gate_moments(p, scale)
        q, m = q * (1 + h * second), m + h * first * first * q * arc_cosine(m / q)
    return NoiseVariance(q, m)


def train_test_mismatch(
    rates: Rates, *, kind: str = "vanilla", scale: str = "eval", gain: float = 2.0
) -> tuple[float, float]:
    """E y_L^2 / E y_0^2 in training (mean over masks) and in the network at evaluation.

    Un-normalised prod (1 + h p) and prod (1 + h p^2) for ``scale="eval"``, prod (1 + h / p) and (1 + h)^L for
    "train"; with BatchNorm, where each block adds a fixed amount, sums in place of the products.

    Estimator:
        Exact at infinite width. BatchNorm at evaluation with the statistics of that network: recalibrated.

    References:
        Derived, section 3.5.
    """
    ps, h = checked(rates, kind, scale, gain)
    train = [h * gate_moments(p, scale)[1] for p in ps]
    test = [h * (p * p if scale == "eval" else 1.0) for p in ps]
    if kind == "batchnorm":
        return 1 + sum(train), 1 + sum(test)
    return math.prod(1 + x for x in train), math.prod(1 + x for x in test)

"""The law of a pre-activation over masks, and how far it is from a normal one.

With branches scaled by 1/sqrt(L), or small ones, stochastic depth acts in the limit of many blocks like
Gaussian noise added to the pre-activations,

    y_L(delta) ~ mean + N(0, Sigma(x)),    Sigma(x) = sum_l p_l (1 - p_l) zeta_l(x) zeta_l(x)^T

whose covariance depends on the input: zeta_l is what leaving out block l takes from y_L. That stochastic
depth mimics Gaussian noise injection at large depth is a contribution of Hayou and Ayed (2021); the forms
here are derived (D15, D16). Without the scaling |y_L|^2 is like 2^(kept blocks), with the tails of a
lognormal law, and there is no such limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fallow.errors import UsageError, check_count
from fallow.explaining._growth_common import Rates, checked_rates, gate_moments


@dataclass(frozen=True)
class GaussianLimit:
    """The law of some units over masks beside normal ones; made by `gaussian_limit`.

    Attributes:
        samples: masks.
        means: by unit.
        deviations: by unit, standard deviation over masks (n - 1); with ``means`` the fitted normal law.
        distances: by unit, Kolmogorov-Smirnov distance to the fitted normal law.
        level: 5 % level of that distance for a normal law (`lilliefors_level`).
        kurtosis: by unit, excess kurtosis; 0 for a normal law.
        kurtosis_errors: its standard errors.
        predicted: by unit, the standard deviation that theory gives; None where there is no theory.
        edges: of the histogram, in standard deviations from the mean; what lies beyond is in its end bins.
        counts: of all units together.
        expected: the counts of normal laws.
    """

    samples: int
    means: tuple[float, ...]
    deviations: tuple[float, ...]
    distances: tuple[float, ...]
    level: float
    kurtosis: tuple[float, ...]
    kurtosis_errors: tuple[float, ...]
    predicted: tuple[float, ...] | None
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    expected: tuple[float, ...]

    @property
    def distance(self) -> float:
        """Mean distance over the units."""
        return _mean(self.distances)

    @property
    def excess_kurtosis(self) -> float:
        """Mean excess kurtosis over the units."""
        return _mean(self.kurtosis)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON."""
        return {**asdict(self), "distance": self.distance, "excess_kurtosis": self.excess_kurtosis}

    def __str__(self) -> str:
        """A table of at most ten units."""
        count = len(self.means)
        beyond = sum(d > self.level for d in self.distances)
        theory = "  predicted" if self.predicted else ""
        lines = [
            f"law over {self.samples} masks of {count} {'unit' if count == 1 else 'units'}",
            f"KS distance to the fitted normal {self.distance:.4f} (5 % level {self.level:.4f}; {beyond} of "
            f"{count} beyond), excess kurtosis {self.excess_kurtosis:+.3f}",
            f"unit        mean  deviation{theory}      KS  excess kurtosis",
        ]
        for i in range(min(count, 10)):
            predicted = f"  {self.predicted[i]:9.4g}" if self.predicted else ""
            fitted = f"{self.means[i]:>10.4g}  {self.deviations[i]:>9.4g}{predicted}"
            kurtosis = f"{self.kurtosis[i]:+.3f} ± {self.kurtosis_errors[i]:.3f}"
            lines.append(f"{i:>4}  {fitted}  {self.distances[i]:.4f}  {kurtosis}")
        return "\n".join([*lines, *(["..."] if count > 10 else [])])


def gaussian_limit(
    samples: Tensor | Sequence[float], *, predicted: Tensor | Sequence[float] | None = None, bins: int = 40
) -> GaussianLimit:
    """Compare samples over masks with a normal law of the same mean and deviation.

    Args:
        samples: [masks] or [masks, units], at least 20 masks.
        predicted: standard deviation by unit, to be kept beside the measured one.
        bins: of the histogram, over 4 standard deviations either side.

    Raises:
        UsageError: too few samples, values that are not finite, or a unit that does not vary.

    Examples:
        >>> law = gaussian_limit(torch.randn(4096, generator=torch.Generator().manual_seed(0)))
        >>> law.distance < law.level
        True
    """
    x = _columns(samples)
    check_count("bins", bins, 1)
    z = _standardised(x)
    edges = torch.linspace(-4, 4, bins + 1, dtype=torch.float64)
    inner = edges[1:-1].contiguous()
    counts = torch.bincount(torch.bucketize(z.flatten().contiguous(), inner), minlength=bins)
    below = torch.cat([torch.zeros(1).double(), torch.special.ndtr(inner), torch.ones(1).double()])
    kurtosis, errors = excess_kurtosis(x)
    theory = None if predicted is None else tuple(torch.as_tensor(predicted).double().flatten().tolist())
    if theory is not None and len(theory) != x.shape[1]:
        raise UsageError(f"predicted must have one entry for each of {x.shape[1]} units, got {len(theory)}")
    return GaussianLimit(
        samples=len(x),
        means=tuple(x.mean(0).tolist()),
        deviations=tuple(x.std(0).tolist()),
        distances=tuple(ks_distance(x).tolist()),
        level=lilliefors_level(len(x)),
        kurtosis=tuple(kurtosis.tolist()),
        kurtosis_errors=tuple(errors.tolist()),
        predicted=theory,
        edges=tuple(edges.tolist()),
        counts=tuple(counts.tolist()),
        expected=tuple((below.diff() * x.numel()).tolist()),
    )


def ks_distance(samples: Tensor | Sequence[float]) -> Tensor:
    """Kolmogorov-Smirnov distance of each column to the normal law with its mean and deviation (n - 1).

    sup over t of |empirical distribution function - normal one|, exact. Mean and deviation are estimated
    from the same samples (Lilliefors's setting): compare with `lilliefors_level` and not with the tables of
    Kolmogorov, whose levels are half as large again.
    """
    z = _standardised(_columns(samples)).sort(0).values
    n = len(z)
    law = torch.special.ndtr(z)
    steps = torch.arange(n + 1, dtype=z.dtype)[:, None] / n
    return torch.maximum((steps[1:] - law).amax(0), (law - steps[:-1]).amax(0))


def lilliefors_level(samples: int) -> float:
    """5 % level of `ks_distance` for a normal law, ``(.910 - .21 / sqrt(n)) / sqrt(n)``.

    Estimator:
        Fitted to simulations of our own, 400,000 samples at n = 20, 50, 200, 200,000 at 400, 1000, 60,000 at
        4096, 20,000 at 16384: level times sqrt(n) is .8580, .8813, .8951, .8977, .9038, .9066, .9070 with
        standard errors below .001 (.002 and .003 for the last two). The fit is off by .6 % at 20 and by less
        than .25 % from 50 on. Lilliefors (1967) has .886, from 1000 samples, which is too small for large n:
        .0138 at n = 4096 in place of .0142.
    """
    check_count("samples", samples, 20)
    return (0.910 - 0.21 / math.sqrt(samples)) / math.sqrt(samples)


def excess_kurtosis(samples: Tensor | Sequence[float]) -> tuple[Tensor, Tensor]:
    """mu_4 / mu_2^2 - 3 of each column, and its standard error.

    Estimator:
        Moments with 1/n. The error is the jackknife's, over leaving out one sample; for a normal law it tends
        to sqrt(24 / n). With heavy tails both are too small: a sample of n cannot show a kurtosis above n.
    """
    x = _columns(samples)
    z = x - x.mean(0)
    z = z / z.square().mean(0).sqrt()
    n = len(z)
    sums = [z.pow(k).sum(0) for k in (2, 3, 4)]
    one = -z / (n - 1)  # moments without each sample: the mean, then those about zero
    two, three, four = ((total - z.pow(k)) / (n - 1) for total, k in zip(sums, (2, 3, 4), strict=True))
    central = four - 4 * one * three + 6 * one.square() * two - 3 * one.pow(4)
    without = central / (two - one.square()).square()
    errors = ((n - 1) / n * (without - without.mean(0)).square().sum(0)).sqrt()
    return sums[2] / n - 3, errors


def berry_esseen(values: Sequence[float], rates: Rates) -> tuple[float, float]:
    """R_3 of ``sum a_l (delta_l - p_l)``, and the bound .56 R_3 of its distance to a normal law.

    ``R_3 = sum |a|^3 p (1 - p) (1 - 2 p (1 - p)) / (sum a^2 p (1 - p))^(3/2)``, without units. The bound is
    of the Kolmogorov-Smirnov distance to the normal law of the true mean and variance.

    Args:
        values: a_l, what block l adds where it is kept; for ``scale="train"`` over p_l.
        rates: p_l.

    Estimator:
        Exact for sums that are linear in the masks; the bound holds with a wide margin.

    References:
        Derived, D15; the constant of the Berry-Esseen theorem is Shevtsova's (2010).

    Examples:
        >>> ratio, bound = berry_esseen([1.0] * 100, [0.5] * 100)
        >>> round(ratio, 12)
        0.1
    """
    ps = checked_rates(rates)
    if len(values) != len(ps):
        raise UsageError(f"values must have one entry for each of the {len(ps)} rates, got {len(values)}")
    gates = [(abs(float(a)), p * (1 - p)) for a, p in zip(values, ps, strict=True)]
    variance = sum(a * a * v for a, v in gates)
    if not 0 < variance < math.inf:
        raise UsageError("the sum does not vary: some value must be other than 0 at a rate below 1")
    ratio = sum(a**3 * v * (1 - 2 * v) for a, v in gates) / variance**1.5
    return ratio, 0.56 * ratio


def noise_covariance(discrepancies: Tensor, rates: Rates, *, scale: str = "eval") -> Tensor:
    """Sigma(x) = sum p (1 - p) zeta zeta^T; for ``scale="train"`` with (1 - p) / p.

    Args:
        discrepancies: zeta, [L, units]: the full network's values minus those without block l.
        rates: p_l, one for each block.
        scale: "eval" or "train".

    Estimator:
        First order in the blocks: a lower bound of the covariance where zeta is Hoeffding's difference (D2),
        an approximation with leave-one-out differences.

    References:
        Derived, D16 and D6.
    """
    ps = checked_rates(rates)
    if discrepancies.dim() != 2 or len(discrepancies) != len(ps):
        raise UsageError(f"discrepancies must have shape [{len(ps)}, units], got {list(discrepancies.shape)}")
    variances = [second - first * first for first, second in (gate_moments(p, scale) for p in ps)]
    return discrepancies.T @ (discrepancies * discrepancies.new_tensor(variances)[:, None])


def _columns(samples: Tensor | Sequence[float]) -> Tensor:
    x = torch.as_tensor(samples).detach().double().cpu()
    x = x[:, None] if x.dim() == 1 else x
    if x.dim() != 2 or x.shape[1] == 0:
        raise UsageError(f"samples must have shape [masks] or [masks, units], got {list(x.shape)}")
    if len(x) < 20:
        raise UsageError(f"samples must be at least 20 to compare with a law, got {len(x)}")
    if not bool(x.isfinite().all()):
        raise UsageError("samples must be finite: the network overflows on some masks")
    still = (x == x[0]).all(0).nonzero().flatten().tolist()
    if still:
        raise UsageError(f"unit {still[0]} does not vary over the samples ({x[0, still[0]]:.6g})")
    return x


def _standardised(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / x.std(0)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

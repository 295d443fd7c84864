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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fallow import rates as rules
from fallow.errors import SiteError, UsageError, check_choice, check_count, nearest
from fallow.explaining import growth
from fallow.feed import rows_of
from fallow.surgery.branch import BranchState, Run
from fallow.surgery.handle import handle_of
from fallow.surgery.tap import Taps, gated, tapped


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


def berry_esseen(
    values: Sequence[float], rates: Sequence[float] | Mapping[str, float]
) -> tuple[float, float]:
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
    ps = growth._rates(rates)
    if len(values) != len(ps):
        raise UsageError(f"values must have one entry for each of the {len(ps)} rates, got {len(values)}")
    gates = [(abs(float(a)), p * (1 - p)) for a, p in zip(values, ps, strict=True)]
    variance = sum(a * a * v for a, v in gates)
    if not 0 < variance < math.inf:
        raise UsageError("the sum does not vary: some value must be other than 0 at a rate below 1")
    ratio = sum(a**3 * v * (1 - 2 * v) for a, v in gates) / variance**1.5
    return ratio, 0.56 * ratio


def noise_covariance(
    discrepancies: Tensor, rates: Sequence[float] | Mapping[str, float], *, scale: str = "eval"
) -> Tensor:
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
    ps = growth._rates(rates)
    if discrepancies.dim() != 2 or len(discrepancies) != len(ps):
        raise UsageError(f"discrepancies must have shape [{len(ps)}, units], got {list(discrepancies.shape)}")
    variances = [second - first * first for first, second in (growth.gate_moments(p, scale) for p in ps)]
    return discrepancies.T @ (discrepancies * discrepancies.new_tensor(variances)[:, None])


def simulate_law(
    rates: Sequence[float] | Mapping[str, float],
    *,
    kind: str = "scaled",
    scale: str = "eval",
    gain: float = 2.0,
    width: int = 256,
    masks: int = 4096,
    units: int = 64,
    seed: int = 0,
) -> GaussianLimit:
    """The law of units of y_L over masks in a random network (`growth.simulate_growth`).

    One draw of weights and input; ``predicted`` is `growth.noise_variance` at the input's second moment, a
    mean over weights. Scaled nets come close to normal laws with depth, vanilla ones do not: at 5, 20 and 80
    blocks KS distances of .106, .015, .010 against .12, .13, .34 (4096 masks, where the 5 % level is .0142,
    rate 1/2, one draw of weights).

    Args:
        rates: survival rates, first block first.
        kind: "vanilla" or "scaled".
        scale: "eval" or "train".
        gain: sigma_w^2; 2 is He's.
        width: units of a layer.
        masks: independent gates, one row each.
        units: how many units of y_L to look at, the first ones.
        seed: of weights, input and masks. No global generator is read or moved.
    """
    theory = growth.noise_variance(rates, kind=kind, scale=scale, gain=gain)  # checks, and refuses BatchNorm
    check_count("units", units, 1)
    check_count("width", width, units)
    check_count("masks", masks, 20)
    ps = growth._rates(rates)
    generator = torch.Generator().manual_seed(seed)
    like = torch.empty((), dtype=torch.float64 if kind == "vanilla" else torch.float32)
    start = torch.randn(1, 1, width, generator=generator).to(like)
    weights = growth.toy_weights(len(ps), width, gain, generator, like)
    on = growth.draw_masks(ps, masks, generator)
    gates = on / (torch.tensor(ps) if scale == "train" else torch.ones(len(ps)))
    found = []
    with torch.no_grad():
        for part in gates.to(like).split(1024):
            sums, _ = growth.toy_forward(start.expand(len(part), -1, -1), part, weights, kind)
            found.append(sums[-1][:, 0, :units])
    deviation = math.sqrt(theory.noise * float(start.square().mean()))
    return gaussian_limit(torch.cat(found), predicted=[deviation] * units)


def law_over_masks(
    model: nn.Module,
    inputs: Any,
    *,
    site: str | None = None,
    units: int | Sequence[int] = 8,
    rates: Any = None,
    scale: str | None = None,
    masks: int = 4096,
    rows: int = 256,
    granularity: str = "branch",
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    seed: int = 0,
) -> GaussianLimit:
    """The law over masks of what one input gives in a model, at its output or at a site's sum.

    The first row of ``inputs`` is repeated, each copy with its own mask. The model is in eval mode (BatchNorm
    with its running statistics) and is left as it was. ``predicted`` is the deviation of Sigma(x) from
    leave-one-out differences of the full network (`noise_covariance`), one more forward.

    Args:
        model: any module with residual branches.
        inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        site: whose residual sum to look at (with several branches the last one's); None: the output, its
            first floating tensor.
        units: how many numbers of a row to look at, evenly spaced, or which.
        rates: a rule, a mapping or a plan; None: as the model was applied, else ``rates.linear(last=0.5)``.
        scale: "train" or "eval"; None: as the model was applied, else "train".
        masks: how many, independent gates.
        rows: of a forward.
        granularity: as in `fallow.sites`.
        include: as in `fallow.sites`.
        exclude: as in `fallow.sites`.
        seed: of the masks. No global generator is read or moved.

    Raises:
        SiteError: no site; an unknown one; one with rates below 1 whose rows cannot be told apart.
        UsageError: no rows; no numbers by row; numbers that do not vary over the masks.
    """
    check_count("law_over_masks: masks", masks, 20)
    check_count("law_over_masks: rows", rows, 1)
    handle = handle_of(model)
    scale = scale if scale is not None else handle.options.scale if handle is not None else "train"
    check_choice("law_over_masks: scale", scale, growth.SCALES)
    if rows_of(inputs) == 0:
        raise UsageError("law_over_masks: inputs have no rows: pass at least one")
    with tapped(
        model, inputs, granularity=granularity, include=include, exclude=exclude
    ) as taps, torch.no_grad():  # fmt: skip
        costs = taps.costs
        if rates is None:
            rates = {n: handle.rates[n] for n in costs} if handle is not None else rules.linear(last=0.5)
        asked = {n: p for n, p in rules.resolve(rates, costs).items() if p < 1}
        if not asked:
            raise UsageError("law_over_masks: every rate is 1, so nothing varies over masks")
        read = _reader(taps, inputs, asked, site, units)
        generator = torch.Generator().manual_seed(seed)
        on = growth.draw_masks(list(asked.values()), masks, generator)
        divisor = torch.tensor(list(asked.values()) if scale == "train" else [1.0] * len(asked))
        samples = torch.cat([read(part) for part in (on / divisor).split(rows)])
        _check_varies(samples, site or "the output")
        full = read(torch.cat([torch.ones(1, len(asked)), 1 - torch.eye(len(asked))]))
    zeta = (full[:1] - full[1:]).double()
    return gaussian_limit(samples, predicted=noise_covariance(zeta, asked, scale=scale).diagonal().sqrt())


def _reader(
    taps: Taps, inputs: Any, rates: Mapping[str, float], site: str | None, units: int | Sequence[int]
) -> Callable[[Tensor], Tensor]:
    """A function from gates [rows, sites] to the values looked at, [rows, units]."""
    if site is not None and site not in taps.costs:
        close = nearest(site, taps.costs)
        raise SiteError(f"{site} is no site of this model" + (f"; did you mean {close}?" if close else ""))
    for branch in taps.branches:
        if branch.dim is None and branch.site in rates:
            raise SiteError(f"{branch.name}: its rows cannot be told apart: leave it out with exclude=")
    last = next((b.name for b in reversed(taps.branches) if b.site == site), None)
    batch, order = rows_of(inputs), list(rates)

    def read(gates: Tensor) -> Tensor:
        count, seen = len(gates), []

        def repeat(leaf: Any) -> Any:
            by_row = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == batch
            return leaf[:1].expand(count, *leaf.shape[1:]).contiguous() if by_row else leaf

        def watch(run: Run, shortcut: Tensor, value: Tensor | None, out: Tensor) -> None:
            seen.append(out.detach().movedim(run.dim, 0).flatten(1).clone())

        def decide(branch: BranchState) -> Run | None:
            run = None
            if branch.site in rates:
                run = gated(branch, gates[:, order.index(branch.site)].to(_device(taps.model)))
            if branch.name == last:
                run = run if run is not None else Run(branch, 1.0, None, False)
                run.watch = watch
            return run

        output = taps.forward(tree_map(repeat, inputs), decide)
        if site is None:
            seen += [t.flatten(1) for t in tree_leaves(output) if _by_row(t, count)][:1]
        if not seen:
            raise UsageError(
                f"law_over_masks: {site or 'the output'} has no floating tensor with one row a mask"
            )
        return _chosen(seen[-1], units).cpu()

    return read


def _check_varies(samples: Tensor, where: str) -> None:
    """Refuse a law of nothing but rounding."""
    rounding = 32 * torch.finfo(samples.dtype).eps * samples.abs().amax(0)
    if bool((samples.amax(0) - samples.amin(0) <= rounding).all()):
        raise UsageError(
            f"law_over_masks: no mask changes {where} by more than rounding: the sites with a rate below 1 "
            "lie behind it, or their branches give nothing (a last layer or layer scale still near zero?)"
        )


def _by_row(leaf: Any, rows: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 1 and leaf.shape[0] == rows


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _chosen(values: Tensor, units: int | Sequence[int]) -> Tensor:
    width = values.shape[1]
    if isinstance(units, int):
        check_count("units", units, 1)
        count = min(units, width)
        return values[:, [i * width // count for i in range(count)]]
    if not units or not all(isinstance(u, int) and 0 <= u < width for u in units):
        raise UsageError(f"units must be numbers from 0 to {width - 1}, at least one, got {units!r}")
    return values[:, list(units)]


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

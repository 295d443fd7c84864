"""Growth of signals and gradients measured in random networks, beside what theory says of them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fallow.errors import UsageError, check_count
from fallow.explaining._growth_common import Rates, power, slopes, strength
from fallow.explaining.growth import GrowthTheory, growth_theory
from fallow.explaining.random_networks import draw_masks, toy_forward, toy_weights


@dataclass(frozen=True)
class Simulated:
    """Growth measured in one direction; to be read beside `Growth`.

    Attributes:
        factors: by block, the mean over weights and masks of the ratio of second moments.
        errors: their standard errors, from the spread between draws of the weights.
        log2_mean: log2 of the mean over weights and masks of the growth over all blocks.
        mean_error: relative standard error of that mean; it is too small where rare masks carry the mean.
        log2_median: log2 of the median of that growth.
        log2_spread: standard deviation over masks of its log2, within a draw of the weights.
        slope: of its log2 on the log2 that theory gives each mask (`quenched_growth`), within a draw of the
            weights; for ``scale="eval"``, He's gain and no scaling that is on the number of kept blocks. 1
            where theory holds, None where the masks do not differ.
        profile: by layer 0..L, log2 of the mean second moment relative to where the signal starts.
    """

    factors: tuple[float, ...]
    errors: tuple[float, ...]
    log2_mean: float
    mean_error: float
    log2_median: float
    log2_spread: float
    slope: float | None
    profile: tuple[float, ...]


@dataclass(frozen=True)
class SimulatedGrowth:
    """Theory and simulation side by side; made by `simulate_growth`.

    Attributes:
        theory: what theory says.
        forward: E y_l^2, measured.
        backward: |dloss/dy_l|^2 by backpropagation, measured.
        weights: by block, E |dloss/dW_l|_F^2 in the units of `weight_profile`.
        weight_errors: their standard errors.
        settings: width, draws, masks, rows and seed.
    """

    theory: GrowthTheory
    forward: Simulated
    backward: Simulated
    weights: tuple[float, ...]
    weight_errors: tuple[float, ...]
    settings: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """A table; of deep networks some of the blocks."""
        t, f, b = self.theory, self.forward, self.backward
        depth = len(t.rates)
        said = ", ".join(f"{k} {v}" for k, v in self.settings.items())
        lines = [f"{t.kind}, {depth} blocks, scale={t.scale!r}, {t.sampler} masks; {said}"]
        lines.append("block  rate    backward: theory  simulation       forward: theory  simulation")
        step = max(1, math.ceil((depth - 1) / 10))
        for i in sorted({*range(0, depth, step), depth - 1}):
            cells = [
                f"{one.factors[i]:8.4f}  {two.factors[i]:.4f} ± {two.errors[i]:.4f}"
                for one, two in ((t.backward, b), (t.forward, f))
            ]
            lines.append(f"{i + 1:>5}  {t.rates[i]:.4f}          {cells[0]}        {cells[1]}")
        lines.append("in total              theory      simulation")
        for name, one, two in (("backward", t.backward, b), ("forward", t.forward, f)):
            error = f" ± {two.mean_error:.0%}"
            mean, typical = power(one.log2_mean), power(one.log2_typical)
            lines.append(f"{name + ' mean':<20}  {mean:<10}  {power(two.log2_mean)}{error}")
            lines.append(f"{name + ' typical':<20}  {typical:<10}  {power(two.log2_median)} (median)")
        if b.slope is not None:
            lines.append(f"slope of log2 growth on theory's, mask by mask: {b.slope:.3f} backward")
        return "\n".join(lines)


def simulate_growth(
    rates: Rates,
    *,
    kind: str = "vanilla",
    scale: str = "eval",
    sampler: str = "bernoulli",
    gain: float = 2.0,
    width: int = 256,
    draws: int = 8,
    masks: int = 256,
    rows: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> SimulatedGrowth:
    """Measure the growth of second moments in random networks, beside `growth_theory`.

    Each draw has its own weights, input and gradient at the output; its masks share them. Without BatchNorm
    each mask is one row of a batch, so that thousands of masks are one forward and one backward pass (of
    autograd, with the same weights both ways). With BatchNorm each mask has ``rows`` rows, over which it
    normalises.

    Args:
        rates: survival rates, first block first.
        kind: as in `growth_theory`.
        scale: as in `growth_theory`.
        sampler: as in `growth_theory`.
        gain: as in `growth_theory`.
        width: units of a layer. Finite width adds to the mean of a deep vanilla net: at depth 30 about a
            quarter at width 64, and little at 512.
        draws: of the weights, at least 2, for the standard errors.
        masks: for each draw of the weights.
        rows: of a batch with BatchNorm; 64 there. Without BatchNorm rows do not meet, and it must be 1.
        seed: of weights, inputs and masks. No global generator is read or moved.
        device: where to compute.

    Estimator:
        Per-layer factors are means of per-mask ratios and converge fast. The mean of the whole growth does
        not: in the vanilla net its second moment relative to its square is ``((1 + 3p) / (1 + p)^2)^L``, 194
        at L=50, p=.5. Compare medians there.
    """
    theory = growth_theory(rates, kind=kind, scale=scale, sampler=sampler, gain=gain)
    check_count("width", width, 2)
    check_count("draws", draws, 2)
    check_count("masks", masks, 1)
    rows = _simulated_rows(rows, kind)
    generator = torch.Generator().manual_seed(seed)
    h = strength(kind, len(theory.rates), gain)
    found = [_one_draw(theory, width, masks, rows, generator, torch.device(device)) for _ in range(draws)]
    gates, forward, backward, weights = (torch.stack(part) for part in zip(*found, strict=True))
    both = slopes(kind)
    by_draw = weights.mean(1)
    return SimulatedGrowth(
        theory,
        _simulated(forward, _quenched(gates, h, both[0])),
        _simulated(backward.flip(-1), _quenched(gates, h, both[1]), reverse=True),
        tuple(by_draw.mean(0).tolist()),
        tuple((by_draw.std(0) / math.sqrt(draws)).tolist()),
        {"width": width, "draws": draws, "masks": masks, "rows": rows, "seed": seed},
    )


def _simulated_rows(rows: int | None, kind: str) -> int:
    if kind != "batchnorm":
        if rows not in (None, 1):
            raise UsageError(f"rows must be 1 without BatchNorm, got {rows!r}: ask for more masks or draws")
        return 1
    return check_count("rows", 64 if rows is None else rows, 2)


def _one_draw(
    theory: GrowthTheory, width: int, masks: int, rows: int, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Squared gates and squared norms, by mask, of one network.

    Gates [masks, L]; sums and their gradients [masks, L + 1]; gradients of the weights [masks, L].
    """
    ps, eval_scale = torch.tensor(theory.rates, dtype=torch.float64), theory.scale == "eval"
    squares = ps.new_ones(len(ps)) if eval_scale else ps.pow(-2)
    h = strength(theory.kind, len(ps), theory.gain)
    largest = float((1 + h * squares).log2().sum())
    like = torch.empty((), dtype=torch.float64 if largest > 60 else torch.float32, device=device)
    start = torch.randn(1, rows, width, generator=generator).to(like)
    end = torch.randn(1, rows, width, generator=generator).to(like)
    weights = toy_weights(len(ps), width, theory.gain, generator, like)
    on = draw_masks(theory.rates, masks, generator, theory.sampler)
    gates = on * squares.sqrt()
    at_once = max(1, (1 << 22) // (rows * width * max(1, len(ps) // 8)))  # bounds the memory of the graph
    parts = [_norms(start, end, part.to(like), weights, theory.kind) for part in gates.split(at_once)]
    forward, backward, by_weight = (torch.cat(part).double().cpu() for part in zip(*parts, strict=True))
    s2 = h / theory.gain * 2
    unit = (forward[:, :1] / rows) * backward[:, -1:]
    return gates.square(), forward, backward, s2 * gates.square() * by_weight / unit


def _norms(
    start: Tensor, end: Tensor, gates: Tensor, weights: list[Tensor], kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    first = start.expand(len(gates), -1, -1).clone().requires_grad_()
    with torch.enable_grad():
        sums, inputs = toy_forward(first, gates, weights, kind)
        grads = torch.autograd.grad((sums[-1] * end).sum(), sums)
    with torch.no_grad():
        # |sum over rows of b_i x_i^T|^2 by the inner products of rows: no matrix of the weights' size a mask
        by_weight = [
            ((b @ b.transpose(1, 2)) * (x @ x.transpose(1, 2))).sum((1, 2))
            for b, x in zip(grads[1:], inputs, strict=True)
        ]
        squared = [torch.stack([t.double().square().sum((1, 2)) for t in side], 1) for side in (sums, grads)]
        return squared[0], squared[1], torch.stack(by_weight, 1)


def _quenched(squares: Tensor, h: float, slope: float) -> Tensor:
    """log2 of theory's growth of each mask, from squared gates [..., L]."""
    divisor = 1 + slope * h * (squares.cumsum(-1) - squares)
    return (1 + h * squares / divisor).log2().sum(-1)


def _simulated(moments: Tensor, quenched: Tensor, reverse: bool = False) -> Simulated:
    """Statistics of squared norms [draws, masks, L + 1], in the order of the signal."""
    draws = len(moments)
    ratios = (moments[..., 1:] / moments[..., :-1]).mean(1)
    whole = moments / moments[..., :1]
    logs = whole[..., -1].log2()
    means = whole.mean(1)
    mean = means.mean(0)
    centred, expected = logs - logs.mean(1, keepdim=True), quenched - quenched.mean(1, keepdim=True)
    varies = float(expected.square().sum())
    ordered = [t.flip(-1) if reverse else t for t in (ratios, mean)]
    return Simulated(
        factors=tuple(ordered[0].mean(0).tolist()),
        errors=tuple((ordered[0].std(0) / math.sqrt(draws)).tolist()),
        log2_mean=float(mean[-1].log2()),
        mean_error=float(means[:, -1].std() / math.sqrt(draws) / mean[-1]),
        log2_median=float(logs.median()),
        log2_spread=float(centred.square().mean().sqrt()),
        slope=float((centred * expected).sum()) / varies if varies > 1e-9 else None,
        profile=tuple(ordered[1].log2().tolist()),
    )

"""The law of a pre-activation over masks, in random networks and in a user's model.

Its theory and its statistics are those of `fallow.explaining.gaussian`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fallow import rates as rules
from fallow.errors import SiteError, UsageError, check_choice, check_count, nearest
from fallow.explaining._growth_common import SCALES, Rates, checked_rates
from fallow.explaining.gaussian import GaussianLimit, gaussian_limit, noise_covariance
from fallow.explaining.output_noise import noise_variance
from fallow.explaining.random_networks import draw_masks, toy_forward, toy_weights
from fallow.feed import rows_of
from fallow.surgery.branch import BranchState, Run
from fallow.surgery.handle import handle_of
from fallow.surgery.tap import Taps, gated, tapped


def simulate_law(
    rates: Rates,
    *,
    kind: str = "scaled",
    scale: str = "eval",
    gain: float = 2.0,
    width: int = 256,
    masks: int = 4096,
    units: int = 64,
    seed: int = 0,
) -> GaussianLimit:
    """The law of units of y_L over masks in a random network (`simulate_growth`).

    One draw of weights and input; ``predicted`` is `noise_variance` at the input's second moment, a
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
    theory = noise_variance(rates, kind=kind, scale=scale, gain=gain)  # checks, and refuses BatchNorm
    check_count("units", units, 1)
    check_count("width", width, units)
    check_count("masks", masks, 20)
    ps = checked_rates(rates)
    generator = torch.Generator().manual_seed(seed)
    like = torch.empty((), dtype=torch.float64 if kind == "vanilla" else torch.float32)
    start = torch.randn(1, 1, width, generator=generator).to(like)
    weights = toy_weights(len(ps), width, gain, generator, like)
    on = draw_masks(ps, masks, generator)
    gates = on / (torch.tensor(ps) if scale == "train" else torch.ones(len(ps)))
    found = []
    with torch.no_grad():
        for part in gates.to(like).split(1024):
            sums, _ = toy_forward(start.expand(len(part), -1, -1), part, weights, kind)
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
    check_choice("law_over_masks: scale", scale, SCALES)
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
        on = draw_masks(list(asked.values()), masks, generator)
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

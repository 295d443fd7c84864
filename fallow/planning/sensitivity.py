"""Sensitivities: how much the loss depends on each site's branch.

A gate that multiplies a branch's output has a gradient: with y_l the residual sum of site l, f_l the branch's
output and loss_i the loss of sample i, the gate gradient of sample i is

    s_li = <d loss_i / d y_l, f_li>

and one forward and one backward pass give it for every site and sample at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fallow import masks
from fallow.errors import SiteError, check_choice, check_count, check_rate
from fallow.feed import LossFunction, Pair, loss_of, pairs, rows_of
from fallow.surgery.branch import BranchState, Run
from fallow.surgery.decide import check_seed
from fallow.surgery.tap import Taps, gated, inputs_only, seed_of_graph, tapped

REDUCTIONS = ("absolute", "signed", "leave_one_out", "masked")


@dataclass(frozen=True)
class Sensitivities(Mapping[str, float]):
    """Sensitivity by site, in site order.

    Attributes:
        table: S_l by site, at least 0; the mapping itself.
        errors: standard errors over the samples (for leave_one_out over the batches; NaN for one).
        samples: samples they were measured on.
        reduction: how per-sample values became one.
        silent: sites whose branch gave exact zeros, so that nothing about them is known.
    """

    table: dict[str, float]
    errors: dict[str, float]
    samples: int
    reduction: str
    silent: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> float:
        return self.table[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)


def sensitivities(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Iterable[Any],
    *,
    reduction: str = "absolute",
    survival_rate: float = 0.75,
    draws: int = 8,
    granularity: str = "branch",
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    max_batches: int = 8,
    seed: int = 0,
) -> Sensitivities:
    """Measure the sensitivity of the loss to each site, the model in eval mode and left as it was.

    Formula, with s_li the gate gradient of sample i (head of this file), n samples:
        "absolute": ``1/n sum_i |s_li|`` at the full network;
        "signed": ``|1/n sum_i s_li|``, which cancels after training;
        "masked": ``|mean s_li|`` over samples and masks drawn at ``survival_rate``, where the site runs: an
        estimate of ``|dF/dp_l|`` of the expected loss F;
        "leave_one_out": mean over batches of ``|loss without site l - loss|``, the slow reference.

    The loss is taken for a mean over samples; of a sum, all sensitivities are larger by the same factor.

    Args:
        model: any model with residual branches; a handle on it is respected and disturbed by nothing.
        loss_fn: ``loss_fn(output, target)``, one number.
        batches: ``(inputs, target)`` pairs, or dicts that go to ``loss_fn(output, batch)`` whole.
        reduction: as above.
        survival_rate: of every site, for "masked" alone.
        draws: masks per batch, for "masked" alone.
        granularity: as in `fallow.sites`.
        include: as in `fallow.sites`.
        exclude: as in `fallow.sites`.
        max_batches: batches taken at most.
        seed: of the masks, for "masked" alone.

    Raises:
        SiteError: the gradient does not reach a site, by name; a model without sites.
        RunError: the loss is not finite.
        UsageError: no batch, an empty batch, a loss that is not one number.

    Estimator:
        Exact on the samples given for all but "masked" (random masks). As an estimate of what leaving the
        block out does: first order; "absolute" ranks blocks as the mean absolute leave-one-out change does
        (Spearman .96 to .99 in our trials), "signed" does not after training.
        One forward and one backward through the activations, whatever the number of sites; leave_one_out
        takes a forward for each site and one more.

    References:
        Derived, D22 and D23; by analogy with Hayou & Ayed's "pre-activation sensitivity" (2021).
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_rate(survival_rate)
    check_count("draws", draws, 1)
    check_seed(seed)
    found = pairs(model, batches, max_batches, "sensitivities")
    with tapped(model, found[0][0], granularity=granularity, include=include, exclude=exclude) as taps:
        return measure(taps, loss_fn, found, reduction, survival_rate, draws, seed)


def measure(
    taps: Taps,
    loss_fn: LossFunction,
    batches: list[Pair],
    reduction: str = "absolute",
    survival_rate: float = 0.75,
    draws: int = 8,
    seed: int = 0,
) -> Sensitivities:
    """`sensitivities` of a model that is open for trials."""
    if reduction == "leave_one_out":
        return _left_out(taps, loss_fn, batches)
    silent: set[str] = {site.name for site in taps.sites}
    rows: dict[str, list[Tensor]] = {site.name: [] for site in taps.sites}
    for number, (inputs, target) in enumerate(batches):
        for draw in range(draws if reduction == "masked" else 1):
            gates = _gates(taps, survival_rate, seed, number * draws + draw) if reduction == "masked" else {}
            found, zero = gate_gradients(taps, loss_fn, inputs, target, gates)
            silent &= zero | {name for name, on in gates.items() if not on}
            for name, values in found.items():
                rows[name].append(values)
    samples = sum(rows_of(inputs) for inputs, _ in batches)
    values, errors = {}, {}
    for name, parts in rows.items():
        values[name], errors[name] = _reduced(torch.cat(parts) if parts else torch.zeros(0), reduction)
    return Sensitivities(values, errors, samples, reduction, tuple(n for n in values if n in silent))


def gate_gradients(
    taps: Taps,
    loss_fn: LossFunction,
    inputs: Any,
    target: Any,
    gates: Mapping[str, bool] | None = None,
) -> tuple[dict[str, Tensor], set[str]]:
    """Gate gradients of a batch by site and sample, in one forward and one backward.

    Shape:
        each tensor: one number a sample, float32 at least; the site's branches added up. A site whose batch
        dimension is not known has the batch's total as its one number.

    Args:
        taps: the model.
        loss_fn: one number, taken for a mean over the samples.
        inputs: of the batch.
        target: of the batch.
        gates: sites that rest (False); those have no gate gradient in the result.

    Returns:
        The gate gradients, and the sites whose branches gave nothing but zeros.

    Raises:
        SiteError: the gradient does not reach a site.
    """
    rested = {name for name, on in (gates or {}).items() if not on}
    waiting: dict[str, str] = {}
    found: dict[str, Tensor] = {}
    zero: set[str] = {b.site for b in taps.branches} - rested
    size = rows_of(inputs)

    def watch(run: Run, _shortcut: Tensor, value: Tensor | None, out: Tensor) -> None:
        assert value is not None
        kept, branch = value.detach(), run.branch

        def collect(grad: Tensor) -> None:
            products = row_products(grad.detach(), kept, branch.dim) * (size if branch.dim is not None else 1)
            found[branch.site] = found[branch.site] + products if branch.site in found else products
            if branch.site in zero and (bool(products.any()) or bool(kept.any())):
                zero.discard(branch.site)
            waiting.pop(branch.name, None)

        waiting[branch.name] = branch.site
        out.register_hook(collect)

    def start(run: Run, value: Tensor) -> Tensor:
        return value if value.requires_grad else value * seed_of_graph(value.device).to(value.dtype)

    def decide(branch: BranchState) -> Run:
        if branch.site in rested:
            return Run(branch, 0.0, None, True)
        return Run(branch, 1.0, None, False, gate=start, watch=watch)

    with inputs_only(taps.model), torch.enable_grad():
        output = taps.forward(inputs, decide)
        missing = {b.name: b.site for b in taps.branches if b.site not in rested and b.name not in waiting}
        loss = loss_of(loss_fn, output, target, "sensitivities")
        if loss.requires_grad:
            loss.backward()
    for name, site in {**missing, **waiting}.items():
        why = "it is not run" if name in missing else "its sum is detached, or the loss does not use it"
        raise SiteError(
            f"{name}: the gradient of the loss does not reach this site ({why}), so its sensitivity cannot "
            f'be known: leave it out with exclude="{site}", or let the loss use it'
        )
    return found, zero


def row_products(grad: Tensor, value: Tensor, dim: int | None) -> Tensor:
    """``<grad_i, value_i>`` for every row i along ``dim``; the sum over all as one number where that is None.

    One pass over both tensors, in their own memory layout.
    """
    if dim is None:
        return (grad * value).sum().reshape(1).float()
    order = [dim, *sorted((d for d in range(value.dim()) if d != dim), key=lambda d: -value.stride(d))]
    rows, length = value.shape[dim], value.numel() // max(value.shape[dim], 1)
    a = grad.permute(order).reshape(rows, 1, length)
    b = value.permute(order).reshape(rows, length, 1).to(a.dtype)
    product = torch.bmm(a, b).reshape(rows)
    return product if product.dtype == torch.float64 else product.float()


def _gates(taps: Taps, survival_rate: float, seed: int, draw: int) -> dict[str, bool]:
    names = [site.name for site in taps.sites]
    kept = masks.batch_bernoulli(
        [survival_rate] * len(names), [masks.site_key(n) for n in names], seed, draw, 0
    )
    return dict(zip(names, kept, strict=True))


def _reduced(rows: Tensor, reduction: str) -> tuple[float, float]:
    """A site's value and standard error from its gate gradients."""
    if not rows.numel():
        return 0.0, math.nan
    rows = rows.double()
    if reduction == "absolute":
        rows = rows.abs()
    error = float(rows.std() / math.sqrt(rows.numel())) if rows.numel() > 1 else math.nan
    return abs(float(rows.mean())), error


def _left_out(taps: Taps, loss_fn: LossFunction, batches: list[Pair]) -> Sensitivities:
    changes: dict[str, list[float]] = {site.name: [] for site in taps.sites}
    silent = {site.name for site in taps.sites}
    with torch.no_grad():
        for inputs, target in batches:
            full = loss_of(loss_fn, taps.forward(inputs), target, "sensitivities")
            for site in taps.sites:
                output = taps.forward(inputs, _without(site.name))
                change = float(loss_of(loss_fn, output, target, "sensitivities") - full)
                changes[site.name].append(abs(change))
                if change:
                    silent.discard(site.name)
    table = {
        name: _reduced(torch.tensor(values, dtype=torch.float64), "signed")
        for name, values in changes.items()
    }
    samples = sum(rows_of(inputs) for inputs, _ in batches)
    values, errors = {n: v for n, (v, _) in table.items()}, {n: e for n, (_, e) in table.items()}
    return Sensitivities(values, errors, samples, "leave_one_out", tuple(n for n in values if n in silent))


def _without(name: str) -> Callable[[BranchState], Run | None]:
    return lambda branch: gated(branch, 0.0 if branch.site == name else 1.0)

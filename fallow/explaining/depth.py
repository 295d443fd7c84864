"""What stochastic depth penalises, and how much: the exact regulariser beside its second-order forms.

With Y the output under random masks, training minimises

    E loss(Y)  =  loss(E Y)  +  R,        R = E D(Y, E Y),

D the Bregman divergence of the loss: for cross-entropy KL(softmax(E Y) || softmax(Y)), for a squared error
the variance (derived, D1: exact for every rate and loss). R is what a second-order sum over single sites
stands for; whether it does, a Monte Carlo estimate of R beside it tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from fallow import rates as rules
from fallow.errors import ArgumentError, UsageError, check_choice, check_count
from fallow.explaining._batch import Effort, Measured, Trial, on_trial
from fallow.explaining._noise import Noise
from fallow.explaining._outputs import OutputLoss
from fallow.explaining._result import Explanation, of_head
from fallow.explaining._summary import summary
from fallow.explaining.head import head_beside
from fallow.feed import LossFunction, pairs
from fallow.penalties import HeadPenalty
from fallow.schemes import Scheme
from fallow.surgery import handle_of, probe
from fallow.surgery.decide import check_seed
from fallow.surgery.survey import matches, patterns
from fallow.surgery.tap import Taps, tapped

Rates = Callable[[Mapping[str, float]], Mapping[str, float]] | Mapping[str, float]


def explain(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Iterable[Any],
    *,
    rates: Rates | None = None,
    scale: str | None = None,
    mode: str | None = None,
    draws: int = 64,
    site_draws: int = 4,
    label_draws: int = 64,
    granularity: str = "branch",
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    head: str | HeadPenalty | None = None,
    scheme: Scheme | None = None,
    max_batches: int = 4,
    seed: int = 0,
) -> Explanation:
    """Measure the penalty that stochastic depth adds to a loss, in all and site by site.

    Where noise stands in front of the last linear layer, or ``head`` or ``scheme`` says so, its penalty is
    below, measured on its own (`explain_head`); a model without rates and handle has that part alone.

    The model is tried in eval mode (BatchNorm by its running statistics, the model's own dropout off) and
    left as it was. Masks are a function of the seed; no global random number generator is moved.

    Formula: R = E loss(Y) - loss(E Y). For site l with survival rate p, gate variance w = p (1 - p)
    (``scale="eval"``) or (1 - p)/p ("train"), y(1) the full network's output, y(1_l) that without site l,
    zeta = y(1) - y(1_l) and H the Hessian of the loss over the output:

    - hessian: w/2 zeta' H zeta, H at the mean output.
    - bregman: w D(y(1_l), y(1)), for cross-entropy w KL(softmax(y(1)) || softmax(y(1_l))).
    - linearised: w/2 J' H J, J the derivative of y(1) by the site's gate, one gate a sample.
    - alone: p loss(on) + (1 - p) loss(off) - loss(p on + (1 - p) off), all other sites kept.
    - monte_carlo: the mean of the same with all other sites drawn at random.

    Estimator:
        R: jackknife over the draws, with what single sites give alone as control variate; unbiased for a
        squared error, else biased by O(1/draws^2). Standard errors are over the masks, given the samples.
        bregman: error O((1 - p)^2) for any loss; hessian: the same for a squared error only (D3 to D6). For
        a squared error (any quadratic loss) the sum of monte_carlo is at least R (Efron and Stein).
        linearised: exact sums over classes or outputs where there are no more than ``label_draws`` and one
        position a sample, else labels drawn (D23).

    Cost: about ``draws + L (1 + site_draws)`` forwards of each batch, L the sites whose rate is below 1, and
    ``label_draws`` backwards at most.

    Args:
        model: any module with residual branches.
        loss_fn: ``loss_fn(output, target)``, one number, computed from the output's tensors.
        batches: (inputs, target) pairs; a dict without a target goes whole to both. Losses of batches are
            averaged, weighted by their samples.
        rates: a rule, a mapping or a plan; None: the rates in force in the model's handle.
        scale: "train" or "eval"; None: the handle's, else "train".
        mode: "row": a mask for each sample; "batch": one for each batch, as for losses that couple samples;
            None: "row" where batch dimensions are known.
        draws: masks of all sites.
        site_draws: masks of the others for each site; 0: without that form.
        label_draws: labels drawn for the linearised form; 0: without it.
        granularity: as in `fallow.sites`.
        include: as in `fallow.sites`; other sites are kept throughout.
        exclude: as in `fallow.sites`.
        head: name of the last linear layer, or its `HeadPenalty`; None: found, if noise feeds it and its
            outputs are not very many.
        scheme: law of the masks in front of it (`fallow.schemes`); None: that of the noise found there.
        max_batches: how many batches to take at most.
        seed: of masks and labels.

    Raises:
        UsageError: no rates, no handle and no noisy head; no batch; a loss that is no scalar or does not
            depend on the output; an output without floating tensors, or too large to keep.
        RunError: the loss is not finite; the output changes its form.
        SiteError: the model has no site; the loss's gradient does not reach one.
        RateError: a rate outside (0, 1].

    References:
        Hayou, Ayed: Regularization in ResNet with Stochastic Depth (2021), for the idea of the penalty; the
        statements D1 to D7 and D23 are derived.
    """
    effort = _effort(draws, site_draws, label_draws)
    if mode is not None:
        check_choice("explain: mode", mode, ("row", "batch"))
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_seed(seed)
    found = pairs(model, batches, max_batches, "explain")
    part = head_beside(model, loss_fn, found, head, scheme, draws, seed)
    if part is not None and rates is None and handle_of(model) is None:
        return of_head(part)
    rates, scale = _noise_of(model, rates, scale)
    chosen = {"granularity": granularity, "include": patterns(include), "exclude": patterns(exclude)}
    with torch.inference_mode(False), tapped(model, found[0][0], **chosen) as taps:
        asked = rules.resolve(_within(rates, chosen, taps), taps.costs)
        losses = on_trial(taps, loss_fn, found[0])
        generator = torch.Generator(device=losses.full[0].device).manual_seed(seed & (2**63 - 1))
        dims = _batch_dims(taps, found[0][0], losses)
        noise = Noise(asked, scale, _mode(mode, taps, dims), seed)
        trial = Trial(taps, noise, effort, generator)
        measured: list[Measured] = []
        for number, (inputs, target) in enumerate(found):
            if number:
                losses = on_trial(taps, loss_fn, (inputs, target))
            first = sum(m.rows for m in measured)
            measured.append(trial.measure(losses, inputs, dims, first, number))
    return replace(summary(noise, effort, measured), head=part)


def _effort(draws: int, site_draws: int, label_draws: int) -> Effort:
    check_count("explain: draws", draws, 2)
    for name, value in (("site_draws", site_draws), ("label_draws", label_draws)):
        if check_count(f"explain: {name}", value) == 1:
            raise UsageError(f"explain: {name} must be 0 (leave it out) or at least 2, got 1")
    if site_draws > draws:
        raise UsageError(f"explain: site_draws must be at most draws = {draws}, got {site_draws}")
    return Effort(draws, site_draws, label_draws)


def _noise_of(model: nn.Module, rates: Rates | None, scale: str | None) -> tuple[Rates, str]:
    handle = handle_of(model)
    if scale is not None:
        check_choice("explain: scale", scale, ("train", "eval"))
    if rates is None and handle is None:
        raise UsageError(
            "explain: this model has no handle to take survival rates from: pass rates= (a rule such as "
            "fallow.rates.linear(last=0.5), a mapping or a plan), or explain a model that fallow.apply was "
            "called on; nor is there noise in front of its last linear layer: pass scheme= for that"
        )
    given = scale or (handle.options.scale if handle is not None else "train")
    return (handle.current_rates if rates is None and handle is not None else rates), given  # type: ignore


def _within(rates: Rates, chosen: Mapping[str, Any], taps: Taps) -> Rates:
    """A mapping without the sites that ``include`` and ``exclude`` leave out."""
    if not isinstance(rates, Mapping):
        return rates
    include, exclude = chosen["include"], chosen["exclude"]
    return {name: p for name, p in rates.items() if matches(str(name), include, exclude)}


def _batch_dims(taps: Taps, inputs: Any, loss: OutputLoss) -> list[int | None]:
    """Which dimension of each tensor of a point is the batch: the one that follows the number of rows."""
    args, kwargs = probe.arguments(inputs)
    shapes = []
    for rows in probe.ROWS:
        tiled_args, tiled = probe.tiled(args, kwargs, rows)
        with torch.no_grad():
            leaves = tree_leaves(taps.forward(tiled or tiled_args))
        shapes.append([tuple(leaves[i].shape) for i in loss.used])
    return [_batch_dim(a, b) for a, b in zip(*shapes, strict=True)]


def _batch_dim(a: tuple[int, ...], b: tuple[int, ...]) -> int | None:
    differ = [i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]]
    if len(a) != len(b) or len(differ) != 1 or (a[differ[0]], b[differ[0]]) != probe.ROWS:
        return None
    return differ[0]


def _mode(asked: str | None, taps: Taps, dims: list[int | None]) -> str:
    unknown = [b.name for b in taps.branches if b.dim is None]
    if not unknown and None not in dims:
        return asked or "row"
    if asked == "row":
        what = f"the sum of {unknown[0]}" if unknown else "the model's output"
        raise UsageError(
            f'explain: mode="row" needs a batch dimension, and {what} has none: take mode="batch"'
        )
    return "batch"

"""Growth of signals and gradients in a user's model, without the noise and with it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from fallow import rates as rules
from fallow.errors import UsageError, check_choice, check_count
from fallow.explaining._growth_common import SCALES
from fallow.explaining._signal_recorder import Masks, Recorder
from fallow.feed import LossFunction, pairs, rows_of
from fallow.surgery.handle import handle_of
from fallow.surgery.tap import tapped

SHALLOW = 8  # below this number of sites `signal_growth` warns; the number is ours

_UNSCALED = 1.2  # growth per block from which the last blocks count as neither normalised nor scaled down


@dataclass(frozen=True)
class Measured:
    """Growth in one direction, without the noise and with it.

    Attributes:
        dense: by branch, second moment behind its sum (as the signal goes) relative to the one before it;
            None for gradients at the first branch where its shortcut has none, or is overwritten by the
            sum and is not what the branch is entered with.
        noisy: the same with the noise: a ratio of means over masks.
        errors: standard errors of ``noisy`` over the draws (jackknife).
        dense_total: from the first shortcut to the last sum, or back.
        noisy_total: the same with the noise.
        total_error: standard error of ``noisy_total``; too small where rare masks carry the mean.
        log_excess: mean over draws of ln(total growth with noise / without).
        excess_error: its standard error.
    """

    dense: tuple[float | None, ...]
    noisy: tuple[float | None, ...]
    errors: tuple[float | None, ...]
    dense_total: float
    noisy_total: float
    total_error: float
    log_excess: float
    excess_error: float


@dataclass(frozen=True)
class SignalGrowth:
    """Growth of signals and gradients in a model; made by `signal_growth`.

    Attributes:
        branches: names, in the order they run.
        rates: survival rate of each branch's site.
        scale: of the gates.
        draws: of the masks.
        forward: mean square of an element of the residual sum.
        backward: squared norm of the loss gradient with respect to the residual sum.
        silent: branches that give exact zeros (a norm initialised at zero), where noise does nothing.
        warnings: in words, where they apply.
    """

    branches: tuple[str, ...]
    rates: tuple[float, ...]
    scale: str
    draws: int
    forward: Measured
    backward: Measured
    silent: tuple[str, ...]
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """A table."""
        wide = max(len(name) for name in (*self.branches, "branch"))
        sides = self.forward, self.backward
        lines = [f"second moments by branch, scale={self.scale!r}, {self.draws} draws of the masks"]
        lines.append(
            f"{'branch':<{wide}}  rate   forward: dense  with noise        backward: dense  with noise"
        )
        for i, name in enumerate(self.branches):
            cells = "          ".join(_cells(m.dense[i], m.noisy[i], m.errors[i]) for m in sides)
            lines.append(f"{name:<{wide}}  {self.rates[i]:.3f}        {cells}")
        cells = "          ".join(_cells(m.dense_total, m.noisy_total, m.total_error) for m in sides)
        lines.append(f"{'in total':<{wide}}               {cells}")
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings)])


def _cells(dense: float | None, noisy: float | None, error: float | None) -> str:
    if dense is None or noisy is None or error is None:
        return f"{'-':>8}  {'-':>8}         "
    return f"{dense:8.4g}  {noisy:8.4g} ± {error:<6.2g}"


def signal_growth(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Iterable[Any],
    *,
    rates: Any = None,
    scale: str | None = None,
    draws: int = 8,
    granularity: str = "branch",
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    max_batches: int = 2,
    seed: int = 0,
) -> SignalGrowth:
    """Measure how second moments of signals and gradients grow over a model's residual sums.

    Every branch is computed and multiplied by its gate, each row of a batch with its own mask (one mask for
    the batch where a branch's rows cannot be told apart). BatchNorm normalises by the batch's own statistics,
    as in training; the model's other modules run in eval mode. Afterwards the model is as it was.

    Forward, the mean square of an element of a sum; backward, the squared norm of the gradient of the loss
    with respect to it. Layers between two sums (a transition, a norm) are part of the factor of the later one
    (forward) or of the earlier one (backward): read the noise off the comparison with ``dense``.

    Args:
        model: any module with residual branches.
        loss_fn: ``loss_fn(output, target)``, one number.
        batches: (inputs, target) pairs or dicts, as in `fallow.plan`.
        rates: a rule, a mapping or a plan; None: as the model was applied, else ``rates.linear(last=0.5)``.
        scale: "train" or "eval"; None: as the model was applied, else "train".
        draws: of the masks on every batch, at least 2.
        granularity: as in `fallow.sites`.
        include: as in `fallow.sites`.
        exclude: as in `fallow.sites`.
        max_batches: how many batches to take.
        seed: of the masks. No global generator is read or moved.

    Estimator:
        Ratios of means over rows and draws. The mean over masks of a deep un-normalised network is carried by
        rare masks and comes out low with few draws.

    Raises:
        SiteError: no site, an unknown site, or one whose sum no gradient reaches, by name.
        RateError: a rate outside (0, 1].
        UsageError: no batches; too few rows for BatchNorm; a loss that is not one number.
        RunError: a loss that is not finite.
    """
    check_count("signal_growth: draws", draws, 2)
    data = pairs(model, batches, max_batches, "signal_growth")
    handle = handle_of(model)
    scale = scale if scale is not None else handle.options.scale if handle is not None else "train"
    check_choice("signal_growth: scale", scale, SCALES)
    with tapped(
        model, data[0][0], granularity=granularity, include=include, exclude=exclude
    ) as taps, torch.enable_grad():  # fmt: skip
        costs = taps.costs
        if rates is None:
            rates = {n: handle.rates[n] for n in costs} if handle is not None else rules.linear(last=0.5)
        asked = rules.resolve(rates, costs)
        _as_in_training(model, data)
        generator = torch.Generator().manual_seed(seed)
        dense = Recorder(taps, loss_fn).over(data, None)
        noisy = [Recorder(taps, loss_fn).over(data, Masks(asked, scale, generator)) for _ in range(draws)]
        names = tuple(b.name for b in taps.branches)
        by_branch = tuple(asked[b.site] for b in taps.branches)
    forward = _measured(dense.forward, [r.forward for r in noisy])
    backward = _measured(dense.backward[::-1], [r.backward[::-1] for r in noisy], reverse=True)
    whole = include is None and exclude is None  # else the model may have more sites than are counted here
    warnings = _warnings(len(costs) if whole else SHALLOW, by_branch, scale, forward, backward)
    silent = tuple(n for n in names if n not in dense.active)
    if silent:
        warnings = (_silence(silent), *warnings)
    return SignalGrowth(names, by_branch, scale, draws, forward, backward, silent, warnings)


def _as_in_training(model: nn.Module, data: list[Any]) -> None:
    """BatchNorm in training mode; its buffers are restored with the rest of the model."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if min(rows_of(inputs) for inputs, _ in data) < 2:
                raise UsageError(
                    f"signal_growth: {name} normalises over the batch: pass batches of at least 2 rows"
                )
            module.train()


def _measured(dense: list[float], noisy: list[list[float]], reverse: bool = False) -> Measured:
    """Ratios along the way of the signal, with jackknife errors over the draws."""
    end = len(dense) - 1
    while math.isnan(dense[end]):
        end -= 1
    pairs_ = [(i, i + 1) for i in range(len(dense) - 1)]
    rows = [(dense[j] / dense[i], *_ratio(noisy, i, j)) if j <= end else (None,) * 3 for i, j in pairs_]
    total, error = _ratio(noisy, 0, end)
    plain = dense[end] / dense[0]
    logs = [math.log(draw[end] / draw[0] / plain) for draw in noisy]
    mean = sum(logs) / len(logs)
    spread = math.sqrt(sum((x - mean) ** 2 for x in logs) / (len(logs) - 1) / len(logs))
    by_branch = zip(*(reversed(rows) if reverse else rows), strict=True)
    values, means, errors = (tuple(column) for column in by_branch)
    return Measured(values, means, errors, plain, total, error, mean, spread)


def _ratio(draws: list[list[float]], i: int, j: int) -> tuple[float, float]:
    """Mean of point j over mean of point i, and its jackknife error."""
    above, below = sum(d[j] for d in draws), sum(d[i] for d in draws)
    without = [(above - d[j]) / (below - d[i]) for d in draws]
    mean = sum(without) / len(without)
    spread = sum((x - mean) ** 2 for x in without) * (len(without) - 1) / len(without)
    return above / below, math.sqrt(spread)


def _warnings(
    sites: int, rates: Sequence[float], scale: str, forward: Measured, backward: Measured
) -> tuple[str, ...]:
    if all(p == 1 for p in rates):
        return ()
    if sites < SHALLOW:
        return (
            f"{sites} {'site' if sites == 1 else 'sites'}: stochastic depth mostly hurts networks this "
            "shallow (reports of 3 and 4 blocks are all worse than without it); leave it to deeper ones",
        )
    sides = {"signals": forward, "gradients": backward}
    # Without norms and scaling both grow alike (D8); behind a norm signals do not, and gradients may.
    if scale == "eval" or not all(_compounds(side.dense) for side in sides.values()):
        return ()
    root = 1 / len(rates)
    found = [
        f"{name} {side.noisy_total:.3g} against {side.dense_total:.3g}, "
        f"{side.noisy_total**root:.3g} against {side.dense_total**root:.3g} a branch"
        for name, side in sides.items()
        if side.log_excess > 3 * side.excess_error
    ]
    if not found:
        return ()
    return (
        f'scale="train" makes second moments grow faster over {len(rates)} branches than no noise at all '
        f"({'; '.join(found)}): the branches are neither normalised nor scaled down. Normalise, scale them "
        'by 1/sqrt(depth), or take scale="eval"',
    )


def _silence(names: Sequence[str]) -> str:
    some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    said = "this branch gives" if len(names) == 1 else "these branches give"
    return (
        f"{some}: {said} exact zeros (a last layer initialised at zero?), so that growth says nothing yet: "
        "measure again after some training"
    )


def _compounds(factors: Sequence[float | None]) -> bool:
    """Whether the last blocks still multiply the second moment, by as much as the first ones.

    Behind a norm blocks add fixed amounts and their factors fall to 1; scaled ones are close to 1 throughout.
    """
    known = [math.log(x) for x in factors if x is not None]
    part = max(2, len(known) // 3)
    early, late = sum(known[:part]) / part, sum(known[-part:]) / part
    return late > math.log(_UNSCALED) and late > early / 2

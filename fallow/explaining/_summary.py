"""From the measurements of batches to an explanation, verdicts and notes included."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from fallow.explaining._batch import FORMS, Effort, Measured
from fallow.explaining._noise import Noise
from fallow.explaining._result import Explanation, SitePenalty, Totals

# A sum within a tenth of R, or within two standard errors, stands for it.
_CLOSE = 0.1


def summary(noise: Noise, effort: Effort, measured: Sequence[Measured]) -> Explanation:
    """Average the batches, weighted by their samples, and say what it means."""
    kinds = {m.curvature.kind for m in measured}
    kind = kinds.pop() if len(kinds) == 1 else "other"
    totals = _totals(noise, measured)
    samples = sum(m.rows for m in measured)
    return Explanation(
        rows=tuple(_row(noise, measured, name, totals.loss_noisy) for name in noise.rates),
        totals=totals,
        loss_kind=kind,
        scale=noise.scale,
        mode=noise.mode,
        samples=samples,
        draws=effort.draws,
        notes=tuple(_notes(noise, kind, totals, measured)),
        settings={
            "site_draws": effort.site_draws,
            "label_draws": effort.label_draws,
            "batches": len(measured),
            "seed": noise.seed,
            "torch": torch.__version__,
        },
    )


def _mean(measured: Sequence[Measured], of: Callable[[Measured], float]) -> float:
    total = sum(m.rows for m in measured)
    return math.fsum(m.rows / total * of(m) for m in measured)


def _error(measured: Sequence[Measured], of: Callable[[Measured], float]) -> float:
    """Of a weighted mean of independent estimates."""
    total = sum(m.rows for m in measured)
    return math.sqrt(math.fsum((m.rows / total * of(m)) ** 2 for m in measured))


def _site(measured: Sequence[Measured], form: str, name: str) -> tuple[float | None, float | None]:
    """A form of a site, and its standard error where it has one."""
    if any(form not in m.forms for m in measured):
        return None, None
    value = _mean(measured, lambda m: m.forms[form].get(name, 0.0))
    error = _error(measured, lambda m: m.errors.get(form, {}).get(name, 0.0))
    return value, error


def _row(noise: Noise, measured: Sequence[Measured], name: str, loss: float) -> SitePenalty:
    forms = {form: _site(measured, form, name) for form in FORMS}
    bregman, alone, drawn = forms["bregman"][0], forms["alone"][0], forms["monte_carlo"]
    assert bregman is not None and alone is not None  # these two every loss has
    best = drawn[0] if drawn[0] is not None else alone
    return SitePenalty(
        name=name,
        rate=noise.rates[name],
        noise=noise.weight(name),
        hessian=forms["hessian"][0],
        bregman=bregman,
        linearised=forms["linearised"][0],
        linearised_error=forms["linearised"][1],
        alone=alone,
        monte_carlo=drawn[0],
        monte_carlo_error=drawn[1],
        share=best / loss if loss > 0 else None,
    )


def _totals(noise: Noise, measured: Sequence[Measured]) -> Totals:
    r = _mean(measured, lambda m: m.regulariser.value)
    error = _error(measured, lambda m: m.regulariser.error)
    losses = {k: _mean(measured, lambda m, k=k: m.losses[k]) for k in measured[0].losses}
    sums: dict[str, float | None] = {}
    for form in FORMS:
        found = [_site(measured, form, name)[0] for name in noise.rates]
        sums[form] = math.fsum(v for v in found if v is not None) if None not in found else None
    sum_error = _error(measured, lambda m: m.sum_error) if sums["monte_carlo"] is not None else None
    nothing = abs(r) <= 1e-12 * max(abs(losses["noisy"]), 1e-300)
    return Totals(
        regulariser=r,
        regulariser_error=error,
        plug_in=_mean(measured, lambda m: m.regulariser.plug_in),
        sums=sums,
        ratios={k: None if v is None or nothing else v / r for k, v in sums.items()},
        verdicts={
            k: verdict(v, r, math.hypot(error, (sum_error or 0.0) if k == "monte_carlo" else 0.0))
            for k, v in sums.items()
            if v is not None
        },
        sum_error=sum_error,
        noise_mass=math.fsum(p * (1 - p) for p in noise.rates.values()),
        noise=math.fsum(noise.weight(name) for name in noise.rates),
        loss_full=losses["full"],
        loss_evaluation=losses["evaluation"],
        loss_noisy=losses["noisy"],
        loss_noisy_error=_error(measured, lambda m: m.losses["noisy_error"]),
        loss_mean_output=losses["mean_output"],
    )


def verdict(value: float, r: float, error: float) -> str:
    """Whether a sum stands for R: within a tenth of it, or within two standard errors.

    Examples:
        >>> verdict(1.05, 1.0, 0.01), verdict(1.3, 1.0, 0.01), verdict(1.3, 1.0, 0.4)
        ('holds', 'off', 'undecided')
    """
    gap = abs(value - r)
    if gap <= _CLOSE * abs(r):
        return "holds"
    if gap <= 2 * error:
        return "holds" if 4 * error <= abs(r) else "undecided"
    return "off"


def _notes(noise: Noise, kind: str, totals: Totals, measured: Sequence[Measured]) -> list[str]:
    notes = ["standard errors are over the masks, given these samples"]
    if not noise.active:
        return ["every survival rate is 1: there is no noise and no penalty"]
    if kind == "linear":
        notes.append(
            "the loss is linear in the output (log-probabilities?), so R is 0 by definition and all of the "
            "noise's effect is in the mean output: pass logits and their cross-entropy to see it"
        )
    if any(m.scalars for m in measured):
        notes.append(
            "a part of the loss that the model computes itself counts as linear and adds nothing to R"
        )
    if kind == "other":
        notes.append(
            "the loss is neither a cross-entropy nor quadratic in the output: no labels can be drawn for the "
            "linearised form"
        )
    if any(not m.curvature.twice for m in measured):
        notes.append("autograd cannot differentiate the loss twice: there is no Hessian form")
    if any(m.rows < 2 for m in measured) and noise.mode == "row":
        notes.append("a batch of one sample has one mask a draw: pass larger batches for smaller errors")
    notes += _on_forms(kind, totals)
    notes.append(_on_scale(noise.scale))
    return notes


def _on_forms(kind: str, totals: Totals) -> list[str]:
    notes = []
    off = [k for k in ("hessian", "bregman", "linearised") if totals.verdicts.get(k) == "off"]
    if off and kind == "cross_entropy":
        notes.append(
            f"{', '.join(off)}: second-order forms of single sites are known to fail for a fitted "
            "cross-entropy network: the Bregman form (a KL, D4) below survival rates of about 0.99, the "
            "Hessian and linearised ones at any rate (D5). Take R and the Monte Carlo column for the truth"
        )
    elif off:
        notes.append(
            f"{', '.join(off)}: single sites with the others kept do not stand for the noise of all at these "
            "rates (and the linearised form needs small branches, D5). Take R and the Monte Carlo column for "
            "the truth"
        )
    if "undecided" in totals.verdicts.values():
        notes.append("too few draws to judge every form: raise draws and site_draws, or pass more samples")
    if totals.sums["monte_carlo"] is not None:
        bound = "; for a quadratic loss always at least R (Efron and Stein)" if kind == "quadratic" else ""
        notes.append(
            "Monte Carlo and share of loss count what several sites do together once for each of them: where "
            f"sites interact they add up to more than R{bound}"
        )
    return notes


def _on_scale(scale: str) -> str:
    if scale == "eval":
        return (
            'scale="eval": sites weigh p(1-p), most at p = 1/2; at one mean rate uniform rates have the '
            "largest noise mass (D7)"
        )
    return (
        'scale="train": sites weigh (1-p)/p, which is convex (D6): between sites of equal curvature uniform '
        "rates give the least penalty at one mean rate, not the most"
    )

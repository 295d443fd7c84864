"""Make a plan: measure what it needs, then allocate."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fallow._version import __version__
from fallow.errors import ArgumentError, UsageError, check_choice, check_rate
from fallow.feed import LossFunction, pairs
from fallow.planning import allocate, sensitivity
from fallow.planning import cost as costing
from fallow.planning.plan import Plan
from fallow.planning.sensitivity import Sensitivities
from fallow.surgery.decide import check_seed
from fallow.surgery.tap import Taps, tapped

_LOW = 0.3
METHODS = ("auto", "uniform", "linear", "sensemode")


def plan(
    model: nn.Module,
    loss_fn: LossFunction | None,
    batches: Iterable[Any],
    *,
    budget: float,
    method: str = "auto",
    cost: str = "flops",
    minimum_rate: float = allocate.MINIMUM_RATE,
    gamma: float = 1.0,
    reduction: str = "absolute",
    granularity: str = "branch",
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    max_batches: int = 8,
    seed: int = 0,
) -> Plan:
    """Choose survival rates for a budget, from measured costs and sensitivities.

    Formula: rates p_l with ``1 - sum_l c_l (1 - p_l) = budget``, c_l the cost of site l as a share of a
        whole dense step; "sensemode": ``p_l = min(1, max(p_min, a (S_l / sqrt(c_l))^gamma))``.

    The model is left as it was, its gradients, statistics, flags and random state included.

    Args:
        model: any model with residual branches; one with a handle is planned with the handle's sites.
        loss_fn: ``loss_fn(output, target)``, one number; None where no sensitivities are needed.
        batches: ``(inputs, target)`` pairs, or dicts that go to ``loss_fn(output, batch)`` whole. A few
            hundred samples are enough.
        budget: expected share of the cost of a dense step, in (0, 1], what cannot rest included.
        method: "uniform"; "linear" (Huang's); "sensemode": more for blocks the loss depends on; "auto":
            uniform or sensemode, by `planning.allocate.auto`'s rule.
        cost: what a step is counted in: "flops", measured "time", "memory" kept for backward, or "count".
        minimum_rate: smallest rate of sensemode, in (0, 1].
        gamma: 0 gives Uniform, 1 SenseMode, between them a mixture.
        reduction: of the sensitivities; see `planning.sensitivities`.
        granularity: as in `fallow.sites`.
        include: as in `fallow.sites`.
        exclude: as in `fallow.sites`.
        max_batches: batches taken at most.
        seed: of masks, for ``reduction="masked"``.

    Returns:
        The plan; `fallow.apply(model, plan, example=x)` takes it.

    Raises:
        RateError: the budget is out of reach, with the smallest feasible one.
        SiteError: no site; a site the loss's gradient does not reach, by name.
        UsageError: a loss that is not one number, no batches, an unknown choice.
        RunError: the loss is not finite.

    Estimator:
        The budget is met exactly. Sensitivities are first order and of the weights as they are now; plan
        again after some training, or let `fallow train --rates sensemode` do so.

    References:
        Hayou & Ayed: Regularization in ResNet with Stochastic Depth (2021), for SenseMode and the Budget
        Hypothesis; the cost-weighted form, the solver and auto's rule are ours (derived, D18 to D21).
    """
    check_choice("method", method, METHODS)
    check_choice("cost", cost, costing.KINDS)
    check_choice("reduction", reduction, sensitivity.REDUCTIONS)
    check_rate(budget, name="budget")
    check_rate(minimum_rate, name="minimum_rate")
    allocate.check_gamma(gamma)
    check_seed(seed)
    sensed = method in ("auto", "sensemode")
    if sensed and not callable(loss_fn):
        raise ArgumentError(
            f'method="{method}" measures sensitivities of a loss: pass loss_fn(output, target), got '
            f"{loss_fn!r}"
        )
    found = pairs(model, batches, max_batches, "plan")
    with tapped(model, found[0][0], granularity=granularity, include=include, exclude=exclude) as taps:
        return _planned(taps, loss_fn, found, budget, method, cost, minimum_rate, gamma, reduction, seed)


def _planned(
    taps: Taps,
    loss_fn: Any,
    batches: list[Any],
    budget: float,
    method: str,
    kind: str,
    minimum_rate: float,
    gamma: float,
    reduction: str,
    seed: int,
) -> Plan:
    costs = costing.measure(taps, kind, batches[0], loss_fn)
    alike = allocate.uniform(costs, budget)  # a budget out of reach is refused before anything is measured
    settings = {"reduction": reduction, "minimum_rate": minimum_rate, "gamma": gamma, "seed": seed}
    known = None
    if method in ("auto", "sensemode"):
        rate = next(iter(alike.values()))
        known = sensitivity.measure(taps, loss_fn, batches, reduction, rate, seed=seed)
        settings |= {"samples": known.samples, "spread": allocate.spread(known, _finite(known.errors))}
    else:
        settings = {}
    return from_sensitivities(
        costs,
        known,
        budget=budget,
        method=method,
        kind=kind,
        minimum_rate=minimum_rate,
        gamma=gamma,
        settings=settings,
    )


def from_sensitivities(
    costs: Mapping[str, float],
    known: Mapping[str, float] | None,
    *,
    budget: float,
    method: str = "sensemode",
    kind: str = "flops",
    minimum_rate: float = allocate.MINIMUM_RATE,
    gamma: float = 1.0,
    settings: Mapping[str, Any] | None = None,
) -> Plan:
    """The plan that follows from costs and sensitivities that are known already; see `plan`."""
    used, notes = method, []
    if method in ("uniform", "linear"):
        table = (allocate.uniform if method == "uniform" else allocate.linear)(costs, budget)
    else:
        if known is None:
            raise UsageError(
                f'method="{method}" needs sensitivities, got None: RunningSensitivities has none until every '
                "site was measured once; go on training, or measure them with fallow.planning.sensitivities"
            )
        silent = known.silent if isinstance(known, Sensitivities) else ()
        used, table, reason = _sensed(costs, known, budget, method, minimum_rate, gamma)
        notes += [reason] if reason else []
        if silent:
            few = ", ".join(silent[:4]) + (f" and {len(silent) - 4} more" if len(silent) > 4 else "")
            notes.append(
                f"{len(silent)} of {len(costs)} branches gave exact zeros (zero-initialised?), so nothing is "
                f"known of them yet: {few}; plan again after some training"
            )
    if min(table.values()) < _LOW and used != "uniform":
        notes.append(
            f'the lowest rate is {min(table.values()):.2f}: under scale="train" kept branches are multiplied '
            'by its inverse, which hurt deep networks in our trials; scale="eval" did not'
        )
    if len(costs) < 8:
        notes.append(f"{len(costs)} sites are few: shallow networks are often hurt by stochastic depth")
    return Plan(
        dict(table),
        used,
        method,
        float(budget),
        kind,
        dict(costs),
        dict(known) if known is not None else {},
        tuple(notes),
        dict(settings or {}),
        {"fallow": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
    )


def _sensed(
    costs: Mapping[str, float],
    known: Mapping[str, float],
    budget: float,
    method: str,
    minimum_rate: float,
    gamma: float,
) -> tuple[str, dict[str, float], str]:
    """Method used, rates, reason."""
    errors = _finite(known.errors) if isinstance(known, Sensitivities) else None
    if method == "auto":
        choice = allocate.auto(
            known, costs, budget=budget, errors=errors, minimum_rate=minimum_rate, gamma=gamma
        )
        return choice.method, choice.rates, choice.reason
    if not any(known.values()):
        return (
            "uniform",
            allocate.uniform(costs, budget),
            ("every sensitivity is zero, so nothing tells the sites apart: the rates are uniform"),
        )
    rates = allocate.sensemode(known, costs, budget=budget, minimum_rate=minimum_rate, gamma=gamma)
    return "sensemode", rates, ""


def _finite(errors: Mapping[str, float]) -> dict[str, float] | None:
    return dict(errors) if all(map(math.isfinite, errors.values())) else None

"""Start to make a model sparse: what is asked for, checked and put together."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fallow.errors import ArgumentError, UsageError, check_choice, check_count, refuse_unknown
from fallow.penalties import Ridge
from fallow.penalties.registry import penalty
from fallow.schedules import Schedule
from fallow.sparsity.base import Method, Strategy
from fallow.sparsity.control import Target, share_of_blocks, target_of
from fallow.sparsity.curvature import Curvature
from fallow.sparsity.methods import METHODS, Calibrated
from fallow.sparsity.noise import Noise
from fallow.sparsity.noisy import NOISY
from fallow.sparsity.run import Sparsifier
from fallow.sparsity.weights import Weight, weights_of

CUT = 0.05  # groups that would be kept less often are zero in the end
_KEYWORDS = (
    "strategy strength method groups target steps control ramp every multiple optimiser samples loss noise "
    "schedule cut include exclude"
).split()


def sparsify(
    model: nn.Module,
    *,
    strategy: str | Strategy | None = None,
    strength: float | None = None,
    method: str = "gradient",
    groups: str = "weights",
    target: float | None = None,
    steps: int | None = None,
    control: str = "ramp",
    ramp: tuple[float, float] = (0.1, 0.7),
    every: int | None = None,
    multiple: int = 1,
    optimiser: torch.optim.Optimizer | None = None,
    samples: int | None = None,
    loss: str = "cross_entropy",
    noise: Noise | None = None,
    schedule: Schedule | None = None,
    cut: float = CUT,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    **unknown: Any,
) -> Sparsifier:
    """Start to make a model sparse; the training loop stays the user's.

    Formula: minimises ``loss + strength sum_g m Omega(n_g)`` over groups of m entries with root mean square
    n_g, Omega the strategy's penalty, by one of the methods of `fallow.sparsity.methods`. A group is zero in
    the end where its survival rate ``eta / (eta + strength)`` is below `cut`, or where the target says so.

    Args:
        model: any module; its parameters stay the same tensors under the same names.
        strategy: a penalty of `fallow.penalties`, or its name; "magnitude": none, the smallest go. None:
            "logsum", and variational dropout's with "calibrated". Not for "variational", "hardconcrete" and
            "targeted", whose noise says what is penalised.
        strength: lambda, of a loss that is a mean over samples. None: 1e-3, and with "calibrated" and
            "variational" 1.
        method: "gradient", "tikhonov", "prox", "adaprox", "eta", "calibrated"; or noise on the weights in
            training: "dropout" and "gaussian", with the survival rates of the strategy after every update;
            "variational", with variances that are learned, of which the schedule starts the divergence
            slowly; "hardconcrete", gates that are learned; "targeted", the smallest of each row along the
            target's ramp. What is learned is in the model and its state dict until `Sparsifier.remove`: make
            the optimiser before, and give it `Sparsifier.parameters`.
        groups: "weights", "outputs" (neurons, filters), "inputs", "heads", or "N:M" such as "2:4": of each M
            neighbours along the inputs at most N are kept.
        target: the share of the chosen weights that is to be zero at the end of `steps`; with "N:M" it
            follows from that.
        steps: optimiser steps of the whole training; with a target.
        control: "ramp": the smallest groups go as the ramp says; "strength": the strength follows the ramp.
        ramp: the parts of the steps at which the ramp begins and ends; what is left trains on after it.
        every: steps between two looks of the controller; None: a two-hundredth of the training.
        multiple: with a target, "outputs" and "inputs" go by so many at a time, so that what is left of a
            layer is a multiple of it, as fast kernels want. Every layer keeps its best so many, or all where
            it has no more; the share is met to one such pack as long as others may go, and where none is
            left `Sparsifier.shortfall` says what was reached.
        optimiser: of the loop; "prox" and "adaprox" take their step size from it.
        samples: number of training samples, for "calibrated" and "variational".
        loss: of "calibrated": "cross_entropy" of the model's output, or "squared" (half the sum of squares).
        noise: of "variational", "hardconcrete" and "targeted"; None: as `Noise` has it.
        schedule: of `fallow.schedules`, or a function of the step to a factor of the strength.
        cut: survival rate below which a group is zero, without a target.
        include: names or patterns of the parameters to take; None: the weights of linear layers, convolutions
            and attention. Biases and norms are never taken.
        exclude: of those to leave out, say the last layer's.
        unknown: refused.

    Raises:
        UsageError: a word or number that cannot be, a target without steps, a method without its optimiser,
            patterns that match nothing or biases, NaN weights.
        ArgumentError: an unknown keyword, a strategy that is no penalty.

    References:
        LeJeune, Javadi, Baraniuk: The Flip Side of the Reweighted Coin (2021).

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> run = sparsify(model, strategy="logsum", strength=1e-3)
        >>> loss = model(torch.ones(3, 4)).square().mean() + run.penalty()
        >>> loss.backward()
        >>> run.update()
    """
    refuse_unknown("sparsify", unknown, _KEYWORDS)
    check_choice("method", method, METHODS)
    calibrated = method in ("calibrated", "variational")
    strength = strength if strength is not None else 1.0 if calibrated else 1e-3
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength < math.inf:
        raise UsageError(f"strength must be finite and not negative, got {strength!r}")
    if not 0 <= cut < 1:
        raise UsageError(f"cut is a survival rate in [0, 1), got {cut!r}")
    chosen = weights_of(model, groups=groups, include=include, exclude=exclude)
    share = share_of_blocks(chosen[0]) if target is None and chosen[0].keep else target
    goal = None if share is None else target_of(share, steps, control, *ramp, every, multiple)
    if multiple != 1 and (goal is None or groups not in ("outputs", "inputs")):
        raise UsageError(f'multiple is of groups "outputs" or "inputs" with a target, got {multiple!r}')
    if method in NOISY:
        own = NOISY[method].owns
        if strategy is not None if own else strategy == "magnitude":
            words = "has a penalty of its own" if own else "follows the survival rates of a penalty"
            raise UsageError(f"method {method!r} {words}: leave out strategy=, got {strategy!r}")
        chosen_strategy = _strategy(strategy or ("vardrop" if own else "logsum"))
        how: Method = NOISY[method](
            chosen, chosen_strategy, optimiser, model=model, noise=noise, samples=samples, target=goal
        )
    else:
        how = _quiet(model, method, strategy, chosen, optimiser, goal, samples, loss)
    return Sparsifier(model, chosen, how, float(strength), goal, schedule, float(cut))


def _quiet(
    model: nn.Module,
    method: str,
    strategy: str | Strategy | None,
    chosen: list[Weight],
    optimiser: torch.optim.Optimizer | None,
    goal: Target | None,
    samples: int | None,
    loss: str,
) -> Method:
    """A method without noise."""
    if isinstance(strategy, str) and strategy == "magnitude":
        if goal is None:
            raise UsageError('strategy "magnitude" needs target= and steps=: nothing else says how many go')
        return Method(chosen, Ridge(), optimiser)
    if method != "calibrated":
        return METHODS[method](chosen, _strategy(strategy or "logsum"), optimiser)
    if samples is None:
        raise UsageError('method "calibrated" needs samples=, how many the model is trained on')
    count = check_count("samples", samples, 1)
    own = _strategy(strategy or "vardrop")
    curvature = Curvature(model, chosen, loss=loss)
    return Calibrated(chosen, own, optimiser, curvature=curvature, samples=count)


def _strategy(given: Any) -> Strategy:
    found = penalty(given) if isinstance(given, str) else given
    missing = [name for name in ("value", "prox", "eta", "dual") if not hasattr(found, name)]
    if missing or isinstance(found, type):
        raise ArgumentError(
            f"strategy must be a penalty such as fallow.penalties.LogSum(eps=2.0) or its name, got {given!r}"
        )
    return found

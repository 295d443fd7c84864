"""What noise in front of the last linear layer penalises, and how far the head is from the best there is.

With features G, a head ``G W^T`` and masks of a scheme on the features, the expected loss is the plain loss
and a penalty. For a squared error the penalty is exact and known, ``Omega(W, G)``, the least of the sum over
all networks is known in closed form, and so is the distance to it. For cross-entropy a quadratic form and a
bound stand for the penalty.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from fallow.errors import ArgumentError, FallowError, UsageError, check_count
from fallow.explaining import _head_entropy, _head_squared
from fallow.explaining._head_found import head_of
from fallow.explaining._head_noise import HeadNoise
from fallow.explaining._head_notes import notes
from fallow.explaining._head_readings import Head, monte_carlo, read
from fallow.explaining._head_result import HeadExplanation, HeadOptimum
from fallow.feed import LossFunction, Pair, pairs, rows_of
from fallow.penalties import HeadPenalty, effective_rank, kappa
from fallow.schemes import Blocks, Correlated, Scheme
from fallow.surgery.decide import check_seed

_DEAR = 1 << 36  # products that nobody asked for
_WIDE = 2048  # a matrix of more rows is not decomposed for one number


def explain_head(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Iterable[Any],
    *,
    head: str | HeadPenalty | None = None,
    scheme: Scheme | None = None,
    draws: int = 64,
    max_batches: int = 4,
    seed: int = 0,
) -> HeadExplanation:
    """Measure what noise in front of the last linear layer adds to a loss.

    The model is tried in eval mode, all of its noise off, and left as it was; masks are drawn on the head
    alone, on features computed once. No global random number generator is moved.

    Formula: ``penalty = E loss(masked head) - loss``; for a squared error ``<C, W^T W * G^T G>`` over what
    the loss divides by, C the characteristic matrix of the scheme (`fallow.penalties.omega`).

    Args:
        model: any module that ends in a linear layer.
        loss_fn: ``loss_fn(output, target)``, one number. What kind it is its curvature tells.
        batches: (inputs, target) pairs; a dict without a target goes whole to both. Losses of batches are
            averaged, weighted by their samples.
        head: name of an nn.Linear, or the `HeadPenalty` that it is trained with; None: the last one whose
            output is the model's, or that in another shape.
        scheme: the law of the masks on its features; None: that of the noise which feeds the head directly:
            nn.Dropout, a module of fallow with a ``scheme``, or a `DropConnect` on the head.
        draws: of masks.
        max_batches: how many batches to take at most.
        seed: of the masks.

    Estimator:
        exact: for a squared error of any weights, on these samples.
        quadratic: of second order in the noise, for cross-entropy; good to a few per cent while the noise
            in the logits is below about 1.
        jensen: a bound of the penalty, for cross-entropy under equal blocks.
        monte_carlo: unbiased for every loss; its standard error is over the masks, given the samples.
        optimum: for a squared error and schemes of `closed_form_of`. Its minimum is over all networks whose
            features can be anything on these samples; where the features are linear in the inputs, over
            linear networks.

    Raises:
        UsageError: no such layer; no noise; a loss of something else than the head's output.
        RunError: the loss is not finite.

    References:
        Pal, Lane, Vidal, Haeffele: On the regularization properties of structured dropout (2020), for penalty
        and closed form; the formulas are derived.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_effort(draws, seed)
    found = pairs(model, batches, max_batches, "explain_head")
    name, noise = head_of(model, found[0][0], head, scheme)
    return measured(model, loss_fn, found, name, noise, draws, seed)


def check_effort(draws: int, seed: int) -> None:
    """Refuse draws and seeds that cannot be."""
    check_count("explain_head: draws", draws, 2)
    check_seed(seed)


def head_beside(
    model: nn.Module,
    loss_fn: LossFunction,
    found: Sequence[Pair],
    head: str | HeadPenalty | None,
    scheme: Scheme | None,
    draws: int,
    seed: int,
) -> HeadExplanation | None:
    """As `explain_head`, of pairs; None where nothing was asked for and no noisy head can be explained."""
    asked = head is not None or scheme is not None
    try:
        name, noise = head_of(model, found[0][0], head, scheme)
        if not asked and _work(model, found, name) * draws > _DEAR:
            return None
        return measured(model, loss_fn, found, name, noise, draws, seed)
    except FallowError:
        if asked:
            raise
        return None


def _work(model: nn.Module, found: Sequence[Pair], name: str) -> int:
    """Products in a draw, a position a sample taken for granted."""
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return sum(rows_of(inputs) for inputs, _ in found) * module.weight.numel()


def measured(
    model: nn.Module,
    loss_fn: LossFunction,
    found: Sequence[Pair],
    name: str,
    noise: HeadNoise,
    draws: int,
    seed: int,
) -> HeadExplanation:
    """The explanation of a head and a noise that were found."""
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    noise.scheme.check(module.in_features)
    head = read(model, loss_fn, found, name, seed)
    drawn, error = monte_carlo(head, noise, draws, seed)
    exact = best = quadratic = bound = missing = None
    if head.kind == "quadratic":
        exact = _head_squared.exact_penalty(head, noise.scheme)
        try:
            best = _optimum(model, found, name, noise, head)
        except UsageError as reason:
            missing = str(reason)
    elif head.kind == "cross_entropy":
        quadratic = _head_entropy.quadratic_form(head, noise)
        bound = _head_entropy.jensen(head, noise)
    penalty = drawn if exact is None else exact
    return HeadExplanation(
        name=name,
        scheme=str(noise.scheme),
        source=noise.source,
        loss_kind=head.kind,
        width=module.in_features,
        outputs=module.out_features,
        samples=head.samples,
        draws=draws,
        loss=head.loss,
        exact=exact,
        quadratic=quadratic,
        jensen=bound,
        monte_carlo=drawn,
        monte_carlo_error=error,
        share=penalty / (head.loss + penalty) if head.loss + penalty > 0 else None,
        kappa=_kappa(noise.scheme, module.in_features),
        effective_rank=effective_rank(head.predictions),
        optimum=best,
        notes=tuple(notes(head, noise, best, missing)),
        settings={"batches": len(found), "seed": seed, "torch": torch.__version__},
    )


def _kappa(scheme: Scheme, width: int) -> float | None:
    dense = isinstance(scheme, Correlated) or (isinstance(scheme, Blocks) and scheme.grid == "sliding")
    return None if dense and width > _WIDE else kappa(scheme, width)


def _optimum(model: nn.Module, found: Sequence[Pair], name: str, noise: HeadNoise, head: Head) -> HeadOptimum:
    problem = _head_squared.squares(head)
    inputs = _head_squared.linear_inputs(model, found, name, head)
    return _head_squared.optimum(problem, noise.scheme, inputs)

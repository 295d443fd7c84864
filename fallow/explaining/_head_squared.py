"""A head under squared loss: its exact penalty, and how far it is from the global minimum.

A loss that is quadratic in the output, ``sum_nj c_nj (z_nj - y_nj)^2 / 2`` plus a constant, says c by its
curvature and y by its slope. Where ``c_nj / 2 = f a_n b_j`` it is f times the plain sum of squares of
problem (1) of `fallow.penalties.minimiser`, its rows multiplied by ``sqrt(a_n)`` and its columns by
``sqrt(b_j)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fallow.errors import UsageError
from fallow.explaining._head_readings import Head, run
from fallow.explaining._head_result import HeadOptimum
from fallow.feed import Pair, rows_of
from fallow.penalties import closed_form_of, network_gap, omega
from fallow.schemes import Blocks, Gaussian, Layer, Scheme, Units
from fallow.surgery import probe

_WIDEST = 4096  # inputs of more numbers a row are not decomposed
_WIDEST_HEAD = 2048  # nor is a system of more equations solved


@dataclass(frozen=True)
class Squares:
    """The head's problem as one plain sum of squares, in float64.

    Attributes:
        targets: [rows, outputs].
        features: [rows, width].
        weight: [outputs, width].
        bias: [outputs] or None.
        factor: what the sum of squares is multiplied by in the loss.
        constant: what the loss has beside it.
        rows: square roots of a, [rows used, 1].
        used: which rows count.
        even: whether rows weigh the same, so that the bias is the same for all.
    """

    targets: Tensor
    features: Tensor
    weight: Tensor
    bias: Tensor | None
    factor: float
    constant: float
    rows: Tensor
    used: Tensor
    even: bool


def exact_penalty(head: Head, scheme: Scheme) -> float:
    """What the scheme adds to the loss, for any weights c."""
    total = 0.0
    for reading, c in zip(head.readings, _weights(head), strict=True):
        parts = _product(c)
        if parts is not None:
            a, b = parts
            total += float(omega(b.sqrt() * head.weight, a.sqrt() * reading.features, scheme)) / 2
            continue
        for j, row in enumerate(head.weight):
            total += float(omega(row[None], c[:, j : j + 1].sqrt() * reading.features, scheme)) / 2
    return total


def squares(head: Head) -> Squares:
    """The problem of all batches together.

    Raises:
        UsageError: the weights c are no products.
    """
    every = _weights(head)
    c = torch.cat(every)
    parts = _product(c)
    if parts is None:
        raise UsageError(
            "the loss weighs the outputs of different samples differently, which has no closed form"
        )
    a, b = parts
    targets = [
        r.output - r.share * torch.where(w > 0, r.slope / w, 0)
        for r, w in zip(head.readings, every, strict=True)
    ]
    used, outputs = a[:, 0] > 0, b[:, 0] > 0
    a, b = a[used], b[outputs]
    factor = float(a.mean() * b.mean()) / 2
    rows, columns = (a / a.mean()).sqrt(), (b / b.mean()).sqrt()
    even = bool((a.amax() - a.amin()) <= 1e-6 * a.amax())
    y = torch.cat(targets)[used][:, outputs] * columns.T * rows
    g, w = head.features[used] * rows, head.weight[outputs] * columns
    bias = None if head.bias is None else head.bias[outputs] * columns[:, 0]
    free = g @ w.T if bias is None else g @ w.T + bias * rows
    constant = head.loss - factor * float((y - free).square().sum())
    return Squares(y, g, w, bias, factor, constant, rows, used, even)


def _weights(head: Head) -> list[Tensor]:
    """The weights c of each batch, [rows, outputs], its share in the mean over batches included."""
    return [
        r.share * r.curvature.weights[0].double().reshape(len(r.features), -1).clamp_min(0)
        for r in head.readings
    ]


def _product(c: Tensor) -> tuple[Tensor, Tensor] | None:
    """``(a [rows, 1], b [outputs, 1])`` with c = a b', or None."""
    a, b = c.sum(1, keepdim=True), c.sum(0, keepdim=True) / c.sum()
    # what a curvature was fitted to is known to about the square root of the precision
    same = bool(((c - a * b).abs() <= 1e-6 * c.amax()).all())
    return (a, b.T) if same else None


# --- the global minimum ------------------------------------------------------------------------------------


def optimum(found: Squares, scheme: Scheme, inputs: Tensor | None) -> HeadOptimum:
    """The closed-form minimiser, and the certificate of laws that penalise as blocks do.

    Args:
        found: the problem.
        scheme: whose law acts.
        inputs: [rows, numbers] where the features are linear in them.

    Raises:
        UsageError: the scheme has no closed form, or the loss none with it.
    """
    width, biased = found.features.shape[1], found.bias is not None
    if biased and not found.even:
        raise UsageError("the loss weighs samples differently, which with a bias has no closed form")
    if isinstance(scheme, Blocks) and scheme.block_size > width:
        scheme = Layer(scheme.survival_rate) if scheme.grid == "disjoint" else scheme
    x = None if inputs is None else inputs[found.used] * found.rows
    best = closed_form_of(found.targets, scheme, width, x, bias=biased)
    free = found.features @ found.weight.T
    error = found.targets - (free if found.bias is None else free + found.bias)
    objective = float(error.square().sum() + omega(found.weight, found.features, scheme))
    like, bound = as_blocks(scheme, width), None
    if like is not None:
        rate, size = like
        bound = network_gap(
            found.targets,
            found.features,
            found.weight,
            survival_rate=rate,
            block_size=size,
            bias=found.bias,
            inputs=x,
        ).bound
    spectrum = torch.linalg.svdvals(free)
    return HeadOptimum(
        objective=found.factor * objective + found.constant,
        bound=None if bound is None else found.factor * bound + found.constant,
        minimum=found.factor * best.value + found.constant,
        best_head=_best_head(found, scheme),
        gamma=best.gamma,
        beta=best.beta,
        block_size=best.block_size,
        width=width,
        reachable_width=best.reachable_width,
        head=best.head,
        kept=best.kept,
        threshold=best.threshold,
        spectrum=tuple(spectrum.tolist()),
        optimal_spectrum=tuple(best.spectrum.double().tolist()),
        linear=inputs is not None,
    )


def _best_head(found: Squares, scheme: Scheme) -> float | None:
    """The least of the objective over weight and bias, a ridge regression by the scheme's matrix."""
    g, y = found.features, found.targets
    if g.shape[1] > _WIDEST_HEAD:
        return None
    noise = scheme.characteristic_matrix(g.shape[1]).to(g) * (g.T @ g)
    if found.bias is not None:
        g, y = g - g.mean(0), y - y.mean(0)
    weight = torch.linalg.pinv(g.T @ g + noise, hermitian=True) @ (g.T @ y)
    value = (y - g @ weight).square().sum() + (noise @ weight * weight).sum()
    return found.factor * float(value) + found.constant


def as_blocks(scheme: Scheme, width: int, *, exactly: bool = False) -> tuple[float, int] | None:
    """Survival rate and size of disjoint blocks that penalise the same; ``exactly``: that are this law."""
    if isinstance(scheme, Units) and isinstance(scheme.survival_rate, float):
        return scheme.survival_rate, 1
    if isinstance(scheme, Gaussian) and not exactly:
        return 1 / (1 + scheme.variance), 1
    if isinstance(scheme, Layer):
        return scheme.survival_rate, width
    if isinstance(scheme, Blocks) and scheme.grid == "disjoint":
        size = min(scheme.block_size, width)
        return (scheme.survival_rate, size) if exactly or width % size == 0 else None
    return None


# --- linear networks ---------------------------------------------------------------------------------------


def linear_inputs(model: nn.Module, pairs: Sequence[Pair], name: str, head: Head) -> Tensor | None:
    """The inputs, [rows, numbers], where the head's features are linear in them; a one appended for a bias.

    Told by one more forward: an affine map takes ``2 x - x'`` to ``2 f(x) - f(x')`` for all rows, and a
    linear one -x to -f(x).
    """
    xs = [inputs for inputs, _ in pairs]
    tensors = [x for x in xs if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1]
    whole = len(tensors) == len(xs) and all(
        len(x) == len(r.features) for x, r in zip(tensors, head.readings, strict=True)
    )
    if not whole or tensors[0][0].numel() > _WIDEST or rows_of(xs[0]) < 2:
        return None
    module, x, f = model.get_submodule(name), tensors[0], head.readings[0].features
    assert isinstance(module, nn.Linear)
    rolled = x.roll(1, 0)
    with probe.undisturbed(model), torch.inference_mode(False):
        model.eval()
        both, _, _ = run(model, module, name, torch.cat([2 * x - rolled, -x]))
    mixed, minus = both.split(len(x))
    slack = 32 * math.sqrt(torch.finfo(x.dtype).eps) * float(f.abs().amax())
    if not bool(((mixed - 2 * f + f.roll(1, 0)).abs() <= slack).all()):
        return None
    flat = torch.cat([t.flatten(1) for t in tensors]).double()
    constant = head.bias is not None or not bool(((minus + f).abs() <= slack).all())
    return torch.cat([flat, torch.ones_like(flat[:, :1])], 1) if constant else flat

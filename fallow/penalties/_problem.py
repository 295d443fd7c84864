"""What closed form and certificate have in common: checks, and targets brought to what can be fitted."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fallow.errors import UsageError, check_count
from fallow.penalties._checks import check_floats


def check_problem(block_size: object, gamma: object) -> tuple[int, float]:
    """The block size and gamma where they can be."""
    r = check_count("block_size", block_size, 1)
    number = float(gamma) if isinstance(gamma, int | float) and not isinstance(gamma, bool) else math.nan
    if not 0 <= number < math.inf:
        raise UsageError(f"gamma must be finite and not negative, got {gamma!r}")
    return r, number


def check_shapes(targets: Tensor, predictions: Tensor) -> None:
    check_floats("targets", targets, 2)
    check_floats("predictions", predictions, 2)
    if targets.dim() != 2 or targets.shape != predictions.shape:
        raise UsageError(
            f"targets and predictions must both have shape [N, outputs], got {list(targets.shape)} and "
            f"{list(predictions.shape)}"
        )


def reduced(
    targets: Tensor, inputs: Tensor | None, bias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Targets, centred where there is a bias; an orthonormal basis of what predictions can be; their mean."""
    check_shapes(targets, targets)
    y = targets.detach().double()
    if not bool(y.isfinite().all()) or not y.numel():
        raise UsageError(f"targets must be finite and not empty, got shape {list(y.shape)}: look for NaN")
    mean = y.mean(0) if bias else None
    centred = y if mean is None else y - mean
    if inputs is None:
        return centred, None, mean
    x = check_floats("inputs", inputs, 2).detach().double()
    if x.dim() != 2 or len(x) != len(y) or not bool(x.isfinite().all()):
        raise UsageError(f"inputs must be finite, of shape [{len(y)}, features], got {list(x.shape)}")
    basis = _span(x, inputs.dtype)
    if mean is None:
        return centred, basis, mean
    constant = (
        basis.T @ torch.full_like(basis[:, 0], len(x) ** -0.5) if basis.shape[1] else basis.new_zeros(1)
    )
    share = float(constant.square().sum())
    if min(share, 1 - share) > math.sqrt(torch.finfo(inputs.dtype).eps):
        raise UsageError(
            "with a bias there is a closed form only for inputs that are centred or that have a constant "
            "among their combinations: subtract the inputs' means, or append a column of ones"
        )
    return centred, _span(x - x.mean(0), inputs.dtype), mean


def _span(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An orthonormal basis of the columns' span, [N, rank]; at least one column, which may be 0."""
    p, values, _ = torch.linalg.svd(x, full_matrices=False)
    rank = int((values > torch.finfo(dtype).eps * max(x.shape) * values[:1]).sum())
    return p[:, :rank] if rank else torch.zeros_like(x[:, :1])

"""What is learned beside weights, in one pass over both (learned.h), where `takes` says so of each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fallow.kernels._build import library


def disturbed(log: Tensor, w: Tensor, e: Tensor | None, additive: bool, clip: float) -> Tensor:
    """The variance ``alpha w^2`` of each weight, or ``w + sqrt(alpha) |w| e``.

    Args:
        log: log alpha, or of the additive form log of the variance, where alpha is over ``w^2 + 1e-8``.
        w: the weights, of the same shape.
        e: standard normal numbers for a draw; None for the variance. Of the multiplicative form they are
            multiplied by the weights with their signs.
        additive: the form.
        clip: log alpha is held in [-clip, clip].
    """
    out = torch.empty_like(w)
    where = None if e is None else e.data_ptr()
    _library().fallow_disturbed(
        log.data_ptr(), w.data_ptr(), where, out.data_ptr(), w.numel(), additive, clip
    )
    return out


def disturbed_back(
    log: Tensor, w: Tensor, e: Tensor | None, grad: Tensor, additive: bool, clip: float
) -> tuple[Tensor, Tensor]:
    """From the gradient of `disturbed` those of `log` and `w`."""
    found = torch.empty_like(log), torch.empty_like(w)
    where = None if e is None else e.data_ptr()
    _library().fallow_disturbed_back(
        *(log.data_ptr(), w.data_ptr(), where, grad.data_ptr(), found[0].data_ptr(), found[1].data_ptr()),
        *(w.numel(), additive, clip),
    )
    return found


def diverged(
    log: Tensor, w: Tensor, additive: bool, clip: float, rest: tuple[Tensor, float, float] | None
) -> tuple[float, list[Tensor]]:
    """The sum of variational dropout's divergence and its gradient by `log`; if additive, also that by `w`.

    Args:
        log: as in `disturbed`.
        w: as in `disturbed`.
        additive: the form.
        clip: as in `disturbed`.
        rest: what the divergence has beyond ``log(1 + 1 / alpha) / 2`` as a function of log alpha: float32
            coefficients [6, intervals], where the first interval begins, and how many there are to 1; None:
            that of `fallow.noise.molchanov_kl`.

    Estimator:
        Exact to rounding; not finite where an entry is not.
    """
    found = [torch.empty_like(log), *([torch.empty_like(w)] if additive else [])]
    table, low, scale = (None, 0.0, 0.0) if rest is None else rest
    total = _library().fallow_diverged(
        *(log.data_ptr(), w.data_ptr(), found[0].data_ptr(), found[-1].data_ptr()),
        *(w.numel(), additive, clip),
        *((None, 0) if table is None else (table.data_ptr(), table.shape[1])),
        *(low, scale),
    )
    return total, found


def eta_trick(w: Tensor, logit: Tensor, eps: float, strength: float) -> tuple[float, list[Tensor]]:
    """``strength / 2 sum (w^2 / eta + f(eta))``, eta = strength e^logit, f that of LogSum; its gradients.

    With ``f'(eta) = (2 / (sqrt(eps^2 + 4 eta) + eps))^2``.

    Estimator:
        Exact to rounding; not finite where an entry is not.
    """
    found = [torch.empty_like(w), torch.empty_like(logit)]
    total = _library().fallow_eta_trick(
        w.data_ptr(), logit.data_ptr(), found[0].data_ptr(), found[1].data_ptr(), w.numel(), eps, strength
    )
    return total, found


def _library() -> Any:
    return library()

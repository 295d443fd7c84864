"""LogSum with its gradient, and AdaProx's step for it, in one pass over the weights (weights.h)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fallow.kernels._build import State, library

_transforms = torch._C._are_functorch_transforms_active
_modes = torch._C._len_torch_dispatch_stack
WORTH = 1 << 14  # the first call on so many weights builds the library


def logsum_total(w: Tensor, eps: float, factor: float) -> tuple[float, Tensor] | None:
    """``factor sum log(1 + |w| / eps)`` and its gradient, or None where the kernel does not apply.

    Estimator:
        As `fallow.sparsity.totals.logsum_and_gradient`; to rounding the same.
    """
    if not takes(w):
        return None
    gradient = torch.empty_like(w)
    total = State.library.fallow_logsum(w.data_ptr(), gradient.data_ptr(), w.numel(), eps, factor)  # pyright: ignore[reportOptionalMemberAccess]
    return (factor * total, gradient) if math.isfinite(total) else None


def logsum_prox(w: Tensor, eps: float, step: float, threshold: float) -> Tensor | None:
    """The prox of ``step log(|w| + eps)``, 0 up to the threshold; None where the kernel does not apply.

    Estimator:
        As `fallow.penalties.logarithmic.logsum_prox`; to rounding the same, for weights that are not NaN.
    """
    if not takes(w):
        return None
    out = torch.empty_like(w)
    State.library.fallow_logsum_prox(w.data_ptr(), out.data_ptr(), w.numel(), eps, step, threshold)  # pyright: ignore[reportOptionalMemberAccess]
    return out


def logsum_adaprox_(
    w: Tensor, eps: float, pull: float, second: Tensor | None, correction: float, offset: float
) -> bool:
    """``w <- w / (1 + step / (|w| (|w| + eps)))`` in place; whether it was done.

    Args:
        w: the weights.
        eps: of LogSum.
        pull: above 0; the step, or what is above ``sqrt(second) correction + offset`` in each weight's.
        second: like `w`, or None.
        correction: of the second moment's root.
        offset: added to it.
    """
    if not takes(w) or (second is not None and not (takes(second) and second.shape == w.shape)):
        return False
    if math.isnan(float(w.sum())):
        return False  # to be refused, or two infinities
    where = None if second is None else second.data_ptr()
    State.library.fallow_logsum_adaprox(w.data_ptr(), where, w.numel(), eps, pull, correction, offset)  # pyright: ignore[reportOptionalMemberAccess]
    torch.autograd.graph.increment_version(w)
    return True


def takes(w: Tensor, *, worth: bool = False) -> bool:
    """Whether memory is what the kernel reads, and nothing but the result is looked at.

    Args:
        w: what is read.
        worth: build the library for it, however small it is.
    """
    if type(w) not in (Tensor, nn.Parameter) or w.dtype != torch.float32 or w.device.type != "cpu":
        return False
    if w.layout != torch.strided or not w.is_contiguous() or torch.compiler.is_compiling():
        return False
    if _transforms() or _modes() or State.paused or torch._C._get_tracing_state() is not None:
        return False
    if has_tangent(w) or (not State.asked and not worth and w.numel() < WORTH):
        return False
    return library() is not None


def has_tangent(w: Tensor) -> bool:
    """Whether it is differentiated forward, which nodes of the graph that have only a backward refuse."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(w).tangent is not None

"""Closed forms for other laws of masks than blocks: those whose penalty is a nuclear and a Frobenius norm.

Where features and weights are free, the least of the regulariser of exchangeable masks for predictions A has
the form ``alpha |A|_*^2 + beta |A|_F^2``, with a negative beta where features are kept instead of each other.
With (2) of `fallow.penalties.minimiser` this covers every scheme that has a closed form.

References:
    Derived.
"""

from __future__ import annotations

import math

from torch import Tensor

from fallow.errors import UsageError
from fallow.penalties._forms import check_scheme, form_of
from fallow.penalties.minimiser import Minimiser, closed_form, effective_gamma, minimise
from fallow.schemes import Blocks, Exchangeable, FixedSize, Gaussian, Layer, Scheme, Units, odds

# By how much alpha + beta may be below 0 from rounding alone.
_ROUNDING = 1e-12


def closed_form_mixed(
    targets: Tensor, alpha: float, beta: float, inputs: Tensor | None = None, *, bias: bool = False
) -> Minimiser:
    """The global minimiser of ``|Y - A|_F^2 + alpha |A|_*^2 + beta |A|_F^2``.

    That of ``Y / (1 + beta)`` with ``alpha / (1 + beta)`` and blocks of 1: values m of the targets become
    ``(m - t) / (1 + beta)`` or 0, with ``t = alpha sum_{i <= rho} m_i / (1 + beta + alpha rho)``.

    Args:
        targets: Y, [N, outputs].
        alpha: At least 0.
        beta: Above -1; with a bias at least -alpha too, or predictions that the bias takes back would have
            a penalty of minus infinity.
        inputs: As in `closed_form`.
        bias: As in `closed_form`.

    Returns:
        As `closed_form`, with block_size 1 and alpha as gamma.

    Estimator:
        Exact; with alpha below -beta the objective is not a squared norm, but still convex.

    Raises:
        UsageError: targets or inputs that are not finite or do not fit, numbers outside these ranges.

    References:
        Derived.

    Examples:
        >>> import torch
        >>> closed_form_mixed(torch.diag(torch.tensor([4.0, 3.0, 0.5])), 0.5, 1.0).spectrum
        tensor([1.4167, 0.9167, 0.0000])
    """
    a, b = _number("alpha", alpha), _number("beta", beta)
    if a < 0 or b <= -1:
        raise UsageError(f"alpha must be at least 0 and beta above -1, got {alpha!r} and {beta!r}")
    if bias and a + b < -_ROUNDING * a:
        raise UsageError(
            f"with a bias beta must be at least -alpha, got alpha {alpha!r} and beta {beta!r}: there is no "
            "least value, since equal rows of the predictions would be rewarded and the bias take them back"
        )
    return minimise(targets, 1, a, b, inputs, bias)


def closed_form_of(
    targets: Tensor, scheme: Scheme, width: int, inputs: Tensor | None = None, *, bias: bool = False
) -> Minimiser:
    """What training a linear network of this width with masks of a scheme can reach under squared loss.

    The global minimiser over A of ``|Y - A|_F^2`` and the least of `omega` over all features G and weights W
    with ``G W^T = A`` (of blocks its convex envelope). With survival rate p, ``c = (1 - p) / p``, width d:

    - `Units`, `Gaussian`: ``c / d |A|_*^2``
    - `Blocks`, disjoint: ``c r / d |A|_(r)^2``
    - `Layer`: ``c |A|_F^2``
    - `Exchangeable`: ``c (1 - rho) / d |A|_*^2 + c rho |A|_F^2``
    - `FixedSize`: ``(d - s) / (s (d - 1)) (|A|_*^2 - |A|_F^2)``

    Args:
        targets: Y, [N, outputs].
        scheme: One of these.
        width: d, of the layer that is masked.
        inputs: As in `closed_form`.
        bias: As in `closed_form`.

    Returns:
        As `closed_form`; its `layers(width)` for this width attain the value.

    Estimator:
        Exact where the width is at least `reachable_width`, and else a bound from below.

    Raises:
        ArgumentError: no scheme.
        UsageError: a scheme without closed form, by name and with what there is instead; one that never keeps
            two features together; and as in `closed_form`.

    References:
        Derived; for `Units` Cavazza and others (2017).

    Examples:
        >>> import torch
        >>> from fallow.schemes import FixedSize
        >>> best = closed_form_of(torch.diag(torch.tensor([4.0, 3.0, 0.5])), FixedSize(4), 16)
        >>> best.kept, best.gamma, best.beta
        (2, 0.2, -0.2)
    """
    form = form_of(check_scheme(scheme), width)
    if isinstance(scheme, Blocks) and scheme.grid == "disjoint":
        rate, r = scheme.survival_rate, scheme.block_size
        gamma = effective_gamma(survival_rate=rate, width=width, block_size=r)
        return closed_form(targets, r, gamma, inputs, bias=bias)
    if isinstance(scheme, Layer):
        return closed_form(targets, width, odds(scheme.survival_rate), inputs, bias=bias)
    equal = not isinstance(scheme, Units) or isinstance(scheme.survival_rate, float)
    if not equal or not isinstance(scheme, Units | Gaussian | Exchangeable | FixedSize):
        raise UsageError(f"{_named(scheme)} has no closed form: {_instead(scheme)}")
    if form.block <= -1 + _ROUNDING:
        raise UsageError(
            f"{_named(scheme)} at a width of {width} has no unique minimiser: no two features are ever kept "
            "together; keep more of them"
        )
    return closed_form_mixed(targets, float(form.diagonal) / width, form.block, inputs, bias=bias)


def _named(scheme: Scheme) -> str:
    name = type(scheme).__name__
    if isinstance(scheme, Units):
        return f"{name} with unequal rates"
    return f'{name} with grid="{scheme.grid}"' if isinstance(scheme, Blocks) else name


def _instead(scheme: Scheme) -> str:
    if isinstance(scheme, Units):
        return "its penalty depends on how the spectrum majorises the rates; give all features one rate"
    if isinstance(scheme, Blocks):
        return (
            'the penalty of overlapping blocks is no function of two norms; that of grid="disjoint" is near'
        )
    return "its penalty is no function of two norms; minimise omega, of which kappa gives bounds"


def _number(name: str, value: object) -> float:
    number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not math.isfinite(number):
        raise UsageError(f"{name} must be a finite number, got {value!r}")
    return number

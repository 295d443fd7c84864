"""Masking of a residual branch's output: the form of stochastic depth that a module on its own can take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fallow.errors import ArgumentError, UsageError, check_choice, check_rate, refuse_unknown

_KEYWORDS = ("survival_rate", "mode", "training", "generator")


def drop_path(
    x: Tensor,
    *,
    survival_rate: float | None = None,
    mode: str = "row",
    training: bool = True,
    generator: torch.Generator | None = None,
    **unknown: Any,
) -> Tensor:
    """Zero in random rows, and the others times ``1 / survival_rate``.

    Formula: in training ``y = b x / p`` with b Bernoulli of mean p, one for each row or one for all; at
    evaluation, and at p = 1, y is x. Inside ``shortcut + drop_path(branch(shortcut))`` it has the law of
    `stochastic_depth` and saves none of its work: the branch has run when it is masked.

    Shape:
        x: (rows, ...); so is the result, in x's dtype.

    Args:
        x: the branch's output.
        survival_rate: p in (0, 1], the probability that a row is kept.
        mode: "row": one draw for each row; "batch": one for all.
        training: drop or not.
        generator: of the draws; None: torch's default one of x's device.
        unknown: refused, with the conversion for drop_prob= and the like.

    Returns:
        A new tensor; x itself at evaluation and at a rate of 1.

    Raises:
        RateError: a rate outside (0, 1].
        ArgumentError: an unknown keyword, or no rate.
        UsageError: a tensor without rows or of integers; another word than those above.

    Estimator:
        Unbiased, ``E[y] = x``, variance ``(1-p)/p x^2`` elementwise. The draws do not depend on x's dtype: in
        half precision p is not rounded, and 1/p is not rounded before the product.

    References:
        Huang et al. 2016, eq. 2, with the scale in training.

    Examples:
        >>> drop_path(torch.ones(100, 2), survival_rate=0.5).unique().tolist()
        [0.0, 2.0]
    """
    refuse_unknown("drop_path", unknown, _KEYWORDS)
    p = _checked("drop_path", survival_rate, mode)
    if x.dim() == 0 or not x.is_floating_point():
        raise UsageError(
            f"drop_path takes floating-point rows, (rows, ...), got {x.dtype} of shape {tuple(x.shape)}"
        )
    if not training or p == 1:
        return x
    shape = (x.shape[0] if mode == "row" else 1,) + (1,) * (x.dim() - 1)
    where = x.device if generator is None else generator.device
    kept = torch.empty(shape, device=where, dtype=torch.float32).bernoulli_(p, generator=generator)
    # not a product with the draw: in half precision 1/p would be rounded, and 0 times inf is NaN
    return torch.where(kept.to(x.device).bool(), x * (1 / p), 0)


def _checked(name: str, survival_rate: float | None, mode: str) -> float:
    check_choice("mode", mode, ("row", "batch"))
    if survival_rate is None:
        raise ArgumentError(f"{name} needs survival_rate, the probability in (0, 1] that a row is kept")
    return check_rate(survival_rate)


class DropPath(nn.Module):
    """The Module of `drop_path`.

    Args:
        survival_rate: p in (0, 1].
        mode: "row" or "batch".
        generator: of the draws; None: torch's default one.
        unknown: refused, with the conversion for drop_prob= and the like.

    Raises:
        RateError: a rate outside (0, 1].
        ArgumentError: an unknown keyword, or no rate.
        UsageError: another word than those above.

    Examples:
        >>> DropPath(survival_rate=0.9)
        DropPath(survival_rate=0.9, mode='row')
    """

    def __init__(
        self,
        *,
        survival_rate: float | None = None,
        mode: str = "row",
        generator: torch.Generator | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        refuse_unknown("DropPath", unknown, [k for k in _KEYWORDS if k != "training"])
        self.survival_rate = _checked("DropPath", survival_rate, mode)
        self.mode, self.generator = mode, generator

    def forward(self, x: Tensor) -> Tensor:
        """The rows, some of them zero while training."""
        return drop_path(
            x,
            survival_rate=self.survival_rate,
            mode=self.mode,
            training=self.training,
            generator=self.generator,
        )

    def extra_repr(self) -> str:
        """The rate and the mode."""
        return f"survival_rate={self.survival_rate}, mode={self.mode!r}"

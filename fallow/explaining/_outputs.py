"""A loss as a function of what a model puts out: its value, gradient and curvature there.

The output is a tensor or any tree of them. What counts are the floating tensors that the loss's gradient
reaches, a `Point`; every other leaf is that of the full network. A point is a list of tensors and stands for
the vector z of all of their elements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fallow.errors import RunError, UsageError
from fallow.feed import LossFunction, loss_of

Point = list[Tensor]

# Above so many numbers a loss in float64 takes more memory than its last digits are worth.
_MANY = 1 << 24


def inner(a: Point, b: Point) -> float:
    """<a, b>."""
    return float(sum((x * y).sum() for x, y in zip(a, b, strict=True)))


def minus(a: Point, b: Point) -> Point:
    """A - b."""
    return [x - y for x, y in zip(a, b, strict=True)]


def mixed(share: float, a: Point, b: Point) -> Point:
    """``share`` of a and the rest of b."""
    return [share * x + (1 - share) * y for x, y in zip(a, b, strict=True)]


class OutputLoss:
    """One batch's scalar loss as a function of the model's output.

    It is evaluated in float64 where the user's function takes that: the penalty is a small difference of
    losses.

    Attributes:
        used: numbers of the output's leaves that make up a point.
        full: the point of the output it was made with, the full network's.
        dtype: the dtype points are kept in; None: as the model puts them out.

    Raises:
        UsageError: the output has no floating tensor; the loss is no scalar, does not depend on the output,
            or is one that the model computed itself.
        RunError: the loss is not finite.
    """

    def __init__(self, loss_fn: LossFunction, output: Any, target: Any, where: str) -> None:
        self._loss_fn, self._where = loss_fn, where
        self._leaves, self._spec = tree_flatten(output)
        floats = [i for i, t in enumerate(self._leaves) if isinstance(t, Tensor) and t.is_floating_point()]
        if not floats:
            raise UsageError(
                f"{where}: the model's output holds no floating tensor ({type(output).__name__}): it must be "
                "a tensor, or a tuple, dict or ModelOutput of tensors"
            )
        tensors = [self._leaves[i] for i in floats]
        for dtype in self._dtypes(tensors):
            self.dtype, self._target = dtype, _cast(target, dtype)
            try:
                gradients = self._try(floats, tensors)
                break
            except Exception:
                if dtype is None:  # it does not take another dtype: only what it says of its own counts
                    raise
        self.used = [i for i, g in zip(floats, gradients, strict=True) if g is not None]
        self._refuse_own_loss(gradients)
        self.full = self.point(output)

    def _dtypes(self, tensors: Point) -> list[torch.dtype | None]:
        tries: list[torch.dtype | None] = []
        if sum(t.numel() for t in tensors) <= _MANY:
            tries.append(torch.float64)
        if any(t.dtype in (torch.float16, torch.bfloat16) for t in tensors):
            tries.append(torch.float32)
        return [*tries, None]

    def _try(self, floats: list[int], tensors: Point) -> list[Tensor | None]:
        xs = [_as(t, self.dtype).requires_grad_() for t in tensors]
        self.used = floats
        with torch.enable_grad():
            loss = self._tensor(xs)
        if not loss.requires_grad:
            return [None] * len(xs)
        return list(torch.autograd.grad(loss, xs, allow_unused=True))

    def _refuse_own_loss(self, gradients: list[Tensor | None]) -> None:
        if not self.used:
            raise UsageError(
                f"{self._where}: the loss does not depend on the model's output tensors: loss_fn(output, "
                "target) must compute it from the output, with operations that autograd follows"
            )
        if all(g is None or g.dim() == 0 for g in gradients):
            raise UsageError(
                f"{self._where}: the loss is one that the model computed itself, so how it bends over the "
                "output cannot be seen: compute it in loss_fn from the predictions (output.logits, say)"
            )

    @property
    def scalars(self) -> bool:
        """Whether part of the loss is a number that the model computed itself."""
        return any(self._leaves[i].dim() == 0 for i in self.used)

    def point(self, output: Any) -> Point:
        """The point of an output."""
        leaves, _ = tree_flatten(output)
        found = [leaves[i] if i < len(leaves) else None for i in self.used]
        for i, t in zip(self.used, found, strict=True):
            if not isinstance(t, Tensor) or t.shape != self._leaves[i].shape:
                raise RunError(
                    f"{self._where}: the model's output changes its form with the branches that rest: "
                    "such outputs cannot be averaged"
                )
        return [_as(t, self.dtype) for t in found if t is not None]

    def _tensor(self, point: Point, leaves: list[Any] | None = None) -> Tensor:
        leaves = list(self._leaves if leaves is None else leaves)
        for i, t in zip(self.used, point, strict=True):
            leaves[i] = t
        tree = tree_unflatten(leaves, self._spec)
        return loss_of(self._loss_fn, tree, self._target, self._where)

    @torch.no_grad()
    def of(self, output: Any) -> tuple[Point, float]:
        """The point of an output and the loss there, with all of that output's own leaves."""
        point = self.point(output)
        return point, float(self._tensor(point, tree_flatten(output)[0]))

    @torch.no_grad()
    def value(self, point: Point) -> float:
        """The loss at a point."""
        return float(self._tensor(point))

    def gradient(self, point: Point) -> Point:
        """The gradient of the loss at a point."""
        xs = [t.detach().clone().requires_grad_() for t in point]
        with torch.enable_grad():
            return list(torch.autograd.grad(self._tensor(xs), xs))

    def curvature(self, point: Point) -> Callable[[Point], Point]:
        """The map v -> H v, H the Hessian of the loss at a point.

        Raises:
            RuntimeError: now or when it is called, where autograd cannot differentiate the loss twice.
        """
        xs = [t.detach().clone().requires_grad_() for t in point]
        with torch.enable_grad():
            slopes = torch.autograd.grad(self._tensor(xs), xs, create_graph=True)
        bent = [i for i, g in enumerate(slopes) if g.requires_grad]

        def product(v: Point) -> Point:
            if not bent:
                return [torch.zeros_like(t) for t in xs]
            found = torch.autograd.grad(
                [slopes[i] for i in bent], xs, [v[i] for i in bent], retain_graph=True, allow_unused=True
            )
            return [torch.zeros_like(t) if h is None else h for h, t in zip(found, xs, strict=True)]

        return product

    def bregman(self, point: Point, at: Point) -> float:
        """The Bregman divergence D(point, at) = loss(point) - loss(at) - <grad loss(at), point - at>.

        For cross-entropy it is KL(softmax(at) || softmax(point)), free of labels; for a squared error
        the squared distance (derived, D1 and D4).
        """
        return self.value(point) - self.value(at) - inner(self.gradient(at), minus(point, at))


def _as(t: Tensor, dtype: torch.dtype | None) -> Tensor:
    t = t.detach()
    return t.clone() if dtype is None else t.to(dtype, copy=True)


def _cast(target: Any, dtype: torch.dtype | None) -> Any:
    if dtype is None:
        return target
    return tree_map(lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, target)

"""Second moments at a model's residual sums, recorded over forwards and backwards with gates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from fallow.errors import RunError, SiteError
from fallow.feed import LossFunction, loss_of
from fallow.surgery.branch import BranchState, Run
from fallow.surgery.tap import Taps, seed_of_graph


class Masks:
    """Gates of one forward: one number a row for each site, drawn where they are first asked for."""

    def __init__(self, rates: Mapping[str, float], scale: str, generator: torch.Generator) -> None:
        self.rates, self.scale, self.generator = rates, scale, generator
        self.drawn: dict[tuple[str, int], Tensor] = {}

    def gate(self, branch: BranchState, value: Tensor, dim: int) -> Tensor:
        """The value with its gate."""
        rate = self.rates[branch.site]
        if rate == 1:
            return value
        rows = 1 if branch.dim is None else value.shape[dim]
        key = branch.site, rows
        if key not in self.drawn:
            kept = torch.rand(rows, generator=self.generator, dtype=torch.float64) < rate
            self.drawn[key] = kept / (rate if self.scale == "train" else 1.0)
        shape = [1] * value.dim()
        shape[dim] = rows
        return value * self.drawn[key].to(value).reshape(shape)


class Recorder:
    """Second moments at every sum, summed over the batches of one draw.

    Attributes:
        forward: mean squares of the first shortcut and of each branch's sum, in the order they run.
        backward: squared norms of the gradients there; NaN where none came.
    """

    def __init__(self, taps: Taps, loss_fn: LossFunction) -> None:
        self.taps, self.loss_fn = taps, loss_fn
        self.first = taps.branches[0].name
        self.moments: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.grads: dict[str, float] = {}
        self.active: set[str] = set()  # branches seen to give something other than zeros

    def over(self, data: list[Any], masks: Masks | None) -> Recorder:
        """Run every batch, each with masks of its own."""
        for inputs, target in data:
            if masks is not None:
                masks.drawn.clear()
            inputs = tree_map(_with_gradient, inputs)
            output = self.taps.forward(inputs, self._decide(masks))
            loss_of(self.loss_fn, output, target, "signal_growth").backward()
        names = [b.name for b in self.taps.branches]
        for name in names:
            if name not in self.counts:
                raise SiteError(f"{name}: its residual sum was not reached: leave it out with exclude=")
            moment, grad = self.moments[name] / self.counts[name], self.grads.get(name, 0.0)
            if not (0 < moment < math.inf and grad < math.inf):
                raise RunError(
                    f"{name}: the mean square of its residual sum is {moment:g}, the squared norm of its "
                    f"gradient {grad:g}: growth is not defined there; check weights and inputs"
                )
            if grad == 0:
                came = "a gradient of zero" if name in self.grads else "no gradient"
                raise SiteError(
                    f"{name}: {came} reaches its residual sum: the loss must depend on it (is something "
                    "detached, or a head still at zero?), or leave the site out with exclude="
                )
        self.forward = [self.moments[n] / self.counts[n] for n in ("", *names)]
        if not 0 < self.forward[0] < math.inf:
            raise RunError(
                f"{self.first}: the mean square of its shortcut is {self.forward[0]:g}: growth is not "
                "defined there; check weights and inputs"
            )
        self.backward = [self.grads.get(n) or math.nan for n in ("", *names)]
        return self

    def _decide(self, masks: Masks | None) -> Callable[[BranchState], Run]:
        def gate(run: Run, value: Tensor) -> Tensor:
            if not value.requires_grad:
                value = value * seed_of_graph(value.device).to(value)
            return value if masks is None else masks.gate(run.branch, value, run.dim)

        def decide(branch: BranchState) -> Run:
            entered = hook = None
            if branch.name == self.first:  # a sum in place leaves nothing of its shortcut to put a hook on
                entered = self.taps.entered
                hook = self._hook("", entered)
            return Run(branch, 1.0, None, False, gate=gate, watch=partial(self._watch, entered, hook))

        return decide

    def _watch(
        self,
        entered: Tensor | None,
        hook: RemovableHandle | None,
        run: Run,
        shortcut: Tensor,
        value: Tensor | None,
        out: Tensor,
    ) -> None:
        name = run.branch.name
        if name not in self.active and value is not None and bool(value.detach().any()):
            self.active.add(name)
        if hook is not None and entered is not out:
            hook.remove()  # what the branch is entered with is not what the sum is written into
        if name == self.first and shortcut is not out:
            self._see("", shortcut)
        elif name == self.first and value is not None:
            self._add("", out.detach() - value.detach())
        self._see(name, out)

    def _see(self, name: str, tensor: Tensor) -> None:
        self._add(name, tensor.detach())
        self._hook(name, tensor)

    def _hook(self, name: str, tensor: Tensor) -> RemovableHandle | None:
        """Count the tensor's gradient under this name, once it comes."""

        def add(grad: Tensor) -> None:
            self.grads[name] = self.grads.get(name, 0.0) + _square(grad.detach())

        return tensor.register_hook(add) if tensor.requires_grad else None

    def _add(self, name: str, values: Tensor) -> None:
        self.moments[name] = self.moments.get(name, 0.0) + _square(values)
        self.counts[name] = self.counts.get(name, 0) + values.numel()


def _square(values: Tensor) -> float:
    """Sum of squares; not in half precision, which overflows at 65504."""
    return float(values.to(torch.promote_types(values.dtype, torch.float32)).square().sum())


def _with_gradient(leaf: Any) -> Any:
    """Floats ask for a gradient, so that it reaches the first shortcut even where that is the input."""
    if isinstance(leaf, Tensor) and leaf.is_floating_point():
        return leaf.detach().requires_grad_().clone()  # no leaf: the model may write into it
    return leaf

"""The reference that applied models must equal, written without `fallow.surgery`.

A dense copy of the model runs in full. A torch function mode watches the additions written in each module's
own code, finds the residual ones by the case's list, and multiplies the branch's operand by mask and scale,
where autograd sees it. BatchNorms of a branch, in training, are run on the kept rows and scattered back.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from casework import Case, Sum
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from fallow import Handle

_ADDITIONS = {"add", "__add__", "__radd__", "add_", "__iadd__"}


class Masking(TorchFunctionMode):
    """Masks the residual additions of a dense model; ``seen`` lists the sites whose sum was reached."""

    def __init__(
        self,
        model: nn.Module,
        sums: tuple[Sum, ...],
        masks: Mapping[str, Tensor],
        scales: Mapping[str, float],
    ) -> None:
        super().__init__()
        self.masks, self.scales = masks, scales
        self.sums = {(s.module, s.which): s for s in sums}
        self.norms = {n: s for s in sums for n in s.norms}
        self.stack: list[tuple[str, list[int]]] = []
        self.seen: list[str] = []
        self.hooks: list[Any] = []
        for name, module in model.named_modules():
            self.hooks.append(module.register_forward_pre_hook(lambda *_, name=name: self._enter(name)))
            self.hooks.append(module.register_forward_hook(lambda *_: self._leave()))

    def _enter(self, name: str) -> None:
        self.stack.append((name, [0]))

    def _leave(self) -> None:
        self.stack.pop()

    def __exit__(self, *error: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        where, count = self.stack[-1] if self.stack else ("", [0])
        if func.__name__ == "batch_norm" and where in self.norms and kwargs.get("training", _last_bool(args)):
            return self._norm(self.norms[where], func, args, kwargs)
        tensors = len(args) == 2 and all(isinstance(a, Tensor) and a.is_floating_point() for a in args)
        if func.__name__ not in _ADDITIONS or not tensors:
            return func(*args, **kwargs)
        count[0] += 1
        site = self.sums.get((where, count[0] - 1))
        if site is None:
            return func(*args, **kwargs)
        self.seen.append(site.site)
        pair = list(args)
        pair[site.branch] = self._masked(site, pair[site.branch])
        return func(*pair, **kwargs)

    def _masked(self, site: Sum, z: Tensor) -> Tensor:
        mask = self.masks.get(site.site, torch.tensor(True))
        shape = [1] * z.dim()
        if mask.dim():
            shape[site.dim] = mask.numel()
        return torch.where(mask.reshape(shape), z * self.scales.get(site.site, 1.0), z * 0.0)

    def _norm(self, site: Sum, func: Any, args: Any, kwargs: Any) -> Tensor:
        x, mask = args[0], self.masks.get(site.site, torch.tensor(True))
        index = mask.expand(x.shape[0]).nonzero().flatten()
        if not index.numel():
            return x.clone()  # masked away at the sum; an activation may write into it
        return torch.zeros_like(x).index_copy(0, index, func(x[index], *args[1:], **kwargs))


def _last_bool(args: Any) -> bool:
    return next((a for a in args if isinstance(a, bool)), False)


def dense_run(
    model: nn.Module, case: Case, feed: Any, masks: Mapping[str, Tensor], scales: Mapping[str, float]
) -> Any:
    """The reference's output; statistics of branches that rest stay where they were."""
    before = {name: b.clone() for name, b in model.named_buffers()}
    masking = Masking(model, case.sums, masks, scales)
    with masking:
        out = call(model, feed)
    assert masking.seen == [s.site for s in case.sums], "the table of cases does not fit the model"
    resting = {n for s in case.sums for n in s.norms if s.site in masks and not masks[s.site].any()}
    with torch.no_grad():
        for name, b in model.named_buffers():
            if name.rpartition(".")[0] in resting and not torch.equal(b, before[name]):
                b.copy_(before[name])
    return out


# --- running and comparing -------------------------------------------------------------------------------


def call(model: nn.Module, feed: Any) -> Any:
    return model(**feed) if isinstance(feed, dict) else model(*feed)


def cast(feed: Any, dtype: torch.dtype | None = None, requires_grad: bool = False) -> Any:
    """A copy of the inputs, floating ones in that dtype."""

    def one(t: Any) -> Any:
        if not (isinstance(t, Tensor) and t.is_floating_point()):
            return t
        return t.detach().to(dtype or t.dtype, copy=True).requires_grad_(requires_grad)

    return tree_map(one, feed)


def floats(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor) and t.is_floating_point()]


def backward(out: Any) -> None:
    """From a loss that weighs every output element differently."""
    loss = torch.zeros((), dtype=torch.float64)
    for t in floats(out):
        if t.requires_grad:
            weights = torch.cos(torch.arange(t.numel(), dtype=torch.float64) * 1.7 + 0.3).reshape(t.shape)
            loss = loss + (t.double() * weights).sum()
    loss.backward()


def grads(model: nn.Module, feed: Any) -> dict[str, Tensor | None]:
    found = {name: p.grad for name, p in model.named_parameters()}
    return {**found, **{f"input {i}": t.grad for i, t in enumerate(floats(feed))}}


def assert_close(
    ours: Tensor | None, theirs: Tensor | None, tolerance: float, what: str, floor: float = 0.0
) -> None:
    """Equal to ``tolerance`` of the largest element (of ``floor`` at least); no gradient counts as zeros."""
    if theirs is None:
        assert ours is None or not ours.any(), f"{what}: the reference has none"
        return
    ours = torch.zeros_like(theirs) if ours is None else ours.detach()
    theirs = theirs.detach()
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, (
        f"{what}: {ours.dtype} {tuple(ours.shape)}"
    )
    error, size = (
        float((ours - theirs).abs().max().nan_to_num(torch.inf)),
        max(float(theirs.abs().max()), floor),
    )
    assert error <= tolerance * size, f"{what}: off by {error:.3g} of {size:.3g}"


def assert_same_run(
    model: nn.Module, dense: nn.Module, case: Case, feed: Any, handle: Handle, tolerance: float, scale: float
) -> dict[str, Tensor]:
    """One training forward and backward of both; the masks that were drawn.

    Outputs, gradients of inputs and parameters, and buffers (running statistics) are compared.
    """
    mine, other = cast(feed, requires_grad=True), cast(feed, requires_grad=True)
    model.zero_grad(set_to_none=True)
    dense.zero_grad(set_to_none=True)
    ours = call(model, mine)
    masks = handle.masks()
    theirs = dense_run(dense, case, other, masks, dict.fromkeys((s.site for s in case.sums), scale))
    for i, (a, b) in enumerate(zip(floats(ours), floats(theirs), strict=True)):
        assert_close(a, b, tolerance, f"output {i}")
    backward(ours)
    backward(theirs)
    mine_grads, their_grads = grads(model, mine), grads(dense, other)
    total = max(float(g.abs().max()) for g in their_grads.values() if g is not None)
    for name, g in their_grads.items():
        # the floor: where the gradient is zero by symmetry (a bias before a norm) it is rounding errors alone
        assert_close(mine_grads[name], g, tolerance, f"gradient of {name}", floor=1e-3 * total)
    for (name, a), (_, b) in zip(model.named_buffers(), dense.named_buffers(), strict=True):
        assert_close(a.double(), b.double(), tolerance, f"buffer {name}")
    return masks


def pair(case: Case, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """The case's model twice."""
    model = case.model().to(dtype)
    return model, copy.deepcopy(model)

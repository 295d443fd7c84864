"""What each site costs, as a share of a whole dense training step.

The shares of all sites sum to f, the share of a step that can rest at all; the rest of the step (stem, head,
norms between blocks) is paid whatever rests.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fallow.errors import UsageError, check_choice
from fallow.feed import LossFunction, Pair, loss_of, pairs
from fallow.surgery.branch import BranchState, Run
from fallow.surgery.tap import Taps, tapped

KINDS = ("flops", "time", "memory", "count")
_REPEATS = 5


def costs(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction | None = None,
    *,
    kind: str = "flops",
    granularity: str = "branch",
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> dict[str, float]:
    """Cost of each site, as a share of a dense training step.

    Kinds:
        "flops": floating-point operations of forward and backward, counted (torch's counter);
        "time": seconds of forward and backward, measured; the median of a few steps on the first batch;
        "memory": bytes kept for backward, counted on the first batch;
        "count": ``1/L``, every site alike, so that a budget is a mean survival rate.

    Args:
        model: any model with residual branches; it is left as it was.
        batches: as in `fallow.plan`; the first is used.
        loss_fn: for "time"; None: the sum of the outputs.
        kind: as above.
        granularity: as in `fallow.sites`.
        include: as in `fallow.sites`.
        exclude: as in `fallow.sites`.

    Returns:
        Share by site, in site order. Their sum is the share of a step that can rest.

    Raises:
        SiteError: a model without sites.
        UsageError: an unknown kind; no batch.

    Estimator:
        "flops", "memory" and "count" are exact for the batch's shapes. "time" is a measurement: the clock is
        read where a branch is entered and where its sum is made, forward and backward; branches that run side
        by side in one block share their time roughly. The optimiser's step is not in it.
    """
    check_choice("kind", kind, KINDS)
    found = pairs(model, batches, 1, "costs")
    with tapped(model, found[0][0], granularity=granularity, include=include, exclude=exclude) as taps:
        return measure(taps, kind, found[0], loss_fn)


def measure(taps: Taps, kind: str, batch: Pair, loss_fn: LossFunction | None = None) -> dict[str, float]:
    """`costs` of a model that is open for trials."""
    if kind == "flops":
        return taps.costs
    if kind == "count":
        return {site.name: 1 / len(taps.sites) for site in taps.sites}
    return _memory(taps, batch) if kind == "memory" else _time(taps, batch, loss_fn)


# --- memory ----------------------------------------------------------------------------------------------


def _memory(taps: Taps, batch: Pair) -> dict[str, float]:
    """Bytes that the operations of each branch keep for backward, shares of all that is kept."""
    held: dict[int, Tensor] = {}  # keeps every storage alive, so that no address is used twice
    owners = {t.untyped_storage()._cdata for t in (*taps.model.parameters(), *taps.model.buffers())}
    by_site = {site.name: 0 for site in taps.sites}
    total, inside = 0, list[str]()

    def pack(t: Tensor) -> Tensor:
        nonlocal total
        storage = t.untyped_storage()
        if storage._cdata not in held and storage._cdata not in owners:
            held[storage._cdata] = t.detach()
            total += storage.nbytes()
            if inside:
                by_site[inside[-1]] += storage.nbytes()
        return t

    def leave(run: Run, *_: Any) -> None:
        inside.remove(run.branch.site)

    def decide(branch: BranchState) -> Run:
        inside.append(branch.site)
        return Run(branch, 1.0, None, False, watch=leave)

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = taps.forward(batch[0], decide)
    del output
    if not total:
        raise UsageError(
            'cost="memory": the forward keeps nothing for a backward; are all parameters frozen?'
        )
    return {name: kept / total for name, kept in by_site.items()}


# --- time ------------------------------------------------------------------------------------------------


class _Clock:
    """Seconds by site of one step."""

    def __init__(self, taps: Taps) -> None:
        self.device = next((p.device for p in taps.model.parameters()), torch.device("cpu"))
        self.taps = taps
        self.seconds = {site.name: 0.0 for site in taps.sites}

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.process_time()  # of this process: other work on the machine does not count

    def decide(self, branch: BranchState) -> Run:
        """Read the clock where the branch is entered, where its sum is made, and on the way back."""
        begun, site = self.now(), branch.site
        back: list[float] = []
        entered = self.taps.entered
        if entered.requires_grad:

            def leave(_grad: Tensor) -> None:
                if back:
                    self.seconds[site] += self.now() - back.pop()

            entered.register_hook(leave)

        def summed(_run: Run, _shortcut: Tensor, _value: Tensor | None, out: Tensor) -> None:
            forward = self.now() - begun
            self.seconds[site] += forward
            if entered.requires_grad and out.requires_grad:
                out.register_hook(lambda _grad: back.append(self.now()))
            else:  # nothing to read the clock at: a backward is two forwards
                self.seconds[site] += 2 * forward

        return Run(branch, 1.0, None, False, watch=summed)


def _time(taps: Taps, batch: Pair, loss_fn: LossFunction | None) -> dict[str, float]:
    shares: dict[str, list[float]] = {site.name: [] for site in taps.sites}
    with _training(taps.model), torch.enable_grad():
        for repeat in range(_REPEATS + 1):
            clock = _Clock(taps)
            begun = clock.now()
            output = taps.forward(batch[0], clock.decide)
            loss = _sum(output) if loss_fn is None else loss_of(loss_fn, output, batch[1], "costs")
            loss.backward()
            whole = clock.now() - begun
            if repeat:  # the first pays for what later ones find ready
                for name, seconds in clock.seconds.items():
                    shares[name].append(seconds / whole)
    medians = {name: sorted(values)[len(values) // 2] for name, values in shares.items()}
    total = sum(medians.values())
    return {n: v / total for n, v in medians.items()} if total > 1 else medians


def _sum(output: Any) -> Tensor:
    found = [t.float().sum() for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
    if not found:
        raise UsageError('cost="time": the output does not depend on any parameter; are all of them frozen?')
    return torch.stack(found).sum()


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """In training mode inside; buffers and generators are restored by whoever opened the model."""
    model.train()
    try:
        yield
    finally:
        model.eval()
        for p in model.parameters():
            p.grad = None

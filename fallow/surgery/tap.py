"""Try a model out branch by branch, in eval mode, and leave it as it was.

What planning and explaining measure, they measure here: inside `tapped`, a function decides what each branch
does in each forward (run, rest, be gated, be watched), and afterwards weights, gradients, buffers, training
flags and random number generators are as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fallow.errors import ArgumentError, SiteError, check_choice
from fallow.feed import call_model
from fallow.surgery import probe
from fallow.surgery.branch import BranchState, Run
from fallow.surgery.decide import Entry, Options
from fallow.surgery.handle import Handle, handle_of
from fallow.surgery.site import Site
from fallow.surgery.survey import bind, matches, patterns, refuse_unmatched, survey

Decide = Callable[[BranchState], Run | None]


class Taps:
    """A model whose branches do as they are told; made by `tapped`.

    Attributes:
        model: the model, in eval mode.
        sites: those asked for, in the order they run.
        branches: the branches of these sites, in the order they run.
        entered: what the branch being decided on is entered with.
    """

    entered: Tensor

    def __init__(self, model: nn.Module, handle: Handle, sites: list[Site]) -> None:
        self.model, self._handle, self.sites = model, handle, sites
        names = {site.name for site in sites}
        self.branches = sorted((b for n in names for b in handle.branches(n)), key=lambda b: b.order)

    @property
    def costs(self) -> dict[str, float]:
        """Share of a dense training step's FLOPs by site."""
        return {site.name: site.cost for site in self.sites}

    def forward(self, inputs: Any, decide: Decide | None = None) -> Any:
        """The model's output where ``decide`` says what each branch does; without it, of the full network."""
        mine = {b.name for b in self.branches}

        def chosen(branch: BranchState, entry: Entry) -> Run | None:
            self.entered = entry[0]
            return decide(branch) if decide is not None and branch.name in mine else None

        with self._handle.deciding(chosen), self._handle.dense(), probe.by_modules():
            return call_model(self.model, inputs)


def gated(branch: BranchState, gate: Tensor | float) -> Run | None:
    """A run whose branch is multiplied by a number, or by one number for each row.

    A number of 0 rests the branch, 1 leaves it alone.
    """
    if not isinstance(gate, Tensor):
        if gate == 1:
            return None
        return Run(branch, float(gate), None, gate == 0)
    factor = gate

    def multiply(run: Run, value: Tensor) -> Tensor:
        shape = [1] * value.dim()
        shape[run.dim] = factor.numel()
        return value * factor.to(value).reshape(shape)

    return Run(branch, 1.0, None, False, gate=multiply)


@contextmanager
def tapped(
    model: nn.Module,
    example: Any,
    *,
    granularity: str = "branch",
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> Iterator[Taps]:
    """Open a model for trials.

    A model that has a handle is tried through it, with its sites and its granularity.

    Args:
        model: any module with residual branches.
        example: as in `fallow.sites`.
        granularity: as in `fallow.sites`.
        include: as in `fallow.sites`.
        exclude: as in `fallow.sites`.

    Raises:
        SiteError: it has no site that can rest; a pattern matches none.
        ArgumentError: it is no module.
        UsageError: an unknown granularity.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_choice("granularity", granularity, ("branch", "block"))
    handle = handle_of(model)
    own = handle is None
    if handle is None:
        found = survey(model, example, granularity, patterns(include), patterns(exclude))
        sites = list(found.sites)
        handle = Handle(model, list(sites), found.branches, bind(model, found.branches), Options(), None)
    else:
        sites = _matching(handle.sites, patterns(include), patterns(exclude))
    if not sites:
        raise SiteError("no residual site that can rest was found in this model; see fallow.sites(...)")
    grads = [(p, p.grad) for p in model.parameters()]
    try:
        inference = torch.is_inference_mode_enabled()
        with probe.undisturbed(model), torch.inference_mode(False) if inference else nullcontext():
            model.eval()
            for p, _ in grads:
                p.grad = None  # or a backward would add to what is there
            # What only holds the applied model (AveragedModel, DistributedDataParallel) is looked through.
            whole = handle.model if getattr(model, "module", None) is handle.model else model
            yield Taps(whole, handle, sites)
    finally:
        for p, grad in grads:
            p.grad = grad
        if own:
            handle.remove()


@contextmanager
def inputs_only(model: nn.Module) -> Iterator[None]:
    """Inside, gradients flow through the model's activations and none to its parameters."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for p in wanted:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)


def seed_of_graph(device: torch.device) -> Tensor:
    """A one that requires a gradient: multiplied in, it starts a graph where nothing else would."""
    return torch.ones((), device=device, requires_grad=True)


def _matching(
    sites: list[Site], include: tuple[str, ...] | None, exclude: tuple[str, ...] | None
) -> list[Site]:
    refuse_unmatched([s.name for s in sites], include, exclude)
    return [s for s in sites if matches(s.name, include, exclude)]

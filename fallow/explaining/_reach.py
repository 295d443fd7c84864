"""Gradients at the residual sums: what the output's curvature is along each branch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fallow.errors import SiteError
from fallow.explaining._outputs import OutputLoss, Point
from fallow.surgery.branch import BranchState, Run
from fallow.surgery.tap import Taps, inputs_only, seed_of_graph

Pull = Callable[[Point], dict[str, Tensor]]


@contextmanager
def reached(taps: Taps, inputs: Any, loss: OutputLoss, sites: list[str]) -> Iterator[Pull]:
    """One forward of the full network, and a function that pulls vectors at its output back to the sites.

    ``pull(u)`` is, for each site l, s_l = <J_l' u, branch value>: one number a sample where the batch
    dimension of the branch is known, else their sum. It equals the gradient of <u, z> by a gate, one a
    sample, that multiplies the branch (derived, D23).

    Raises:
        SiteError: the loss's gradient does not reach the sum of a site.
    """
    device = loss.full[0].device
    seed = seed_of_graph(device)
    found: dict[str, Tensor] = {}
    whole = {b.site for b in taps.branches if b.dim is None}

    def start(_run: Run, value: Tensor) -> Tensor:
        return value if value.requires_grad else value * seed.to(value)

    def watch(run: Run, _shortcut: Tensor, value: Tensor | None, out: Tensor) -> None:
        if value is None or not out.requires_grad:
            return
        site, branch, dim = run.branch.site, _wide(value.detach()), run.dim

        def note(gradient: Tensor) -> None:
            product = _wide(gradient) * branch
            s = product.sum() if site in whole else product.movedim(dim, 0).flatten(1).sum(1)
            found[site] = found[site] + s if site in found else s

        out.register_hook(note)

    def decide(branch: BranchState) -> Run | None:
        return Run(branch, 1.0, None, False, gate=start, watch=watch) if branch.site in sites else None

    plain = tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, inputs)
    with torch.enable_grad(), inputs_only(taps.model):
        leaves = tree_leaves(taps.forward(plain, decide))
        ends = [leaves[i] for i in loss.used]

        def pull(cotangent: Point) -> dict[str, Tensor]:
            found.clear()
            pairs = [(t, u.to(t)) for t, u in zip(ends, cotangent, strict=True) if t.requires_grad]
            if pairs:
                torch.autograd.backward(*map(list, zip(*pairs, strict=True)), retain_graph=True)
            seed.grad = None
            return dict(found)

        there = pull(loss.gradient(loss.full))
        missing = [name for name in sites if name not in there]
        if missing:
            raise SiteError(
                f"{missing[0]}: the loss's gradient does not reach this site"
                + (f" (nor {len(missing) - 1} others)" if len(missing) > 1 else "")
                + ": its output is detached, or the loss does not use it. Leave it out with "
                f'exclude="{missing[0]}"'
            )
        yield pull


def _wide(t: Tensor) -> Tensor:
    """Half precision as float32: sums over a whole branch would lose it."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t

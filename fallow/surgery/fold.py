"""Multiply survival rates into the weights: ``x + p f(x)`` becomes ``x + f'(x)``, a plain model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fallow.errors import SiteError
from fallow.surgery.found import Branch

_HINT = "Leave it at rate 1 to fold the others, or export the applied model as it is."


def fold(model: nn.Module, found: Mapping[str, list[Branch]], rates: Mapping[str, float]) -> None:
    """Scale the last affine map of every branch whose rate is below 1, in place; all or nothing.

    Formula: for ``f = h(A g(x) + c)`` with h positively homogeneous, ``p f = h(pA g(x) + pc)``.

    Raises:
        SiteError: a branch that does not end in an affine map, or whose last one is used elsewhere too.
    """
    modules = dict(model.named_modules())
    plan: list[tuple[Tensor, float]] = []
    for site, branches in found.items():
        if rates[site] == 1:
            continue
        for branch in branches:
            plan += [(t, rates[site]) for t in _last_affine(modules, branch)]
    if len({id(t) for t, _ in plan}) != len(plan):
        raise SiteError(f"two sites end in the same weights, so neither can be folded. {_HINT}")
    with torch.no_grad():
        for tensor, rate in plan:
            tensor.mul_(rate)


def _last_affine(modules: dict[str, nn.Module], branch: Branch) -> list[Tensor]:
    if branch.end is None:
        raise SiteError(f"{branch.name}: its branch does not end in an affine map or a layer scale. {_HINT}")
    tensors = []
    for name in branch.end:
        owner, _, leaf = name.rpartition(".")
        tensors.append(getattr(modules[owner], leaf))
    return tensors

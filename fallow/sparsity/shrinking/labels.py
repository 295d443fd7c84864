"""Labels: which elements of which tensors can only go together.

Every index of every parameter gets a label. A tensor carries its labels in layers: integer tensors of its own
number of dimensions, with size 1 where the label does not vary; an element goes where the label of any layer
goes. Operations tie labels (residual addition: channel j of one operand and of the other), views rearrange
them, and what cannot lose an index freezes its labels, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Layers = list[Tensor]


class Labels:
    """A union-find forest over integers, some of whose trees are frozen."""

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.why: dict[int, str] = {}  # frozen root -> reason

    def fresh(self, count: int) -> Tensor:
        """New labels, each alone."""
        start = len(self.parent)
        self.parent.extend(range(start, start + count))
        return torch.arange(start, start + count)

    def find(self, label: int) -> int:
        """The root of a label's tree."""
        parent = self.parent
        root = label
        while parent[root] != root:
            root = parent[root]
        while parent[label] != root:
            parent[label], label = root, parent[label]
        return root

    def roots(self, labels: Tensor) -> Tensor:
        """The root of each label, in the same shape."""
        distinct, inverse = torch.unique(labels, return_inverse=True)
        return torch.tensor([self.find(i) for i in distinct.tolist()], dtype=torch.long)[inverse]

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Make the labels of `a` go with those of `b`, element by element (broadcast)."""
        a, b = torch.broadcast_tensors(a, b)
        pairs = torch.stack([self.roots(a).flatten(), self.roots(b).flatten()], 1)
        for one, other in torch.unique(pairs[pairs[:, 0] != pairs[:, 1]], dim=0).tolist():
            one, other = self.find(one), self.find(other)
            if one == other:
                continue
            self.parent[other] = one
            reason = self.why.pop(other, None)
            if reason is not None:
                self.why.setdefault(one, reason)

    def freeze(self, labels: Tensor, why: str) -> None:
        """These stay, and so does what is tied to them; the first reason given counts."""
        for root in torch.unique(self.roots(labels)).tolist():
            self.why.setdefault(root, why)

    def frozen(self, root: int) -> str | None:
        """Why a root stays whatever its weights are; None where it does not."""
        return self.why.get(root)


def support(layer: Tensor) -> tuple[int, ...]:
    """The dimensions along which a layer's labels vary."""
    return tuple(d for d, n in enumerate(layer.shape) if n > 1)


def along(layers: Layers, dims: Iterable[int]) -> Tensor | None:
    """The layer whose labels vary along exactly these dimensions, as it is."""
    wanted = tuple(sorted(dims))
    return next((layer for layer in layers if support(layer) == wanted), None)


def vector(labels: Tensor, dim: int, ndim: int) -> Tensor:
    """One label for each index of `dim`, as a layer of `ndim` dimensions."""
    return labels.reshape([-1 if d == dim else 1 for d in range(ndim)])


def aligned(layers: Layers, ndim: int) -> Layers:
    """The layers as broadcasting sees them: dimensions of size 1 in front."""
    return [layer.reshape([1] * (ndim - layer.dim()) + list(layer.shape)) for layer in layers]


def reduced(labels: Labels, layers: Layers, dims: Iterable[int], why: str) -> Layers:
    """What is left of the layers after an operation that mixes the elements along `dims`.

    Labels that vary along `dims` alone are frozen. Where they vary along others too, the slab of each other
    index can still go as a whole: it is tied together.
    """
    mixed, out = set(dims), []
    for layer in layers:
        inside = [d for d in support(layer) if d in mixed]
        if not inside:
            out.append(layer)
        elif len(inside) == len(support(layer)):
            labels.freeze(layer, why)
        else:
            first = layer
            for d in inside:
                first = first.narrow(d, 0, 1)
            labels.tie(layer, first)
            out.append(first)
    return out


def reshaped(labels: Labels, layers: Layers, old: Sequence[int], new: Sequence[int]) -> Layers:
    """The layers of a tensor of shape `old` that is viewed in shape `new`."""
    groups = _groups(old, new)
    out: Layers = []
    for layer in layers:
        varies = support(layer)
        full, shape = list(layer.shape), [1] * len(new)
        for before, after in groups:
            if any(d in varies for d in before):
                for d in before:
                    full[d] = old[d]
                for d in after:
                    shape[d] = new[d]
        viewed = labels.roots(layer.expand(full).reshape(shape))
        for d in range(len(new)):  # repeated along a dimension: it does not vary there
            first = viewed.narrow(d, 0, 1)
            if viewed.shape[d] > 1 and bool((viewed == first).all()):
                viewed = first
        out.append(viewed)
    return out


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The shortest runs of dimensions of equal product, old beside new."""
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        before, after, p, q = [], [], 1, 1
        while True:
            if i < len(old) and (p < q or not before or (p == q and old[i] == 1)):
                before.append(i)
                p, i = p * old[i], i + 1
            elif j < len(new) and (q < p or not after or (p == q and new[j] == 1)):
                after.append(j)
                q, j = q * new[j], j + 1
            else:
                break
        groups.append((before, after))
    return groups

"""Decide which units go: the largest set that leaves the model's outputs as they are.

A unit is a set of tied labels. Start with all that are not frozen and take back, until nothing changes, each
one that a kept output still reads (with a weight that is not zero, and a value that is no constant that can
be folded), and each one whose going would leave a tensor that is not rectangular, or empty.

Constants that nothing takes (no bias; padding) are added up by one channel: a constant that stays carries the
others' weights in proportion.

A unit taken back only because of the shape of a tensor, which no kept output reads, becomes a blank: its
place stays, but what it holds does not matter, so that its own inputs can still go.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fallow.sparsity.shrinking.facts import Grouped, Record, Site
from fallow.sparsity.shrinking.labels import support

_EMPTY = "would be empty"


@dataclass
class Decision:
    """Which roots go, and why others stay."""

    record: Record
    gone: Tensor  # (roots,) bool
    blank: Tensor  # (roots,) bool: stays for its place alone
    why: dict[int, str] = field(default_factory=dict)
    carriers: dict[int, int] = field(default_factory=dict)  # site -> the input that carries constants

    def goes(self, labels: Tensor) -> Tensor:
        """Whether each label goes."""
        roots = self.record.labels.roots(labels)
        return torch.where(roots >= 0, self.gone[roots.clamp(min=0)], False)


class Solver:
    """Holds what goes so far, and takes units back."""

    def __init__(
        self, record: Record, extra: Mapping[int, str], carriers: Mapping[int, int] | None = None
    ) -> None:
        self.record, self.labels = record, record.labels
        count = len(self.labels.parent)
        self.gone = torch.ones(count, dtype=torch.bool)
        self.blank = torch.zeros(count, dtype=torch.bool)
        self.why: dict[int, str] = dict(self.labels.why)
        self.why.update({self.labels.find(label): reason for label, reason in extra.items()})
        self.gone[list(self.why)] = False
        self.sites = [(s, self._roots(s.inside), self._roots(s.outside)) for s in record.sites]
        self.changed = False
        self.carriers: dict[int, int] = dict(carriers or {})
        for number, carrier in self.carriers.items():
            site, inside, _ = self.sites[number]
            self.demote(int(inside[carrier]), _reason(site, carrier))

    def _roots(self, labels: Tensor) -> Tensor:
        return torch.where(labels >= 0, self.labels.roots(labels.clamp(min=0)), -1)

    def stays(self, roots: Tensor) -> Tensor:
        """Whether what these roots hold matters; -1 always does."""
        free = self.gone | self.blank
        return torch.where(roots >= 0, ~free[roots.clamp(min=0)], True)

    def read(self) -> Tensor:
        """Roots that some kept output reads with a weight that is not zero."""
        found = torch.zeros_like(self.gone)
        for site, inside, outside in self.sites:
            reads = site.used[self.stays(outside)].any(0) & (inside >= 0)
            found[inside[reads]] = True
        return found

    def demote(self, root: int, why: str) -> None:
        """What this unit holds matters after all."""
        if self.gone[root] or self.blank[root]:
            self.gone[root] = self.blank[root] = False
            self.why.setdefault(root, why)
            self.changed = True

    def hold(self, root: int, why: str, read: Tensor) -> None:
        """Its place must stay."""
        if read[root]:
            self.demote(root, why)
        elif self.gone[root]:
            self.gone[root], self.blank[root], self.changed = False, True, True
            self.why.setdefault(root, why)

    # --- what takes units back ------------------------------------------------------------------------
    def sums(self) -> None:
        """Units that kept outputs read."""
        again = True
        while again:
            again = False
            for number, (site, inside, outside) in enumerate(self.sites):
                reads = site.used[self.stays(outside)].any(0) & (inside >= 0)
                at = inside.clamp(min=0)
                bad = reads & self.gone[at] & ~_harmless(site)
                if site.matrix is not None:
                    bad &= ~self._carried(number, bad, self.stays(inside))
                bad |= reads & self.blank[at]
                for i in bad.nonzero().flatten().tolist():
                    self.demote(int(inside[i]), _reason(site, i))
                    again = True

    def _carried(self, number: int, bad: Tensor, stays: Tensor) -> Tensor:
        """Which of the bad inputs a carrier takes; the first call that needs one chooses it."""
        site = self.record.sites[number]
        size = site.constant.abs().nan_to_num(0.0)
        if number not in self.carriers:
            if not bool((bad & (size > 0)).any()):
                return torch.zeros_like(bad)
            # one that stays anyway, unless it is so small that it would magnify rounding
            best = int((size * stays).argmax())
            if size[best] * stays[best] < 1e-2 * (size * bad).max():
                best = int((size * bad).argmax())
            self.carriers[number] = best
        carried = bad & (size > 0)
        carried[self.carriers[number]] = False
        return carried

    def groups(self) -> None:
        """Grouped convolutions keep the same number in each group."""
        for item in self.record.grouped:
            self._equal(item)

    def _equal(self, item: Grouped) -> None:
        ins, outs = self._roots(item.inside), self._roots(item.outside)
        away_in, away_out = self.gone[ins], self.gone[outs]
        whole = away_in.all(1) & away_out.all(1)
        read, why = self.read(), f"{item.name} needs the same number in each of its groups"
        for roots, away in ((ins, away_in), (outs, away_out)):
            if bool(whole.all()):
                continue
            least = min(int(away[~whole].sum(1).min()), roots.shape[1] - 1)
            for row, gone in zip(roots[~whole], away[~whole], strict=True):
                surplus = int(gone.sum()) - least
                for root in row[gone].tolist()[:surplus]:
                    self.hold(root, why, read)

    def rectangles(self) -> None:
        """Where a view gave several dimensions labels together, only whole slabs can go."""
        for name, layer in self.record.slabs:
            mask = self.gone[self.labels.roots(layer)]
            if not bool(mask.any()):
                continue
            covered = torch.zeros_like(mask)
            for dim in support(layer):
                covered |= slabs(mask, dim).reshape([-1 if d == dim else 1 for d in range(mask.dim())])
            torn = torch.unique(self.labels.roots(layer)[mask & ~covered]).tolist()
            read = self.read() if torn else mask
            for root in torn:
                self.hold(root, f"a tensor is reshaped in {name}, where only whole slabs can go", read)

    def cuts(self) -> None:
        """Tensors taken apart by numbers."""
        for item in self.record.pieces:
            roots = self.labels.roots(item.layer)
            full = slabs(self.gone[roots], item.dim)
            pieces = full.reshape(-1, item.size).sum(1)
            if (
                not bool(full.any())
                or bool(full.all())
                or (not item.whole and bool((pieces == pieces[0]).all()))
            ):
                continue
            read, why = self.read(), f"{item.name} takes the tensor apart by numbers"
            allowed = 0 if item.whole else int(pieces.min())
            by_index = roots.movedim(item.dim, 0).reshape(len(full), -1)
            for start in range(0, len(full), item.size):
                lost = [i for i in range(start, start + item.size) if full[i]]
                for i in lost[: len(lost) - allowed]:
                    self.hold(int(by_index[i, 0]), why, read)

    def empties(self) -> None:
        """A tensor keeps one index of each dimension: one that is not read if there is, else a small one."""
        sizes: Counter[int] = Counter()
        for name, info in self.record.leaves.items():
            for layer in info.layers:
                roots = self.labels.roots(layer).flatten()
                if not bool(self.gone[roots].all()):
                    continue
                sizes = sizes or self._sizes()
                read = self.read()
                best = min(torch.unique(roots).tolist(), key=lambda r, s=sizes, n=read: (bool(n[r]), s[r], r))
                self.hold(best, f"{name} {_EMPTY}", read)

    def _sizes(self) -> Counter[int]:
        sizes: Counter[int] = Counter()
        for info in self.record.leaves.values():
            for layer in info.layers:
                sizes.update(self.labels.roots(layer).flatten().tolist())
        return sizes

    def solve(self) -> Decision:
        """Take units back until nothing changes; then let the blanks go that what stays made needless."""
        blanks = -1
        while True:
            self._settle()
            if int(self.blank.sum()) in (0, blanks):
                return Decision(self.record, self.gone, self.blank, self.why, self.carriers)
            blanks = int(self.blank.sum())
            for root in self.blank.nonzero().flatten().tolist():
                self.why.pop(root, None)
            self.gone, self.blank = self.gone | self.blank, torch.zeros_like(self.blank)

    def _settle(self) -> None:
        while True:
            self.changed = False
            self.sums()
            for step in (self.groups, self.rectangles, self.cuts, self.empties):
                step()
                if self.changed:
                    break
            if not self.changed:
                return

    def better_carriers(self) -> dict[int, int]:
        """Constants that stay for other reasons, where one that need not stay was chosen."""
        found: dict[int, int] = {}
        for number, carrier in self.carriers.items():
            site, inside, _ = self.sites[number]
            present = (inside >= 0) & ~self.gone[inside.clamp(min=0)]
            present[carrier] = False
            size = site.constant.abs().nan_to_num(0.0) * present
            if bool(size.any()) and size.max() >= 1e-2 * site.constant[carrier].abs():
                found[number] = int(size.argmax())
        return found


def slabs(mask: Tensor, dim: int) -> Tensor:
    """For each index of `dim`, whether the whole slab at it is set."""
    return mask.movedim(dim, 0).reshape(mask.shape[dim], -1).all(1)


def _harmless(site: Site) -> Tensor:
    """Inputs that can go although they are read: zeros, and constants that something takes."""
    zero = site.constant == 0
    return zero | ~site.constant.isnan() if site.target is not None and site.folds else zero


def _reason(site: Site, i: int) -> str:
    if not site.seen[i]:
        return f"read by {site.name}"
    if site.constant[i].isnan():
        return f"a constant that differs between positions where {site.name} reads it"
    why = "has no bias that takes it" if site.folds else "adds it up differently from place to place"
    return f"a constant, and {site.name} {why}" + ("" if site.matrix is None else "; it carries all such")


def decide(record: Record, extra: Mapping[int, str]) -> Decision:
    """The largest set of units that can go.

    Args:
        record: of a run.
        extra: labels that must stay besides, with reasons.
    """
    solver = Solver(record, extra)
    best = solver.solve()
    if solver.carriers:
        again = Solver(record, extra, {**solver.carriers, **solver.better_carriers()})
        best = _larger(best, again.solve())
    if any(why.endswith(_EMPTY) for why in best.why.values()):
        # what stayed later for other reasons may already keep that tensor from being empty
        others = {r: why for r, why in best.why.items() if not best.blank[r] and not why.endswith(_EMPTY)}
        best = _larger(best, Solver(record, {**others, **extra}, best.carriers).solve())
    return best


def _larger(one: Decision, other: Decision) -> Decision:
    return other if int(other.gone.sum()) > int(one.gone.sum()) else one

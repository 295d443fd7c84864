"""What a decision removed, and what is dead or constant and stays all the same."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from fallow.sparsity.shrinking.decide import Decision, Solver


@dataclass(frozen=True)
class Left:
    """Units of one layer that are zero or constant, yet stay."""

    name: str
    count: int
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.count} dead or constant, kept: {self.reason}"


def removed(decision: Decision) -> dict[str, int]:
    """For each layer that lost outputs, how many."""
    found: dict[str, int] = {}
    for site in decision.record.sites:
        outside = site.outside[site.outside >= 0]
        count = int(decision.goes(outside).sum()) if len(outside) else 0
        if count:
            found[site.name] = count
    return found


def left_over(decision: Decision) -> list[Left]:
    """Units that are constant as they are computed, or that nothing kept reads, and that stay."""
    labels, solver = decision.record.labels, Solver(decision.record, {})
    solver.gone, solver.blank = decision.gone, decision.blank
    read = solver.read()
    fed = torch.zeros_like(read)
    producers: dict[int, dict[str, bool]] = {}
    for site, inside, outside in solver.sites:
        fed[inside[inside >= 0]] = True
        for root, flat in zip(outside.tolist(), site.flat.tolist(), strict=True):
            if root >= 0:
                made = producers.setdefault(root, {})
                made[site.name] = made.get(site.name, True) and flat
    seen: set[tuple[str, int]] = set()
    counts: Counter[tuple[str, str]] = Counter()
    for site, _, outside in solver.sites:
        for o, root in enumerate(outside.tolist()):
            if root < 0 or bool(decision.gone[root]) or (site.name, o) in seen:
                continue
            idle = bool(site.flat[o]) or (bool(fed[root]) and not bool(read[root]))
            if idle:
                seen.add((site.name, o))
                counts[site.name, _why(decision, labels.find(root), site.name, producers[root])] += 1
    return [Left(name, count, reason) for (name, reason), count in counts.items()]


def _why(decision: Decision, root: int, name: str, producers: dict[str, bool]) -> str:
    why = decision.why.get(root, "kept")
    if not producers[name] and why.startswith("read by"):
        return "goes only with channels of the same layer, as of an attention head, that are not constant"
    others = [other for other, flat in producers.items() if other != name and not flat]
    if others and why.startswith("read by"):
        return f"tied to {others[0]}, which is not constant"
    return why

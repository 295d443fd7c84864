"""A site, as users see it, and the list of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fallow.surgery.found import Refused


@dataclass(frozen=True)
class Site:
    """A place in a model where a residual branch can rest.

    Attributes:
        name: the block's module name, with the branch's child where the block has two.
        kind: "identity" (x + f(x)) or "transition" (the shortcut changes shape; only the branch rests).
        cost: share of the FLOPs of a dense training step, forward and backward, that its branch takes.
        block: module name of the block.
        modules: the modules that are not called while it rests.
        modes: ways it was proved to rest in: "batch", "row".
        why_not_row: the reason where "row" is missing.
    """

    name: str
    kind: str
    cost: float
    block: str
    modules: tuple[str, ...]
    modes: tuple[str, ...] = ("batch", "row")
    why_not_row: str = ""


class Sites(list[Site]):
    """The sites of a model in the order they run; also what looked like one and is not.

    Attributes:
        ambiguous: could rest, but only if asked for by name (``include=``, or a mapping of rates).
        refused: cannot rest, with the reason.
    """

    def __init__(
        self, sites: Iterable[Site] = (), ambiguous: Iterable[Refused] = (), refused: Iterable[Refused] = ()
    ) -> None:
        super().__init__(sites)
        self.ambiguous = list(ambiguous)
        self.refused = list(refused)

    def __str__(self) -> str:
        """A table."""
        width = max([len(s.name) for s in self] + [4])
        lines = [f"{'site':<{width}}  kind        cost %  rests by"]
        lines += [f"{s.name:<{width}}  {s.kind:<10}  {s.cost * 100:6.2f}  {', '.join(s.modes)}" for s in self]
        lines += [f"taken only by name: {r.name}: {r.reason}" for r in self.ambiguous]
        lines += [f"cannot rest: {r.name}: {r.reason}" for r in self.refused]
        return "\n".join(lines)

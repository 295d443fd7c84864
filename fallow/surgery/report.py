"""What a handle reports: asked and realised rates, depth, cost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SiteRow:
    """One site in a report; ``realised`` is None before the first training forward."""

    name: str
    kind: str
    cost: float
    asked: float
    realised: float | None


@dataclass(frozen=True)
class Report:
    """Asked and realised survival rates of every site; prints as a table.

    Attributes:
        sites: one row a site.
        draws: draws made so far.
        mode: "batch" or "row".
        sampler: "bernoulli" or "exact".
        notes: what a user should know about this run.
    """

    sites: tuple[SiteRow, ...]
    draws: int
    mode: str
    sampler: str
    notes: tuple[str, ...] = ()

    @property
    def depth(self) -> float:
        """Mean realised depth (branches run per forward, counted in rows); asked where nothing ran yet."""
        return sum(_known(s) for s in self.sites)

    @property
    def expected_depth(self) -> float:
        """Sum of the asked rates."""
        return sum(s.asked for s in self.sites)

    @property
    def cost(self) -> float:
        """Mean realised share of a dense training step's FLOPs."""
        return 1 - sum(s.cost * (1 - _known(s)) for s in self.sites)

    @property
    def expected_cost(self) -> float:
        """Expected share of a dense training step's FLOPs."""
        return 1 - sum(s.cost * (1 - s.asked) for s in self.sites)

    def as_dict(self) -> dict[str, float]:
        """A flat dict for loggers."""
        flat: dict[str, float] = {"draws": float(self.draws)}
        flat |= {"depth/asked": self.expected_depth, "depth/realised": self.depth}
        flat |= {"cost/asked": self.expected_cost, "cost/realised": self.cost}
        for s in self.sites:
            flat[f"rate/asked/{s.name}"] = s.asked
            flat[f"cost_share/{s.name}"] = s.cost
            if s.realised is not None:
                flat[f"rate/realised/{s.name}"] = s.realised
        return flat

    def __str__(self) -> str:
        """The table."""
        width = max([len(s.name) for s in self.sites] + [4])
        lines = [f"{'site':<{width}}  kind        cost %   asked  realised"]
        for s in self.sites:
            seen = "-" if s.realised is None else f"{s.realised:.3f}"
            lines.append(f"{s.name:<{width}}  {s.kind:<10}  {s.cost * 100:6.2f}  {s.asked:6.3f}  {seen:>8}")
        lines.append(
            f"depth {self.depth:.2f} of {len(self.sites)} (asked {self.expected_depth:.2f}); "
            f"share of dense FLOPs {self.cost:.3f} (asked {self.expected_cost:.3f}); "
            f"{self.draws} draws, mode {self.mode}, sampler {self.sampler}"
        )
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])


def _known(row: SiteRow) -> float:
    return row.asked if row.realised is None else row.realised

"""What `fallow.replace` hands back: what it changed, what it left, realised rates, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fallow.surgery.counted import Counted
from fallow.surgery.handle import Handle


@dataclass(frozen=True)
class Change:
    """One module of another library and what stands in for it.

    Attributes:
        names: where it is in the model, more than once where it is shared.
        old: the module that was there, kept for the way back.
        new: the module that is there; an identity where a branch rests instead.
        survival_rate: asked.
        sites: the sites of the handle that rest instead; empty for a module that masks.
        note: why a drop path masks and its branch does not rest.
    """

    names: tuple[str, ...]
    old: nn.Module
    new: nn.Module
    survival_rate: float
    sites: tuple[str, ...] = ()
    note: str = ""
    holders: tuple[tuple[nn.Module, str], ...] = field(default=(), repr=False)

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]


@dataclass(frozen=True)
class Left:
    """A noise module that stays as it is, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class ReplacedRow:
    """One replaced module in a report; ``realised`` is None before the first training forward."""

    name: str
    was: str
    now: str
    asked: float
    realised: float | None


@dataclass(frozen=True)
class ReplacedReport:
    """Asked and realised survival rates of everything that was replaced; prints as a table."""

    rows: tuple[ReplacedRow, ...]
    left: tuple[Left, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, float]:
        """A flat dict for loggers."""
        flat = {f"rate/asked/{r.name}": r.asked for r in self.rows}
        return flat | {f"rate/realised/{r.name}": r.realised for r in self.rows if r.realised is not None}

    def __str__(self) -> str:
        """The table."""
        width = max([len(r.name) for r in self.rows] + [6])
        was, now = (max([len(w) for w in column] + [3]) for column in self._words())
        lines = [f"{'module':<{width}}  {'was':<{was}}  {'now':<{now}}   asked  realised"]
        for r in self.rows:
            seen = "-" if r.realised is None else f"{r.realised:.3f}"
            lines.append(f"{r.name:<{width}}  {r.was:<{was}}  {r.now:<{now}}  {r.asked:6.3f}  {seen:>8}")
        lines += [f"left as it is: {x.name}: {x.reason}" for x in self.left]
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])

    def _words(self) -> tuple[list[str], list[str]]:
        return [r.was for r in self.rows], [r.now for r in self.rows]


class Replaced:
    """What `fallow.replace` did to a model; ``model, undo = replaced`` takes it apart.

    Attributes:
        model: the model, the same object as before.
        handle: of the branches that rest in place of drop paths; None where none does.
        replaced: one `Change` for each module.
        left: the noise modules that stay as they are.
    """

    def __init__(self, model: nn.Module, left: tuple[Left, ...] = ()) -> None:
        self.model, self.left = model, left
        self.handle: Handle | None = None
        self.replaced: tuple[Change, ...] = ()

    def __iter__(self) -> Iterator[Any]:
        """The model and the way back."""
        parts: tuple[nn.Module, Callable[[], None]] = (self.model, self.undo)
        return iter(parts)

    def add(self, change: Change) -> None:
        """Put a new module in place."""
        self.replaced += (change,)
        _exchange(change.holders, change.old, change.new)

    def undo(self) -> None:
        """Put every original module back and take the handle off; once is enough.

        Trained weights stay. The originals follow the model's training flags of now.
        """
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
        for change in self.replaced:
            _exchange(change.holders, change.new, change.old)
        self.replaced = ()

    def report(self) -> ReplacedReport:
        """Asked and realised survival rates so far; prints as a table.

        The rates of rested branches are the handle's counts. Those of modules that mask are counted on one
        channel of each training forward, compiled ones excepted.
        """
        rests = {} if self.handle is None else {s.name: s.realised for s in self.handle.report().sites}
        rows = []
        for c in self.replaced:
            if c.sites:
                seen = [r for s in c.sites if (r := rests.get(s)) is not None]
                now, realised = f"rests {', '.join(c.sites)}", sum(seen) / len(seen) if seen else None
            else:
                now, realised = (
                    type(c.new).__name__,
                    c.new.tally.share if isinstance(c.new, Counted) else None,
                )
            name = " = ".join(c.names)
            rows.append(ReplacedRow(name, type(c.old).__name__, now, c.survival_rate, realised))
        return ReplacedReport(tuple(rows), self.left, tuple(self._notes()))

    def _notes(self) -> Iterator[str]:
        masks: dict[str, list[str]] = {}
        for c in self.replaced:
            if c.note:
                masks.setdefault(c.note, []).append(c.name)
        for why, names in masks.items():
            listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            yield f"masks and saves no work: {listed}: {why}"
        handle = self.handle
        if handle is not None and handle.options.mode == "row":
            if any(b.norms for c in self.replaced for s in c.sites for b in handle.branches(s)):
                yield "BatchNorm in a branch that rests row by row sees the kept rows; masked, it saw all"

    def __repr__(self) -> str:
        """One line."""
        rest = sum(bool(c.sites) for c in self.replaced)
        return (
            f"Replaced({len(self.replaced)} modules, {rest} of them rest, {len(self.left)} left as they are)"
        )


def _exchange(holders: tuple[tuple[nn.Module, str], ...], old: nn.Module, new: nn.Module) -> None:
    new.train(old.training)
    for holder, attribute in holders:
        holder._modules[attribute] = new

"""A plan: survival rates for a budget, with the costs and sensitivities they come from."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fallow import rates
from fallow.errors import DataError, FallowError, check_choice, check_rate
from fallow.planning import allocate, cost

SCHEMA = 1
_BAR = 20


@dataclass(frozen=True)
class Plan(Mapping[str, float]):
    """Survival rates for a budget; a mapping from site name to rate that `fallow.apply` takes as it is.

    Attributes:
        table: survival rate by site, in site order; the mapping itself.
        method: the rule that made it: "uniform", "linear" or "sensemode".
        asked: the method asked for.
        budget: expected share of the dense step that was asked for.
        cost_kind: what the step is counted in: "flops", "time", "memory" or "count".
        costs: share of a whole dense step by site.
        sensitivities: by site; empty where the method needs none.
        notes: what to mind, in words.
        settings: everything else that it was made with.
        provenance: versions.
    """

    table: dict[str, float]
    method: str
    asked: str
    budget: float
    cost_kind: str
    costs: dict[str, float]
    sensitivities: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        return self.table[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def expected_cost(self) -> float:
        """Expected share of the dense cost of a whole step, ``1 - sum c_l (1 - p_l)``, in ``cost_kind``."""
        return rates.expected_cost(self.table, self.costs)

    @property
    def expected_depth(self) -> float:
        """Expected number of sites that run, ``sum p_l``."""
        return math.fsum(self.table.values())

    @property
    def droppable(self) -> float:
        """Share f of the dense step that can rest: ``sum c_l``."""
        return math.fsum(self.costs.values())

    def __str__(self) -> str:
        """A table."""
        width = max([len(name) for name in self] + [4])
        known = bool(self.sensitivities)
        largest = max(self.sensitivities.values(), default=0.0) or 1.0
        head = f"{'site':<{width}}  {'rate':>6}  {'cost %':>7}"
        lines = [head + (f"  {'sensitivity':>11}" if known else "") + "  rate"]
        for name, rate in self.table.items():
            line = f"{name:<{width}}  {rate:6.3f}  {self.costs[name] * 100:7.2f}"
            if known:
                line += f"  {self.sensitivities[name] / largest:11.3f}"
            lines.append(f"{line}  {'#' * max(round(rate * _BAR), 1)}")
        what = {"flops": "FLOPs", "time": "time", "memory": "memory kept", "count": "sites"}[self.cost_kind]
        lines.append(
            f"{self.method}: expected cost {self.expected_cost:.4f} of the dense step's {what} (budget "
            f"{self.budget:g}, {self.droppable:.1%} can rest), expected depth {self.expected_depth:.2f} of "
            f"{len(self)}"
        )
        if known:
            lines.append("sensitivities are shown as shares of the largest")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "schema": SCHEMA,
            "kind": "plan",
            "method": self.method,
            "asked": self.asked,
            "budget": self.budget,
            "cost_kind": self.cost_kind,
            "expected_cost": self.expected_cost,
            "expected_depth": self.expected_depth,
            "droppable": self.droppable,
            "sites": [
                {"name": n, "rate": p, "cost": self.costs[n], "sensitivity": self.sensitivities.get(n)}
                for n, p in self.table.items()
            ],
            "notes": list(self.notes),
            "settings": self.settings,
            "provenance": self.provenance,
        }

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Plan:
        """The plan that `as_dict` gave.

        Raises:
            DataError: it is no plan, damaged, or one of a later version.
            RateError: a rate or the budget outside (0, 1].
            UsageError: a cost that is no share of a step.
        """
        if not isinstance(given, Mapping) or given.get("kind") != "plan":
            raise DataError('this is no plan: a plan has "kind": "plan", as Plan.save writes it')
        if given.get("schema") != SCHEMA:
            raise DataError(
                f"the plan has schema {given.get('schema')!r}, this version of fallow reads {SCHEMA}"
            )
        try:
            sites = list(given["sites"])
            table = {str(s["name"]): check_rate(s["rate"], str(s["name"])) for s in sites}
            if len(table) < len(sites):
                raise DataError("the plan is damaged: it names a site twice")
            costs = allocate.check_costs({str(s["name"]): float(s["cost"]) for s in sites})
            known = {
                str(s["name"]): float(s["sensitivity"]) for s in sites if s.get("sensitivity") is not None
            }
            return cls(
                table,
                str(given["method"]),
                str(given["asked"]),
                check_rate(given["budget"], name="budget"),
                check_choice("the plan's cost_kind", given["cost_kind"], cost.KINDS),
                costs,
                known,
                tuple(map(str, given.get("notes", ()))),
                dict(given.get("settings", {})),
                dict(given.get("provenance", {})),
            )
        except FallowError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise DataError(f"the plan is damaged: {type(error).__name__} {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON, whole or not at all.

        Raises:
            DataError: the disk refused.
        """
        target = Path(path)
        text = json.dumps(self.as_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        try:
            handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".writing-")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(text + "\n")
                os.chmod(temporary, 0o644)
                os.replace(temporary, target)
            except BaseException:
                os.unlink(temporary)
                raise
        except OSError as error:
            raise DataError(f"the plan could not be written to {target} ({error.strerror})") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read what `save` wrote.

        Raises:
            DataError: the file is missing, damaged or no plan.
        """
        try:
            given = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read as a plan ({error})") from None
        return cls.from_dict(given)

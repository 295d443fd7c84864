"""The figure of a run whose survival rates were planned anew while it trained."""

from __future__ import annotations

from typing import Any

from fallow.errors import need
from fallow.report import _svg, _words
from fallow.report._shapes import Plot
from fallow.report._svg import COLOUR
from fallow.report._tables import Table
from fallow.report._words import get, number, records

Planned = tuple[str, dict[str, float]]  # when, and rate by site


def replans(results: dict[str, Any], prefix: str) -> Plot | None:
    """Survival rates over the sites, a curve for each of some of the plans, the first and last among them."""
    found = _some(_planned(results), _svg.RUNS)
    names = list(dict.fromkeys(name for _, rates in found for name in rates))
    if not names:
        return None

    def paint(axes: Any) -> None:
        for index, (_, rates) in enumerate(found):
            points = [(place, rates[name]) for place, name in enumerate(names, start=1) if name in rates]
            x, y = zip(*points, strict=True)
            width = 2.4 if index == len(found) - 1 else 1.3
            axes.plot(x, y, color=COLOUR[f"run-{index}"], linewidth=width, marker="o", markersize=3)
        axes.set_ylim(0, 1.04)
        axes.set_xlim(0.3, len(names) + 0.7)
        ticker = need("matplotlib.ticker", "lab")
        axes.xaxis.set_major_locator(ticker.MaxNLocator(9, integer=True, min_n_ticks=1))
        axes.set_title("survival rate")
        axes.set_xlabel("site, from the input to the output")

    name = f"{prefix}plans"
    label = "Survival rates over the sites, plan by plan. The numbers are in the table beside."
    count = len(_planned(results))
    shown = "" if count == len(found) else f" {len(found)} of {count} plans are shown."
    rows = tuple(
        (str(place), name, *(_words.ratio(rates.get(name)) for _, rates in found))
        for place, name in enumerate(names, start=1)
    )
    return Plot(
        name,
        "Rates as they were planned",
        f"Planned from sensitivities that the training steps showed; uniform before the first plan.{shown}",
        _svg.draw(name, label, paint),
        tuple((f"line run-{index}", when) for index, (when, _) in enumerate(found)),
        Table("Survival rates, plan by plan", ("site", "name", *(when for when, _ in found)), rows),
    )


def _planned(results: dict[str, Any]) -> list[Planned]:
    """When each plan was made, and the rates of it that are numbers."""
    found = []
    for index, plan in enumerate(records(results.get("plans"))):
        rates = get(plan, "rates")
        said = rates.items() if isinstance(rates, dict) else ()
        known = {str(name): rate for name, value in said if (rate := number(value)) is not None}
        if known:
            epoch = number(plan.get("epoch"))
            found.append((f"plan {index + 1}" if epoch is None else f"after epoch {epoch:g}", known))
    return found


def _some(found: list[Planned], most: int) -> list[Planned]:
    """At most so many, evenly apart, the first and the last among them."""
    if len(found) <= most:
        return found
    return [found[round(i * (len(found) - 1) / (most - 1))] for i in range(most)]

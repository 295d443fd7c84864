"""The part of the page that shows a plan: survival rates site by site, and what they come from."""

from __future__ import annotations

from typing import Any

from fallow.report import _shapes, _svg, _tables, _words
from fallow.report._section import Section, Tile
from fallow.report._shapes import Plot
from fallow.report._svg import COLOUR
from fallow.report._tables import Table
from fallow.report._words import get, number, records

KINDS = {"flops": "FLOPs", "time": "time", "memory": "memory kept", "count": "sites"}
METHODS = {"uniform": "uniform", "linear": "linear", "sensemode": "SenseMode"}
_ASIDE = ("model", "weights", "data", "inputs")  # settings that the summary shows; the others are below


def counted(plan: dict[str, Any]) -> str:
    """What the plan's costs are counted in."""
    return KINDS.get(str(plan.get("cost_kind")), "cost")


def method(plan: dict[str, Any]) -> str:
    """The method's name."""
    name = str(plan.get("method"))
    return METHODS.get(name, name)


def headline(plan: dict[str, Any]) -> str:
    """One sentence with what the plan says."""
    rates = [rate for s in records(plan.get("sites")) if (rate := number(s.get("rate"))) is not None]
    of = get(plan, "settings", "model")
    model = f" for {of}" if isinstance(of, str) else ""
    if not rates:
        return f"A plan{model} without rates."
    words = f"{method(plan)} rates{model}".strip()
    cost = number(plan.get("expected_cost"))
    share = "" if cost is None else f" an expected {cost:.2f} of the dense step's {counted(plan)},"
    return (
        f"{words[0].upper()}{words[1:]}:{share} {sum(rates):.1f} of {len(rates)} sites at work in a step, "
        f"rates from {min(rates):.2f} to {max(rates):.2f}."
    )


def tiles(plan: dict[str, Any]) -> tuple[Tile, ...]:
    """The figures a reader looks for first, those of them that the plan has."""
    sites = len(records(plan.get("sites")))
    candidates = [
        ("expected_cost", "expected cost", ".3f", f"of a dense step's {counted(plan)}"),
        ("expected_depth", "mean depth", ".1f", f"of {sites} sites at work in a step"),
        ("droppable", "can rest", ".3f", f"of a dense step's {counted(plan)}, at most"),
    ]
    return tuple(
        Tile(name, _words.plain(plan.get(key), form), aside)
        for key, name, form, aside in candidates
        if number(plan.get(key)) is not None
    )


def summary(plan: dict[str, Any]) -> Table:
    """The plan in one table."""
    settings = plan.get("settings")
    asked = plan.get("asked")
    rows = [
        (
            "method",
            method(plan) + (f", chosen by {asked}" if asked not in (None, plan.get("method")) else ""),
        ),
        ("budget", _words.plain(plan.get("budget"))),
        ("counted in", counted(plan)),
        *((key, str(get(settings, key))) for key in _ASIDE if get(settings, key) is not None),
    ]
    return Table("Plan", ("", "value"), tuple(rows))


def sites(plan: dict[str, Any]) -> Table:
    """Every site with its rate, its cost and its sensitivity."""
    rows = [
        (
            str(index + 1),
            str(site.get("name", _words.MISSING)),
            _words.ratio(site.get("rate")),
            _words.percent(site.get("cost")),
            _words.plain(site.get("sensitivity"), ".3g"),
        )
        for index, site in enumerate(records(plan.get("sites")))
    ]
    columns = ("site", "name", "survival rate", f"share of a step's {counted(plan)}", "sensitivity")
    return Table("Survival rate of every site", columns, tuple(rows))


def rates(plan: dict[str, Any], prefix: str) -> Plot | None:
    """Survival rates, site by site."""
    found = _of(plan, "rate")
    if not found:
        return None
    mean = sum(rate for _, _, rate in found) / len(found)

    def paint(axes: Any) -> dict[str, str]:
        tips = _shapes.columns(axes, found, lambda name, rate: f"{name}: {rate:.3f}")
        axes.axhline(mean, color=COLOUR["ink"], linewidth=1.4, linestyle=(0, (5, 3)))
        axes.set_ylim(0, 1.02)
        axes.set_title("chance that the branch works in a step")
        return tips

    name = f"{prefix}rates"
    label = "Survival rates, site by site. The names and numbers are in the table beside."
    legend = (("bar model", "survival rate"), ("dash ink", f"mean, {mean:.2f}"))
    note = "Names and cost shares of the sites are in the table."
    return Plot(name, "Survival rates", note, _svg.draw(name, label, paint), legend, sites(plan))


def sensitivities(plan: dict[str, Any], prefix: str) -> Plot | None:
    """Sensitivities, site by site, beside the square roots of costs that SenseMode divides them by."""
    found = _of(plan, "sensitivity")
    largest = max((value for _, _, value in found), default=0.0)
    if largest <= 0:
        return None
    relative = [(place, name, value / largest) for place, name, value in found]
    costs = [(place, value**0.5) for place, _, value in _of(plan, "cost") if value >= 0]
    dearest = max((value for _, value in costs), default=0.0)

    def paint(axes: Any) -> dict[str, str]:
        tips = _shapes.columns(axes, relative, lambda name, value: f"{name}: {value:.3f} of the largest")
        if dearest > 0:
            left, right = [i - 0.48 for i, _ in costs], [i + 0.48 for i, _ in costs]
            axes.hlines(
                [value / dearest for _, value in costs], left, right, color=COLOUR["ink"], linewidth=1.8
            )
        axes.set_ylim(0, 1.04)
        axes.set_title("share of the largest")
        return tips

    name = f"{prefix}sensitivities"
    label = "Sensitivities and square roots of costs, site by site. The numbers are in the table beside."
    legend = (
        ("bar model", "sensitivity"),
        *((("line ink", "square root of the cost"),) if dearest > 0 else ()),
    )
    note = (
        "How much the loss depends on a branch, to first order, at the weights that were tried. SenseMode's "
        "rates follow sensitivity over the square root of cost."
    )
    rows = tuple(
        (str(place), name, _words.plain(value * largest, ".3g"), _words.ratio(value))
        for place, name, value in relative
    )
    columns = ("site", "name", "sensitivity", "share of the largest")
    drawing = _svg.draw(name, label, paint)
    return Plot(
        name, "Sensitivities", note, drawing, legend, Table("Sensitivity of every site", columns, rows)
    )


def _of(plan: dict[str, Any], key: str) -> list[tuple[int, str, float]]:
    """(place, name, value) of the sites that have the value."""
    return [
        (index + 1, str(site.get("name", "")), value)
        for index, site in enumerate(records(plan.get("sites")))
        if (value := number(site.get(key))) is not None
    ]


def section(name: str, plan: dict[str, Any], index: int) -> Section:
    """One plan's part of the page."""
    prefix = f"run-{index + 1}-"
    notes = plan.get("notes")
    details = (
        _tables.pairs("Settings", plan.get("settings")),
        _tables.pairs("Provenance", plan.get("provenance")),
    )
    return Section(
        anchor=f"run-{index + 1}",
        name=name,
        status="",
        warning="",
        headline=headline(plan),
        tiles=tiles(plan),
        summary=summary(plan),
        plots=tuple(p for make in (rates, sensitivities) if (p := make(plan, prefix)) is not None),
        notes=tuple(note for note in notes if isinstance(note, str)) if isinstance(notes, list) else (),
        details=tuple(table for table in details if table.rows),
        notes_title="What to mind",
        source=name,
    )

"""What is plotted of `hayou2021` over budgets: rates, errors, curves, and the Budget Hypothesis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fallow.papers._panels import (
    CHANCE,
    SHOWN,
    Found,
    compared,
    data_words,
    gathered,
    grouped,
    is_shown,
    mean_and_error,
    over_epochs,
    panel,
    pick,
    series,
    table,
    tasks,
    values,
    verdict,
)
from fallow.papers.hayou2021.cells import NAMES, RULES, final_rates

Gathered = dict[str, list[Any]]

# Where the Budget Hypothesis speaks, in words of ours: below the one SenseMode, from the other on Uniform.
SMALL, LARGE = 0.5, 0.75


# --- F4 ---------------------------------------------------------------------------------------------------


def sense_rates(found: Found) -> Gathered:
    """SenseMode's rates over the blocks at the end of training, a curve a budget."""
    panels, tables, said = [], [], []
    for task in tasks(found):
        mine = pick(found, task=task, rule="sensemode")
        if not mine:
            continue
        planted = bool(mine[0][1].get("relevant"))
        curves, rows = [], []
        for budget in values(mine, "budget"):
            group = [_ordered(result) for _, result in pick(mine, budget=budget)]
            points = [mean_and_error(column) for column in zip(*group, strict=True)]
            means, errors = [m for m, _ in points], [e for _, e in points]
            curves.append(series(f"budget {budget:g}", list(range(1, len(means) + 1)), means, error=errors))
            rows.append([budget, *(round(m, 3) for m in means)])
            if planted:
                said.append(_planted_words(task, budget, pick(mine, budget=budget)))
        axis = "block, the planted ones first" if planted else "block"
        panels.append(panel(f"SenseMode on {task}", axis, "survival rate", curves))
        columns = ["budget", *(str(place + 1) for place in range(len(rows[0]) - 1))]
        tables.append(table(f"Mean survival rates, {task}", columns, rows))
    return gathered(panels, tables, said)


def _ordered(result: Mapping[str, Any]) -> list[float]:
    """Rates in block order; of planted blocks the relevant ones first."""
    rates, first = final_rates(result), list(result.get("relevant") or [])
    return [rates[i] for i in first] + [rate for i, rate in enumerate(rates) if i not in first]


def _planted_words(task: str, budget: float, group: Found) -> str:
    hits = sum(_found(result) for _, result in group)
    number = len(group[0][1]["relevant"])
    relevant = [final_rates(r)[i] for _, r in group for i in r["relevant"]]
    others = [p for _, r in group for i, p in enumerate(final_rates(r)) if i not in r["relevant"]]
    return (
        f"{task}, budget {budget:g}: the planted blocks got {sum(relevant) / len(relevant):.2f} on average, "
        f"the others {sum(others) / len(others):.2f}; in {hits} of {len(group)} seeds no other block got a "
        f"higher rate than any of the {number}."
    )


def _found(result: Mapping[str, Any]) -> bool:
    """Whether no other block got a higher rate than a planted one; both may be at 1."""
    rates, relevant = final_rates(result), result["relevant"]
    others = [rate for place, rate in enumerate(rates) if place not in relevant]
    return min(rates[place] for place in relevant) >= max(others)


# --- F5 ---------------------------------------------------------------------------------------------------


def error_of(result: Mapping[str, Any]) -> float:
    """Mean squared error of a toy, error in per cent of a classification."""
    return result["error"] if "error" in result else 100 * result["test_error"]


def unit(found: Found) -> str:
    """What `error_of` is measured in."""
    return "test MSE" if "error" in found[0][1] else "test error in %"


def errors(found: Found) -> Gathered:
    """Error against budget, a panel and a table a task."""
    panels, tables, said = [], [], []
    for task in tasks(found):
        mine = pick(found, task=task)
        by = grouped(mine, ("rule", "budget"), error_of)
        budgets = sorted({budget for rule, budget in by if rule != "standard"})
        curves = []
        for rule in RULES[1:]:
            have = [b for b in budgets if (rule, b) in by]
            points = [mean_and_error(list(by[rule, b].values())) for b in have]
            if points:
                means, spreads = [m for m, _ in points], [e for _, e in points]
                curves.append(series(NAMES[rule], have, means, error=spreads))
        if ("standard", 1.0) in by and budgets:
            level = mean_and_error(list(by["standard", 1.0].values()))[0]
            ends = [budgets[0], budgets[-1]]
            curves.append(series("Standard (every block, always)", ends, [level, level], style="dashed"))
        panels.append(panel(f"Error against budget, {task}", "budget r", unit(mine), curves))
        tables.append(_error_table(task, mine, by, budgets))
        said += data_words(mine)
    return gathered(panels, tables, said)


def _error_table(
    task: str, mine: Found, by: Mapping[Any, Mapping[int, float]], budgets: Sequence[float]
) -> Any:
    def cells(rule: str, budget: float) -> list[Any]:
        group = by.get((rule, budget))
        return list(mean_and_error(list(group.values()))) if group else [None, None]

    rows = [[f"{b:g}", *(x for rule in RULES[1:] for x in cells(rule, b))] for b in budgets]
    if ("standard", 1.0) in by:
        rows.append(["Standard", *cells("standard", 1.0), None, None, None, None])
    columns = ["budget", *(word for rule in RULES[1:] for word in (NAMES[rule], "s.e."))]
    seeds = len({cell.tags["seed"] for cell, _ in mine})
    note = f"mean and standard error over {seeds} seeds; the row Standard has its number in the first column"
    return table(f"{task}: {unit(mine)}", columns, rows, note)


def curves(found: Found) -> Gathered:
    """Validation error over epochs at the smallest and the largest budget."""
    panels = []
    for task in tasks(found):
        mine = pick(found, task=task)
        budgets = sorted({c.tags["budget"] for c, _ in mine if c.tags["rule"] != "standard"})
        for budget in dict.fromkeys(budgets[:1] + budgets[-1:]):
            lines = []
            for rule in RULES:
                group = pick(mine, rule=rule, budget=1.0 if rule == "standard" else budget)
                if group:
                    records = [result["epochs"] for _, result in group]
                    lines.append(over_epochs(NAMES[rule], records, "validation_error", 100))
            panels.append(
                panel(f"{task}, budget {budget:g}", "epoch", "validation error in %, mean of seeds", lines)
            )
    return gathered(panels, [], [])


# --- the Budget Hypothesis ----------------------------------------------------------------------------------


def hypothesis(found: Found) -> Gathered:
    """Which rule is better at each budget, by how many standard errors, and what the hypothesis said."""
    rows, counts = [], {"as it says": 0, "against it": 0, "not shown": 0}
    for task in tasks(found):
        by = grouped(pick(found, task=task), ("rule", "budget"), error_of)
        for budget in sorted({b for rule, b in by if rule in RULES[1:]}):
            for rule in ("sensemode", "linear"):
                result = compared(by.get((rule, budget), {}), by.get(("uniform", budget), {}))
                if result is None:
                    continue
                said, judged = verdict(result, NAMES[rule], "Uniform"), judge(rule, budget, result)
                counts[judged] = counts.get(judged, 0) + 1
                rows.append(
                    [f"{task}, {budget:g}", f"{NAMES[rule]} − Uniform", result["difference"], result["error"]]
                    + [result["apart"], result["chance"], result["seeds"], said, judged]
                )
    columns = ["task, budget", "compared", "difference", "s.e.", "s.e. apart", "chance", "seeds", "shown"]
    columns.append("hypothesis")
    note = (
        "differences of errors in pairs of the same seed; negative: the first rule is better; chance: of a "
        "difference this large where there is none (Student's t)"
    )
    tested = sum(number for judged, number in counts.items() if judged != "says nothing")
    said = [
        f"The hypothesis, as the notes remember it: at small budgets (here below {SMALL:g}) SenseMode beats "
        f"Uniform, at large ones (here from {LARGE:g}) Uniform beats SenseMode and Linear; the bounds are "
        "ours.",
        f"Of {tested} comparisons on which it speaks, {counts['as it says']} come out as it says, "
        f"{counts['against it']} against it, {counts['not shown']} are not shown to be either: within "
        f"{SHOWN:g} standard errors, or as far apart with a chance above {100 * CHANCE:g} % where nothing "
        "differs.",
        *_against(rows),
    ]
    return gathered([], [table("Budget Hypothesis", [*columns], rows, note)], said)


def judge(rule: str, budget: float, result: Mapping[str, Any]) -> str:
    """What a comparison with Uniform says of the hypothesis."""
    expected = -1 if rule == "sensemode" and budget < SMALL else 1 if budget >= LARGE else 0
    if not expected:
        return "says nothing"
    if not is_shown(result):
        return "not shown"
    return "as it says" if result["difference"] * expected > 0 else "against it"


def _against(rows: Sequence[Sequence[Any]]) -> list[str]:
    places = [f"{row[0]} ({row[1]}, {row[4]:+.1f} s.e.)" for row in rows if row[-1] == "against it"]
    return [f"Against it: {'; '.join(places)}."] if places else []

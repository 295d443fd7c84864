"""What is plotted and tabled of `hayou2021`, from the results of its cells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fallow.recipes._experiments import Cell
from fallow.recipes._hayou_cells import final_rates
from fallow.recipes._panels import (
    CHANCE,
    SHOWN,
    Found,
    compared,
    grouped,
    is_shown,
    mean_and_error,
    panel,
    series,
    table,
    verdict,
)

RULES = ("standard", "uniform", "linear", "sensemode")
NAMES = {"standard": "Standard", "uniform": "Uniform", "linear": "Linear", "sensemode": "SenseMode"}
# Where the Budget Hypothesis speaks, in words of ours: below the one SenseMode, from the other on Uniform.
SMALL, LARGE = 0.5, 0.75
Gathered = dict[str, list[Any]]


def gathered(panels: list[Any], tables: list[Any], statements: list[str]) -> Gathered:
    """What an item's `gather` returns."""
    return {"panels": panels, "tables": tables, "statements": statements}


def pick(found: Found, **tags: Any) -> list[tuple[Cell, Mapping[str, Any]]]:
    """The cells with these tags."""
    return [(c, r) for c, r in found if all(c.tags.get(key) == value for key, value in tags.items())]


def values(found: Found, tag: str) -> list[Any]:
    """The different values of a tag, in order."""
    return sorted({cell.tags[tag] for cell, _ in found})


def tasks(found: Found) -> list[str]:
    """The tasks, in the order of the cells."""
    return list(dict.fromkeys(cell.tags["task"] for cell, _ in found))


# --- F1 ---------------------------------------------------------------------------------------------------


def growth(found: Found) -> Gathered:
    """Growth of gradients by layer, theory and simulation; the growth rates as a table."""
    panels, rows, worst = [], [], 0.0
    for kind in dict.fromkeys(cell.tags["kind"] for cell, _ in found):
        curves = []
        for cell, r in pick(found, kind=kind):
            name, layers = NAMES[cell.tags["rule"]], list(range(len(r["ours"])))
            curves.append(
                series(f"{name}, theory", layers, r["theory"], style="dashed", label="derived", group=name)
            )
            curves.append(series(name, layers, r["ours"], error=r["errors"], style="points", group=name))
            worst = max(worst, abs(r["rate"] / r["rate_theory"] - 1))
            rows.append(
                [f"{kind}, {name}", r["rate_theory"], r["rate"], r["rate_error"]]
                + [r["typical_theory"], r["typical"], r["spread_theory"], round(r["spread"], 9)]
            )
        panels.append(
            panel(
                f"Gradient at initialisation, {kind}",
                "layer l",
                "log2 of mean |dloss/dy_l|² relative to layer L",
                curves,
            )
        )
    columns = ["net", "rate, derived", "rate, ours", "s.e.", "log2 typical growth, derived", "ours"]
    columns += ["its spread over masks, derived", "ours"]
    note = "rate: mean growth of |dloss/dy|² per block; typical: of the median mask, over all blocks"
    said = f"The simulated growth rates are within {100 * worst:.1f} % of the derived ones."
    return gathered(panels, [table("Growth rate of the gradient", columns, rows, note)], [said])


# --- F2 ---------------------------------------------------------------------------------------------------


def law(found: Found) -> Gathered:
    """Histograms over masks, one panel a kind of net, and how far from Gaussian."""
    panels, rows, distances = [], [], []
    for net, trained in dict.fromkeys((c.tags["net"], c.tags["trained"]) for c, _ in found):
        mine = pick(found, net=net, trained=trained)
        when = "after training" if trained else "at initialisation"
        depths, curve = values(mine, "depth"), []
        for depth in depths:
            group = [r for _, r in pick(mine, depth=depth)]
            curve.append(_density(f"L = {depth}", group[0]))
            numbers = [mean_and_error([r[key] for r in group]) for key in ("distance", "kurtosis")]
            rows.append([f"{net}, {when}, L = {depth}", *numbers[0], *numbers[1], len(group)])
        reference = [x / 10 for x in range(-40, 41)]
        normal = [math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in reference]
        curve.append(series("Gaussian", reference, normal, style="dashed", label="derived"))
        panels.append(panel(f"{net} net {when}", "standardised y_L of one unit", "density over masks", curve))
        points = [mean_and_error([r["distance"] for _, r in pick(mine, depth=d)]) for d in depths]
        means, errors = [m for m, _ in points], [e for _, e in points]
        distances.append(series(f"{net}, {when}", depths, means, error=errors))
    depths = values(found, "depth")
    level, name = found[0][1]["level"], "5 % level of Lilliefors' test"
    distances.append(series(name, depths, [level] * len(depths), style="dashed", label="derived"))
    axis = "Kolmogorov-Smirnov distance"
    panels.append(panel("Distance from Gaussian", "depth L", axis, distances, log=True))
    columns = ["net", "KS distance", "s.e.", "excess kurtosis", "s.e.", "seeds"]
    note = "means over the units of the last layer; masks at one input; s.e. over seeds"
    return gathered(panels, [table("How far from Gaussian", columns, rows, note)], _law_words(found))


def _density(name: str, result: Mapping[str, Any]) -> dict[str, Any]:
    edges = result["edges"]
    width = edges[1] - edges[0]
    total = sum(result["counts"])
    middle = [(a + b) / 2 for a, b in zip(edges, edges[1:], strict=False)]
    return series(name, middle, [count / total / width for count in result["counts"]], style="steps")


def _law_words(found: Found) -> list[str]:
    said = []
    for net, trained in dict.fromkeys((c.tags["net"], c.tags["trained"]) for c, _ in found):
        mine = pick(found, net=net, trained=trained)
        depths = values(mine, "depth")
        first, last = (
            mean_and_error([r["distance"] for _, r in pick(mine, depth=d)])[0]
            for d in (depths[0], depths[-1])
        )
        when = "after training" if trained else "at initialisation"
        falls = "falls" if last < first else "does not fall"
        said.append(
            f"{net} net {when}: the distance {falls} with depth ({first:.3f} at L = {depths[0]}, {last:.3f} "
            f"at L = {depths[-1]})."
        )
    return said


# --- F3 ---------------------------------------------------------------------------------------------------


def penalty(found: Found) -> Gathered:
    """The regularisation term over training, its single-block form beside the exact term."""
    panels, rows, said = [], [], []
    for budget in values(found, "budget"):
        curves = []
        for rule in ("uniform", "linear"):
            group = pick(found, budget=budget, rule=rule)
            if not group:
                continue
            steps = [look["step"] for look in group[0][1]["looks"]]
            for key, name, style in (("form", "single blocks", "line"), ("exact", "exact", "dashed")):
                points = [_look(group, place, key) for place in range(len(steps))]
                means, errors = [m for m, _ in points], [e for _, e in points]
                words, group_of = f"{NAMES[rule]}, {name}", NAMES[rule]
                curves.append(series(words, steps, means, error=errors, style=style, group=group_of))
                ends = [cell for place in (0, -1) for cell in points[place]]
                rows.append([f"r = {budget:g}, {NAMES[rule]}, {name}", *ends, len(group)])
        title, axis = f"Regularisation over training, r = {budget:g}", "Σ p(1−p) g, mean over samples"
        panels.append(panel(title, "training step", axis, curves, log=True))
        said += [_penalty_words(found, budget, place) for place in (0, -1)]
    columns = ["budget, rule, form", "at the start", "s.e.", "at the end", "s.e.", "seeds"]
    note = "s.e. over seeds; the exact term is the variance of the output over masks (D1)"
    return gathered(panels, [table("Regularisation term", columns, rows, note)], said)


def _look(group: Found, place: int, key: str) -> tuple[float, float | None]:
    return mean_and_error([result["looks"][place][key] for _, result in group])


def _penalty_words(found: Found, budget: float, place: int) -> str:
    """Whose exact term is the larger: ratios in pairs of the same seed, which share data and weights."""

    def of(rule: str) -> dict[int, float]:
        mine = pick(found, budget=budget, rule=rule)
        return {cell.tags["seed"]: math.log(result["looks"][place]["exact"]) for cell, result in mine}

    result = compared(of("uniform"), of("linear"))
    when = "at the start" if place == 0 else "at the end of training"
    if result is None:
        return f"r = {budget:g}, {when}: too few seeds to compare."
    ratio, apart = math.exp(result["difference"]), abs(result["apart"])
    said = f"r = {budget:g}, {when}: Uniform's exact term is {ratio:.2f} times Linear's"
    how = f"{apart:.1f} standard errors from 1 over {result['seeds']} seeds"
    return f"{said}, {how}{'' if is_shown(result) else ', so that no difference is shown'}."


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
        said += _data_words(task, mine)
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


def _data_words(task: str, mine: Found) -> list[str]:
    """What images an error was measured on."""
    data = mine[0][1].get("data")
    if not data:
        return []
    notes = "; ".join(str(note).rstrip(".") for note in data.get("notes", []))
    return [
        f"{task}: {data['train']} training images, error on {data['test']} test images."
        + (f" {notes}." if notes else "")
    ]


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
                    lines.append(_curve(NAMES[rule], group))
            panels.append(
                panel(f"{task}, budget {budget:g}", "epoch", "validation error in %, mean of seeds", lines)
            )
    return gathered(panels, [], [])


def _curve(name: str, group: Found) -> dict[str, Any]:
    epochs = [record["epoch"] for record in group[0][1]["epochs"]]
    means = [
        100 * mean_and_error([result["epochs"][i]["validation_error"] for _, result in group])[0]
        for i in range(len(epochs))
    ]
    return series(name, epochs, means)


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

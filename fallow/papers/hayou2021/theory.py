"""What is plotted of `hayou2021` at initialisation and of its theory: growth, law over masks, penalty."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fallow.papers._panels import (
    Found,
    compared,
    gathered,
    is_shown,
    mean_and_error,
    panel,
    pick,
    series,
    table,
    values,
)
from fallow.papers.hayou2021.cells import NAMES

Gathered = dict[str, list[Any]]


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

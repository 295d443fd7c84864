"""What is plotted and tabled of `huang2016` where rates, depths and ways of stochastic depth vary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fallow.papers._panels import (
    FEW,
    Found,
    Gathered,
    compared,
    data_words,
    gathered,
    heat,
    mean_and_error,
    panel,
    pick,
    series,
    table,
    tasks,
    told,
    values,
    verdict,
)
from fallow.papers.huang2016.results import CONSTANT, ERRORS, both, pairs
from fallow.papers.huang2016.sizes import OWN, RULES, WAYS
from fallow.papers.huang2016.timing import CONSTANT as DENSE


def by_seed(found: Found) -> dict[int, float]:
    """Test errors in % of stochastic depth, by seed."""
    return {cell.tags["seed"]: 100 * result["test_error"] for cell, result in found}


def sweep(found: Found) -> Gathered:
    """Test error against p_L for both rules, constant depth as a line."""
    (task,) = tasks(found)
    constant, _ = both(pairs(found))
    curves, rows, said = [], [], []
    groups: dict[str, dict[float, dict[int, float]]] = {rule: {} for rule in RULES}
    for rule in RULES:
        mine = pick(found, rule=rule)
        points = []
        shown: dict[str, list[float]] = {}
        for last in values(mine, "last"):
            group = groups[rule][last] = by_seed(pick(mine, last=last))
            result = compared(group, constant)
            mean, error = mean_and_error(list(group.values()))
            points.append((last, mean, error))
            between = [result["difference"], result["error"]] if result else [None, None]
            rows.append([f"{rule}, {last:g}", mean, error, *between, len(group)])
            rows[-1].append(verdict(result, f"{rule} {last:g}", CONSTANT))
            shown.setdefault(told(result, "better", "worse"), []).append(last)
        said += [f"{rule} rates against {CONSTANT}: {_places(shown)}."] if shown else []
        if points:
            x, y, spread = (list(column) for column in zip(*points, strict=True))
            curves.append(series(rule, x, y, error=spread))
    made = _with_levels(found, curves, constant)
    columns = ["rule, p_L", "test error in %", "s.e.", "minus constant depth", "s.e.", "seeds", "shown"]
    tables = [table(f"{task}: uniform and linear rates", columns, rows, "differences in pairs of a seed")]
    against, words = _linear_against_uniform(task, groups)
    tables += [against] if against["rows"] else []
    drawn = panel(task, "p_L", "test error in %", made)
    return gathered([drawn], tables, [*said, *words, *data_words(found)])


def _linear_against_uniform(
    task: str, groups: Mapping[str, Mapping[float, Mapping[int, float]]]
) -> tuple[dict[str, Any], list[str]]:
    """The two rules at each p_L, in pairs of a seed."""
    rows, shown = [], {}
    for last in sorted({*groups["linear"]} & {*groups["uniform"]}):
        result = compared(groups["linear"][last], groups["uniform"][last])
        between = [result["difference"], result["error"], result["seeds"]] if result else [None, None, 1]
        judged = verdict(result, "linear", "uniform")
        rows.append([f"{last:g}", *between, judged])
        shown.setdefault(judged, []).append(last)
    columns = ["p_L", "linear minus uniform, points", "s.e.", "seeds", "shown"]
    note = "differences in pairs of a seed; at one p_L linear rates rest half as much"
    words = [f"Linear against uniform rates: {_places(shown)}."] if shown else []
    return table(f"{task}: linear against uniform rates", columns, rows, note), words


def _places(shown: Mapping[str, Sequence[float]]) -> str:
    """At which p_L what was shown."""
    words = (f"{what} at p_L = {', '.join(f'{p:g}' for p in at)}" for what, at in shown.items())
    return "; ".join(words)


def _with_levels(found: Found, curves: list[Any], constant: Mapping[int, float]) -> list[Any]:
    """The curves, with constant depth's level, and the paper's where it trained on these images."""
    places = [x for curve in curves for x in curve["x"]]
    if not places or not constant:
        return curves
    ends = [min(places), max(places)]
    made = [*curves]
    level = mean_and_error(list(constant.values()))[0]
    made.append(series(CONSTANT, ends, [level] * 2, style="dashed"))
    tags = found[0][0].tags
    if (tags["data"], tags["augmented"]) in ERRORS:
        theirs = ERRORS[tags["data"], tags["augmented"]]
        for name, value in zip((CONSTANT, "linear, p_L = 0.5"), theirs, strict=True):
            made.append(series(f"{name}, 110 layers", ends, [value] * 2, style="dashed", label="paper"))
    return made


def heat_map(found: Found) -> Gathered:
    """Test error by p_L and depth; p_L = 1 is constant depth."""
    cells: dict[tuple[float, int], dict[int, float]] = {}
    for cell, result in found:
        depth, seed = cell.tags["depth"], cell.tags["seed"]
        cells.setdefault((cell.tags["last"], depth), {})[seed] = 100 * result["test_error"]
        if "twin_test_error" in result:
            cells.setdefault((1.0, depth), {})[seed] = 100 * result["twin_test_error"]
    rates, depths = sorted({p for p, _ in cells}), sorted({depth for _, depth in cells})
    points = {place: mean_and_error(list(group.values())) for place, group in cells.items()}
    grid = [[points[p, depth][0] if (p, depth) in points else None for depth in depths] for p in rates]
    title = found[0][0].tags["task"].split(", ResNet")[0]
    drawn = heat(f"{title}: test error in %", "layers", "p_L", depths, rates, grid)
    rows = []
    for p in rates:
        row: list[Any] = [f"{p:g}" if p < 1 else f"1 ({CONSTANT})"]
        for depth in depths:
            row += points.get((p, depth), (None, None))
        rows.append(row)
    columns = ["p_L", *(word for depth in depths for word in (f"{depth} layers", "s.e."))]
    best = [_best(depth, points, cells) for depth in depths]
    return gathered([drawn], [table(f"{title}: test error in %", columns, rows)], best)


def _best(
    depth: int,
    points: Mapping[tuple[float, int], tuple[float, float | None]],
    cells: Mapping[tuple[float, int], Mapping[int, float]],
) -> str:
    mine = {p: point for (p, d), point in points.items() if d == depth}
    p = min(mine, key=lambda p: mine[p][0])
    mean, error = mine[p]
    spread = f" ± {error:.2f}" if error else ""
    where = CONSTANT if p == 1 else f"p_L = {p:g}"
    words = f"{depth} layers: the lowest mean is that of {where}, {mean:.2f}{spread} %"
    if p == 1 or (1.0, depth) not in cells:
        return f"{words}."
    result = compared(cells[p, depth], cells[1.0, depth])
    if result is None:
        return f"{words}; {FEW} to compare it with {CONSTANT}."
    # the smallest of several means is smaller than its own truth, so this leans towards a difference
    judged = told(result, "shown", "shown")
    return f"{words}, {result['difference']:+.2f} ± {result['error']:.2f} from {CONSTANT}: {judged}."


def ablation(found: Found) -> Gathered:
    """Errors and times of other ways at the same rates."""
    trained = [(cell, result) for cell, result in found if "way" in cell.tags]
    timed = next((result["ways"] for cell, result in found if cell.tags.get("work") == "timing"), {})
    own = by_seed(pick(trained, way=OWN))
    rows, said = [], []
    constant, _ = both(pairs(trained))
    groups = {DENSE: constant, **{way: by_seed(pick(trained, way=way)) for way in WAYS}}
    for way, group in groups.items():
        if not group and way not in timed:
            continue
        mean, error = mean_and_error(list(group.values())) if group else (None, None)
        result = None if way == OWN else compared(group, own)
        between = [result["difference"], result["error"]] if result else [None, None]
        judged = "" if way == OWN else verdict(result, way, OWN)
        if result:
            said.append(
                f"{way}: {result['difference']:+.2f} ± {result['error']:.2f} points from {OWN}: {judged}."
            )
        time = timed.get(way, {})
        ratio = time.get("time") or {}
        rows.append([way, mean, error, *between, judged, time.get("realised_cost")])
        rows[-1] += [ratio.get(key) for key in ("ratio", "low", "high")]
    columns = ["sampler, mode, gradients", "test error in %", "s.e.", "minus the paper's", "s.e.", "shown"]
    columns += ["share of FLOPs run", "time ratio", "from", "to"]
    note = (
        f"the paper's way is {OWN}: independent draws, one for a batch, and an optimiser that also moves "
        "what rested; differences in pairs of a seed. Times: one step of each way and of constant depth in "
        "turn, ratio of mean processor times (on a GPU wall clock) with a 95 % bootstrap interval, over as "
        "many steps as gave the share of FLOPs: independent draws miss the expected share a little"
    )
    task = tasks(found)[0]
    made = table(f"{task}: at the same rates", columns, rows, note)
    return gathered([], [made], [*said, *data_words(trained)])

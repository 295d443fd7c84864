"""What is plotted of `pal2020` at the end of training: the global minimum, spectra, the adaptive rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fallow.papers._panels import Found, gathered, panel, pick, series, table, values
from fallow.papers.pal2020.cells import COUNTED

Gathered = dict[str, list[Any]]
Result = Mapping[str, Any]
_METHODS = {"minimise": "L-BFGS on (1)", "adam": "Adam on (1)", "sampled": "sampled masks"}
_FLOOR = 1e-16  # of what a logarithmic axis shows


def above(result: Result, key: str = "last") -> float:
    """How far the objective is above F*, relative to F*."""
    best = result["optimum"]["value"]
    return (result[key]["objective"] - best) / best


def certified(end: Result) -> float | None:
    """The duality gap relative to its objective: above no minimum by more than this share, without (4)."""
    return None if end["bound"] is None else 1 - end["bound"] / end["objective"]


def largest_error(end: Result, best: Result) -> float:
    """The largest difference of singular values, relative to the largest of the closed form."""
    ours, theory = padded(end["spectrum"], best["spectrum"])
    return max(abs(a - b) for a, b in zip(ours, theory, strict=True)) / max(theory)


def padded(*spectra: Sequence[float]) -> list[list[float]]:
    """The spectra with zeros up to the length of the longest."""
    length = max(map(len, spectra))
    return [[*s, *[0.0] * (length - len(s))] for s in spectra]


# --- 2: the optimum -------------------------------------------------------------------------------------


def optimum(found: Found) -> Gathered:
    """Distance to the computed global minimum, without sampling and with it."""
    exact, drawn, rows, noisy = pick(found, work="minimum"), [], [], []
    for r in values(found, "r"):
        for _, result in pick(exact, r=r):
            best, end = result["optimum"], result["last"]
            gaps = [max(value / best["value"] - 1, _FLOOR) for _, value in result["curve"]]
            drawn.append(series(f"r = {r}", [step for step, _ in result["curve"]], gaps))
            rows.append([r, best["effective_rank"], best["share"], best["value"] / best["dropout"] - 1])
            rows[-1] += [above(result), certified(end), end["distance"], end["unequal"]]
        for _, result in pick(found, work="descent", r=r):
            last, mean = result["last"], result["mean"]
            noisy.append([r, above(result), last["distance"], above(result, "mean"), mean["distance"]])
            noisy[-1] += [certified(mean)]
    columns = ["r", "effective rank of A*", "F*/|Y|²", "F* over Dropout's, −1", "trained over F*, −1"]
    columns += ["duality gap", "|A − A*|/|A*|", "spread of block norms"]
    note = (
        "trained: L-BFGS on (1) from a random start; duality gap: relative to the objective, known "
        "without the closed form; spread: largest less smallest |U_b H_b| over their mean"
    )
    made = [table("Deterministic training against the closed form", columns, rows, note)]
    columns = ["r", "last iterate over F*, −1", "|A − A*|/|A*|", "mean iterate over F*, −1", "|A − A*|/|A*|"]
    note = "fresh masks at every step; mean: of factors over the last fifth of the steps"
    made.append(table("Training with sampled masks", [*columns, "its duality gap"], noisy, note))
    axis = "(objective − F*) / F*"
    panels = [panel("L-BFGS on (1)", "iteration", axis, drawn, log=True)] if drawn else []
    return gathered(panels, made, [*_reached(found), *_as_dropout(exact)])


def _reached(found: Found) -> list[str]:
    said = []
    exact, noisy = pick(found, work="minimum"), pick(found, work="descent")
    if exact:
        worst = max(exact, key=lambda one: above(one[1]))
        low = min(above(result) for _, result in exact)
        said.append(
            f"Without sampling the objective ends {low:.0e} to {above(worst[1]):.0e} of F* above it, the "
            f"most at r = {worst[0].tags['r']} (few blocks converge slowly), and never below."
            if low > -1e-12
            else f"Without sampling the objective is below F* by {-low:.0e}: an error."
        )
    if noisy:
        gaps = [above(result, "mean") for _, result in noisy]
        said.append(
            f"With sampled masks the mean of the last iterates ends at most {100 * max(gaps):.2g} % above F*."
        )
    return said


def _as_dropout(exact: Found) -> list[str]:
    """Where the block size changes nothing: up to the effective rank (3.6)."""
    same = [c.tags["r"] for c, r in exact if abs(r["optimum"]["value"] / r["optimum"]["dropout"] - 1) < 1e-9]
    if not same or not exact:
        return []
    rank = exact[0][1]["optimum"]["effective_rank"]
    blocks = ", ".join(str(r) for r in sorted(same))
    return [
        f"Of these block sizes {blocks} have the minimum of Dropout of the same rate: block sizes up to the "
        f"effective rank of the solution, {rank:.1f} for Dropout, change nothing."
    ]


# --- 3: spectra -----------------------------------------------------------------------------------------


def spectra(found: Found) -> Gathered:
    """Singular values of the trained predictions against (4), for linear and for deep networks."""
    panels, rows, said = [], [], []
    for r in values([one for one in found if one[0].tags["work"] == "minimum"], "r"):
        minimum, walk = pick(found, work="minimum", r=r), pick(found, work="descent", r=r)
        ends = [("L-BFGS on (1)", result, result["last"]) for _, result in minimum]
        ends += [("sampled masks, mean iterate", result, result["mean"]) for _, result in walk]
        panels.append(_spectrum(f"linear network, r = {r}", ends))
        rows += [_counts("linear", r, *end) for end in ends]
    deep = pick(found, work="deep")
    for task in dict.fromkeys(cell.tags["task"] for cell, _ in deep):
        for r in values(pick(deep, task=task), "r"):
            ends = [(_METHODS[c.tags["method"]], x, x["last"]) for c, x in pick(deep, task=task, r=r)]
            panels.append(_spectrum(f"{task}, r = {r}", ends))
            rows += [_counts(task, r, *end) for end in ends]
    said += _agreement("Linear networks", [one for one in found if one[0].tags["work"] != "deep"])
    said += _agreement("Deep networks", deep) + _one_hot(deep)
    columns = ["network", "r", "trained with", "(q, ρ) of (4)", "width that is enough", "(q, ρ) counted, (4)"]
    columns += ["counted, trained", "objective over F*, −1", "duality gap", "largest error of a value"]
    note = (
        f"counted: with differences below {COUNTED:g} of the largest target value taken as none; the "
        "error is relative to the largest value of (4)"
    )
    return gathered(panels, [table("Kept counts", columns, rows, note)], said)


def _spectrum(title: str, ends: Sequence[tuple[str, Result, Result]]) -> dict[str, Any]:
    best = ends[0][1]["optimum"]
    length = len(best["targets"])
    places = list(range(1, length + 1))
    drawn = [
        series("targets", places, best["targets"], style="dashed"),
        series("closed form (4)", places, best["spectrum"], label="derived"),
    ]
    for name, _, end in ends:
        drawn.append(series(name, places, end["spectrum"][:length], style="points"))
    return panel(title, "index", "singular value", drawn)


def _counts(network: str, r: int, name: str, result: Result, end: Result) -> list[Any]:
    best = result["optimum"]
    gap = (end["objective"] - best["value"]) / best["value"]
    row = [network, r, name, f"({best['head']}, {best['kept']})", best["reachable_width"]]
    row += ["({}, {})".format(*counted["counts"]) for counted in (best, end)]
    return [*row, gap, certified(end), largest_error(end, best)]


def _agreement(what: str, found: Found) -> list[str]:
    """How near the spectra are, without sampling and with it."""
    exact, noisy = [], []
    for cell, result in found:
        sampled = cell.tags["work"] == "descent" or cell.tags.get("method") == "sampled"
        end = result["mean"] if "mean" in result else result["last"]
        (noisy if sampled else exact).append(largest_error(end, result["optimum"]))
    words = [
        f"{100 * max(errors):.2g} % {how}"
        for errors, how in ((exact, "without sampling"), (noisy, "with sampled masks"))
        if errors
    ]
    return [f"{what}: every singular value is within {' and '.join(words)} of (4)."] if words else []


def _one_hot(deep: Found) -> list[str]:
    """The pitfall of flat targets: what (4) makes of one-hot labels of the same images."""
    shown = [(cell.tags["r"], result["one_hot"]) for cell, result in deep]
    if not shown:
        return []
    least, most = min(one["least"] for _, one in shown), max(one["most"] for _, one in shown)
    sizes = sorted({r for r, _ in shown})
    return [
        f"One-hot labels of the same images have a flat spectrum: (4) would multiply every singular value by "
        f"{least:.3f} to {most:.3f} at all of r = {', '.join(map(str, sizes))}. Hence real-valued targets."
    ]


# --- the adaptive rate ----------------------------------------------------------------------------------


def adaptive(found: Found) -> Gathered:
    """The rate (2) and the minimum that it gives; the minimum over the width, with it and without."""
    rows, panels, said = [], [], []
    for r in values(pick(found, work="adaptive"), "r"):
        for _, result in pick(found, work="adaptive", r=r):
            best = result["optimum"]
            share = result["last"]["objective"] / best["value"] * best["share"]
            rows.append([r, result["survival_rate"], best["share"], share, above(result)])
            rows[-1] += [certified(result["last"]), best["kept"]]
    for cell, result in pick(found, work="widths"):
        fixed, base = cell.options["fixed_rate"], cell.options["base_rate"]
        drawn = [
            series(f"survival rate {fixed:g}", result["widths"], result["fixed"], label="derived"),
            series(f"the rate (2), base {base:g}", result["widths"], result["adaptive"], label="derived"),
        ]
        r = cell.options["block_size"]
        panels.append(panel(f"Minimum over the width, r = {r}", "hidden units d", "F*/|Y|²", drawn))
        ends = [[result[key][place] for place in (0, -1)] for key in ("fixed", "adaptive")]
        said.append(
            f"r = {r}, from {result['widths'][0]} to {result['widths'][-1]} hidden units: at a fixed rate "
            f"F*/|Y|² falls from {ends[0][0]:.3g} to {ends[0][1]:.2g}, with the rate (2) it goes from "
            f"{ends[1][0]:.3g} to {ends[1][1]:.3g}."
        )
    columns = [
        "r",
        "rate (2) at 160 units",
        "F*/|Y|²",
        "trained",
        "trained over F*, −1",
        "duality gap",
        "rank",
    ]
    made = [table("The adaptive survival rate", columns, rows, "trained: L-BFGS on (1)")] if rows else []
    return gathered(panels, made, said)

"""What is plotted of `pal2020` over training: sampled masks against (1), sliding blocks, DropConnect."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fallow.papers._experiments import Cell
from fallow.papers._panels import Found, compared, gathered, is_shown, panel, pick, series, table, values
from fallow.papers.pal2020.cells import CASES

Gathered = dict[str, list[Any]]
Windows = Sequence[Mapping[str, float]]
LAWS = {"disjoint": "DropBlock", "sliding": "sliding DropBlock", "dropconnect": "DropConnect"}
TWO = 2.0  # standard errors, within which 95 % of unbiased means lie
_NOTE = "from the second window on; in the first the loss falls from the start"


def name_of(cell: Cell) -> str:
    """What drops, in words."""
    law, r = cell.tags["law"], cell.tags["r"]
    if law == "dropconnect":
        return LAWS[law]
    return "Dropout" if r == 1 else f"{LAWS[law]}, r = {r}"


def apart(window: Mapping[str, float]) -> float:
    """How many standard errors the sampled mean of a window is above the expected one."""
    gap = window["sampled"] - window["expected"]
    return gap / window["error"] if window["error"] else 0.0


def later(windows: Windows) -> Windows:
    """The second half of training."""
    return windows[len(windows) // 2 :]


def bias(windows: Windows) -> tuple[float, float]:
    """Mean of sampled less expected loss, and its standard error, relative to the mean expected loss."""
    level = math.fsum(w["expected"] for w in windows)
    gap = math.fsum(w["sampled"] - w["expected"] for w in windows)
    return gap / level, math.sqrt(math.fsum(w["error"] ** 2 for w in windows)) / level


# --- 1: curves ------------------------------------------------------------------------------------------


def curves(found: Found) -> Gathered:
    """The running mean of the sampled loss, (1) at the same iterates, and descent on (1)."""
    panels, rows, gaps = [], [], []
    for cell, result in found:
        windows, name = result["windows"], name_of(cell)
        panels.append(curve_panel(name, windows))
        gaps += [apart(window) for window in windows]
        relative, error = bias(later(windows))
        last = windows[-1]
        rows.append(
            [
                name,
                len(windows),
                100 * relative,
                100 * error,
                relative / error if error else 0.0,
                sum(abs(apart(w)) > TWO for w in windows),
                last["expected"],
                last["descent"],
                result["optimum"]["value"],
            ]
        )
    columns = ["what drops", "windows", "sampled − (1), %", "s.e., %", "s.e. apart", "windows beyond 2 s.e."]
    columns += ["(1) at the end, sampled masks", "the same, descent on (1)", "F*"]
    note = "per cent of (1), over the second half of the steps; ends are means over the last window"
    within = sum(abs(gap) <= TWO for gap in gaps) / len(gaps)
    said = (
        f"Over {len(gaps)} windows the sampled mean lies within 2 standard errors of (1) in "
        f"{100 * within:.0f} % (95 % where there is no bias), {max(map(abs, gaps)):.1f} of them away at most."
    )
    return gathered(panels, [table("Sampled and deterministic loss", columns, rows, note)], [said])


def curve_panel(name: str, windows: Windows) -> dict[str, Any]:
    """Sampled means with their errors, (1) at the same iterates and, where there is one, descent on (1)."""
    windows = windows[1:]
    steps, errors = _of(windows, "step"), _of(windows, "error")
    drawn = [
        series("mean of the sampled loss", steps, _of(windows, "sampled"), error=errors, style="points"),
        series("(1) at the same iterates", steps, _of(windows, "expected"), label="derived"),
    ]
    if "descent" in windows[0]:
        drawn.append(series("descent on (1)", steps, _of(windows, "descent"), style="dashed"))
    return panel(name, "step", "squared error", drawn, log=True, note=_NOTE)


def _of(windows: Windows, key: str) -> list[float]:
    return [w[key] for w in windows]


# --- 4: sliding against disjoint ------------------------------------------------------------------------


def sliding(found: Found) -> Gathered:
    """Curves and minima of the original DropBlock and of the one that is analysed, at equal rates."""
    panels, rows, said = [], [], []
    for r in values(found, "r"):
        drawn = []
        for law in ("disjoint", "sliding"):
            for cell, result in pick(found, work="descent", law=law, r=r):
                windows, name = result["windows"][1:], LAWS[cell.tags["law"]]
                steps, errors = _of(windows, "step"), _of(windows, "error")
                words, sampled, level = f"{name}, sampled", _of(windows, "sampled"), _of(windows, "expected")
                drawn.append(series(words, steps, sampled, error=errors, style="points", group=name))
                drawn.append(series(f"{name}, (1)", steps, level, label="derived", group=name))
        if drawn:
            panels.append(panel(f"r = {r}", "step", "squared error", drawn, log=True, note=_NOTE))
        both = [pick(found, work="minimum", law=law, r=r) for law in ("disjoint", "sliding")]
        if not all(both):
            continue
        (_, disjoint), (_, slid) = both[0][0], both[1][0]
        best, least = disjoint["optimum"], slid["last"]["objective"]
        ratio = least / best["value"]
        rows.append([r, best["effective_rank"], best["value"], disjoint["last"]["objective"], least])
        rows[-1] += [100 * (ratio - 1), best["dropout"]]
        said.append(
            f"r = {r}: the least value found with sliding blocks is {100 * abs(ratio - 1):.2g} % "
            f"{'below' if ratio < 1 else 'above'} that of disjoint ones; the effective rank of the "
            f"solution is {best['effective_rank']:.1f}."
        )
    columns = ["r", "effective rank", "F*, disjoint", "disjoint, trained", "sliding, trained"]
    columns += ["sliding less disjoint, %", "F* of Dropout"]
    note = "trained: L-BFGS on the deterministic objective, a start each; sliding blocks have no closed form"
    return gathered(panels, [table("Minima at equal survival rates", columns, rows, note)], said)


# --- 5: DropConnect against Dropout ---------------------------------------------------------------------


def dropconnect(found: Found) -> Gathered:
    """Training with either, from the same starts, and their mean losses at one point."""
    panels, said = [], []
    walks = pick(found, work="descent")
    first = [(c, r) for c, r in walks if c.tags["seed"] == 0]
    drawn = []
    for cell, result in first:
        windows = result["windows"][1:]
        steps, errors = _of(windows, "step"), _of(windows, "error")
        drawn.append(series(name_of(cell), steps, _of(windows, "sampled"), error=errors, style="points"))
        if "descent" in windows[0]:
            level = _of(windows, "descent")
            drawn.append(series("descent on (1)", steps, level, style="dashed", label="derived"))
    if drawn:
        panels.append(
            panel("Last layer, one mask a step", "step", "squared error", drawn, log=True, note=_NOTE)
        )
    tables = []
    if walks:
        made, words = _pairs(walks)
        tables.append(made)
        said += words
    points = pick(found, work="point")
    if points:
        made, words = _points(points)
        tables.append(made)
        said += words
    return gathered(panels, tables, said)


def _pairs(walks: Found) -> tuple[Any, list[str]]:
    """Losses over the second half and at the end, in pairs of the same start."""
    rows, said = [], []
    measures = {
        "sampled − (1), mean over the second half": lambda r: _gap(later(r["windows"])),
        "(1), mean over the second half": lambda r: _mean(later(r["windows"]), "expected"),
        "(1) at the mean of the last fifth of the iterates": lambda r: r["mean"]["objective"],
        "(1) after the last step": lambda r: r["last"]["objective"],
    }
    for name, measure in measures.items():
        by = {law: {c.tags["seed"]: measure(r) for c, r in pick(walks, law=law)} for law in LAWS}
        result = compared(by["dropconnect"], by["disjoint"])
        if result is None:
            continue
        means = [math.fsum(by[law].values()) / len(by[law]) for law in ("disjoint", "dropconnect")]
        rows.append([name, *means, result["difference"], result["error"], result["apart"], result["chance"]])
        shown = "differ" if is_shown(result) else "are not shown to differ"
        said.append(
            f"{name}: DropConnect and Dropout {shown} ({result['difference']:+.3g}, "
            f"{abs(result['apart']):.1f} standard errors over {result['seeds']} pairs)."
        )
    columns = ["what", "Dropout", "DropConnect", "difference", "s.e.", "s.e. apart", "chance"]
    note = "s.e. over starts; the least value is F* of blocks of 1, " + _least(walks)
    return table("Training from the same starts", columns, rows, note), said


def _gap(windows: Windows) -> float:
    return _mean(windows, "sampled") - _mean(windows, "expected")


def _mean(windows: Windows, key: str) -> float:
    return math.fsum(w[key] for w in windows) / len(windows)


def _least(walks: Found) -> str:
    return f"{walks[0][1]['optimum']['value']:.6g}"


def _off(one: Mapping[str, float]) -> str:
    """How far the exact mean is from Dropout's, in words."""
    off = one["formula"] / one["dropout"] - 1
    return "is exactly Dropout" if abs(off) < 1e-12 else f"is {100 * off:+.0f} % off Dropout"


def _points(points: Found) -> tuple[Any, list[str]]:
    """Mean losses over masks against Dropout's (1) and the exact mean."""
    rows, said = [], []
    for cell, result in sorted(points, key=lambda one: not one[0].tags["whitened"]):
        inputs = "whitened" if cell.tags["whitened"] else "correlated"
        for case, r in result.items():
            off = r["formula"] / r["dropout"] - 1
            rows.append([f"{CASES[case]}, {inputs} inputs", r["dropout"], r["loss"], r["loss_error"]])
            rows[-1] += [
                (r["loss"] - r["formula"]) / r["loss_error"],
                100 * (off if abs(off) > 1e-12 else 0.0),
            ]
            rows[-1] += [r["outgoing"], r["outgoing_error"], r["incoming"]]
        words = [f"{CASES[case]} {_off(result[case])}" for case in ("outgoing", "incoming", "both")]
        said.append(f"{inputs} inputs: {'; '.join(words)}.")
        said.append(
            f"{inputs} inputs: the mean squared gradient of the incoming weights is "
            f"{result['outgoing']['incoming'] / result['dropout']['incoming']:.2f} times as large with "
            "DropConnect on the outgoing weights as with Dropout, of the same expected loss: only the "
            "noise of training differs."
        )
    columns = ["masks", "Dropout's (1)", "mean over masks", "s.e.", "s.e. from its exact mean"]
    columns += ["exact mean off Dropout, %", "|gradient|², outgoing", "s.e.", "|gradient|², incoming"]
    note = "both layers: against Dropout with the square of the rate; gradients of the sampled loss"
    return table("One point, many masks", columns, rows, note), said

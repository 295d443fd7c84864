"""What is tabled and said of the recipes beside the seven methods of `lejeune2021`, and of their tuning."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fallow.papers._panels import Found, compared, gathered, is_shown, pick, table
from fallow.papers.lejeune2021.methods import METHODS
from fallow.papers.lejeune2021.results import Row, comparable, row_of, spread
from fallow.papers.lejeune2021.sizes import OURS, PEER, SPARSE

# Name -> test error in %, compression, of LeNet-300-100 on MNIST.
ANCHORS: Mapping[str, tuple[float, float]] = {
    "Sparse VD (Molchanov et al. 2017)": (1.92, 68.0),
    "DNS (Guo et al. 2016)": (1.99, 56.0),
    "SWS (Ullrich et al. 2017)": (1.94, 23.0),
    "Pruning (Han et al. 2015)": (1.59, 12.0),
}
FEWEST = 3  # seeds: of two, both differences may be the same by chance, as errors are counts
_USUAL = {"ramp": [0.1, 0.7]}  # of `fallow.sparsify`


def beyond(found: Found) -> Mapping[str, Any]:
    """Sparse variational dropout, gradual magnitude pruning and our two recipes, at equal epochs."""
    columns = ["images", "recipe", "compression", "test error %", "s.d.", "neurons left", "seeds"]
    lines, said = [], []
    cell, result = found[0]
    said.append(
        f"{cell.options['data']}: {result['trained_on']} images to train on, none held out; "
        f"{result['tested_on']} to test on; {cell.options['epochs']} epochs."
    )
    for shift, goal, method in _kinds(found):
        row = row_of(method, [r for _, r in pick(found, shift=shift, goal=goal, method=method)])
        neurons = ", ".join("-".join(map(str, one)) for one in row.neurons)
        images = "moved by up to one pixel" if shift else "as they are"
        title = METHODS[method].title
        lines.append(
            [images, title, row.compression, row.error, spread(row.errors), neurons, len(row.errors)]
        )
        if comparable(found) and not shift:
            said += _against(row)
    for shift, goal in dict.fromkeys((shift, goal) for shift, goal, _ in _kinds(found)):
        for ours in OURS:
            said += _duel(found, shift, goal, ours)
    return gathered([], [table("LeNet-300-100 beyond the seven methods", columns, lines)], said)


def tuning(found: Found) -> Mapping[str, Any]:
    """What was tried for gradual magnitude pruning and our two recipes, the best of each first."""
    columns = ["recipe", "learning rate", "settings", "validation error %", "chosen"]
    lines, said = [], []
    for method in (PEER, *OURS):
        mine = [(100 * r["curve"]["validation_error"][-1], cell) for cell, r in pick(found, method=method)]
        mine.sort(key=lambda pair: pair[0])
        title = METHODS[method].title
        for error, cell in mine:
            rate, settings = cell.options["learning_rate"], dict(cell.options["settings"])
            settings.pop("target")
            words = ", ".join(f"{key} {value}" for key, value in (settings or _USUAL).items())
            lines.append([title, rate, words, error, "yes" if cell.tags["used"] else ""])
        place = [cell.tags["used"] for _, cell in mine].index(True) if _any_used(mine) else None
        if place is not None:
            ahead = mine[place][0] - mine[0][0]
            said.append(
                f"{title}: of {len(mine)} settings the chosen one has the {_ordinal(place + 1)} least "
                f"validation error, {ahead:.2f} points above the least."
            )
    return gathered([], [table("Settings tried, one seed", columns, lines)], said)


def _any_used(mine: Sequence[tuple[float, Any]]) -> bool:
    return any(cell.tags["used"] for _, cell in mine)


def _ordinal(place: int) -> str:
    return {1: "1st", 2: "2nd", 3: "3rd"}.get(place, f"{place}th")


def _kinds(found: Found) -> list[tuple[int, int, str]]:
    """(shift, goal, method), each once, in order."""
    keys = {(c.tags["shift"], c.tags["goal"], c.tags["method"]) for c, _ in found}
    return sorted(keys, key=lambda key: (key[0], key[1], (SPARSE, PEER, *OURS).index(key[2])))


def _against(row: Row) -> list[str]:
    """Which of the published results are worse in neither error nor compression than ours."""
    size = row.compression
    beaten = [name for name, (error, x) in ANCHORS.items() if size and size >= x and row.error <= error]
    if not beaten:
        return []
    return [
        f"{METHODS[row.method].title} at {size:.0f}x and {row.error:.2f} % is no worse in either than "
        f"{', '.join(beaten)}."
    ]


def _duel(found: Found, shift: int, goal: int, own: str) -> list[str]:
    """One of ours against the peer at the same compression, in pairs of the same seed."""
    mine = pick(found, shift=shift, goal=goal)
    by_seed = {
        method: {cell.tags["seed"]: 100 * result["test_error"] for cell, result in pick(mine, method=method)}
        for method in (PEER, own)
    }
    if not all(by_seed.values()):
        return []
    ours, peer = (statistics.fmean(by_seed[method].values()) for method in (own, PEER))
    apart = compared(by_seed[own], by_seed[PEER])
    images = ", images moved by up to one pixel" if shift else ""
    words = f"{goal}x{images}: {METHODS[own].title} {ours:.2f} %, {METHODS[PEER].title} {peer:.2f} %; "
    if apart is None or apart["seeds"] < FEWEST:
        return [words + "too few seeds to call one better."]
    if not is_shown(apart):
        return [words + f"over {apart['seeds']} seeds no difference is shown."]
    better = METHODS[own if apart["difference"] < 0 else PEER].title
    size = f"{abs(apart['difference']):.2f} points (s.e. {apart['error']:.2f} over {apart['seeds']} seeds)"
    return [words + f"{better} is better by {size}."]

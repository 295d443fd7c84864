"""Figure 1 of `lejeune2021`: the penalties that dropout methods amount to, of one weight and of a vector."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fallow.papers._panels import Found, gathered, panel, series, table
from fallow.penalties import MCP, HardConcrete, HardThreshold, LogSum, Standout, VariationalDropout

Pieces = Callable[[str, Callable[[], Any]], Any]
# Name -> penalty and strength. Standout and the hard concrete gates are drawn at strength 1.
DROPOUT: dict[str, tuple[Any, float]] = {
    "VarDrop": (VariationalDropout(), 1.0),
    "Standout": (Standout(), 1.0),
    "HardConcrete": (HardConcrete(c=0.5), 1.0),
}
CLASSICAL: dict[str, tuple[Any, float]] = {
    "LogSum(2)": (LogSum(eps=2.0), 2.0),
    "MCP(1/2, √2)": (MCP(a=0.5, l=2**0.5), 2**0.5),
}
CURVES = DROPOUT | CLASSICAL
HARD = "HardThresh(16)"
SMALLEST, LARGEST, OFFSET = 0.01, 5.0, 1e-3
_ROOM = 1.05  # how far above the other curves the step to infinity is drawn


def penalties_cell(points: int, size: int, kept: int, pieces: Pieces) -> dict[str, Any]:
    """Both sets of curves, computed from `fallow.penalties`.

    Args:
        points: weights from 0.01 to 5, at equal ratios.
        size: entries of the vector.
        kept: k of the hard threshold.
        pieces: keeps the result.

    Returns:
        weights and, by name, the penalty of each minus that of the first; counts of entries that are not 0
        and the penalty of each such vector minus the least of them. Infinite values are None.
    """

    def compute() -> dict[str, Any]:
        w = torch.logspace(0, 1, points, LARGEST / SMALLEST, dtype=torch.float64) * SMALLEST
        x = vectors(size)
        scalar = {name: strength * penalty.value(w) for name, (penalty, strength) in CURVES.items()}
        vector = {name: strength * penalty.value(x).sum(-1) for name, (penalty, strength) in CURVES.items()}
        vector[HARD] = HardThreshold(kept).value(x)
        return {
            "weights": w.tolist(),
            "scalar": {name: (value - value[0]).tolist() for name, value in scalar.items()},
            "counts": list(range(size + 1)),
            "vector": {name: _listed(value - value.min()) for name, value in vector.items()},
        }

    return pieces("penalties", compute)


def vectors(size: int) -> Tensor:
    """A vector for each k = 0..size: k entries are 1 / sqrt(k + 0.001), so that its length is near 1."""
    count = torch.arange(size + 1, dtype=torch.float64)
    filled = torch.arange(size) < count[:, None]
    return filled * (count + OFFSET).rsqrt()[:, None]


def _listed(values: Tensor) -> list[float | None]:
    return [value if value < torch.inf else None for value in values.tolist()]


# --- plots and tables ---------------------------------------------------------------------------------------


def figure(found: Found) -> Mapping[str, Any]:
    """The two panels, the curves at a few places, and what they say of one another."""
    result = found[0][1]
    weights, counts = result["weights"], result["counts"]
    scalar, vector = result["scalar"], result["vector"]
    left = [_curve(name, weights, scalar[name]) for name in CURVES]
    right = [_curve(name, counts, vector[name]) for name in CURVES]
    top = _ROOM * max(max(vector[name]) for name in CURVES)
    right.append(_step(counts, vector[HARD], top))
    note = "solid: dropout methods; dashed: classical penalties"
    panels = [
        panel("Scalar penalty λΩ(w)", "w", "λΩ(w) − λΩ(0.01)", left, note=note),
        panel(
            "Vector penalty λΩ(x)",
            "entries that are not 0",
            "λΩ(x) minus its minimum",
            right,
            note=f"{note}; {HARD} is infinite beyond its 16 entries",
        ),
    ]
    at = [_nearest(weights, w) for w in (0.1, 0.5, 1.0, 2.0, 5.0)]
    rows = [[name, *(scalar[name][i] for i in at)] for name in CURVES]
    columns = ["penalty", *(f"w = {weights[i]:.3g}" for i in at)]
    tables = [table("Scalar penalty, minus its value at w = 0.01", columns, rows)]
    chosen = (1, 4, 16, 17, 32)
    rows = [[name, *(vector[name][k] for k in chosen)] for name in (*CURVES, HARD)]
    columns = ["penalty", *(f"k = {k}" for k in chosen)]
    tables.append(table("Vector penalty of k equal entries, minus its minimum", columns, rows, "–: infinite"))
    return gathered(panels, tables, _words(scalar))


def _curve(name: str, x: Sequence[float], y: Sequence[float]) -> dict[str, Any]:
    # a group of another name than the curve gives a dashed one a colour of its own
    return series(name, x, y, style="line" if name in DROPOUT else "dashed", group=name.split("(")[0])


def _step(counts: Sequence[int], values: Sequence[float | None], top: float) -> dict[str, Any]:
    """Finite as far as it is, then straight up: where a plot can show the step to infinity."""
    below = [(k, value) for k, value in zip(counts, values, strict=True) if value is not None]
    x, y = [k for k, _ in below], [value for _, value in below]
    return series(HARD, [*x, x[-1]], [*y, top])


def _nearest(values: Sequence[float], wanted: float) -> int:
    return min(range(len(values)), key=lambda i: abs(values[i] - wanted))


def gap(scalar: Mapping[str, Sequence[float]], first: str, second: str) -> float:
    """The largest distance of two curves, both 0 at w = 0.01."""
    return max(abs(a - b) for a, b in zip(scalar[first], scalar[second], strict=True))


def _words(scalar: Mapping[str, Sequence[float]]) -> list[str]:
    log, mcp = "LogSum(2)", "MCP(1/2, √2)"
    return [
        f"VarDrop and {log} at strength 2 are at most {gap(scalar, 'VarDrop', log):.2f} apart on this range; "
        f"HardConcrete and {mcp} at strength √2 at most {gap(scalar, 'HardConcrete', mcp):.3f}.",
        f"At w = 5 HardConcrete has reached {scalar['HardConcrete'][-1]:.3f} and is flat, Standout "
        f"{scalar['Standout'][-1]:.3f} of its limit of 1; VarDrop and {log} go on growing like log w.",
    ]

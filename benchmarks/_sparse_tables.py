"""The tables of benchmarks/sparsify.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import _timing


def show(part: str, found: dict[str, Any], bound: Sequence[str]) -> None:
    """The table of one part; `bound`: the methods that have one."""

    def interval(row: dict[str, float]) -> str:
        return str(_timing.Interval(**row))

    def verdict(name: str, most: float | None) -> str:
        return "" if most is None else f"{most:.2f} {'FAILS' if name in found['fails'] else 'holds'}"

    if part == "steps":
        title = (
            f"{found['subject']}, {found['optimiser']}, batch {found['batch']}: CPU time of a step, "
            f"plain = 1 ({1e3 * found['plain_s']['median']:.2f} ms)"
        )
        rows = [
            (name, interval(row), verdict(name, found["bound"] if name in bound else None))
            for name, row in found["over_plain"].items()
        ]
        _timing.table(title, ("method", "CPU time", "bound"), rows)
    elif part == "prox":
        title = f"prox of {found['size']:,} weights, CPU time of w.abs().sqrt() = 1"
        rows = [
            (name, interval(row), verdict(name, found["bound"] if name == "logsum" else None))
            for name, row in found["over_abs_sqrt"].items()
        ]
        _timing.table(title, ("penalty", "CPU time", "bound"), rows)
    elif part == "latency":
        title = f"shrunken networks, batch {found['batch']}: forward, dense = 1"
        rows = [
            (
                name,
                f"{row['flops']:.3f}",
                interval(row["time"]),
                interval(row["over_proportional"]),
                verdict(name, row["bound"]),
            )
            for name, row in found["rows"].items()
        ]
        _timing.table(title, ("kept", "FLOPs", "CPU time", "time / FLOPs", "bound"), rows)
    else:
        title = f"{found['data']}, {found['steps']} steps of training; latency at batch {found['batch']}"
        rows = [
            (
                name,
                f"{row['takes']} {row['target']:g}" if row["takes"] else "",
                f"{100 * sum(row['errors']) / len(row['errors']):.2f} %",
                f"{row['flops'] / 1e6:.2f}",
                f"{row['nonzero']:,.0f}",
                f"{row['bytes'] / 1e3:,.0f}",
                f"{row['sparse_bytes'] / 1e3:,.0f}",
                interval(row["time"]),
            )
            for name, row in found["rows"].items()
        ]
        header = ("arm", "target", "error", "MFLOPs", "nonzero", "file, kB", "as CSR, kB", "CPU time")
        _timing.table(title, header, rows)

#!/usr/bin/env python
"""What resting branches saves: `fallow.apply` beside constant depth, other packages' rules and code by hand.

    python benchmarks/skip.py --json skip.json          # the full measurement, about an hour on two cores
    python benchmarks/skip.py --quick --subject vit     # a look

Times are ratios to constant depth: medians over pairs of interleaved steps, with a 95 % bootstrap interval. A
bound holds if the interval's lower end is at most it. README.md in this folder says how to read the table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the project's root in place of this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


from benchmarks import _command, _peers, _timing
from benchmarks._arms import (
    APPLIED,
    BASE,
    LAYOUTS,
    OVERHEAD,
    ROW,
    SUBJECTS,
    Arm,
    Case,
    build_arms,
    parts,
    rates_of,
)

OVERHEAD_BOUND, MEMORY_MARGIN = 1.01, 0.05


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Time every arm of a case, then its memory; the result as JSON has it."""
    sites, rates, ideal = rates_of(case, options.last)
    arms = build_arms(case, rates, options.last, options.seed)
    kinds = parts(sites)
    for kind, chosen in kinds.items():
        arms[f"without {kind}"] = Arm(case, _peers.without(case.build(options.seed), chosen), arms[BASE].data)

    def note(name: str, turn: int) -> None:
        if (handle := arms[name].handle) is not None:
            arms[name].costs.append(handle.last_cost)
        if sys.stderr.isatty():
            print(f"\r{case}: round {turn + 1} of {options.pairs}, {name:<28}", end="", file=sys.stderr)

    steps = {name: arm.step for name, arm in arms.items()}
    times = _timing.interleave(steps, options.pairs, warmup=options.warmup, seed=options.seed, after=note)
    memory = {name: arm.peak(options.memory_steps if arm.varies else 1) for name, arm in arms.items()}
    rows = {
        name: _row(times[name], times[BASE], arm, memory[name] / memory[BASE]) for name, arm in arms.items()
    }
    drops = {
        k: sum(1 - p for p, c in zip(rates, chosen, strict=True) if c) / sum(chosen)
        for k, chosen in kinds.items()
    }

    def ideal_of(share: Callable[[dict[str, Any]], float]) -> float:
        return 1 - sum((1 - share(rows[f"without {k}"])) * drop for k, drop in drops.items())

    ideals = {
        "flops": ideal,
        "time": ideal_of(lambda r: r["cpu"]["median"]),
        "memory": ideal_of(lambda r: r["memory"]),
    }
    return {
        "case": asdict(case),
        "sites": len(sites),
        "mean_survival_rate": sum(rates) / len(rates),
        "ideal": ideals,
        "droppable_flops": sum(s.cost for s in sites),
        "droppable_time": {k: 1 - rows[f"without {k}"]["cpu"]["median"] for k in kinds},
        "seconds_per_step": {
            c: _timing.median_interval(getattr(times[BASE], c)).as_dict() for c in ("cpu", "wall")
        },
        "peak_memory_mb": memory[BASE] / 1e6,
        "arms": rows,
        "checks": checks(rows, ideals),
    }


def _row(times: _timing.Times, base: _timing.Times, arm: Arm, memory: float) -> dict[str, Any]:
    cpu = _timing.ratios(times.cpu, base.cpu)
    row: dict[str, Any] = {
        "cpu": _timing.median_interval(cpu).as_dict(),
        "wall": _timing.median_interval(_timing.ratios(times.wall, base.wall)).as_dict(),
        "memory": memory,
        "cpu_s": [round(t, 4) for t in times.cpu],
        "wall_s": [round(t, 4) for t in times.wall],
    }
    if arm.costs:  # what this arm's own draws cost, step by step
        row["realised"] = sum(arm.costs) / len(arm.costs)
        row["beyond_realised"] = _timing.median_interval(
            [r - c for r, c in zip(cpu, arm.costs, strict=True)]
        ).as_dict()
    return row


def checks(rows: dict[str, Any], ideals: dict[str, float]) -> list[dict[str, Any]]:
    """Every bound: on which arm and quantity, what came, whether it holds.

    ``bound`` starts from the ideal of counted FLOPs; ``measured_bound`` from the same sum over the branches'
    measured share of time or memory, which is what no implementation can go below on this machine.
    """
    found = [
        _check(name, "cpu", m, rows, ideals, "time") for name, (_, m) in APPLIED.items() if m is not None
    ]
    found.append(_check(ROW, "memory", MEMORY_MARGIN, rows, ideals, "memory"))
    found.append(_check(OVERHEAD, "cpu", OVERHEAD_BOUND - 1, rows, {"flops": 1.0, "time": 1.0}, "time"))
    return found


def _check(
    name: str, what: str, margin: float, rows: dict, ideals: dict[str, float], measured: str
) -> dict[str, Any]:
    got = rows[name][what]
    median, low = (got["median"], got["low"]) if isinstance(got, dict) else (got, got)
    bound, other = ideals["flops"] + margin, ideals[measured] + margin
    return {
        "arm": name,
        "what": what,
        "median": median,
        "low": low,
        "bound": bound,
        "holds": low <= bound,
        "measured_bound": other,
        "measured_holds": low <= other,
    }


# --- terminal ----------------------------------------------------------------------------------------------


def show(result: dict[str, Any]) -> None:
    """The table of one case."""
    case, ideals = Case(**result["case"]), result["ideal"]
    seconds = result["seconds_per_step"]["cpu"]["median"]
    title = (
        f"{case}, {result['sites']} sites\nconstant depth: {seconds:.3f} s CPU and "
        f"{result['peak_memory_mb']:.0f} MB a step; ideal: {ideals['flops']:.3f} by counted FLOPs, "
        f"{ideals['time']:.3f} by measured time, {ideals['memory']:.3f} by measured memory"
    )
    verdicts = {(c["arm"], c["what"]): c for c in result["checks"]}
    rows = [_cells(name, row, verdicts) for name, row in result["arms"].items()]
    header = ("arm", "CPU time", "wall time", "FLOPs", "bounds", "memory", "bounds")
    _timing.table(title, header, rows)


def _cells(name: str, row: dict[str, Any], verdicts: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    def verdict(what: str) -> str:
        check = verdicts.get((name, what))
        if check is None:
            return ""
        both = ((check["bound"], check["holds"]), (check["measured_bound"], check["measured_holds"]))
        return ", ".join(f"{bound:.3f} {'holds' if holds else 'FAILS'}" for bound, holds in both)

    spread = [str(_timing.Interval(**row[clock])) for clock in ("cpu", "wall")]
    flops = f"{row['realised']:.3f}" if "realised" in row else ""
    return [name, *spread, flops, verdict("cpu"), f"{row['memory']:.3f}", verdict("memory")]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = _command.parser(__doc__, pairs=30, threads=2)
    p.add_argument("--subject", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    p.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="the ViT has one")
    p.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    p.add_argument(
        "--batch-size", type=int, help="default: " + ", ".join(f"{k} {b}" for k, (_, b) in SUBJECTS.items())
    )
    p.add_argument("--last", type=float, default=0.5, help="survival rate of the last site (linear rates)")
    p.add_argument("--warmup", type=int, default=3, help="rounds before these")
    p.add_argument(
        "--memory-steps", type=int, default=5, help="steps whose highest memory counts, where draws vary"
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--quick", action="store_true", help="5 pairs of a quarter of the batch: a look, not a measurement"
    )
    options = p.parse_args(arguments)
    _command.check_counts(p, options, "memory_steps", "batch_size")
    if options.warmup < 0:
        p.error(f"--warmup is at least 0, got {options.warmup}")
    if options.quick:
        options.pairs, options.warmup, options.memory_steps = min(options.pairs, 5), 1, 1
    return options


def cases(options: argparse.Namespace) -> list[Case]:
    """Every combination asked for; the ViT has one layout."""
    found = []
    for subject in options.subject:
        batch = options.batch_size or SUBJECTS[subject][1] // (4 if options.quick else 1)
        layouts = options.layout if subject != "vit" else ["contiguous"]
        found += [
            Case(subject, layout, precision, batch) for layout in layouts for precision in options.precision
        ]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 0 if every bound from measured shares holds, else 1."""
    options = parse(arguments)
    report = _command.begin("skip", options, arguments) | {"seed": options.seed}
    report["cases"] = results = []
    for case in cases(options):
        results.append(measure(case, options))
        if sys.stderr.isatty():
            print("\r" + " " * 100 + "\r", end="", file=sys.stderr)
        show(results[-1])
        _command.write(options, report)
    failed = _failed(results, "measured_holds")
    print("every bound holds" if not failed else "bounds that fail: " + "; ".join(failed))
    if beyond := _failed(results, "holds"):
        print("beyond the ideal of counted FLOPs, of which README.md here speaks: " + "; ".join(beyond))
    return 1 if failed else 0


def _failed(results: list[dict[str, Any]], which: str) -> list[str]:
    return [
        f"{Case(**r['case'])}: {c['arm']}, {c['what']}" for r in results for c in r["checks"] if not c[which]
    ]


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python
"""What the prox of the k-support norm costs: beside one sort of the vector, and beside a search over counts.

    python benchmarks/ksupport.py --threads 1 --json ksupport.json

The bound: at d = 1,000,000 the prox takes at most 4 times one `torch.sort`. Times are process CPU time,
medians over pairs of interleaved runs with a 95 % bootstrap interval; the bound holds if the interval's lower
end is at most it. The peer is the search over both counts, O(k d) after the sort, as the method was first
published; it stands beside the prox at sizes where it ends, and must give the same result there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the project's root in place of this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor

from benchmarks import _command, _timing
from fallow.penalties import ksupport_prox, ksupport_sq

BOUND, BOUND_SIZE = 4.0, 1_000_000
SIZES, PEER_SIZES = (1_000, 100_000, BOUND_SIZE), (100, 1_000, 3_000)
DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
STEP = 0.5


def search(w: Tensor, step: float, k: int) -> Tensor:
    """The prox by trying every head count and, for each, every kept count: the peer.

    References:
        Argyriou, Foygel, Srebro: Sparse prediction with the k-support norm (2012), algorithm 1.
    """
    ordered = w.abs().sort(descending=True).values.tolist()
    edge, size = [float("inf"), *ordered], len(ordered)
    for head in range(k):
        tail = 0.0
        for kept in range(head + 1, size + 1):
            tail += ordered[kept - 1]
            if kept < k:
                continue
            t = step * tail / (k - head + step * (kept - head))
            following = ordered[kept] if kept < size else 0.0
            above = (1 + step) / step * t
            if ordered[kept - 1] > t >= following and edge[head] >= above > edge[head + 1]:
                return w.sign() * torch.minimum(w.abs() / (1 + step), (w.abs() - t).clamp(min=0))
    keep = torch.zeros_like(w).scatter(0, w.abs().topk(k).indices, 1.0)  # a gap after the k-th entry
    return keep * w / (1 + step)


def against_sort(size: int, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """Prox, prox with its backward, and norm, as ratios to one sort."""
    w = vector(size, dtype, options.seed)
    k = max(size // 10, 1)
    leaf = w.clone().requires_grad_()

    def with_backward() -> None:
        (grad,) = torch.autograd.grad(ksupport_prox(leaf, STEP, k).sum(), leaf)
        del grad

    arms: dict[str, Callable[[], None]] = {
        "sort": _run(lambda: w.sort()),
        "prox": _run(lambda: ksupport_prox(w, STEP, k)),
        "prox and backward": with_backward,
        "squared norm": _run(lambda: ksupport_sq(w, k)),
    }
    times = _timing.interleave(arms, options.pairs, warmup=2, seed=options.seed)
    base = times["sort"].cpu
    shares = {
        name: _timing.median_interval(_timing.ratios(taken.cpu, base))
        for name, taken in times.items()
        if name != "sort"
    }
    bound = BOUND if size == options.bound_size else None
    return {
        "size": size,
        "dtype": dtype,
        "k": k,
        "sort_s": _timing.median_interval(base).as_dict(),
        **{name.replace(" ", "_"): share.as_dict() for name, share in shares.items()},
        "bound": bound,
        "holds": bound is None or shares["prox"].low <= bound,
    }


def against_search(size: int, options: argparse.Namespace) -> dict[str, Any]:
    """Prox and the search over both counts, in seconds, and the largest difference of their results."""
    w = vector(size, "fp64", options.seed)
    k = max(size // 2, 1)
    arms = {
        "prox": _run(lambda: ksupport_prox(w, STEP, k)),
        "search": _run(lambda: search(w, STEP, k)),
    }
    times = _timing.interleave(arms, options.pairs, warmup=1, seed=options.seed)
    ratio = _timing.median_interval(_timing.ratios(times["search"].cpu, times["prox"].cpu))
    difference = float((ksupport_prox(w, STEP, k) - search(w, STEP, k)).abs().max())
    return {
        "size": size,
        "k": k,
        "prox_s": _timing.median_interval(times["prox"].cpu).as_dict(),
        "search_s": _timing.median_interval(times["search"].cpu).as_dict(),
        "ratio": ratio.as_dict(),
        "difference": difference,
        "holds": difference <= 1e-12,
    }


def vector(size: int, dtype: str, seed: int) -> Tensor:
    """A random vector with a decaying envelope, in random order: the counts are in its middle."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(size, generator=generator, dtype=torch.float64)
    return (w * torch.rand(size, generator=generator, dtype=torch.float64)).to(DTYPES[dtype])


def _run(call: Callable[[], object]) -> Callable[[], None]:
    def step() -> None:
        call()

    return step


# --- terminal ----------------------------------------------------------------------------------------------


def show(sorts: Sequence[dict[str, Any]], searches: Sequence[dict[str, Any]]) -> None:
    """Both tables."""

    def interval(row: dict[str, float]) -> str:
        return str(_timing.Interval(**row))

    def verdict(row: dict[str, Any]) -> str:
        return "" if row["bound"] is None else f"{row['bound']:.1f} {'holds' if row['holds'] else 'FAILS'}"

    _timing.table(
        "CPU time, one torch.sort of the same vector = 1",
        ("vector", "sort, ms", "prox", "bound", "prox and backward", "squared norm"),
        [
            (
                f"d = {r['size']:,}, {r['dtype']}",
                f"{1e3 * r['sort_s']['median']:.3f}",
                interval(r["prox"]),
                verdict(r),
                interval(r["prox_and_backward"]),
                interval(r["squared_norm"]),
            )
            for r in sorts
        ],
    )
    _timing.table(
        "beside the search over both counts",
        ("vector", "prox, ms", "search, ms", "search / prox", "difference"),
        [
            (
                f"d = {r['size']:,}, k = {r['k']}",
                f"{1e3 * r['prox_s']['median']:.3f}",
                f"{1e3 * r['search_s']['median']:.3f}",
                interval(r["ratio"]),
                f"{r['difference']:.1e}",
            )
            for r in searches
        ],
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = _command.parser(__doc__, pairs=30)
    p.add_argument("--size", type=int, nargs="+", default=list(SIZES))
    p.add_argument("--peer-size", type=int, nargs="*", default=list(PEER_SIZES))
    p.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    p.add_argument(
        "--bound-size", type=int, default=BOUND_SIZE, help="the size at which the bound is checked"
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--quick", action="store_true", help="5 pairs of the largest size alone: a look")
    options = p.parse_args(arguments)
    _command.check_counts(p, options, "size", "peer_size")
    if options.quick:
        options.pairs, options.size = min(options.pairs, 5), [max(options.size)]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 0 if every bound holds and both searches agree, else 1."""
    options = parse(arguments)
    report = _command.begin("ksupport", options, arguments)
    report["seed"] = options.seed
    report["sort"] = [against_sort(d, dtype, options) for d in options.size for dtype in options.dtype]
    report["search"] = [against_search(d, options) for d in options.peer_size]
    _command.write(options, report)
    show(report["sort"], report["search"])
    failed = [f"d = {r['size']:,}, {r['dtype']}" for r in report["sort"] if not r["holds"]]
    failed += [f"d = {r['size']:,} differs from the search" for r in report["search"] if not r["holds"]]
    print("every bound holds" if not failed else "bounds that fail: " + "; ".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python
"""What it costs to know the sensitivities of all sites: by probing, and from the steps of training itself.

    python benchmarks/plan.py --threads 1 --json plan.json

Probing is compared with one forward and backward of the same model on the same batch, and with
leave-one-out's L + 1 forwards; training that watches its own gradients with training that does not. Times are
process CPU time, medians over pairs of interleaved runs with a 95 % bootstrap interval; a bound holds if the
interval's lower end is at most it.
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
from torch import Tensor, nn
from torch.nn import functional as F

import fallow
from benchmarks import _command, _timing
from fallow import models
from fallow.planning import RunningSensitivities, sensitivity
from fallow.surgery.tap import tapped

# Model and batch size; the number of sites grows sixfold from the first ResNet to the last.
SUBJECTS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet20": (models.resnet20, 64),
    "resnet56": (models.resnet56, 32),
    "resnet110": (models.resnet110, 16),
    "vit": (models.vit_small, 16),
}
PROBE_BOUND, RUNNING_BOUND = 1.3, 1.03


def probing(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Gate gradients of all sites, and leave-one-out, as ratios to one forward and backward."""
    build, batch = SUBJECTS[name]
    torch.manual_seed(options.seed)
    model, plain = build(), build().eval()
    x, y = data(options.batch_size or batch, options.seed)

    def forward_backward() -> None:
        F.cross_entropy(plain(x), y).backward()
        plain.zero_grad(set_to_none=True)

    with tapped(model, x) as taps:
        arms: dict[str, Callable[[], None]] = {
            "forward and backward": forward_backward,
            "gate gradients": lambda: _measured(taps, x, y, "absolute"),
        }
        times = _timing.interleave(arms, options.pairs, warmup=2, seed=options.seed)
        rounds = max(options.pairs // 10, 3)
        arms["leave one out"] = lambda: _measured(taps, x, y, "leave_one_out")
        slow = _timing.interleave(
            {k: v for k, v in arms.items() if k != "gate gradients"}, rounds, warmup=1, seed=options.seed
        )
        sites = len(taps.sites)
    base = times["forward and backward"].cpu
    ratio = _timing.median_interval(_timing.ratios(times["gate gradients"].cpu, base))
    left_out = _timing.median_interval(
        _timing.ratios(slow["leave one out"].cpu, slow["forward and backward"].cpu)
    )
    return {
        "subject": name,
        "batch": len(x),
        "sites": sites,
        "forward_backward_s": _timing.median_interval(base).as_dict(),
        "gate_gradients": ratio.as_dict(),
        "leave_one_out": left_out.as_dict(),
        "bound": PROBE_BOUND,
        "holds": ratio.low <= PROBE_BOUND,
    }


def _measured(taps: Any, x: Tensor, y: Tensor, reduction: str) -> None:
    sensitivity.measure(taps, F.cross_entropy, [(x, y)], reduction)


def running(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Training steps that watch their own gradients, as ratios to the same steps unwatched."""
    build, batch = SUBJECTS[name]
    x, y = data(options.batch_size or batch, options.seed)
    steps: dict[str, Callable[[], None]] = {}
    for arm in ("unwatched", "watched"):
        torch.manual_seed(options.seed)
        model = build()
        handle = fallow.apply(model, fallow.rates.uniform(budget=0.6), example=x[:2], sampler="exact", seed=0)
        if arm == "watched":
            RunningSensitivities(handle)
        steps[arm] = _step(model, x, y)
    times = _timing.interleave(steps, options.pairs, warmup=3, seed=options.seed)
    memory = {arm: max(_timing.step_memory(step) for _ in range(8)) for arm, step in steps.items()}
    ratio = _timing.median_interval(_timing.ratios(times["watched"].cpu, times["unwatched"].cpu))
    more = memory["watched"] / memory["unwatched"]
    return {
        "subject": name,
        "batch": len(x),
        "time": ratio.as_dict(),
        "memory": more,
        "bound": RUNNING_BOUND,
        "holds": ratio.low <= RUNNING_BOUND and more <= RUNNING_BOUND,
    }


def _step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def data(batch: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random images and labels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 32, 32, generator=generator), torch.randint(
        10, (batch,), generator=generator
    )


# --- terminal ----------------------------------------------------------------------------------------------


def show(probes: Sequence[dict[str, Any]], watched: Sequence[dict[str, Any]]) -> None:
    """Both tables."""

    def verdict(row: dict[str, Any]) -> str:
        return f"{row['bound']:.2f} {'holds' if row['holds'] else 'FAILS'}"

    def interval(row: dict[str, float]) -> str:
        return str(_timing.Interval(**row))

    _timing.table(
        "sensitivities of all sites, CPU time of one forward and backward = 1",
        ("subject", "sites", "gate gradients", "bound", "leave one out"),
        [
            (
                f"{r['subject']}, batch {r['batch']}",
                str(r["sites"]),
                interval(r["gate_gradients"]),
                verdict(r),
                interval(r["leave_one_out"]),
            )
            for r in probes
        ],
    )
    _timing.table(
        "training that watches its own gradients, unwatched training = 1",
        ("subject", "CPU time", "memory of a step", "bound"),
        [
            (f"{r['subject']}, batch {r['batch']}", interval(r["time"]), f"{r['memory']:.4f}", verdict(r))
            for r in watched
        ],
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = _command.parser(__doc__, pairs=30)
    p.add_argument("--subject", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    p.add_argument("--batch-size", type=int, help="default: one for each subject")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--quick", action="store_true", help="5 pairs of the smallest subject: a look")
    options = p.parse_args(arguments)
    _command.check_counts(p, options, "batch_size")
    if options.quick:
        options.pairs, options.subject = min(options.pairs, 5), options.subject[:1]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 0 if every bound holds, else 1."""
    options = parse(arguments)
    report = _command.begin("plan", options, arguments)
    report |= {"seed": options.seed, "probing": [], "running": []}
    for name in options.subject:
        report["probing"].append(probing(name, options))
        report["running"].append(running(name, options))
        _command.write(options, report)
    show(report["probing"], report["running"])
    failed = [
        f"{r['subject']}, {part}" for part in ("probing", "running") for r in report[part] if not r["holds"]
    ]
    print("every bound holds" if not failed else "bounds that fail: " + "; ".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

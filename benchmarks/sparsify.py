#!/usr/bin/env python
"""What `fallow.sparsify` costs while it trains, and what its results save.

    python benchmarks/sparsify.py --keep-memory --json sparsify.json   # all, about a quarter of an hour
    python benchmarks/sparsify.py --quick --part steps prox            # a look

Bounds: a step of training with LogSum's gradient or with AdaProx takes at most 1.10 of a plain one; the prox
of LogSum on 10,000,000 weights at most 6 times ``w.abs().sqrt()``; a network shrunk to a share of its FLOPs,
down to a quarter, takes at most 1.2 times that share of its time. Times are process CPU time, medians over
pairs of interleaved runs with a 95 % bootstrap interval; a bound holds if the interval's lower end is at most
it. Torch-Pruning stands among the peers where it is installed (``pip install torch-pruning``).
"""

from __future__ import annotations

import argparse
import copy
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
from benchmarks import _sparse_peers as peers
from benchmarks._sparse_tables import show
from fallow.data import load
from fallow.models import CifarResNet, lenet300, vgg_small
from fallow.penalties import MCP, LogSum, LpNorm
from fallow.sparsity import Shrunk, shrink

STEP_BOUND, PROX_BOUND, LATENCY_BOUND, LATENCY_SHARE = 1.10, 6.0, 1.2, 0.25
PARTS = ("steps", "prox", "latency", "peers")
BATCH, SAMPLES = 128, 60_000
# name -> network, one image, steps in a timed run: short ones in a row, as training has them
SUBJECTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "lenet300": (lenet300, (1, 28, 28), 10),
    "resnet20": (lambda: CifarResNet(20), (3, 32, 32), 1),
}
OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 1e-3),
}
PLAIN, BOUND = "plain", ("logsum gradient", "logsum adaprox")
METHODS: dict[str, dict[str, Any]] = {
    "logsum gradient": {"strategy": "logsum", "method": "gradient"},
    "logsum adaprox": {"strategy": "logsum", "method": "adaprox"},
    "logsum prox": {"strategy": "logsum", "method": "prox"},
    "logsum tikhonov": {"strategy": "logsum", "method": "tikhonov"},
    "logsum eta": {"strategy": "logsum", "method": "eta"},
    "mcp gradient": {"strategy": "mcp", "method": "gradient"},
    "logsum filters": {"strategy": "logsum", "method": "gradient", "groups": "outputs"},
    "calibrated": {"method": "calibrated", "samples": SAMPLES},
}
PENALTIES = {"logsum": LogSum(eps=0.1), "mcp": MCP(a=3.0, l=1.0), "l1": LpNorm(1)}
SIZE, STRENGTH = 10_000_000, 1e-5
WIDTHS, SHARES, MULTIPLES = (64, 128, 256), (0.75, 0.6, 0.5, 0.4), (1, 8, 16)


# --- a step of training ------------------------------------------------------------------------------------


def trainer(subject: str, optimiser: str, method: str, options: argparse.Namespace) -> Callable[[], None]:
    """One timed run: so many whole steps, from weights that all methods have in common."""
    build, shape, repeats = SUBJECTS[subject]
    torch.manual_seed(options.seed)
    model = build()
    x, y = torch.randn(options.batch_size, *shape), torch.randint(0, 10, (options.batch_size,))
    moves = OPTIMISERS[optimiser](model.parameters())
    run = None
    if method != PLAIN:
        chosen = METHODS[method]
        strength = None if chosen["method"] == "calibrated" else STRENGTH
        run = fallow.sparsify(model, optimiser=moves, strength=strength, **chosen)
        if more := list(run.parameters()):
            moves.add_param_group({"params": more})

    def step() -> None:
        loss = F.cross_entropy(model(x), y)
        if run is not None:
            loss = loss + run.penalty()
        moves.zero_grad()
        loss.backward()
        moves.step()
        if run is not None:
            run.update()

    def steps() -> None:
        for _ in range(repeats):
            step()

    return steps


def overhead(subject: str, optimiser: str, options: argparse.Namespace) -> dict[str, Any]:
    """Every method's step as a ratio to the plain one."""
    arms = {name: trainer(subject, optimiser, name, options) for name in (PLAIN, *options.method)}
    times = _timing.interleave(arms, options.pairs, warmup=2, seed=options.seed)
    rows = {
        name: _timing.median_interval(_timing.ratios(times[name].cpu, times[PLAIN].cpu))
        for name in options.method
    }
    repeats = SUBJECTS[subject][2]
    return {
        "subject": subject,
        "optimiser": optimiser,
        "batch": options.batch_size,
        "plain_s": _timing.median_interval([t / repeats for t in times[PLAIN].cpu]).as_dict(),
        "over_plain": {name: row.as_dict() for name, row in rows.items()},
        "bound": STEP_BOUND,
        "fails": [name for name in BOUND if name in rows and rows[name].low > STEP_BOUND],
    }


# --- prox --------------------------------------------------------------------------------------------------


def proxes(options: argparse.Namespace) -> dict[str, Any]:
    """The prox of a large vector as a ratio to ``w.abs().sqrt()``."""
    w = torch.randn(options.size, generator=torch.Generator().manual_seed(options.seed))
    arms: dict[str, Callable[[], None]] = {"abs sqrt": _run(lambda: w.abs().sqrt())}
    arms |= {name: _run(lambda p=p: p.prox(w, 0.05)) for name, p in PENALTIES.items()}
    times = _timing.interleave(arms, options.pairs, warmup=2, seed=options.seed)
    base = times["abs sqrt"].cpu
    rows = {name: _timing.median_interval(_timing.ratios(times[name].cpu, base)) for name in PENALTIES}
    return {
        "size": options.size,
        "abs_sqrt_s": _timing.median_interval(base).as_dict(),
        "over_abs_sqrt": {name: row.as_dict() for name, row in rows.items()},
        "bound": PROX_BOUND,
        "fails": ["logsum"] if rows["logsum"].low > PROX_BOUND else [],
    }


def _run(call: Callable[[], object]) -> Callable[[], None]:
    def step() -> None:
        call()

    return step


# --- the latency of shrunken networks ----------------------------------------------------------------------


def without_filters(model: nn.Module, share: float, multiple: int) -> nn.Module:
    """A copy of which each convolution keeps that share of filters, the largest, as a multiple; rest zero."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                count = module.out_channels
                keep = min(max(round(count * share / multiple), 1) * multiple, count)
                norms = module.weight.flatten(1).norm(dim=1)
                module.weight[norms.topk(count - keep, largest=False).indices] = 0
    return model


def latencies(options: argparse.Namespace) -> dict[str, Any]:
    """Time of a shrunken network's forward over that of the dense one, beside its share of FLOPs."""
    torch.manual_seed(options.seed)
    dense = vgg_small(channels=1, image=options.image, widths=options.widths).eval()
    x = torch.randn(options.batch_size, 1, options.image, options.image)
    models: dict[str, nn.Module] = {"dense": dense}
    found: dict[str, Shrunk] = {}
    for share in options.share:
        for multiple in options.multiple:
            small = shrink(without_filters(dense, share, multiple), x[:1])
            name = f"{share:g} of the filters, multiples of {multiple}"
            models[name], found[name] = small.model, small
    times = _timing.interleave(
        {name: forward(model, x) for name, model in models.items()},
        max(options.pairs // 2, 1),
        warmup=1,
        seed=options.seed,
    )
    rows, fails = {}, []
    for name, small in found.items():
        share = small.after.flops / small.before.flops
        ratio = _timing.median_interval(_timing.ratios(times[name].cpu, times["dense"].cpu))
        over = {key: value / share for key, value in ratio.as_dict().items()}
        widths = [m.out_channels for m in small.model.modules() if isinstance(m, nn.Conv2d)]
        bound = share >= LATENCY_SHARE and f"multiples of {options.multiple[-1]}" in name
        rows[name] = {
            "widths": widths,
            "flops": share,
            "time": ratio.as_dict(),
            "over_proportional": over,
            "bound": LATENCY_BOUND if bound else None,
        }
        if bound and over["low"] > LATENCY_BOUND:
            fails.append(name)
    base = _timing.median_interval(times["dense"].cpu).as_dict()
    return {"batch": options.batch_size, "dense_s": base, "rows": rows, "fails": fails}


def forward(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """One forward without gradients."""

    def step() -> None:
        with torch.inference_mode():
            model(x)

    return step


# --- peers -------------------------------------------------------------------------------------------------


def against_peers(options: argparse.Namespace) -> dict[str, Any]:
    """Error, size and latency of every arm: means over seeds, latency of the first."""
    raw = load(options.data, options.data_dir, train_size=options.train_size)
    data = peers.Data(
        *(part for x, y in ((raw.train_x, raw.train_y), (raw.test_x, raw.test_y)) for part in (_floats(x), y))
    )
    steps = options.epochs * len(data.x) // peers.BATCH
    targets = {"": 0.0, peers.WEIGHTS: options.weights_target, peers.FILTERS: options.filters_target}
    rows: dict[str, dict[str, Any]] = {}
    models: dict[str, nn.Module] = {}
    for name, (kind, arm) in peers.available().items():
        made = []
        for seed in range(options.seeds):
            if sys.stderr.isatty():
                print(f"\r{name}, seed {seed}".ljust(60), end="", file=sys.stderr)
            made.append(arm(peers.build(data, options.peer_widths, seed), data, steps, seed, targets[kind]))
        models[name] = made[0].eval()
        sizes = [peers.sizes(model, data) for model in made]
        rows[name] = {
            "takes": kind,
            "target": targets[kind],
            "errors": [peers.error(model.eval(), data) for model in made],
            **{key: sum(size[key] for size in sizes) / len(sizes) for key in sizes[0]},
        }
    x = data.test_x[: options.batch_size]
    arms = {name: forward(model, x) for name, model in models.items()}
    times = _timing.interleave(arms, options.pairs, warmup=2, seed=options.seed)
    for name, row in rows.items():
        row["time"] = _timing.median_interval(_timing.ratios(times[name].cpu, times["dense"].cpu)).as_dict()
    if "Torch-Pruning" not in rows:
        print("Torch-Pruning is not installed: left out (pip install torch-pruning)")
    return {"data": options.data, "steps": steps, "batch": len(x), "rows": rows, "fails": []}


def _floats(images: Tensor) -> Tensor:
    return images.float().div(255).sub(0.3).div(0.35)


# --- terminal ----------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = _command.parser(__doc__, pairs=20)
    p.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    p.add_argument("--subject", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    p.add_argument("--optimiser", nargs="+", choices=OPTIMISERS, default=list(OPTIMISERS))
    p.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    p.add_argument("--size", type=int, default=SIZE, help="weights of the prox")
    p.add_argument("--batch-size", type=int, default=BATCH)
    p.add_argument("--image", type=int, default=28, help="side of the images of the shrunken networks")
    p.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="of their stages")
    p.add_argument("--share", type=float, nargs="+", default=SHARES, help="of filters that are kept")
    p.add_argument("--multiple", type=int, nargs="+", default=MULTIPLES, help="the last one is bound")
    p.add_argument("--data", default="digits", help="of the peers")
    p.add_argument("--data-dir", type=Path)
    p.add_argument("--train-size", type=int)
    p.add_argument("--epochs", type=int, default=15)
    p.add_argument("--seeds", type=int, default=3, help="of the peers' training")
    p.add_argument("--peer-widths", type=int, nargs="+", default=(32, 64, 128))
    p.add_argument("--weights-target", type=float, default=0.95)
    p.add_argument("--filters-target", type=float, default=0.6)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--quick", action="store_true", help="a look: 5 pairs, bound methods, one seed")
    options = p.parse_args(arguments)
    _command.check_counts(p, options, "size", "batch_size", "epochs", "seeds")
    if not all(0 < share <= 1 for share in options.share):
        p.error("--share is of filters that are kept, in (0, 1]")
    if options.quick:
        options.pairs, options.seeds, options.method = min(options.pairs, 5), 1, list(BOUND)
        options.epochs = min(options.epochs, 3)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 0 if every bound holds, else 1."""
    options = parse(arguments)
    report = _command.begin("sparsify", options, arguments)
    report["seed"] = options.seed
    failed = []
    pairs = [(subject, how) for subject in options.subject for how in options.optimiser]
    todo: dict[str, list[Callable[[], dict[str, Any]]]] = {
        "steps": [lambda s=s, o=o: overhead(s, o, options) for s, o in pairs],
        "prox": [lambda: proxes(options)],
        "latency": [lambda: latencies(options)],
        "peers": [lambda: against_peers(options)],
    }
    for part in options.part:
        report[part] = []
        for measure in todo[part]:
            report[part].append(found := measure())
            show(part, found, BOUND)
            about = f"{part}, {found['subject']}, {found['optimiser']}" if part == "steps" else part
            failed += [f"{about}: {name}" for name in found["fails"]]
            _command.write(options, report)
    print("every bound holds" if not failed else "bounds that fail: " + "; ".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

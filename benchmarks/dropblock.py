#!/usr/bin/env python
"""What DropBlock2d costs, beside x * scalar, torch's dropout and torchvision's and timm's DropBlock.

    python benchmarks/dropblock.py --keep-memory --json dropblock.json
    python benchmarks/dropblock.py --quick

Every arm is measured alone against its base, in pairs: one call of each, in random order, both on the same
input, whose results live in memory that earlier calls have touched (with --keep-memory the allocator keeps
it; a fresh page costs more than the multiplication of what is on it). "plain" arms are fallow without its
compiled kernel, which a report says whether it was in use. Times are process CPU time of a forward, and of a
forward and backward; ratios are medians over pairs (a fifth as many for slow peers) with a 95 % bootstrap
interval. A bound holds if the interval reaches it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the project's root in place of this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import _command, _timing
from fallow import kernels
from fallow.integrations import mend_torchvision
from fallow.noise import drop_block2d

SHAPES = [(128, 64, 32, 32), (128, 128, 16, 16), (128, 256, 14, 14), (32, 64, 56, 56)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OURS, SHARED, SCALAR = "fallow", "fallow, shared", "x * scalar"
PLAIN, PLAIN_SHARED = "fallow, plain", "fallow, shared, plain"
FAMILY = (SCALAR, OURS, SHARED, "fallow, disjoint", PLAIN, PLAIN_SHARED)
PEERS = ("torchvision", "torchvision's rule", "timm, per channel", "timm's rule, per channel")
# The least that other arms' forward should take over that of an arm, and the most that an arm may take over
# x * scalar; and memory beside the result over the tensor.
FASTER = {OURS: dict.fromkeys(PEERS, 20.0), PLAIN: dict.fromkeys(PEERS, 6.0) | {"F.dropout": 1.0}}
SLOWER = {OURS: 2.5, SHARED: 1.15}
MEMORY_BOUND = 0.3

Noise = Callable[[Tensor], Tensor]


def torchvision_rule(x: Tensor, drop: float, block: int) -> Tensor:
    """torchvision's algorithm: seeds where blocks fit, max-pooling, one normalisation for the batch."""
    height, width = x.shape[2:]
    block = min(block, height, width)
    valid = (height - block + 1) * (width - block + 1)
    noise = torch.empty(*x.shape[:2], height - block + 1, width - block + 1, dtype=x.dtype, device=x.device)
    noise.bernoulli_(drop * height * width / (block**2 * valid))
    noise = F.pad(noise, [block // 2] * 4)
    noise = 1 - F.max_pool2d(noise, block, stride=1, padding=block // 2)
    return x * noise * (noise.numel() / (1e-6 + noise.sum()))


def timm_rule(x: Tensor, drop: float, block: int, shared: bool) -> Tensor:
    """timm's algorithm: seeds anywhere, max-pooling, one normalisation for the batch."""
    height, width = x.shape[2:]
    tall, wide = min(block, height), min(block, width)
    gamma = drop * height * width / (tall * wide) / ((height - tall + 1) * (width - wide + 1))
    with torch.no_grad():
        noise = torch.empty(x.shape[0], 1 if shared else x.shape[1], height, width, dtype=x.dtype)
        noise.bernoulli_(gamma)
        noise = 1.0 - F.max_pool2d(noise, (tall, wide), stride=1, padding=(tall // 2, wide // 2))
        noise.mul_((noise.numel() / noise.to(torch.float32).sum().add(1e-7)).to(x.dtype))
    return x * noise


def without_kernel(noise: Noise) -> Noise:
    """The same by torch's own operations."""

    def plain(x: Tensor) -> Tensor:
        with kernels.plain():
            return noise(x)

    return plain


def arms(rate: float, block: int) -> dict[str, Noise]:
    """Name to the function that is timed; the packages themselves where they are installed."""
    drop = 1 - rate
    found: dict[str, Noise] = {
        SCALAR: lambda x: x * (1 / rate),
        OURS: lambda x: drop_block2d(x, survival_rate=rate, block_size=block),
        SHARED: lambda x: drop_block2d(x, survival_rate=rate, block_size=block, shared_channels=True),
        "fallow, disjoint": lambda x: drop_block2d(x, survival_rate=rate, block_size=block, grid="disjoint"),
        "F.dropout": lambda x: F.dropout(x, drop),
        "torchvision's rule": lambda x: torchvision_rule(x, drop, block),
        "timm's rule, per channel": lambda x: timm_rule(x, drop, block, False),
        "timm's rule, shared": lambda x: timm_rule(x, drop, block, True),
    }
    found |= {PLAIN: without_kernel(found[OURS]), PLAIN_SHARED: without_kernel(found[SHARED])}
    try:
        mend_torchvision()
        from torchvision.ops import drop_block2d as theirs

        found["torchvision"] = lambda x: theirs(x, drop, block)
        from timm.layers.drop import drop_block_2d

        found["timm, per channel"] = lambda x: drop_block_2d(x, drop, block, couple_channels=False)
        found["timm, shared"] = lambda x: drop_block_2d(x, drop, block)
    except ImportError:
        pass
    return found


def step(noise: Noise, x: Tensor, grad: Tensor, backward: bool) -> Callable[[], None]:
    """A forward, or a forward and backward."""
    if not backward:

        def forward() -> None:
            with torch.no_grad():
                noise(x)

        return forward
    leaf = x.detach().requires_grad_()

    def both() -> None:
        torch.autograd.grad(noise(leaf), leaf, grad)

    return both


def measure(
    shape: tuple[int, ...], dtype: str, block: int, backward: bool, options: argparse.Namespace
) -> dict[str, Any]:
    """Fallow's arms against x * scalar, and all against ours and ours without its kernel, for one shape."""
    torch.manual_seed(options.seed)
    x, grad = (torch.randn(shape).to(DTYPES[dtype]) for _ in range(2))
    if options.channels_last:
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    steps = {name: step(noise, x, grad, backward) for name, noise in arms(options.rate, block).items()}
    row: dict[str, Any] = {"shape": shape, "dtype": dtype, "block": block, "backward": backward}
    row |= {"ms": {}, "over": {base: {} for base in (SCALAR, OURS, PLAIN)}}
    for base, name in pairs_of(steps):
        pairs = options.pairs if name in FAMILY else max(options.pairs // 5, 3)
        pair = {base: steps[base], name: steps[name]}
        times = _timing.interleave(pair, pairs, warmup=2, seed=options.seed)
        ratio = _timing.median_interval(_timing.ratios(times[name].cpu, times[base].cpu))
        row["over"][base][name] = ratio.as_dict()
        for each in pair:
            row["ms"][each] = 1e3 * _timing.median_interval(times[each].cpu).median
    row["memory"] = {
        name: extra(noise, x, backward) / x.nbytes for name, noise in arms(options.rate, block).items()
    }
    return row


def pairs_of(names: Iterable[str]) -> list[tuple[str, str]]:
    """What is measured beside what: base and arm."""
    names = list(names)
    ours = [(SCALAR, name) for name in names if name in FAMILY and name != SCALAR]
    others = [name for name in names if name not in FAMILY]
    return ours + [(base, name) for base in (OURS, PLAIN) for name in others]


def extra(noise: Noise, x: Tensor, backward: bool) -> int:
    """Bytes a forward takes at most beside its result, what is kept for the gradient included."""
    leaf = x.detach().requires_grad_(backward)
    return _timing.step_memory(lambda: _discard(noise(leaf))) - x.nbytes


def _discard(result: Tensor) -> None:
    del result


def verdicts(row: dict[str, Any], compiled: bool) -> dict[str, bool]:
    """The bounds of one row, and whether they hold; without a kernel, those of the plain form alone."""
    found = {}
    if not row["backward"]:
        for arm, bounds in FASTER.items():
            for name, least in bounds.items():
                if name in row["over"][arm] and (compiled or arm == PLAIN):
                    found[f"{name} >= {least:g} {arm}"] = row["over"][arm][name]["high"] >= least
        for name, most in SLOWER.items():
            if compiled:
                found[f"{name} <= {most:g} {SCALAR}"] = row["over"][SCALAR][name]["low"] <= most
    for name in (OURS, PLAIN):
        found[f"memory of {name} <= {MEMORY_BOUND}"] = row["memory"][name] <= MEMORY_BOUND
    return found


# --- terminal ----------------------------------------------------------------------------------------------


def show(rows: Sequence[dict[str, Any]], compiled: bool) -> None:
    """Times, ratios, memory."""
    for backward in (False, True):
        chosen = [row for row in rows if row["backward"] == backward]
        if not chosen:
            continue
        names = list(dict.fromkeys(name for row in chosen for name in row["ms"]))
        what = "forward and backward" if backward else "forward"
        labels = [f"{'x'.join(map(str, r['shape']))} {r['dtype']} k={r['block']}" for r in chosen]
        _timing.table(
            f"{what}: ms; over fallow, or over x * scalar for fallow's own; memory beside the result",
            ("arm", *labels),
            [(name, *(_cell(row, name) for row in chosen)) for name in names],
        )
        failed = [
            f"{label}: {bound}"
            for label, row in zip(labels, chosen, strict=True)
            for bound, holds in verdicts(row, compiled).items()
            if not holds
        ]
        print(f"{what}: " + ("every bound holds" if not failed else "FAILS " + "; ".join(failed)))


def _cell(row: dict[str, Any], name: str) -> str:
    ratio = row["over"][SCALAR].get(name) or row["over"][OURS].get(name)
    over = f" [{ratio['median']:.2f}]" if ratio else ""
    return f"{row['ms'][name]:.2f}{over} {row['memory'][name]:.2f}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = _command.parser(__doc__, pairs=40)
    p.add_argument("--shape", nargs="+", default=["x".join(map(str, s)) for s in SHAPES], metavar="NxCxHxW")
    p.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    p.add_argument("--block", nargs="+", type=int, default=[7, 5])
    p.add_argument("--rate", type=float, default=0.9, help="survival rate")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--channels-last", action="store_true")
    p.add_argument("--quick", action="store_true", help="5 pairs of the second shape, block 7: a look")
    options = p.parse_args(arguments)
    try:
        options.shape = [tuple(int(n) for n in text.split("x")) for text in options.shape]
    except ValueError:
        p.error("--shape takes shapes like 128x64x32x32")
    if any(len(shape) != 4 or min(shape) < 1 for shape in options.shape):
        p.error("--shape takes shapes like 128x64x32x32")
    _command.check_counts(p, options, "block")
    if not 0 < options.rate < 1:
        p.error(f"--rate is between 0 and 1, got {options.rate}")
    if options.quick:
        options.pairs, options.shape, options.block = min(options.pairs, 5), options.shape[1:2], [7]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 0 if every bound holds, else 1."""
    options = parse(arguments)
    report = _command.begin("dropblock", options, arguments)
    report |= {"seed": options.seed, "rate": options.rate}
    found = kernels.available()  # built before anything is timed
    report |= {"kernel": found.reason or "compiled", "rows": []}
    print(f"kernel: {report['kernel']}")
    for shape in options.shape:
        for dtype in options.dtype:
            for block in options.block:
                for backward in (False, True):
                    row = measure(shape, dtype, block, backward, options)
                    row["holds"] = verdicts(row, found.used)
                    report["rows"].append(row)
            _command.write(options, report)
    show(report["rows"], found.used)
    return 0 if all(all(row["holds"].values()) for row in report["rows"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())

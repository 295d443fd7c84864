#!/usr/bin/env python
"""Error and latency of networks that `fallow sparsify` has trained and made smaller, beside dense ones.

    python benchmarks/shrunken.py --data-dir DIR --json shrunken.json   # trains first: about half an hour
    python benchmarks/shrunken.py --measure --json shrunken.json        # the runs that are there, once more

Each seed trains one dense network (strength 0) and its sparse arms by commands that are printed and stand in
the file: the same images, order and epochs. Runs that are done or were interrupted are taken up. Error is of
the smaller network on all test images. Forwards of a batch are timed in interleaved pairs with the dense
network of the same seed: process CPU time, median and 95 % bootstrap interval.

A network runs in three forms, the dense one in the same: eager in channels_last, eager in contiguous memory,
and frozen by TorchScript, where BatchNorm and ReLU are part of the convolution before them.

Bounds, of the last arm: for every seed FLOPs at least 4 times fewer, and a frozen network's time at most 1.2
times its share of them (by the lower end of the interval); in the mean an error at most 1 point above that of
the dense ones. The eager forms stand beside it.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the project's root in place of this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor, nn

from benchmarks import _command, _timing
from fallow.data import load
from fallow.integrations.loading import load_model
from fallow.recipes import show
from fallow.recipes._batches import Batches, error_of
from fallow.recipes._run import CONFIG, WEIGHTS
from fallow.recipes._sparse_results import SMALL
from fallow.recipes.sparsify import SparseConfig, resume, sparsify
from fallow.recipes.train import read_results
from fallow.sparsity import apply_plan
from fallow.sparsity.shrinking.count import size_of

FLOPS_BOUND, TIME_BOUND, ERROR_BOUND = 4.0, 1.2, 0.01
DENSE = "dense"
FROZEN = "frozen"
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
FORMS = (FROZEN, *LAYOUTS)


def arms_of(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What `fallow sparsify` is asked for: name -> options; the last arm is bound."""
    common = {
        "data": options.data,
        "train_size": options.train_size,
        "model": options.model,
        "groups": options.groups,
        "epochs": options.epochs,
        "batch_size": options.train_batch,
        "channels_last": True,
        "threads": options.threads,
    }
    sparse = {**common, "strategy": options.strategy, "target": options.target}
    sparse |= {"ramp_begin": options.ramp[0], "ramp_end": options.ramp[1]}
    arms = {DENSE: {**common, "strength": 0.0}}
    for multiple in options.multiple:
        name = f"multiples of {multiple}" if multiple > 1 else "any width"
        arms[name] = {**sparse, "multiple": multiple}
    return arms


def command_of(options: Mapping[str, Any]) -> str:
    """The command line that these options are."""
    words = ["fallow sparsify"]
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        words += [] if value is None else [flag] if value is True else [f"{flag} {value}"]
    return " ".join(words)


def trained(folder: Path, options: dict[str, Any], data_dir: Path | None) -> Path:
    """A run that is done: trained, taken up where it stopped, or as it is."""
    words = show.Lines(print)
    if (folder / CONFIG).is_file():
        return resume(folder, show=words)
    print(command_of(options))
    given = {**options, "data_dir": None if data_dir is None else str(data_dir)}
    return sparsify(SparseConfig.of(given), folder, show=words, command=command_of(options))


# --- measuring ---------------------------------------------------------------------------------------------


@dataclass
class Network:
    """What a run left, its error on the test images, and one batch of them.

    Attributes:
        widths: output channels of the convolutions.
        flops: of one image.
    """

    model: nn.Module
    images: Tensor
    error: float
    tested: int
    widths: list[int]
    flops: int


def network(folder: Path, rows: int) -> Network:
    """The smaller network of a run, or its whole one where nothing was taken, from the files."""
    given = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    name, _ = given.pop("network"), given.pop("recipe")
    config = SparseConfig.of(given).settled()
    dataset = load(config.data, config.data_dir, train_size=config.train_size, seed=config.seed)
    batches = Batches(dataset, config)
    model = load_model(
        name,
        classes=dataset.classes,
        channels=dataset.channels,
        image=dataset.size,
        weights=folder / WEIGHTS,
    )
    if config.target is not None:
        model = apply_plan(model, json.loads((folder / SMALL / "plan.json").read_text(encoding="utf-8")))
        model.load_state_dict(torch.load(folder / SMALL / "weights.pt", weights_only=True))
    model = model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.cat([x for x, _ in batches.evaluated("test")[: -(-rows // 512)]])[:rows]
    widths = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    flops = size_of(model, ((images[:1],), {})).flops
    return Network(model, images, error_of(model, batches, "test"), batches.sizes["test"], widths, flops)


def measured(networks: Mapping[str, Network], pairs: int, seed: int) -> dict[str, dict[str, Any]]:
    """Of each smaller network: share of FLOPs, time over that of the dense one in the same form."""
    rows: dict[str, dict[str, Any]] = {
        name: {
            "widths": found.widths,
            "error": found.error,
            "flops": found.flops / networks[DENSE].flops,
            **({"seconds": {}} if name == DENSE else {"time": {}, "over_proportional": {}}),
        }
        for name, found in networks.items()
    }
    for form in FORMS:
        calls = {name: forward(found.model, found.images, form) for name, found in networks.items()}
        times = _timing.interleave(calls, pairs, warmup=3, seed=seed)
        for name, row in rows.items():
            if name == DENSE:
                row["seconds"][form] = _timing.median_interval(times[name].cpu).as_dict()
                continue
            ratio = _timing.median_interval(_timing.ratios(times[name].cpu, times[DENSE].cpu)).as_dict()
            row["time"][form] = ratio
            row["over_proportional"][form] = {k: round(v / row["flops"], 4) for k, v in ratio.items()}
    return rows


def forward(model: nn.Module, x: Tensor, form: str) -> Callable[[], None]:
    """One forward in a form: eager in one of the layouts, or frozen.

    Frozen is TorchScript's ``optimize_for_inference``: convolution, BatchNorm and ReLU are one kernel, and
    weights and maps have the layout of oneDNN.
    """
    layout = LAYOUTS.get(form, torch.contiguous_format)
    x = x.contiguous(memory_format=layout)
    # of a model of its own: the next form has another layout
    run: Any = copy.deepcopy(model).to(memory_format=layout)  # type: ignore[call-overload]
    if form == FROZEN:
        with torch.no_grad(), warnings.catch_warnings():
            # what would replace it, torch.compile, keeps the layout of the eager forms
            warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning)
            traced: Any = torch.jit.trace(run, x)
            run = torch.jit.optimize_for_inference(traced)

    def step() -> None:
        with torch.no_grad():
            run(x)

    return step


def mean_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; NaN of a single value."""
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), spread


def fails_of(name: str, seeds: Sequence[Mapping[str, dict[str, Any]]]) -> list[str]:
    """The bounds that an arm does not keep."""
    rows, fails = [rows[name] for rows in seeds], []
    if any(row["flops"] > 1 / FLOPS_BOUND for row in rows):
        fails.append("FLOPs")
    if any(row["over_proportional"][FROZEN]["low"] > TIME_BOUND for row in rows):
        fails.append("time")
    if mean_error([rows[name]["error"] - rows[DENSE]["error"] for rows in seeds])[0] > ERROR_BOUND:
        fails.append("error")
    return fails


# --- terminal ----------------------------------------------------------------------------------------------


def print_tables(names: Sequence[str], seeds: Sequence[Mapping[str, dict[str, Any]]], tested: int) -> None:
    """Errors over seeds, and sizes and times of each seed."""

    def points(values: Sequence[float]) -> str:
        mean, spread = mean_error(values)
        return f"{100 * mean:.2f}" + (f" ± {100 * spread:.2f}" if len(values) > 1 else "")

    errors = [
        (
            name,
            points([rows[name]["error"] for rows in seeds]),
            "" if name == DENSE else points([rows[name]["error"] - rows[DENSE]["error"] for rows in seeds]),
        )
        for name in names
    ]
    title = f"test error in % on {tested:,} images, seeds: {len(seeds)}"
    _timing.table(title, ("arm", "error", "minus dense, paired"), errors)
    rows = [
        (
            f"{name}, seed {seed}" if form == FORMS[0] else "",
            " ".join(map(str, found[name]["widths"])) if form == FORMS[0] else "",
            f"{1 / found[name]['flops']:.2f}" if form == FORMS[0] else "",
            form,
            *(str(_timing.Interval(**found[name][key][form])) for key in ("time", "over_proportional")),
        )
        for name in names
        if name != DENSE
        for seed, found in enumerate(seeds)
        for form in FORMS
    ]
    heads = ("arm", "widths", "FLOPs less", "form", "CPU time", "time / FLOPs")
    _timing.table("smaller networks, dense = 1", heads, rows)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = _command.parser(__doc__, pairs=30)
    p.add_argument("--runs", type=Path, default=Path("runs/shrunken"), help="folder of the runs")
    p.add_argument("--measure", action="store_true", help="train nothing; runs that are missing are an error")
    p.add_argument("--data", default="fashion-mnist")
    p.add_argument("--data-dir", type=Path)
    p.add_argument("--train-size", type=int, default=20_000)
    p.add_argument("--model", default="vgg_small")
    p.add_argument("--groups", choices=("inputs", "outputs"), default="inputs")
    p.add_argument("--strategy", default="magnitude")
    p.add_argument("--target", type=float, default=0.57)
    p.add_argument("--ramp", type=float, nargs=2, default=(0.05, 0.4), help="parts of the training")
    p.add_argument("--multiple", type=int, nargs="+", default=[16], help="of the widths; the last is bound")
    p.add_argument("--epochs", type=int, default=6)
    p.add_argument("--train-batch", type=int, default=64, help="images to a step of the training")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--batch-size", type=int, default=128, help="of the timed forward")
    options = p.parse_args(arguments)
    _command.check_counts(p, options, "seeds", "batch_size")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing, measure, print, write; 0 if every bound holds, else 1."""
    options = parse(arguments)
    arms = arms_of(options)
    report = _command.begin("shrunken", options, arguments)
    report["batch"] = options.batch_size
    report["commands"] = {name: command_of(arm) for name, arm in arms.items()}
    seeds, tested = [], 0
    for seed in range(options.seeds):
        networks = {}
        for name, arm in arms.items():
            folder = options.runs / f"{name.replace(' ', '-')}-{seed}"
            if not options.measure:
                trained(folder, {**arm, "seed": seed}, options.data_dir)
            read_results(folder)  # says what to do where there is none
            networks[name] = network(folder, options.batch_size)
            tested = networks[name].tested
        seeds.append(measured(networks, options.pairs, seed))
    bound = [*arms][-1]
    report |= {"test_images": tested, "seeds": seeds, "bound": bound, "fails": fails_of(bound, seeds)}
    print_tables([*arms], seeds, tested)
    _command.write(options, report)
    print("every bound holds" if not report["fails"] else f"{bound}, fails: {', '.join(report['fails'])}")
    return 1 if report["fails"] else 0


if __name__ == "__main__":
    sys.exit(main())

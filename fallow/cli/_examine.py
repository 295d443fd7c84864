"""The commands that look at a model: plan and explain."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fallow.data import NAMES
from fallow.planning import cost as costing
from fallow.planning import make, sensitivity
from fallow.recipes import examine
from fallow.recipes._laws import WRITTEN
from fallow.recipes._probe import on_threads
from fallow.report import write_report

Model = Annotated[
    str,
    typer.Argument(
        help="One of fallow train's models, timm:NAME, torchvision:NAME, hf:CONFIG (a local folder, or a "
        "type such as hf:vit), or the folder of a run.",
        metavar="MODEL|RUN",
    ),
]
Granularity = Annotated[
    str | None, typer.Option("--granularity", help="What rests together: branch or block [branch].")
]
Include = Annotated[
    list[str] | None, typer.Option("--include", help="Only sites that match; may be repeated.")
]
Exclude = Annotated[
    list[str] | None, typer.Option("--exclude", help="Leave out sites that match; may be repeated.")
]
Data = Annotated[
    str | None,
    typer.Option("--data", help=f"{', '.join(NAMES)}; tokens for language models [digits; the run's]."),
]
DataDir = Annotated[str | None, typer.Option("--data-dir", help="Folder that holds the data set's files.")]
Resize = Annotated[
    int | None,
    typer.Option(
        "--resize", help="Side to which images are brought [what the model takes, else as they are]."
    ),
]
Batches = Annotated[int, typer.Option("--batches", help="Batches to try it on [4].", show_default=False)]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Rows of a batch [32].", show_default=False)]
Weights = Annotated[
    str | None, typer.Option("--weights", help="Local .safetensors or .pt file [random; the run's].")
]
Device = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda or cuda:N [auto].", show_default=False)
]
Seed = Annotated[
    int, typer.Option("--seed", help="Seed of everything that is drawn [0].", show_default=False)
]
Threads = Annotated[int | None, typer.Option("--threads", help="CPU threads [what torch takes].")]
Page = Annotated[Path | None, typer.Option("--html", help="Write a page with the figures there too.")]


def _text(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]} [{names[0]}]."


def plan(
    model: Model,
    budget: Annotated[
        float, typer.Option("--budget", help="Expected share of a dense step's cost, in (0, 1].")
    ],
    method: Annotated[str, typer.Option("--method", help=_text(make.METHODS), show_default=False)] = "auto",
    cost: Annotated[
        str,
        typer.Option("--cost", help=f"What a step is counted in: {_text(costing.KINDS)}", show_default=False),
    ] = "flops",
    minimum_rate: Annotated[
        float, typer.Option("--minimum-rate", help="Smallest rate of sensemode [0.1].", show_default=False)
    ] = 0.1,
    gamma: Annotated[
        float, typer.Option("--gamma", help="From 0, uniform, to 1, sensemode [1].", show_default=False)
    ] = 1.0,
    reduction: Annotated[
        str,
        typer.Option(
            "--reduction", help=f"Of sensitivities: {_text(sensitivity.REDUCTIONS)}", show_default=False
        ),
    ] = "absolute",
    granularity: Granularity = None,
    include: Include = None,
    exclude: Exclude = None,
    data: Data = None,
    data_dir: DataDir = None,
    resize: Resize = None,
    batches: Batches = 4,
    batch_size: BatchSize = 32,
    weights: Weights = None,
    device: Device = "auto",
    seed: Seed = 0,
    out: Annotated[
        Path, typer.Option("--out", help="File of the plan, or its folder [plan.json].", show_default=False)
    ] = Path("plan.json"),
    html: Page = None,
    threads: Threads = None,
) -> None:
    """Choose survival rates for a compute budget, from measured costs and sensitivities.

    Writes plan.json, which fallow train --rates and fallow.Plan.load take.
    """
    target = examine.file_to_write(out, "plan")
    source = _source(data, data_dir, resize, batches, batch_size, weights, device, seed)
    with on_threads(threads):
        made = examine.plan_of(
            model,
            source,
            budget=budget,
            method=method,
            cost=cost,
            minimum_rate=minimum_rate,
            gamma=gamma,
            reduction=reduction,
            granularity=granularity,
            include=tuple(include or ()),
            exclude=tuple(exclude or ()),
        )
    made.save(target)
    print(made)
    _say_where("plan", target, html)


def explain(
    model: Model,
    rates: Annotated[
        str | None, typer.Option("--rates", help="linear, uniform, a plan.json, or a JSON file [the run's].")
    ] = None,
    budget: Annotated[
        float | None, typer.Option("--budget", help="Expected share of a dense step's FLOPs, for a rule.")
    ] = None,
    scale: Annotated[
        str | None, typer.Option("--scale", help="train or eval [the run's, else train].")
    ] = None,
    head: Annotated[
        str | None, typer.Option("--head", help="Name of the last linear layer [found by its output].")
    ] = None,
    noise: Annotated[
        str | None,
        typer.Option("--noise", help=f"Masks in front of it: {', '.join(WRITTEN)} [the model's own]."),
    ] = None,
    loss: Annotated[
        str, typer.Option("--loss", help=_text(examine.LOSSES), show_default=False)
    ] = examine.LOSSES[0],
    draws: Annotated[int, typer.Option("--draws", help="Masks of all sites [64].", show_default=False)] = 64,
    site_draws: Annotated[
        int, typer.Option("--site-draws", help="Masks of the others for each site [4].", show_default=False)
    ] = 4,
    label_draws: Annotated[
        int, typer.Option("--label-draws", help="Labels for the linearised form [64].", show_default=False)
    ] = 64,
    granularity: Granularity = None,
    include: Include = None,
    exclude: Exclude = None,
    data: Data = None,
    data_dir: DataDir = None,
    resize: Resize = None,
    batches: Batches = 4,
    batch_size: BatchSize = 32,
    weights: Weights = None,
    device: Device = "auto",
    seed: Seed = 0,
    out: Annotated[
        Path,
        typer.Option("--out", help="File of it, or its folder [explanation.json].", show_default=False),
    ] = Path("explanation.json"),
    html: Page = None,
    threads: Threads = None,
) -> None:
    """Say what stochastic depth penalises, site by site: exact forms beside a Monte Carlo estimate.

    Takes the rates and the scale of a run; for a model by name pass --rates or --budget. With --noise, or
    where the model has noise in front of its last linear layer, also what that penalises; with --loss squared
    how far the layer is from the global minimum.
    """
    target = examine.file_to_write(out, "explanation")
    source = _source(data, data_dir, resize, batches, batch_size, weights, device, seed)
    with on_threads(threads):
        found = examine.explanation_of(
            model,
            source,
            rates=rates,
            budget=budget,
            scale=scale,
            head=head,
            noise=noise,
            loss=loss,
            draws=draws,
            site_draws=site_draws,
            label_draws=label_draws,
            granularity=granularity,
            include=tuple(include or ()),
            exclude=tuple(exclude or ()),
        )
    examine.write_explanation(found, target)
    print(found)
    _say_where("result", target, html)


def _source(
    data: str | None,
    data_dir: str | None,
    resize: int | None,
    batches: int,
    batch_size: int,
    weights: str | None,
    device: str,
    seed: int,
) -> examine.Source:
    return examine.Source(
        data=data,
        data_dir=data_dir,
        resize=resize,
        batches=batches,
        batch_size=batch_size,
        weights=weights,
        device=device,
        seed=seed,
    )


def _say_where(kind: str, target: Path, html: Path | None) -> None:
    """The paths at the end, the page's too where one is wanted."""
    print(f"{kind:<7} {target}", flush=True)
    if html is not None:
        print(f"page    {write_report(target, html)}", flush=True)

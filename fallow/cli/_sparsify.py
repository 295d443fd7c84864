"""The command that makes a model sparse and shrinks it."""

from __future__ import annotations

import shlex
from typing import Any

from fallow.cli._flags import given_options, print_line
from fallow.errors import need
from fallow.recipes import show
from fallow.recipes import sparsify as recipe
from fallow.recipes.train import read_results
from fallow.report import write_report
from fallow.report._sparse import rescued
from fallow.sparsity.control import Shortfall

_FEW = 5  # remarks of one kind


def sparsify(**given: Any) -> None:
    """Train a model towards zeros by a penalty or a schedule, and shrink it to a smaller dense one.

    Leaves the weights with zeros in model.safetensors and sparse.pt, and the smaller model in small/, which
    loads without fallow.
    """
    context, out, resumed, options = given_options(given)
    console = show.console()
    progress = show.Live(console) if console.is_terminal else show.Lines(print_line)
    if resumed is not None:
        folder = recipe.resume(resumed, show=progress)
    else:
        config = recipe.SparseConfig.of(options)
        folder = recipe.sparsify(config, out, show=progress, command=shlex.join(context.obj))
    results = read_results(folder)
    print_table(results, console)
    for line in remarks(results):
        print_line(line)
    print_line(f"run     {folder}")
    print_line(f"report  {write_report(folder)}")


def rows(results: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The closing table: what, before, after, how many times less."""
    test, summary, small = results["test"], results["summary"], results["small"]
    images, timed = test["test_images"], small.get("latency_ms", {}).get("rows")
    zeros = {"dense": summary["weights"], "small": summary["kept"]}
    return [
        (f"test error ({images} images)", show.error_words(test["test_error"], images), "", ""),
        _row("weights that are not zero", zeros, "{:,.0f}"),
        *(
            _row(name, small[key], form)
            for name, key, form in (
                ("parameters", "parameters", "{:,.0f}"),
                ("FLOPs of an image", "flops", "{:,.0f}"),
                (f"latency of {timed} images", "latency_ms", "{:.2f} ms"),
            )
            if key in small
        ),
        *(
            _row(name, {"dense": size["dense"] / 1000, "small": size[key] / 1000}, "{:,.1f} kB")
            for name, key in (("file of weights", "small"), ("file with sparse rows", "sparse"))
            if key in (size := small["bytes"])
        ),
    ]


def _row(what: str, found: dict[str, Any], form: str) -> tuple[str, str, str, str]:
    before, after = found["dense"], found["small"]
    return what, form.format(before), form.format(after), _ratio(before / after) if after else ""


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def print_table(results: dict[str, Any], console: Any) -> None:
    """Print the closing table."""
    table = need("rich.table", "lab").Table(box=need("rich.box", "lab").SIMPLE_HEAD, pad_edge=False)
    for place, head in enumerate(("", "before", "after", "before / after")):
        table.add_column(head, justify="right" if place else "left", no_wrap=True)
    for row in rows(results):
        table.add_row(*row)
    console.print(table, highlight=False)


def remarks(results: dict[str, Any]) -> list[str]:
    """What the table does not say: what was kept, what stays, why nothing could be made smaller."""
    small = results["small"]
    found = [f"the outputs of {name} are the classes: all of them stay" for name in results.get("spared", ())]
    found += rescued(results)
    if results.get("shortfall"):  # folders of older versions have none
        found.append(f"the target was not met: {Shortfall(**results['shortfall'])}")
    if "failed" in small:
        return [
            *found,
            f"the network could not be made smaller, its zeros are in the files: {small['failed']}",
        ]
    found += [
        f"stays in {item['name']}: {item['count']} dead, {item['reason']}" for item in small["left"][:_FEW]
    ]
    more = len(small["left"]) - _FEW
    return [*found, f"and {more} more kinds, in the report"] if more > 0 else found

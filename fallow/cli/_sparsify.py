"""The command that makes a model sparse and shrinks it."""

from __future__ import annotations

import shlex
from typing import Any

from fallow.cli._flags import given_options, print_line
from fallow.recipes import show
from fallow.recipes import sparsify as recipe
from fallow.recipes.train import read_results
from fallow.report import write_report


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
    for line in lines(read_results(folder)):
        print_line(line)
    print_line(f"run     {folder}")
    print_line(f"report  {write_report(folder)}")


def lines(results: dict[str, Any]) -> list[str]:
    """What came of it."""
    test, weights, small = results["test"], results["summary"], results["small"]
    error = show.error_words(test["test_error"], test["test_images"])
    found = [
        f"test error {error} ({test['test_images']} images)",
        f"weights left {weights['kept']} of {weights['weights']} ({_times(weights['compression'])})",
    ]
    for name in results["rescued"]:
        found.append(f"{name} would be empty: one of its groups was kept")
    if "failed" in small:
        return [*found, f"not shrunk: {small['failed']}"]
    found += [
        _compared("parameters", small["parameters"], "{:,.0f}"),
        _compared("FLOPs an image", small["flops"], "{:,.0f}"),
        _compared("latency", small["latency_ms"], "{:.2f} ms"),
        _compared("size", {k: v / 1024 for k, v in small["bytes"].items()}, "{:,.0f} kB"),
    ]
    for item in small["left"][:5]:
        found.append(f"left at {item['name']}: {item['count']} units, {item['reason']}")
    if len(small["left"]) > 5:
        found.append(f"and {len(small['left']) - 5} more, in results.json")
    return found


def _compared(what: str, found: dict[str, Any], form: str) -> str:
    dense, small = found["dense"], found["small"]
    return f"{what} {form.format(small)} of {form.format(dense)} ({_times(dense / small if small else None)})"


def _times(ratio: float | None) -> str:
    return "none left" if ratio is None else f"{ratio:.1f}x fewer" if ratio > 1.05 else "as before"

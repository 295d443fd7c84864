"""What the command lines of the benchmarks have in common."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import _timing


def parser(about: str | None, *, pairs: int, threads: int = 1) -> argparse.ArgumentParser:
    """One with the options of every benchmark: rounds, threads, allocator, file.

    Args:
        about: the module's docstring.
        pairs: default of --pairs.
        threads: default of --threads.
    """
    p = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--pairs", type=int, default=pairs, help="timed rounds")
    p.add_argument("--threads", type=int, default=threads)
    p.add_argument("--json", type=Path, metavar="FILE", help="write everything measured here")
    p.add_argument("--keep-memory", action="store_true", help="have the allocator keep memory (Linux)")
    return p


def check_counts(p: argparse.ArgumentParser, options: argparse.Namespace, *more: str) -> None:
    """End with a line where an option is below 1 that counts something; of a list each, None passes."""
    names = ("pairs", "threads", *more)
    for name in names:
        value = getattr(options, name)
        for count in value if isinstance(value, list | tuple) else [value]:
            if count is not None and count < 1:
                p.error(f"--{name.replace('_', '-')} is at least 1, got {count}")


def begin(kind: str, options: argparse.Namespace, arguments: Sequence[str] | None) -> dict[str, Any]:
    """Make the process ready to be timed; how its report begins."""
    if options.keep_memory:
        _timing.keep_memory()
    torch.set_num_threads(options.threads)
    # oneDNN keeps 1024 compiled kernels, one for each shape. A row-mode model needs hundreds, a dozen
    # arms in turn would throw each other's out and compile them anew at every step, as no training run does.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "65536")
    about = {"pairs": options.pairs, "hardware": _timing.hardware()}
    return _timing.heading(kind, arguments) | about


def write(options: argparse.Namespace, report: Mapping[str, Any]) -> None:
    """Where a file was asked for: after every part, so that an interrupted run keeps what it has."""
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

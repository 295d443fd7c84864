"""A reproduced paper as a page of the documentation: the same numbers as the report's, in Markdown."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any

from fallow.report import _paper
from fallow.report._paper import Part, Sheet
from fallow.report._tables import Table
from fallow.report._words import get

_SPECIAL = re.compile(r"([\\`*_\[\]|#])")


def plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return " ".join(_SPECIAL.sub(r"\\\1", html.escape(text, quote=False)).split())


def render(results: Sequence[dict[str, Any]]) -> str:
    """The page of one or several results files of a paper."""
    sheets = [_paper.sheet(one, index) for index, one in enumerate(results)]
    first = sheets[0]
    lines = [f"# {plain(first.title)}", "", plain(first.cite), ""]
    name = get(results[0], "paper", "name")
    lines += [
        f"Made from the files in `results/{name}` by `fallow report`; do not edit. "
        f"`fallow report results/{name}/SCALE.json --out page.html` draws the plots, without a new run."
    ]
    lines += ["", "**Whose numbers these are.**", "", *_bullets(first.notes)]
    for one, found in zip(sheets, results, strict=True):
        lines += ["", *_scale(one, found)]
    return "\n".join(lines).rstrip() + "\n"


def _scale(one: Sheet, results: dict[str, Any]) -> list[str]:
    provenance = get(results, "provenance")
    keys = ("command", "fallow", "torch", "python", "hardware", "seeds", "finished")
    words = [f"{key} {get(provenance, key)}" for key in keys if get(provenance, key)]
    lines = [f"## Scale {plain(one.scale)}", "", plain(one.about), "", f"*{plain('; '.join(words))}*", ""]
    lines += _bullets([*([one.warning] if one.warning else []), *one.remarks])
    for item in one.parts:
        lines += ["", *_item(item)]
    return lines


def _item(item: Part) -> list[str]:
    status = f" ({item.status})" if item.status else ""
    lines = [f"### {plain(item.title + status)}", "", plain(item.shows), "", *_bullets(item.statements)]
    for table, note in item.tables:
        lines += ["", *_table(table)]
        lines += ["", f"*{plain(note)}*"] if note else []
    if not item.tables and item.plots and not item.statements:
        lines += ["A plot alone."]
    if item.known.rows:
        lines += ["", *_table(item.known)]
    if item.differences:
        lines += ["", "Differences in set-up:", "", *_bullets(item.differences)]
    return lines


def _bullets(texts: Sequence[str]) -> list[str]:
    return [f"- {plain(text)}" for text in texts]


def _table(table: Table) -> list[str]:
    lines = [f"**{plain(table.caption)}**", ""]
    lines += [f"| {' | '.join(map(plain, table.columns))} |", "|" + "---|" * len(table.columns)]
    return lines + [f"| {' | '.join(map(plain, row))} |" for row in table.rows]

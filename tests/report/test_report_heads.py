"""The part of an explanation's page on noise in front of the head."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from example_plans import example_explanation, example_head
from test_report_page import EVIL, Outline, change

from fallow.report import _heads, write_report


def alone() -> dict[str, Any]:
    return example_explanation() | {"sites": [], "totals": {}, "notes": [], "head": example_head()}


def both() -> dict[str, Any]:
    return example_explanation() | {"head": example_head()}


def page_of(content: Any, folder: Path) -> str:
    file = folder / "explanation.json"
    file.write_text(json.dumps(content))
    return write_report(file).read_text()


def test_a_head_alone_has_its_own_headline_tiles_table_and_figures(tmp_path):
    page = page_of(alone(), tmp_path)
    outline = Outline(page)
    for words in (
        "Noise in front of the head adds 0.25 to the loss, 33.3\u00a0% of the loss under it; ",
        "the objective is at most 25.00\u00a0% above the global minimum.",
        "0.2\u00a0±\u00a00.02",
        "global minimum 0.6",
        "at block size 8 DropBlock is more than Dropout here",
        "drop (BlockDropout)",
        "fc",
    ):
        assert words in outline.text
    assert re.findall(r'<svg[^>]*id="run-1-(\w+)"', page) == ["head", "spectrum"]
    assert "Stochastic depth" not in outline.text


def test_beside_sites_it_comes_after_them(tmp_path):
    page = page_of(both(), tmp_path)
    text = Outline(page).text
    assert text.index("Stochastic depth adds") < text.index("Noise in front of the head adds")
    assert re.findall(r'<svg[^>]*id="run-1-(\w+)"', page) == ["penalties", "sums", "head", "spectrum"]
    assert "penalty, exact" in text and "group3.2" in text


def test_forms_are_ratios_to_monte_carlo_and_spectra_stand_side_by_side():
    plot = _heads.forms(example_head() | {"quadratic": 0.3, "jensen": 0.5}, "")
    assert plot is not None
    for words in ("Monte Carlo  1.000", "exact  1.250", "quadratic form  1.500", "Jensen's bound  2.500"):
        assert f">{words}<" in plot.svg
    spectra = _heads.spectra(example_head(), "")
    assert spectra is not None and spectra.table.rows[0] == ("1", "9", "6")
    assert spectra.table.rows[3] == ("4", "0.5", "–")


def test_where_a_form_or_the_optimum_is_not_to_be_had_the_rest_stands(tmp_path):
    found = alone()
    found["head"] |= {"exact": None, "quadratic": 0.21, "optimum": None}
    page = page_of(found, tmp_path)
    text = Outline(page).text
    assert "adds 0.2 to the loss" in text and "global minimum" not in text
    assert re.findall(r'<svg[^>]*id="run-1-(\w+)"', page) == ["head"]
    assert _heads.forms(example_head() | {"monte_carlo": 0.0}, "") is None
    far = example_head()
    far["optimum"]["above"] = 82.7
    assert _heads.headline(far).endswith("the objective is at most 83.7 times the global minimum.")
    assert _heads.headline({}) == "What noise in front of the head penalises was not measured."


@pytest.mark.parametrize("leaf", [None, "text", math.nan, math.inf, -1e300, 10**400, True, []])
@pytest.mark.parametrize("make", [alone, both])
def test_values_that_cannot_be_drawn_leave_a_page(tmp_path, make, leaf):
    broken = change(make(), lambda value: leaf) | {"schema": 1, "kind": "explanation"}
    Outline(page_of(broken, tmp_path))


def test_any_part_may_be_missing_and_text_stays_text(tmp_path):
    for key in example_head():
        found = alone()
        del found["head"][key]
        Outline(page_of(found, tmp_path))
    Outline(page_of(alone() | {"head": 3}, tmp_path))
    evil = change(alone(), lambda x: EVIL if isinstance(x, str) and x != "explanation" else x)
    assert "script" not in Outline(page_of(evil, tmp_path)).tags

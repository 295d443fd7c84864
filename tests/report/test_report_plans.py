"""Pages of plans and explanations: what they show, of whole files and of files with holes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from example_plans import SITES, example_explanation, example_plan
from test_report_page import EVIL, Outline, change

from fallow.errors import DataError, UsageError
from fallow.report import _explanations, _plans, _replans, read_results, write_report

EXAMPLES = {"plan": example_plan, "explanation": example_explanation}
FIGURES = {"plan": ("rates", "sensitivities"), "explanation": ("penalties", "sums")}
KINDS = pytest.mark.parametrize("kind", list(EXAMPLES))
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A document in a file of a given name."""

    def file(content: Any, name: str = "plan.json") -> Path:
        path = tmp_path / name
        path.write_text(json.dumps(content))
        return path

    return file


def page_of(content: Any, write: Write) -> str:
    return write_report(write(content)).read_text()


# --- what they show --------------------------------------------------------------------------------------


@KINDS
def test_the_page_stands_beside_the_file_with_every_figure_and_its_table(write: Write, kind: str):
    file = write(EXAMPLES[kind](), "mine.json")
    page = write_report(file)
    assert page == file.with_suffix(".html")
    outline = Outline(page.read_text())
    for figure in FIGURES[kind]:
        assert f'id="run-1-{figure}"' in page.read_text()
    assert outline.tags.count("svg") == outline.tags.count("figure") == len(FIGURES[kind])
    assert len(outline.ids) == len(set(outline.ids))
    assert "Drawn from mine.json alone; nothing was run again." in outline.text
    assert "test error" not in outline.text and "constant depth" not in outline.text


def test_a_plan_says_what_it_is(write: Write):
    text = Outline(page_of(example_plan(), write)).text
    for words in (
        "SenseMode rates for timm:vit_tiny_patch16_224: an expected 0.70 of the dense step's FLOPs",
        "SenseMode, chosen by auto",
        "1x224x224",
        "auto took sensemode: the blocks differ",
        "blocks.11.mlp",
        "share of a step's FLOPs",
        "mean, 0.6",
    ):
        assert words in text


def test_every_rate_is_a_bar_of_its_height(write: Write):
    plan = example_plan()
    page = page_of(plan, write)
    drawing = re.search(r'<svg[^>]*id="run-1-rates".*?</svg>', page, re.S)
    assert drawing is not None
    heights = []
    for index, site in enumerate(plan["sites"], start=1):
        bar = re.search(rf'<g id="run-1-rates-site-{index}">.*?d="([^"]*)"', drawing[0], re.S)
        assert bar is not None and f"{site['name']}: {site['rate']:.3f}" in drawing[0]
        ys = [float(y) for y in re.findall(r"[ML] \S+ (\S+)", bar[1])]
        heights.append(max(ys) - min(ys))
    assert len(heights) == SITES
    for height, site in zip(heights, plan["sites"], strict=True):
        assert height / heights[1] == pytest.approx(site["rate"] / plan["sites"][1]["rate"], rel=1e-3)


@pytest.mark.parametrize("hole", [None, 0.0])
def test_a_plan_without_sensitivities_shows_its_rates(write: Write, hole: float | None):
    plan = example_plan() | {"method": "uniform", "asked": "uniform"}
    for site in plan["sites"]:
        site["sensitivity"] = hole
    page = page_of(plan, write)
    assert 'id="run-1-rates"' in page and 'id="run-1-sensitivities"' not in page
    assert "Uniform rates" in page and "chosen by" not in page


def test_an_explanation_says_what_holds(write: Write):
    text = Outline(page_of(example_explanation(), write)).text
    for words in (
        "Stochastic depth adds 0.211 ± 0.0055 to the loss of the mean output",
        "9.3\u00a0% of the loss under noise",
        "the sites' Bregman forms add up to it; the sites' Hessian forms do not add up to it",
        "0.29\u00a0±\u00a00.017",
        "too few draws to tell",
        "full network 2.012, at evaluation 2.012",
        "group3.2",
    ):
        assert words in text


def test_monte_carlo_stands_beside_each_form_with_its_error(write: Write):
    page = page_of(example_explanation(), write)
    drawing = re.search(r'<svg[^>]*id="run-1-penalties".*?</svg>', page, re.S)
    assert drawing is not None
    for role in ("model", "ink", *(role for _, role in _explanations.FORMS.values())):
        assert f"var(--{role})" in drawing[0]
    assert drawing[0].count("site-") >= 9
    rows = _explanations.sites(example_explanation()).rows
    assert rows[4][4:] == ("0.018", "0.019", "–", "0.017", "0.036\u00a0±\u00a00.002", "1.00\u00a0%")


def test_without_draws_for_each_site_the_forms_stand_alone(write: Write):
    found = example_explanation()
    for site in found["sites"]:
        site["monte_carlo"] = site["monte_carlo_error"] = None
    page = page_of(found, write)
    assert 'id="run-1-penalties"' in page and "one standard error" in page
    plot = _explanations.penalties(found, "")
    assert plot is not None and [words for _, words in plot.legend] == [
        title for title, _ in _explanations.FORMS.values()
    ]


# --- a run whose rates were planned anew ---------------------------------------------------------------


def planned(results: dict[str, Any], count: int) -> dict[str, Any]:
    names = [site["name"] for site in results["sites"]]
    plans = [{"epoch": e, "rates": {n: 1 / (e + 1) for n in names}} for e in range(1, count + 1)]
    return results | {"plans": plans}


def test_a_run_shows_its_plans(results: dict[str, Any], save: Write):
    page = write_report(save(planned(results, 3))).read_text()
    assert 'id="run-1-plans"' in page and "plans are shown" not in page
    text = Outline(page).text
    assert all(f"after epoch {e}" in text for e in (1, 2, 3)) and "0.333" in text


def test_of_many_plans_the_first_the_last_and_some_between_are_shown(results: dict[str, Any]):
    plot = _replans.replans(planned(results, 20), "")
    assert plot is not None and "6 of 20 plans are shown" in plot.note
    words = [words for _, words in plot.legend]
    assert (words[0], words[-1], len(set(words))) == ("after epoch 1", "after epoch 20", 6)
    assert len(plot.table.rows) == len(results["sites"]) and len(plot.table.columns) == 8


@pytest.mark.parametrize("plans", [None, [], [{}], [{"rates": {"a": "x"}}], [3], {"rates": {"a": 1}}])
def test_a_run_without_plans_has_no_such_figure(results: dict[str, Any], plans: Any):
    assert _replans.replans(results | {"plans": plans}, "") is None


# --- files -----------------------------------------------------------------------------------------------


@KINDS
def test_the_same_file_gives_the_same_bytes(write: Write, kind: str, tmp_path: Path):
    file = write(EXAMPLES[kind]())
    assert write_report(file).read_bytes() == write_report(file, tmp_path / "again.html").read_bytes()
    assert write_report(file, tmp_path) == tmp_path / "report.html"


def test_several_plans_stand_side_by_side(write: Write):
    files = [write(example_plan(), "a.json"), write(example_plan() | {"budget": 0.5}, "b.json")]
    outline = Outline(write_report(files).read_text())
    assert "2 side by side" in outline.text and outline.tags.count("h1") == 1
    assert len(outline.ids) == len(set(outline.ids)) and outline.tags.count("svg") == 4


def test_kinds_do_not_mix(write: Write):
    files = [write(EXAMPLES[kind](), f"{kind}.json") for kind in EXAMPLES]
    with pytest.raises(UsageError, match="one kind of results, got explanation and plan"):
        write_report(files)


def test_a_file_that_is_not_there_or_of_another_kind(write: Write, tmp_path: Path):
    with pytest.raises(DataError, match="there is no file .*nowhere.json"):
        read_results(tmp_path / "nowhere.json")
    with pytest.raises(DataError, match="kind 'dance'"):
        read_results(write({"schema": 1, "kind": "dance"}))


@KINDS
@pytest.mark.parametrize("leaf", [None, "text", math.nan, math.inf, -1e300, 10**400, True, []])
def test_values_that_cannot_be_drawn_leave_a_page(write: Write, kind: str, leaf: Any):
    keep = EXAMPLES[kind]()
    broken = change(keep, lambda value: leaf)
    for key in ("schema", "kind"):
        broken[key] = keep[key]
    Outline(page_of(broken, write))


@KINDS
def test_any_part_may_be_missing(write: Write, kind: str):
    whole = EXAMPLES[kind]()
    for key in whole.keys() - {"schema", "kind"}:
        Outline(page_of({k: v for k, v in whole.items() if k != key}, write))
    Outline(page_of({"schema": 1, "kind": kind}, write))


@KINDS
def test_text_stays_text(write: Write, kind: str):
    whole = EXAMPLES[kind]()
    evil = change(whole, lambda x: EVIL if isinstance(x, str) and x != kind else x)
    outline = Outline(page_of(evil, write))
    assert "script" not in outline.tags and "<script>alert(1)</script>" in outline.text


def test_plain_words_for_what_is_not_there():
    assert _plans.headline({"sites": []}) == "A plan without rates."
    assert _explanations.headline({}) == "What stochastic depth penalises was not measured."

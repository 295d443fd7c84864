"""Maps of numbers: each number in its place, the same in the table, whatever is odd is left out."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from fallow.papers._panels import heat
from fallow.report import _charts, _paper
from fallow.report._shapes import Plot

NASTY = "<b>$x_1$ & |</b>"


def example(**changes: Any) -> dict[str, Any]:
    """Errors at two depths and three rates, one of them unknown."""
    return {**heat("error", "layers", "p_L", [20, 32], [0.2, 0.5, 1.0], VALUES), **changes}


VALUES = [[31.25, None], [9.5, 8.0], [12.5, 7.125]]


def drawn(panel: dict[str, Any]) -> Plot:
    found = _charts.chart(panel, "x")
    assert found is not None
    return found


def texts(plot: Plot) -> list[str]:
    """All that is written into the drawing."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", plot.svg)


def shades(plot: Plot) -> list[float]:
    """How dark the cells are, in the order in which they are drawn."""
    cells = re.findall(r'style="([^"]*fill: var\(--run-0\)[^"]*)"', plot.svg)
    return [float(found[1]) for cell in cells if (found := re.search(r"opacity: ([\d.]+)", cell))]


def test_every_number_is_drawn_and_stands_in_the_table():
    plot = drawn(example())
    for number in ("31.2", "9.5", "8", "12.5", "7.12", "20", "32", "0.2", "0.5", "1", "layers", "p_L"):
        assert number in texts(plot)
    assert plot.table.columns == ("p_L by layers", "20", "32")
    assert plot.table.rows == (("0.2", "31.25", "–"), ("0.5", "9.5", "8"), ("1", "12.5", "7.125"))
    assert "table beside" in plot.svg and plot.legend == () and plot.title == plot.table.caption == "error"


def test_the_larger_the_darker():
    numbers = [value for row in VALUES for value in row if value is not None]
    found = shades(drawn(example()))
    assert len(found) == len(numbers)
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    assert order == sorted(range(len(found)), key=found.__getitem__)
    assert math.isclose(min(found), 0.08) and math.isclose(max(found), 0.7)
    assert len(set(shades(drawn(example(values=[[3, 3], [3, 3]]))))) == 1


@pytest.mark.parametrize(
    "values",
    [
        [[1.0, 2.0], [3.0, math.nan]],
        [[1.0, 2.0], [3.0, "4"]],
        [[1.0, 2.0], [3.0, None]],
        [[1.0, 2.0], [3.0, math.inf]],
        [[1.0, 2.0], [3.0, True]],
        [[1.0, 2.0], [3.0, 10**400]],
        [[1.0, 2.0], [3.0]],
        [[1.0, 2.0, 9.0], [3.0], None, [7.0, 8.0]],
    ],
)
def test_what_is_no_number_or_outside_is_left_out(values: list[Any]):
    plot = drawn(example(ys=[0.2, 0.5], values=values))
    assert len(shades(plot)) == 3
    assert plot.table.rows == (("0.2", "1", "2"), ("0.5", "3", "–"))


@pytest.mark.parametrize(
    "changes",
    [
        {"values": None},
        {"values": "12"},
        {"values": {"a": 1}},
        {"values": []},
        {"values": [None, 3, "12"]},
        {"values": [[math.nan, None], []]},
        {"xs": None},
        {"xs": []},
        {"ys": 3},
        {"ys": []},
    ],
)
def test_a_map_without_a_number_is_not_drawn(changes: dict[str, Any]):
    assert _charts.chart(example(**changes), "x") is None


def test_a_map_of_odd_words_is_drawn_and_escaped():
    odd = example(xs=[NASTY, None], ys=[NASTY, 0.5, {}], title=NASTY, x=NASTY, y=None)
    plot = drawn(odd)
    assert "<b>" not in plot.svg and "&lt;b&gt;$x_1$ &amp; |&lt;/b&gt;" in plot.svg
    results = {"schema": 1, "kind": "paper", "scale": "tiny", "items": [{"name": "a", "panels": [odd]}]}
    page = _paper.render([results])
    assert "<b>" not in page and page.count("<svg") == 1 and "31.25" in page

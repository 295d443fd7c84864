"""The page of a sparsification: what is on it, that nothing in the results can break it."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
from test_report_page import EVIL, Outline, change, page_of

from fallow.report import _sparse, _sparse_plots, _sparse_weights, _svg, write_report

FIGURES = ["histogram", "layers", "penalty", "strategy", "error", "zeros", "path", "strength"]


def example() -> dict[str, Any]:
    """A finished run without a target, made without training anything."""
    magnitudes = [10 ** (-5 + i / 12) for i in range(60)]
    layers = [("linear1.weight", [300, 784], 2900), ("linear2.weight", [100, 300], 2000)]
    return {
        "schema": 1,
        "kind": "sparsify",
        "status": "done",
        "config": {"strategy": "logsum", "groups": "weights", "target": None},
        "provenance": {"torch": "2.13.0", "data": {"name": "mnist", "notes": ["One channel."]}},
        "test": {"test_error": 0.0321, "test_images": 10_000},
        "summary": {"weights": 265_200, "kept": 4_900, "sparsity": 1 - 4_900 / 265_200, "compression": 54.1},
        "epochs": [
            {
                "epoch": e,
                "train_loss": 0.3 / e,
                "validation_error": 0.05 / e,
                "sparsity": 0.97 + e / 1000,
                "strength": 1e-4 * 2**e,
                "learning_rate": 1e-3,
            }
            for e in range(1, 9)
        ],
        "layers": [
            {
                "name": n,
                "shape": s,
                "groups": s[0] * s[1],
                "kept_groups": k,
                "weights": s[0] * s[1],
                "kept": k,
            }
            for n, s, k in layers
        ],
        "histogram": {"zeros": 260_300, "low": -3.2, "high": -0.2, "counts": [i % 9 for i in range(60)]},
        "curves": {
            "name": "LogSum(eps=2.0)",
            "of": "weights",
            "strength": 0.0256,
            "cut": 0.05,
            "magnitude": magnitudes,
            "penalty": [math.log1p(m / 2) for m in magnitudes],
            "survival_rate": [m * (m + 2) / (m * (m + 2) + 0.0256) for m in magnitudes],
        },
        "rescued": ["linear3.weight"],
        "small": {
            "bytes": {"dense": 1_067_000, "small": 420_000, "sparse": 50_500},
            "parameters": {"dense": 266_610, "small": 105_000},
            "flops": {"dense": 532_400, "small": 209_000},
            "latency_ms": {"dense": 0.9, "small": 0.45, "rows": 128},
            "largest_difference": 2e-6,
            "largest_output": 20.0,
            "exported": "model.pt2 takes any batch size",
            "left": [{"name": "linear3", "count": 5, "reason": "an output of the model"}],
            "shapes": {"linear1.weight": [180, 500], "linear2.weight": [90, 180]},
        },
    }


@pytest.fixture
def sparse() -> dict[str, Any]:
    return example()


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes a second: most cases do without."""
    monkeypatch.setattr(_svg, "draw", lambda *_, **__: "<svg></svg>")


def figures(page: str) -> list[str]:
    return re.findall(r'<svg[^>]*id="run-1-(\w+)"', page)


def test_the_page_has_tiles_figures_tables_and_what_to_mind(sparse, save):
    page = page_of(sparse, save)
    outline = Outline(page)
    assert figures(page) == FIGURES
    assert len(outline.ids) == len(set(outline.ids))
    for words in (
        "98.15\u00a0% of the weights are zero; the test error is 3.21\u00a0±\u00a00.18\u00a0% on 10\u202f000",
        "0.39 of the FLOPs and 0.50 of the time",
        "compression 54.1\u00a0times",
        "0.45\u00a0ms of 0.90\u00a0ms for 128 images",
        "linear1.weight",
        "300\u00a0×\u00a0784",
        "180\u00a0×\u00a0500",
        "an output of the model",
        "linear3.weight would be empty",
        "260\u202f300 of 260\u202f531 weights are zero",
        "at strength 0.0256",
        "zero below 0.05",
        "LogSum(eps=2.0), before the strength",
        "differ from the larger one's by at most 2.0e\u221206",
        "One channel.",
    ):
        assert words in outline.text, words


@pytest.mark.usefixtures("plain")
def test_a_target_that_was_missed_and_what_stayed_whole_are_to_mind(sparse, save):
    short = {"asked": 0.8, "reached": 0.661, "reason": "16 outputs of each layer stay"}
    sparse |= {"shortfall": short, "rescued": ["linear1.weight", "linear2.weight"]}
    sparse["stayed"] = {"linear1.weight": "would be empty: the 200 largest of its groups stayed"}
    text = Outline(page_of(sparse, save)).text
    for words in (
        "66.10\u00a0% zeros instead of 80.00\u00a0%, because 16 outputs of each layer stay.",
        "linear1.weight would be empty: the 200 largest of its groups stayed.",
        "linear2.weight would be empty: the largest of its groups stayed.",
    ):
        assert words in text, words
    for odd in (None, {}, {"asked": "much"}, {"asked": 0.8}):
        sparse["shortfall"] = odd
        assert not any("zeros instead of" in note for note in _sparse.notes(sparse))


def test_the_numbers_of_the_curves_and_epochs_are_in_the_tables(sparse, save):
    text = Outline(page_of(sparse, save)).text
    for record in sparse["epochs"]:
        assert f"{100 * record['validation_error']:.2f}\u00a0%" in text
    for key in ("penalty", "survival_rate"):
        assert f"{sparse['curves'][key][0]:.4g}".replace("-", "\u2212") in text
    counts = sparse["histogram"]["counts"]
    assert [row[1] for row in _sparse_weights.histogram(sparse, "").table.rows] == [
        "260\u202f300",
        *(str(sum(counts[i : i + 3])) for i in range(0, 60, 3)),
    ]


def test_the_same_results_give_the_same_bytes(sparse, save, tmp_path):
    folder = save(sparse)
    first = write_report(folder).read_bytes()
    assert write_report(folder, tmp_path / "again.html").read_bytes() == first


def test_runs_of_several_strategies_stand_side_by_side(sparse, save):
    other = copy.deepcopy(sparse)
    other["config"]["strategy"], other["curves"]["of"] = "vardrop", "groups"
    lone = copy.deepcopy(sparse) | {"curves": None, "status": "interrupted"}
    lone["config"]["strategy"] = "magnitude"
    page = write_report([save(sparse, "one"), save(other, "two"), save(lone, "three")]).read_text()
    outline = Outline(page)
    assert "3 runs compared" in outline.text and "vardrop" in outline.text
    assert re.findall(r'id="compared-(\w+)"', page) == ["penalty", "strategy", "error", "zeros", "path"]
    assert len(outline.ids) == len(set(outline.ids))
    rows = _sparse.compared([("one", sparse), ("two", other), ("three", lone)]).rows
    assert [row[1] for row in rows] == ["logsum", "vardrop", "magnitude"]
    assert rows[0][3:7] == ("98.15\u00a0%", "54.1\u00a0times", "3.21\u00a0±\u00a00.18\u00a0%", "0.393")


def test_without_a_penalty_of_its_own_and_a_controller_those_figures_are_not_there(sparse, save):
    sparse["curves"] = None
    for record in sparse["epochs"]:
        record["strength"] = 1e-3
    sparse["config"]["target"] = 0.98
    page = page_of(sparse, save)
    assert figures(page) == ["histogram", "layers", "error", "zeros", "path"]
    assert "target, 98\u00a0%" in page


def test_a_network_that_could_not_be_made_smaller_says_why(sparse, save, plain):
    sparse["small"] = {"bytes": {"dense": 1000, "sparse": 500}, "failed": "<b>no sum was found"}
    text = Outline(page_of(sparse, save)).text
    assert "the network could not be made smaller." in text
    assert "its zeros are in the files. <b>no sum was found." in text
    assert "FLOPs" not in text and "0.5\u00a0kB" in text


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("interrupted", "interrupted after 8 epochs; fallow sparsify --resume continues it. because"),
        ("failed", "failed after 8 epochs; what it had found until then is below. because"),
        ("running", "had not finished when its results were read: they stop after 8 epochs. because"),
        ("odd", "unknown status 'odd'"),
    ],
)
def test_a_run_that_is_not_done_says_so(sparse, save, plain, status, words):
    del sparse["test"], sparse["small"]
    text = Outline(page_of(sparse | {"status": status, "message": "because"}, save)).text
    assert words in text and "no test error yet" in text


ODD = [None, math.nan, math.inf, "text", True, [], {}, 0, -1.5, 1e38, 1e-38, 1.7e308, 10**400]


@pytest.mark.parametrize("odd", ODD, ids=lambda value: repr(value)[:8])
def test_no_number_in_the_results_can_break_the_page(sparse, save, odd):
    changed = change(sparse, lambda x: x if isinstance(x, str) else odd) | {"schema": 1}
    assert "One channel." in Outline(page_of(changed, save)).text


@pytest.mark.parametrize("odd", [math.nan, 0.0, 1.7e308, None])
def test_one_odd_number_leaves_the_others(sparse, save, odd):
    for record in sparse["epochs"][3:4]:
        record |= {key: odd for key in record if key != "epoch"}
    for key in ("magnitude", "penalty", "survival_rate"):
        sparse["curves"][key][5] = odd
    sparse["histogram"]["counts"][7] = odd
    assert figures(page_of(sparse, save)) == FIGURES


@pytest.mark.parametrize("key", [key for key in example() if key not in ("schema", "kind")])
@pytest.mark.parametrize("instead", ["missing", None, [], {}, "text", [None, 3, "x"]], ids=repr)
def test_any_part_may_be_missing(sparse, save, plain, key, instead):
    sparse[key] = instead
    if instead == "missing":
        del sparse[key]
    assert "fallow" in Outline(page_of(sparse, save)).text


@pytest.mark.parametrize("part", ["small", "curves", "histogram", "summary", "test"])
def test_any_part_of_a_part_may_be_missing(sparse, save, plain, part):
    for key in list(sparse[part]):
        less = copy.deepcopy(sparse)
        del less[part][key]
        Outline(page_of(less, save, f"{part}-{key}"))


def test_the_least_there_can_be(save):
    outline = Outline(page_of({"schema": 1, "kind": "sparsify"}, save))
    assert "svg" not in outline.tags and "no test error yet" in outline.text


def test_text_from_data_stays_text(sparse, save):
    keep = ("done", "sparsify", "weights")
    calm = change(sparse, lambda x: "calm" if isinstance(x, str) and x not in keep else x)
    evil = change(sparse, lambda x: EVIL if isinstance(x, str) and x not in keep else x)
    expected, got = Outline(page_of(calm, save, "calm")), Outline(page_of(evil, save, "<b>"))
    assert got.tags == expected.tags and got.attributes == expected.attributes


def test_powers_of_ten_are_written_as_such():
    assert [_sparse_weights.power(x) for x in (-3, 0, 2, -0.5)] == ["10⁻³", "10⁰", "10²", "0.32"]
    assert [_sparse.times(x) for x in (1, 54.13, 600, 0, None)] == [
        "1.00\u00a0times",
        "54.1\u00a0times",
        "600\u00a0times",
        "–",
        "–",
    ]


def test_the_path_joins_the_epochs_that_have_both(sparse):
    del sparse["epochs"][2]["sparsity"]
    plot = _sparse_plots._path([("model", "logsum", sparse)], "path")
    assert plot is not None
    assert [row[2] for row in plot.table.rows] == [f"{97 + e / 10:.2f}\u00a0%" for e in (1, 2, 4, 5, 6, 7, 8)]

"""The pieces of huang2016: its experiments as data, tables of known answers, steps in turn, a small whole."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from fallow import models, rates
from fallow.papers import _cells, shelf
from fallow.papers._cells import _config
from fallow.papers._experiments import Cell, Paper
from fallow.papers.huang2016 import results as huang_results
from fallow.papers.huang2016 import sizes as huang_sizes
from fallow.papers.huang2016 import sweeps as huang_sweeps
from fallow.papers.huang2016 import times as huang_times
from fallow.papers.huang2016.sizes import OWN, WAYS, Images, Size, by_scale
from fallow.papers.huang2016.timing import CONSTANT, timing_cell
from fallow.recipes._config import Config
from fallow.recipes._job import prepared
from fallow.recipes._optimise import learning_rate
from fallow.report import _charts, write_report

PAPER = shelf.PAPERS["huang2016"]
ITEMS = {item.name: item for item in PAPER.items}
Found = list[tuple[Cell, dict[str, Any]]]


def plain(_: str, compute: Any) -> Any:
    """Pieces that keep nothing."""
    return compute()


# --- the experiments as data -----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", list(PAPER.scales))
def test_cells_have_names_of_their_own_and_items_share_equal_ones(scale: str):
    everything = [cell for item in PAPER.items for cell in item.cells[scale]]
    by_name = {cell.name: cell for cell in everything}
    for item in PAPER.items:
        assert len({cell.name for cell in item.cells[scale]}) == len(item.cells[scale]) > 0
    for cell in everything:
        assert by_name[cell.name] == cell and "/" not in cell.name and cell.minutes > 0
        assert json.loads(json.dumps(dict(cell.options))) == cell.options
    assert len(PAPER.cells(PAPER.items, scale)) == len(by_name)


@pytest.mark.parametrize("scale", list(PAPER.scales))
def test_every_training_has_the_papers_optimiser_and_rates_that_are_its_tags(scale: str):
    pairs = {cell.name for part in ("tables", "deep") for cell in by_scale(part)[scale]}
    for cell in PAPER.cells(PAPER.items, scale):
        if cell.work is not None:
            continue
        config, tags = _config(cell, None), cell.tags
        assert (config.preset, config.scale, config.weight_decay) == ("huang", "eval", 1e-4)
        assert (config.seed, config.augment, config.data) == (tags["seed"], tags["augmented"], tags["data"])
        assert config.model == f"resnet{tags['depth']}" and config.threads == 1
        given = config.survival_rate if tags["rule"] == "uniform" else config.last
        assert (config.rates, given) == (tags["rule"], tags["last"])
        way = f"{config.sampler}, {config.mode}, {config.grads}"
        assert way == tags["way"] and (config.twin or cell.name not in pairs)
        if config.twin:
            assert (way, config.rates, config.last) == ("bernoulli, batch, zero", "linear", 0.5)


@pytest.mark.parametrize("scale", list(PAPER.scales))
def test_figures_have_every_place_with_the_seeds_of_their_constant_depth(scale: str):
    size = huang_sizes.SIZES[scale]
    seeds = list(range(size.seeds))

    def places(name: str, *keys: str) -> dict[Any, list[int]]:
        found: dict[Any, list[int]] = {}
        for cell in ITEMS[name].cells[scale]:
            if cell.work is None:
                found.setdefault(tuple(cell.tags[key] for key in keys), []).append(cell.tags["seed"])
        return found

    expected = itertools.product(("linear", "uniform"), {*size.last, 0.5})
    assert places("rates", "rule", "last") == dict.fromkeys(expected, seeds)
    expected = itertools.product(size.heat, {*size.warm, 0.5})
    assert places("depths", "depth", "last") == dict.fromkeys(expected, seeds)
    assert places("ablation", "way") == dict.fromkeys([(way,) for way in WAYS], seeds)
    for name in ("rates", "depths", "ablation"):
        pairs = [cell for cell in ITEMS[name].cells[scale] if cell.options.get("twin")]
        assert len(pairs) == len(seeds) * (len(size.heat) if name == "depths" else 1)


@pytest.mark.parametrize(
    ("data", "depth", "blocks", "epochs", "augmented", "drops"),
    [
        ("cifar10", 110, 54, 500, {True, False}, (250, 375)),
        ("cifar100", 110, 54, 500, {True, False}, (250, 375)),
        ("svhn", 152, 75, 50, {False}, None),
        ("cifar10", 1202, 600, 300, {True}, (150, 225)),
    ],
)
def test_the_full_scale_has_the_papers_protocol(
    data: str, depth: int, blocks: int, epochs: int, augmented: set[bool], drops: tuple[int, int] | None
):
    """Images, depths, epochs, batches and learning rates as they stand in the paper's section 4."""
    name = "deep" if depth == 1202 else "table1"
    cells = [c for c in ITEMS[name].cells["full"] if (c.tags["data"], c.tags["depth"]) == (data, depth)]
    assert {cell.tags["augmented"] for cell in cells} == augmented and (depth - 2) // 2 == blocks
    for cell in cells:
        config = _config(cell, None)
        assert (config.epochs, config.batch_size, config.train_size) == (epochs, 128, None)
        assert config.twin and config.learning_rate == 0.1
        if drops is None:  # the item's differences say so
            continue
        first, second = drops
        at = {epoch: learning_rate(epoch * 7, 7, config) for epoch in (11, first - 1, first, second)}
        expected = dict(zip(at, (0.1, 0.1, 0.01, 0.001), strict=True))
        assert at == pytest.approx(expected)


def test_tiny_should_take_less_than_six_minutes_on_two_cores_and_with_the_others_less_than_25():
    def minutes(paper: Paper) -> float:
        return shelf.expected_minutes(paper.cells(paper.items, "tiny"), 2)

    assert minutes(PAPER) < 6 and sum(map(minutes, shelf.PAPERS.values())) < 25


def test_numbers_that_are_called_the_papers_stand_in_it():
    """Its tables 1 and 2 and the text of section 4, in its third version."""
    table = {
        "CIFAR-10, augmented": (6.41, 5.25),
        "CIFAR-10, as it is": (13.63, 11.66),
        "CIFAR-100, augmented": (27.76, 24.98),
        "CIFAR-100, as it is": (44.74, 37.80),
        "SVHN, as it is": (1.80, 1.75),
    }
    known = {one.name: one.value for one in ITEMS["table1"].known}
    assert known == {
        f"test error in %, {arm} depth, {place}": value
        for place, pair in table.items()
        for arm, value in zip(("constant", "stochastic"), pair, strict=True)
    }
    less = {"CIFAR-10": (27.0, "15 h 07 over 20 h 42"), "CIFAR-100": (26.5, "15 h 20 over 20 h 51")}
    less["SVHN"] = (24.2, "25 h 33 over 33 h 43")
    times = [one for one in ITEMS["table2"].known if one.label == "paper"]
    assert len(times) == 3
    for one in times:
        percent, hours = less[one.name.split(", ")[-2]]
        assert one.value is not None and one.source.endswith(f": {hours}")
        assert math.isclose(100 * (1 - one.value), percent, abs_tol=0.06)
    deep = [(one.label, one.value) for one in ITEMS["deep"].known]
    assert deep == [("paper", 4.91), ("paper", 6.67), ("lit", 7.93)]
    for name in ("curves", "gradients", "rates", "depths", "ablation"):
        assert all(one.label == "paper" and one.value is None for one in ITEMS[name].known)


def test_the_derived_share_that_rests_is_that_of_the_rule():
    (one,) = (one for one in ITEMS["table2"].known if one.label == "derived")
    given = rates.linear(0.5)({str(i): 1 / 54 for i in range(54)})
    assert one.value is not None and math.isclose(one.value, 1 - sum(given.values()) / 54)
    assert math.isclose(sum(given.values()), 40.25)


# --- results that are made up ------------------------------------------------------------------------------


def epochs(losses: Sequence[Any], wrong: Sequence[Any], gradients: Sequence[Any]) -> list[dict[str, Any]]:
    """Records of epochs."""
    columns = zip(losses, wrong, gradients, strict=True)
    names = ("train_loss", "validation_error", "gradient_first_convolution")
    return [
        {"epoch": i + 1, "step": 3 * i + 3, **dict(zip(names, row, strict=True))}
        for i, row in enumerate(columns)
    ]


def alone(error: float, **more: Any) -> dict[str, Any]:
    """What a training of stochastic depth found; its error in %."""
    return {
        "test_error": error / 100,
        "cpu_s_per_step": 0.08,
        "epochs": epochs((2.0, 1.0), (0.5, 0.25), (0.4, 0.2)),
        "data": {"train": 90, "test": 50, "notes": ["Half of them."]},
        "config": {"epochs": 2, "batch_size": 20, "learning_rate": 0.02, "device": "cpu"},
        **more,
    }


def beside(error: float, constant: float, **more: Any) -> dict[str, Any]:
    """What a training beside constant depth found; errors in %."""
    return {
        **alone(error),
        "twin_test_error": constant / 100,
        "twin_cpu_s_per_step": 0.1,
        "twin_epochs": epochs((1.5, 0.5), (0.4, 0.2), (0.2, 0.1)),
        "time_ratio": {"median": 0.8, "low": 0.7, "high": 0.9},
        "wall_ratio": {"median": 0.6, "low": 0.5, "high": 0.7},
        "mean_time_ratio": {"ratio": 0.81, "low": 0.8, "high": 0.82},
        "mean_wall_ratio": {"ratio": 0.61, "low": 0.6, "high": 0.62},
        "timed_cost": 0.75,
        "wall_s_per_step": [0.03, 0.05],
        "memory_ratio": 0.9,
        "memory_mb": [9.0, 10.0],
        "ideal": {"flops": 0.75, "time": 0.78},
        "realised_depth": 6.5,
        "expected_depth": 6.6,
        **more,
    }


def tagged(result: dict[str, Any], seed: int, **tags: Any) -> tuple[Cell, dict[str, Any]]:
    """A cell of images of CIFAR-10 with its result."""
    given = {"task": "some", "data": "cifar10", "depth": 20, "augmented": True, "rule": "linear", "last": 0.5}
    given |= {"way": OWN, "seed": seed, **tags}
    return Cell("-".join(map(str, given.values())), {}, given), result


def test_the_table_of_errors_pairs_the_seeds():
    constant, stochastic = (10.0, 12.0, 14.0), (9.0, 10.0, 14.0)
    made = [tagged(beside(s, c), i) for i, (s, c) in enumerate(zip(stochastic, constant, strict=True))]
    gathered = huang_results.errors(made)
    (row,) = gathered["tables"][0]["rows"]
    by_hand = [12, 2 / math.sqrt(3), 11, math.sqrt(7 / 3), -1, 1 / math.sqrt(3)]
    chance = stats.ttest_rel(stochastic, constant).pvalue
    assert row[0] == "some" and row[1:8] == pytest.approx([*by_hand, chance])
    assert row[8:] == [3, "not shown", 6.41, 5.25] and len(row) == len(gathered["tables"][0]["columns"])
    assert gathered["statements"][0] == (
        "some: 1.00 ± 0.58 points less with stochastic depth over 3 seeds: too little to tell them apart."
    )
    assert "90 training images, 2 epochs, batch 20, learning rate 0.02" in gathered["statements"][1]


@pytest.mark.parametrize(
    ("sign", "words", "judged"),
    [(-1, "less", "stochastic depth better"), (1, "more", "constant depth better")],
)
def test_the_table_of_errors_says_which_is_better_either_way(sign: int, words: str, judged: str):
    made = [tagged(beside(20 + sign * s, 20), i, data="digits") for i, s in enumerate((2.0, 2.1, 1.9))]
    gathered = huang_results.errors(made)
    assert gathered["tables"][0]["rows"][0][-3:] == [judged, None, None]
    assert f"2.00 ± 0.06 points {words} with stochastic depth" in gathered["statements"][0]
    assert gathered["statements"][0].endswith(f": {judged}.")


def test_one_seed_compares_nothing():
    gathered = huang_results.errors([tagged(beside(9, 10), 0)])
    (row,) = gathered["tables"][0]["rows"]
    assert row[1:8] == pytest.approx([10, None, 9, None, None, None, None]) and row[9] == "too few seeds"
    assert len(gathered["statements"]) == 1  # of the images


def about(ratio: float, error: float) -> dict[str, float]:
    """A ratio with an interval of this standard error."""
    return {"ratio": ratio, "low": ratio - 1.96 * error, "high": ratio + 1.96 * error}


@pytest.mark.parametrize(
    ("ideal", "words"),
    [
        (0.815, "by time 0.815: +0.005 ± 0.006, within 0.03 of it."),
        (0.80, "by time 0.800: +0.020 ± 0.006, within 0.03 of it, though not by two standard errors."),
        (0.785, "by time 0.785: +0.035 ± 0.006, not within 0.03 of it, though not by two standard errors."),
        (0.75, "by time 0.750: +0.070 ± 0.006, not within 0.03 of it."),
        (0.90, "by time 0.900: -0.080 ± 0.006, not within 0.03 of it."),
        (None, "the ideal by FLOPs is 0.750."),
    ],
)
def test_times_stand_beside_the_ideal(ideal: float | None, words: str):
    of = [
        {"mean_time_ratio": about(m, 0.001), "ideal": {"flops": 0.75, "time": ideal}}
        for m in (0.81, 0.82, 0.83)
    ]
    gathered = huang_times.times([tagged(beside(9, 10, **one), i) for i, one in enumerate(of)])
    (row,) = gathered["tables"][0]["rows"]
    assert row[1:5] == pytest.approx([100, 80, 0.82, 0.01 / math.sqrt(3)])
    assert row[5] == 0.75 and (row[6] == pytest.approx(ideal) if ideal else math.isnan(row[6]))
    assert row[7:] == pytest.approx([0.9, 6.5, 6.6, 3, (15 * 60 + 7) / (20 * 60 + 42)])
    assert gathered["statements"][0].endswith(words) and "takes 0.820 of" in gathered["statements"][0]


def test_the_ideal_is_that_of_the_draws_that_were_timed():
    """Half of all that can rest is expected to, three quarters of it did."""
    one = beside(9, 10, ideal={"flops": 0.8, "time": 0.9}, timed_cost=0.7, mean_time_ratio=about(0.86, 0.001))
    gathered = huang_times.times([tagged(one, 0)])
    assert gathered["tables"][0]["rows"][0][5:7] == pytest.approx([0.7, 0.85])
    assert gathered["statements"][0].endswith("+0.010 ± 0.001, within 0.03 of it.")


def test_where_seeds_agree_the_steps_say_how_sure_it_is():
    made = [tagged(beside(9, 10, mean_time_ratio=about(0.8, 0.04)), i) for i in range(4)]
    (row,) = huang_times.times(made)["tables"][0]["rows"]
    assert row[3:5] == pytest.approx([0.8, 0.02])


def test_on_a_gpu_the_wall_clock_counts():
    config = {**alone(9)["config"], "device": "cuda:0"}
    (row,) = huang_times.times([tagged(beside(9, 10, config=config), 0)])["tables"][0]["rows"]
    assert row[1:5] == pytest.approx([50, 30, 0.61, 0.01 / 1.96])


def test_gradients_are_compared_by_geometric_means():
    twins, ours = (1.0, 1.0), [(2.0, 8.0), (1.0, 1.0)]  # the ratios' means: 4 and 1
    zeros = (0.0, 0.0)
    made = [
        tagged(beside(9, 10, epochs=epochs(zeros, zeros, of), twin_epochs=epochs(zeros, zeros, twins)), i)
        for i, of in enumerate(ours)
    ]
    gathered = huang_results.gradients(made)
    assert gathered["tables"][0]["rows"] == [
        ["some", pytest.approx(2), pytest.approx(2 * math.log(2)), 2, 4, 2]
    ]
    (said,) = gathered["statements"]
    assert said == "some: 2.00 times constant depth's, larger in 2 of 4 epochs: too few seeds."
    lines = {line["name"]: line for line in gathered["panels"][0]["series"]}
    assert lines["stochastic depth"]["y"] == [1.5, 4.5] and lines["constant depth"]["y"] == [1.0, 1.0]
    assert lines["stochastic depth"]["error"] == pytest.approx([0.5, 3.5])


@pytest.mark.parametrize(("up", "judged"), [(True, "larger"), (False, "smaller, the paper's is larger")])
def test_gradients_are_judged_against_the_papers_statement(up: bool, judged: str):
    nothing, twins = (0.0, 0.0), (1.0, 1.0)
    made = []
    for seed, factor in enumerate((1.5, 1.6, 1.7)):
        of = (factor, factor) if up else (1 / factor, 1 / factor)
        both = {"epochs": epochs(nothing, nothing, of), "twin_epochs": epochs(nothing, nothing, twins)}
        made.append(tagged(beside(9, 10, **both), seed))
    (said,) = huang_results.gradients(made)["statements"]
    assert said.endswith(f"larger in {6 if up else 0} of 6 epochs: {judged}.")


def test_curves_hold_both_arms_and_the_papers_levels():
    made = [tagged(beside(9, 10), 0), tagged(beside(9, 10), 0, task="digits", data="digits")]
    gathered = huang_results.curves(made)
    error, loss, other, _ = gathered["panels"]
    assert [(line["name"], line["y"], line["label"]) for line in error["series"]] == [
        ("validation, constant depth", [40, 20], "ours"),
        ("validation, stochastic depth", [50, 25], "ours"),
        ("test, constant depth, 110 layers, 500 epochs", [6.41] * 2, "paper"),
        ("test, stochastic depth, 110 layers, 500 epochs", [5.25] * 2, "paper"),
    ]
    assert [line["y"] for line in loss["series"]] == [[1.5, 0.5], [2.0, 1.0]]
    assert len(other["series"]) == 2  # the paper has no digits
    assert gathered["tables"] == []  # nothing was tested on the way


def test_test_errors_on_the_way_are_points_and_rows():
    one = beside(9, 10)
    one["epochs"][1]["test_error"], one["twin_epochs"][1]["test_error"] = 0.26, 0.22
    gathered = huang_results.curves([tagged(one, 0, data="digits")])
    points = [line for line in gathered["panels"][0]["series"] if line["style"] == "points"]
    assert [(line["name"], line["x"], line["y"]) for line in points] == [
        ("test, constant depth", [2], [22]),
        ("test, stochastic depth", [2], [26]),
    ]
    (table,) = gathered["tables"]
    assert table["caption"] == "some" and table["rows"] == [[2, 20, 25, 22, 26, 0.5, 1.0]]
    assert len(table["columns"]) == 7


def test_numbers_that_are_not_there_are_left_out_of_curves_and_gradients():
    half = epochs((None, 1.0), (None, 0.2), (None, 0.3))
    made = [tagged(beside(9, 10, epochs=half), 0)]
    error, loss = huang_results.curves(made)["panels"]
    assert [line["x"] for line in error["series"][:2]] == [[1, 2], [2]]
    assert [line["y"] for line in loss["series"]] == [[1.5, 0.5], [1.0]]
    assert huang_results.gradients(made)["tables"][0]["rows"] == [["some", pytest.approx(3), None, 1, 1, 1]]
    for nothing in (None, 0.0):
        none = epochs((None,) * 2, (None,) * 2, (nothing,) * 2)
        made = [tagged(beside(9, 10, epochs=none, twin_epochs=none, mean_time_ratio=None), 0)]
        assert huang_results.gradients(made)["tables"][0]["rows"] == []
        assert huang_times.times(made)["tables"][0]["rows"] == []
        assert not any(map(_charts.curves, huang_results.curves(made)["panels"]))


def test_the_very_deep_net_is_told_by_arm():
    losses = epochs((9.0, 4.0), (0.9, 0.9), (1.0, 1.0))
    gathered = huang_results.deep([tagged(beside(80, 85, epochs=losses, memory_mb=[7.0, None]), 0)])
    times, own = gathered["tables"]
    assert times["rows"][0][3] == 0.81
    assert "paper: ratio" not in times["columns"]  # it timed no net of this depth
    assert len(times["rows"][0]) == len(times["columns"])
    assert own["rows"] == [
        ["constant depth", 0, 6, 1.5, 0.5, 85, None],
        ["stochastic depth", 0, 6, 9.0, 4.0, 80, 7.0],
    ]


@pytest.mark.parametrize("data", ["cifar10", "digits"])
def test_the_sweep_has_a_curve_a_rule_and_levels(data: str):
    made = [tagged(beside(9.0 + i, 10.0 + 2 * i), i, data=data) for i in range(2)]
    made += [tagged(alone(14.0 + i), i, data=data, last=0.2) for i in range(2)]
    made += [
        tagged(alone(8.0), i, data=data, rule="uniform", last=last) for last in (0.2, 0.8) for i in (0, 1)
    ]
    gathered = huang_sweeps.sweep(made)
    curves = {line["name"]: line for line in gathered["panels"][0]["series"]}
    assert (curves["linear"]["x"], curves["linear"]["y"]) == ([0.2, 0.5], pytest.approx([14.5, 9.5]))
    assert (curves["uniform"]["x"], curves["uniform"]["y"]) == ([0.2, 0.8], pytest.approx([8, 8]))
    assert curves["linear"]["error"] == pytest.approx([0.5, 0.5])
    assert (curves["constant depth"]["x"], curves["constant depth"]["y"]) == (
        [0.2, 0.8],
        pytest.approx([11, 11]),
    )
    levels = {name: line["y"] for name, line in curves.items() if line["label"] == "paper"}
    theirs = {"constant depth, 110 layers": [6.41] * 2, "linear, p_L = 0.5, 110 layers": [5.25] * 2}
    assert levels == (theirs if data == "cifar10" else {})
    rows = {row[0]: row for row in gathered["tables"][0]["rows"]}
    assert list(rows) == ["linear, 0.2", "linear, 0.5", "uniform, 0.2", "uniform, 0.8"]
    # pairs: 9 - 10 and 10 - 12
    assert rows["linear, 0.5"][1:6] == pytest.approx([9.5, 0.5, -1.5, 0.5, 2])
    (both,) = gathered["tables"][1]["rows"]  # pairs: 14 - 8 and 15 - 8
    assert both == ["0.2", pytest.approx(6.5), pytest.approx(0.5), 2, "too few seeds"]


def test_the_sweep_says_where_rules_are_shown_to_differ():
    made = [tagged(beside(9.0 + i / 9, 10.0 + i / 10), i) for i in range(3)]
    for last, error in ((0.2, 20.0), (0.5, 12.0), (0.8, 9.4)):
        made += [tagged(alone(error + i / 9), i, rule="uniform", last=last) for i in range(3)]
    made += [tagged(alone(9.4 + i), i, last=0.8) for i in range(3)]
    linear, uniform, against, *_ = huang_sweeps.sweep(made)["statements"]
    assert linear == "linear rates against constant depth: better at p_L = 0.5; not shown at p_L = 0.8."
    assert uniform == "uniform rates against constant depth: worse at p_L = 0.2, 0.5; better at p_L = 0.8."
    # at 0.5 all three pairs differ by 3 points exactly, so that their spread says nothing
    assert against == "Linear against uniform rates: not shown at p_L = 0.5, 0.8."


def test_the_map_has_constant_depth_as_rate_1_and_gaps_where_nothing_is_known():
    made = [tagged(beside(9.0 + i, 12.0 + i), i, task="some, ResNet-20, augmented") for i in range(2)]
    made += [tagged(alone(20.0), 0, depth=32, last=0.2)]
    gathered = huang_sweeps.heat_map(made)
    (drawn,) = gathered["panels"]
    assert (drawn["xs"], drawn["ys"], drawn["title"]) == ([20, 32], [0.2, 0.5, 1.0], "some: test error in %")
    (a, b), (c, d), (e, f) = drawn["values"]
    assert (a, d, f) == (None, None, None) and (b, c, e) == pytest.approx((20, 9.5, 12.5))
    rows = gathered["tables"][0]["rows"]
    assert [row[0] for row in rows] == ["0.2", "0.5", "1 (constant depth)"]
    assert rows[1] == ["0.5", pytest.approx(9.5), pytest.approx(0.5), None, None]
    assert gathered["statements"] == [
        "20 layers: the lowest mean is that of p_L = 0.5, 9.50 ± 0.50 %, -3.00 ± 0.00 from constant depth: "
        "too few seeds.",
        "32 layers: the lowest mean is that of p_L = 0.2, 20.00 %.",
    ]
    (said,) = huang_sweeps.heat_map([tagged(beside(9, 8), 0)])["statements"]
    assert said == "20 layers: the lowest mean is that of constant depth, 8.00 %."


TIMED = {way: {"time": {"ratio": 0.8, "low": 0.7, "high": 0.9}, "realised_cost": 0.75} for way in WAYS}


def timing() -> tuple[Cell, dict[str, Any]]:
    return Cell("timing", {}, {"work": "timing", "task": "some"}, work=timing_cell), {
        "ways": TIMED,
        "steps": 2,
    }


def test_the_ablation_tells_errors_and_times_apart_or_together():
    other = "exact, row, none"
    trained = [tagged(beside(9.0 + i, 12.0), i) for i in range(2)]
    trained += [tagged(alone(8.0 + 2 * i), i, way=other) for i in range(2)]
    together = huang_sweeps.ablation([*trained, timing()])
    rows = {row[0]: row for row in together["tables"][0]["rows"]}
    assert list(rows) == ["constant depth", *WAYS]
    assert rows["constant depth"][1:5] == pytest.approx([12, 0, 2.5, 0.5])
    assert rows["constant depth"][6:] == [None] * 4
    # pairs: 8 - 9 and 10 - 10
    assert rows[other][1:5] == pytest.approx([9, 1, -0.5, 0.5])
    assert rows[other][5:] == ["too few seeds", 0.75, 0.8, 0.7, 0.9]
    assert together["statements"][1] == f"{other}: -0.50 ± 0.50 points from {OWN}: too few seeds."
    assert rows[OWN][1:6] == [pytest.approx(9.5), pytest.approx(0.5), None, None, ""]
    assert rows["exact, batch, none"][1:7] == [None] * 4 + ["too few seeds", 0.75]
    without = huang_sweeps.ablation(trained)["tables"][0]["rows"]
    assert [row[:6] for row in without] == [rows[name][:6] for name in ("constant depth", OWN, other)]
    assert all(row[6:] == [None] * 4 for row in without)
    times = huang_sweeps.ablation([timing()])["tables"][0]["rows"]
    assert [row[0] for row in times] == list(WAYS) and all(row[7:] == [0.8, 0.7, 0.9] for row in times)


@pytest.mark.parametrize("name", list(ITEMS))
@pytest.mark.parametrize("scale", ["tiny", "small"])
def test_whichever_cells_are_done_there_is_something_to_show(name: str, scale: str):
    item, draws = ITEMS[name], random.Random(0)

    def result(cell: Cell) -> dict[str, Any]:
        if cell.work is not None:
            return {"ways": TIMED, "steps": 2}
        return (
            beside(*draws.choices(range(5, 30), k=2)) if cell.options.get("twin") else alone(draws.random())
        )

    found = [(cell, result(cell)) for cell in item.cells[scale]]
    some = [[one] for one in found] + [draws.sample(found, k) for k in range(2, len(found))] + [found]
    for done in some:
        gathered = item.gather(done)
        assert gathered["panels"] or gathered["tables"][0]["rows"]
        for table in gathered["tables"]:
            assert all(len(row) == len(table["columns"]) for row in table["rows"])
            assert _charts.table(table) is not None
        for i, panel in enumerate(gathered["panels"] if done in ([found[0]], found) else ()):
            _charts.chart(panel, f"x{i}")


# --- times -------------------------------------------------------------------------------------------------

FEW = {"data": "digits", "model": "resnet8", "train_size": 60, "batch_size": 20, "epochs": 1}


def test_ways_take_turns_and_each_has_its_own_cost():
    options = {**huang_sizes.PAPERS, **FEW}
    state = torch.get_rng_state()
    found, again = (timing_cell("digits", options, WAYS, 2, plain) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert list(found["ways"]) == list(WAYS) and CONSTANT not in found["ways"] and found["steps"] == 2
    expected = {way["expected_cost"] for way in found["ways"].values()}
    assert len(expected) == 1 and 0.5 < expected.pop() < 1
    for name, way in found["ways"].items():
        assert 0 < way["time"]["low"] <= way["time"]["ratio"] <= way["time"]["high"]
        assert 0 < way["realised_cost"] <= 1 and way["realised_cost"] == again["ways"][name]["realised_cost"]
    costs = {name: way["realised_cost"] for name, way in found["ways"].items()}
    assert costs["bernoulli, batch, zero"] == costs["bernoulli, batch, none"]  # the same draws
    assert len(set(costs.values())) > 1
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("way", list(WAYS))
def test_a_way_rests_what_a_run_of_its_own_would(way: str):
    options = {**huang_sizes.PAPERS, **FEW}
    found = timing_cell("digits", options, {way: WAYS[way]}, 4, plain)["ways"][way]["realised_cost"]
    config = Config.of({**options, **WAYS[way], "twin": False, "threads": 1}).settled()
    costs = []
    with prepared(config, "test") as job, torch.no_grad():
        for step in range(5):
            job.handle.step(step)
            job.arms[0].model(job.batches.at(step)[0])
            costs.append(job.handle.last_cost)
    assert found == pytest.approx(sum(costs[1:]) / 4)  # the first step of all is not timed


# --- all of it, cut down -----------------------------------------------------------------------------------


def names_of(cells: Sequence[Cell]) -> tuple[str, ...]:
    """The cells' names, each once."""
    return tuple(dict.fromkeys(cell.name for cell in cells))


def cut_down() -> Paper:
    """The paper on 60 digits, three steps to a training."""
    few = {key: FEW[key] for key in ("train_size", "batch_size", "epochs")}
    size = Size(
        images=(Images("digits", "digits", 8, 0.1, 2, few),),
        swept=0,
        last=(0.2,),
        heat={8: 0.1, 14: 0.1},
        warm=(0.2,),
        seeds=1,
        deep=Images("digits", "digits", 20, 0.1, 1, few),
        rounds=2,
    )
    parts = {name: make(size) for name, make in huang_sizes._MAKERS.items()}
    of = {names_of(huang_sizes.CELLS["tiny"][name]): {"tiny": cells} for name, cells in parts.items()}
    items = [dataclasses.replace(item, cells=of[names_of(item.cells["tiny"])]) for item in PAPER.items]
    return dataclasses.replace(PAPER, items=tuple(items))


def test_a_cut_down_paper_runs_from_images_to_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(models.MODELS, "resnet14", lambda **options: models.CifarResNet(14, **options))
    paper = cut_down()
    cells = paper.cells(paper.items, "tiny")
    done = shelf.reproduce(paper, jobs=1, out=tmp_path / "out")
    found = json.loads((done.folder / "results.json").read_text())
    assert done.failed == () and found["status"] == "done" and len(found["cells"]) == len(cells)
    items = {item["name"]: item for item in found["items"]}
    by_name = {cell["name"]: cell for cell in found["cells"]}
    for row, kind in zip(items["table1"]["tables"][0]["rows"], ("", "-plain"), strict=True):
        pairs = [by_name[f"digits-resnet8{kind}-pair-seed{seed}"]["found"] for seed in (0, 1)]
        assert row[1] == pytest.approx(50 * sum(one["twin_test_error"] for one in pairs))
        assert row[3] == pytest.approx(50 * sum(one["test_error"] for one in pairs))
    grid = items["depths"]["panels"][0]
    assert grid["xs"] == [8, 14] and grid["ys"] == [0.2, 0.5, 1.0]
    assert all(isinstance(value, float) for row in grid["values"] for value in row)
    assert [row[0] for row in items["ablation"]["tables"][0]["rows"]] == [CONSTANT, *WAYS]
    for cell in cells:
        folder = done.folder / "cells" / cell.name
        took, result = _cells.seconds(cell, folder), _cells.result(cell, folder)
        assert took is not None and took > 0
        if cell.work is None:
            steps = [result["cpu_s_per_step"], result.get("twin_cpu_s_per_step", 0.0)]
            assert took == pytest.approx(result["epochs"][-1]["step"] * sum(steps))
    page = write_report(done.folder).read_text()
    text = write_report(done.folder, tmp_path / "page.md").read_text()
    for item in PAPER.items:
        assert item.title in page and item.title.replace("_", "\\_") in text
    panels = sum(len(item["panels"]) for item in found["items"])
    assert page.count("<svg") == panels and "37.8" in page and "37.8" in text
    again = shelf.reproduce(paper, jobs=1, out=tmp_path / "out")
    assert json.loads((again.folder / "results.json").read_text()) == found

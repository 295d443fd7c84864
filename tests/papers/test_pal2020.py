"""The pieces of pal2020: training against its transcription, points against formulas, what is committed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fallow.errors import DataError, UsageError
from fallow.noise.feature_dropout import feature_dropout
from fallow.papers import _cells, shelf
from fallow.papers._experiments import Cell, Item, Paper, Scale
from fallow.papers.pal2020 import cells as pal_cells
from fallow.papers.pal2020 import curves as pal_curves
from fallow.papers.pal2020 import deep as pal_deep
from fallow.papers.pal2020 import optima as pal_optima
from fallow.papers.pal2020 import train as pal_train
from fallow.papers.pal2020.train import Descent, Law, common_target, expected_loss, sampled_loss
from fallow.penalties import adaptive_survival_rate, closed_form, dropblock_objective, effective_gamma
from fallow.recipes._batches import generator

PAPER = shelf.PAPERS["pal2020"]
LAWS = [
    Law("disjoint", 0.6, 3),
    Law("disjoint", 0.6, 3, "batch"),
    Law("disjoint", 0.6, 1),
    Law("sliding", 0.6, 3),
    Law("dropconnect", 0.6),
]


def plain(_: str, compute: Callable[[], Any]) -> Any:
    """Pieces that keep nothing."""
    return compute()


class Kept:
    """Pieces that keep what they computed, as JSON does, and count it."""

    def __init__(self) -> None:
        self.results: dict[str, str] = {}
        self.computed: list[str] = []

    def __call__(self, name: str, compute: Callable[[], Any]) -> Any:
        if name not in self.results:
            self.computed.append(name)
            self.results[name] = json.dumps(compute())
        return json.loads(self.results[name])


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- the experiments as data -----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", list(PAPER.scales))
def test_cells_have_names_of_their_own_and_options_that_json_can_hold(scale: str):
    found: dict[str, Cell] = {}
    for cell in (cell for item in PAPER.items for cell in item.cells[scale]):
        assert found.setdefault(cell.name, cell).options == cell.options and "/" not in cell.name
        assert json.loads(json.dumps(dict(cell.options))) == dict(cell.options) and cell.minutes > 0
    assert all(item.cells[scale] for item in PAPER.items)


def test_widths_hold_whole_blocks_and_enough_of_them_for_deep_networks():
    for scale in PAPER.scales:
        for cell in PAPER.cells(PAPER.items, scale):
            width = cell.options.get("width")
            assert width is None or width % cell.options.get("block_size", 1) == 0, cell.name


def test_no_number_is_said_to_be_the_papers():
    known = [one for item in PAPER.items for one in item.known]
    assert {one.label for one in known} == {"paper", "lit", "derived", "memory"}
    assert all(one.value is None for one in known if one.label in ("paper", "memory"))
    assert any("not available" in note for note in PAPER.notes)


def test_tiny_should_take_less_than_five_minutes_on_two_cores():
    assert sum(cell.minutes for cell in PAPER.cells(PAPER.items, "tiny")) / 2 < 5


def test_work_on_images_is_told_where_they_are_and_does_not_start_without_them(tmp_path: Path):
    told: list[str | None] = []

    def work(data: str, pieces: Any, data_dir: str | None) -> dict[str, str]:
        told.append(data_dir)
        return {"data": data}

    cell = Cell("images", {"data": "cifar10"}, {}, 0.1, work)
    assert cell.data == "cifar10" and Cell("none", {"steps": 1}, {}, 0.1, work).data is None
    _cells.run(cell, tmp_path / "cell", "somewhere", "fallow")
    assert told == ["somewhere"] and _cells.result(cell, tmp_path / "cell") == {"data": "cifar10"}
    item = Item("one", "One", "Nothing.", {"tiny": [cell]}, lambda found: {})
    paper = Paper("small", "Small", "Nobody", (item,), {"tiny": Scale("")})
    with pytest.raises(DataError, match="cifar10"):
        shelf.reproduce(paper, out=tmp_path / "out", data_dir=tmp_path, jobs=1)
    assert told == ["somewhere"]


# --- training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS, ids=lambda law: f"{law.name}{law.block_size}-{law.masks}")
def test_the_expected_loss_is_the_mean_of_the_sampled_one(law: Law):
    draws = generator(0, "loss")
    y, g, w = (torch.randn(*size, generator=draws, dtype=torch.float64) for size in ((6, 4), (6, 9), (4, 9)))
    losses = torch.tensor([float(sampled_loss(y, g, w, law, draws)) for _ in range(1200)])
    error = float(losses.std()) / math.sqrt(len(losses))
    expected = float(expected_loss(y, g, w, law.scheme))
    assert abs(float(losses.mean()) - expected) < 5 * error and error < 0.03 * expected
    if law.name == "disjoint":
        other = dropblock_objective(y, g, w, survival_rate=0.6, block_size=law.block_size)
        assert math.isclose(expected, float(other), rel_tol=1e-12)


def test_the_common_target_has_the_spectrum_it_should():
    values = torch.linalg.svdvals(common_target(12, 7))
    torch.testing.assert_close(values, 10 * torch.exp(-torch.arange(7).double() / 8))


def test_descent_is_the_algorithm_of_the_notes():
    """Section 2.4, written out, with the same masks."""
    targets, law = common_target(6, 5), Law("disjoint", 0.5, 2, "batch")
    found = Descent(law, 8, 6, 0.01, 2, 3, both=False).run(targets, plain, parts=1)
    g, w = pal_train.start(targets, 8, 3)
    for window in range(2):
        draws = generator(3, f"masks of {law}", window)
        for step in range(3 * window, 3 * window + 3):
            z = feature_dropout(torch.ones(1, 8, dtype=torch.float64), law.scheme, generator=draws)
            error = targets - (g * z) @ w.T
            rate = 0.01 * min(1.0, 2 * (1 - step / 6))
            g, w = g + 2 * rate * (error @ w) * z, w + 2 * rate * error.T @ (g * z)
    torch.testing.assert_close(found["last"], [g, w])
    torch.testing.assert_close(found["mean"], [g, w])  # the last fifth of six steps is the last one


def test_the_descent_without_masks_stands_beside_and_changes_nothing():
    targets, law = common_target(6, 5), Law("disjoint", 0.5, 2)
    one, two = (Descent(law, 8, 40, 0.01, 4, 0, both).run(targets, plain) for both in (False, True))
    assert same(one["last"], two["last"]) and same(one["mean"], two["mean"])
    keys = "step", "sampled", "expected", "error"
    assert [[w[k] for k in keys] for w in two["windows"]] == [[w[k] for k in keys] for w in one["windows"]]
    assert "descent" not in one["windows"][0]
    g, w = pal_train.start(targets, 8, 0)
    first = float(expected_loss(targets, g, w, law.scheme))
    values = []
    for step in range(10):
        leaves = [g.requires_grad_(), w.requires_grad_()]
        value = dropblock_objective(targets, g, w, survival_rate=0.5, block_size=2)
        values.append(float(value.detach()))
        rate = 0.01 * min(1.0, 2 * (1 - step / 40))
        dg, dw = torch.autograd.grad(value, leaves)
        g, w = (g - rate * dg).detach(), (w - rate * dw).detach()
    assert values[0] == pytest.approx(first)
    assert two["windows"][0]["descent"] == pytest.approx(sum(values) / 10)


def test_windows_hold_means_and_the_martingale_error():
    targets, law = common_target(6, 5), Law("sliding", 0.5, 3)
    fine = Descent(law, 9, 12, 0.0, 12, 0, both=True).run(targets, plain)["windows"]
    g, w = pal_train.start(targets, 9, 0)
    expected = float(expected_loss(targets, g, w, law.scheme))
    for window in fine:  # of one step each, and nothing moves at rate 0
        assert window["expected"] == pytest.approx(expected) == window["descent"]
        assert window["error"] == pytest.approx(abs(window["sampled"] - expected))
    gap, error = pal_curves.bias(fine)
    assert gap == pytest.approx(sum(w["sampled"] / expected - 1 for w in fine) / 12)
    assert error == pytest.approx(math.sqrt(sum((w["sampled"] / expected - 1) ** 2 for w in fine)) / 12)


def test_a_descent_that_was_stopped_goes_on_alike():
    targets, kept = common_target(6, 5), Kept()
    descent = Descent(Law("disjoint", 0.5, 2), 8, 40, 0.01, 8, 0)
    whole = descent.run(targets, kept)
    assert kept.computed == ["part0", "part1", "part2", "part3"]
    for lost in ("part3", "part2"):
        del kept.results[lost]
    again = descent.run(targets, kept)
    assert kept.computed[4:] == ["part2", "part3"]
    assert again["windows"] == whole["windows"]
    assert same(again["last"], whole["last"]) and same(again["mean"], whole["mean"])


def test_minimisation_reaches_the_closed_form_and_goes_on_alike():
    kept = Kept()
    options = {"law": "disjoint", "survival_rate": 0.5, "block_size": 3, "width": 24}
    options |= {"outputs": 8, "samples": 6, "iterations": 300, "seed": 0}
    found = pal_cells.minimum_cell(**options, pieces=kept)
    best, end = found["optimum"], found["last"]
    targets = common_target(8, 6)
    theory = closed_form(targets, 3, effective_gamma(survival_rate=0.5, width=24, block_size=3))
    assert best["value"] == theory.value and (best["head"], best["kept"]) == (theory.head, theory.kept)
    assert -1e-12 < end["objective"] / best["value"] - 1 < 1e-9
    assert end["bound"] <= best["value"] <= end["objective"] * (1 + 1e-12)
    assert end["distance"] < 1e-4 and end["unequal"] < 1e-3 and end["counts"] == best["counts"]
    torch.testing.assert_close(end["spectrum"], theory.spectrum.tolist(), atol=1e-3, rtol=0)
    del kept.results["part3"]
    assert pal_cells.minimum_cell(**options, pieces=kept) == json.loads(json.dumps(found)) | {
        "curve": found["curve"]
    }


def test_sampled_masks_come_within_two_per_cent_of_the_minimum():
    found = pal_cells.descent_cell(
        "disjoint", 0.5, 4, "row", 48, 10, 8, 1200, 0.004, 10, both=False, seed=0, pieces=plain
    )
    best = found["optimum"]["value"]
    assert 0 < found["mean"]["objective"] / best - 1 < 0.02 and found["mean"]["bound"] <= best


def test_block_norms_and_counts_are_what_they_say():
    g, w = torch.randn(5, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    norms = pal_cells.block_norms(g, w, 3)
    torch.testing.assert_close(norms[1], (g[:, 3:] @ w[:, 3:].T).norm())
    targets = torch.tensor([4.0, 2.0, 1.0, 0.5])
    values = torch.tensor([2.0, 0.9, 0.3, 0.001])  # at gamma 1: in the head, in the tail twice, 0
    assert pal_cells.counts(values, targets, 1.0) == [1, 3]


# --- one point ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whitened", [True, False])
def test_dropconnect_is_dropout_where_it_is(whitened: bool):
    found = pal_cells.point_cell(whitened, 0.7, 700, 1, plain)
    for case, one in found.items():
        assert abs(one["loss"] - one["formula"]) < 5 * one["loss_error"], case
        equal = whitened or case in ("dropout", "outgoing")
        off = abs(one["formula"] / one["dropout"] - 1)
        assert off < 1e-12 if equal else off > 0.03, case
    one, other = found["dropout"], found["outgoing"]
    apart = math.hypot(one["outgoing_error"], other["outgoing_error"])
    assert abs(one["outgoing"] - other["outgoing"]) < 5 * apart  # the same law, a row at a time


# --- widths -------------------------------------------------------------------------------------------------


def test_at_the_adaptive_rate_the_minimum_does_not_depend_on_the_width():
    found = pal_cells.widths_cell(0.9, 0.5, 4, [8, 40, 400], 8, 6, plain)
    assert found["adaptive"] == pytest.approx([found["adaptive"][0]] * 3, rel=1e-12)
    assert found["fixed"][0] > 2 * found["fixed"][1] > 4 * found["fixed"][2]
    cell = pal_cells.adaptive_cell(0.9, 4, 40, 8, 6, 200, 0, plain)
    assert cell["survival_rate"] == adaptive_survival_rate(survival_rate=0.9, width=40, block_size=4)
    share = cell["optimum"]["value"] / float(common_target(8, 6).square().sum())
    assert share == pytest.approx(found["adaptive"][1])


# --- deep networks ------------------------------------------------------------------------------------------

DEEP = {
    "data": "digits",
    "images": 20,
    "targets": "falling",
    "net": "mlp-24",
    "width": 24,
    "block_size": 2,
    "survival_rate": 0.5,
    "learning_rate": 3e-3,
    "seed": 0,
}


def test_targets_are_centred_and_fall():
    x, labels, _ = pal_deep.pictures("digits", 40, None)
    assert abs(float(x.mean())) < 1e-12 and abs(float(x.std()) - 1) < 1e-12
    for kind in pal_deep.TARGETS:
        y = pal_deep.target_of(kind, x, labels)
        assert float(y.mean(0).abs().max()) < 1e-12 and float(y.square().mean()) == pytest.approx(1)
        values = torch.linalg.svdvals(y)
        if kind == "falling":
            torch.testing.assert_close(values / values[0], torch.exp(-torch.arange(16).double() / 4))
        else:  # the classes can be told apart, and are no flat spectrum
            assert (y.argmax(1) == labels).float().mean() > 0.9 and values[0] > 3 * values[8]


def test_a_deep_network_comes_to_the_closed_form():
    found = pal_deep.deep_cell(**DEEP, method="minimise", steps=400, pieces=plain)
    best, end = found["optimum"], found["last"]
    assert end["bound"] <= best["value"] <= end["objective"] < 1.001 * best["value"]
    assert pal_optima.largest_error(end, best) < 5e-3
    assert found["one_hot"]["most"] - found["one_hot"]["least"] < 0.05  # flat, nearly


@pytest.mark.parametrize(("method", "net"), [("sampled", "mlp-24"), ("adam", "resnet-8")])
def test_deep_training_lowers_the_loss_and_goes_on_alike_where_it_was_stopped(method: str, net: str):
    kept, steps = Kept(), 30 if method == "sampled" else 5
    options = {**DEEP, "net": net, "method": method, "steps": steps}
    found = pal_deep.deep_cell(**options, pieces=kept)
    assert (
        found["curve"][-1][1] < found["curve"][0][1] and found["last"]["bound"] <= found["optimum"]["value"]
    )
    del kept.results["part4"], kept.results["part3"]
    torch.manual_seed(5)
    assert pal_deep.deep_cell(**options, pieces=kept) == found
    assert kept.computed[-2:] == ["part3", "part4"]


def test_networks_of_other_names_are_refused():
    with pytest.raises(UsageError, match="mlp-WIDTH or resnet-DEPTH, got vgg-16"):
        pal_deep.extractor("vgg-16", torch.zeros(2, 1, 8, 8), 4, 0)


# --- what is said of results --------------------------------------------------------------------------------


def _window(sampled: float, error: float = 1.0) -> dict[str, float]:
    return {"step": 1.0, "sampled": sampled, "expected": 10.0, "error": error, "descent": 9.0}


def test_curves_count_the_windows_that_are_far():
    tags = {"work": "descent", "law": "disjoint", "r": 8, "masks": "row", "seed": 0}
    windows = [_window(10.0), _window(13.0), _window(9.0), _window(7.0)]
    found = pal_curves.curves([(Cell("a", {}, tags), {"windows": windows, "optimum": {"value": 8.0}})])
    row = found["tables"][0]["rows"][0]
    assert row[0] == "DropBlock, r = 8" and row[1] == 4 and row[5] == 2 and row[6:] == [10.0, 9.0, 8.0]
    assert row[2] == pytest.approx(100 * -4 / 20) and row[3] == pytest.approx(100 * math.sqrt(2) / 20)
    assert "in 50 %" in found["statements"][0] and "3.0 of them" in found["statements"][0]


def test_block_sizes_that_are_dropout_are_named():
    def cell(r: int, value: float) -> tuple[Cell, dict[str, Any]]:
        best = {"value": value, "dropout": 3.0, "effective_rank": 5.5}
        return Cell(str(r), {}, {"work": "minimum", "r": r}), {"optimum": best}

    (said,) = pal_optima._as_dropout([cell(1, 3.0), cell(4, 3.0), cell(8, 3.1)])
    assert "1, 4 have the minimum of Dropout" in said and "5.5" in said
    assert pal_optima._as_dropout([cell(8, 3.1)]) == []


def test_an_objective_below_the_minimum_is_called_an_error():
    def cell(objective: float) -> tuple[Cell, dict[str, Any]]:
        ends = {"optimum": {"value": 2.0}, "last": {"objective": objective}}
        return Cell("x", {}, {"work": "minimum", "r": 3}), ends

    assert "never below" in pal_optima._reached([cell(2.0001)])[0]
    assert "an error" in pal_optima._reached([cell(2.0001), cell(1.9999)])[0]


# --- what is committed -------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]


def committed(scale: str = "tiny") -> dict[str, Any]:
    return json.loads((ROOT / "results" / "pal2020" / f"{scale}.json").read_text())


def item(results: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in results["items"] if one["name"] == name)


def test_in_the_committed_results_training_ends_at_the_closed_form_and_never_below():
    found = committed()
    exact, noisy = item(found, "optimum")["tables"]
    for r, _, _, over, gap, dual, *_ in exact["rows"]:
        assert -1e-12 < gap < 1e-5 and gap <= dual < 1e-4
        assert (abs(over) < 1e-9) == (r <= 4), "blocks below the effective rank are Dropout"
    for row in noisy["rows"]:
        assert 0 < row[3] < 0.01
    for row in item(found, "spectra")["tables"][0]["rows"]:
        assert row[9] < 0.01 and (row[5] == row[6] or "masks" in row[2] or row[1] == 80)


def test_in_the_committed_results_sampled_losses_are_unbiased():
    for row in item(committed(), "curves")["tables"][0]["rows"]:
        assert abs(row[4]) < 4 and row[5] <= 0.15 * row[1]

"""The pieces of hayou2021: toys against naive transcriptions, comparisons against scipy, planted blocks."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch.nn import functional as F

import fallow
from fallow import rates
from fallow.papers import _panels, shelf
from fallow.papers._cells import _config
from fallow.papers._experiments import Cell
from fallow.papers.hayou2021 import cells as hayou_cells
from fallow.papers.hayou2021 import errors as hayou_errors
from fallow.papers.hayou2021 import sizes as hayou_sizes
from fallow.papers.hayou2021 import toys
from fallow.planning.allocate import MINIMUM_RATE
from fallow.recipes._batches import generator

PAPER = shelf.PAPERS["hayou2021"]


def plain(_: str, compute: Any) -> Any:
    """Pieces that keep nothing."""
    return compute()


# --- the experiments as data -----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", list(PAPER.scales))
def test_cells_have_names_of_their_own_and_options_that_can_be(scale: str):
    cells = PAPER.cells(PAPER.items, scale)
    by_item = {cell.name: cell for item in PAPER.items for cell in item.cells[scale]}
    assert len(by_item) == len(cells) and all("/" not in name for name in by_item)
    for cell in (cell for item in PAPER.items for cell in item.cells[scale]):
        assert by_item[cell.name].options == cell.options
    for cell in cells:
        assert cell.minutes > 0
        if cell.work is None:
            settled = _config(cell, None)
            assert settled.scale == "eval" and not settled.twin and settled.threads == 1


def test_every_budget_can_be_reached_by_every_rule():
    """On a ResNet whose blocks hold 93 % of a step, as those of the image tasks do."""
    costs = {str(i): 0.93 / 9 for i in range(9)}
    for size in hayou_sizes.SIZES.values():
        for images in size.images:
            for rule, budget in hayou_sizes.arms(images.budgets):
                if rule == "linear":
                    rates.linear(budget=budget)(costs)
                assert budget > 1 - 0.93 * (1 - MINIMUM_RATE)
        for rule, budget in hayou_sizes.arms(size.toy_budgets):
            assert math.isclose(sum(hayou_cells.rates_of(rule, 16, budget)) / 16, budget)


def test_no_number_is_said_to_be_the_papers():
    known = [one for item in PAPER.items for one in item.known]
    assert {one.label for one in known} == {"paper", "lit", "derived", "memory"}
    assert all(one.value is None for one in known if one.label in ("paper", "memory"))


def test_tiny_should_take_less_than_five_minutes_on_two_cores():
    assert sum(cell.minutes for cell in PAPER.cells(PAPER.items, "tiny")) / 2 < 5


# --- the toys -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [True, False])
def test_the_dense_net_is_its_formula_and_its_blocks_are_sites(scaled: bool):
    net, x = toys.DenseResNet(3, 8, 4, scaled, generator(0, "net")), torch.randn(5, 3)
    y = x @ net.first.weight.T
    for branch in net.branches:
        y = y + (0.5 if scaled else 1.0) * y.clamp(min=0) @ branch.linear.weight.T
    torch.testing.assert_close(net.hidden(x), y)
    torch.testing.assert_close(net(x), (y.clamp(min=0) @ net.last.weight.T)[:, 0])
    assert [site.name for site in fallow.sites(net, x)] == [f"branches.{i}" for i in range(4)]


def test_a_planted_block_sees_its_own_part_alone():
    net, x = toys.PlantedNet(4, 3, 8, generator(0, "net")), torch.randn(6, 12, requires_grad=True)
    assert [site.name for site in fallow.sites(net, x.detach())] == [f"branches.{i}" for i in range(4)]
    state = F.pad(x, (1, 0))
    total = 0.0
    for place, branch in enumerate(net.branches):
        added = branch(state)
        assert not added[:, 1:].any()
        (seen,) = torch.autograd.grad(added[:, 0].sum(), x, retain_graph=True)
        others = [i for i in range(12) if not place * 3 <= i < place * 3 + 3]
        assert seen[:, place * 3 : place * 3 + 3].any() and not seen[:, others].any()
        total = total + added[:, 0]
    torch.testing.assert_close(net(x), total)


def test_planted_targets_depend_on_the_planted_parts_alone():
    task, chosen = toys.planted_task(3, blocks=6, part=2, relevant=2, samples=400, noise=0.0)
    again, _ = toys.planted_task(3, blocks=6, part=2, relevant=2, samples=400, noise=0.5)
    x, y = task.train
    assert torch.equal(task.test[1], again.test[1])  # tests have no noise
    assert math.isclose((again.train[1] - y).std().item(), 0.5, rel_tol=0.15)
    groups = [x[:, [2 * i, 2 * i + 1]] for i in range(6)]
    features = [torch.cat([g, g**3, g[:, :1] * g[:, 1:] ** 2, g[:, :1] ** 2 * g[:, 1:]], 1) for g in groups]
    for place, own in enumerate(features):
        fit = torch.linalg.lstsq(own, y[:, None]).solution
        explained = 1 - (y - (own @ fit)[:, 0]).var() / y.var()
        assert (explained > 0.25) == (place in chosen), (place, explained)


def test_standard_training_rests_nothing_and_rules_keep_their_budget():
    task = toys.teacher_task(0, inputs=3, samples=32, noise=0.1)
    for rule in ("standard", "uniform", "linear", "sensemode"):
        net = toys.DenseResNet(3, 8, 4, True, generator(0, "net"))
        for handle in toys.fit(net, task, rule, 0.7, 0, steps=8, learning_rate=1e-3, refresh=3):
            found = list(handle.rates.values())
        assert math.isclose(sum(found) / 4, 1.0 if rule == "standard" else 0.7, rel_tol=1e-9)
        assert (len(set(found)) > 1) == (rule in ("linear", "sensemode"))
        assert fallow.handle_of(net) is None


def test_a_toys_training_is_a_function_of_its_options():
    one = toys.toy_cell("planted", "sensemode", 0.5, 1, 12, plain)
    torch.manual_seed(99)
    assert toys.toy_cell("planted", "sensemode", 0.5, 1, 12, plain) == one
    assert toys.toy_cell("planted", "sensemode", 0.5, 2, 12, plain) != one


def test_sensemode_finds_planted_blocks_and_beats_uniform_at_a_small_budget():
    """By more than two standard errors over four seeds, on blocks of which a quarter matters."""
    errors: dict[str, dict[int, float]] = {"uniform": {}, "sensemode": {}}
    for seed in range(4):
        task, chosen = toys.planted_task(seed, blocks=8, part=2, relevant=2, samples=256, noise=0.5)
        for rule, found in errors.items():
            net = toys.PlantedNet(8, 2, 16, generator(seed, "weights"))
            how = {"steps": 250, "learning_rate": 1e-2, "refresh": 10}
            for handle in toys.fit(net, task, rule, 0.35, seed, **how):
                found[seed] = toys.test_error(net, task)
                given = [handle.rates[f"branches.{place}"] for place in range(8)]
            if rule == "sensemode":
                others = [rate for place, rate in enumerate(given) if place not in chosen]
                assert min(given[place] for place in chosen) > 1.5 * max(others)
    found = _panels.compared(errors["sensemode"], errors["uniform"])
    assert found is not None and found["apart"] < -2 and found["difference"] < 0


# --- growth, law, penalty -----------------------------------------------------------------------------------


def test_growth_profiles_are_products_of_factors():
    profile = hayou_cells._profile([4.0, 2.0, 1.0])
    assert profile == [3.0, 1.0, 0.0, 0.0]
    errors = hayou_cells._errors([4.0, 2.0, 1.0], [0.4, 0.1, 0.0])
    assert errors[2:] == [0.0, 0.0]
    assert math.isclose(errors[0] * math.log(2), math.hypot(0.1, 0.05))


def test_simulated_growth_agrees_with_theory():
    options = {"depth": 12, "width": 128, "draws": 6, "masks": 128}
    found = hayou_cells.growth_cell("vanilla", "linear", 0.7, **options, pieces=plain)
    exact = math.prod(1 + p for p in hayou_cells.rates_of("linear", 12, 0.7))
    assert math.isclose(2 ** found["theory"][0], exact) and len(found["ours"]) == 13
    assert abs(found["rate"] - found["rate_theory"]) < 5 * found["rate_error"]


def test_the_law_of_known_samples():
    draws = generator(0, "law")
    coin = torch.where(torch.rand(4000, 3, generator=draws) < 0.5, -1.0, 1.0).double()
    found = hayou_cells._law(coin)
    assert math.isclose(found["distance"], stats.norm.cdf(1) - 0.5, abs_tol=0.02)
    assert math.isclose(found["kurtosis"], -2, abs_tol=0.01)
    normal = torch.randn(4000, 3, generator=draws, dtype=torch.float64)
    found = hayou_cells._law(normal)
    z = (normal - normal.mean(0)) / normal.std(0)
    expected = [stats.kstest(column, "norm").statistic for column in z.T.numpy()]
    assert math.isclose(found["distance"], sum(expected) / 3, rel_tol=1e-9)
    assert sum(found["counts"]) == 4000
    still = torch.cat([normal, torch.full((4000, 1), 3.0, dtype=torch.float64)], 1)
    assert hayou_cells._law(still)["distance"] == found["distance"]  # a unit that never moves has no law


def test_the_law_over_masks_is_that_of_the_library():
    net, x = toys.DenseResNet(3, 6, 2, True, generator(0, "net")), torch.randn(1, 3)
    hidden = hayou_cells._hidden(net, x, [0.5, 0.5], 64, generator(1, "masks")).float()
    y0 = net.first(x)
    outcomes = []
    for first, second in itertools.product((0, 1), repeat=2):
        y1 = y0 + first * net.branches[0](y0)
        outcomes.append((y1 + second * net.branches[1](y1))[0])
    gaps = (hidden[:, None] - torch.stack(outcomes).detach()).abs().amax(2)
    nearest = gaps.min(1)
    assert nearest.values.max() < 1e-5 and len(nearest.indices.unique()) == 4


def test_the_penalty_against_enumeration():
    task = toys.teacher_task(0, inputs=3, samples=20, noise=0.3)
    net, ps = toys.DenseResNet(3, 8, 3, True, generator(0, "net")), [0.9, 0.6, 0.7]
    x = task.train[0]
    weights, outputs = [], []
    for mask in itertools.product((0.0, 1.0), repeat=3):
        weights.append(math.prod(p if kept else 1 - p for p, kept in zip(ps, mask, strict=True)))
        outputs.append(hayou_cells._gated(net, x, torch.tensor(mask)).detach())
    chance, out = torch.tensor(weights)[:, None], torch.stack(outputs)
    mean = (chance * out).sum(0)
    exact = (chance * (out - mean).square()).sum(0).mean().item()
    found = hayou_cells._penalty(net, task, ps, 4000, generator(0, "masks"))
    assert abs(found["exact"] - exact) < 5 * found["error"] and found["error"] < 0.2 * exact
    form = 0.0
    for place, p in enumerate(ps):
        without = [1.0] * 3
        without[place] = 0.0
        left_out = out[list(itertools.product((0.0, 1.0), repeat=3)).index(tuple(without))]
        form += p * (1 - p) * (out[-1] - left_out).square().mean().item()
    assert math.isclose(found["form"], form, rel_tol=1e-5)
    torch.testing.assert_close(hayou_cells._gated(net, x, torch.ones(3)), net(x))


# --- comparisons --------------------------------------------------------------------------------------------


def test_comparisons_are_paired_t_tests_over_the_seeds_that_both_have():
    first, second = {0: 1.0, 1: 2.0, 2: 4.0, 7: 9.0}, {2: 3.5, 1: 1.0, 0: 0.7, 5: 0.0}
    found = _panels.compared(first, second)
    expected = stats.ttest_rel([1.0, 2.0, 4.0], [0.7, 1.0, 3.5])
    assert found is not None and found["seeds"] == 3
    assert math.isclose(found["apart"], expected.statistic) and math.isclose(found["chance"], expected.pvalue)
    assert _panels.compared({0: 1.0}, {0: 2.0}) is None


def test_nothing_within_two_standard_errors_or_likely_by_chance_is_shown():
    def found(apart: float, chance: float, sign: int = -1) -> dict[str, float]:
        return {"difference": sign * 1.0, "error": 1.0, "apart": sign * apart, "chance": chance, "seeds": 4}

    assert _panels.verdict(found(1.9, 0.01), "A", "B") == "not shown"
    assert _panels.verdict(found(2.5, 0.09), "A", "B") == "not shown"
    assert _panels.verdict(found(4.0, 0.03), "A", "B") == "A better"
    assert _panels.verdict(found(4.0, 0.03, 1), "A", "B") == "B better"
    assert _panels.verdict(None, "A", "B") == "too few seeds"
    judge = hayou_errors.judge
    assert judge("sensemode", 0.3, found(4, 0.01)) == "as it says"
    assert judge("sensemode", 0.3, found(4, 0.01, 1)) == "against it"
    assert judge("sensemode", 0.9, found(4, 0.01)) == "against it"
    assert (
        judge("sensemode", 0.9, found(4, 0.01, 1)) == judge("linear", 0.75, found(4, 0.01, 1)) == "as it says"
    )
    assert judge("sensemode", 0.9, found(1, 0.5)) == "not shown"
    assert judge("sensemode", 0.6, found(4, 0.01)) == judge("linear", 0.3, found(4, 0.01)) == "says nothing"


def _toy_results(better: float) -> list[tuple[Cell, dict[str, Any]]]:
    made = []
    for rule, budget in hayou_sizes.arms((0.3, 0.9)):
        for seed in range(4):
            error = 1.0 + 0.01 * seed * (1 + (rule == "sensemode")) + (better if rule == "sensemode" else 0.0)
            tags = {"task": "toy", "rule": rule, "budget": budget, "seed": seed}
            given = {"error": error, "rates": [0.2, budget, 0.9], "relevant": [2]}
            made.append((Cell(f"{rule}{budget}{seed}", {}, tags), given))
    return made


@pytest.mark.parametrize(("better", "small", "large"), [(-0.5, "as it says", "against it"), (0.0, "", "")])
def test_the_table_of_the_hypothesis_says_where_it_fails(better: float, small: str, large: str):
    gathered = hayou_errors.hypothesis(_toy_results(better))
    rows = {(row[0], row[1]): row for row in gathered["tables"][0]["rows"]}
    assert rows["toy, 0.3", "SenseMode − Uniform"][-1] == (small or "not shown")
    assert rows["toy, 0.9", "SenseMode − Uniform"][-1] == (large or "not shown")
    assert ("toy, 0.3", "Linear − Uniform") not in rows
    against = [words for words in gathered["statements"] if words.startswith("Against it")]
    assert (len(against) == 1 and "toy, 0.9" in against[0]) if small else against == []


def test_rates_are_shown_with_the_planted_blocks_first():
    gathered = hayou_errors.sense_rates(_toy_results(0.0))
    assert gathered["tables"][0]["rows"][0] == [0.3, 0.9, 0.2, 0.3]
    assert "in 4 of 4 seeds no other block" in gathered["statements"][0]


def test_error_tables_hold_means_and_standard_errors():
    gathered = hayou_errors.errors(_toy_results(0.0))
    rows = gathered["tables"][0]["rows"]
    assert [row[0] for row in rows] == ["0.3", "0.9", "Standard"]
    assert rows[0][3:5] == [None, None]  # no Linear there
    spread = stats.sem([1.0, 1.01, 1.02, 1.03])
    assert math.isclose(rows[0][1], 1.015) and math.isclose(rows[0][2], spread)


# --- what is committed -------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]


def committed(scale: str) -> dict[str, Any]:
    return json.loads((ROOT / "results" / "hayou2021" / f"{scale}.json").read_text())


def item(results: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in results["items"] if one["name"] == name)


def test_in_the_committed_results_sensemode_found_the_planted_blocks_and_won_at_a_small_budget():
    found = committed("tiny")
    rows = {(row[0], row[1]): row for row in item(found, "hypothesis")["tables"][0]["rows"]}
    row = rows[f"{hayou_sizes.TOYS['planted']}, 0.3", "SenseMode − Uniform"]
    assert row[4] < -2 and row[5] < 0.05 and row[7] == "SenseMode better"
    said = [words for words in item(found, "rates")["statements"] if "budget 0.3" in words]
    assert len(said) == 1 and "in 4 of 4 seeds" in said[0]


def test_in_the_committed_results_simulation_agrees_with_theory():
    found = committed("tiny")
    for row in item(found, "growth")["tables"][0]["rows"]:
        assert abs(row[2] - row[1]) < 0.05 * row[1]
    rows = {row[0]: row for row in item(found, "histogram")["tables"][0]["rows"]}
    for when in ("at initialisation", "after training"):
        distances = [rows[f"stable, {when}, L = {depth}"][1] for depth in (5, 20, 80)]
        assert distances[0] > distances[1] > distances[2]

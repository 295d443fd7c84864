"""What the handle says: asked and realised rates, depth and cost, as numbers and as a table."""

import math

import pytest
import torch
from kit import RATES, kept, net, numbered, watched

import fallow
from fallow import models

MODES = [
    {"mode": "batch"},
    {"mode": "batch", "sampler": "exact"},
    {"mode": "row"},
    {"mode": "row", "sampler": "exact"},
]


def test_before_the_first_forward_there_is_nothing_realised():
    _, handle = net()
    numbers, text = handle.metrics(), str(handle.report())
    assert not [key for key in numbers if key.startswith("rate/realised/")]
    assert handle.expected_depth == 2 and handle.draw == 0
    assert all(site.name in text for site in handle.sites) and " - " in text.replace("-\n", "- \n")


@pytest.mark.parametrize("options", MODES, ids=str)
def test_realised_numbers_are_the_means_over_the_masks(options):
    model, handle = watched(RATES, **options)
    totals, depths, costs = dict.fromkeys(handle.rates, 0.0), [], []
    for _ in range(30):
        model(numbered(8))
        shares = {name: sum(mask) / len(mask) for name, mask in kept(handle).items()}
        assert handle.last_depth == pytest.approx(sum(shares.values()))
        assert handle.last_cost == pytest.approx(
            1 - sum(handle.costs[n] * (1 - s) for n, s in shares.items())
        )
        totals = {n: totals[n] + s for n, s in shares.items()}
        depths.append(handle.last_depth)
        costs.append(handle.last_cost)
    numbers = handle.metrics()
    for name, p in zip(totals, RATES, strict=True):
        assert numbers[f"rate/asked/{name}"] == p
        assert numbers[f"rate/realised/{name}"] == pytest.approx(totals[name] / 30)
    report = handle.report()
    assert report.depth == pytest.approx(sum(depths) / 30) and report.cost == pytest.approx(sum(costs) / 30)
    assert report.expected_depth == pytest.approx(sum(RATES)) == handle.expected_depth
    assert report.expected_cost == pytest.approx(handle.expected_cost)
    assert report.draws == 30 and {report.depth, report.cost} <= set(numbers.values())


@pytest.mark.parametrize("options", MODES, ids=str)
def test_the_metrics_are_a_flat_dict_of_finite_numbers(options):
    model, handle = net(**options)
    model(torch.randn(3, 4))
    numbers = handle.metrics()
    assert numbers == handle.report().as_dict()
    assert all(isinstance(k, str) and math.isfinite(v) for k, v in numbers.items())
    assert all(type(v) in (int, float) for v in numbers.values())


def test_the_report_is_a_table_with_every_site():
    model = models.CifarResNet(14, channels=1, widths=(4, 4, 8))
    example = torch.randn(4, 1, 8, 8)
    handle = fallow.apply(model, fallow.rates.linear(last=0.5), example=example)
    for _ in range(4):
        model(example)
    lines = str(handle.report()).splitlines()
    for site, line in zip(handle.sites, lines[1:], strict=False):
        name, kind, cost, asked, realised = line.split()
        assert (name, kind) == (site.name, site.kind)
        assert float(cost) == pytest.approx(100 * site.cost, abs=0.006)
        assert float(asked) == pytest.approx(handle.rates[name], abs=6e-4)
        assert 0 <= float(realised) <= 1
    assert len({len(line) for line in lines[: 1 + len(handle.sites)]}) == 1, "columns line up"
    assert f"of {len(handle.sites)}" in lines[1 + len(handle.sites)] and "4 draws" in lines[-1]


def test_costs_are_shares_and_the_expected_cost_is_what_is_left():
    model = models.CifarResNet(14, channels=1, widths=(4, 4, 8))
    example = torch.randn(2, 1, 8, 8)
    handle = fallow.apply(model, fallow.rates.linear(budget=0.75), example=example)
    assert handle.expected_cost == pytest.approx(0.75)
    assert 0.5 < sum(handle.costs.values()) < 1 and min(handle.costs.values()) > 0
    assert handle.costs == {
        s.name: s.cost for s in fallow.sites(models.CifarResNet(14, channels=1, widths=(4, 4, 8)), example)
    }
    handle.set_rates(fallow.rates.uniform(1.0))
    assert handle.expected_cost == 1
    model(example)
    assert (handle.last_cost, handle.last_depth) == (1, 6)


def test_new_rates_start_the_count_anew():
    model, handle = watched(1e-9, sites=3)
    for _ in range(4):
        model(numbered(2))
    assert handle.report().depth == 0
    handle.set_rates({"branches.0": 0.5})
    model(numbered(2))
    assert handle.metrics()["rate/realised/branches.1"] == 1
    assert handle.report().depth == handle.last_depth


def test_evaluation_is_not_counted():
    model, handle = watched(0.5)
    model(numbered(2))
    before = handle.metrics()
    model.eval()
    for _ in range(5):
        model(numbered(2))
    assert handle.metrics() == before


def test_a_window_asked_of_independent_rows_is_told():
    _, handle = net(mode="row")
    assert "scattered" in str(handle.report()) and 'sampler="exact"' in str(handle.report())
    _, handle = net(mode="row", rows="scattered")
    assert not handle.report().notes

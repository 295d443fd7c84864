"""Realised rates through `fallow.apply`, seen from inside the branches: on average and for each row.

Seeds are fixed; bounds are four standard errors, and a little over four where many rows are looked at.
"""

import math

import pytest
import torch
from kit import RATES, Watching, numbered, watched

SIZES = (1, 2, 3, 8, 32)
STEPS = 700


def rows_run(model: Watching, site: int, rows: int) -> torch.Tensor:
    """How often each row ran in a branch."""
    counts = torch.zeros(rows)
    for call in model.branches[site].seen:
        counts += torch.bincount(torch.tensor(call), minlength=rows)
    return counts


def train(model: Watching, rows: int, steps: int) -> None:
    x = numbered(rows)
    with torch.no_grad():
        for _ in range(steps):
            model(x)


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "bernoulli"},
        {"sampler": "bernoulli", "rows": "scattered"},
        {"sampler": "exact", "rows": "window"},
        {"sampler": "exact", "rows": "scattered"},
    ],
    ids=lambda o: "-".join(o.values()),
)
def test_every_row_is_kept_as_often_as_asked(options, rows):
    model, handle = watched(RATES, mode="row", seed=11, **options)
    train(model, rows, STEPS)
    for site, p in enumerate(RATES):
        counts = rows_run(model, site, rows)
        spread = math.sqrt(p * (1 - p) / STEPS)
        whole = p * rows - math.floor(p * rows)
        exact = options["sampler"] == "exact"
        mean_spread = math.sqrt(whole * (1 - whole) / STEPS) / rows if exact else spread / math.sqrt(rows)
        assert abs(counts.sum() / (rows * STEPS) - p) <= 4 * mean_spread + 1e-6, (p, "on average")
        assert ((counts / STEPS - p).abs() <= 4.5 * spread).all(), (p, counts / STEPS)
        realised = handle.metrics()[f"rate/realised/branches.{site}"]
        assert realised == pytest.approx(float(counts.sum()) / (rows * STEPS)), (
            "the report says what happened"
        )


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("layout", ["window", "scattered"])
def test_exact_keeps_floor_or_ceil_of_the_rows_at_every_step(layout, rows):
    model, _ = watched(RATES, mode="row", sampler="exact", rows=layout, seed=2)
    x = numbered(rows)
    for _ in range(60):
        model.watch()
        model(x)
        for site, p in enumerate(RATES):
            calls = model.branches[site].seen
            count = len(calls[0]) if calls else 0
            assert count in (math.floor(p * rows + 1e-9), math.ceil(p * rows - 1e-9))
            assert len(calls) == (count > 0), "a branch without rows is not called"
            assert not calls or len(set(calls[0])) == count, "no row comes twice"


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("sampler", ["bernoulli", "exact"])
def test_every_branch_runs_as_often_as_asked(sampler, rows):
    model, handle = watched(RATES, mode="batch", sampler=sampler, seed=5)
    steps, x, depths = 400, numbered(rows), []
    with torch.no_grad():
        for _ in range(steps):
            before = sum(len(b.seen) for b in model.branches)
            model(x)
            depths.append(sum(len(b.seen) for b in model.branches) - before)
            assert handle.last_depth == depths[-1]
    for site, p in enumerate(RATES):
        calls = model.branches[site].seen
        assert all(call == list(range(rows)) for call in calls), "whole batches"
        assert abs(len(calls) / steps - p) <= 4 * math.sqrt(p * (1 - p) / steps)
    if sampler == "exact":
        assert set(depths) == {math.floor(sum(RATES)), math.ceil(sum(RATES))}
    else:
        assert len(set(depths)) > 2


@pytest.mark.parametrize("rates", [(0.5, 0.5, 0.5, 0.5), (0.9, 0.8, 0.7, 0.6), (0.1, 0.15)])
def test_exact_depth_is_floor_or_ceil_of_the_sum(rates):
    model, handle = watched(rates, sites=len(rates), sampler="exact")
    total, x = sum(rates), numbered(2)
    for _ in range(150):
        model(x)
        assert handle.last_depth in (math.floor(total + 1e-9), math.ceil(total - 1e-9))

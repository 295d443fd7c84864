"""Plans: their arithmetic, what training under them really costs, their files, and every model we know."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import laws
import pytest
import torch
from cases import POSITIVE
from casework import Case
from subjects import Residuals, distance, residuals
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fallow
from fallow import Plan
from fallow.errors import ArgumentError, DataError, FallowError, RateError, RunError, SiteError, UsageError
from fallow.planning import allocate, costs, from_sensitivities, sensitivities


def planned(model: nn.Module | None = None, **options: Any) -> Plan:
    options = {"budget": 0.7, "loss_fn": distance, "batches": [(torch.randn(6, 4), None)]} | options
    return fallow.plan(residuals(10) if model is None else model, **options)


# --- arithmetic -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", ["flops", "memory", "count", "time"])
@pytest.mark.parametrize("method", ["uniform", "linear", "sensemode", "auto"])
def test_a_plan_costs_its_budget(method: str, cost: str):
    plan = planned(method=method, cost=cost, budget=0.8)
    recomputed = 1 - math.fsum(plan.costs[n] * (1 - p) for n, p in plan.items())
    assert plan.expected_cost == pytest.approx(recomputed, abs=1e-15)
    assert plan.expected_cost == pytest.approx(plan.budget, abs=1e-12)
    assert plan.expected_depth == pytest.approx(sum(plan.values()))
    assert plan.droppable == pytest.approx(sum(plan.costs.values()))
    assert plan.asked == method and plan.cost_kind == cost
    assert bool(plan.sensitivities) == (method in ("sensemode", "auto"))


def test_it_is_made_of_measured_costs_and_sensitivities():
    model, batches = residuals(10), [(torch.randn(6, 4), None)]
    plan = planned(model, batches=batches, method="sensemode", minimum_rate=0.2, gamma=0.5)
    known, share = sensitivities(model, distance, batches), costs(model, batches)
    assert plan.sensitivities == known.table and plan.costs == share
    expected = allocate.sensemode(known, share, budget=0.7, minimum_rate=0.2, gamma=0.5)
    assert dict(plan) == expected and list(plan) == [s.name for s in fallow.sites(model, batches[0][0])]
    assert (plan.settings["minimum_rate"], plan.settings["gamma"], plan.settings["samples"]) == (0.2, 0.5, 6)
    auto = planned(model, batches=batches, method="auto")
    choice = allocate.auto(known, share, budget=0.7, errors=known.errors)
    assert (auto.method, dict(auto)) == (choice.method, choice.rates) and choice.reason in auto.notes


@pytest.mark.parametrize("method", ["uniform", "linear", "sensemode", "auto"])
def test_the_whole_budget_rests_nothing(method: str):
    assert set(planned(method=method, budget=1).values()) == {1.0}


def test_sensitivities_of_nothing_but_zeros_give_uniform_rates():
    shares = dict.fromkeys("abc", 0.3)
    plan = from_sensitivities(shares, dict.fromkeys("abc", 0.0), budget=0.5)
    assert plan.method == "uniform" and dict(plan) == allocate.uniform(shares, 0.5)
    assert any("zero" in note for note in plan.notes)


def test_few_sites_are_noted_and_the_table_shows_every_site():
    few, many = planned(residuals(3)), planned()
    assert any("few" in note for note in few.notes) and not any("few" in note for note in many.notes)
    text = str(few)
    for name, rate in few.items():
        assert any(line.startswith(name) and f"{rate:.3f}" in line for line in text.splitlines())
    assert "0.7000" in text and "budget 0.7" in text


# --- the promise: what training under it costs ------------------------------------------------------------


@pytest.mark.parametrize("mode", ["batch", "row"])
@pytest.mark.parametrize("sampler", ["bernoulli", "exact"])
def test_flops_counted_over_training_steps_are_what_the_plan_expects(mode: str, sampler: str):
    """Blocks of different cost and importance; within four standard errors, or of rounding where constant."""
    torch.manual_seed(0)
    wide = (8, 8, 40, 8, 24)
    blocks = (nn.Sequential(nn.Linear(8, w), nn.ReLU(), nn.Linear(w, 8)) for w in wide)
    model, x = Residuals(*blocks, inputs=4, width=8), torch.randn(16, 4)
    plan = planned(model, batches=[(x, None)], method="sensemode", budget=0.55)
    assert min(plan.values()) < 0.9 * max(plan.values())

    def flops() -> int:
        with FlopCounterMode(display=False) as counter:
            distance(model(x), None).backward()
        return counter.get_total_flops()

    dense = flops()
    handle = fallow.apply(model, plan, example=x, mode=mode, sampler=sampler, seed=1)
    assert handle.rates == dict(plan) and handle.expected_cost == pytest.approx(plan.expected_cost)
    shares = torch.tensor([flops() / dense for _ in range(80)], dtype=torch.float64)
    error = float(shares.std()) / len(shares) ** 0.5
    assert abs(float(shares.mean()) - plan.expected_cost) < 4 * error + 1e-9
    assert error < 0.03


def test_apply_takes_a_plan_as_it_takes_a_mapping():
    plan, x = planned(method="sensemode"), torch.randn(6, 4)
    one, other = residuals(10), residuals(10)
    handle = fallow.apply(one, plan, example=x)
    fallow.apply(other, dict(plan), example=x)
    assert all(torch.equal(one(x), other(x)) for _ in range(5))
    handle.set_rates(planned(method="uniform"))
    assert len(set(handle.rates.values())) == 1
    part = planned(method="uniform", include="blocks.[0-4]")
    assert len(part) == 5
    handle.set_rates(part)
    assert handle.rates["blocks.9"] == 1 and handle.rates["blocks.0"] == part["blocks.0"] < 1
    with pytest.raises(SiteError, match="no such site"):
        fallow.apply(residuals(3), plan, example=x)


# --- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["uniform", "sensemode"])
def test_a_saved_plan_is_the_same_plan(tmp_path: Path, method: str):
    plan, path = planned(method=method), tmp_path / "plan.json"
    for _ in range(2):  # also over what is there
        plan.save(path)
    assert Plan.load(path) == plan == Plan.from_dict(plan.as_dict())
    assert list(Plan.load(path)) == list(plan) and str(Plan.load(path)) == str(plan)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    raw = json.loads(path.read_text())
    assert raw["schema"] == 1 and raw["sites"][0]["name"] == "blocks.0"
    assert (raw["sites"][0]["sensitivity"] is None) == (method == "uniform")


def harmed(**change: Any) -> dict[str, Any]:
    return planned().as_dict() | change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 2}, "schema 2, this version of fallow reads 1"),
        ({"kind": "train"}, "no plan"),
        ({"sites": None}, "damaged"),
        ({"sites": "blocks"}, "damaged"),
        ({"sites": []}, "no sites"),
        ({"sites": [{"name": "a", "cost": 0.1}]}, "damaged.*rate"),
        ({"sites": [{"name": "a", "rate": 0.5, "cost": "much"}]}, "damaged"),
        ({"sites": [{"name": "a", "rate": 1.5, "cost": 0.1}]}, r"a: survival_rate must be in \(0, 1\]"),
        ({"sites": [{"name": "a", "rate": math.nan, "cost": 0.1}]}, r"a: survival_rate must be in"),
        ({"sites": [{"name": "a", "rate": 0.5, "cost": 1.1}]}, "at most 1"),
        ({"sites": [{"name": "a", "rate": 0.5, "cost": -0.1}]}, "a: its cost"),
        ({"sites": [{"name": "a", "rate": 0.5, "cost": 0.1}] * 2}, "twice"),
        ({"budget": "half"}, "budget"),
        ({"budget": 7}, "budget"),
        ({"cost_kind": "joules"}, "cost_kind must be"),
        ({"settings": "none"}, "damaged"),
        ({"notes": 3}, "damaged"),
    ],
)
def test_a_damaged_plan_is_refused(tmp_path: Path, change: dict, words: str):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(harmed(**change)))
    with pytest.raises(FallowError, match=words):
        Plan.load(path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"3", b'"plan"', b"null"])
def test_what_is_no_plan_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(DataError, match="plan"):
        Plan.load(tmp_path / "plan.json")
    with pytest.raises(DataError, match="nowhere"):
        Plan.load(tmp_path / "nowhere.json")
    with pytest.raises(DataError, match="cannot be read as a plan"):
        Plan.load(tmp_path)
    with pytest.raises(DataError, match="could not be written"):
        planned().save(tmp_path / "no" / "folder" / "plan.json")


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"budget": 0}, RateError, r"budget must be in \(0, 1\], got 0"),
        ({"budget": 1.2}, RateError, r"budget must be in \(0, 1\], got 1.2"),
        ({"budget": math.nan}, RateError, r"budget must be in \(0, 1\], got nan"),
        ({"budget": "0.5"}, RateError, r"budget must be in \(0, 1\], got '0.5'"),
        ({"budget": 0.05}, RateError, "smallest feasible budget is"),
        ({"budget": 0.01, "method": "uniform"}, RateError, "smallest feasible budget is"),
        ({"budget": 0.3, "method": "linear"}, RateError, "linear rates .* smallest feasible budget is"),
        ({"budget": 0.5, "minimum_rate": 0.9, "method": "sensemode"}, RateError, "or lower minimum_rate"),
        ({"minimum_rate": 0, "method": "sensemode"}, RateError, "minimum_rate must be in"),
        ({"gamma": -1, "method": "sensemode"}, UsageError, "gamma must be"),
        ({"gamma": -1, "method": "uniform"}, UsageError, "gamma must be"),
        ({"seed": "a", "reduction": "masked"}, UsageError, "seed must be a whole number"),
        ({"method": "best"}, UsageError, 'method must be "auto"'),
        ({"cost": "joules"}, UsageError, 'cost must be "flops"'),
        ({"loss_fn": None}, ArgumentError, r"pass loss_fn\(output, target\)"),
        ({"loss_fn": "mse"}, ArgumentError, r"pass loss_fn\(output, target\)"),
        ({"batches": None}, ArgumentError, "got NoneType"),
        ({"batches": (torch.randn(4, 4) for _ in range(3))}, ArgumentError, "pair or a dict, got Tensor"),
        ({"loss_fn": lambda out, _: out.mean() / 0}, RunError, "the loss is -?inf"),
    ],
)
def test_what_cannot_be_planned_is_said(change: dict, error: type[FallowError], words: str):
    with pytest.raises(error, match=words) as refused:
        planned(**change)
    assert "\n" not in str(refused.value)


def test_a_budget_out_of_reach_is_refused_before_the_loss_is_asked():
    def never(output: Tensor, target: None) -> Tensor:
        raise AssertionError("the loss was measured")

    with pytest.raises(RateError):
        planned(loss_fn=never, budget=0.001)


# --- the zoo ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", POSITIVE, ids=str)
def test_every_subject_can_be_planned_and_trained_under_its_plan(case: Case):
    model, feed = case.model(), case.feed(4)
    plan = fallow.plan(model, distance, [(feed, None)], budget=0.75, method="sensemode")
    assert set(plan) == {s.site for s in case.sums}
    assert plan.expected_cost == pytest.approx(0.75, abs=1e-12)
    assert min(plan.sensitivities.values()) > 0 and not any("exact zeros" in note for note in plan.notes)
    handle = fallow.apply(model, plan, example=feed)
    loss = distance(laws.call(model.train(), laws.cast(feed)), None)
    if loss.requires_grad:  # not where everything rests in a model without a stem
        loss.backward()
    assert handle.draw == 1


def _mobile() -> nn.Module:
    import timm

    return timm.create_model("efficientnet_lite0", num_classes=5)


def _gru() -> nn.Module:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(6, 6, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.gru(x)[0]

    return Residuals(Recurrent(), nn.Sequential(nn.LayerNorm(6), Recurrent()), inputs=4)


def _t5() -> nn.Module:
    import transformers

    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=50, dropout_rate=0.0
    )
    return transformers.T5EncoderModel(config)


@pytest.mark.parametrize(
    ("build", "batch"),
    [
        (_mobile, lambda: torch.randn(4, 3, 32, 32)),
        (_gru, lambda: torch.randn(4, 5, 4)),
        (_t5, lambda: {"input_ids": torch.randint(1, 50, (4, 6))}),
    ],
    ids=["efficientnet", "recurrent branches", "T5"],
)
def test_models_that_nobody_named_can_be_planned(build, batch):
    torch.manual_seed(0)
    model, x = build(), batch()
    plan = fallow.plan(model, distance, [(x, None)], budget=0.85, method="sensemode")
    assert plan.expected_cost == pytest.approx(0.85, abs=1e-12) and min(plan.sensitivities.values()) > 0
    fallow.apply(model, plan, example=x)


# --- planted importances ----------------------------------------------------------------------------------


class Planted(nn.Module):
    """Blocks that each see and write their own part of the state; the target needs a few of them."""

    def __init__(self, blocks: int = 8) -> None:
        super().__init__()
        self.stem = nn.Linear(2 * blocks, 4 * blocks)
        self.blocks = nn.ModuleList(_Part(i, blocks) for i in range(blocks))
        self.head = nn.Linear(4 * blocks, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            h = h + block(x, h)
        return self.head(h)


class _Part(nn.Module):
    def __init__(self, index: int, blocks: int) -> None:
        super().__init__()
        self.place = index, blocks
        self.inner, self.outer = nn.Linear(2 + 4, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        index, blocks = self.place
        seen = torch.cat([x[:, 2 * index : 2 * index + 2], h[:, 4 * index : 4 * index + 4]], 1)
        out = self.outer(torch.tanh(self.inner(seen)))
        return nn.functional.pad(out, (4 * index, 4 * (blocks - 1 - index)))


@pytest.mark.parametrize("seed", [2, 3])
def test_planted_blocks_get_the_highest_rates(seed: int):
    """After training with noise, on samples that never come twice: what is of no use has become small."""
    relevant = (1, 4, 6)
    torch.manual_seed(seed)

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(256, 16)
        target = sum(x[:, 2 * i] * x[:, 2 * i + 1] for i in relevant)
        return x, (target + 0.3 * torch.randn(256))[:, None]

    model, loss_fn = Planted(), nn.functional.mse_loss
    handle = fallow.apply(model, fallow.rates.uniform(0.6), example=batch()[0], mode="row", seed=seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(300):
        x, target = batch()
        optimiser.zero_grad()
        loss_fn(model(x), target).backward()
        optimiser.step()
    handle.remove()
    plan = fallow.plan(model, loss_fn, [batch() for _ in range(4)], budget=0.4, cost="count")
    planted = {f"blocks.{i}" for i in relevant}
    assert plan.method == "sensemode"
    assert min(plan[n] for n in planted) > 1.5 * max(p for n, p in plan.items() if n not in planted)

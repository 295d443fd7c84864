"""Sensitivities taken from training steps: the right inner products, and nothing else changes."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from subjects import Residuals, bent, distance, residuals
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fallow
from fallow import models
from fallow.errors import SiteError, UsageError
from fallow.planning import RunningSensitivities, running
from fallow.surgery import Handle
from fallow.surgery.gate import Gated

MODES: list[dict[str, Any]] = [
    {"mode": "batch"},
    {"mode": "batch", "sampler": "exact", "scale": "eval"},
    {"mode": "row"},
    {"mode": "row", "sampler": "exact"},
    {"mode": "row", "sampler": "exact", "rows": "scattered", "scale": "eval"},
]
EVERY_MODE = pytest.mark.parametrize("options", MODES, ids=lambda o: "-".join(o.values()))
RATES = {"blocks.0": 0.4, "blocks.2": 0.6, "blocks.3": 0.75}  # blocks.1 never rests


@pytest.fixture
def all_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every site on every row in every step."""
    monkeypatch.setattr(running, "_SITES", 1)
    monkeypatch.setattr(running, "_ROWS", 1)


def batches(count: int, rows: int = 7, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 4, generator=generator, dtype=torch.float64) for _ in range(count)]


def applied(rates: Any = RATES, model: nn.Module | None = None, **options: Any) -> tuple[Any, Handle]:
    model = (residuals() if model is None else model).double()
    return model, fallow.apply(model, rates, example=batches(1)[0], **options)


def step(model: nn.Module, x: Tensor) -> None:
    distance(model(x), None).backward()


def by_hand(model: Residuals, handle: Handle, x: Tensor) -> dict[str, Tensor]:
    """``n <d loss / d y, f>`` of the rows that ran in the draw just made."""
    masks, sums, values = handle.masks(), [], []
    h = model.stem(x)
    for i, block in enumerate(model.blocks):
        name = f"blocks.{i}"
        factor = 1 / handle.rates[name] if handle.options.scale == "train" else 1.0
        kept = masks[name].expand(len(x)).double()[:, None]
        value = block(h)
        h = h + kept * factor * value
        sums.append(h)
        values.append(value)
    grads = torch.autograd.grad(distance(model.head(h), None), sums)
    found = {}
    for i, (grad, value) in enumerate(zip(grads, values, strict=True)):
        rows = masks[f"blocks.{i}"].expand(len(x))
        found[f"blocks.{i}"] = (len(x) * (grad * value).sum(1)[rows]).detach()
    return found


@EVERY_MODE
@pytest.mark.usefixtures("all_watched")
def test_they_are_the_inner_products_of_the_rows_that_ran(options: dict):
    """Over windows that wrap too; sites that never rest are among them."""
    model, handle = applied(**options)
    plain, seen = copy.deepcopy(model), RunningSensitivities(handle)
    fallow.handle_of(plain).remove()
    expected: dict[str, list[Tensor]] = {f"blocks.{i}": [] for i in range(4)}
    wrapped = False
    for x in batches(25):
        step(model, x)
        for name, rows in by_hand(plain, handle, x).items():
            expected[name].append(rows)
        wrapped |= any(bool(m[0] and m[-1] and not m.all()) for m in handle.masks().values() if m.dim())
    assert wrapped or options["mode"] == "batch"
    together = {n: torch.cat(rows) for n, rows in expected.items()}
    assert seen.rows == {n: len(rows) for n, rows in together.items()}
    assert seen.rows["blocks.1"] == 25 * 7 > seen.rows["blocks.0"] > 0
    found = seen.update()
    assert found == pytest.approx({n: float(rows.abs().mean()) for n, rows in together.items()}, rel=1e-10)


@pytest.mark.usefixtures("all_watched")
def test_the_branches_of_a_block_are_added_up_row_by_row():
    torch.manual_seed(0)
    model, x = models.vit_small(width=12, depth=2, image=16).double(), torch.randn(5, 3, 16, 16).double()
    handle = fallow.apply(model, fallow.rates.uniform(1.0), example=x, granularity="block")
    seen = RunningSensitivities(handle)
    step(model, x)
    in_eval = fallow.planning.sensitivities(model, distance, [(x, None)])
    assert seen.update() == pytest.approx(in_eval.table, rel=1e-9)  # no dropout, no BatchNorm: one network


class Flattened(Residuals):
    """Samples and tokens in one dimension, for some blocks."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        h = h + self.blocks[0](h)
        flat = h.reshape(-1, h.shape[-1])
        flat = flat + self.blocks[1](flat)
        return self.head(flat.reshape(h.shape))


@pytest.mark.usefixtures("all_watched")
def test_where_samples_cannot_be_told_apart_the_batch_counts_as_one():
    torch.manual_seed(3)
    model, x = Flattened(bent(), bent()).double(), torch.randn(6, 5, 4).double()
    seen = RunningSensitivities(fallow.apply(model, {}, example=x))
    step(model, x)
    assert seen.update() == pytest.approx(fallow.planning.sensitivities(model, distance, [(x, None)]).table)


def test_a_step_watches_some_sites_and_rows_those_seen_least_first():
    model, handle = applied(fallow.rates.uniform(0.5), residuals(20), sampler="exact")
    seen = RunningSensitivities(handle)
    step(model, batches(1)[0])
    assert sorted(seen.rows.values()) == [0] * 17 + [2] * 3  # an eighth of 20 sites, a quarter of 7 rows
    assert seen.update() is None, "most sites were not seen yet"
    for x in batches(60):
        step(model, x)
    assert max(seen.rows.values()) - min(seen.rows.values()) <= 6
    assert sum(seen.rows.values()) == 60 * 3 * 2
    assert list(seen.update() or ()) == [f"blocks.{i}" for i in range(20)]


@pytest.mark.usefixtures("all_watched")
def test_updates_are_averaged_over_time():
    model, handle = applied({})
    seen, last = RunningSensitivities(handle, decay=0.7), None
    for x in batches(3):
        step(model, x)
        plain = fallow.planning.sensitivities(copy.deepcopy(model), distance, [(x, None)])
        last = {n: s if last is None else 0.7 * last[n] + 0.3 * s for n, s in plain.items()}
        assert seen.update() == pytest.approx(last, rel=1e-10)
    assert seen.update() == pytest.approx(last, rel=1e-10), "nothing was seen since"


# --- training is the same --------------------------------------------------------------------------------


def trained(options: dict, watch: bool) -> tuple[dict[str, Tensor], list[int], Any]:
    torch.manual_seed(4)
    model, x = models.CifarResNet(14, widths=(4, 4, 8)), torch.randn(8, 3, 8, 8)
    rates = {"group1.0": 0.5, "group3.0": 0.6, "group3.1": 0.8}
    handle = fallow.apply(model, rates, example=x, **options)
    seen = RunningSensitivities(handle) if watch else None
    calls: list[int] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_: calls.append(1))
            module.weight.register_hook(lambda _: calls.append(-1))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        optimiser.zero_grad()
        out = model(torch.randn(8, 3, 8, 8, generator=generator))
        nn.functional.cross_entropy(out, torch.arange(8)).backward()
        optimiser.step()
    return model.state_dict(), calls, seen


@EVERY_MODE
def test_training_is_bit_identical_and_nothing_runs_twice(options: dict, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(running, "_SITES", 1)
    plain, calls, _ = trained(options, watch=False)
    watched, more, seen = trained(options, watch=True)
    assert all(torch.equal(v, watched[k]) for k, v in plain.items())
    assert more == calls and min(seen.rows.values()) > 0


def test_gates_of_sites_that_never_rest_go_when_watching_stops():
    model, handle = applied()
    expected = {n for n, m in model.named_modules() if isinstance(m, Gated)}
    seen = RunningSensitivities(handle)
    assert {n for n, m in model.named_modules() if isinstance(m, Gated)} > expected
    handle.set_rates(RATES | {"blocks.0": 1.0})
    handle.set_rates(RATES)
    step(model, batches(1)[0])
    seen.stop()
    assert {n for n, m in model.named_modules() if isinstance(m, Gated)} == expected
    before = seen.rows
    step(model, batches(1)[0])
    assert seen.rows == before


def test_copies_are_not_watched():
    model, handle = applied()
    seen = RunningSensitivities(handle)
    twin = copy.deepcopy(model)
    before = seen.rows
    for x in batches(5):
        step(twin, x)
    assert seen.rows == before and fallow.handle_of(twin).draw == 5
    step(model, batches(1)[0])
    assert sum(seen.rows.values()) > 0


def test_evaluation_and_forwards_without_a_graph_are_not_watched():
    model, handle = applied()
    seen = RunningSensitivities(handle)
    with torch.no_grad():
        model(batches(1)[0])
    step(model.eval(), batches(1)[0])
    model.train()(batches(1)[0])  # and never a backward
    assert not any(seen.rows.values())


# --- how loops run backward -------------------------------------------------------------------------------


class Checkpointed(Residuals):
    """Recomputes its blocks two by two, where it is told how."""

    reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return super().forward(x)
        x = self.stem(x)
        for i in range(0, len(self.blocks), 2):
            x = checkpoint(self._pair, i, x, use_reentrant=self.reentrant)
        return self.head(x)

    def _pair(self, first: int, x: Tensor) -> Tensor:
        for block in self.blocks[first : first + 2]:
            x = x + block(x)
        return x


def _one_by_one(model: nn.Module, xs: Iterable[Tensor]) -> None:
    for x in xs:
        step(model, x)


def _two_by_two(model: nn.Module, xs: Iterable[Tensor]) -> None:
    """Both forwards, then one backward."""
    for x, y in zip(*[iter(xs)] * 2, strict=True):
        (distance(model(x), None) + distance(model(y), None)).backward()


@pytest.mark.parametrize("mode", ["batch", "row"])
@pytest.mark.parametrize("loop", [_one_by_one, _two_by_two])
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.usefixtures("all_watched")
def test_checkpointing_and_late_backwards_change_nothing(reentrant: bool | None, loop: Callable, mode: str):
    model, handle = applied(mode=mode)
    expected = RunningSensitivities(handle)
    _one_by_one(model, batches(10))
    other = residuals()
    other.__class__ = Checkpointed
    other, second = applied(model=other, mode=mode)
    other.reentrant = reentrant
    seen = RunningSensitivities(second)
    loop(other, batches(10))
    assert seen.rows == expected.rows
    assert seen.update() == pytest.approx(expected.update(), rel=1e-10)


@pytest.mark.usefixtures("all_watched")
def test_pieces_of_a_batch_count_as_the_batch():
    """Where their losses are shares of the batch's; all sites are then smaller by one factor."""
    model, handle = applied({})
    whole = RunningSensitivities(handle)
    (x,) = batches(1, rows=8)
    step(model, x)
    other, second = applied({})
    pieces = RunningSensitivities(second)
    for part in x.chunk(2):
        (distance(other(part), None) / 2).backward()
    assert pieces.rows == whole.rows
    one, two = whole.update(), pieces.update()
    assert two == pytest.approx({n: s / 2 for n, s in one.items()}, rel=1e-10)


@EVERY_MODE
def test_a_resumed_run_sees_what_the_first_would_have_seen(options: dict):
    xs = batches(30)

    def run(model: nn.Module, seen: RunningSensitivities, part: Iterable[int]) -> list[Any]:
        told = []
        for i in part:
            step(model, xs[i])
            if i % 10 == 9:
                told.append(seen.update())
        return told

    for cut in (3, 10, 17):
        model, handle = applied(**options)
        seen = RunningSensitivities(handle)
        told = run(model, seen, range(cut))
        file = io.BytesIO()
        torch.save({"handle": handle.state_dict(), "seen": seen.state_dict()}, file)
        told += run(model, seen, range(cut, 30))
        file.seek(0)
        state = torch.load(file, weights_only=True)
        model, handle = applied(**options)
        again = RunningSensitivities(handle)
        handle.load_state_dict(state["handle"])
        again.load_state_dict(state["seen"])
        later = run(model, again, range(cut, 30))
        assert len(later) >= 2 and told[-len(later) :] == later
        assert again.state_dict() == seen.state_dict()


def test_other_sites_and_bad_decays_are_refused():
    state = RunningSensitivities(applied()[1]).state_dict()
    other = RunningSensitivities(applied({}, residuals(3))[1])
    with pytest.raises(SiteError, match="other sites"):
        other.load_state_dict(state)
    for decay in (-0.1, 1, 2.0, float("nan")):
        with pytest.raises(UsageError, match="decay must be in"):
            RunningSensitivities(applied()[1], decay=decay)

"""Heads whose weights are masked, and heads that are trained with a penalty instead of masks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fallow
from fallow.errors import ArgumentError, UsageError
from fallow.explaining import explain_head
from fallow.noise import drop_connect_
from fallow.penalties import HeadPenalty
from fallow.schemes import Blocks, FixedSize, Layer, Units

RATE = 0.7


def net(width: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Identity(), nn.Linear(width, 3)).double()


def batch(kind: str, rows: int = 12) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, 4, dtype=torch.float64)
    return x, torch.randint(0, 3, (rows,)) if kind == "cross_entropy" else torch.randn(rows, 3).double()


LOSSES = {"quadratic": F.mse_loss, "cross_entropy": F.cross_entropy}


# --- DropConnect -------------------------------------------------------------------------------------------


@torch.no_grad()
def over_weight_masks(model: nn.Sequential, x: Tensor, loss) -> float:
    """The mean of the loss over all masks of the head's weights."""
    features, head = model[:3](x), model[3]
    count, total = head.weight.numel(), 0.0
    numbers = torch.arange(2**count)
    for chunk in numbers.split(512):
        kept = (chunk[:, None] >> torch.arange(count) & 1).double()
        chance = RATE ** kept.sum(1) * (1 - RATE) ** (count - kept.sum(1))
        weights = head.weight * kept.view(-1, *head.weight.shape) / RATE
        outputs = torch.einsum("nd,mcd->mnc", features, weights) + head.bias
        total += sum(float(c) * float(loss(z)) for c, z in zip(chance, outputs, strict=True))
    return total


def test_masks_of_weights_are_found_beside_those_of_the_bias():
    model, (x, y) = net(width=3), batch("quadratic")
    drop_connect_(model[3], survival_rate=0.9, names="bias")
    with pytest.raises(UsageError, match="no noise feeds 3 directly"):
        explain_head(model, LOSSES["quadratic"], [(x, y)], draws=2)
    drop_connect_(model[3], survival_rate=RATE)
    found = explain_head(model, LOSSES["quadratic"], [(x, y)], draws=2)
    assert (found.source, found.scheme) == ("3 (DropConnect)", str(Units(RATE)))


@pytest.mark.parametrize("kind", LOSSES)
def test_masks_of_weights_have_their_own_penalty(kind):
    model, (x, y) = net(width=3), batch(kind)
    drop_connect_(model[3], survival_rate=RATE)
    found = explain_head(model, LOSSES[kind], [(x, y)], draws=4000)
    assert (found.source, found.scheme) == ("3 (DropConnect)", str(Units(RATE)))
    penalty = over_weight_masks(model, x, lambda z: LOSSES[kind](z, y)) - found.loss
    assert abs(found.monte_carlo - penalty) < 5 * found.monte_carlo_error < 0.5 * penalty
    if kind == "quadratic":
        assert found.exact == pytest.approx(penalty, rel=1e-12)
        assert found.optimum is not None
    else:
        assert found.quadratic == pytest.approx(penalty, rel=0.1)
        assert found.jensen is None


def test_under_squared_error_it_is_dropout_and_under_cross_entropy_it_is_not():
    model, other = net(), net()
    other.load_state_dict(model.state_dict())
    drop_connect_(model[3], survival_rate=RATE)
    other[2] = nn.Dropout(1 - RATE)
    for kind, loss in LOSSES.items():
        data = [batch(kind)]
        weights, units = explain_head(model, loss, data), explain_head(other, loss, data)
        assert weights.exact == units.exact and weights.optimum == units.optimum
        assert (weights.quadratic == units.quadratic) == (kind == "quadratic")


@pytest.mark.parametrize("mode", ["batch", "row"])
def test_the_handle_stays_on_the_head_and_its_rate_is_the_one_in_force(mode):
    model, data = net(), [batch("quadratic")]
    handle = drop_connect_(model[3], survival_rate=RATE, mode=mode)
    first = explain_head(model, F.mse_loss, data)
    handle.survival_rate = 0.4
    second = explain_head(model, F.mse_loss, data)
    assert second.exact == pytest.approx(first.exact * (0.6 / 0.4) / (0.3 / 0.7), rel=1e-9)
    handle.survival_rate = 1.0
    with pytest.raises(UsageError, match="no noise feeds 3 directly"):
        explain_head(model, F.mse_loss, data)
    handle.survival_rate = RATE
    torch.manual_seed(0)
    one = model.train()(data[0][0])
    assert not torch.equal(one, model(data[0][0]))  # it still drops


def test_two_noises_of_one_head_are_refused():
    model, data = net(), [batch("quadratic")]
    model[2] = nn.Dropout(0.5)
    drop_connect_(model[3], survival_rate=RATE)
    with pytest.raises(UsageError, match=r"both 2 \(Dropout\) and 3 \(DropConnect\) are noise of 3"):
        explain_head(model, F.mse_loss, data)
    assert explain_head(model, F.mse_loss, data, scheme=Units(0.5)).source == "asked for"


# --- HeadPenalty -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [Units(RATE), Blocks(0.5, 3), FixedSize(4), Layer(0.8)], ids=str)
@pytest.mark.parametrize("kind", LOSSES)
def test_the_deterministic_term_stands_beside_what_sampling_would_add(kind, scheme):
    model, (x, y) = net(), batch(kind)
    penalty = HeadPenalty(model, "3", scheme, loss="squared" if kind == "quadratic" else kind)
    found = explain_head(model, LOSSES[kind], [(x, y)], head=penalty, draws=400)
    assert (found.name, found.scheme, found.source) == ("3", str(scheme), "its HeadPenalty")
    model.train()(x)
    term = float(penalty.penalty().detach())
    assert (found.exact if kind == "quadratic" else found.quadratic) == pytest.approx(term, rel=1e-9)
    tolerance = 5 * found.monte_carlo_error + (0 if kind == "quadratic" else 0.15 * term)
    assert abs(found.monte_carlo - term) < tolerance
    assert any("draws no masks (HeadPenalty)" in note for note in found.notes)
    sampled = copy.deepcopy(model)
    same = explain_head(sampled, LOSSES[kind], [(x, y)], head="3", scheme=scheme, draws=400)
    assert same.monte_carlo == found.monte_carlo


def test_the_bound_is_the_term_that_the_bound_adds():
    model, (x, y) = net(), batch("cross_entropy")
    penalty = HeadPenalty(model, "3", Blocks(0.8, 2), loss="cross_entropy", surrogate="bound")
    found = explain_head(model, F.cross_entropy, [(x, y)], head=penalty, draws=2)
    model.train()(x)
    assert found.jensen == pytest.approx(float(penalty.penalty(y).detach()), rel=1e-9)
    assert any("training adds the Jensen bound" in note for note in found.notes)
    other = explain_head(model, F.mse_loss, [batch("quadratic")], head=penalty, draws=2)
    assert any("made for cross-entropy, which this loss is not" in note for note in other.notes)


def test_a_deep_net_trained_with_it_comes_near_the_minimum_of_sampling():
    x, y = torch.randn(16, 4, dtype=torch.float64), torch.randn(16, 3, dtype=torch.float64)
    model = nn.Sequential(
        nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 12, bias=False), nn.Linear(12, 3)
    ).double()
    penalty = HeadPenalty(model, "3", Blocks(0.7, 2))
    before = fallow.explain(model, F.mse_loss, [(x, y)], head=penalty, draws=64).head
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=1500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y) + penalty.penalty()
        loss.backward()
        return loss

    optimizer.step(closure)
    after = fallow.explain(model, F.mse_loss, [(x, y)], head=penalty, draws=64).head
    assert before.optimum.above > 1 and after.optimum.above < 0.01
    assert after.optimum.minimum == pytest.approx(before.optimum.minimum, rel=1e-9)
    assert abs(after.exact - after.monte_carlo) < 5 * after.monte_carlo_error
    best = after.optimum
    assert best.spectrum[:3] == pytest.approx(best.optimal_spectrum[:3], rel=0.05)


def test_a_forward_that_waits_for_its_penalty_still_has_it_afterwards():
    model, (x, y) = net(), batch("quadratic")
    penalty = HeadPenalty(model, "3", Units(RATE))
    model.train()(x)
    found = explain_head(model, F.mse_loss, [(x, y)], head=penalty, draws=2)
    assert float(penalty.penalty().detach()) == pytest.approx(found.exact, rel=1e-9)


def test_what_is_no_head_of_this_model_is_refused():
    model, data = net(), [batch("quadratic")]
    penalty = HeadPenalty(model, "3", Units(RATE))
    with pytest.raises(UsageError, match="of another model"):
        explain_head(net(), F.mse_loss, data, head=penalty)
    with pytest.raises(UsageError, match="has a scheme of its own"):
        explain_head(model, F.mse_loss, data, head=penalty, scheme=Units(0.5))
    with pytest.raises(ArgumentError, match="name of an nn.Linear or a HeadPenalty, got 3"):
        explain_head(model, F.mse_loss, data, head=3)
    with pytest.raises(ArgumentError, match="one of fallow.schemes, got 0.5"):
        explain_head(model, F.mse_loss, data, scheme=0.5)

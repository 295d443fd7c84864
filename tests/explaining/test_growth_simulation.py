"""Growth simulated in random networks beside its theory and beside autograd."""

import json
import math
import random

import pytest
import torch
from growth_cases import linear
from torch.nn import functional as F

from fallow.errors import UsageError
from fallow.explaining import growth_simulation
from fallow.explaining.growth import growth_theory
from fallow.explaining.growth_simulation import simulate_growth
from fallow.explaining.random_networks import draw_masks, toy_weights


def test_exact_masks_have_their_marginals_and_one_size():
    rates = [0.9, 0.25, 0.6, 1.0, 0.5]  # sums to 3.25
    masks = draw_masks(rates, 4000, torch.Generator().manual_seed(0), "exact").double()
    assert set(masks.sum(1).tolist()) == {3.0, 4.0}
    errors = torch.tensor([math.sqrt(p * (1 - p) / 4000) for p in rates])
    assert ((masks.mean(0) - torch.tensor(rates)).abs() <= 5 * errors + 1e-12).all()


def test_factors_at_width_512_are_within_five_per_cent_of_theory():
    found = simulate_growth(linear(6, 0.4), width=512, draws=24, masks=128)
    for side in ("forward", "backward"):
        measured, theory = getattr(found, side), getattr(found.theory, side)
        assert measured.factors == pytest.approx(theory.factors, rel=0.05)
        gaps = zip(measured.factors, theory.factors, measured.errors, strict=True)
        assert all(abs(a - b) < 5 * e for a, b, e in gaps)


def test_growth_of_each_mask_is_two_to_the_number_of_kept_blocks():
    found = simulate_growth([0.5] * 16, width=256, draws=16, masks=128)
    for side in (found.backward, found.forward):
        assert side.slope == pytest.approx(1, abs=0.05)
        assert side.log2_median == pytest.approx(8, abs=0.4)
        assert side.log2_spread == pytest.approx(2, abs=0.15)  # sqrt(V) = 2


def test_masks_of_fixed_size_take_the_spread_away():
    found = simulate_growth([0.5] * 16, sampler="exact", width=256, draws=16, masks=64)
    assert found.backward.log2_spread < 0.5
    assert found.backward.log2_mean == pytest.approx(8, abs=0.3)
    assert found.theory.weights is None and found.backward.slope is None


def test_inverted_scaling_grows_faster_than_no_noise_and_plain_gates_slower():
    train, test, none = (
        simulate_growth([p] * 10, scale=scale, width=256, draws=12, masks=128)
        for p, scale in ((0.75, "train"), (0.75, "eval"), (1.0, "eval"))
    )
    for side in ("forward", "backward"):
        grown_by = [getattr(x, side).log2_mean for x in (test, none, train)]
        assert grown_by == sorted(grown_by)
        theory = [getattr(x.theory, side).log2_mean for x in (test, none, train)]
        assert grown_by == pytest.approx(theory, abs=0.5)
        assert theory == sorted(theory)


def test_scaled_networks_stay_below_e():
    found = simulate_growth([0.7] * 20, kind="scaled", width=256, draws=16, masks=64)
    for side in ("forward", "backward"):
        assert getattr(found, side).log2_mean == pytest.approx(
            getattr(found.theory, side).log2_mean, abs=0.15
        )
    assert 2**found.theory.backward.log2_mean < math.exp(0.7)


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_batchnorm_networks_grow_by_the_power_law(rate):
    found = simulate_growth([rate] * 12, kind="batchnorm", width=128, draws=8, masks=16, rows=64)
    for side in ("forward", "backward"):
        measured, theory = getattr(found, side), getattr(found.theory, side)
        assert 2**measured.log2_mean == pytest.approx(2**theory.log2_mean, rel=0.15)
    if rate == 1:
        assert found.weights == pytest.approx(found.theory.weights, rel=0.15)


def test_squared_norms_are_those_of_autograd():
    generator = torch.Generator().manual_seed(0)
    start, end = torch.randn(2, 1, 5, 7, generator=generator, dtype=torch.float64)
    gates = torch.tensor([[1.0, 0.0, 2.0], [1.0, 1.0, 0.5]], dtype=torch.float64)
    for kind in ("vanilla", "batchnorm"):
        weights = toy_weights(3, 7, 2.0, generator, start)
        forward, backward, by_weight = growth_simulation._norms(start, end, gates, weights, kind)
        for i, gate in enumerate(gates):
            own = [w.clone().requires_grad_() for w in weights]
            y, seen = start[0].clone().requires_grad_(), []
            for g, w in zip(gate, own, strict=True):
                seen.append(y)
                x = F.batch_norm(y, None, None, training=True) if kind == "batchnorm" else y
                y = y + g * F.relu(x) @ w.T
            seen.append(y)
            grads = torch.autograd.grad((y * end[0]).sum(), [*seen, *own])
            assert torch.allclose(forward[i], torch.stack([t.square().sum() for t in seen]))
            assert torch.allclose(backward[i], torch.stack([t.square().sum() for t in grads[:4]]))
            # `_norms` leaves out the gate, which multiplies the weight's gradient
            by_autograd = torch.stack([t.square().sum() for t in grads[4:]])
            assert torch.allclose(by_weight[i] * gate.square(), by_autograd)


def test_simulations_are_reproducible_and_leave_generators_alone():
    state, python = torch.get_rng_state(), random.getstate()
    one = simulate_growth([0.5] * 3, width=16, draws=2, masks=8)
    assert one == simulate_growth([0.5] * 3, width=16, draws=2, masks=8)
    assert one.backward != simulate_growth([0.5] * 3, width=16, draws=2, masks=8, seed=1).backward
    assert torch.equal(state, torch.get_rng_state())
    assert python == random.getstate()


def test_results_are_plain_numbers_and_tables():
    found = simulate_growth({"a": 0.5, "b": 0.9}, width=16, draws=2, masks=8)
    assert json.loads(json.dumps(found.as_dict()))["theory"]["rates"] == [0.5, 0.9]
    assert "theory" in str(found) and "0.9000" in str(found)
    assert json.loads(json.dumps(growth_theory([0.5]).as_dict()))["scale"] == "eval"


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: simulate_growth([0.5], draws=1), UsageError, "draws must be an integer of at least 2"),
        (lambda: simulate_growth([0.5], rows=8), UsageError, "rows must be 1 without BatchNorm, got 8"),
        (lambda: simulate_growth([0.5], kind="batchnorm", rows=1), UsageError, "rows must be an integer"),
    ],
)
def test_bad_input_is_refused_in_words(call, error, words):
    with pytest.raises(error, match=words.replace("(", r"\(")):
        call()

"""Growth of signals: theory by enumeration of masks, simulation by theory, measurement by autograd."""

import itertools
import json
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import fallow
from fallow.errors import ArgumentError, RateError, RunError, SiteError, UsageError
from fallow.explaining import growth
from fallow.explaining.growth import growth_theory, signal_growth, simulate_growth

RATES = [0.9, 0.35, 0.7, 0.5, 1.0, 0.2, 0.8]
KINDS = ["vanilla", "scaled", "batchnorm"]


def linear(depth: int, last: float) -> list[float]:
    return [1 - (i + 1) / depth * (1 - last) for i in range(depth)]


# --- theory ----------------------------------------------------------------------------------------------


def every_mask(rates):
    for mask in itertools.product([False, True], repeat=len(rates)):
        yield mask, math.prod(p if on else 1 - p for p, on in zip(rates, mask, strict=True))


def grown(gates, kind, direction):
    """Second moments behind each block, from the network's recursion; gates are numbers."""
    s2 = 1 / len(gates) if kind == "scaled" else 1.0
    total, variance, growth_so_far, seen = 1.0, 1.0, 1.0, []
    for gate in gates:
        if kind != "batchnorm":
            ratio = 1 + s2 * gate**2  # He's gain: E (W relu(y))^2 = E y^2
        elif direction == "forward":
            ratio = (total + gate**2) / total
        else:
            ratio = 1 + gate**2 / variance
        total += gate**2
        variance += gate**2 * (1 - 1 / math.pi)  # relu of a standard normal has mean square 1/2, mean^2 1/2pi
        growth_so_far *= ratio
        seen.append(ratio)
    return growth_so_far, seen


@pytest.mark.parametrize("scale", ["eval", "train"])
@pytest.mark.parametrize("kind", KINDS)
def test_growth_is_that_of_all_masks_enumerated(kind, scale):
    theory = growth_theory(RATES, kind=kind, scale=scale)
    for direction in ("forward", "backward"):
        side = getattr(theory, direction)
        mean, typical, square, factors = 0.0, 0.0, 0.0, [0.0] * len(RATES)
        for mask, chance in every_mask(RATES):
            gates = [on / (p if scale == "train" else 1) for on, p in zip(mask, RATES, strict=True)]
            whole, ratios = grown(gates, kind, direction)
            log2 = growth.quenched_growth(mask, RATES, kind=kind, scale=scale, direction=direction)
            assert math.isclose(2**log2, whole)
            mean += chance * whole
            typical += chance * math.log2(whole)
            square += chance * math.log2(whole) ** 2
            factors = [f + chance * r for f, r in zip(factors, ratios, strict=True)]
        assert side.factors == pytest.approx(factors, rel=1e-9)
        assert 2**side.log2_mean == pytest.approx(mean, rel=1e-9)
        assert side.log2_typical == pytest.approx(typical, rel=1e-9)
        if side.log2_spread is not None:
            assert side.log2_spread == pytest.approx(math.sqrt(square - typical**2), rel=1e-9)
        assert (side.log2_spread is None) == (kind == "batchnorm")
        assert 2**side.log2_dense == pytest.approx(grown([1.0] * len(RATES), kind, direction)[0])
        test = RATES if scale == "eval" else [1.0] * len(RATES)
        assert 2**side.log2_test == pytest.approx(grown(test, kind, direction)[0])


def test_merging_states_of_a_deep_batchnorm_net_changes_next_to_nothing(monkeypatch):
    rates = linear(12, 0.3)  # 4096 different sums of 1 / p^2
    exact, merged = [], []
    for states, found in ((1 << 20, exact), (100, merged)):
        monkeypatch.setattr(growth, "_STATES", states)
        side = growth_theory(rates, kind="batchnorm", scale="train").backward
        found += [side.log2_mean, side.log2_typical, *side.factors]
    assert merged != exact
    assert merged == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rates", [[0.5] * 7, [0.9, 0.4, 0.7, 0.5, 0.6]])
def test_masks_of_fixed_size_grow_by_their_number_alone(kind, rates):
    side = growth_theory(rates, kind=kind, sampler="exact").backward
    low = math.floor(sum(rates) + 1e-9)
    part = sum(rates) - low
    both = [grown([1.0] * n + [0.0] * (len(rates) - n), kind, "backward")[0] for n in (low, low + 1)]
    if kind == "scaled":  # there the recursion above knows the depth by the number of gates
        both = [(1 + 1 / len(rates)) ** n for n in (low, low + 1)]
    assert 2**side.log2_mean == pytest.approx((1 - part) * both[0] + part * both[1])
    log = math.log2(both[1] / both[0])
    assert side.log2_spread == pytest.approx(math.sqrt(part * (1 - part)) * log, abs=1e-7)


def test_masks_of_fixed_size_under_inverted_scaling_need_equal_rates():
    assert growth_theory([0.5, 0.6], scale="train", sampler="exact").backward.log2_mean is None
    assert growth_theory([0.5, 0.5], scale="train", sampler="exact").rate == pytest.approx(math.sqrt(5))


@given(st.lists(st.floats(0.05, 1), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_equal_rates_have_the_largest_mean_growth_and_all_rules_the_same_typical_one(rates):
    side = growth_theory(rates).backward
    r = sum(rates) / len(rates)
    assert side.log2_typical == pytest.approx(sum(rates))
    assert side.log2_typical <= side.log2_mean + 1e-9
    assert side.log2_mean <= len(rates) * math.log2(1 + r) + 1e-9
    assert growth_theory(rates, scale="train").backward.log2_mean >= side.log2_dense - 1e-9


def test_very_deep_networks_do_not_overflow():
    side = growth_theory([0.1] * 3000, scale="train").backward
    assert side.log2_mean == pytest.approx(3000 * math.log2(11))
    assert growth_theory([0.5] * 3000).weights[0] == math.inf
    assert "2^" in str(growth_theory([0.1] * 3000, scale="train"))


def test_batchnorm_makes_a_power_law_of_the_exponential():
    deep = [growth_theory([1.0] * n, kind="batchnorm").backward.log2_dense for n in (200, 1600)]
    assert (deep[1] - deep[0]) / 3 == pytest.approx(math.pi / (math.pi - 1), rel=0.01)


@pytest.mark.parametrize("mean", [0.5, 0.75, 0.9])
def test_the_linear_limit_is_the_integral_and_deep_nets_tend_to_it(mean):
    steps = 2000
    nodes = [2 * mean - 1 + (2 - 2 * mean) * (i + 0.5) / steps for i in range(steps)]
    limit = growth.linear_rate_limit(mean)
    assert limit == pytest.approx(math.exp(sum(map(math.log1p, nodes)) / steps), rel=1e-6)
    gaps = []
    for depth in (100, 200):
        last = 1 - 2 * depth * (1 - mean) / (depth + 1)
        gaps.append(abs(growth_theory(linear(depth, last)).rate - limit))
    assert gaps[1] < 0.6 * gaps[0] < 0.01
    assert growth.linear_rate_limit(1.0) == 2.0
    with pytest.raises(RateError, match="at least 1/2, got 0.4"):
        growth.linear_rate_limit(0.4)


@pytest.mark.parametrize("kind", ["vanilla", "scaled"])
@pytest.mark.parametrize("scale", ["eval", "train"])
def test_weight_gradients_are_signal_times_gradient(kind, scale):
    s2 = 1 / len(RATES) if kind == "scaled" else 1.0
    expected = [0.0] * len(RATES)
    for mask, chance in every_mask(RATES):
        gates = [on / (p if scale == "train" else 1) for on, p in zip(mask, RATES, strict=True)]
        for i, gate in enumerate(gates):
            before = math.prod(1 + s2 * g**2 for g in gates[:i])
            behind = math.prod(1 + s2 * g**2 for g in gates[i + 1 :])
            expected[i] += chance * s2 * gate**2 * behind * before / 2
    assert growth.weight_profile(RATES, kind=kind, scale=scale) == pytest.approx(expected)


def test_weight_gradients_are_flat_in_depth_for_equal_rates():
    profile = growth.weight_profile([0.6] * 9)
    assert max(profile) == pytest.approx(min(profile))


def test_leave_one_out_weights_fall_from_one_to_their_limit():
    weights = growth.leave_one_out_weights(300)
    assert weights[-1] == pytest.approx(1)
    assert all(a < b for a, b in itertools.pairwise(weights[-30:]))
    assert weights[0] == pytest.approx(3 - 2 * math.sqrt(2), rel=0.05)
    assert weights[0] > 3 - 2 * math.sqrt(2)
    assert all(abs(c - 1) < 0.1 for c in growth.leave_one_out_weights(50, strength=1 / 50))


def test_leave_one_out_weights_agree_with_random_networks():
    depth, width, draws = 4, 256, 60
    generator = torch.Generator().manual_seed(0)
    found = []
    gates = torch.cat([torch.ones(1, depth), 1 - torch.eye(depth)])
    for _ in range(draws):
        start = torch.randn(1, 1, width, generator=generator)
        weights = growth.toy_weights(depth, width, 2.0, generator, start)
        out = growth.toy_forward(start.expand(depth + 1, -1, -1), gates, weights)[0][-1][:, 0]
        found.append((out[:1] - out[1:]).square().sum(1) / (start.square().sum() * 2 ** (depth - 1)))
    values = torch.stack(found)
    theory = torch.tensor(growth.leave_one_out_weights(depth))
    assert ((values.mean(0) - theory).abs() < 5 * values.std(0) / math.sqrt(draws)).all()
    assert (values.std(0) / math.sqrt(draws) < 0.06 * theory).all()


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=20), st.floats(0.02, 1))
@settings(max_examples=100, deadline=None)
def test_the_strongest_rates_meet_the_mean_and_no_exchange_improves_them(weights, mean):
    rates = growth.strongest_rates(weights, mean)
    assert sum(rates) / len(rates) == pytest.approx(mean, abs=1e-12)
    assert all(0 <= p <= 1 for p in rates)
    slopes = [w * (1 - 2 * p) for w, p in zip(weights, rates, strict=True)]
    for i, j in itertools.permutations(range(len(rates)), 2):
        if rates[i] < 1 and rates[j] > 0:  # some of j's rate could go to i
            assert slopes[i] <= slopes[j] + 1e-9 * max(weights)


@pytest.mark.parametrize("mean", [0.2, 0.5, 0.8])
def test_the_strongest_rates_are_the_numerical_optimum(mean):
    optimize = pytest.importorskip("scipy.optimize")
    weights = growth.leave_one_out_weights(10)
    result = optimize.minimize(
        lambda p: -sum(w * x * (1 - x) for w, x in zip(weights, p, strict=True)),
        [mean] * 10,
        bounds=[(0, 1)] * 10,
        constraints={"type": "eq", "fun": lambda p: sum(p) - 10 * mean},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert growth.strongest_rates(weights, mean) == pytest.approx(list(result.x), abs=1e-5)


def test_early_blocks_get_high_rates_at_large_means_and_low_ones_at_small_means():
    weights = growth.leave_one_out_weights(12)
    high, low = growth.strongest_rates(weights, 0.8), growth.strongest_rates(weights, 0.2)
    assert list(high) == sorted(high, reverse=True)
    assert list(low) == sorted(low)
    assert high[0] > 0.8 > high[-1]
    assert growth.strongest_rates([2.0] * 3, 0.3) == pytest.approx([0.3] * 3)


@pytest.mark.parametrize("scale", ["eval", "train"])
def test_noise_mass_is_the_variance_of_the_gates_summed(scale):
    values = [
        (sum(on / (p if scale == "train" else 1) for on, p in zip(mask, RATES, strict=True)), chance)
        for mask, chance in every_mask(RATES)
    ]
    mean = sum(v * c for v, c in values)
    expected = sum((v - mean) ** 2 * c for v, c in values)
    assert growth.noise_mass(RATES, scale=scale) == pytest.approx(expected)


def test_noise_mass_of_the_linear_rule_tends_to_its_closed_form():
    for r in (0.5, 0.75, 0.9):
        rates = linear(4000, 1 - 2 * 4000 * (1 - r) / 4001)
        assert growth.noise_mass(rates) / 4000 == pytest.approx((1 - r) * (4 * r - 1) / 3, abs=1e-3)


def two_replicas(rates, h):
    """Mean over all pairs of masks of the covariance of the two outputs at infinite width."""
    mean = 0.0
    for one, chance in every_mask(rates):
        for two, other in every_mask(rates):
            q = r = c = 1.0
            for a, b in zip(one, two, strict=True):
                if a and b:
                    norm = math.sqrt(q * r)
                    c += h * norm * growth.arc_cosine(c / norm)
                q, r = q * (1 + h * a), r * (1 + h * b)
            mean += chance * other * c
    return mean


def test_the_recursion_of_the_noise_is_close_to_all_pairs_of_masks_where_blocks_are_small():
    rates = [0.9, 0.3, 0.7, 0.5, 0.8]
    scaled = growth.noise_variance(rates)
    assert scaled.total == pytest.approx(math.prod(1 + p / 5 for p in rates))
    exact = scaled.total - two_replicas(rates, 1 / 5)
    assert scaled.noise == pytest.approx(exact, rel=0.01)
    vanilla = growth.noise_variance(rates, kind="vanilla")
    gap = abs(vanilla.noise / (vanilla.total - two_replicas(rates, 1.0)) - 1)
    assert 1e-3 < gap < 0.05  # an approximation, as its docstring says


@pytest.mark.parametrize("scale", ["eval", "train"])
def test_the_recursion_of_the_noise_agrees_with_random_networks(scale):
    rates, width, masks, draws = linear(10, 0.4), 128, 256, 40
    generator = torch.Generator().manual_seed(1)
    divisor = torch.tensor(rates if scale == "train" else [1.0] * 10)
    found = []
    for _ in range(draws):
        start = torch.randn(1, 1, width, generator=generator)
        weights = growth.toy_weights(10, width, 2.0, generator, start)
        gates = growth.draw_masks(rates, masks, generator) / divisor
        out = growth.toy_forward(start.expand(masks, -1, -1), gates, weights, "scaled")[0][-1]
        found.append(out.var(0).mean() / start.square().mean())
    values = torch.stack(found)
    error = float(values.std()) / math.sqrt(draws)
    theory = growth.noise_variance(rates, scale=scale).noise
    assert abs(float(values.mean()) - theory) < 5 * error
    assert error < 0.06 * theory


@pytest.mark.parametrize("scale", ["eval", "train"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_mismatch_of_training_and_evaluation_is_that_of_the_forward_growth(kind, scale):
    train, test = growth.train_test_mismatch(RATES, kind=kind, scale=scale)
    side = growth_theory(RATES, kind=kind, scale=scale).forward
    assert test == pytest.approx(2**side.log2_test)
    assert train == pytest.approx(2**side.log2_mean)


# --- simulation ------------------------------------------------------------------------------------------


def test_exact_masks_have_their_marginals_and_one_size():
    rates = [0.9, 0.25, 0.6, 1.0, 0.5]  # sums to 3.25
    masks = growth.draw_masks(rates, 4000, torch.Generator().manual_seed(0), "exact").double()
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
        weights = growth.toy_weights(3, 7, 2.0, generator, start)
        forward, backward, by_weight = growth._norms(start, end, gates, weights, kind)
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
        (lambda: growth_theory([]), UsageError, "rates is empty"),
        (lambda: growth_theory([0.5, 1.5]), RateError, "block 2: survival_rate must be in"),
        (lambda: growth_theory([0.5], kind="plain"), UsageError, 'kind must be "vanilla", "scaled"'),
        (lambda: growth_theory([0.5], scale="test"), UsageError, 'scale must be "eval" or "train"'),
        (lambda: growth_theory([0.5], sampler="fixed"), UsageError, 'sampler must be "bernoulli" or "exact"'),
        (lambda: growth_theory([0.5], gain=0), UsageError, "gain must be a positive number, got 0"),
        (lambda: growth.quenched_growth([True], [0.5, 0.5]), UsageError, "each of the 2 rates, got 1"),
        (lambda: growth.leave_one_out_weights(3, strength=0), UsageError, "strength must be a positive"),
        (lambda: growth.strongest_rates([1, -1], 0.5), UsageError, "weights must be positive"),
        (lambda: growth.strongest_rates([1, 1], 0), RateError, "mean must be in"),
        (lambda: growth.noise_variance([0.5], kind="batchnorm"), UsageError, "BatchNorm mixes the rows"),
        (lambda: simulate_growth([0.5], draws=1), UsageError, "draws must be an integer of at least 2"),
        (lambda: simulate_growth([0.5], rows=8), UsageError, "rows must be 1 without BatchNorm, got 8"),
        (lambda: simulate_growth([0.5], kind="batchnorm", rows=1), UsageError, "rows must be an integer"),
    ],
)
def test_bad_input_is_refused_in_words(call, error, words):
    with pytest.raises(error, match=words.replace("(", r"\(")):
        call()


# --- on a model ------------------------------------------------------------------------------------------


class Toy(nn.Module):
    """A residual net of dense relu blocks with He's gain."""

    def __init__(self, depth: int, width: int = 48, kind: str = "vanilla", in_place: bool = False) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, width), nn.Linear(width, 3)
        self.post = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(depth)) if kind == "post" else None
        norms = [[nn.BatchNorm1d(width)] if kind == "batchnorm" else [] for _ in range(depth)]
        self.blocks = nn.ModuleList(
            nn.Sequential(*norm, nn.ReLU(), nn.Linear(width, width, bias=False)) for norm in norms
        )
        for block in self.blocks:
            nn.init.normal_(block[-1].weight, std=math.sqrt(2 / width))
        self.s, self.in_place = depth**-0.5 if kind == "scaled" else 1.0, in_place

    def forward(self, x):
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            if self.in_place:
                x = x.clone() if i else x
                z = self.s * block(x)
                x += z
            else:
                x = x + self.s * block(x)
            if self.post is not None:  # signals are held at one size, gradients are not
                x = 1.5 * self.post[i](x)
        return self.head(x)


def batch(rows: int = 16, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, generator=generator), torch.randint(0, 3, (rows,), generator=generator)


def sums_of(model, x, target, gates=None):
    """Sums of a `Toy` and the gradients there, by hand."""
    y = model.stem(x)
    seen = [y]
    for i, block in enumerate(model.blocks):
        gate = 1.0 if gates is None else gates[i]
        y = y + gate * model.s * block(y)
        seen.append(y)
    loss = F.cross_entropy(model.head(y), target)
    return seen, torch.autograd.grad(loss, seen)


def test_growth_without_noise_is_that_of_autograd_by_hand():
    model, data = Toy(5), [batch(16, 0), batch(8, 1)]
    forward, backward, rows = [0.0] * 6, [0.0] * 6, 0
    for x, target in data:
        seen, grads = sums_of(model, x, target)
        forward = [a + float(t.detach().square().sum()) for a, t in zip(forward, seen, strict=True)]
        backward = [a + float(g.square().sum()) for a, g in zip(backward, grads, strict=True)]
        rows += len(x)
    found = signal_growth(model, F.cross_entropy, data, rates=fallow.rates.uniform(1.0), draws=2)
    assert found.branches == tuple(f"blocks.{i}" for i in range(5))
    assert found.forward.dense == pytest.approx([b / a for a, b in itertools.pairwise(forward)], rel=1e-4)
    assert found.backward.dense == pytest.approx([a / b for a, b in itertools.pairwise(backward)], rel=1e-4)
    assert found.forward.dense_total == pytest.approx(forward[-1] / forward[0], rel=1e-4)
    assert found.backward.dense_total == pytest.approx(backward[0] / backward[-1], rel=1e-4)
    assert found.forward.noisy == pytest.approx(found.forward.dense, rel=1e-5)  # every rate is 1
    assert found.warnings == ()


@pytest.mark.parametrize("scale", ["eval", "train"])
def test_growth_with_noise_is_the_mean_over_all_masks(scale):
    model, (x, target) = Toy(3), batch()
    rates = {"blocks.0": 0.5, "blocks.1": 0.8, "blocks.2": 0.4}
    forward = [0.0] * 4
    for mask, chance in every_mask(list(rates.values())):
        gates = [on / (p if scale == "train" else 1) for on, p in zip(mask, rates.values(), strict=True)]
        seen, _ = sums_of(model, x, target, gates)
        forward = [a + chance * float(t.detach().square().mean()) for a, t in zip(forward, seen, strict=True)]
    found = signal_growth(model, F.cross_entropy, [(x, target)], rates=rates, scale=scale, draws=80)
    expected = [b / a for a, b in itertools.pairwise(forward)]
    for got, error, wanted in zip(found.forward.noisy, found.forward.errors, expected, strict=True):
        assert abs(got - wanted) < 5 * error
        assert error < 0.05 * wanted
    gap = abs(found.forward.noisy_total - forward[-1] / forward[0])
    assert gap < 5 * found.forward.total_error


@pytest.mark.parametrize(
    ("kind", "depth", "rate", "scale", "said"),
    [
        ("vanilla", 12, 0.9, "train", "faster"),
        ("vanilla", 12, 0.5, "train", "faster"),
        ("vanilla", 12, 0.5, "eval", None),
        ("vanilla", 12, 1.0, "train", None),
        ("scaled", 12, 0.5, "train", None),
        ("batchnorm", 8, 0.5, "train", None),
        ("batchnorm", 20, 0.9, "train", None),
        ("post", 12, 0.5, "train", None),
        ("vanilla", 5, 0.5, "train", "5 sites: stochastic depth mostly hurts"),
        ("scaled", 7, 0.9, "eval", "7 sites"),
        ("scaled", 8, 0.9, "eval", None),
        ("scaled", 3, 1.0, "train", None),
    ],
)
def test_warnings_appear_where_they_should_and_nowhere_else(kind, depth, rate, scale, said):
    rule = fallow.rates.uniform(rate)
    found = signal_growth(
        Toy(depth, 96, kind), F.cross_entropy, [batch(24)], rates=rule, scale=scale, draws=8
    )
    assert len(found.warnings) == (said is not None)
    assert all(said in text for text in found.warnings)
    if said == "faster":
        assert (
            f"{found.backward.noisy_total:.3g} against {found.backward.dense_total:.3g}" in found.warnings[0]
        )
        assert found.warnings[0] in str(found)


def test_only_growth_that_compounds_in_both_directions_is_warned_of():
    def side(*factors):
        whole = math.prod(factors)
        return growth.Measured(factors, (), (), whole, 3 * whole, 0.1, 1.0, 0.01)

    def said(forward, backward, scale="train"):
        return len(growth._warnings(9, [0.5] * 9, scale, forward, backward))

    doubling, flat = side(*[2.0] * 9), side(*[1.1] * 9)
    falling = side(4.0, 3.0, 2.5, 2.0, 1.7, 1.5, 1.4, 1.3, 1.25)  # behind norms, few blocks
    assert said(doubling, doubling) == 1
    assert said(doubling, doubling, "eval") == 0
    for other in (flat, falling):
        assert said(other, doubling) == said(doubling, other) == said(other, other) == 0


def test_every_batch_has_masks_of_its_own():
    model = Toy(3)
    one, two = (signal_growth(model, F.cross_entropy, [batch()] * n, draws=2) for n in (1, 2))
    assert one.forward.dense == pytest.approx(two.forward.dense)
    assert one.forward.noisy != pytest.approx(two.forward.noisy, rel=1e-6)
    again = signal_growth(model, F.cross_entropy, [batch()] * 9, draws=2, max_batches=1)
    assert again == one


def test_branches_that_give_zeros_are_named():
    model = Toy(9, kind="scaled")
    nn.init.zeros_(model.blocks[4][-1].weight)
    found = signal_growth(model, F.cross_entropy, [batch()], draws=2)
    assert found.silent == ("blocks.4",) and found.forward.dense[4] == found.forward.noisy[4] == 1
    assert [text[:9] for text in found.warnings] == ["blocks.4:"] and "this branch gives" in str(found)
    for block in model.blocks:
        nn.init.zeros_(block[-1].weight)
    found = signal_growth(model, F.cross_entropy, [batch()], draws=2)
    assert len(found.silent) == 9 and "and 6 more: these branches give" in found.warnings[0]


def test_a_part_of_the_sites_does_not_make_a_network_shallow():
    found = signal_growth(Toy(12, kind="scaled"), F.cross_entropy, [batch()], include="blocks.[0-3]", draws=2)
    assert len(found.branches) == 4 and found.warnings == ()


def test_the_model_is_left_as_it_was():
    model, (x, target) = Toy(4, kind="batchnorm"), batch()
    model.train()
    model.blocks[1].eval()
    F.cross_entropy(model(x), target).backward()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters()]
    flags, state = [m.training for m in model.modules()], torch.get_rng_state()
    one = signal_growth(model, F.cross_entropy, [(x, target)], draws=2)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert flags == [m.training for m in model.modules()]
    assert torch.equal(state, torch.get_rng_state()) and x.grad is None
    assert fallow.handle_of(model) is None
    assert one == signal_growth(model, F.cross_entropy, [(x, target)], draws=2)
    assert one != signal_growth(model, F.cross_entropy, [(x, target)], draws=2, seed=1)


def test_an_applied_model_is_measured_with_its_own_rates_and_scale():
    model, (x, target) = Toy(3), batch()
    handle = fallow.apply(model, {"blocks.1": 0.5}, example=x, scale="eval")
    found = signal_growth(model, F.cross_entropy, [(x, target)], draws=2)
    assert found.rates == (1.0, 0.5, 1.0) and found.scale == "eval"
    assert fallow.handle_of(model) is handle and handle.rates["blocks.1"] == 0.5
    handle.remove()
    assert signal_growth(model, F.cross_entropy, [(x, target)], draws=2).rates == pytest.approx(
        (5 / 6, 2 / 3, 0.5)
    )


def test_sums_in_place_are_measured_like_others():
    model, (x, target) = Toy(3), batch()
    plain = signal_growth(model, F.cross_entropy, [(x, target)], draws=3)
    model.in_place = True
    found = signal_growth(model, F.cross_entropy, [(x, target)], draws=3)
    assert found.forward.noisy == pytest.approx(plain.forward.noisy, rel=1e-4)
    assert found.backward.noisy[1:] == pytest.approx(plain.backward.noisy[1:], rel=1e-4)
    if found.backward.noisy[0] is not None:
        assert found.backward.noisy[0] == pytest.approx(plain.backward.noisy[0], rel=1e-4)


class Words(nn.Module):
    """Blocks over token ids, whose embedding asks for no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(3))

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return x.mean(1)


def test_a_frozen_model_of_token_ids_is_measured_from_its_first_sum_on():
    model = Words().requires_grad_(False)
    ids, target = torch.randint(0, 11, (6, 5)), torch.zeros(6, dtype=torch.long)
    found = signal_growth(model, F.cross_entropy, [(ids, target)], draws=2)
    assert found.backward.dense[0] is None and None not in found.backward.dense[1:]
    assert math.prod(found.backward.dense[1:]) == pytest.approx(found.backward.dense_total)
    assert math.prod(found.forward.dense) == pytest.approx(found.forward.dense_total)
    json.dumps(found.as_dict())
    assert " - " in str(found)
    open_ = signal_growth(Words(), F.cross_entropy, [(ids, target)], draws=2)
    assert None not in open_.backward.dense


class Cut(Toy):
    def forward(self, x):
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            x = x + block(x.detach() if i == 2 else x)
            x = x.detach() if i == 1 else x
        return self.head(x)


def zero_head():
    model = Toy(3)
    nn.init.zeros_(model.head.weight)
    return model


def silent_stem():
    model = Toy(3, kind="batchnorm")
    nn.init.zeros_(model.stem.weight)
    nn.init.zeros_(model.stem.bias)
    nn.init.ones_(model.blocks[0][0].bias)
    return model


def huge():
    model = Toy(3)
    nn.init.constant_(model.stem.weight, 1e20)
    return model


@pytest.mark.parametrize(
    ("make", "loss_fn", "data", "options", "error", "words"),
    [
        (lambda: Cut(4), F.cross_entropy, [batch()], {}, SiteError, "blocks.0: no gradient reaches"),
        (zero_head, F.cross_entropy, [batch()], {}, SiteError, "blocks.0: a gradient of zero"),
        (huge, lambda o, t: o.tanh().sum(), [batch()], {}, RunError, "sum is inf"),
        (silent_stem, F.cross_entropy, [batch()], {}, RunError, "mean square of its"),
        (lambda: Toy(3), F.cross_entropy, [], {}, UsageError, "batches is empty"),
        (lambda: Toy(3), F.cross_entropy, batch()[0], {}, ArgumentError, "batches must be"),
        (lambda: Toy(3), lambda o, t: o, [batch()], {}, UsageError, "must return one number"),
        (lambda: Toy(3), lambda o, t: o.sum() * math.nan, [batch()], {}, RunError, "the loss is nan"),
        (lambda: Toy(3, kind="batchnorm"), F.cross_entropy, [batch(1)], {}, UsageError, "at least 2 rows"),
        (lambda: Toy(3), F.cross_entropy, [batch()], {"draws": 1}, UsageError, "draws must be an integer"),
        (lambda: Toy(3), F.cross_entropy, [batch()], {"scale": "no"}, UsageError, "scale must be"),
        (lambda: Toy(3), F.cross_entropy, [batch()], {"rates": {"block.0": 0.5}}, SiteError, "blocks.0"),
        (lambda: nn.Linear(6, 3), F.cross_entropy, [batch()], {}, SiteError, "no residual site"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_words(make, loss_fn, data, options, error, words):
    model = make()
    with pytest.raises(error, match=words):
        signal_growth(model, loss_fn, data, **options)
    assert fallow.handle_of(model) is None

"""The law over masks: statistics beside scipy's, networks beside the enumeration of their masks."""

import itertools
import json
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fallow
from fallow.errors import RateError, SiteError, UsageError
from fallow.explaining import gaussian
from fallow.explaining.gaussian import gaussian_limit, law_over_masks, simulate_law

LAWS = {
    "normal": lambda g, n: torch.randn(n, generator=g),
    "shifted": lambda g, n: 7 + 0.01 * torch.randn(n, generator=g),
    "exponential": lambda g, n: -torch.rand(n, generator=g).log(),
    "two points": lambda g, n: (torch.rand(n, generator=g) < 0.3).float(),
}


def drawn(name: str, n: int = 500, seed: int = 0) -> torch.Tensor:
    return LAWS[name](torch.Generator().manual_seed(seed), n)


def every_mask(rates):
    for mask in itertools.product([0.0, 1.0], repeat=len(rates)):
        yield mask, math.prod(p if on else 1 - p for p, on in zip(rates, mask, strict=True))


# --- statistics ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAWS)
def test_the_distance_is_that_of_scipy(name):
    stats = pytest.importorskip("scipy.stats")
    x = drawn(name).double()
    fitted = stats.kstest(x.numpy(), "norm", args=(float(x.mean()), float(x.std())))
    assert float(gaussian.ks_distance(x)) == pytest.approx(fitted.statistic, abs=1e-12)


@pytest.mark.parametrize("name", LAWS)
def test_the_kurtosis_is_that_of_scipy(name):
    stats = pytest.importorskip("scipy.stats")
    x = drawn(name).double()
    assert float(gaussian.excess_kurtosis(x)[0]) == pytest.approx(stats.kurtosis(x.numpy()), abs=1e-9)


@pytest.mark.parametrize("name", ["normal", "exponential"])
def test_the_error_of_the_kurtosis_is_the_spread_between_samples(name):
    x = drawn(name, 400 * 4000).reshape(4000, 400)
    values, errors = gaussian.excess_kurtosis(x)
    assert float(errors.square().mean().sqrt()) == pytest.approx(float(values.std()), rel=0.15)
    if name == "normal":
        assert float(errors.mean()) == pytest.approx(math.sqrt(24 / 4000), rel=0.1)


@pytest.mark.parametrize("name", LAWS)
def test_the_error_of_the_kurtosis_is_that_of_leaving_out_each_sample(name):
    x = drawn(name, 400).double()
    kept = ~torch.eye(400, dtype=torch.bool)
    without = torch.stack([gaussian.excess_kurtosis(x[row])[0][0] for row in kept])
    jackknife = math.sqrt(399 / 400 * float((without - without.mean()).square().sum()))
    assert float(gaussian.excess_kurtosis(x)[1]) == pytest.approx(jackknife, rel=1e-6)


@pytest.mark.parametrize(("n", "repeats"), [(40, 20000), (300, 10000), (2000, 2000)])
def test_five_per_cent_of_normal_samples_lie_beyond_the_level(n, repeats):
    x = torch.randn(n, repeats, generator=torch.Generator().manual_seed(n))
    share = float((gaussian.ks_distance(x) > gaussian.lilliefors_level(n)).double().mean())
    assert abs(share - 0.05) < 5 * math.sqrt(0.05 * 0.95 / repeats)


def test_the_level_of_fitted_laws_is_far_below_that_of_kolmogorov():
    assert gaussian.lilliefors_level(4096) == pytest.approx(0.0142, abs=5e-5)
    assert gaussian.lilliefors_level(4096) < 0.7 * 1.358 / 64


@given(st.floats(-100, 100), st.floats(0.01, 100))
@settings(max_examples=20, deadline=None)
def test_distance_and_kurtosis_do_not_depend_on_units(shift, scale):
    x = drawn("exponential", 100).double()
    assert float(gaussian.ks_distance(shift + scale * x)) == pytest.approx(float(gaussian.ks_distance(x)))
    assert float(gaussian.excess_kurtosis(shift + scale * x)[0]) == pytest.approx(
        float(gaussian.excess_kurtosis(x)[0]), rel=1e-6
    )


def test_a_law_holds_fit_histogram_and_summary():
    x = torch.stack([drawn("normal", 1000), 5 * drawn("exponential", 1000)], 1)
    law = gaussian_limit(x, predicted=[1.0, 5.0], bins=20)
    assert law.samples == 1000 and law.predicted == (1.0, 5.0)
    assert law.means == pytest.approx(x.double().mean(0).tolist())
    assert law.deviations == pytest.approx(x.double().std(0).tolist())
    assert sum(law.counts) == 2000 and sum(law.expected) == pytest.approx(2000)
    assert len(law.edges) == 21 and len(law.counts) == 20
    assert law.distance == pytest.approx(sum(law.distances) / 2)
    assert law.distances[0] < law.level < law.distances[1]
    assert law.counts[-1] > 10 * law.expected[-1]  # the exponential's tail is in the last bin
    assert json.loads(json.dumps(law.as_dict()))["excess_kurtosis"] == law.excess_kurtosis
    assert "1 of 2" in str(law) and "predicted" in str(law)


def test_the_histogram_counts_each_sample_in_its_bin():
    x = drawn("normal", 300).double()
    law = gaussian_limit(x, bins=8)
    z = ((x - x.mean()) / x.std()).tolist()
    bins = [min(max(math.ceil(v + 4) - 1, 0), 7) for v in z]
    assert list(law.counts) == [bins.count(i) for i in range(8)]


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        (torch.randn(19), "at least 20"),
        (torch.randn(30, 2, 2), "must have shape"),
        (torch.cat([torch.randn(30), torch.tensor([math.inf])]), "must be finite"),
        (torch.stack([torch.randn(30), torch.full((30,), 2.5)], 1), r"unit 1 does not vary .*2\.5"),
    ],
)
def test_samples_without_a_law_are_refused(samples, words):
    with pytest.raises(UsageError, match=words):
        gaussian_limit(samples)


# --- sums and covariances --------------------------------------------------------------------------------


def test_the_ratio_of_berry_and_esseen_is_that_of_the_moments():
    values, rates = [0.5, -2.0, 1.0, 0.3], [0.5, 0.9, 0.2, 1.0]
    third = sum(abs(a) ** 3 * (p * (1 - p) ** 3 + (1 - p) * p**3) for a, p in zip(values, rates, strict=True))
    second = sum(a**2 * (p * (1 - p) ** 2 + (1 - p) * p**2) for a, p in zip(values, rates, strict=True))
    ratio, bound = gaussian.berry_esseen(values, rates)
    assert ratio == pytest.approx(third / second**1.5)
    assert bound == 0.56 * ratio


@given(st.lists(st.tuples(st.floats(0.1, 3), st.floats(0.1, 0.9)), min_size=1, max_size=9))
@settings(max_examples=30, deadline=None)
def test_the_bound_holds_for_the_law_enumerated(pairs):
    values, rates = zip(*pairs, strict=True)
    variance = sum(a * a * p * (1 - p) for a, p in pairs)
    atoms: dict[float, float] = {}
    for mask, chance in every_mask(rates):
        x = sum(a * (on - p) for a, p, on in zip(values, rates, mask, strict=True)) / math.sqrt(variance)
        atoms[round(x, 9)] = atoms.get(round(x, 9), 0.0) + chance
    below, distance = 0.0, 0.0
    for x in sorted(atoms):
        normal = 0.5 * math.erfc(-x / math.sqrt(2))
        distance = max(distance, abs(normal - below), abs(normal - below - atoms[x]))
        below += atoms[x]
    assert distance <= gaussian.berry_esseen(values, rates)[1]


def test_the_ratio_falls_with_depth_and_needs_noise():
    ratios = [gaussian.berry_esseen([depth**-0.5] * depth, [0.7] * depth)[0] for depth in (10, 40, 160)]
    assert ratios[0] == pytest.approx(2 * ratios[1]) and ratios[1] == pytest.approx(2 * ratios[2])
    with pytest.raises(UsageError, match="does not vary"):
        gaussian.berry_esseen([1.0, 0.0], [1.0, 0.5])
    with pytest.raises(UsageError, match="each of the 2 rates"):
        gaussian.berry_esseen([1.0], [0.5, 0.5])


@pytest.mark.parametrize("scale", ["eval", "train"])
def test_the_covariance_of_a_sum_of_blocks_is_exact(scale):
    rates = [0.9, 0.5, 0.3, 1.0]
    zeta = torch.randn(4, 3, dtype=torch.float64)
    mean, second = torch.zeros(3).double(), torch.zeros(3, 3).double()
    for mask, chance in every_mask(rates):
        gates = torch.tensor(mask).double() / (torch.tensor(rates) if scale == "train" else 1.0)
        y = gates @ zeta
        mean, second = mean + chance * y, second + chance * torch.outer(y, y)
    expected = second - torch.outer(mean, mean)
    assert torch.allclose(gaussian.noise_covariance(zeta, rates, scale=scale), expected)
    with pytest.raises(UsageError, match=r"shape \[4, units\], got \[3, 3\]"):
        gaussian.noise_covariance(zeta[:3], rates)


# --- random networks -------------------------------------------------------------------------------------


def test_scaled_networks_come_close_to_normal_laws_with_depth_and_vanilla_ones_do_not():
    def law(kind, depth):
        return simulate_law([0.5] * depth, kind=kind, width=96, masks=2048, units=48)

    scaled, vanilla = ([law(kind, depth) for depth in (4, 12, 36)] for kind in ("scaled", "vanilla"))
    distances = [x.distance for x in scaled]
    assert distances == sorted(distances, reverse=True) and distances[0] > 4 * distances[-1]
    assert distances[-1] < scaled[-1].level
    assert scaled[0].excess_kurtosis < scaled[-1].excess_kurtosis < 0.05
    assert all(x.distance > 4 * x.level for x in vanilla)
    assert vanilla[-1].excess_kurtosis > 10 > vanilla[0].excess_kurtosis


@pytest.mark.parametrize("scale", ["eval", "train"])
def test_the_variance_over_masks_is_near_the_recursion(scale):
    ratios = []
    for seed in range(12):
        law = simulate_law([0.6] * 10, scale=scale, width=96, masks=200, units=96, seed=seed)
        ratios.append(sum(d * d for d in law.deviations) / 96 / law.predicted[0] ** 2)
    values = torch.tensor(ratios)
    assert abs(float(values.mean()) - 1) < 5 * float(values.std()) / math.sqrt(12) < 0.35


def test_simulated_laws_are_reproducible_and_leave_generators_alone():
    state, python = torch.get_rng_state(), random.getstate()
    options = {"width": 16, "masks": 50, "units": 4}
    one = simulate_law([0.5] * 6, **options)
    assert one == simulate_law([0.5] * 6, **options) != simulate_law([0.5] * 6, **options, seed=1)
    assert torch.equal(state, torch.get_rng_state()) and python == random.getstate()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"kind": "batchnorm"}, UsageError, "BatchNorm mixes the rows"),
        ({"units": 300}, UsageError, "width must be an integer of at least 300"),
        ({"masks": 10}, UsageError, "masks must be an integer of at least 20"),
        ({"rates": [0.0]}, RateError, "block 1"),
    ],
)
def test_bad_simulations_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        simulate_law(**{"rates": [0.5] * 3, **options})


# --- on a model ------------------------------------------------------------------------------------------


class Toy(nn.Module):
    """Blocks with BatchNorm and dropout, over (rows, tokens, width)."""

    def __init__(self, depth: int = 4, width: int = 5) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.Tanh(), nn.Dropout(0.5))
            for _ in range(depth)
        )
        self.norm, self.head = nn.BatchNorm1d(width), nn.Linear(width, 3)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return {"tokens": x, "logits": self.head(self.norm(x.mean(1)))}


def by_hand(model, x, gates, upto=None):
    """Logits or, with ``upto``, the sum of a block, of the first row of x."""
    y = x[:1]
    for i, (block, gate) in enumerate(zip(model.blocks, gates, strict=True)):
        y = y + gate * block(y)
        if i == upto:
            return y.flatten()
    return model.head(model.norm(y.mean(1))).flatten()


RATES = {"blocks.0": 0.5, "blocks.1": 0.8, "blocks.3": 0.3}  # blocks.2: 1


def enumerated(model, x, scale, upto=None):
    rates = [RATES.get(f"blocks.{i}", 1.0) for i in range(4)]
    values, chances = [], []
    with torch.no_grad():
        for mask, chance in every_mask(rates):
            if chance:
                gates = [on / p if scale == "train" else on for on, p in zip(mask, rates, strict=True)]
                values.append(by_hand(model, x, gates, upto).double())
                chances.append(chance)
    y, c = torch.stack(values), torch.tensor(chances).double()[:, None]
    mean = (c * y).sum(0)
    return mean, (c * (y - mean).square()).sum(0).sqrt()


class Logits(Toy):
    def forward(self, x):
        return super().forward(x)["logits"]


@pytest.mark.parametrize("scale", ["eval", "train"])
@pytest.mark.parametrize(("site", "upto"), [(None, None), ("blocks.1", 1)])
def test_the_law_of_a_model_is_that_of_its_masks_enumerated(scale, site, upto):
    model, x = Logits().eval(), torch.randn(2, 3, 5)
    law = law_over_masks(
        model, x, rates=RATES, scale=scale, site=site, units=3 if site is None else 15, masks=3000
    )
    mean, deviation = enumerated(model, x, scale, upto)
    for i, (m, d) in enumerate(zip(mean.tolist(), deviation.tolist(), strict=True)):
        assert abs(law.means[i] - m) < 5 * d / math.sqrt(3000)
        assert law.deviations[i] == pytest.approx(d, rel=0.1)


def test_the_prediction_is_that_of_leaving_out_one_block_at_a_time():
    model, x = Logits().eval(), torch.randn(1, 3, 5)
    with torch.no_grad():
        full = by_hand(model, x, [1, 1, 1, 1])
        zeta = {i: full - by_hand(model, x, [float(i != j) for j in range(4)]) for i in (0, 1, 3)}
    for scale in ("eval", "train"):
        law = law_over_masks(model, x, rates=RATES, scale=scale, units=3, masks=20)
        weight = {
            i: p * (1 - p) if scale == "eval" else (1 - p) / p
            for i, p in zip(zeta, RATES.values(), strict=True)
        }
        expected = sum(weight[i] * z.double().square() for i, z in zeta.items()).sqrt()
        assert law.predicted == pytest.approx(expected.tolist(), rel=1e-4)


def test_the_noise_depends_on_the_input():
    model, x = Logits().eval(), torch.randn(2, 3, 5)
    one, two = (law_over_masks(model, row, rates=RATES, masks=40, units=3) for row in (x[:1], x[1:]))
    assert one.predicted != pytest.approx(two.predicted, rel=0.01)
    assert one == law_over_masks(model, x, rates=RATES, masks=40, units=3)  # the first row counts


def test_chunks_do_not_change_the_law_and_units_are_chosen():
    model, x = Toy(), {"x": torch.randn(2, 3, 5)}
    whole = law_over_masks(model, x, rates=RATES, masks=60, units=15)
    parts = law_over_masks(model, x, rates=RATES, masks=60, units=15, rows=7)
    assert parts.means == pytest.approx(whole.means) and parts.deviations == pytest.approx(whole.deviations)
    some = law_over_masks(model, x, rates=RATES, masks=60, units=[14, 2])
    assert some.means == pytest.approx((whole.means[14], whole.means[2]))
    spaced = law_over_masks(model, x, rates=RATES, masks=60, units=5)
    assert spaced.means == pytest.approx(whole.means[::3])


def test_the_model_is_left_as_it_was():
    model, x = Toy().train(), torch.randn(2, 3, 5)
    model.blocks[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags, state, python = [m.training for m in model.modules()], torch.get_rng_state(), random.getstate()
    law = law_over_masks(model, x, masks=30)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert flags == [m.training for m in model.modules()]
    assert torch.equal(state, torch.get_rng_state()) and python == random.getstate()
    assert fallow.handle_of(model) is None
    assert law == law_over_masks(model, x, masks=30) != law_over_masks(model, x, masks=30, seed=1)


def test_an_applied_model_has_its_own_rates_and_scale():
    model, x = Logits(), torch.randn(2, 3, 5)
    plain = law_over_masks(model, x, rates=RATES, scale="eval", masks=30, units=3)
    handle = fallow.apply(model, RATES, example=x, scale="eval")
    assert law_over_masks(model, x, masks=30, units=3).means == pytest.approx(plain.means)
    assert handle.rates["blocks.0"] == 0.5


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"site": "blocks.9"}, SiteError, "blocks.9 is no site of this model; did you mean blocks"),
        ({"rates": fallow.rates.uniform(1.0)}, UsageError, "every rate is 1"),
        ({"masks": 5}, UsageError, "masks must be an integer of at least 20"),
        ({"units": [99]}, UsageError, "units must be numbers from 0 to"),
        ({"scale": "test"}, UsageError, "scale must be"),
        ({"inputs": torch.randn(0, 3, 5)}, UsageError, "no rows"),
        ({"site": "blocks.0", "rates": {"blocks.3": 0.5}}, UsageError, "no mask changes blocks.0"),
    ],
)
def test_what_has_no_law_is_refused_in_words(options, error, words):
    with pytest.raises(error, match=words):
        law_over_masks(Toy(), **{"inputs": torch.randn(2, 3, 5), "masks": 30, **options})


@pytest.mark.parametrize("size", [0.0, 1e-7])
def test_branches_that_give_next_to_nothing_have_no_law(size):
    model = Logits()
    for block in model.blocks:
        block[1] = nn.Linear(5, 5, bias=False)
        nn.init.constant_(block[1].weight, size)
    with pytest.raises(UsageError, match="no mask changes the output by more than rounding"):
        law_over_masks(model, 1 + torch.rand(2, 3, 5), masks=30)


def test_an_output_without_rows_is_refused():
    class Mean(Toy):
        def forward(self, x):
            return super().forward(x)["logits"].mean(0)

    with pytest.raises(UsageError, match="the output has no floating tensor with one row a mask"):
        law_over_masks(Mean(), torch.randn(2, 3, 5), masks=30)

"""The statistics of a law over masks beside scipy's and beside enumeration."""

import json
import math

import pytest
import torch
from growth_cases import every_mask
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.errors import UsageError
from fallow.explaining.gaussian import (
    berry_esseen,
    excess_kurtosis,
    gaussian_limit,
    ks_distance,
    lilliefors_level,
    noise_covariance,
)

LAWS = {
    "normal": lambda g, n: torch.randn(n, generator=g),
    "shifted": lambda g, n: 7 + 0.01 * torch.randn(n, generator=g),
    "exponential": lambda g, n: -torch.rand(n, generator=g).log(),
    "two points": lambda g, n: (torch.rand(n, generator=g) < 0.3).float(),
}


def drawn(name: str, n: int = 500, seed: int = 0) -> torch.Tensor:
    return LAWS[name](torch.Generator().manual_seed(seed), n)


@pytest.mark.parametrize("name", LAWS)
def test_the_distance_is_that_of_scipy(name):
    stats = pytest.importorskip("scipy.stats")
    x = drawn(name).double()
    fitted = stats.kstest(x.numpy(), "norm", args=(float(x.mean()), float(x.std())))
    assert float(ks_distance(x)) == pytest.approx(fitted.statistic, abs=1e-12)


@pytest.mark.parametrize("name", LAWS)
def test_the_kurtosis_is_that_of_scipy(name):
    stats = pytest.importorskip("scipy.stats")
    x = drawn(name).double()
    assert float(excess_kurtosis(x)[0]) == pytest.approx(stats.kurtosis(x.numpy()), abs=1e-9)


@pytest.mark.parametrize("name", ["normal", "exponential"])
def test_the_error_of_the_kurtosis_is_the_spread_between_samples(name):
    x = drawn(name, 400 * 4000).reshape(4000, 400)
    values, errors = excess_kurtosis(x)
    assert float(errors.square().mean().sqrt()) == pytest.approx(float(values.std()), rel=0.15)
    if name == "normal":
        assert float(errors.mean()) == pytest.approx(math.sqrt(24 / 4000), rel=0.1)


@pytest.mark.parametrize("name", LAWS)
def test_the_error_of_the_kurtosis_is_that_of_leaving_out_each_sample(name):
    x = drawn(name, 400).double()
    kept = ~torch.eye(400, dtype=torch.bool)
    without = torch.stack([excess_kurtosis(x[row])[0][0] for row in kept])
    jackknife = math.sqrt(399 / 400 * float((without - without.mean()).square().sum()))
    assert float(excess_kurtosis(x)[1]) == pytest.approx(jackknife, rel=1e-6)


@pytest.mark.parametrize(("n", "repeats"), [(40, 20000), (300, 10000), (2000, 2000)])
def test_five_per_cent_of_normal_samples_lie_beyond_the_level(n, repeats):
    x = torch.randn(n, repeats, generator=torch.Generator().manual_seed(n))
    share = float((ks_distance(x) > lilliefors_level(n)).double().mean())
    assert abs(share - 0.05) < 5 * math.sqrt(0.05 * 0.95 / repeats)


def test_the_level_of_fitted_laws_is_far_below_that_of_kolmogorov():
    assert lilliefors_level(4096) == pytest.approx(0.0142, abs=5e-5)
    assert lilliefors_level(4096) < 0.7 * 1.358 / 64


@given(st.floats(-100, 100), st.floats(0.01, 100))
@settings(max_examples=20, deadline=None)
def test_distance_and_kurtosis_do_not_depend_on_units(shift, scale):
    x = drawn("exponential", 100).double()
    assert float(ks_distance(shift + scale * x)) == pytest.approx(float(ks_distance(x)))
    assert float(excess_kurtosis(shift + scale * x)[0]) == pytest.approx(
        float(excess_kurtosis(x)[0]), rel=1e-6
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


def test_the_ratio_of_berry_and_esseen_is_that_of_the_moments():
    values, rates = [0.5, -2.0, 1.0, 0.3], [0.5, 0.9, 0.2, 1.0]
    third = sum(abs(a) ** 3 * (p * (1 - p) ** 3 + (1 - p) * p**3) for a, p in zip(values, rates, strict=True))
    second = sum(a**2 * (p * (1 - p) ** 2 + (1 - p) * p**2) for a, p in zip(values, rates, strict=True))
    ratio, bound = berry_esseen(values, rates)
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
    assert distance <= berry_esseen(values, rates)[1]


def test_the_ratio_falls_with_depth_and_needs_noise():
    ratios = [berry_esseen([depth**-0.5] * depth, [0.7] * depth)[0] for depth in (10, 40, 160)]
    assert ratios[0] == pytest.approx(2 * ratios[1]) and ratios[1] == pytest.approx(2 * ratios[2])
    with pytest.raises(UsageError, match="does not vary"):
        berry_esseen([1.0, 0.0], [1.0, 0.5])
    with pytest.raises(UsageError, match="each of the 2 rates"):
        berry_esseen([1.0], [0.5, 0.5])


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
    assert torch.allclose(noise_covariance(zeta, rates, scale=scale), expected)
    with pytest.raises(UsageError, match=r"shape \[4, units\], got \[3, 3\]"):
        noise_covariance(zeta[:3], rates)

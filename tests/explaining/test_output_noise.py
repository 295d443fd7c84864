"""The variance over masks of an output beside pairs of masks and random networks."""

import math

import pytest
import torch
from growth_cases import KINDS, RATES, every_mask, linear

from fallow.errors import UsageError
from fallow.explaining.depth_profiles import arc_cosine
from fallow.explaining.growth import growth_theory
from fallow.explaining.output_noise import noise_variance, train_test_mismatch
from fallow.explaining.random_networks import draw_masks, toy_forward, toy_weights


def two_replicas(rates, h):
    """Mean over all pairs of masks of the covariance of the two outputs at infinite width."""
    mean = 0.0
    for one, chance in every_mask(rates):
        for two, other in every_mask(rates):
            q = r = c = 1.0
            for a, b in zip(one, two, strict=True):
                if a and b:
                    norm = math.sqrt(q * r)
                    c += h * norm * arc_cosine(c / norm)
                q, r = q * (1 + h * a), r * (1 + h * b)
            mean += chance * other * c
    return mean


def test_the_recursion_of_the_noise_is_close_to_all_pairs_of_masks_where_blocks_are_small():
    rates = [0.9, 0.3, 0.7, 0.5, 0.8]
    scaled = noise_variance(rates)
    assert scaled.total == pytest.approx(math.prod(1 + p / 5 for p in rates))
    exact = scaled.total - two_replicas(rates, 1 / 5)
    assert scaled.noise == pytest.approx(exact, rel=0.01)
    vanilla = noise_variance(rates, kind="vanilla")
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
        weights = toy_weights(10, width, 2.0, generator, start)
        gates = draw_masks(rates, masks, generator) / divisor
        out = toy_forward(start.expand(masks, -1, -1), gates, weights, "scaled")[0][-1]
        found.append(out.var(0).mean() / start.square().mean())
    values = torch.stack(found)
    error = float(values.std()) / math.sqrt(draws)
    theory = noise_variance(rates, scale=scale).noise
    assert abs(float(values.mean()) - theory) < 5 * error
    assert error < 0.06 * theory


@pytest.mark.parametrize("scale", ["eval", "train"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_mismatch_of_training_and_evaluation_is_that_of_the_forward_growth(kind, scale):
    train, test = train_test_mismatch(RATES, kind=kind, scale=scale)
    side = growth_theory(RATES, kind=kind, scale=scale).forward
    assert test == pytest.approx(2**side.log2_test)
    assert train == pytest.approx(2**side.log2_mean)


def test_batchnorm_is_refused():
    with pytest.raises(UsageError, match="BatchNorm mixes the rows"):
        noise_variance([0.5], kind="batchnorm")

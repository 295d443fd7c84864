"""The law over masks of random networks and of models, beside the enumeration of their masks."""

import math
import random

import pytest
import torch
from growth_cases import every_mask
from torch import nn

import fallow
from fallow.errors import RateError, SiteError, UsageError
from fallow.explaining.law import law_over_masks, simulate_law


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

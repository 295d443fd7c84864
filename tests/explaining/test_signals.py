"""Growth in a model beside autograd by hand and the enumeration of its masks."""

import itertools
import json
import math

import pytest
import torch
from growth_cases import every_mask
from torch import nn
from torch.nn import functional as F

import fallow
from fallow.errors import ArgumentError, RunError, SiteError, UsageError
from fallow.explaining import signals
from fallow.explaining.signals import Measured, signal_growth


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
        return Measured(factors, (), (), whole, 3 * whole, 0.1, 1.0, 0.01)

    def said(forward, backward, scale="train"):
        return len(signals._warnings(9, [0.5] * 9, scale, forward, backward))

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
    assert found.backward.noisy == pytest.approx(plain.backward.noisy, rel=1e-4)
    assert found.backward.dense == pytest.approx(plain.backward.dense, rel=1e-4)
    assert found.backward.noisy_total == pytest.approx(plain.backward.noisy_total, rel=1e-4)


class Doubled(Toy):
    """Sums in place of branches that are entered with something other than their shortcuts."""

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            z = block(2 * x)
            x += z
        return self.head(x)


def test_a_shortcut_that_is_overwritten_and_never_entered_a_branch_has_no_gradient():
    found = signal_growth(Doubled(3), F.cross_entropy, [batch()], draws=2)
    assert found.backward.dense[0] is None and None not in found.backward.dense[1:]
    assert math.prod(found.backward.dense[1:]) == pytest.approx(found.backward.dense_total)
    assert None not in found.forward.dense


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

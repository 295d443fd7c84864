"""What noise in front of a head penalises, against enumeration of all masks and the known global minimum."""

from __future__ import annotations

import copy
import json
import math
import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fallow
from fallow.errors import ArgumentError, UsageError
from fallow.explaining import explain_head
from fallow.noise import BlockDropout, FeatureDropout
from fallow.penalties import closed_form, dropblock_objective, effective_gamma, omega
from fallow.schemes import (
    Blocks,
    Exchangeable,
    FixedSize,
    Gaussian,
    Layer,
    Scheme,
    Units,
    UnitsInBlocks,
)

WIDTH, OUT, ROWS = 8, 3, 20
# those with a closed form
CLOSED = [Units(0.6), Blocks(0.5, 4), Layer(0.8), Gaussian(0.5), FixedSize(5), Exchangeable(0.5, 0.4)]
SCHEMES = [
    *CLOSED,
    Units(tuple(0.3 + 0.08 * i for i in range(WIDTH))),
    Blocks(0.7, 3),
    Blocks(0.6, 3, "sliding"),
    UnitsInBlocks(0.8, 0.7, 4),
]


def net(noise: nn.Module | None = None, bias: bool = True) -> nn.Sequential:
    noise = nn.Identity() if noise is None else noise
    return nn.Sequential(nn.Linear(6, WIDTH), nn.ReLU(), noise, nn.Linear(WIDTH, OUT, bias=bias)).double()


def inputs(rows: int = ROWS) -> Tensor:
    return torch.randn(rows, 6, dtype=torch.float64)


def numbers(rows: int = ROWS) -> Tensor:
    return torch.randn(rows, OUT, dtype=torch.float64)


def labels(rows: int = ROWS) -> Tensor:
    return torch.randint(0, OUT, (rows,))


def over_masks(model: nn.Sequential, x: Tensor, loss, blocks: int, rate: float) -> float:
    """The mean of the loss over all masks of so many blocks, one mask for the batch."""
    total = 0.0
    with torch.no_grad():
        features, head = model[:2](x), model[3]
        for number in range(2**blocks):
            kept = torch.tensor([number >> b & 1 for b in range(blocks)], dtype=torch.float64)
            mask = kept.repeat_interleave(WIDTH // blocks) / rate
            chance = rate ** float(kept.sum()) * (1 - rate) ** float(blocks - kept.sum())
            total += chance * float(loss(head(features * mask)))
    return total


# --- squared error -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
def test_the_exact_penalty_is_the_mean_over_all_masks_less_the_loss(blocks):
    model, x, y = net(), inputs(), numbers()
    found = explain_head(model, F.mse_loss, [(x, y)], scheme=Blocks(0.6, WIDTH // blocks), draws=2)
    plain = float(F.mse_loss(model(x), y).detach())
    assert found.loss == pytest.approx(plain, rel=1e-12)
    noisy = over_masks(model, x, lambda z: F.mse_loss(z, y), blocks, 0.6)
    assert found.loss + found.exact == pytest.approx(noisy, rel=1e-12)
    assert found.share == pytest.approx(found.exact / noisy, rel=1e-12)
    assert (found.quadratic, found.jensen) == (None, None)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_masks_drawn_give_the_exact_penalty_of_every_scheme(scheme: Scheme):
    found = explain_head(net(), F.mse_loss, [(inputs(), numbers())], scheme=scheme, draws=400)
    assert abs(found.monte_carlo - found.exact) < 5 * found.monte_carlo_error
    assert found.monte_carlo_error < 0.1 * found.exact  # or the first line says nothing


def weighted(output: Tensor, target: Tensor) -> Tensor:
    """Samples and outputs weigh differently, one sample and one output not at all."""
    rows = torch.arange(len(output), dtype=output.dtype)[:, None]
    return (rows * torch.tensor([0.0, 1.0, 3.0]) * (output - target) ** 2).sum() + 7


def masked(output: Tensor, target: Tensor) -> Tensor:
    """Which targets count has no pattern."""
    known = torch.arange(output.numel()).reshape(output.shape) % 4 != 1
    return (known * (output - target) ** 2).mean()


@pytest.mark.parametrize("loss", [weighted, masked, nn.MSELoss(reduction="sum")])
def test_a_squared_error_of_any_weights_has_its_exact_penalty(loss):
    model, x, y = net(), inputs(), numbers()
    found = explain_head(model, loss, [(x, y)], scheme=Blocks(0.6, 4), draws=2)
    noisy = over_masks(model, x, lambda z: loss(z, y), 2, 0.6)
    assert found.loss + found.exact == pytest.approx(noisy, rel=1e-12)


def test_batches_are_one_set_of_samples():
    model, x, y = net(), inputs(), numbers()
    options = {"scheme": Blocks(0.6, 4), "draws": 2}
    whole = explain_head(model, F.mse_loss, [(x, y)], **options)
    parts = explain_head(model, F.mse_loss, [(x[:13], y[:13]), (x[13:], y[13:])], **options)
    assert (whole.samples, parts.samples) == (ROWS, ROWS)
    for of in ("loss", "exact", "effective_rank"):
        assert getattr(parts, of) == pytest.approx(getattr(whole, of), rel=1e-12)
    for of in ("objective", "bound", "minimum"):
        assert getattr(parts.optimum, of) == pytest.approx(getattr(whole.optimum, of), rel=1e-8)


# --- the global minimum ------------------------------------------------------------------------------------


def best_linear(x: Tensor, y: Tensor, scheme: Blocks, width: int = 16) -> nn.Sequential:
    """A linear network at the global minimum of its DropBlock objective."""
    size = scheme.block_size
    gamma = effective_gamma(survival_rate=scheme.survival_rate, width=width, block_size=size)
    hidden, outgoing = closed_form(y, size, gamma, x).layers(width)
    model = nn.Sequential(nn.Linear(6, width, bias=False), nn.Linear(width, OUT, bias=False)).double()
    model[0].weight.data, model[1].weight.data = hidden, outgoing
    return model


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_linear_network_at_the_global_minimum_is_told_to_be_there(size):
    x, y, scheme = inputs(), numbers(), Blocks(0.7, size)
    found = explain_head(best_linear(x, y, scheme), F.mse_loss, [(x, y)], scheme=scheme, draws=2)
    best = found.optimum
    assert best.linear and best.above < 1e-9
    assert best.objective - best.bound < 1e-9 * best.objective
    assert best.spectrum[:OUT] == pytest.approx(best.optimal_spectrum, rel=1e-6)
    assert "the objective is less than 0.01 % above it" in str(found)


def test_one_that_was_trained_on_the_objective_arrives_there():
    x, y, scheme = inputs(), numbers(), Blocks(0.7, 4)
    model = nn.Sequential(nn.Linear(6, 16, bias=False), nn.Linear(16, OUT, bias=False)).double()
    before = explain_head(model, F.mse_loss, [(x, y)], scheme=scheme, draws=2).optimum
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=400, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        shared = {"survival_rate": 0.7, "block_size": 4}
        loss = dropblock_objective(y, model[0](x), model[1].weight, **shared) / y.numel()
        loss.backward()
        return loss

    optimizer.step(closure)
    after = explain_head(model, F.mse_loss, [(x, y)], scheme=scheme, draws=2).optimum
    assert before.above > 0.05 and after.above < 1e-4
    assert after.minimum == pytest.approx(before.minimum, rel=1e-12)


def test_a_linear_network_trained_with_dropblock_shows_its_distance_to_the_global_optimum():
    x = torch.randn(40, 6)
    y = x @ torch.randn(6, OUT) + 0.3 * torch.randn(40, OUT)
    noise = BlockDropout(survival_rate=0.7, block_size=4)
    model = nn.Sequential(nn.Linear(6, 16, bias=False), noise, nn.Linear(16, OUT, bias=False))
    before = fallow.explain(model, F.mse_loss, [(x, y)]).head
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 1000)
    for _ in range(1000):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        decay.step()
    after = fallow.explain(model, F.mse_loss, [(x, y)]).head
    assert before.scheme == after.scheme == str(Blocks(0.7, 4)) and after.optimum.linear
    assert before.optimum.above > 1 and after.optimum.above < 0.02
    assert after.optimum.minimum == pytest.approx(before.optimum.minimum, rel=1e-6)
    assert after.optimum.spectrum[:OUT] == pytest.approx(after.optimum.optimal_spectrum[:OUT], rel=0.1)


@pytest.mark.parametrize("loss", [F.mse_loss, nn.MSELoss(reduction="sum")])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scheme", CLOSED, ids=str)
def test_nothing_that_descends_on_the_objective_passes_the_bounds(scheme, bias, loss):
    """The least over the features themselves is the least over all networks."""
    y = numbers()
    free, head = nn.Embedding(ROWS, WIDTH).double(), nn.Linear(WIDTH, OUT, bias=bias).double()
    model, which = nn.Sequential(free, head), torch.arange(ROWS)
    scale = 1 if isinstance(loss, nn.Module) else y.numel()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        error = (y - head(free.weight)).square().sum()
        value = (error + omega(head.weight, free.weight, scheme)) / scale
        value.backward()
        return value

    first = explain_head(model, loss, [(which, y)], scheme=scheme, draws=2).optimum
    optimizer.step(closure)
    last = explain_head(model, loss, [(which, y)], scheme=scheme, draws=2).optimum
    assert not last.linear and last.objective == pytest.approx(float(closure().detach()), rel=1e-10)
    for best in (first, last):
        assert best.minimum <= best.objective * (1 + 1e-12)
        assert (best.bound is None) == isinstance(scheme, FixedSize | Exchangeable)
        assert best.bound is None or best.bound <= best.minimum * (1 + 1e-12)
    assert last.above < 1e-3 < first.above
    assert last.width >= last.reachable_width  # or the descent could not have arrived


def test_samples_that_weigh_differently_have_their_own_minimum_where_there_is_no_bias():
    y, scale = numbers(), torch.linspace(0, 2, ROWS, dtype=torch.float64)[:, None]

    def loss(z: Tensor, target: Tensor) -> Tensor:
        return (scale * (z - target) ** 2).mean() + 0.25

    model = nn.Sequential(nn.Embedding(ROWS, WIDTH), nn.Linear(WIDTH, OUT, bias=False)).double()
    which = torch.arange(ROWS)
    found = explain_head(model, loss, [(which, y)], scheme=Units(0.5), draws=2)
    plain = closed_form(scale.sqrt() * y, 1, effective_gamma(survival_rate=0.5, width=WIDTH, block_size=1))
    assert found.optimum.minimum == pytest.approx(plain.value / y.numel() + 0.25, rel=1e-9)
    assert found.optimum.objective == pytest.approx(found.loss + found.exact, rel=1e-9)
    model[1] = nn.Linear(WIDTH, OUT).double()
    biased = explain_head(model, loss, [(which, y)], scheme=Units(0.5), draws=2)
    assert biased.optimum is None and "no distance to the global minimum" in str(biased)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scheme", CLOSED, ids=str)
def test_the_best_head_on_these_features_is_what_descent_on_the_head_alone_finds(scheme, bias):
    model, x, y = net(bias=bias), inputs(), numbers()
    first = explain_head(model, F.mse_loss, [(x, y)], scheme=scheme, draws=2).optimum
    features, head = model[:2](x).detach(), model[3]
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = (y - head(features)).square().sum() + omega(head.weight, features, scheme)
        value.backward()
        return value

    optimizer.step(closure)
    last = explain_head(model, F.mse_loss, [(x, y)], scheme=scheme, draws=2).optimum
    assert last.objective == pytest.approx(first.best_head, rel=1e-6)
    assert last.best_head == pytest.approx(first.best_head, rel=1e-12)
    assert first.minimum < first.best_head < first.objective


@pytest.mark.parametrize("hidden", [True, False])
@pytest.mark.parametrize("outer", [True, False])
def test_linear_networks_are_told_from_others_biases_or_none(hidden, outer):
    x, y = inputs(), numbers()
    linear = nn.Sequential(
        nn.Linear(6, 5, bias=hidden), nn.Linear(5, 8), nn.Linear(8, OUT, bias=outer)
    ).double()
    found = explain_head(linear, F.mse_loss, [(x, y)], scheme=Units(0.7), draws=2)
    bent = copy.deepcopy(linear)
    bent[1] = nn.Sequential(bent[1], nn.LeakyReLU(0.9))
    other = explain_head(bent, F.mse_loss, [(x, y)], scheme=Units(0.7), draws=2)
    assert found.optimum.linear and not other.optimum.linear
    assert other.optimum.minimum < found.optimum.minimum < found.optimum.objective


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s not in CLOSED], ids=str)
def test_laws_without_a_closed_form_say_so(scheme):
    found = explain_head(net(), F.mse_loss, [(inputs(), numbers())], scheme=scheme, draws=2)
    assert found.optimum is None
    assert any("no distance to the global minimum" in note for note in found.notes)


# --- cross-entropy -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 2, 8])
def test_under_cross_entropy_the_forms_stand_around_the_mean_over_all_masks(blocks):
    model, x, y = net(), inputs(), labels()
    found = explain_head(model, F.cross_entropy, [(x, y)], scheme=Blocks(0.8, WIDTH // blocks), draws=400)
    penalty = over_masks(model, x, lambda z: F.cross_entropy(z, y), blocks, 0.8) - found.loss
    assert found.loss_kind == "cross_entropy" and found.exact is None and found.optimum is None
    assert abs(found.monte_carlo - penalty) < 5 * found.monte_carlo_error < 0.5 * penalty
    assert found.quadratic == pytest.approx(penalty, rel=0.1)
    assert penalty < found.jensen < 1.1 * penalty
    assert found.share == pytest.approx(found.monte_carlo / (found.loss + found.monte_carlo))


def classes_weighted(output: Tensor, target: Tensor) -> Tensor:
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=output.dtype)
    return F.cross_entropy(output, target, weight=weight, label_smoothing=0.1)


def ignoring(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target.masked_fill(target == 1, -100), reduction="sum")


@pytest.mark.parametrize("loss", [classes_weighted, ignoring])
def test_class_weights_smooth_labels_and_ignored_samples_are_in_the_forms(loss):
    model, x, y = net(), inputs(), labels()
    found = explain_head(model, loss, [(x, y)], scheme=Blocks(0.8, 4), draws=400)
    penalty = over_masks(model, x, lambda z: loss(z, y), 2, 0.8) - found.loss
    assert abs(found.monte_carlo - penalty) < 5 * found.monte_carlo_error
    assert found.quadratic == pytest.approx(penalty, rel=0.1)
    assert penalty < found.jensen < 1.1 * penalty


def test_tokens_each_have_a_mask():
    model = nn.Sequential(nn.Linear(6, WIDTH), nn.Tanh(), nn.Dropout(0.3), nn.Linear(WIDTH, OUT)).double()
    x, y = torch.randn(4, 5, 6, dtype=torch.float64), torch.randint(0, OUT, (4, 5))
    found = explain_head(model, lambda z, t: F.cross_entropy(z.flatten(0, 1), t.flatten()), [(x, y)])
    flat = explain_head(model, F.cross_entropy, [(x.flatten(0, 1), y.flatten())])
    assert found.loss_kind == "cross_entropy" and found.samples == 4
    assert found.quadratic == pytest.approx(flat.quadratic, rel=1e-9)
    assert found.jensen == pytest.approx(flat.jensen, rel=1e-9)


def test_another_loss_has_monte_carlo_alone():
    model, x, y = net(), inputs(), numbers()
    found = explain_head(model, F.l1_loss, [(x, y)], scheme=Blocks(0.6, 4), draws=400)
    penalty = over_masks(model, x, lambda z: F.l1_loss(z, y), 2, 0.6) - found.loss
    assert abs(found.monte_carlo - penalty) < 5 * found.monte_carlo_error
    assert (found.exact, found.quadratic, found.jensen, found.optimum) == (None, None, None, None)
    assert any("Monte Carlo is unbiased all the same" in note for note in found.notes)


# --- which head, which noise -------------------------------------------------------------------------------


class Pooled(nn.Module):
    """Noise, a change of shape, the head, another change of shape."""

    def __init__(self, noise: nn.Module) -> None:
        super().__init__()
        self.stem, self.drop, self.classifier = nn.Linear(6, WIDTH), noise, nn.Linear(WIDTH, OUT)
        self.spare = nn.Linear(OUT, OUT)
        self.double()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.stem(x).relu()[:, None]
        dropped = self.drop(features)
        self.spare(self.drop(features)[:, 0, :OUT])  # not the output, and no reason to take it for the head
        return {"logits": self.classifier(dropped.flatten(1)).unsqueeze(1)}


def of_logits(output: dict[str, Tensor], target: Tensor) -> Tensor:
    return F.mse_loss(output["logits"][:, 0], target)


@pytest.mark.parametrize(
    ("noise", "scheme"),
    [
        (nn.Dropout(0.25), Units(0.75)),
        (nn.Dropout(0.25, inplace=True), Units(0.75)),
        (BlockDropout(survival_rate=0.5, block_size=4), Blocks(0.5, 4)),
        (FeatureDropout(FixedSize(3)), FixedSize(3)),
    ],
    ids=lambda a: type(a).__name__,
)
def test_head_and_noise_are_found_in_the_data_flow(noise, scheme):
    found = explain_head(Pooled(noise), of_logits, [(inputs(), numbers())], draws=2)
    assert (found.name, found.scheme) == ("classifier", str(scheme))
    assert found.source == f"drop ({type(noise).__name__})"
    said = explain_head(Pooled(noise), of_logits, [(inputs(), numbers())], head="classifier", draws=2)
    assert (said.name, said.scheme) == ("classifier", str(scheme))


class Functional(nn.Module):
    """Noise that is no module, in a module inside."""

    def __init__(self, noise) -> None:
        super().__init__()
        self.stem, self.last = nn.Linear(6, WIDTH), nn.Module()
        self.last.fc, self.noise = nn.Linear(WIDTH, OUT), noise
        self.norm = nn.BatchNorm1d(WIDTH)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x).relu())
        return self.last.fc(self.noise(x, self.training))


@pytest.mark.parametrize(
    ("noise", "scheme"),
    [
        (lambda x, on: F.dropout(x, 0.25, on), Units(0.75)),
        (lambda x, on: F.dropout(x[:, :, None, None], 0.25, on).flatten(1), Units(0.75)),
        (lambda x, on: F.dropout(x, 0.25, on, inplace=True), Units(0.75)),
    ],
)
def test_dropout_that_is_a_function_is_found_too(noise, scheme):
    model, batch = Functional(noise), [(inputs(), numbers())]
    found = explain_head(model, F.mse_loss, batch, draws=2)
    assert (found.name, found.scheme, found.source) == ("last.fc", str(scheme), "F.dropout in the model")
    assert int(model.norm.num_batches_tracked) == 0 and model.training


@pytest.mark.parametrize(
    "model",
    [
        Pooled(nn.Identity()),
        Pooled(nn.Dropout(0.0)),
        Pooled(BlockDropout(survival_rate=1.0, block_size=4)),
        nn.Sequential(nn.Linear(6, WIDTH), nn.Dropout(0.5), nn.ReLU(), nn.Linear(WIDTH, OUT)).double(),
        Functional(lambda x, on: F.dropout1d(x[:, :, None], 0.5, on)[..., 0] + 0),
    ],
    ids=["none", "off", "rate 1", "before a relu", "of channels"],
)
def test_noise_that_does_not_feed_the_head_is_not_taken_for_its_own(model):
    loss = of_logits if isinstance(model, Pooled) else F.mse_loss
    with pytest.raises(UsageError, match=r"no noise feeds .* directly .* pass scheme="):
        explain_head(model, loss, [(inputs(), numbers())])


def test_blocks_over_another_axis_are_not_blocks_of_the_heads_features():
    class Crossed(nn.Module):
        def __init__(self, noise: nn.Module) -> None:
            super().__init__()
            self.drop, self.head = noise, nn.Linear(6, OUT)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.drop(x.unflatten(1, (2, 3))).flatten(1))

    batch = [(inputs().float(), numbers().float())]
    assert explain_head(Crossed(nn.Dropout(0.5)), F.mse_loss, batch, draws=2).scheme == str(Units(0.5))
    with pytest.raises(UsageError, match="no noise feeds head directly"):
        explain_head(Crossed(BlockDropout(survival_rate=0.5, block_size=3)), F.mse_loss, batch)


class Two(nn.Module):
    """Two outputs, a linear layer each, and a sum of them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(6, OUT), nn.Linear(6, OUT)
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(x), self.one(x) + self.other(x)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"head": "3.weight"}, "no linear layer 3.weight"),
        ({"head": "1"}, "must be an nn.Linear, it is a ReLU"),
        ({"head": "0", "scheme": Units(0.5)}, "not computed from the output of 0 alone"),
        ({"scheme": FixedSize(9)}, "kept must be at most the width"),
        ({"draws": 1}, "draws must be an integer of at least 2"),
    ],
)
def test_what_cannot_be_is_refused(arguments, words):
    with pytest.raises(UsageError, match=words):
        explain_head(net(nn.Dropout(0.5)), F.mse_loss, [(inputs(), numbers())], **arguments)


def test_models_without_one_last_linear_layer_are_refused():
    batch = [(inputs(), numbers())]
    ends_in_relu = nn.Sequential(nn.Linear(6, OUT), nn.ReLU()).double()
    with pytest.raises(UsageError, match="no nn.Linear's output is the model's output"):
        explain_head(ends_in_relu, F.mse_loss, batch, scheme=Units(0.5))
    with pytest.raises(UsageError, match="not computed from the output of other alone"):
        explain_head(Two(), lambda o, t: F.mse_loss(o[1], t), batch, head="other", scheme=Units(0.5))
    with pytest.raises(UsageError, match="one is called 2 times"):
        explain_head(Two(), lambda o, t: F.mse_loss(o[1], t), batch, head="one", scheme=Units(0.5))
    with pytest.raises(ArgumentError, match="model must be a torch.nn.Module, got str"):
        explain_head("resnet", F.mse_loss, batch)


def test_without_noise_there_is_no_penalty_and_nothing_to_be_above():
    found = explain_head(net(), F.mse_loss, [(inputs(), numbers())], scheme=Units(1.0), draws=2)
    assert (found.exact, found.monte_carlo, found.share) == (0, 0, 0)
    assert found.optimum.minimum == pytest.approx(0, abs=1e-12)
    assert any("there is no noise" in note for note in found.notes)
    json.dumps(found.as_dict(), allow_nan=False)


def test_features_that_are_all_zero_have_no_penalty():
    model = net(nn.Dropout(0.5))
    model[0].weight.data.zero_()
    model[0].bias.data.fill_(-1)
    for loss, y in ((F.mse_loss, numbers()), (F.cross_entropy, labels())):
        found = explain_head(model, loss, [(inputs(), y)])
        assert found.monte_carlo == 0 == found.penalty and found.effective_rank == 0
        assert "head 3" in str(found)


def test_wide_heads_leave_out_what_would_take_long(monkeypatch):
    from fallow.explaining import _head_entropy, _head_squared, head

    model, batch = net(nn.Dropout(0.5)), [(inputs(), labels())]
    whole = explain_head(model, F.cross_entropy, batch, draws=2)
    monkeypatch.setattr(_head_entropy, "_AT_ONCE", 50)
    parts = explain_head(model, F.cross_entropy, batch, draws=2)
    assert parts.quadratic == pytest.approx(whole.quadratic, rel=1e-12)
    assert parts.jensen == pytest.approx(whole.jensen, rel=1e-12)
    monkeypatch.setattr(_head_entropy, "_TOO_MANY", 50)
    assert explain_head(model, F.cross_entropy, batch, draws=2).jensen is None
    monkeypatch.setattr(head, "_WIDE", 4)
    monkeypatch.setattr(_head_squared, "_WIDEST_HEAD", 4)
    found = explain_head(model, F.mse_loss, [(inputs(), numbers())], draws=2, scheme=Blocks(0.5, 4))
    assert found.optimum.best_head is None and found.kappa is not None and "least of any" not in str(found)
    sliding = explain_head(model, F.cross_entropy, batch, draws=2, scheme=Blocks(0.5, 4, "sliding"))
    assert sliding.kappa is None and "kappa" not in str(sliding)


# --- what it gives -----------------------------------------------------------------------------------------


def test_it_prints_as_a_table_and_goes_through_json():
    found = explain_head(net(nn.Dropout(0.5)), F.mse_loss, [(inputs(), numbers())])
    text = str(found)
    for words in ("head 3: 8 features, 3 outputs", "penalty, exact", "global minimum", "of the minimiser"):
        assert words in text
    back = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert (back["kind"], back["exact"]) == ("head_explanation", found.exact)
    assert back["optimum"]["above"] == found.optimum.above
    assert len(back["optimum"]["spectrum"]) == OUT


def test_where_blocks_are_no_more_than_dropout_it_says_so():
    model, batch = net(), [(inputs(), numbers())]
    few = explain_head(model, F.mse_loss, batch, scheme=Blocks(0.5, 1), draws=2)
    many = explain_head(model, F.mse_loss, batch, scheme=Blocks(0.5, 4), draws=2)
    assert few.effective_rank == many.effective_rank < 4
    assert any("at block size 1 DropBlock is Dropout here" in note for note in few.notes)
    assert any("at block size 4 DropBlock is more than Dropout" in note for note in many.notes)


def test_narrow_heads_are_told_that_width_may_be_missing():
    model = nn.Sequential(nn.Embedding(ROWS, 4), nn.Linear(4, OUT)).double()
    found = explain_head(model, F.mse_loss, [(torch.arange(ROWS), numbers())], scheme=Blocks(0.9, 2), draws=2)
    assert found.optimum.reachable_width > 4
    assert any("4 features may be too few" in note for note in found.notes)


def test_the_model_is_left_as_it_was():
    generator = torch.Generator().manual_seed(3)
    model = Pooled(BlockDropout(survival_rate=0.5, block_size=4, generator=generator))
    model.stem = nn.Sequential(model.stem, nn.BatchNorm1d(WIDTH).double())
    model.train()
    model.drop.eval()
    x, y = inputs(), numbers()
    of_logits(model(x), y).backward()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    before = (torch.get_rng_state(), random.getstate(), generator.get_state())
    found = [explain_head(model, of_logits, [(x, y)], seed=5) for _ in range(2)]
    assert found[0] == found[1]
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert torch.equal(generator.get_state(), before[2])
    assert model.training and model.classifier.training and not model.drop.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert (p.grad is None and grad is None) or torch.equal(p.grad, grad)
    assert not model.classifier._forward_hooks and not model.classifier._forward_pre_hooks


def test_other_seeds_draw_other_masks_and_half_precision_is_taken():
    model, batch = net(nn.Dropout(0.5)).bfloat16(), [(inputs().bfloat16(), numbers().bfloat16())]
    one, other = (explain_head(model, F.mse_loss, batch, seed=s) for s in (0, 1))
    assert one.monte_carlo != other.monte_carlo and one.exact == other.exact
    assert abs(one.monte_carlo - one.exact) < 5 * one.monte_carlo_error


# --- in fallow.explain -------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, noise: nn.Module | None) -> None:
        super().__init__()
        self.stem, self.branch = nn.Linear(6, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.drop, self.head = noise or nn.Identity(), nn.Linear(WIDTH, OUT)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.drop(x + self.branch(x.relu())))


QUICK = {"draws": 8, "site_draws": 0, "label_draws": 0}


def test_a_model_with_sites_and_a_noisy_head_has_both_parts():
    batch, plain = [(inputs(), numbers())], Residual(None)
    noisy = Residual(nn.Dropout(0.5))
    noisy.load_state_dict(plain.state_dict())
    both = fallow.explain(noisy, F.mse_loss, batch, rates=fallow.rates.uniform(0.7), **QUICK)
    sites = fallow.explain(plain, F.mse_loss, batch, rates=fallow.rates.uniform(0.7), **QUICK)
    assert sites.head is None and sites.as_dict()["head"] is None
    assert both.totals == sites.totals and both.rows == sites.rows
    assert both.head == explain_head(noisy, F.mse_loss, batch, draws=8)
    assert str(both) == f"{sites}\n{both.head}"
    assert both.as_dict()["head"] == both.head.as_dict()


def test_a_model_with_a_noisy_head_alone_has_that_part():
    batch, model = [(inputs(), numbers())], net(nn.Dropout(0.5))
    found = fallow.explain(model, F.mse_loss, batch)
    assert found.rows == () and found.totals.regulariser == 0
    assert found.totals.loss_full == found.head.loss and math.isfinite(found.totals.loss_noisy)
    assert str(found).startswith(str(found.head))
    json.dumps(found.as_dict(), allow_nan=False)


def test_head_and_scheme_are_arguments_of_explain_and_then_must_be_had():
    batch = [(inputs(), numbers())]
    found = fallow.explain(Residual(None), F.mse_loss, batch, head="head", scheme=Blocks(0.5, 4))
    assert (found.head.name, found.head.scheme) == ("head", str(Blocks(0.5, 4))) and found.head.exact > 0
    with pytest.raises(UsageError, match="no noise feeds head directly"):
        fallow.explain(Residual(None), F.mse_loss, batch, head="head")
    with pytest.raises(UsageError, match="no handle to take survival rates from"):
        fallow.explain(Residual(None), F.mse_loss, batch)


def test_an_applied_model_keeps_its_draw():
    batch, model = [(inputs(), numbers())], Residual(nn.Dropout(0.5))
    handle = fallow.apply(model, fallow.rates.uniform(0.5), example=batch[0][0])
    model.train()(batch[0][0])
    before = handle.state_dict()
    found = fallow.explain(model, F.mse_loss, batch, **QUICK)
    assert str(handle.state_dict()) == str(before)
    assert len(found.rows) == 1 and found.head.name == "head"
    handle.remove()
    assert explain_head(model, F.mse_loss, batch, draws=8) == found.head

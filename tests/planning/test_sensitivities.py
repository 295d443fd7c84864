"""Gate gradients against gates of our own, against leaving branches out by hand, and what probing leaves."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import laws
import numpy as np
import pytest
import torch
from casework import Case, Sum
from laws import Masking
from subjects import BY_NAME, Residuals, bent, distance, nothing_changes, residuals
from torch import Tensor, nn

import fallow
from fallow import models
from fallow.errors import ArgumentError, FallowError, RunError, SiteError, UsageError
from fallow.planning import sensitivities, sensitivity
from fallow.surgery.tap import tapped

SUBJECTS = (
    "resnet20",
    "vit_small",
    "timm resnet18",
    "timm convnext_atto",
    "timm vit_tiny_patch16_224",
    "timm swin",
    "HF ViTModel",
    "HF BertModel",
    "in place on the shortcut",
    "in place on the branch",
    "add_ on the shortcut, with alpha",
    "parallel branches",
    "GPT-J: one sum of both branches",
    "transitions",
    "keyword arguments and tuple outputs",
    "TransformerEncoderLayer, norm last",
    "TransformerEncoderLayer, batch second",
)


def _torchvision() -> nn.Module:
    import torchvision

    return torchvision.models.resnet18(num_classes=7)


TORCHVISION = replace(BY_NAME["timm resnet18"], name="torchvision resnet18", build=_torchvision)
CASES = pytest.mark.parametrize("case", [*(BY_NAME[n] for n in SUBJECTS), TORCHVISION], ids=str)


# --- the oracle: gates that are leaves of the graph -------------------------------------------------------


class Gating(Masking):
    """Multiplies the branch of every residual addition by a gate of one number a sample."""

    def __init__(self, model: nn.Module, sums: tuple[Sum, ...], rows: int) -> None:
        super().__init__(model, sums, {}, {})
        self.gates = {s.site: torch.ones(rows, dtype=torch.float64, requires_grad=True) for s in sums}

    def _masked(self, site: Sum, z: Tensor) -> Tensor:
        shape = [1] * z.dim()
        shape[site.dim] = -1
        return z * self.gates[site.site].to(z.dtype).reshape(shape)


def by_autograd(model: nn.Module, case: Case, feed: Any, rows: int) -> dict[str, Tensor]:
    """Per-sample gate gradients in eval mode, the loss taken as a sum over samples."""
    gating = Gating(model.eval(), case.sums, rows)
    with gating:
        out = laws.call(model, feed)
    grads = torch.autograd.grad(distance(out, None) * rows, list(gating.gates.values()))
    return dict(zip(gating.gates, grads, strict=True))


def assert_values(found: sensitivity.Sensitivities, expected: dict[str, Tensor], tolerance: float) -> None:
    reduce = {"absolute": lambda s: s.abs().mean(), "signed": lambda s: s.mean().abs()}[found.reduction]
    largest = max(float(s.abs().mean()) for s in expected.values())
    assert set(found) == set(expected) and min(found.values()) >= 0
    for name, s in expected.items():
        assert found[name] == pytest.approx(float(reduce(s)), abs=tolerance * largest), name
        values = s.abs() if found.reduction == "absolute" else s
        error = float(values.std()) / len(values) ** 0.5
        assert found.errors[name] == pytest.approx(error, abs=tolerance * largest), name


@CASES
def test_gate_gradients_are_those_of_a_gate_in_the_graph(case: Case):
    model = case.model().double()
    feeds = [laws.cast(case.feed(rows, seed), torch.float64) for rows, seed in ((4, 2), (3, 9))]
    oracle = case.model().double()
    parts = [by_autograd(oracle, case, laws.cast(f), r) for f, r in zip(feeds, (4, 3), strict=True)]
    expected = {n: torch.cat([p[n] for p in parts]) for n in parts[0]}
    batches = [(laws.cast(f), None) for f in feeds]
    # somebody's evaluation loop
    with torch.no_grad(), nothing_changes(model), tapped(model, batches[0][0]) as taps:
        for reduction in ("absolute", "signed"):
            found = sensitivity.measure(taps, distance, batches, reduction)
            assert found.samples == 7 and not found.silent
            assert_values(found, expected, 1e-10)


def _bf16(model: nn.Module, feed: Any) -> tuple[nn.Module, Any]:
    return model.bfloat16(), laws.cast(feed, torch.bfloat16)


def _channels_last(model: nn.Module, feed: Any) -> tuple[nn.Module, Any]:
    return model.to(memory_format=torch.channels_last), (
        feed[0].contiguous(memory_format=torch.channels_last),
    )


def _frozen(model: nn.Module, feed: Any) -> tuple[nn.Module, Any]:
    return model.requires_grad_(False), feed


def _partly_frozen(model: nn.Module, feed: Any) -> tuple[nn.Module, Any]:
    for p in itertools.islice(model.parameters(), 20):
        p.requires_grad_(False)
    return model, feed


@pytest.mark.parametrize("name", ["resnet20", "vit_small"])
@pytest.mark.parametrize(
    ("change", "tolerance"), [(_bf16, 0.1), (_channels_last, 1e-4), (_frozen, 1e-4), (_partly_frozen, 1e-4)]
)
def test_layout_precision_and_frozen_parameters_do_not_matter(name: str, change: Callable, tolerance: float):
    case = BY_NAME[name]
    expected = by_autograd(case.model().double(), case, laws.cast(case.feed(6), torch.float64), 6)
    model, feed = change(case.model(), case.feed(6))
    with nothing_changes(model):
        found = sensitivities(model, distance, [(feed, None)])
    assert_values(found, expected, tolerance)


def test_branches_of_a_block_are_one_gate():
    case, feed = BY_NAME["vit_small"], laws.cast(BY_NAME["vit_small"].feed(5), torch.float64)
    parts = by_autograd(case.model().double(), case, feed, 5)
    found = sensitivities(case.model().double(), distance, [(feed, None)], granularity="block")
    expected = {f"blocks.{i}": parts[f"blocks.{i}.attention"] + parts[f"blocks.{i}.mlp"] for i in range(3)}
    assert_values(found, expected, 1e-10)
    assert list(sensitivities(case.model(), distance, [(case.feed(2), None)], include="*.mlp")) == [
        f"blocks.{i}.mlp" for i in range(3)
    ]


def test_a_batch_may_be_a_dict_that_goes_to_the_loss_whole():
    import transformers

    config = transformers.BertConfig(
        hidden_size=16, num_attention_heads=2, intermediate_size=32, vocab_size=50, num_hidden_layers=2
    )
    model = transformers.BertForSequenceClassification(config)
    batch = BY_NAME["HF BertModel"].feed(4) | {"labels": torch.tensor([0, 1, 1, 0])}
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    whole = sensitivities(model, lambda out, _: out.loss, [batch])
    cut = sensitivities(
        model, lambda out, y: nn.functional.cross_entropy(out.logits, y), [(inputs, batch["labels"])]
    )
    assert len(whole) == 4 and min(whole.values()) > 0
    assert whole.table == pytest.approx(cut.table, rel=1e-4)


# --- reductions -------------------------------------------------------------------------------------------


def by_hand(model: Residuals, x: Tensor, without: int) -> Tensor:
    x = model.stem(x)
    for i, block in enumerate(model.blocks):
        x = x if i == without else x + block(x)
    return model.head(x)


def test_leave_one_out_is_the_change_of_the_loss_without_the_branch():
    model, batches = residuals().double(), [(torch.randn(5, 4).double(), None) for _ in range(3)]
    with nothing_changes(model):
        found = sensitivities(model, distance, batches, reduction="leave_one_out")
    for i in range(4):
        with torch.no_grad():
            changes = [distance(by_hand(model, x, i), None) - distance(model(x), None) for x, _ in batches]
        assert found[f"blocks.{i}"] == pytest.approx(np.abs(changes).mean(), rel=1e-9)
        assert found.errors[f"blocks.{i}"] == pytest.approx(np.abs(changes).std(ddof=1) / 3**0.5, rel=1e-9)


def test_where_the_loss_is_linear_in_a_gate_the_gradient_is_leave_one_out():
    torch.manual_seed(1)
    model = Residuals(*(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)) for _ in range(4))).double()
    batch = [(torch.randn(9, 4).double(), None)]

    def linear(out: Tensor, _: None) -> Tensor:
        return out.sum(1).mean()

    gates = sensitivities(model, linear, batch, reduction="signed")
    left_out = sensitivities(model, linear, batch, reduction="leave_one_out")
    assert gates.table == pytest.approx(left_out.table, rel=1e-10)


def test_masked_averages_the_draws_in_which_the_site_runs():
    """At a high rate it is the signed mean, and over many draws the slope of the expected loss."""
    model, batch = residuals(3).double(), [(torch.randn(6, 4).double(), None)]
    signed = sensitivities(model, distance, batch, reduction="signed")
    near = sensitivities(model, distance, batch, reduction="masked", survival_rate=1 - 1e-12, draws=2)
    assert near.table == pytest.approx(signed.table, rel=1e-9)
    x = batch[0][0]
    rate, draws = 0.6, 400
    found = sensitivities(model, distance, batch, reduction="masked", survival_rate=rate, draws=draws)
    for i in range(3):
        value = 0.0
        for others in itertools.product([0.0, 1.0], repeat=2):
            gates = [*others[:i], 1.0, *others[i:]]
            grad = _slope(model, x, gates, i)
            value += grad * np.prod([rate if g else 1 - rate for g in others])
        # errors are of rows that share masks: six times the variance, at five standard errors
        error = max(found.errors[f"blocks.{i}"] * 6**0.5, 1e-12)
        assert abs(found[f"blocks.{i}"] - abs(value)) < 5 * error


def _slope(model: Residuals, x: Tensor, gates: list[float], at: int) -> float:
    gate = torch.tensor(gates, dtype=torch.float64, requires_grad=True)
    h = model.stem(x)
    for g, block in zip(gate, model.blocks, strict=True):
        h = h + g * block(h)
    return float(torch.autograd.grad(distance(model.head(h), None), gate)[0][at])


def test_the_seed_alone_chooses_the_masks():
    model, batch = residuals(), [(torch.randn(6, 4), None)]
    one, again, other = (
        sensitivities(model, distance, batch, reduction="masked", seed=s).table for s in (1, 1, 2)
    )
    assert one == again != other


@pytest.mark.parametrize("reduction", ["absolute", "masked"])
def test_splitting_a_batch_changes_nothing_for_one_sample_alone(reduction: str):
    """Per-sample values do not depend on how many samples share the batch."""
    model, x = residuals().double(), torch.randn(6, 4).double()
    options = {"reduction": reduction, "survival_rate": 1.0}
    whole = sensitivities(model, distance, [(x, None)], **options)
    split = sensitivities(model, distance, [(x[:1], None), (x[1:3], None), (x[3:], None)], **options)
    assert whole.table == pytest.approx(split.table, rel=1e-10)
    assert reduction == "masked" or whole.errors == pytest.approx(split.errors, rel=1e-9)


# --- what is left behind ----------------------------------------------------------------------------------


def _disturbing(output: Any, target: Any) -> Tensor:
    """A loss that draws from every generator."""
    random.random(), np.random.rand(), torch.rand(1)
    return distance(output, target)


def _failing(output: Any, target: Any) -> Tensor:
    _disturbing(output, target)
    raise KeyError("the loss's own error")


def _in_use(applied: bool) -> tuple[nn.Module, Tensor]:
    """A network in the middle of training: gradients, statistics, dropout, some modules in eval mode."""
    torch.manual_seed(2)
    net = models.CifarResNet(14, widths=(4, 4, 8))
    model, x = nn.Sequential(net, nn.Dropout(0.5)), torch.randn(6, 3, 8, 8)
    if applied:
        fallow.apply(model, fallow.rates.uniform(0.6), example=x, mode="row", scale="eval", seed=3)
    model(x).square().sum().backward()
    net.group1.eval()
    net.group2[0].branch.norm1.eval()
    next(net.parameters()).grad = None
    return model, x


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("reduction", sensitivity.REDUCTIONS)
def test_probing_leaves_a_model_in_use_as_it_was(reduction: str, applied: bool):
    model, x = _in_use(applied)
    with nothing_changes(model):
        found = sensitivities(model, _disturbing, [(x, None)], reduction=reduction)
    assert min(found.values()) > 0
    with nothing_changes(model), pytest.raises(KeyError, match="own error"):
        sensitivities(model, _failing, [(x, None)], reduction=reduction)


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("kind", ["flops", "time", "memory", "count"])
def test_planning_leaves_a_model_in_use_as_it_was(kind: str, applied: bool):
    model, x = _in_use(applied)
    with nothing_changes(model):
        fallow.plan(model, _disturbing, [(x, None)], budget=0.9, cost=kind, method="sensemode")
    if kind == "time":
        with nothing_changes(model), pytest.raises(KeyError, match="own error"):
            fallow.plan(model, _failing, [(x, None)], budget=0.9, cost=kind)


def test_an_applied_model_is_probed_whole():
    """Its rates and its scale at evaluation have no say; nor have its masks in the draws that follow."""
    plain, x = residuals(), torch.randn(6, 4)
    expected = sensitivities(plain, distance, [(x, None)])
    applied = residuals()
    handle = fallow.apply(applied, {"blocks.1": 0.4, "blocks.2": 0.7}, example=x, scale="eval")
    assert sensitivities(applied, distance, [(x, None)]).table == pytest.approx(expected.table, rel=1e-6)
    twin = residuals()
    other = fallow.apply(twin, {"blocks.1": 0.4, "blocks.2": 0.7}, example=x, scale="eval")
    for _ in range(5):
        assert torch.equal(applied.train()(x), twin.train()(x))
    assert handle.report() == other.report()


# --- what cannot be known ---------------------------------------------------------------------------------


class Detached(Residuals):
    """The sum of its second block is cut from the graph of the output."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.stem(x)
        first = first + self.blocks[0](first)
        second = first + self.blocks[1](first)
        third = second.detach() + self.blocks[2](second.detach())
        return self.head(third)


class TwoHeads(Residuals):
    """An auxiliary head on a residual block of its own."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        x = x + self.blocks[0](x)
        aside = x + self.blocks[1](x)
        return self.head(x), self.head(aside)


def test_a_site_that_no_gradient_reaches_is_named():
    x = torch.randn(5, 4)
    with pytest.raises(SiteError, match=r"blocks\.[01].*does not reach.*detached.*exclude="):
        sensitivities(Detached(bent(), bent(), bent()), distance, [(x, None)])
    heads = TwoHeads(bent(), bent())
    with pytest.raises(SiteError, match=r"blocks\.1: the gradient of the loss does not reach"):
        fallow.plan(heads, distance, [(x, None)], budget=0.8)
    both = sensitivities(heads, lambda out, _: distance(out[0] + out[1], None), [(x, None)])
    assert min(both.values()) > 0
    assert list(sensitivities(heads, distance, [(x, None)], exclude="blocks.1")) == ["blocks.0"]
    uniform = fallow.plan(heads, None, [(x, None)], budget=0.8, method="uniform")
    assert list(uniform) == ["blocks.0", "blocks.1"]


def test_a_branch_that_gives_zeros_is_said_to_be_silent():
    model, x = residuals(), torch.randn(5, 4)
    nn.init.zeros_(model.blocks[1][2].weight)
    nn.init.zeros_(model.blocks[1][2].bias)
    for reduction in sensitivity.REDUCTIONS:
        found = sensitivities(model, distance, [(x, None)], reduction=reduction, survival_rate=0.999)
        assert found.silent == ("blocks.1",) and found["blocks.1"] == 0
    plan = fallow.plan(model, distance, [(x, None)], budget=0.8)
    assert any("exact zeros" in note and "blocks.1" in note for note in plan.notes)


def test_row_products_have_one_number_a_row_in_any_layout():
    layouts = (torch.contiguous_format, torch.channels_last)
    a, b = (torch.randn(3, 4, 5, 6, dtype=torch.float64) for _ in "ab")
    for one, other, dim in itertools.product(layouts, layouts, range(4)):
        rows = (a * b).sum([d for d in range(4) if d != dim])
        x, y = a.contiguous(memory_format=one), b.contiguous(memory_format=other)
        torch.testing.assert_close(sensitivity.row_products(x, y, dim), rows)
    assert sensitivity.row_products(a.float(), b.float(), None).shape == (1,)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"loss_fn": lambda out, _: out.square()}, UsageError, r"one number, got a tensor of shape \(5, 3\)"),
        ({"loss_fn": lambda out, _: 0.5}, UsageError, "must return a tensor, got float"),
        ({"loss_fn": lambda out, _: out.sum() * torch.nan}, RunError, "the loss is nan"),
        ({"loss_fn": None}, ArgumentError, "loss_fn must be a function"),
        (
            {"loss_fn": lambda out, _: out.sum().detach()},
            SiteError,
            "blocks.0: the gradient of the loss does not",
        ),
        ({"batches": []}, UsageError, "batches is empty"),
        ({"batches": iter(())}, UsageError, "batches is empty"),
        ({"batches": [(torch.randn(0, 4), None)]}, UsageError, "no rows"),
        ({"batches": [(torch.randn(3, 4), None), (torch.randn(0, 4), None)]}, UsageError, "no rows"),
        ({"batches": torch.randn(5, 4)}, ArgumentError, "got Tensor"),
        ({"batches": [torch.randn(5, 4)]}, ArgumentError, "pair or a dict, got Tensor"),
        ({"batches": [(torch.randn(5, 4), None, None)]}, ArgumentError, "got tuple of 3"),
        ({"batches": 7}, ArgumentError, "got int"),
        ({"batches": [(torch.randn(5, 9), None)]}, SiteError, "cannot run the example"),
        ({"batches": [("text", None)]}, FallowError, "no tensor"),
        ({"model": nn.Linear(4, 3)}, SiteError, "no residual site"),
        ({"model": "resnet20"}, ArgumentError, "model must be a torch.nn.Module, got str"),
        ({"max_batches": 0}, UsageError, "max_batches must be an integer of at least 1"),
        ({"reduction": "mean"}, UsageError, "reduction must be"),
        ({"granularity": "layer"}, UsageError, "granularity must be"),
        ({"include": "block.*"}, SiteError, "no site matches"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_sentence(change: dict, error: type[FallowError], words: str):
    model = residuals()
    options = {"model": model, "loss_fn": distance, "batches": [(torch.randn(5, 4), None)]} | change
    for call in (sensitivities, lambda **o: fallow.plan(**o, budget=0.8)):
        if call is not sensitivities and change.get("loss_fn", 0) is None:
            error, words = ArgumentError, "pass loss_fn"
        with nothing_changes(model), pytest.raises(error, match=words) as refused:
            call(**options)
        assert "\n" not in str(refused.value)


def test_inference_mode_does_not_matter():
    model, x = residuals(), torch.randn(4, 4)
    expected = sensitivities(model, distance, [(x, None)])
    with torch.inference_mode():
        inside = x + 0
        assert inside.is_inference()
        assert sensitivities(model, distance, [(inside, None)]).table == expected.table
        assert torch.is_inference_mode_enabled()


def test_no_more_than_max_batches_are_taken():
    taken = []

    def endless():
        for i in itertools.count():
            taken.append(i)
            yield torch.randn(3, 4), None

    assert sensitivities(residuals(), distance, endless(), max_batches=3).samples == 9
    assert taken == [0, 1, 2]


def test_any_number_of_sites_takes_one_forward_and_one_backward():
    model, x = residuals(), torch.randn(5, 4)
    forwards, backwards = [], []
    model.head.register_forward_hook(lambda *_: forwards.append(1))

    def loss(out: Tensor, target: None) -> Tensor:
        out.register_hook(lambda _: backwards.append(1))
        return distance(out, target)

    with tapped(model, x) as taps:
        forwards.clear()
        sensitivity.measure(taps, loss, [(x, None)])
    assert len(forwards) == len(backwards) == 1

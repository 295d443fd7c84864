"""`explain` on models and losses of many forms: what it leaves alone, what it refuses, what it prints."""

import copy
import json
import math
import random

import numpy as np
import pytest
import torch
from depth_nets import LENGTH, LOSSES, RATES, Net, data, exact, fitted
from torch import Tensor, nn
from torch.nn import functional as F

import fallow
from fallow.errors import ArgumentError, RateError, RunError, SiteError, UsageError
from fallow.explaining.depth import explain

HALF = fallow.rates.uniform(0.5)
QUICK = {"draws": 4, "site_draws": 2, "label_draws": 4}


class Normed(nn.Module):
    """BatchNorm and dropout in two residual blocks over images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
            for _ in range(2)
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


def images(rows: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 1, 5, 5), torch.randint(0, 3, (rows,))


# --- what it leaves alone ---------------------------------------------------------------------------------


@pytest.mark.parametrize("applied", [False, True])
def test_the_model_and_every_generator_are_as_before_to_the_bit(applied):
    model, (x, target) = Normed(), images()
    if applied:
        fallow.apply(model, HALF, example=x)
    model.train()
    model.blocks[0].eval()
    F.cross_entropy(model(x), target).backward()
    model.stem.weight.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    flags = {n: m.training for n, m in model.named_modules()}
    wanted = {n: p.requires_grad for n, p in model.named_parameters()}
    kinds = {n: type(m) for n, m in model.named_modules()}
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    x_before, target_before = x.clone(), target.clone()
    draw = fallow.handle_of(model).draw if applied else None

    explain(model, F.cross_entropy, [(x, target)], rates=HALF, **QUICK)

    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(p.grad, grads[n]) for n, p in model.named_parameters() if p.grad is not None)
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(grads)
    assert {n: m.training for n, m in model.named_modules()} == flags
    assert {n: p.requires_grad for n, p in model.named_parameters()} == wanted
    assert {n: type(m) for n, m in model.named_modules()} == kinds
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == generators[1:]
    assert torch.equal(x, x_before) and torch.equal(target, target_before)
    assert x.grad is None and not x.requires_grad
    if applied:
        assert fallow.handle_of(model).draw == draw
    else:
        assert fallow.handle_of(model) is None


def test_batch_norm_works_by_its_running_statistics_and_dropout_is_off():
    model, (x, target) = Normed(), images()
    model.train()
    found = explain(model, F.cross_entropy, [(x, target)], rates=HALF, **QUICK)
    loss = F.cross_entropy(model.eval()(x).detach(), target)
    assert found.totals.loss_full == pytest.approx(float(loss), rel=1e-5)


def test_the_same_numbers_come_in_single_precision():
    net, (x, target) = copy.deepcopy(fitted("cross_entropy")), data("cross_entropy")
    options = {"rates": RATES, "scale": "eval", "draws": 16}
    fine = explain(net, F.cross_entropy, [(x, target)], **options)
    rough = explain(net.float(), F.cross_entropy, [(x.float(), target)], **options)
    assert rough.totals.regulariser == pytest.approx(fine.totals.regulariser, rel=1e-4)
    for a, b in zip(fine.rows, rough.rows, strict=True):
        for form in ("hessian", "bregman", "linearised", "alone", "monte_carlo"):
            assert getattr(a, form) == pytest.approx(getattr(b, form), rel=1e-3, abs=1e-9), form


def test_a_loss_that_takes_only_the_models_precision_is_given_that():
    weight = torch.tensor([1.0, 2.0, 3.0])
    net, (x, target) = copy.deepcopy(fitted("cross_entropy")).float(), data("cross_entropy")

    def loss(output: Tensor, target: Tensor) -> Tensor:
        assert output.dtype == torch.float32
        return F.cross_entropy(output, target, weight=weight)

    found = explain(net, loss, [(x.float(), target)], rates=RATES, **QUICK)
    assert found.loss_kind == "cross_entropy"
    assert found.totals.sums["alone"] > 0


def test_half_precision_models_are_explained_in_more():
    net, (x, target) = copy.deepcopy(fitted("cross_entropy")), data("cross_entropy")
    fine = explain(net, F.cross_entropy, [(x, target)], rates=RATES, draws=16)
    rough = explain(net.bfloat16(), F.cross_entropy, [(x.bfloat16(), target)], rates=RATES, draws=16)
    assert rough.totals.regulariser == pytest.approx(fine.totals.regulariser, rel=0.2)
    assert rough.totals.sums["linearised"] == pytest.approx(fine.totals.sums["linearised"], rel=0.2)


def test_it_works_under_no_grad_and_under_inference_mode():
    net, batch = fitted("quadratic"), data("quadratic")
    plain = explain(net, F.mse_loss, [batch], rates=RATES, **QUICK).as_dict()
    with torch.no_grad():
        assert explain(net, F.mse_loss, [batch], rates=RATES, **QUICK).as_dict() == plain
    with torch.inference_mode():
        assert explain(net, F.mse_loss, [batch], rates=RATES, **QUICK).as_dict() == plain


# --- where the noise comes from -----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["train", "eval"])
def test_an_applied_model_is_explained_by_its_own_rates_and_scale(scale):
    net, (x, target) = copy.deepcopy(fitted("quadratic")), data("quadratic")
    plain = explain(net, F.mse_loss, [(x, target)], rates=RATES, scale=scale, **QUICK)
    fallow.apply(net, RATES, example=x, scale=scale, mode="row")
    applied = explain(net, F.mse_loss, [(x, target)], **QUICK)
    assert applied.as_dict() == plain.as_dict()
    net.eval()
    with torch.no_grad():
        assert applied.totals.loss_evaluation == pytest.approx(float(F.mse_loss(net(x), target)), rel=1e-12)


def test_rates_in_force_are_those_of_the_schedule():
    net, (x, target) = copy.deepcopy(fitted("quadratic")), data("quadratic")
    schedule = fallow.schedules.warmup(10)
    handle = fallow.apply(net, RATES, example=x, schedule=schedule)
    handle.step(0)
    assert set(handle.current_rates.values()) == {1.0}
    assert explain(net, F.mse_loss, [(x, target)], **QUICK).totals.noise == 0
    handle.step(10)
    found = explain(net, F.mse_loss, [(x, target)], **QUICK)
    assert {r.name: r.rate for r in found.rows} == pytest.approx(RATES)


def test_rates_given_are_taken_before_the_handles():
    net, (x, target) = copy.deepcopy(fitted("quadratic")), data("quadratic")
    fallow.apply(net, RATES, example=x)
    found = explain(net, F.mse_loss, [(x, target)], rates=HALF, **QUICK)
    assert {r.rate for r in found.rows} == {0.5}


def test_sites_left_out_are_kept_throughout():
    net, batch = fitted("quadratic"), data("quadratic")
    options = {"rates": RATES, "draws": 8, "scale": "eval"}
    part = explain(net, F.mse_loss, [batch], include=["blocks.1", "blocks.3"], **options)
    others = explain(net, F.mse_loss, [batch], exclude=["blocks.[02]", "blocks.[4-7]"], **options)
    ones = {n: p if n in ("blocks.1", "blocks.3") else 1.0 for n, p in RATES.items()}
    whole = explain(net, F.mse_loss, [batch], **{**options, "rates": ones})
    assert [r.name for r in part.rows] == ["blocks.1", "blocks.3"]
    assert part.as_dict() == others.as_dict()
    assert part.totals.regulariser == pytest.approx(whole.totals.regulariser, rel=1e-12)
    assert part.rows[1].monte_carlo == whole.rows[3].monte_carlo


def test_a_branch_really_rests_where_masks_are_drawn_by_the_batch():
    net, (x, target) = copy.deepcopy(fitted("quadratic")), data("quadratic")
    calls = []
    net.blocks[1].into.register_forward_hook(lambda *_: calls.append(1))
    options = {"rates": {"blocks.1": 0.25}, "draws": 40, "site_draws": 0, "label_draws": 0}
    explain(net, F.mse_loss, [(x, target)], mode="batch", include="blocks.1", **options)
    batch = len(calls)
    calls.clear()
    explain(net, F.mse_loss, [(x, target)], mode="row", include="blocks.1", **options)
    assert len(calls) - 40 < batch < len(calls) - 20


def tokens_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


class TimeFirst(nn.Module):
    """Works over (time, rows, width) and gives that out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        x = x + torch.tanh(self.a(x))
        return self.head(x + torch.tanh(self.b(x)))


def test_the_batch_may_be_any_dimension_of_the_output():
    """Also where another dimension is as long."""
    model, x = TimeFirst(), torch.randn(5, 5, 4, dtype=torch.float64)
    target = torch.randint(0, 2, (5, 5))
    rates = fallow.rates.uniform(0.7)
    options = {"rates": rates, "scale": "eval", "draws": 4, "site_draws": 4, "label_draws": 0}
    found = explain(model, tokens_loss, [(x, target)], **options)
    assert found.mode == "row"

    class RowsFirst(TimeFirst):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).transpose(0, 1)

    twin = RowsFirst()
    twin.load_state_dict(model.state_dict())
    other = explain(twin, tokens_loss, [(x, target.transpose(0, 1))], **options)
    for a, b in zip(found.rows, other.rows, strict=True):
        assert a.monte_carlo == pytest.approx(b.monte_carlo, rel=1e-9)
    assert found.totals.regulariser == pytest.approx(other.totals.regulariser, rel=1e-9)


def test_an_output_without_a_batch_dimension_is_explained_batch_by_batch():
    class Summed(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sum(0)

    torch.manual_seed(0)
    net, (x, _) = Summed(2), data("quadratic")
    target = torch.zeros(2, dtype=torch.float64)
    found = explain(net, F.mse_loss, [(x, target)], rates=HALF, **QUICK)
    assert found.mode == "batch"
    assert found.totals.sums["linearised"] > 0
    with pytest.raises(UsageError, match='mode="row" needs a batch dimension'):
        explain(net, F.mse_loss, [(x, target)], rates=HALF, mode="row", **QUICK)


# --- forms of outputs and batches ---------------------------------------------------------------------------


class Wrapped(nn.Module):
    """A network that puts its output, and more, into a structure."""

    def __init__(self, net: Net, form: str) -> None:
        super().__init__()
        self.net, self.form = net, form

    def forward(self, x: Tensor, labels: Tensor | None = None):
        z = self.net(x)
        if self.form == "tuple":
            return z, z.argmax(-1)
        if self.form == "nested":
            return {"more": [None, {"logits": z}], "name": "logits"}
        from transformers.modeling_outputs import SequenceClassifierOutput

        loss = None if labels is None else F.cross_entropy(z, labels)
        return SequenceClassifierOutput(loss=loss, logits=z, hidden_states=(x,))


@pytest.mark.parametrize(
    ("form", "logits"),
    [
        ("tuple", lambda o: o[0]),
        ("nested", lambda o: o["more"][1]["logits"]),
        ("huggingface", lambda o: o.logits),
    ],
)
def test_outputs_may_be_any_tree_of_tensors(form, logits):
    net, (x, target) = fitted("cross_entropy"), data("cross_entropy")
    plain = explain(net, F.cross_entropy, [(x, target)], rates=RATES, **QUICK)
    rates = {f"net.{n}": p for n, p in RATES.items()}
    found = explain(
        Wrapped(net, form), lambda o, t: F.cross_entropy(logits(o), t), [(x, target)], rates=rates, **QUICK
    )
    assert found.loss_kind == "cross_entropy"
    for of in ("bregman", "linearised", "alone"):  # names, and so masks, differ
        assert found.totals.sums[of] == pytest.approx(plain.totals.sums[of], rel=1e-12)
    assert found.totals.regulariser > 0


class Paired(nn.Module):
    """Takes two positional arguments, which a pair of them must not be taken for inputs and target."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return self.net(x + shift)


def test_a_model_may_take_two_positional_arguments():
    net, (x, target) = fitted("cross_entropy"), data("cross_entropy")
    rates = {f"net.{n}": p for n, p in RATES.items()}
    options = {"rates": rates, **QUICK}
    whole = explain(Wrapped(net, "tuple"), lambda o, t: F.cross_entropy(o[0], t), [(x, target)], **options)
    pair = explain(Paired(net), F.cross_entropy, [((x - 1, torch.ones_like(x)), target)], **options)
    assert pair.mode == "row"
    assert pair.totals.regulariser == pytest.approx(whole.totals.regulariser, rel=1e-9)


def test_dict_batches_go_whole_to_model_and_loss():
    net, (x, target) = fitted("cross_entropy"), data("cross_entropy")
    rates = {f"net.{n}": p for n, p in RATES.items()}
    options = {"rates": rates, **QUICK}
    model = Wrapped(net, "huggingface")
    pair = explain(model, lambda o, t: F.cross_entropy(o.logits, t), [(x, target)], **options)
    whole = explain(
        model, lambda o, b: F.cross_entropy(o.logits, b["labels"]), [{"x": x, "labels": target}], **options
    )
    assert whole.as_dict() == pair.as_dict()
    assert whole.mode == "row"


def test_a_language_model_of_huggingface_is_explained_token_by_token():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=11, n_positions=8, attn_implementation="eager"
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    batch = {"input_ids": torch.randint(0, 11, (6, 8))}

    def loss(output, batch):
        return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())

    found = explain(model, loss, [batch], rates=HALF, draws=16, label_draws=200)
    assert (found.loss_kind, found.mode, len(found.rows)) == ("cross_entropy", "row", 4)
    for row in found.rows:
        assert row.linearised == pytest.approx(row.bregman, rel=0.5)
        assert row.hessian == pytest.approx(row.bregman, rel=0.5)
    assert found.totals.verdicts["monte_carlo"] in ("holds", "undecided")


# --- refusals -----------------------------------------------------------------------------------------------


def test_without_rates_and_without_a_handle_it_says_what_to_pass():
    with pytest.raises(UsageError, match="no handle to take survival rates from: pass rates="):
        explain(fitted("quadratic"), F.mse_loss, [data("quadratic")])


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"draws": 1}, UsageError, "explain: draws must be an integer of at least 2"),
        ({"site_draws": 1}, UsageError, "site_draws must be 0"),
        ({"label_draws": 1}, UsageError, "label_draws must be 0"),
        ({"draws": 3}, UsageError, "site_draws must be at most draws = 3"),
        ({"max_batches": 0}, UsageError, "max_batches"),
        ({"scale": "test"}, UsageError, 'scale must be "train" or "eval"'),
        ({"mode": "rows"}, UsageError, 'mode must be "row" or "batch"'),
        ({"seed": 0.5}, UsageError, "seed must be a whole number"),
        ({"rates": {"blocks.9": 0.5}}, SiteError, "did you mean blocks"),
        ({"rates": {"blocks.0": 1.5}}, RateError, r"blocks\.0: survival_rate must be in"),
        ({"rates": 0.5}, ArgumentError, "rates must be a rule or a mapping"),
        ({"include": "layer*"}, SiteError, "no site matches"),
        ({"batches": []}, UsageError, "batches is empty"),
        ({"batches": [(torch.zeros(0, 4).double(), torch.zeros(0, 2))]}, UsageError, "no rows"),
        ({"batches": 3}, ArgumentError, "batches must be a list or loader"),
        ({"model": "net"}, ArgumentError, "model must be a torch.nn.Module, got str"),
    ],
)
def test_arguments_are_refused_with_the_remedy(options, error, match):
    given = {"model": fitted("quadratic"), "loss_fn": F.mse_loss, "batches": [data("quadratic")]}
    with pytest.raises(error, match=match):
        explain(**{**given, "rates": HALF, **options})


@pytest.mark.parametrize(
    ("loss", "error", "match"),
    [
        (lambda o, t: F.mse_loss(o, t, reduction="none"), UsageError, "take its mean over the batch"),
        (lambda o, t: 0.0, UsageError, "loss_fn must return a tensor, got float"),
        (lambda o, t: F.mse_loss(o, t) * math.nan, RunError, "the loss is nan"),
        (lambda o, t: t.mean(), UsageError, "does not depend on the model's output tensors"),
        (lambda o, t: F.mse_loss(o.detach(), t), UsageError, "does not depend on the model's output tensors"),
    ],
    ids=["vector", "number", "nan", "target", "detached"],
)
def test_losses_are_refused_with_the_remedy(loss, error, match):
    with pytest.raises(error, match=match):
        explain(fitted("quadratic"), loss, [data("quadratic")], rates=HALF)


def test_a_loss_that_the_model_computed_itself_is_refused():
    x, target = data("cross_entropy")
    model = Wrapped(fitted("cross_entropy"), "huggingface")
    with pytest.raises(UsageError, match="one that the model computed itself"):
        explain(model, lambda o, b: o.loss, [{"x": x, "labels": target}], rates=HALF)


def test_a_part_that_the_model_computed_itself_is_said_to_add_nothing():
    x, target = data("cross_entropy")
    model = Wrapped(fitted("cross_entropy"), "huggingface")

    def loss(o, b):
        return o.loss + F.cross_entropy(o.logits, b["labels"])

    found = explain(model, loss, [{"x": x, "labels": target}], rates=HALF, **QUICK)
    assert any("counts as linear" in note for note in found.notes)


def test_an_output_without_floating_tensors_is_refused():
    class Decided(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(-1)

    with pytest.raises(UsageError, match="holds no floating tensor"):
        explain(Decided(), lambda o, t: t.mean(), [data("quadratic")], rates=HALF)


def test_a_site_that_the_gradient_does_not_reach_is_named():
    class Cut(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for i, block in enumerate(self.blocks):
                x = block(x)
                if i == 2:
                    x = x.detach()
            return self.head(x)

    x, target = data("quadratic")
    for options in ({}, {"label_draws": 0}):
        with pytest.raises(SiteError, match=r"blocks\.0: the loss's gradient does not reach.*2 others"):
            explain(Cut(2), F.mse_loss, [(x, target)], rates=HALF, **options)
    late = {"blocks.5": 0.5}
    assert explain(Cut(2), F.mse_loss, [(x, target)], rates=late, **QUICK).rows[5].hessian > 0


def test_a_site_beside_the_loss_is_named():
    class Aside(Net):
        def forward(self, x: Tensor):
            h = self.stem(x)
            for block in self.blocks[:-1]:
                h = block(h)
            return self.head(h), self.blocks[-1](h)

    x, target = data("quadratic")
    with pytest.raises(SiteError, match=r"blocks\.7: the loss's gradient does not reach"):
        explain(Aside(2), lambda o, t: F.mse_loss(o[0], t), [(x, target)], rates=HALF)


def test_the_model_is_as_before_after_a_refusal_too():
    net, (x, target) = copy.deepcopy(fitted("quadratic")), data("quadratic")
    net.train()
    with pytest.raises(RunError):
        explain(net, lambda o, t: F.mse_loss(o, t) / 0, [(x, target)], rates=HALF)
    assert all(m.training for m in net.modules())
    assert all(p.requires_grad for p in net.parameters())
    assert type(net.blocks[0].into) is nn.Linear and fallow.handle_of(net) is None


# --- what it says -----------------------------------------------------------------------------------------


def test_the_table_names_every_site_and_every_total():
    found = explain(fitted("quadratic"), F.mse_loss, [data("quadratic")], rates=RATES, scale="eval", **QUICK)
    text = str(found)
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[1 : LENGTH + 1]] == list(RATES)
    assert "p(1-p)" in lines[0]
    for words in ("penalty R", "at evaluation", "noise mass", "sum, Hessian", "sum, Monte Carlo"):
        assert words in text
    assert "Efron and Stein" in text and "largest noise mass" in text
    assert "(1-p)/p" in str(
        explain(fitted("quadratic"), F.mse_loss, [data("quadratic")], rates=RATES, scale="train", **QUICK)
    )


def test_the_scale_decides_what_is_said_of_uniform_rates():
    for scale, words in (("eval", "largest noise mass"), ("train", "least penalty")):
        batches = [data("quadratic")]
        found = explain(fitted("quadratic"), F.mse_loss, batches, rates=RATES, scale=scale, **QUICK)
        assert any(words in note and f'scale="{scale}"' in note for note in found.notes)


def test_the_dictionary_is_json_and_holds_what_the_table_does():
    found = explain(fitted("cross_entropy"), F.cross_entropy, [data("cross_entropy")], rates=RATES, **QUICK)
    back = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert (back["schema"], back["kind"], back["loss"]) == (1, "explanation", "cross_entropy")
    assert [s["name"] for s in back["sites"]] == list(RATES)
    for site, row in zip(back["sites"], found.rows, strict=True):
        assert site["monte_carlo"] == row.monte_carlo and site["share"] == row.share
    assert back["totals"]["regulariser"] == found.totals.regulariser
    assert back["totals"]["ratios"]["hessian"] == found.totals.ratios["hessian"]
    assert back["notes"] == list(found.notes)


@pytest.mark.parametrize(
    ("kind", "form", "rate", "verdict"),
    [("quadratic", "hessian", 0.99, "holds"), ("cross_entropy", "bregman", 0.6, "off")],
)
def test_a_form_is_said_to_hold_or_not_as_the_enumeration_has_it(kind, form, rate, verdict):
    rates = dict.fromkeys(RATES, rate)
    found = explain(
        fitted(kind), LOSSES[kind], [data(kind)], rates=rates, scale="eval", draws=100, site_draws=0
    )
    r, _ = exact(kind, list(rates.values()), "eval")
    assert (abs(found.totals.sums[form] / r - 1) < 0.1) is (verdict == "holds")
    assert found.totals.verdicts[form] == verdict
    assert found.totals.ratios[form] == found.totals.sums[form] / found.totals.regulariser
    assert any("known to fail" in note for note in found.notes) is (verdict == "off")


def test_shares_are_of_the_mean_loss_under_noise():
    found = explain(fitted("quadratic"), F.mse_loss, [data("quadratic")], rates=RATES, **QUICK)
    for row in found.rows:
        assert row.share == pytest.approx(row.monte_carlo / found.totals.loss_noisy)
    without = explain(
        fitted("quadratic"), F.mse_loss, [data("quadratic")], rates=RATES, draws=4, site_draws=0
    )
    assert without.rows[0].monte_carlo is None and without.totals.sums["monte_carlo"] is None
    assert without.rows[0].share == pytest.approx(without.rows[0].alone / without.totals.loss_noisy)
    assert "sum, Monte Carlo: not to be had" in str(without)


def test_log_probabilities_are_said_to_hide_the_penalty():
    class LogSoftmax(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).log_softmax(-1)

    found = explain(LogSoftmax(3), F.nll_loss, [data("cross_entropy")], rates=HALF, **QUICK)
    assert found.loss_kind == "linear"
    assert found.totals.regulariser == pytest.approx(0, abs=1e-12)
    assert any("pass logits" in note for note in found.notes)

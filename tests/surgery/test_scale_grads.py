"""What scale= and grads= promise, and fold: against formulas."""

from __future__ import annotations

import copy
from typing import Any

import laws
import pytest
import torch
import toys
from cases import POSITIVE
from torch import nn

import fallow

BY_NAME = {case.name: case for case in POSITIVE}
RATE = 0.6
KINDS = ["resnet20", "vit_small", "transitions", "parallel branches", "in place on the shortcut"]
KINDS += ["in place on the branch", "add_ on the shortcut, with alpha", "layer scale", "HF GPT2"]
WRITTEN = ("in place on the shortcut", "add_ on the shortcut, with alpha")
WAYS = {"batch": {"mode": "batch"}, "row": {"mode": "row", "sampler": "exact"}}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", KINDS)
def test_scale_eval_is_a_plain_gate_in_training_and_the_rate_at_evaluation(name: str, way: str) -> None:
    case = BY_NAME[name]
    model, dense = laws.pair(case)
    feed = laws.cast(case.feed(5), torch.float64)
    rates = {s.site: 0.3 + 0.6 * i / len(case.sums) for i, s in enumerate(case.sums)}
    example = laws.cast(case.feed(2), torch.float64)
    handle = fallow.apply(model, rates, example=example, scale="eval", **WAYS[way])
    for _ in range(2):
        laws.assert_same_run(model, dense, case, feed, handle, 1e-7, 1.0)
    dense.load_state_dict(model.state_dict())
    model.eval(), dense.eval()
    ours = laws.call(model, feed)
    theirs = laws.dense_run(dense, case, feed, {}, rates)
    for a, b in zip(laws.floats(ours), laws.floats(theirs), strict=True):
        laws.assert_close(a, b, 1e-9, "p f(x) at evaluation")
    with handle.dense():
        model.train(), dense.train()
        ours, theirs = laws.call(model, feed), laws.dense_run(dense, case, feed, {}, rates)
    for a, b in zip(laws.floats(ours), laws.floats(theirs), strict=True):
        laws.assert_close(a, b, 1e-9, "p f(x) under dense()")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_evaluation_without_gradients_passes_the_gates_of_torchs_encoder(
    norm_first: bool, padded: bool
) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
    x = torch.randn(3, 5, 8)
    padding = torch.arange(5).expand(3, 5) > torch.tensor([[4], [3], [1]])
    inputs: dict[str, Any] = {"src": x, "src_key_padding_mask": padding} if padded else {"src": x}
    handle = fallow.apply(model, fallow.rates.uniform(RATE), example=inputs, scale="eval")
    for applied in (model, copy.deepcopy(model)):
        applied.eval()
        with torch.no_grad():
            out = applied(**inputs)
        assert torch.equal(out, applied(**inputs).detach())
        part = applied.get_submodule("layers.0")
        with torch.no_grad():
            out = part(x)
        assert torch.equal(out, part(x).detach())
    assert torch.backends.mha.get_fastpath_enabled()
    handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert len(fallow.sites(model.requires_grad_(False), inputs)) == 4


# --- grads -------------------------------------------------------------------------------------------------


def own(model: nn.Module, handle: fallow.Handle, kept: bool) -> list[nn.Parameter]:
    masks = handle.masks()
    sites = [s for s in handle.sites if bool(masks[s.name].any()) == kept]
    return [p for s in sites for n in s.modules for p in model.get_submodule(n).parameters()]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [k for k in (*KINDS, "HF BertModel", "timm resnet18") if k not in WRITTEN])
def test_parameters_of_what_rests_get_none_or_zeros(name: str, way: str) -> None:
    case = BY_NAME[name]
    for grads in ("none", "zero"):
        model, feed = case.model(), case.feed(1 if way == "row" else 3)
        if way == "row":
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        example = case.feed(2)
        handle = fallow.apply(model, fallow.rates.uniform(0.5), example=example, grads=grads, **WAYS[way])
        rested = 0
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            laws.backward(laws.call(model, laws.cast(feed, requires_grad=True)))
            found = own(model, handle, kept=False)
            rested += len(found)
            if grads == "none":
                assert all(p.grad is None for p in found)
            else:
                assert all(p.grad is not None and not p.grad.any() for p in found)
            assert all(p.grad is not None for p in own(model, handle, kept=True))
        assert rested


def test_zeros_add_to_what_is_there_whenever_gradients_were_cleared() -> None:
    case = BY_NAME["two branches"]
    model, feed = case.model(), case.feed(3)
    handle = fallow.apply(model, fallow.rates.uniform(1e-6), example=feed, grads="zero")
    out = laws.call(model, laws.cast(feed, requires_grad=True))
    model.zero_grad(set_to_none=True)  # after the forward, before the backward
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    laws.backward(out)
    gates = [p for p in model.parameters() if p.grad is not None]
    assert len(gates) == len(list(model.parameters())) and all((p.grad == 1).all() for p in gates)
    assert handle.last_depth == 0


@pytest.mark.parametrize(("grads", "moves"), [("none", False), ("zero", True)])
def test_weight_decay_acts_on_what_rests_with_zeros_alone(grads: str, moves: bool) -> None:
    case = BY_NAME["two branches"]
    model, feed = case.model(), case.feed(3)
    handle = fallow.apply(model, {"0.mlp": 1e-6}, example=feed, grads=grads)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    before = copy.deepcopy(model.state_dict())
    laws.backward(laws.call(model, feed))
    optimiser.step()
    assert not handle.masks()["0.mlp"]
    for name, value in model.state_dict().items():
        expected = moves or not name.startswith("0.mlp")
        assert torch.equal(value, before[name]) != expected, name
        if name.startswith("0.mlp") and moves:
            assert torch.allclose(value, before[name] * (1 - 0.01))


def test_frozen_parameters_get_no_zeros() -> None:
    case = BY_NAME["two branches"]
    model, feed = case.model(), case.feed(3)
    model[0].requires_grad_(False)
    fallow.apply(model, fallow.rates.uniform(1e-6), example=feed, grads="zero")
    laws.backward(laws.call(model, feed))
    assert all(p.grad is None for p in model[0].parameters())
    assert all(p.grad is not None for p in model[1].parameters())


# --- fold --------------------------------------------------------------------------------------------------

FOLDS = ["resnet20", "post-activation", "pre-activation, fed by the raw input", "transitions", "vit_small"]
FOLDS += ["layer scale", "two branches", "in place on the branch", "timm convnext_atto", "timm resnet18"]
FOLDS += ["timm vit_tiny_patch16_224", "HF BertModel", "HF ViTModel", "HF Llama"]


@pytest.mark.parametrize("name", FOLDS)
def test_folding_gives_a_plain_model_equal_to_the_applied_one_at_evaluation(name: str) -> None:
    case = BY_NAME[name]
    model = case.model().double()
    feed, example = (laws.cast(case.feed(n), torch.float64) for n in (3, 2))
    plain = copy.deepcopy(model)
    handle = fallow.apply(model, fallow.rates.linear(last=0.4), example=example, scale="eval")
    model.eval()
    expected = [t.detach().clone() for t in laws.floats(laws.call(model, feed))]
    folded = handle.fold()
    assert folded is model and fallow.handle_of(model) is None
    for ours, theirs in zip(laws.floats(laws.call(folded, feed)), expected, strict=True):
        laws.assert_close(ours, theirs, 1e-9, "folded")
    plain.load_state_dict(folded.state_dict())
    for ours, theirs in zip(laws.floats(laws.call(plain.eval(), feed)), expected, strict=True):
        laws.assert_close(ours, theirs, 1e-9, "loaded into a model that never knew fallow")
    with pytest.raises(fallow.RunError, match="spent"):
        handle.set_rates(fallow.rates.uniform(0.5))


class NoEnd(nn.Module):
    """Ends in a tanh: nothing affine to fold into."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.two(torch.relu(self.one(x))))


class Tied(nn.Module):
    """Both branches end in the same weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = toys.mlp(width), toys.mlp(width)
        self.two[3].weight = self.one[3].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.one(x)
        return x + self.two(x)


class PlainNormEnd(NoEnd):
    """Ends in a norm without weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.two(torch.relu(self.one(x)))
        return x + torch.nn.functional.layer_norm(z, z.shape[-1:])


@pytest.mark.parametrize(
    ("make", "words"),
    [(NoEnd, r"1.*affine"), (PlainNormEnd, r"1.*affine"), (Tied, r"1\.one.*(affine|same weights)")],
)
def test_fold_refuses_a_branch_without_an_end_of_its_own_and_changes_nothing(make: type, words: str) -> None:
    model = nn.Sequential(toys.Glue(6), make(6))
    x = torch.randn(3, 5, 6)
    before = copy.deepcopy(model.state_dict())
    handle = fallow.apply(model, fallow.rates.uniform(0.5), example=x, scale="eval")
    model.eval()
    out = model(x)
    with pytest.raises(fallow.SiteError, match=words):
        handle.fold()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert fallow.handle_of(model) is handle and torch.equal(model(x), out)


def test_a_branch_at_rate_one_does_not_stop_a_fold() -> None:
    model = nn.Sequential(NoEnd(6), toys.Flat(6)).eval()
    x = torch.randn(3, 6)
    handle = fallow.apply(model, {"1.first": 0.5}, example=x, scale="eval")
    expected = model(x)
    assert torch.allclose(handle.fold()(x), expected, atol=1e-6)


def test_fold_is_for_scale_eval() -> None:
    case = BY_NAME["two branches"]
    handle = fallow.apply(case.model(), fallow.rates.uniform(0.5), example=case.feed(2))
    with pytest.raises(fallow.UsageError, match='scale="eval"'):
        handle.fold()

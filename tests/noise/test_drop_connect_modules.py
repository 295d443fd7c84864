"""DropConnect inside modules: what they compute, what stays as it was, copies, errors."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, embedding, linear
from torch.utils.checkpoint import checkpoint

import fallow
from fallow.errors import ArgumentError, FallowError, RateError, UsageError
from fallow.noise import DropConnect, drop_connect, drop_connect_, drop_connect_mask

P = 0.6
TOKENS = torch.arange(12).view(3, 4)


def attend(module: nn.Module, x: Tensor) -> Tensor:
    return module(x, x, x)[0]


def first(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)[0]


def plainly(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, tuple[str, ...], Callable[..., Tensor]]] = {
    "linear": (lambda: nn.Linear(5, 4), torch.randn(3, 5), ("weight",), plainly),
    "convolution": (lambda: nn.Conv2d(3, 4, 3), torch.randn(2, 3, 6, 6), ("weight",), plainly),
    "embedding": (lambda: nn.Embedding(12, 5), TOKENS, ("weight",), plainly),
    "attention": (
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        torch.randn(2, 5, 8),
        ("in_proj_weight", "out_proj.weight"),
        attend,
    ),
    "lstm": (lambda: nn.LSTM(5, 6, 2), torch.randn(7, 3, 5), ("weight_hh_l0", "weight_hh_l1"), first),
    "gru": (
        lambda: nn.GRU(5, 6, bidirectional=True),
        torch.randn(7, 3, 5),
        ("weight_ih_l0_reverse",),
        first,
    ),
    "cell": (lambda: nn.LSTMCell(5, 6), torch.randn(3, 5), ("weight_ih",), first),
    "norm": (lambda: nn.LayerNorm(5), torch.randn(3, 5), ("weight", "bias"), plainly),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def masks(module: nn.Module, names: tuple[str, ...], seed: int) -> dict[str, Tensor]:
    """Those of a forward with that seed."""
    noise, shapes = generator(seed), {name: p.shape for name, p in module.named_parameters()}
    return {name: drop_connect_mask(shapes[name], survival_rate=P, generator=noise) for name in names}


def snapshot(module: nn.Module) -> list[Any]:
    """All attributes and hooks of all submodules, by identity where they are not containers."""
    return [
        {
            key: {k: id(v) for k, v in value.items()}
            if isinstance(value, dict)
            else [id(v) for v in value]
            if key == "_flat_weights"
            else id(value)
            for key, value in part.__dict__.items()
            if key != "_flat_weight_refs"
        }
        for part in module.modules()
    ]


# --- what a forward computes --------------------------------------------------------------------------------


@every_case
def test_a_training_forward_sees_the_masked_parameters_and_they_get_its_gradient(case: Any) -> None:
    make, x, names, call = case
    module = make()
    twin = copy.deepcopy(module)
    drop_connect_(module, survival_rate=P, names=names, generator=generator(3))
    out = call(module, x)
    out.square().sum().backward()
    seen = masks(twin, names, 3)
    for name, mask in seen.items():  # the parameter of the plain twin is the masked one
        twin.get_parameter(name).data.mul_(mask / P)
    expected = call(twin, x)
    torch.testing.assert_close(out, expected)
    expected.square().sum().backward()
    for name, parameter in module.named_parameters():
        grad = twin.get_parameter(name).grad
        assert parameter.grad is not None and grad is not None
        if name in names:
            grad = grad * seen[name] / P
        torch.testing.assert_close(parameter.grad, grad)


@every_case
def test_evaluation_and_rate_one_are_the_plain_module(case: Any) -> None:
    make, x, names, call = case
    module = make()
    plain, state = call(module, x), torch.get_rng_state()
    handle = drop_connect_(module, survival_rate=P, names=names)
    assert torch.equal(call(module.eval(), x), plain)
    handle.survival_rate = 1
    assert torch.equal(call(module.train(), x), plain)
    assert torch.equal(torch.get_rng_state(), state)
    handle.survival_rate = P
    assert not torch.equal(call(module, x), plain)


def test_every_forward_has_a_new_mask_and_the_rate_follows_the_handle() -> None:
    layer = nn.Linear(200, 300, bias=False)
    nn.init.ones_(layer.weight)
    handle = drop_connect_(layer, survival_rate=0.5)
    x = torch.eye(200)
    one, two = layer(x), layer(x)
    assert not torch.equal(one, two) and set(one.unique().tolist()) == {0, 2}
    handle.survival_rate = 0.8
    out = layer(x)
    assert set(out.unique().tolist()) == {0, 1.25}
    assert abs(float((out != 0).double().mean()) - 0.8) < 5 * (0.16 / out.numel()) ** 0.5


def test_row_mode_of_a_linear_layer_is_the_function() -> None:
    layer, x = nn.Linear(5, 4), torch.randn(2, 3, 5)
    handle = drop_connect_(layer, survival_rate=P, mode="row", generator=generator(3))
    expected = drop_connect(x, layer.weight, layer.bias, survival_rate=P, mode="row", generator=generator(3))
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.eval()(x), linear(x, layer.weight, layer.bias))
    handle.remove()
    assert torch.equal(layer.train()(x), linear(x, layer.weight, layer.bias))
    assert "forward" not in layer.__dict__


@pytest.mark.parametrize("first", ["weight", "bias"])
def test_rows_and_a_bias_are_masked_together_in_either_order(first: str) -> None:
    layer, x, handles = nn.Linear(5, 4), torch.randn(6, 5), {}
    for name in (first, {"weight": "bias", "bias": "weight"}[first]):
        mode = "row" if name == "weight" else "batch"
        source = generator(3)
        handles[name] = drop_connect_(layer, survival_rate=P, names=name, mode=mode, generator=source)
    expected = drop_connect(x, layer.weight, survival_rate=P, mode="row", generator=generator(3))
    offset = layer(x) - expected
    kept = offset[0] != 0
    torch.testing.assert_close(offset, (kept * layer.bias / P).expand_as(offset))
    assert {name: DropConnect.of(layer, name) for name in handles} == handles
    assert DropConnect.of(layer) is handles[first] and DropConnect.of(layer, "other") is None
    handles["weight"].remove()
    assert DropConnect.of(layer) is handles["bias"] and "forward" not in layer.__dict__


@pytest.mark.parametrize("mode", ["batch", "row"])
def test_draws_come_from_torchs_default_generator(mode: str) -> None:
    layer, x = nn.Linear(30, 40), torch.randn(3, 30)
    drop_connect_(layer, survival_rate=P, mode=mode)
    torch.manual_seed(5)
    out = layer(x)
    torch.manual_seed(5)
    assert torch.equal(out, drop_connect(x, layer.weight, layer.bias, survival_rate=P, mode=mode))


def test_modules_that_share_a_parameter_mask_it_each_on_its_own() -> None:
    table, head = nn.Embedding(12, 5), nn.Linear(5, 12, bias=False)
    head.weight = table.weight
    drop_connect_(table, survival_rate=P, generator=generator(1))
    drop_connect_(head, survival_rate=P, generator=generator(2))
    one, two = (masks(table, ("weight",), seed)["weight"] * table.weight * (1 / P) for seed in (1, 2))
    assert torch.equal(head(table(TOKENS)), linear(embedding(TOKENS, one), two))


# --- what stays as it was -----------------------------------------------------------------------------------


@every_case
def test_state_and_parameters_stay_and_removal_restores_the_module_entirely(case: Any) -> None:
    make, x, names, call = case
    module = make()
    before, keys, kind = snapshot(module), list(module.state_dict()), type(module)
    handle = drop_connect_(module, survival_rate=P, names=names)
    call(module, x).sum().backward()
    assert list(module.state_dict()) == keys and type(module) is kind
    module.load_state_dict(make().state_dict())
    handle.remove()
    handle.remove()
    assert snapshot(module) == before
    assert DropConnect.of(module) is None
    assert torch.equal(call(module, x), call(module, x))
    drop_connect_(module, survival_rate=P, names=names)  # and it can be put on again


@every_case
def test_outside_a_forward_attributes_are_the_parameters(case: Any) -> None:
    make, x, names, call = case
    module = make()
    identities = {name: id(parameter) for name, parameter in module.named_parameters()}
    drop_connect_(module, survival_rate=P, names=names)
    call(module, x)
    for name in names:
        path, _, attribute = name.rpartition(".")
        assert id(getattr(module.get_submodule(path), attribute)) == identities[name]


def test_an_error_or_an_interrupt_in_a_forward_leaves_nothing_behind() -> None:
    layer = nn.Linear(5, 4)
    before = set(layer.__dict__)
    handle = drop_connect_(layer, survival_rate=P)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(torch.randn(3, 6))
    assert isinstance(layer.weight, nn.Parameter)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = layer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        layer(torch.randn(3, 5))
    hook.remove()
    x = torch.randn(3, 5)
    assert torch.equal(layer.eval()(x), linear(x, layer._parameters["weight"], layer.bias))  # type: ignore[arg-type]
    handle.remove()
    assert set(layer.__dict__) == before


def test_an_optimiser_made_before_trains_the_parameters() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 3), torch.randn(64, 8)
    y = x @ torch.randn(8, 3)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    drop_connect_(layer, survival_rate=0.9)
    for _ in range(200):
        optimiser.zero_grad()
        (layer(x) - y).square().mean().backward()
        optimiser.step()
    with torch.no_grad():
        assert float((layer.eval()(x) - y).square().mean()) < 0.1 * float(y.square().mean())


# --- copies and company -------------------------------------------------------------------------------------


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_case
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved],
    ids=["deepcopy", "pickle", "save"],
)
def test_copies_drop_on_their_own(case: Any, copied: Callable[[nn.Module], nn.Module]) -> None:
    make, x, names, call = case
    whole = nn.ModuleDict({"part": make()})
    handle = drop_connect_(whole["part"], survival_rate=P, names=names)
    twin = copied(whole)["part"]
    other = DropConnect.of(twin)
    assert other is not None and other is not handle and other.module is twin and other.survival_rate == P
    plain = call(twin.eval(), x)
    assert not torch.equal(call(twin.train(), x), plain)
    handle.remove()  # of the original alone
    assert not torch.equal(call(twin, x), plain)
    other.remove()
    assert torch.equal(call(twin, x), plain) and not twin._forward_hooks and not twin._forward_pre_hooks


def test_the_handle_is_found_at_the_module_whose_forward_it_is_for() -> None:
    module = nn.MultiheadAttention(8, 2)
    handle = drop_connect_(module, survival_rate=P, names="out_proj.weight")
    assert DropConnect.of(module) is handle and DropConnect.of(module.out_proj) is None


def test_row_mode_is_copied_too() -> None:
    layer, x = nn.Linear(5, 4), torch.randn(3, 5)
    drop_connect_(layer, survival_rate=P, mode="row")
    for copied in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved):
        twin = copied(layer)
        with torch.no_grad():
            twin.weight.zero_()
        assert torch.equal(twin(x), twin.bias.expand(3, -1))  # its own weight, not that of the original
        handle = DropConnect.of(twin)
        assert handle is not None
        handle.remove()
        assert "forward" not in twin.__dict__


def test_a_row_mode_beneath_a_later_replacement_of_the_forward_lets_go() -> None:
    layer, x = nn.Linear(5, 4), torch.randn(3, 5)
    handle = drop_connect_(layer, survival_rate=P, mode="row")
    inner = layer.forward
    layer.forward = lambda x: inner(x) + 1  # type: ignore[method-assign]
    handle.remove()
    assert torch.equal(layer(x), linear(x, layer.weight, layer.bias) + 1)


@pytest.mark.parametrize("mode", ["batch", "row"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_masks_again(mode: str, reentrant: bool) -> None:
    layer, x = nn.Sequential(nn.Linear(6, 6), nn.Tanh()).double(), torch.randn(4, 6).double().requires_grad_()
    drop_connect_(layer[0], survival_rate=P, mode=mode)
    found = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        torch.manual_seed(3)
        layer.zero_grad()
        call(x).square().sum().backward()
        found.append(layer[0].weight.grad)
    assert torch.equal(found[0], found[1])
    assert isinstance(layer[0].weight, nn.Parameter)


def test_a_module_compiles_to_one_graph() -> None:
    torch.compiler.reset()
    layer = nn.Sequential(nn.Linear(40, 300, bias=False)).double()
    nn.init.ones_(layer[0].weight)
    drop_connect_(layer[0], survival_rate=0.5)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=False)
    x = torch.eye(40, dtype=torch.float64)
    one, two = compiled(x), compiled(x)
    assert set(one.unique().tolist()) == {0, 2} and not torch.equal(one, two)
    one.sum().backward()
    assert torch.equal(layer[0].weight.grad, one.T)
    assert isinstance(layer[0].weight, nn.Parameter)


def test_functional_calls_mask_the_parameters_they_bring() -> None:
    layer, x = nn.Linear(5, 4), torch.randn(3, 5)
    drop_connect_(layer, survival_rate=P, generator=generator(3))
    weight = torch.ones(4, 5)
    out = torch.func.functional_call(layer, {"weight": weight}, (x,))
    assert torch.equal(out, drop_connect(x, weight, layer.bias, survival_rate=P, generator=generator(3)))
    assert isinstance(layer.weight, nn.Parameter)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_are_rounded_once(dtype: torch.dtype) -> None:
    layer = nn.Conv2d(3, 4, 3).to(dtype)
    x = torch.randn(2, 3, 6, 6).to(dtype)
    drop_connect_(layer, survival_rate=0.9, generator=generator(3))
    mask = drop_connect_mask(layer.weight.shape, survival_rate=0.9, generator=generator(3))
    assert torch.equal(layer(x), conv2d(x, torch.where(mask, layer.weight * (1 / 0.9), 0), layer.bias))


def test_a_parametrised_weight_is_masked_by_its_own_name() -> None:
    layer, x = nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)), torch.randn(3, 5)
    name = "parametrizations.weight.original1"
    with pytest.raises(UsageError, match=f"no parameter 'weight'.*{name[:28]}"):
        drop_connect_(layer, survival_rate=P)
    plain = layer(x)
    handle = drop_connect_(layer, survival_rate=P, names=name)
    assert not torch.equal(layer(x), plain)
    handle.remove()
    assert torch.equal(layer(x), plain)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def test_it_goes_together_with_applied_stochastic_depth() -> None:
    model, x = nn.Sequential(Block(), Block()), torch.randn(8, 6)
    for block in model:
        drop_connect_(block.branch, survival_rate=P)
    handle = fallow.apply(model, fallow.rates.uniform(0.5), example=x)
    twin = copy.deepcopy(model)
    for one in (model, twin, pickle.loads(pickle.dumps(model))):
        one.train()(x).sum().backward()
        assert all(isinstance(block.branch.weight, nn.Parameter) for block in one)
    handle.remove()
    for block in model:
        drop = DropConnect.of(block.branch)
        assert drop is not None
        drop.remove()
    assert torch.equal(model(x), model(x))


# --- errors -------------------------------------------------------------------------------------------------


def twice(inside: bool) -> None:
    module = nn.MultiheadAttention(8, 2)
    drop_connect_(module, survival_rate=P, names=("in_proj_weight", "out_proj.weight"))
    drop_connect_(
        module.out_proj if inside else module, survival_rate=P, names="weight" if inside else "in_proj_weight"
    )


def replaced() -> None:
    layer = nn.Linear(3, 4)
    layer.forward = layer.forward  # type: ignore[method-assign]
    drop_connect_(layer, survival_rate=P, mode="row")


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: drop_connect_(nn.Linear(3, 4)), ArgumentError, "drop_connect_ needs survival_rate"),
        (lambda: drop_connect_(nn.Linear(3, 4), p=0.1), ArgumentError, "takes survival_rate, not p"),
        (lambda: drop_connect_(torch.relu, survival_rate=P), ArgumentError, "takes a torch.nn.Module, got"),
        (lambda: drop_connect_(nn.Linear(3, 4), survival_rate=0), RateError, "survival_rate must be in"),
        (lambda: drop_connect_(nn.ReLU(), survival_rate=P), UsageError, "no parameter 'weight'; it has none"),
        (
            lambda: drop_connect_(nn.LSTM(3, 4), survival_rate=P, names="weight_hh"),
            UsageError,
            "weight_hh_l0",
        ),
        (
            lambda: drop_connect_(nn.Linear(3, 4, bias=False), survival_rate=P, names="bias"),
            UsageError,
            "weight",
        ),
        (lambda: drop_connect_(nn.Linear(3, 4), survival_rate=P, names=()), UsageError, "at least one"),
        (
            lambda: drop_connect_(nn.Linear(3, 4), survival_rate=P, names=("weight",) * 2),
            UsageError,
            "different",
        ),
        (
            lambda: drop_connect_(nn.Conv1d(3, 4, 1), survival_rate=P, mode="row"),
            UsageError,
            "weight of Conv1d",
        ),
        (
            lambda: drop_connect_(nn.Linear(3, 4), survival_rate=P, mode="row", names="bias"),
            UsageError,
            "got bias of Linear",
        ),
        (lambda: drop_connect_(nn.Embedding(3, 4, max_norm=1), survival_rate=P), UsageError, "max_norm"),
        (lambda: drop_connect_(nn.Embedding(3, 4, sparse=True), survival_rate=P), UsageError, "sparse=True"),
        (lambda: twice(False), UsageError, "in_proj_weight of MultiheadAttention has DropConnect already"),
        (
            lambda: twice(True),
            UsageError,
            "weight of NonDynamicallyQuantizableLinear has DropConnect already",
        ),
        (replaced, UsageError, "something has replaced the forward"),
    ],
)
def test_wrong_use_is_refused_in_words(call: Callable[[], Any], error: type[FallowError], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


def test_a_refused_call_changes_nothing_and_a_wrong_rate_is_refused_later_too() -> None:
    layer = nn.Linear(3, 4)
    before = snapshot(layer)
    with pytest.raises(UsageError):
        drop_connect_(layer, survival_rate=P, names=("weight", "gain"))
    assert snapshot(layer) == before
    handle = drop_connect_(layer, survival_rate=P)
    with pytest.raises(RateError):
        handle.survival_rate = 1.5
    assert handle.survival_rate == P and repr(handle).startswith(
        "DropConnect(survival_rate=0.6, names=('weight',)"
    )

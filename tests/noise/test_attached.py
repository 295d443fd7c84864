"""What all noise on layers has in common: names and parameters, checkpoints both ways, copies, removal."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fallow
from fallow.errors import ArgumentError, RunError, UsageError
from fallow.noise import (
    DropConnect,
    HardConcreteGates,
    StandoutNoise,
    TargetedDropout,
    VariationalNoise,
    WeightDropout,
    drop_connect_,
    hard_concrete_,
    plain_state_dict,
    standout_,
    targeted_dropout_,
    variational_,
    weight_dropout_,
)

Put = Callable[..., Any]

# How to put it on, and the kind of its handle.
KINDS: dict[str, tuple[Put, Any]] = {
    "bernoulli": (lambda m, **k: weight_dropout_(m, 0.5, **k), WeightDropout),
    "gaussian": (lambda m, **k: weight_dropout_(m, 0.5, kind="gaussian", **k), WeightDropout),
    "additive": (lambda m, **k: variational_(m, start=-3.0, **k), VariationalNoise),
    "multiplicative": (
        lambda m, **k: variational_(m, form="multiplicative", start=0.0, **k),
        VariationalNoise,
    ),
    "weights": (lambda m, **k: variational_(m, start=-3.0, sample="weights", **k), VariationalNoise),
    "gates": (lambda m, **k: hard_concrete_(m, **k), HardConcreteGates),
    "gated outputs": (lambda m, **k: hard_concrete_(m, groups="outputs", **k), HardConcreteGates),
    "targeted": (lambda m, **k: targeted_dropout_(m, 0.5, survival_rate=0.5, **k), TargetedDropout),
    "targeted outputs": (
        lambda m, **k: targeted_dropout_(m, 0.5, survival_rate=0.5, groups="outputs", **k),
        TargetedDropout,
    ),
}
LEARNED = {
    "additive": "_log_variance",
    "multiplicative": "_log_alpha",
    "weights": "_log_variance",
    "gates": "_log_a",
    "gated outputs": "_log_a",
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_learned_kind = pytest.mark.parametrize("kind", LEARNED)
X = torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(0))


def model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(3, 8, 2), nn.Tanh(), nn.Flatten(), nn.Linear(32, 6), nn.Tanh(), nn.Linear(6, 4)
    )


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def snapshot(module: nn.Module) -> list[Any]:
    """All attributes and hooks of all submodules, by identity where they are not containers."""
    return [
        {
            key: {k: id(v) for k, v in value.items()} if isinstance(value, dict) else id(value)
            for key, value in part.__dict__.items()
        }
        for part in module.modules()
    ]


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_kind
def test_training_is_noisy_and_evaluation_is_not(kind: str) -> None:
    net = model()
    KINDS[kind][0](net)
    assert not torch.equal(net(X), net(X))
    net.eval()
    assert torch.equal(net(X), net(X))
    net.train()
    net(X).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())


@every_kind
def test_removal_restores_the_model_entirely(kind: str) -> None:
    net = model()
    before, plain = snapshot(net), net(X)
    put, of = KINDS[kind]
    handle = put(net)
    net(X).sum().backward()
    net.zero_grad()
    assert of.of(net) is not None
    handle.remove()
    handle.remove()
    assert snapshot(net) == before and of.of(net) is None
    assert torch.equal(net(X), plain)
    put(net)  # and it can be put on again


@every_kind
def test_parameters_stay_the_same_objects_under_the_same_names(kind: str) -> None:
    net = model()
    identities = {name: id(p) for name, p in net.named_parameters()}
    handle = KINDS[kind][0](net)
    net(X)
    assert {name: id(p) for name, p in net.named_parameters() if name in identities} == identities
    assert isinstance(net[0].weight, nn.Parameter) and id(net[0].weight) == identities["0.weight"]
    extra = [name for name in net.state_dict() if name not in identities]
    suffix = LEARNED.get(kind)
    assert extra == ([name + suffix for name in ("0.weight", "3.weight", "5.weight")] if suffix else [])
    assert [id(p) for p in handle.parameters()] == [id(net.get_parameter(name)) for name in extra]


@every_kind
def test_checkpoints_of_the_plain_model_load_and_what_is_learned_begins_anew(kind: str) -> None:
    net, plain = model(), model()
    handle = KINDS[kind][0](net)
    first = [p.detach().clone() for p in handle.parameters()]
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(1.0)
    state = plain.state_dict()
    net.load_state_dict(state)
    assert list(state) == list(plain.state_dict())  # the caller's dict stays as it was
    for name, value in plain.state_dict().items():
        assert torch.equal(net.state_dict()[name], value)
    for parameter, start in zip(handle.parameters(), first, strict=True):
        assert float((parameter.detach() - start).abs().max()) < 0.2  # gates begin with noise of 0.01


@every_learned_kind
def test_checkpoints_of_the_noisy_model_load_whole_and_half_ones_are_refused_as_ever(kind: str) -> None:
    net, other = model(), model()
    for one in (net, other):
        handle = KINDS[kind][0](one)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.sub_(0.5)
    net.load_state_dict(other.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    head = {name: value for name, value in model().state_dict().items() if name.startswith("5.")}
    with pytest.raises(RuntimeError, match="Missing key.*0.weight"):
        net.load_state_dict(head)
    net.load_state_dict(head, strict=False)  # leaves the others as they are, what they learned too
    assert torch.equal(net[0].weight, other[0].weight)
    name = f"weight{LEARNED[kind]}"
    assert torch.equal(getattr(net[0], name), getattr(other[0], name))


@every_kind
def test_the_plain_state_dict_computes_in_the_plain_model_what_evaluation_does(kind: str) -> None:
    net, plain = model(), model()
    handle = KINDS[kind][0](net)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.copy_(4 * torch.rand_like(parameter) - 2)  # some gates and alphas apart
    plain.load_state_dict(handle.plain_state_dict())
    net.eval()
    torch.testing.assert_close(plain(X), net(X))
    if kind in LEARNED:
        with pytest.raises(RuntimeError, match="Unexpected key"):
            model().load_state_dict(net.state_dict())
    net.train()
    handle.harden()
    torch.testing.assert_close(net(X), plain(X))
    assert list(net.state_dict()) == list(plain.state_dict()) and type(handle).of(net) is None


def test_a_model_with_noise_of_several_kinds_has_one_plain_state_dict() -> None:
    net, plain = model(), model()
    hard_concrete_(net, names="0.weight")
    variational_(net[3])
    targeted_dropout_(net[5], 0.5, survival_rate=0.5)
    drop_connect_(net[5], survival_rate=0.5, names="bias")
    plain.load_state_dict(plain_state_dict(net))
    torch.testing.assert_close(plain(X), net.eval()(X))


@every_kind
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved],
    ids=["deepcopy", "pickle", "save"],
)
def test_copies_have_noise_of_their_own(kind: str, copied: Callable[[nn.Module], Any]) -> None:
    net = model()
    put, of = KINDS[kind]
    handle = put(net)
    twin = copied(net)
    for parameter, other in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter, other) and parameter is not other
    torch.manual_seed(3)
    one = net(X)
    torch.manual_seed(3)
    assert torch.equal(twin(X), one)
    found = of.of(twin)
    assert found.names == handle.names
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    handle.remove()  # of the original alone
    assert of.of(twin) is not None and not torch.equal(net(X), torch.zeros(6, 4))
    names = [name for name, _ in net.named_parameters()]
    twin.load_state_dict({**net.state_dict()})  # its own learned parameters begin anew, on its own layers
    found.remove()
    assert [name for name, _ in twin.named_parameters()] == names
    assert torch.equal(twin(X), net(X))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in twin.modules())


@every_kind
def test_a_layer_is_copied_without_the_rest_of_its_model(kind: str) -> None:
    net = model()
    KINDS[kind][0](net)
    part = copy.deepcopy(net[5])
    held = [noise.module for noise in part.__dict__["_fallow_noise"].values()]
    assert held == [part]


@every_kind
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_again(kind: str, reentrant: bool) -> None:
    net = model().double()
    KINDS[kind][0](net)
    x = X.double().requires_grad_()
    found = []
    for call in (net, lambda x: checkpoint(net, x, use_reentrant=reentrant)):
        torch.manual_seed(3)
        net.zero_grad()
        call(x).square().sum().backward()
        found.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@every_kind
def test_a_generator_decides_the_draws_and_leaves_torchs_alone(kind: str) -> None:
    net = model()
    noise = generator(4)
    KINDS[kind][0](net, generator=noise)
    state = torch.get_rng_state()
    noise.manual_seed(5)
    one, two = net(X), net(X)
    noise.manual_seed(5)
    assert torch.equal(net(X), one) and not torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), state)


@every_kind
def test_an_error_in_a_forward_leaves_nothing_behind(kind: str) -> None:
    net = model()
    KINDS[kind][0](net)
    before = [set(part.__dict__) for part in net.modules()]
    with pytest.raises(RuntimeError, match="expected input|shapes cannot|size"):
        net[0](torch.randn(6, 4, 5))
    with pytest.raises(RuntimeError, match="shapes cannot"):
        net[5](torch.randn(6, 5))
    assert [set(part.__dict__) for part in net.modules()] == before
    assert isinstance(net[5].weight, nn.Parameter)


@every_kind
def test_functional_calls_disturb_the_parameters_they_bring(kind: str) -> None:
    net, other = model(), model()
    KINDS[kind][0](net)
    torch.manual_seed(1)
    found = torch.func.functional_call(net, dict(other.named_parameters()), (X,))
    net.load_state_dict({**net.state_dict(), **other.state_dict()})
    torch.manual_seed(1)
    assert torch.equal(found, net(X))


@every_kind
def test_a_model_follows_a_change_of_type(kind: str) -> None:
    net = model()
    KINDS[kind][0](net)
    for dtype in (torch.float64, torch.bfloat16):
        net.to(dtype)
        out = net(X.to(dtype))
        assert out.dtype == dtype and bool(out.isfinite().all())


@every_kind
def test_autocast_and_resting_branches_go_along(kind: str) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.branch(x)

    net, x = nn.Sequential(Block(), Block()), torch.randn(8, 6)
    handle = KINDS[kind][0](net)
    resting = fallow.apply(net, fallow.rates.uniform(0.5), example=x)
    for one in (net, copy.deepcopy(net)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = one.train()(x)
        out.float().sum().backward()
        assert bool(out.isfinite().all())
    resting.remove()
    handle.remove()
    assert torch.equal(net(x), net(x))


@pytest.mark.parametrize("kind", ["bernoulli", "additive", "gates"])
def test_a_layer_compiles_to_one_graph(kind: str) -> None:
    torch.compiler.reset()
    layer = nn.Sequential(nn.Linear(6, 5))
    KINDS[kind][0](layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=False)
    x = torch.randn(4, 6)
    one, two = compiled(x), compiled(x)
    assert not torch.equal(one, two)
    one.sum().backward()
    assert isinstance(layer[0].weight, nn.Parameter) and layer[0].weight.grad is not None


@every_kind
def test_noise_on_noise_is_refused_and_changes_nothing(kind: str) -> None:
    net = model()
    put = KINDS[kind][0]
    handle = put(net[5])
    before = snapshot(net)
    for other in KINDS.values():
        with pytest.raises(UsageError, match=f"5.weight of Sequential has {type(handle).__name__} already"):
            other[0](net)
    with pytest.raises(UsageError, match="already"):
        drop_connect_(net[5], survival_rate=0.5)
    assert snapshot(net) == before
    put(net, names=("0.weight", "3.weight"))
    assert len(KINDS[kind][1].of(net).names) == 3


def test_dropconnect_counts_as_noise_too() -> None:
    layer = nn.Linear(3, 4)
    drop_connect_(layer, survival_rate=0.5)
    with pytest.raises(UsageError, match="weight of Linear has DropConnect already"):
        weight_dropout_(layer)
    assert WeightDropout.of(layer) is None and DropConnect.of(layer) is not None


@every_kind
def test_what_cannot_have_noise_is_refused_in_words(kind: str) -> None:
    put = KINDS[kind][0]
    with pytest.raises(ArgumentError, match=r"takes a torch.nn.Module, got"):
        put(torch.relu)
    with pytest.raises(UsageError, match="ReLU has no linear layer or convolution"):
        put(nn.ReLU())
    with pytest.raises(UsageError, match="no parameter 'wieght'; did you mean weight"):
        put(nn.Linear(3, 4), names="wieght")
    with pytest.raises(UsageError, match="at least one"):
        put(nn.Linear(3, 4), names=())
    layer = nn.Linear(3, 4)
    before = snapshot(layer)
    layer.weight.data[0, 0] = math.nan
    with pytest.raises(UsageError, match="weight has NaN or infinite entries"):
        put(layer)
    with pytest.raises(UsageError, match="pass the module that does, say the attention"):
        put(nn.MultiheadAttention(4, 2).out_proj, names="weight")
    assert snapshot(layer) == before


@every_kind
def test_hardening_after_a_divergence_changes_nothing(kind: str) -> None:
    net = model()
    handle = KINDS[kind][0](net)
    with torch.no_grad():
        net[5].weight[1, 1] = math.nan
        before = net[0].weight.clone()
    with pytest.raises(RunError, match="5.weight has NaN or infinite entries: nothing was changed"):
        handle.harden()
    assert torch.equal(net[0].weight, before) and KINDS[kind][1].of(net) is not None


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("additive", "multiplicative")])
def test_attention_and_recurrent_weights_have_noise_where_they_are_read(kind: str) -> None:
    put = KINDS[kind][0]
    attention = nn.ModuleDict({"part": nn.MultiheadAttention(8, 2, batch_first=True)})
    handle = put(attention, names=("part.out_proj.weight", "part.in_proj_weight"))
    x = torch.randn(2, 5, 8)

    def attend(module: Any) -> Tensor:
        return module["part"](x, x, x)[0]

    assert sorted(handle.names) == ["part.in_proj_weight", "part.out_proj.weight"]
    assert not torch.equal(attend(attention), attend(attention))
    attend(attention).sum().backward()
    plain = nn.ModuleDict({"part": nn.MultiheadAttention(8, 2, batch_first=True)})
    plain.load_state_dict(handle.plain_state_dict())
    torch.testing.assert_close(attend(plain), attend(attention.eval()))
    recurrent = nn.LSTM(3, 4)
    put(recurrent, names=("weight_hh_l0", "weight_ih_l0"))
    y = torch.randn(5, 2, 3)
    assert not torch.equal(recurrent(y)[0], recurrent(y)[0])


def test_copies_and_checkpoints_of_standout() -> None:
    net = model()
    standout_(net[3], at=net[4])
    for copied in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved):
        twin = copied(net)
        torch.manual_seed(3)
        one = net(X)
        torch.manual_seed(3)
        assert torch.equal(twin(X), one)
        handle = StandoutNoise.of(twin)
        assert handle is not None
        handle.remove()
        assert torch.equal(twin(X), twin(X)) and not torch.equal(net(X), net(X))
    grads = []
    for call in (net, lambda x: checkpoint(net, x, use_reentrant=False)):
        torch.manual_seed(3)
        net.zero_grad()
        call(X).square().sum().backward()
        grads.append(net[0].weight.grad)
    assert torch.equal(*grads)

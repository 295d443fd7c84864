"""Chains of layers: what is dead goes, constants are folded, outputs stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shrink_cases import LeNet5, assert_same, deaden, lively, mlp, outputs, reasons, shape, unread, vgg
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from fallow.errors import ArgumentError, RunError, UsageError
from fallow.sparsity.shrink import shrink


def test_the_chain_of_the_notes_loses_its_neurons_and_folds_their_constants() -> None:
    net = lively(mlp()).double()
    with torch.no_grad():
        net[0].weight[[1, 5]] = 0.0  # pyright: ignore
        net[2].weight[:, [5, 7, 9]] = 0.0  # pyright: ignore
        net[2].weight[[3, 8]] = 0.0  # pyright: ignore
    x = torch.randn(64, 20, dtype=torch.float64)
    result = shrink(net, x[:1])
    assert shape(result.model, "0") == (12, 20)
    assert shape(result.model, "2") == (10, 12)
    assert result.model[0].out_features == 12 and result.model[2].in_features == 12  # pyright: ignore
    assert not result.left
    assert_same(net, result.model, x)
    assert result.before.parameters == 16 * 21 + 12 * 17 + 5 * 13
    assert result.after.parameters == 12 * 21 + 10 * 13 + 5 * 11
    assert result.before.flops == 2 * (20 * 16 + 16 * 12 + 12 * 5)
    assert result.after.flops == 2 * (20 * 12 + 12 * 10 + 10 * 5)


def test_a_folded_constant_is_the_activation_of_the_bias() -> None:
    net = lively(nn.Sequential(nn.Linear(3, 2), nn.GELU(), nn.Linear(2, 1))).double()
    with torch.no_grad():
        net[0].weight[1] = 0.0  # pyright: ignore
    bias, weight = net[0].bias[1], net[2].weight  # pyright: ignore
    expected = net[2].bias + weight[0, 1] * nn.functional.gelu(bias)  # pyright: ignore
    small = shrink(net, torch.randn(1, 3)).model
    assert torch.allclose(small[2].bias, expected, atol=1e-15, rtol=0)  # pyright: ignore


def _alive_by_hand(weights: list[Tensor]) -> list[Tensor]:
    """Hidden units of an MLP that must stay: not constant, and read by a unit that must."""
    moving, alive = [], []
    live_in = torch.ones(weights[0].shape[1], dtype=torch.bool)
    for w in weights[:-1]:
        live_in = ((w != 0) & live_in).any(1)
        moving.append(live_in)
    needed = torch.ones(weights[-1].shape[0], dtype=torch.bool)
    for w, m in zip(reversed(weights[1:]), reversed(moving), strict=True):
        needed = (w[needed] != 0).any(0) & m
        alive.append(needed)
    return alive[::-1]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.2, 0.9), st.sampled_from([nn.ReLU, nn.Tanh, nn.Sigmoid, nn.SiLU]))
def test_of_random_zeros_exactly_the_dead_neurons_of_a_chain_go(seed: int, share: float, act: type) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(5, 6), act(), nn.Linear(6, 7), act(), nn.Linear(7, 6), act(), nn.Linear(6, 2)
    )
    net = lively(net, seed).double()
    layers = [m for m in net if isinstance(m, nn.Linear)]
    with torch.no_grad():
        for layer in layers:
            layer.weight[torch.rand(layer.weight.shape) < share] = 0.0
            layer.weight[torch.rand(len(layer.weight)) < 0.2] = 0.0
    result = shrink(net, torch.randn(2, 5))
    assert_same(net, result.model, torch.randn(16, 5, dtype=torch.float64))
    expected = [max(1, int(a.sum())) for a in _alive_by_hand([layer.weight for layer in layers])]
    small = [m for m in result.model if isinstance(m, nn.Linear)]  # pyright: ignore
    assert [m.out_features for m in small[:-1]] == expected
    assert not shrink(result.model, torch.randn(2, 5)).removed


def test_a_neuron_read_by_dead_neurons_alone_goes_with_them() -> None:
    net = lively(mlp())
    unread(net, "4", [0, 1])
    with torch.no_grad():
        net[2].weight[2:, 4] = 0.0  # neuron 4 is read by neurons 0 and 1 alone  # pyright: ignore
    result = shrink(net, torch.randn(1, 20))
    assert (shape(result.model, "0")[0], shape(result.model, "2")[0]) == (15, 10)


def test_a_layer_that_would_be_empty_keeps_one_unit_and_says_so() -> None:
    net = lively(mlp())
    unread(net, "4", range(12))
    result = shrink(net, torch.randn(2, 20))
    assert shape(result.model, "0") == (1, 20) and shape(result.model, "2") == (1, 1)
    assert "would be empty" in reasons(result)["2"]
    assert_same(net, result.model, torch.randn(8, 20), tolerance=1e-5)


def test_lenet_with_its_flatten() -> None:
    net = lively(LeNet5()).double()
    deaden(net, "conv1", [1, 4])
    unread(net, "conv2", [0])
    with torch.no_grad():
        net.conv2.weight[[2, 5]] = 0.0  # constants, one of them positive: folded behind the flatten
        net.conv2.bias[[2, 5]] = torch.tensor([0.3, -0.3], dtype=torch.float64)
        net.fc2.weight[:, ::3] = 0.0
    x = torch.randn(4, 1, 28, 28, dtype=torch.float64)
    result = shrink(net, x)
    assert shape(result.model, "conv1")[0] == 3
    assert shape(result.model, "conv2")[:2] == (6, 3)
    assert shape(result.model, "fc1") == (20, 6 * 16)
    assert not result.left
    assert_same(net, result.model, x)


def test_vgg_through_batch_norm_pools_and_flatten() -> None:
    net = lively(vgg()).double()
    deaden(net, "0", [0, 3], norm="1")
    deaden(net, "3", [2], norm="4")
    with torch.no_grad():
        net[7].weight[[1, 2]] = 0.0  # constant behind the norm; folded into the linear layer  # pyright: ignore
        net[8].bias[[1, 2]] = 2.0  # pyright: ignore
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    result = shrink(net, x)
    assert [shape(result.model, str(i)) for i in (0, 1, 3, 7, 13)] == [
        (6, 3, 3, 3), (6,), (7, 6, 3, 3), (10, 7, 3, 3), (10, 40),
    ]  # fmt: skip
    assert result.model[1].num_features == 6  # pyright: ignore
    assert not result.left
    assert_same(net, result.model, x)


def test_a_norm_takes_the_constants_of_a_layer_without_bias() -> None:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, bias=False), nn.BatchNorm2d(5)
    )
    net = lively(net).double()
    with torch.no_grad():
        net[1].weight[2], net[1].bias[2] = 0.0, 0.7  # pyright: ignore
    x = torch.randn(2, 2, 9, 9, dtype=torch.float64)
    result = shrink(net, x)
    assert shape(result.model, "3")[1] == 3
    assert not torch.equal(result.model[4].running_mean, net[4].running_mean)  # pyright: ignore
    assert_same(net, result.model, x)


def test_prelu_and_conv1d() -> None:
    net = nn.Sequential(
        nn.Conv1d(2, 5, 3), nn.BatchNorm1d(5), nn.PReLU(5), nn.MaxPool1d(2), nn.Conv1d(5, 4, 3), nn.PReLU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    net = lively(net).double()
    deaden(net, "0", [1, 2], norm="1")
    unread(net, "8", [3])
    x = torch.randn(3, 2, 20, dtype=torch.float64)
    result = shrink(net, x)
    assert result.model[2].num_parameters == 3  # pyright: ignore
    assert shape(result.model, "4")[:2] == (3, 3)
    assert_same(net, result.model, x)


def test_nothing_dead_removes_nothing_and_the_given_model_is_left_alone() -> None:
    net = lively(vgg()).train()
    unread(net, "13", range(8))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    result = shrink(net, torch.randn(2, 3, 8, 8, generator=torch.Generator()))
    assert torch.equal(state, torch.get_rng_state())
    assert net.training and not result.model.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert result.model.state_dict().keys() == before.keys()
    assert next(result.model.parameters()).dtype == torch.float32
    untouched = lively(mlp())
    same = shrink(untouched, torch.randn(1, 20))
    assert not same.plan["kept"] and not same.left and same.before == same.after
    for a, b in zip(
        outputs(untouched, torch.ones(1, 20)), outputs(same.model, torch.ones(1, 20)), strict=True
    ):
        assert torch.equal(a, b)


def test_dead_outputs_of_the_model_stay_and_are_listed() -> None:
    net = lively(mlp())
    deaden(net, "4", [1, 3])
    result = shrink(net, torch.randn(1, 20))
    assert [(i.name, i.count, i.reason) for i in result.left] == [("4", 2, "an output of the model")]
    assert "4: 2 dead or constant, kept: an output of the model" in str(result)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 6, bias=False)
        self.out.weight = nn.Parameter(torch.randn(6, 8))
        self.again = nn.Linear(8, 8)
        self.again.weight = self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.again(self.inner(self.embed(x).relu()).relu()))


def test_shared_parameters_stay_and_are_named() -> None:
    net = lively(Tied())
    with torch.no_grad():
        net.inner.weight[2], net.inner.bias[2] = 0.0, 0.0  # pyright: ignore
    result = shrink(net, torch.randn(1, 6))
    assert not result.removed
    assert reasons(result)["inner"] == "inner.weight and again.weight are one parameter"


class Twice(nn.Module):
    """Calls one layer twice, so that its inputs are its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.last(self.layer(self.layer(x).relu()).relu())


def test_a_module_called_twice_loses_only_what_is_dead_each_time() -> None:
    net = lively(Twice()).double()
    deaden(net, "layer", [1, 2])
    deaden(net, "first", [1])
    unread(net, "last", [3])
    x = torch.randn(5, 4, dtype=torch.float64)
    result = shrink(net, x)
    assert shape(result.model, "layer") == (5, 5)
    assert "tied to first" in reasons(result)["layer"]
    assert_same(net, result.model, x)


def test_unused_layers_and_unknown_operations_keep_what_they_have() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.spare = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.cummax(self.a(x), 1).values)

    net = lively(Odd())
    deaden(net, "a", [2])
    result = shrink(net, torch.randn(2, 4))
    assert not result.removed
    assert "cummax" in reasons(result)["a"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    net = mlp()
    with torch.no_grad():
        net[2].weight[0, 0] = bad  # pyright: ignore
    with pytest.raises(UsageError, match="2.weight holds values that are not finite"):
        shrink(net, torch.randn(1, 20))


def test_bad_arguments_are_refused_with_what_to_do() -> None:
    with pytest.raises(ArgumentError, match="takes a torch.nn.Module, got function"):
        shrink(lambda x: x, torch.randn(1, 20))  # pyright: ignore
    with pytest.raises(ArgumentError, match="example must be a tensor"):
        shrink(mlp(), "images")
    with pytest.raises(ArgumentError, match="no tensor"):
        shrink(mlp(), ())
    with pytest.raises(UsageError, match="cannot run the example"):
        shrink(mlp(), torch.randn(1, 7))
    with pytest.raises(UsageError, match="nothing to shrink"):
        shrink(nn.ReLU(), torch.randn(1, 7))


def test_of_constants_that_meet_padding_one_channel_carries_all() -> None:
    net = lively(vgg()).double()
    with torch.no_grad():
        net[0].weight[[0, 2, 5]] = 0.0  # constants behind norm and ReLU, and not zero  # pyright: ignore
        net[1].bias[[0, 2, 5]] = torch.tensor([2.0, 1.0, 3.0], dtype=torch.float64)  # pyright: ignore
        net[3].weight[[1, 6]] = 0.0  # pyright: ignore
        net[4].bias[[1, 6]] = 1.5  # pyright: ignore
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    result = shrink(net, x)
    assert shape(result.model, "3")[:2] == (7, 6) and shape(result.model, "7")[1] == 7
    assert [(i.name, i.count) for i in result.left] == [("0", 1), ("3", 1)]
    assert "adds it up differently from place to place" in reasons(result)["0"]
    assert_same(net, result.model, x)
    assert not shrink(result.model, x).removed


def test_a_linear_layer_without_bias_has_its_constants_carried() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3, bias=False), nn.Tanh(), nn.Linear(3, 2))
    net = lively(net).double()
    with torch.no_grad():
        net[0].weight[[1, 2, 4]] = 0.0  # pyright: ignore
    x = torch.randn(5, 4, dtype=torch.float64)
    result = shrink(net, x)
    assert shape(result.model, "2") == (3, 4)
    assert "has no bias that takes it" in reasons(result)["0"]
    assert_same(net, result.model, x)


def test_constants_that_differ_between_places_stay() -> None:
    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Parameter(torch.randn(5, 6)), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(x) + self.b)

    net = lively(Placed()).double()
    deaden(net, "a", [1, 3])
    result = shrink(net, torch.randn(2, 5, 4))
    assert not result.removed
    assert reasons(result)["a"] == "a constant that differs between positions where c reads it"


@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize(
    "pool",
    [
        lambda x: x.mean((2, 3)),
        lambda x: x.sum((2, 3)),
        lambda x: x.amax((2, 3)),
        lambda x: nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)[:, ::4],
        lambda x: nn.functional.avg_pool2d(x, 3, 2, 1).amin((2, 3)),
        lambda x: nn.functional.interpolate(x, (3, 3), mode="bilinear").mean((2, 3)),
        lambda x: (x.flatten(2) @ x.flatten(2).mT).sum(2),
    ],
)
def test_outputs_stay_for_images_of_other_sizes(pool: Callable[[Tensor], Tensor], size: int) -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1)
            self.up, self.head = nn.ConvTranspose2d(5, 5, 3, 2, 1), nn.LazyLinear(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(pool(self.up(self.b(self.a(x).relu()).relu())))

    net = Sized()
    net(torch.randn(2, 3, 8, 8))
    lively(net).double()
    with torch.no_grad():
        net.a.weight[0] = net.b.weight[:, 1:] = net.b.weight[1] = 0.0
        net.a.bias[0] = 1.0  # which `b` adds up to another constant at a border, some of which ReLU hides  # pyright: ignore
        net.up.weight[[2, 3, 4], 0] = net.up.weight[[0, 2, 3, 4], 1] = 0.0
    result = shrink(net, torch.randn(1, 3, size, size))
    for other in (1, 2, 3, 8, 11):
        assert_same(net, result.model, torch.randn(2, 3, other, other, dtype=torch.float64))


def test_half_precision_models_keep_theirs() -> None:
    net = lively(mlp()).bfloat16()
    unread(net, "2", [1, 2])
    result = shrink(net, torch.randn(2, 20))
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    x = torch.randn(4, 20).bfloat16()
    assert_same(net, result.model, x, tolerance=0.05)


def test_parametrized_weights_shrink_below_their_parametrization() -> None:
    class Halved(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * 0.5

    net = lively(mlp()).double()
    parametrize.register_parametrization(net[2], "weight", Halved())
    unread(net, "4", [0, 3])
    x = torch.randn(3, 20).double()
    result = shrink(net, x)
    assert result.model[2].out_features == 10 and result.model[2].weight.shape == (10, 16)  # pyright: ignore
    assert_same(net, result.model, x)


def test_a_model_that_cannot_be_copied_or_draws_random_numbers_is_refused() -> None:
    net: nn.Module = mlp()
    prune.l1_unstructured(net[2], "weight", amount=0.5)  # pyright: ignore
    net(torch.randn(1, 20))
    with pytest.raises(UsageError, match="make masks permanent first"):
        shrink(net, torch.randn(1, 20))

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(nn.functional.dropout(self.a(x), 0.5, training=True))

    noisy = lively(Noisy())
    unread(noisy, "b", [1])
    with pytest.raises(RunError, match="draws no random numbers in eval mode"):
        shrink(noisy, torch.randn(2, 4))


def test_recurrent_layers_stay_and_what_follows_them_shrinks() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 5, batch_first=True)
            self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.lstm(x)[0][:, -1]).relu())

    net = lively(Recurrent()).double()
    unread(net, "b", [1, 4])
    x = torch.randn(3, 7, 3).double()
    result = shrink(net, x)
    assert shape(result.model, "a") == (4, 5)
    assert_same(net, result.model, x)


def test_a_table_of_embeddings_loses_columns() -> None:
    net = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    net = lively(net).double()
    unread(net, "1", [0, 5])
    ids = torch.randint(0, 9, (3, 5))
    result = shrink(net, ids)
    assert result.model[0].embedding_dim == 4 and shape(result.model, "0") == (9, 4)  # pyright: ignore
    assert_same(net, result.model, ids)

"""DropConnect as a function: values, its identity with Dropout, gradients, memory, errors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from fallow.errors import ArgumentError, FallowError, RateError, UsageError
from fallow.noise import _row_masks, drop_connect, drop_connect_mask
from fallow.penalties import dropblock_objective
from fallow.schemes import Units, characteristic_matrix

every_mode = pytest.mark.parametrize("mode", ["batch", "row"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(*rows: int, out: int = 3, width: int = 5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    noise = generator(99)
    shapes = ((*rows, width), (out, width), (out,))
    return [torch.randn(shape, generator=noise, dtype=torch.float64).to(dtype) for shape in shapes]


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, p: float, mode: str, seed: int) -> Tensor:
    """The masks of that seed, all at once."""
    rows = math.prod(x.shape[:-1]) if mode == "row" else None
    mask = drop_connect_mask(weight.shape, survival_rate=p, rows=rows, generator=generator(seed))
    if rows is not None:
        mask = mask.view(*x.shape[:-1], *weight.shape)
    out = (mask * weight / p * x[..., None, :]).sum(-1)
    return out if bias is None else out + bias


# --- values -------------------------------------------------------------------------------------------------


@every_mode
@pytest.mark.parametrize("rows", [(), (4,), (2, 3), (2, 0)], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_it_is_the_masked_map(mode: str, rows: tuple[int, ...], with_bias: bool) -> None:
    x, weight, bias = problem(*rows)
    given = bias if with_bias else None
    out = drop_connect(x, weight, given, survival_rate=0.6, mode=mode, generator=generator(1))
    torch.testing.assert_close(out, reference(x, weight, given, 0.6, mode, 1), rtol=1e-13, atol=1e-13)
    assert out.shape == (*rows, 3)


@every_mode
@pytest.mark.parametrize("rows", [(), (0,), (2, 3)], ids=str)
def test_without_features_there_is_the_bias(mode: str, rows: tuple[int, ...]) -> None:
    bias = torch.randn(3)
    out = drop_connect(torch.ones(*rows, 0), torch.ones(3, 0), bias, survival_rate=0.5, mode=mode)
    assert torch.equal(out, bias.expand(*rows, 3))


@every_mode
@every_dtype
def test_every_dtype_is_kept_and_as_exact_as_the_plain_map(mode: str, dtype: torch.dtype) -> None:
    x, weight, bias = problem(64, dtype=dtype)
    out = drop_connect(x, weight, bias, survival_rate=0.9, mode=mode, generator=generator(1))
    exact = reference(x.double(), weight.double(), bias.double(), 0.9, mode, 1)
    assert out.dtype == dtype
    scale = (x.double().abs() @ weight.double().abs().T + bias.double().abs()) / 0.9
    assert ((out - exact).abs() <= 3 * torch.finfo(dtype).eps * scale).all()


@every_mode
def test_masks_keep_every_weight_at_the_asked_rate_and_independently(mode: str) -> None:
    count = 20_000
    if mode == "row":
        masks = drop_connect_mask((2, 3), survival_rate=0.3, rows=count, generator=generator(4))
    else:
        masks = drop_connect_mask((2 * count, 3), survival_rate=0.3, generator=generator(4)).view(count, 2, 3)
    centred = masks.double().flatten(1) - 0.3
    products = centred[:, :, None] * centred[:, None]
    error = products.std(0) / math.sqrt(count)
    assert (centred.mean(0).abs() < 5 * math.sqrt(0.21 / count)).all()
    assert ((products.mean(0) - 0.21 * torch.eye(6)).abs() < 5 * error).all()


@every_mode
def test_at_evaluation_and_rate_one_it_is_the_plain_map_without_a_draw(mode: str) -> None:
    x, weight, bias = problem(4)
    state = torch.get_rng_state()
    for options in ({"survival_rate": 0.5, "training": False}, {"survival_rate": 1}):
        assert torch.equal(drop_connect(x, weight, bias, mode=mode, **options), linear(x, weight, bias))
    assert torch.equal(torch.get_rng_state(), state)


@every_mode
def test_a_generator_reproduces_and_without_one_torchs_own_moves(mode: str) -> None:
    x, weight, _ = problem(4)
    state = torch.get_rng_state()
    first = drop_connect(x, weight, survival_rate=0.5, mode=mode, generator=generator(7))
    assert torch.equal(first, drop_connect(x, weight, survival_rate=0.5, mode=mode, generator=generator(7)))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    default = drop_connect(x, weight, survival_rate=0.5, mode=mode)
    torch.manual_seed(7)
    assert torch.equal(default, drop_connect(x, weight, survival_rate=0.5, mode=mode))
    assert not torch.equal(default, drop_connect(x, weight, survival_rate=0.5, mode=mode))


# --- DropConnect is Dropout ---------------------------------------------------------------------------------


def test_on_the_last_weights_the_expected_loss_is_that_of_dropout_by_enumeration() -> None:
    x, weight, bias = problem(4, out=2, width=3)
    y, p = torch.randn(4, 2, generator=generator(5), dtype=torch.float64), 0.6
    expected = torch.zeros((), dtype=torch.float64)
    for bits in itertools.product((1.0, 0.0), repeat=weight.numel()):
        mask = torch.tensor(bits, dtype=torch.float64).view(weight.shape)
        probability = math.prod(p if bit else 1 - p for bit in bits)
        expected += probability * (y - linear(x, mask * weight / p, bias)).square().sum()
    dropout = dropblock_objective(y, x, weight, survival_rate=p, block_size=1, bias=bias)
    assert float(expected) == pytest.approx(float(dropout), rel=1e-12)
    matrix = characteristic_matrix(Units(p), 3)
    plain = (y - linear(x, weight, bias)).square().sum()
    assert float(expected) == pytest.approx(
        float(plain + (matrix * (weight.T @ weight) * (x.T @ x)).sum()), rel=1e-12
    )


@every_mode
def test_and_sampled_losses_have_that_mean_in_both_modes(mode: str) -> None:
    x, weight, bias = problem(4)
    y = torch.randn(4, 3, generator=generator(5), dtype=torch.float64)
    noise, options = generator(6), {"survival_rate": 0.6, "mode": mode}
    losses = torch.stack(
        [(y - drop_connect(x, weight, bias, generator=noise, **options)).square().sum() for _ in range(4000)]
    )
    exact = dropblock_objective(y, x, weight, survival_rate=0.6, block_size=1, bias=bias)
    assert abs(float(losses.mean() - exact)) < 5 * float(losses.std()) / math.sqrt(len(losses))


# --- gradients ----------------------------------------------------------------------------------------------


@every_mode
@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, False), (False, True, False)], ids=str)
def test_gradients_are_those_of_the_masked_map(
    mode: str, wanted: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_row_masks, "_ON_CPU", 40)  # two rows at a time
    inputs = [t.requires_grad_(w) for t, w in zip(problem(5), wanted, strict=True)]
    upstream = torch.randn(5, 3, dtype=torch.float64)
    out = drop_connect(*inputs, survival_rate=0.6, mode=mode, generator=generator(2))
    naive = reference(*inputs, 0.6, mode, 2)
    leaves = [t for t in inputs if t.requires_grad]
    found, expected = (torch.autograd.grad(o, leaves, upstream) for o in (out, naive))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@every_mode
def test_gradients_are_those_of_finite_differences(mode: str) -> None:
    inputs = tuple(t.requires_grad_() for t in problem(2, 3))

    def again(*args: Tensor) -> Tensor:
        return drop_connect(*args, survival_rate=0.6, mode=mode, generator=generator(8))

    assert torch.autograd.gradcheck(again, inputs)


def test_the_gradient_of_half_weights_is_summed_over_rows_in_float32() -> None:
    x, weight = torch.ones(3000, 4, dtype=torch.bfloat16), torch.ones(2, 4, dtype=torch.bfloat16)
    weight.requires_grad_()
    drop_connect(x, weight, survival_rate=0.5, mode="row", generator=generator()).sum().backward()
    masks = drop_connect_mask((2, 4), survival_rate=0.5, rows=3000, generator=generator())
    assert weight.grad is not None and torch.equal(weight.grad, (2.0 * masks.sum(0)).bfloat16())


def test_second_derivatives_in_row_mode_are_refused() -> None:
    x, weight, _ = (t.requires_grad_() for t in problem(4))
    out = drop_connect(x, weight, survival_rate=0.5, mode="row")
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@every_mode
def test_checkpointing_draws_the_same_masks_again(mode: str) -> None:
    x, weight, _ = (t.requires_grad_() for t in problem(6))

    def layer(x: Tensor, weight: Tensor) -> Tensor:
        return drop_connect(x, weight, survival_rate=0.5, mode=mode)

    grads = []
    for call in (layer, lambda *args: checkpoint(layer, *args, use_reentrant=False)):
        torch.manual_seed(3)
        grads.append(torch.autograd.grad(call(x, weight).square().sum(), (x, weight)))
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.equal(plain, recomputed)


@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_what_it_does_to_a_linear_map(mode: str, dtype: torch.dtype) -> None:
    x, weight, bias = (t.requires_grad_() for t in problem(7, dtype=dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = drop_connect(x, weight, bias, survival_rate=0.5, mode=mode, generator=generator(1))
        assert out.dtype == linear(x, weight, bias).dtype == torch.bfloat16
    out.float().sum().backward()
    assert x.grad is not None and weight.grad is not None and x.grad.dtype == weight.grad.dtype == dtype
    exact = reference(x.double(), weight.double(), bias.double(), 0.5, mode, 1)
    assert float((out - exact).detach().abs().max()) < 0.1


def test_batch_mode_compiles_to_one_graph() -> None:
    torch.compiler.reset()
    compiled = torch.compile(drop_connect, backend="aot_eager", fullgraph=True, dynamic=False)
    weight = torch.ones(300, 40, dtype=torch.float64, requires_grad=True)
    out = compiled(torch.eye(40, dtype=torch.float64), weight, survival_rate=0.5)
    out.sum().backward()
    assert torch.equal(weight.grad, out.T)
    assert abs(float(out.detach().mean()) - 1) < 5 / math.sqrt(out.numel())


# --- memory -------------------------------------------------------------------------------------------------


class _Largest(TorchDispatchMode):
    """Numbers of the largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.numbers = max(self.numbers, *sizes, 0)
        return out


def test_row_mode_never_has_all_masks_at_once_and_keeps_none() -> None:
    rows, width = 4096, 32
    x, weight = torch.randn(rows, width, requires_grad=True), torch.randn(width, width, requires_grad=True)
    kept: list[int] = []
    with (
        _Largest() as largest,
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t),
    ):
        drop_connect(x, weight, survival_rate=0.5, mode="row").sum().backward()
    assert largest.numbers <= max(_row_masks._ON_CPU, rows * width) < rows * width * width // 8
    assert sum(kept) == x.numel() + weight.numel()


# --- errors -------------------------------------------------------------------------------------------------

X, W = torch.ones(2, 3), torch.ones(4, 3)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: drop_connect(X, W), ArgumentError, "drop_connect needs survival_rate"),
        (lambda: drop_connect(X, W, survival_rate=0), RateError, "survival_rate must be in"),
        (lambda: drop_connect(X, W, p=0.1), ArgumentError, "takes survival_rate, not p"),
        (lambda: drop_connect(X, W, drop_prob=0.1), ArgumentError, "pass survival_rate=0.9"),
        (
            lambda: drop_connect(X, W, survival_rate=0.5, mode="rows"),
            UsageError,
            'mode must be "batch" or "row"',
        ),
        (lambda: drop_connect(X, W.T, survival_rate=0.5), UsageError, r"shapes \[2, 3\] and \[3, 4\]"),
        (lambda: drop_connect(X, W[0], survival_rate=0.5), UsageError, r"weight \(out, in\)"),
        (lambda: drop_connect_mask((4, 3)), ArgumentError, "drop_connect_mask needs survival_rate"),
        (
            lambda: drop_connect_mask((4,), survival_rate=0.5, rows=2),
            UsageError,
            r"shape \(out, in\) for rows",
        ),
        (
            lambda: drop_connect_mask((4, 3), survival_rate=0.5, rows=-1),
            UsageError,
            "rows must be an integer",
        ),
        (lambda: drop_connect_mask((4, 3), survival_rate=0.5, row=1), ArgumentError, "did you mean rows"),
    ],
)
def test_wrong_use_is_refused_in_words(call: Callable[[], Any], error: type[FallowError], words: str) -> None:
    with pytest.raises(error, match=words):
        call()

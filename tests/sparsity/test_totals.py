"""The sum of LogSum and its gradient in few passes, against the penalty entry by entry."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fallow import sparsity
from fallow.penalties import LogSum
from fallow.sparsity.totals import logsum_and_gradient, total_of

# torch's first dual number scripts its decompositions
FORWARD = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")


@pytest.mark.parametrize("count", [1, 7, 8, 4097, 2**16, 2**17 + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [1e-30, 1e-3, 2.0])
def test_sum_and_gradient_are_those_of_the_penalty(count: int, dtype: torch.dtype, eps: float) -> None:
    w = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)
    w[::5] = 0
    total, gradient = logsum_and_gradient(w, eps, 0.3)
    exact = LogSum(eps=eps)
    assert total == pytest.approx(0.3 * float(exact.total(w.double())), rel=1e-6, abs=1e-7)
    torch.testing.assert_close(gradient, 0.3 * exact.gradient(w))
    assert bool((gradient[::5] == 0).all())


@pytest.mark.parametrize("count", [40, 2**15])
def test_weights_that_are_not_finite_show_in_the_sum(count: int) -> None:
    for value, shown in ((math.nan, math.isnan), (math.inf, math.isinf)):
        w = torch.randn(count)
        w[17] = value
        assert shown(logsum_and_gradient(w, 0.5, 1.0)[0])


def test_any_strides_and_shapes() -> None:
    w = torch.randn(6, 5, 3, 3)
    for given in (w.to(memory_format=torch.channels_last), w.transpose(0, 1), w[:, ::2]):
        total, gradient = logsum_and_gradient(given, 0.5, 1.0)
        assert total == pytest.approx(float(LogSum(0.5).total(given)), rel=1e-6)
        torch.testing.assert_close(gradient, LogSum(0.5).gradient(given))


def test_it_scales_with_what_comes_from_above_accumulates_and_can_be_asked_again() -> None:
    weights = [nn.Parameter(torch.randn(4, 3).double()), nn.Parameter(torch.randn(5, 4).double())]
    total = total_of(LogSum(0.5), 0.3, weights)
    assert total is not None
    for factor in (2.0, 1.0):
        (factor * total).backward(retain_graph=True)
    for w in weights:
        torch.testing.assert_close(w.grad, 0.9 * LogSum(0.5).gradient(w))


def test_it_is_differentiable_again() -> None:
    def total(w: Tensor) -> Tensor:
        found = total_of(LogSum(0.5), 0.3, [w])
        assert found is not None
        return found

    assert torch.autograd.gradgradcheck(total, nn.Parameter(torch.randn(6).double()))


@pytest.mark.parametrize("other", [lambda w: w, lambda w: 2 * w, torch.sin])
def test_weights_that_are_the_same_or_depend_on_each_other_count_once(
    other: Callable[[Tensor], Tensor],
) -> None:
    w, law = nn.Parameter(torch.randn(6).double()), LogSum(0.5)
    short = total_of(law, 0.3, [w, other(w)])
    assert short is not None and "_Total" in type(short.grad_fn).__name__
    results = []
    for total in (short, 0.3 * (law.total(w) + law.total(other(w)))):
        (once,) = torch.autograd.grad(total, w, retain_graph=True)
        (first,) = torch.autograd.grad(total, w, create_graph=True)
        results.append([once, first, *torch.autograd.grad(first.sin().sum(), w)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@FORWARD
def test_forward_mode_and_many_gradients_at_once() -> None:
    w, tangent, law = torch.randn(6, requires_grad=True), torch.randn(6), LogSum(0.5)
    layer = nn.Linear(2, 3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(w, tangent)
        assert total_of(law, 0.3, [dual]) is None
        assert total_of(law, 0.3, [layer.weight]) is not None
    total = total_of(law, 0.3, [w])
    assert total is not None
    (rows,) = torch.autograd.grad(total, w, torch.tensor([1.0, 3.0]), is_grads_batched=True)
    torch.testing.assert_close(rows, torch.tensor([[0.3], [0.9]]) * law.gradient(w.detach()))


def test_where_there_is_no_short_way_the_penalty_is_the_same() -> None:
    class Other(LogSum):
        """Another penalty that begins as this one."""

    w = nn.Parameter(torch.randn(4, 3))
    assert total_of(Other(0.5), 1.0, [w]) is None
    assert total_of(LogSum(0.5), 1.0, [nn.Parameter(w.detach().bfloat16())]) is None
    layer = nn.Linear(3, 4)
    short = sparsity.sparsify(layer, strategy=LogSum(0.5), strength=0.1).penalty()
    long = sparsity.sparsify(layer, strategy=Other(0.5), strength=0.1).penalty()
    torch.testing.assert_close(short, long)

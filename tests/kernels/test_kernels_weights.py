"""LogSum in one pass over the weights: as in torch's operations, and None where it does not apply."""

import math

import pytest
import torch
from torch import nn

from fallow import kernels
from fallow.errors import UsageError
from fallow.penalties import LogSum
from fallow.penalties.logarithmic import logsum_threshold
from fallow.sparsity import sparsify
from fallow.sparsity.totals import logsum_and_gradient

pytestmark = pytest.mark.skipif(not kernels.available(), reason=kernels.available().reason)


@pytest.mark.parametrize("count", [1, 31, 32, 33, 1000, 2**18 + 5])
@pytest.mark.parametrize("eps", [1e-6, 0.1, 2.0])
def test_sum_and_gradient_are_those_of_the_penalty(count: int, eps: float) -> None:
    w = torch.randn(count, generator=torch.Generator().manual_seed(count))
    w[::7] = 0
    found = kernels.logsum_total(w, eps, 0.3)
    assert found is not None
    exact = LogSum(eps=eps)
    assert found[0] == pytest.approx(0.3 * float(exact.total(w.double())), rel=1e-6)
    torch.testing.assert_close(found[1], 0.3 * exact.gradient(w))
    assert bool((found[1][::7] == 0).all())
    with kernels.plain():
        total, gradient = logsum_and_gradient(w, eps, 0.3)
    assert found[0] == pytest.approx(total, rel=1e-6)
    torch.testing.assert_close(found[1], gradient)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 40, 63])
def test_what_is_not_finite_is_left_to_torch(value: float, place: int) -> None:
    w = torch.randn(64)
    w[place] = value
    assert kernels.logsum_total(w, 0.5, 1.0) is None


@pytest.mark.parametrize(("eps", "step"), [(0.1, 0.05), (1.0, 0.25), (2.0, 1e-5), (1e-6, 0.3), (0.1, 0.0)])
def test_prox_is_that_of_torch_and_zero_up_to_the_same_threshold(eps: float, step: float) -> None:
    w = torch.randn(2**14 + 3) * torch.logspace(-3, 2, 2**14 + 3)
    w[::9], w[1::9] = 0.0, math.inf
    penalty = LogSum(eps=eps)
    found = penalty.prox(w, step)
    with kernels.plain():
        plain = penalty.prox(w, step)
    torch.testing.assert_close(found, plain, rtol=2e-6, atol=1e-7)
    assert torch.equal(found == 0, plain == 0)
    exact = penalty.prox(w.double(), step)
    near = (w.abs().double() - logsum_threshold(step, eps)).abs() < 1e-5  # there rounding decides
    torch.testing.assert_close(found.double()[~near], exact[~near], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_adaprox_is_the_same_in_one_pass(kind: type) -> None:
    results = []
    for fast in (True, False):
        torch.manual_seed(0)
        layer = nn.Linear(60, 40)
        optimiser = kind(layer.parameters(), 0.1)
        run = sparsify(layer, strategy=LogSum(0.1), strength=0.2, method="adaprox", optimiser=optimiser)
        x = torch.randn(8, 60)
        for _ in range(3):
            optimiser.zero_grad()
            layer(x).square().mean().backward()
            optimiser.step()
            with torch.no_grad():
                layer.weight[0] = 0
            version = layer.weight._version
            if fast:
                run.update()
            else:
                with kernels.plain():
                    run.update()
            assert layer.weight._version > version  # autograd sees that they were changed
        results.append(layer.weight.detach().clone())
    torch.testing.assert_close(*results)
    assert bool((results[0][0] == 0).all())


def test_nan_weights_are_refused_and_stay() -> None:
    layer = nn.Linear(30, 20)
    optimiser = torch.optim.SGD(layer.parameters(), 0.1)
    run = sparsify(layer, strategy=LogSum(0.1), method="adaprox", optimiser=optimiser)
    layer.weight.data[3, 4] = math.nan
    before = layer.weight.detach().clone()
    with pytest.raises(UsageError, match="NaN"):
        run.update()
    assert torch.equal(layer.weight.nan_to_num(7), before.nan_to_num(7))


@pytest.mark.parametrize(
    "w", [torch.randn(4).double(), torch.randn(4, 6).t(), torch.randn(4).bfloat16(), torch.randn(8)[::2]]
)
def test_other_memory_is_left_to_torch(w: torch.Tensor) -> None:
    before = w.clone()
    assert kernels.logsum_total(w, 0.5, 1.0) is None
    assert not kernels.logsum_adaprox_(w, 0.5, 0.1, None, 1.0, 0.0)
    assert torch.equal(w, before)


def test_nothing_is_hidden_from_transforms_and_modes() -> None:
    w = torch.randn(3, 8)
    seen = torch.func.vmap(lambda row: row + float(kernels.logsum_total(row, 0.5, 1.0) is not None))(w)
    assert torch.equal(seen, w)
    with kernels.plain():
        assert kernels.logsum_total(w, 0.5, 1.0) is None

"""Special functions: against scipy, the series and the defining expectation; gradients; extremes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fallow.errors import ArgumentError
from fallow.special import KL_LIMIT, Table, dawson, gauss_legendre, integral_from, variational_kl

scipy = pytest.importorskip("scipy.special")


def log_space(low: float, high: float, count: int = 400) -> Tensor:
    return torch.logspace(low, high, count, dtype=torch.float64)


def test_dawson_is_that_of_scipy_at_every_magnitude() -> None:
    x = torch.cat([log_space(-12, 12), torch.linspace(0, 10, 400, dtype=torch.float64)])
    x = torch.cat([x, -x])
    torch.testing.assert_close(dawson(x), torch.as_tensor(scipy.dawsn(x.numpy())), rtol=2e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_single_precision_rounded(dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, 1e-3, 0.5, 3.0, 200.0, 6e4]).to(dtype)
    for function in (dawson, variational_kl):
        assert torch.equal(function(x), function(x.float()).to(dtype))


def test_the_divergence_is_an_integral_of_dawson_and_the_defining_expectation() -> None:
    r = log_space(-6, 3, 30)
    top = (r / 2).sqrt()
    inside = integral_from(
        torch.zeros_like(top), top, lambda x: 2 * torch.as_tensor(scipy.dawsn(x.numpy())), 400
    )
    torch.testing.assert_close(variational_kl(r), inside, rtol=1e-12, atol=0)
    e = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for ratio in (0.5, 3.0, 20.0):
        samples = (math.sqrt(ratio) + e).abs().log() - e.abs().log()
        error = float(samples.std()) / math.sqrt(len(samples))
        assert abs(float(samples.mean() - variational_kl(torch.tensor(ratio)))) < 5 * error


def test_the_divergence_has_the_series_at_both_ends() -> None:
    small, large = log_space(-8, -3), log_space(3, 8)
    expected = small / 2 - small**2 / 12 + small**3 / 90
    torch.testing.assert_close(variational_kl(small), expected, rtol=1e-9, atol=0)
    expected = large.log() / 2 + KL_LIMIT - 1 / (2 * large) - 3 / (4 * large**2)
    torch.testing.assert_close(variational_kl(large), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("function", [dawson, variational_kl])
def test_derivatives_are_those_of_the_function(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.tensor([0.01, 0.3, 1.0, 4.0, 20.0, 300.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(function, (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_overflows(dtype: torch.dtype) -> None:
    top = torch.finfo(dtype).max
    x = torch.tensor([0.0, torch.finfo(dtype).tiny, top**0.5, top / 4], dtype=dtype, requires_grad=True)
    for function in (dawson, variational_kl):
        out = function(x)
        (gradient,) = torch.autograd.grad(out.sum(), x)
        assert bool(out.isfinite().all() and gradient.isfinite().all()) and out.dtype == dtype
        assert float(out[0].detach()) == 0


@pytest.mark.parametrize("given", [1.0, torch.arange(3)])
def test_what_is_no_real_tensor_is_refused(given: Any) -> None:
    for function in (dawson, variational_kl):
        with pytest.raises(ArgumentError, match="must be a real floating-point tensor, got"):
            function(given)


def test_the_rule_is_exact_for_polynomials_of_twice_its_degree() -> None:
    nodes, weights = gauss_legendre(6)
    for power in range(12):
        assert abs(float((weights * nodes**power).sum()) - 1 / (power + 1)) < 1e-15


def test_a_table_is_the_function_to_rounding_in_either_precision() -> None:
    table = Table(torch.cos, -2.0, 5.0, 256)
    t = torch.linspace(-2, 5, 1000, dtype=torch.float64)
    torch.testing.assert_close(table(t), t.cos(), rtol=0, atol=1e-14)
    torch.testing.assert_close(table(t.float()), t.float().cos(), rtol=0, atol=1e-6)
    assert bool(table(torch.tensor(math.nan)).isnan())

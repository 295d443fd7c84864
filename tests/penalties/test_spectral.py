"""Spectral versions: singular values alone count, ties and lost rank included."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fallow.errors import ArgumentError, UsageError
from fallow.penalties import (
    SpectralKSupport,
    ksupport_prox,
    ksupport_sq,
    spectral_ksupport_dual_norm,
    spectral_ksupport_gradient,
    spectral_ksupport_prox,
    spectral_ksupport_sq,
)


def matrix(values: list[float], rows: int, columns: int) -> Tensor:
    """A random matrix of these singular values."""
    p = torch.linalg.qr(torch.randn(rows, len(values), dtype=torch.float64)).Q
    q = torch.linalg.qr(torch.randn(columns, len(values), dtype=torch.float64)).Q
    return p * torch.tensor(values, dtype=torch.float64) @ q.T


# Generic, tied, of lower rank, with a gap after the second, one value.
SPECTRA = [[4.0, 2.5, 1.0, 0.3], [2.0, 2.0, 2.0, 0.5], [3.0, 1.0], [9.0, 8.0, 0.5, 0.2], [1.0, 1.0, 1.0, 1.0]]


@pytest.mark.parametrize("values", SPECTRA)
@pytest.mark.parametrize("k", [1, 1.5, 2, 4])
def test_the_norm_is_that_of_the_singular_values(values: list[float], k: float):
    w = matrix(values, 6, 4)
    expected = ksupport_sq(torch.tensor(values + [0.0] * (4 - len(values)), dtype=torch.float64), k)
    torch.testing.assert_close(spectral_ksupport_sq(w, k), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(spectral_ksupport_sq(w.T, k), expected, rtol=1e-12, atol=0)


def test_its_ends_are_nuclear_frobenius_and_spectral_norm():
    w = torch.randn(3, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(spectral_ksupport_sq(w, 1), torch.linalg.matrix_norm(w, "nuc").square())
    torch.testing.assert_close(spectral_ksupport_sq(w, 4), w.square().sum((-1, -2)))
    torch.testing.assert_close(spectral_ksupport_dual_norm(w, 1), torch.linalg.matrix_norm(w, 2))
    torch.testing.assert_close(spectral_ksupport_dual_norm(w, 4), torch.linalg.matrix_norm(w))


@pytest.mark.parametrize("values", SPECTRA)
@pytest.mark.parametrize("k", [1, 2, 2.5])
def test_the_prox_shrinks_the_values_and_satisfies_its_optimality(values: list[float], k: float):
    w = matrix(values, 4, 7)
    x = spectral_ksupport_prox(w, 0.6, k)
    padded = torch.tensor(values + [0.0] * (4 - len(values)), dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.svdvals(x), ksupport_prox(padded, 0.6, k), rtol=1e-11, atol=1e-12)
    norm = spectral_ksupport_sq(x, k)
    torch.testing.assert_close(((w - x) * x).sum(), 0.6 * norm)
    torch.testing.assert_close(spectral_ksupport_dual_norm(w - x, k), 0.6 * norm.sqrt())


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
@pytest.mark.parametrize("k", [1, 1.5, 2])
def test_derivatives_are_those_of_differences(shape: tuple[int, int], k: float):
    w = torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)
    step = torch.tensor([0.2, 0.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: spectral_ksupport_sq(v, k), w)
    assert torch.autograd.gradcheck(lambda v, s: spectral_ksupport_prox(v, s, k), (w, step))


@pytest.mark.parametrize("values", SPECTRA)
def test_the_prox_has_its_derivative_at_ties_and_lost_rank_too(values: list[float]):
    """Where the decomposition's own derivative is not defined; k and step keep off the kinks of the prox."""
    w = matrix(values, 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: spectral_ksupport_prox(v, 0.37, 1.5), w, eps=1e-7, atol=1e-5)


def test_the_derivative_of_few_values_is_that_of_division():
    w = matrix([3.0, 1.0], 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: spectral_ksupport_prox(v, 0.5, 4), w)
    zero = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    (given,) = torch.autograd.grad(spectral_ksupport_prox(zero, 1.0, 3).sum(), zero)
    torch.testing.assert_close(given, torch.full_like(given, 0.5))


@pytest.mark.parametrize("values", SPECTRA[:2] + SPECTRA[3:])
def test_the_gradient_is_that_of_autograd(values: list[float]):
    w = matrix(values, 5, 4).requires_grad_()
    for k in (1, 1.5, 3):
        (given,) = torch.autograd.grad(spectral_ksupport_sq(w, k), w)
        torch.testing.assert_close(given, spectral_ksupport_gradient(w.detach(), k))


def test_the_penalty_is_half_the_squared_norm():
    penalty, w = SpectralKSupport(2), torch.randn(3, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(penalty.value(w), spectral_ksupport_sq(w, 2) / 2)
    torch.testing.assert_close(penalty.squared_norm(w), spectral_ksupport_sq(w, 2))
    torch.testing.assert_close(penalty.total(w), penalty.value(w).sum())
    torch.testing.assert_close(penalty.gradient(w), spectral_ksupport_gradient(w, 2) / 2)
    torch.testing.assert_close(penalty.dual_norm(w), spectral_ksupport_dual_norm(w, 2))
    values, eta = torch.linalg.svdvals(w), penalty.eta(w)
    torch.testing.assert_close((values.square() / eta).sum(-1) / 2, penalty.value(w))
    shrunk = penalty.prox(w, 0.3)
    torch.testing.assert_close(
        torch.linalg.svdvals(shrunk), penalty.survival_rate(shrunk, 0.3) * values, rtol=1e-9, atol=1e-12
    )


def test_bad_matrices_are_refused_in_words():
    with pytest.raises(UsageError, match="at least 2 dimensions"):
        spectral_ksupport_sq(torch.ones(3), 1)
    with pytest.raises(UsageError, match="at most the number of entries, 3, got 4"):
        spectral_ksupport_prox(torch.ones(5, 3), 0.1, 4)
    with pytest.raises(UsageError, match="w must be finite"):
        spectral_ksupport_prox(torch.full((2, 2), math.nan), 0.1, 1)
    with pytest.raises(UsageError, match="step must be finite"):
        spectral_ksupport_prox(torch.eye(2), -0.1, 1)
    with pytest.raises(ArgumentError, match="floating point"):
        spectral_ksupport_sq(torch.ones(2, 2, dtype=torch.long), 1)

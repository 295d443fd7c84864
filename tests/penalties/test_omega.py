"""The regulariser of every scheme: against all masks written out, and against the matrix."""

from __future__ import annotations

import math

import pytest
import torch
from enumerated import SCHEMES, expected
from torch import Tensor

from fallow.errors import ArgumentError, UsageError
from fallow.penalties import (
    acts_as_dropout,
    block_size_note,
    dropblock_objective,
    effective_rank,
    kappa,
    omega,
    spectral_ksupport_sq,
)
from fallow.penalties._forms import form_of
from fallow.schemes import (
    Blocks,
    Correlated,
    Exchangeable,
    FixedSize,
    Gaussian,
    Layer,
    Units,
    UnitsInBlocks,
    characteristic_matrix,
)

EVERY = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def dense(w: Tensor, g: Tensor, scheme) -> Tensor:
    return (characteristic_matrix(scheme, w.shape[1]) * (w.T @ w) * (g.T @ g)).sum()


@EVERY
def test_with_it_the_plain_loss_is_the_mean_over_all_masks(scheme):
    y, g, w, b = randn(5, 3), randn(5, 7), randn(3, 7), randn(3)
    mean = expected(scheme, 7, lambda z: (y - (g * z) @ w.T - b).square().sum())
    plain = (y - g @ w.T - b).square().sum()
    torch.testing.assert_close(plain + omega(w, g, scheme), mean, rtol=1e-12, atol=0)


@EVERY
@pytest.mark.parametrize(("samples", "outputs"), [(2, 1), (4, 3), (40, 30)])
def test_it_is_the_form_with_the_matrix(scheme, samples: int, outputs: int):
    """Few and many rows, for the two ways to take blocks."""
    w, g = randn(outputs, 7), randn(samples, 7)
    torch.testing.assert_close(omega(w, g, scheme), dense(w, g, scheme), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [1, 2, 5, 16, 23])
@pytest.mark.parametrize("block_size", [1, 2, 5, 16, 40])
def test_blocks_of_any_size_in_any_width(width: int, block_size: int):
    w, g = randn(4, width), randn(6, width)
    for scheme in (
        Blocks(0.8, block_size),
        Blocks(0.8, block_size, "sliding"),
        UnitsInBlocks(0.5, 0.75, block_size),
    ):
        torch.testing.assert_close(omega(w, g, scheme), dense(w, g, scheme), rtol=1e-12, atol=1e-12)


@EVERY
def test_its_gradients_are_right(scheme):
    w, g = randn(2, 7).requires_grad_(), randn(3, 7).requires_grad_()
    assert torch.autograd.gradcheck(lambda w, g: omega(w, g, scheme), (w, g))
    assert torch.autograd.gradgradcheck(lambda w, g: omega(w, g, scheme), (w, g))


@EVERY
def test_the_forms_of_single_samples_and_outputs_are_those_of_the_matrix(scheme):
    w, g, c = randn(3, 7), randn(5, 7), characteristic_matrix(scheme, 7)
    x, form = g[:, None] * w, form_of(scheme, 7)
    each = torch.einsum("nci,ij,ncj->nc", x, c, x)
    torch.testing.assert_close(form.outputs(w, g), each, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(form.rows(x[:, 1]), each[:, 1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(form.outputs(w, g).sum(), omega(w, g, scheme), rtol=1e-12, atol=1e-12)


def test_it_is_the_second_term_of_the_objective_of_dropblock():
    y, g, w = randn(5, 3), randn(5, 8), randn(3, 8)
    for r in (1, 2, 4, 8):
        value = dropblock_objective(y, g, w, survival_rate=0.6, block_size=r)
        plain = (y - g @ w.T).square().sum()
        torch.testing.assert_close(omega(w, g, Blocks(0.6, r)), value - plain, rtol=1e-12, atol=0)


def test_schemes_that_are_others_in_disguise():
    w, g = randn(3, 6), randn(4, 6)
    for one, other in [
        (Units(0.6), Blocks(0.6, 1)),
        (Units(0.6), Blocks(0.6, 1, "sliding")),
        (Units(0.8), Gaussian(0.25)),
        (Units(0.6), Exchangeable(0.6, 0.0)),
        (Units(0.6), Units((0.6,) * 6)),
        (Layer(0.6), Exchangeable(0.6, 1.0)),
        (Layer(0.6), Blocks(0.6, 6)),
        (FixedSize(2), Exchangeable(1 / 3, -1 / 5)),
        (Blocks(0.6, 3), UnitsInBlocks(1.0, 0.6, 3)),
        (Units(0.6), UnitsInBlocks(0.6, 1.0, 3)),
        (Units(0.5), Correlated((0.5,) * 6, (0.25 * torch.eye(6)).tolist())),
    ]:
        torch.testing.assert_close(omega(w, g, one), omega(w, g, other), rtol=1e-12, atol=1e-12)
    for none in (Units(1.0), Blocks(1.0, 2, "sliding"), Gaussian(0.0), FixedSize(6), UnitsInBlocks(1, 1, 2)):
        assert omega(w, g, none) == 0


def test_leading_axes_are_samples():
    w, g = randn(3, 7), randn(2, 4, 7)
    torch.testing.assert_close(omega(w, g, Blocks(0.6, 3)), omega(w, g.flatten(0, 1), Blocks(0.6, 3)))


@EVERY
def test_it_is_computed_in_single_precision_at_least(scheme):
    w, g = randn(30, 7).bfloat16(), randn(40, 7).bfloat16()
    exact = dense(w.double(), g.double(), scheme)
    with torch.autocast("cpu", torch.bfloat16):
        for cast in (lambda t: t, Tensor.float):
            value = omega(cast(w), cast(g), scheme)
            assert value.dtype == torch.float32
            assert float(value) == pytest.approx(float(exact), rel=1e-5)
    assert omega(w, g.double(), scheme).dtype == torch.float64


# --- kappa ------------------------------------------------------------------------------------------------


@EVERY
def test_kappa_is_the_least_of_the_form_over_vectors_of_sum_one(scheme):
    c, least = characteristic_matrix(scheme, 7), kappa(scheme, 7)
    ones = torch.ones(1, 7, dtype=torch.float64)
    system = torch.cat([torch.cat([2 * c, ones.T], 1), torch.cat([ones, torch.zeros(1, 1).double()], 1)])
    v = (torch.linalg.pinv(system, hermitian=True) @ torch.eye(8, dtype=torch.float64)[7])[:7]
    assert float(v.sum()) == pytest.approx(1, abs=1e-9)
    assert least == pytest.approx(float(v @ c @ v), rel=1e-7, abs=1e-9)
    assert least >= 0


def test_kappa_is_what_predictions_of_rank_one_cost_at_least():
    u, h = randn(3, 1), randn(1, 4)
    for scheme in (
        Blocks(0.6, 3),
        Blocks(0.6, 3, "sliding"),
        UnitsInBlocks(0.5, 0.75, 2),
        Exchangeable(0.6, 0.2),
    ):
        v = torch.linalg.pinv(characteristic_matrix(scheme, 6), hermitian=True).sum(1)
        value = omega(u.expand(3, 6), h.T * (v / v.sum()), scheme)
        norm = float((u @ h).square().sum())
        assert float(value) == pytest.approx(kappa(scheme, 6) * norm, rel=1e-11)


def test_kappa_of_the_schemes_with_a_formula():
    c = 0.4 / 0.6
    assert kappa(Units(0.6), 8) == pytest.approx(c / 8)
    assert kappa(Units((0.5, 0.8)), 2) == pytest.approx(1 / (1 + 4))
    assert kappa(Blocks(0.6, 2), 8) == pytest.approx(c / 4)
    assert kappa(Blocks(0.6, 3), 8) == pytest.approx(c / 3)
    assert kappa(Layer(0.6), 8) == pytest.approx(c)
    assert kappa(Exchangeable(0.6, 0.3), 8) == pytest.approx(c * (0.7 / 8 + 0.3))
    assert kappa(FixedSize(3), 8) == 0
    assert kappa(Units(1.0), 8) == kappa(Units((0.5, 1.0)), 2) == 0
    singular = Correlated((1.0, 1.0), [[1.0, -1.0], [-1.0, 1.0]])
    assert kappa(singular, 2) == 0
    assert kappa(Correlated((1.0, 1.0), [[1.0, 1.0], [1.0, 1.0]]), 2) == pytest.approx(1)


# --- effective rank ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 5])
def test_up_to_the_effective_rank_blocks_cost_what_units_do(block_size: int):
    for values in ([5.0, 5.0, 5.0, 5.0, 5.0], [9.0, 5.0, 2.0, 1.0, 1.0], [5.0, 5.0, 0.1, 0.1, 0.1]):
        p, q = (torch.linalg.qr(randn(n, 5)).Q for n in (8, 6))
        a = p * torch.tensor(values, dtype=torch.float64) @ q.T
        # the least penalties at equal rate and width d: blocks |A|_(r)^2 r / d, units |A|_*^2 / d
        blocks, units = block_size * spectral_ksupport_sq(a, block_size), spectral_ksupport_sq(a, 1)
        same = math.isclose(float(blocks), float(units), rel_tol=1e-9)
        assert acts_as_dropout(a, block_size) == same
        assert blocks >= units * (1 - 1e-12)
        sentence = block_size_note(a, block_size)
        assert ("DropBlock is Dropout here" in sentence) == same
        assert f"at block size {block_size}" in sentence and f"{sum(values) / values[0]:.1f}" in sentence


def test_the_effective_rank_lies_between_1_and_the_rank():
    assert effective_rank(randn(6, 1) @ randn(1, 4)) == pytest.approx(1)
    assert effective_rank(torch.eye(5)) == pytest.approx(5)
    assert effective_rank(torch.eye(5, dtype=torch.bfloat16)) == pytest.approx(5)
    assert effective_rank(torch.zeros(3, 2)) == 0 and acts_as_dropout(torch.zeros(3, 2), 1)


# --- what is refused --------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_in_words():
    w, g = randn(3, 6), randn(4, 6)
    with pytest.raises(UsageError, match=r"same width d, got shapes \[3, 6\] and \[4, 5\]"):
        omega(w, g[:, :5], Units(0.5))
    with pytest.raises(UsageError, match=r"got shapes \[3, 6, 1\]"):
        omega(w[..., None], g, Units(0.5))
    with pytest.raises(ArgumentError, match="features must be real floating point, got torch.int64"):
        omega(w, g.long(), Units(0.5))
    for bad in (0.5, Units, "units"):
        with pytest.raises(
            ArgumentError, match=r"scheme must be one of fallow.schemes, got (float|ABCMeta|str)"
        ):
            omega(w, g, bad)  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match="scheme must be one of fallow.schemes"):
            kappa(bad, 6)  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        omega(w, g, FixedSize(7))
    with pytest.raises(UsageError, match="width must be an integer of at least 1"):
        kappa(Units(0.5), 0)
    for bad in (randn(3), randn(2, 2, 2), randn(0, 2), randn(2, 2) * math.nan):
        with pytest.raises(UsageError, match="predictions"):
            effective_rank(bad)
    with pytest.raises(UsageError, match="block_size must be an integer of at least 1"):
        acts_as_dropout(w, 0)

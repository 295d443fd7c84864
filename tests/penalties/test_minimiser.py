"""The closed form against optimisers of objective (1), enumeration of masks, duality, its own conditions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from fallow.errors import RateError, UsageError
from fallow.penalties import (
    adaptive_survival_rate,
    balanced_factors,
    closed_form,
    dropblock_objective,
    duality_gap,
    effective_gamma,
    network_gap,
    spectral_ksupport_sq,
)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def with_spectrum(values: list[float], rows: int, columns: int) -> Tensor:
    p, q = (torch.linalg.qr(randn(n, len(values))).Q for n in (rows, columns))
    return p * torch.tensor(values, dtype=torch.float64) @ q.T


def trained(y: Tensor, width: int, rate: float, block_size: int, inputs: Tensor | None = None, bias=False):
    """L-BFGS on objective (1) over both layers (and the bias): value, features, outgoing weight, bias."""
    x = torch.eye(len(y), dtype=torch.float64) if inputs is None else inputs
    shapes = [(x.shape[1], width), (y.shape[1], width), (y.shape[1],)]
    sizes = [math.prod(s) for s in shapes]

    def parts(flat: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        v, w, b = (t.reshape(s) for t, s in zip(flat.split(sizes), shapes, strict=True))
        return x @ v, w, b if bias else None

    def value(flat):
        leaf = torch.tensor(flat, requires_grad=True)
        g, w, b = parts(leaf)
        loss = dropblock_objective(y, g, w, survival_rate=rate, block_size=block_size, bias=b)
        loss.backward()
        return loss.item(), leaf.grad.numpy()  # type: ignore[union-attr]

    options = {"maxiter": 20000, "maxfun": 40000, "ftol": 0, "gtol": 1e-10, "maxcor": 30}
    at, before = randn(sum(sizes)).numpy(), math.inf
    for _ in range(3):  # a search that got stuck goes on with a fresh memory
        found = minimize(value, at, jac=True, method="L-BFGS-B", options=options)
        if found.fun >= before * (1 - 1e-12):
            break
        at, before = found.x, found.fun
    return found.fun, *parts(torch.tensor(found.x))


# --- rates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 4, 20])
def test_with_the_adaptive_rate_the_penalty_is_the_same_at_every_width(block_size: int):
    for width in (20, 40, 200):
        rate = adaptive_survival_rate(survival_rate=0.7, width=width, block_size=block_size)
        gamma = effective_gamma(survival_rate=rate, width=width, block_size=block_size)
        assert gamma == pytest.approx(0.3 / 0.7, rel=1e-12)
    assert adaptive_survival_rate(survival_rate=0.7, width=20, block_size=20) == pytest.approx(0.7)
    one = adaptive_survival_rate(survival_rate=0.7, width=10, block_size=1)
    assert one == pytest.approx(0.7 / (10 - 9 * 0.7))  # the formula of Dropout


@pytest.mark.parametrize("call", [adaptive_survival_rate, effective_gamma])
def test_bad_widths_and_rates_are_refused_in_words(call):
    with pytest.raises(
        UsageError, match="multiple of block_size, got 10 hidden units in blocks of 4.* width of 8"
    ):
        call(survival_rate=0.5, width=10, block_size=4)
    for width, block in ((0, 1), (4, 0), (4, -2), (4.0, 2), (True, 1)):
        with pytest.raises(UsageError, match="integer of at least 1"):
            call(survival_rate=0.5, width=width, block_size=block)
    with pytest.raises(RateError):
        call(survival_rate=0.0, width=4, block_size=2)


# --- objective (1) -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 2, 3, 6])
@pytest.mark.parametrize("rate", [0.3, 0.9, 1.0])
def test_the_objective_is_the_mean_over_all_masks(rate: float, block_size: int):
    y, g, w, b = randn(5, 3), randn(5, 6), randn(3, 6), randn(3)
    expected = torch.zeros((), dtype=torch.float64)
    for kept in itertools.product((0, 1), repeat=6 // block_size):
        chance = math.prod(rate if bit else 1 - rate for bit in kept)
        mask = torch.tensor(kept, dtype=torch.float64).repeat_interleave(block_size) / rate
        expected += chance * (y - (g * mask) @ w.T - b).square().sum()
    given = dropblock_objective(y, g, w, survival_rate=rate, block_size=block_size, bias=b)
    torch.testing.assert_close(given, expected, rtol=1e-12, atol=0)


def test_the_objective_is_differentiable_and_refuses_what_does_not_fit():
    y, g, w = randn(4, 3), randn(4, 6).requires_grad_(), randn(3, 6).requires_grad_()
    call = lambda g, w: dropblock_objective(y, g, w, survival_rate=0.6, block_size=2)  # noqa: E731
    assert torch.autograd.gradcheck(call, (g, w))
    with pytest.raises(UsageError, match="multiple of block_size"):
        dropblock_objective(y, g, w, survival_rate=0.6, block_size=4)
    with pytest.raises(UsageError, match="same width"):
        dropblock_objective(y, g[:, :4], w, survival_rate=0.6, block_size=2)
    with pytest.raises(UsageError, match=r"\[5, 3\] and \[4, 3\]"):
        dropblock_objective(randn(5, 3), g, w, survival_rate=0.6, block_size=2)


# --- closed form -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block_size", "blocks", "base"),
    [(1, 8, 0.8), (1, 10, 0.3), (2, 7, 0.6), (3, 8, 0.9), (4, 6, 0.5), (6, 4, 0.8)],
)
def test_training_the_factors_reaches_the_closed_form(block_size: int, blocks: int, base: float):
    """No value is equal to its threshold: there the objective is flat to fourth order and training slow."""
    y, width = with_spectrum([5.1, 4.3, 3.2, 2.4, 1.1, 0.3], 7, 6), block_size * blocks
    rate = adaptive_survival_rate(survival_rate=base, width=width, block_size=block_size)
    best = closed_form(y, block_size, effective_gamma(survival_rate=rate, width=width, block_size=block_size))
    assert width >= best.reachable_width
    value, g, w, _ = trained(y, width, rate, block_size)
    assert value == pytest.approx(best.value, rel=1e-10) and value >= best.value * (1 - 1e-12)
    torch.testing.assert_close(g @ w.T, best.predictions, rtol=0, atol=1e-4)
    parts = [
        (g[:, i : i + block_size] @ w[:, i : i + block_size].T).norm() for i in range(0, width, block_size)
    ]
    assert max(parts) / min(parts) < 1 + 1e-4  # balanced


def test_gradient_descent_with_sampled_masks_comes_within_1_percent():
    """Plain steps on losses with fresh masks, a mask for each sample; nothing here knows objective (1)."""
    y, blocks, block_size, rate = with_spectrum([3.0, 2.0, 1.0, 0.5], 6, 5), 8, 2, 0.6
    g, w = 0.5 * randn(6, 16), 0.5 * randn(5, 16)
    steps = 6000
    for step in range(steps):
        kept = torch.rand(6, blocks, dtype=torch.float64) < rate
        mask = kept.repeat_interleave(block_size, 1) / rate
        error = (g * mask) @ w.T - y
        size = 0.01 * (1 - step / steps)
        g, w = g - size * 2 * (error @ w) * mask, w - size * 2 * error.T @ (g * mask)
    gamma = effective_gamma(survival_rate=rate, width=16, block_size=block_size)
    best = closed_form(y, block_size, gamma)
    found = network_gap(y, g, w, survival_rate=rate, block_size=block_size)
    assert best.value <= found.objective <= 1.01 * best.value
    assert found.bound <= best.value


@pytest.mark.parametrize(("block_size", "bias"), [(1, False), (2, False), (1, True), (2, True)])
def test_training_on_inputs_reaches_the_closed_form(block_size: int, bias: bool):
    x, y, width, rate = randn(12, 5), randn(12, 4) + 2, 6 * block_size, 0.6
    x = x - x.mean(0) if bias else x
    gamma = effective_gamma(survival_rate=rate, width=width, block_size=block_size)
    best = closed_form(y, block_size, gamma, x, bias=bias)
    value, _, _, b = trained(y, width, rate, block_size, x, bias)
    assert value == pytest.approx(best.value, rel=1e-10)
    if bias:
        torch.testing.assert_close(b, best.bias, rtol=0, atol=1e-4)
    free = closed_form(y, block_size, gamma, bias=bias)
    assert free.value < best.value


def test_a_bias_with_free_predictions_and_with_a_constant_among_the_inputs():
    y = randn(6, 4) + 3
    best = closed_form(y, 2, 0.3, bias=True)
    value, *_ = trained(y, 12, 1 / (1 + 0.3 * 6), 2, bias=True)
    assert value == pytest.approx(best.value, rel=1e-10)
    torch.testing.assert_close(best.bias, y.mean(0))
    x = torch.cat([randn(6, 2), torch.ones(6, 1, dtype=torch.float64)], 1)
    value, *_ = trained(y, 12, 1 / (1 + 0.3 * 6), 2, x, bias=True)
    assert value == pytest.approx(closed_form(y, 2, 0.3, x, bias=True).value, rel=1e-10)
    with pytest.raises(UsageError, match="append a column of ones"):
        closed_form(y, 2, 0.3, x[:, :2], bias=True)


@pytest.mark.parametrize("block_size", [1, 2, 3, 4])
@pytest.mark.parametrize("gamma", [0.05, 0.5, 4.0])
def test_counts_threshold_and_spectrum_satisfy_their_conditions(block_size: int, gamma: float):
    for values in ([5.0, 4.0, 2.0, 1.5, 0.7, 0.1], [3.0, 3.0, 3.0, 1.0, 1.0, 1.0]):
        best = closed_form(with_spectrum(values, 8, 6), block_size, gamma)
        m, a, q, rho, t = (
            *map(torch.Tensor.tolist, (best.target_spectrum, best.spectrum)),
            best.head,
            best.kept,
            best.threshold,
        )
        assert sum(v > 1e-12 for v in a) == rho and m == pytest.approx(values)
        for i, (mi, ai) in enumerate(zip(m, a, strict=True)):
            expected = mi / (1 + gamma) if i < q else mi - t if i < rho else 0.0
            assert ai == pytest.approx(expected, abs=1e-12)
        edge = (1 + gamma) / gamma * t
        assert all(v >= edge * (1 - 1e-12) for v in m[:q]) and all(v <= edge * (1 + 1e-12) for v in m[q:rho])
        assert all(v > t for v in m[:rho]) and all(v <= t * (1 + 1e-12) for v in m[rho:])
        if rho > q:
            assert t == pytest.approx(gamma * sum(m[q:rho]) / (block_size - q + gamma * (rho - q)))


def test_a_spectral_gap_keeps_exactly_the_block_size():
    best = closed_form(with_spectrum([6.0, 5.0, 1.0, 0.9], 6, 5), 2, 0.5)
    assert (best.head, best.kept, best.reachable_width) == (2, 2, 2)
    torch.testing.assert_close(best.spectrum[:2], torch.tensor([4.0, 10 / 3]).double(), rtol=1e-6, atol=0)
    assert not best.spectrum[2:].any()


def test_few_values_zeros_and_no_noise():
    y = with_spectrum([3.0, 1.0], 6, 5)
    best = closed_form(y, 3, 0.25)
    assert (best.head, best.kept, best.threshold) == (2, 2, 0.0)
    torch.testing.assert_close(best.predictions, y / 1.25)
    none = closed_form(torch.zeros(4, 3), 2, 0.5)
    assert none.value == 0 and none.kept == 0 and not none.predictions.any()
    plain = closed_form(randn(4, 3), 2, 0.0)
    assert plain.value == pytest.approx(0, abs=1e-25)


@pytest.mark.parametrize(("block_size", "classes"), [(1, 5), (3, 5), (5, 5), (8, 5)])
def test_balanced_labels_are_only_scaled(block_size: int, classes: int):
    y, gamma = torch.eye(classes, dtype=torch.float64).repeat(4, 1), 0.3
    best = closed_form(y, block_size, gamma)
    factor = block_size / (block_size + gamma * classes) if block_size <= classes else 1 / (1 + gamma)
    torch.testing.assert_close(best.predictions, factor * y)
    assert best.value == pytest.approx(float((y * (y - best.predictions)).sum()))


def test_single_precision_and_transposes_agree():
    y = randn(9, 6)
    best, other = closed_form(y, 2, 0.4), closed_form(y.T, 2, 0.4)
    torch.testing.assert_close(best.predictions, other.predictions.T)
    single = closed_form(y.float(), 2, 0.4)
    assert single.predictions.dtype == torch.float32 and single.value == pytest.approx(best.value, rel=1e-6)


# --- factors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 2, 3, 4])
@pytest.mark.parametrize("more", [0, 1, 2, 5])
def test_balanced_factors_have_the_least_objective_in_equal_blocks(block_size: int, more: int):
    y = with_spectrum([5.0, 4.0, 2.0, 1.5, 1.2, 0.4], 8, 6)
    best = closed_form(y, block_size, 0.1)
    width = best.reachable_width + more * block_size
    rate = 1 / (1 + 0.1 * width / block_size)
    incoming, outgoing = best.layers(width)
    assert incoming.shape == (width, 8) and outgoing.shape == (6, width)
    torch.testing.assert_close(incoming.T @ outgoing.T, best.predictions, rtol=0, atol=1e-12)
    value = dropblock_objective(y, incoming.T, outgoing, survival_rate=rate, block_size=block_size)
    penalty = value - (y - best.predictions).square().sum()
    torch.testing.assert_close(
        penalty, 0.1 * spectral_ksupport_sq(best.predictions, block_size), rtol=1e-11, atol=0
    )
    norms = [
        float((incoming.T[:, i : i + block_size] @ outgoing[:, i : i + block_size].T).norm())
        for i in range(0, width, block_size)
    ]
    assert max(norms) == pytest.approx(min(norms), rel=1e-11)


def test_layers_on_inputs_give_the_predictions():
    x, y = randn(10, 4), randn(10, 5)
    best = closed_form(y, 2, 0.2, x)
    incoming, outgoing = best.layers(16)
    torch.testing.assert_close(x @ incoming.T @ outgoing.T, best.predictions)
    value = dropblock_objective(y, x @ incoming.T, outgoing, survival_rate=1 / 2.6, block_size=2)
    assert float(value) == pytest.approx(best.value, rel=1e-11)


def test_low_rank_zero_and_narrow_factors():
    a = with_spectrum([2.0, 1.0], 5, 4)
    for width in (3, 6, 9):
        g, w = balanced_factors(a, 3, width)
        torch.testing.assert_close(g @ w.T, a)
    g, w = balanced_factors(torch.zeros(3, 2), 2, 4)
    assert g.shape == (3, 4) and not (g @ w.T).any()
    with pytest.raises(UsageError, match="at least 8 for exact factors, 4 blocks of 2"):
        balanced_factors(with_spectrum([1.0] * 4, 5, 4), 2, 6)
    with pytest.raises(UsageError, match="multiple of block_size"):
        balanced_factors(a, 3, 7)
    with pytest.raises(UsageError, match="finite"):
        balanced_factors(a * math.nan, 3, 9)


# --- certificate -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("linear", [False, True])
def test_the_bound_is_below_the_minimum_and_meets_it_there(block_size: int, bias: bool, linear: bool):
    y, x = randn(10, 5) + 1, randn(10, 6)
    inputs = x - x.mean(0) if linear else None
    for gamma in (0.01, 0.5, 5.0):
        best = closed_form(y, block_size, gamma, inputs, bias=bias)
        at = duality_gap(y, best.predictions, block_size, gamma, inputs=inputs, bias=best.bias)
        assert at.objective == pytest.approx(best.value, rel=1e-12)
        assert 0 <= at.gap <= 1e-11 * best.value
        for _ in range(10):
            other = randn(6, 5) * 10 ** float(randn(1))
            a = (inputs if inputs is not None else x) @ other
            shift = randn(5) if bias else None
            far = duality_gap(
                y, a if shift is None else a + shift, block_size, gamma, inputs=inputs, bias=shift
            )
            assert far.bound <= best.value <= far.objective


@pytest.mark.parametrize("bias", [False, True])
def test_the_certificate_of_a_network_counts_its_own_penalty(bias: bool):
    y, g, w = randn(8, 3), randn(8, 12), randn(3, 12)
    b = randn(3) if bias else None
    found = network_gap(y, g, w, survival_rate=0.7, block_size=3, bias=b)
    value = dropblock_objective(y, g, w, survival_rate=0.7, block_size=3, bias=b)
    gamma = effective_gamma(survival_rate=0.7, width=12, block_size=3)
    assert found.objective == pytest.approx(float(value), rel=1e-12)
    assert found.bound <= closed_form(y, 3, gamma, bias=bias).value <= found.objective
    incoming, outgoing = closed_form(y, 3, gamma).layers(12)
    best = network_gap(y, incoming.T, outgoing, survival_rate=0.7, block_size=3)
    assert best.relative < 1e-11 and "above the global minimum" in str(best)


def test_the_certificate_without_noise_or_error_is_the_objective_itself():
    y = randn(4, 3)
    assert duality_gap(y, y, 2, 0.0).relative == 0
    assert duality_gap(y, torch.zeros_like(y), 2, 0.0).bound == 0
    assert duality_gap(torch.zeros(4, 3), torch.zeros(4, 3), 2, 0.5).gap == 0


def test_bad_problems_are_refused_in_words():
    y = randn(4, 3)
    for gamma in (-0.1, math.nan, math.inf, "1", True):
        with pytest.raises(UsageError, match="gamma must be finite and not negative"):
            closed_form(y, 2, gamma)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="block_size must be an integer of at least 1"):
        closed_form(y, 0, 0.1)
    for bad in (y * math.nan, y[:0]):
        with pytest.raises(UsageError, match="targets must be finite and not empty"):
            closed_form(bad, 2, 0.1)
    with pytest.raises(UsageError, match=r"must both have shape \[N, outputs\]"):
        duality_gap(y, y[:2], 2, 0.1)
    with pytest.raises(UsageError, match="training has diverged"):
        duality_gap(y, y * math.inf, 2, 0.1)
    with pytest.raises(UsageError, match=r"inputs must be finite, of shape \[4, features\]"):
        closed_form(y, 2, 0.1, randn(5, 2))

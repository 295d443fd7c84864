"""Closed forms of schemes against L-BFGS on both layers of the expected loss, and against convexity."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from fallow.errors import ArgumentError, UsageError
from fallow.penalties import closed_form, closed_form_mixed, closed_form_of, kappa, omega
from fallow.schemes import (
    Blocks,
    Correlated,
    Exchangeable,
    FixedSize,
    Gaussian,
    Layer,
    Scheme,
    Units,
    UnitsInBlocks,
)

CLOSED = {
    "units": Units(0.7),
    "gaussian": Gaussian(0.5),
    "blocks of 2": Blocks(0.5, 2),
    "blocks of 3": Blocks(0.7, 3),
    "layer": Layer(0.6),
    "alike": Exchangeable(0.6, 0.2),
    "unlike": Exchangeable(0.5, -0.06),
    "fixed size": FixedSize(4),
    "two": FixedSize(2),
}


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def with_spectrum(values: list[float], rows: int, columns: int) -> Tensor:
    p, q = (torch.linalg.qr(randn(n, len(values))).Q for n in (rows, columns))
    return p * torch.tensor(values, dtype=torch.float64) @ q.T


def trained(y: Tensor, scheme: Scheme, width: int, inputs: Tensor | None = None, bias: bool = False):
    """L-BFGS on the expected loss over both layers (and the bias): value and predictions."""
    x = torch.eye(len(y), dtype=torch.float64) if inputs is None else inputs
    shapes = [(x.shape[1], width), (y.shape[1], width), (y.shape[1],)]
    sizes = [math.prod(s) for s in shapes]

    def parts(flat: Tensor) -> tuple[Tensor, Tensor]:
        v, w, b = (t.reshape(s) for t, s in zip(flat.split(sizes), shapes, strict=True))
        return (x @ v) @ w.T + (b if bias else 0), omega(w, x @ v, scheme)

    def value(flat):
        leaf = torch.tensor(flat, requires_grad=True)
        output, penalty = parts(leaf)
        loss = (y - output).square().sum() + penalty
        loss.backward()
        return loss.item(), leaf.grad.numpy()  # type: ignore[union-attr]

    options = {"maxiter": 20000, "maxfun": 40000, "ftol": 0, "gtol": 1e-10, "maxcor": 30}
    at, before = randn(sum(sizes)).numpy(), math.inf
    for _ in range(3):  # a search that got stuck goes on with a fresh memory
        found = minimize(value, at, jac=True, method="L-BFGS-B", options=options)
        if found.fun >= before * (1 - 1e-12):
            break
        at, before = found.x, found.fun
    return found.fun, parts(torch.tensor(found.x))[0]


@pytest.mark.parametrize("scheme", CLOSED.values(), ids=CLOSED.keys())
def test_training_both_layers_reaches_the_closed_form(scheme: Scheme):
    y = with_spectrum([5.1, 4.3, 2.4, 0.6], 6, 5)
    best = closed_form_of(y, scheme, 12)
    assert best.reachable_width <= 12
    value, predictions = trained(y, scheme, 12)
    assert value == pytest.approx(best.value, rel=1e-10) and value >= best.value * (1 - 1e-12)
    torch.testing.assert_close(predictions, best.predictions, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scheme", CLOSED.values(), ids=CLOSED.keys())
def test_its_layers_attain_the_value(scheme: Scheme):
    y, width = with_spectrum([5.1, 4.3, 2.4, 0.6], 6, 5), 12 if not isinstance(scheme, Blocks) else 24
    best = closed_form_of(y, scheme, width)
    incoming, outgoing = best.layers(width)
    loss = (y - incoming.T @ outgoing.T).square().sum() + omega(outgoing, incoming.T, scheme)
    assert float(loss) == pytest.approx(best.value, rel=1e-11)


@pytest.mark.parametrize("name", ["units", "unlike", "fixed size", "layer"])
@pytest.mark.parametrize("linear", [False, True])
def test_training_with_a_bias_and_inputs_reaches_the_closed_form(name: str, linear: bool):
    y, x = randn(9, 4) + 2, randn(9, 5)
    inputs = x - x.mean(0) if linear else None
    best = closed_form_of(y, CLOSED[name], 12, inputs, bias=True)
    value, predictions = trained(y, CLOSED[name], 12, inputs, bias=True)
    assert value == pytest.approx(best.value, rel=1e-10)
    if linear:
        without = closed_form_of(y, CLOSED[name], 12, inputs)
        assert trained(y, CLOSED[name], 12, inputs)[0] == pytest.approx(without.value, rel=1e-10)
        assert without.value > best.value


@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 0.0), (0.3, 0.7), (0.0, 0.5), (0.4, -0.4), (0.1, -0.9)])
def test_it_is_the_least_of_its_objective(alpha: float, beta: float):
    """No step in any of many directions goes down, and the objective is convex."""

    def objective(a: Tensor) -> float:
        nuclear = float(torch.linalg.svdvals(a).sum())
        return float((y - a).square().sum() + beta * a.square().sum()) + alpha * nuclear**2

    y = with_spectrum([4.0, 2.0, 1.0, 0.2], 6, 5)
    best = closed_form_mixed(y, alpha, beta)
    assert best.value == pytest.approx(objective(best.predictions), rel=1e-12)
    for size in (1e-4, 1e-2, 1.0):
        for _ in range(50):
            step = randn(6, 5) if torch.rand(()) < 0.5 else randn(6, 1) @ randn(1, 5)
            assert objective(best.predictions + size * step) >= best.value
    m, a = best.target_spectrum, best.spectrum
    shrunk = ((m - best.threshold) / (1 + beta)).clamp_min(0)
    torch.testing.assert_close(a, shrunk, rtol=0, atol=1e-12)
    total = float(m[: best.kept].sum())
    assert best.threshold == pytest.approx(alpha * total / (1 + beta + alpha * best.kept), abs=1e-12)
    assert (best.gamma, best.beta, best.block_size) == (alpha, beta, 1)


def test_without_a_frobenius_part_it_is_the_closed_form_of_dropout():
    y = randn(7, 5)
    one, other = closed_form(y, 1, 0.3), closed_form_mixed(y, 0.3, 0.0)
    torch.testing.assert_close(one.predictions, other.predictions, rtol=0, atol=0)
    assert (one.value, one.kept, one.threshold) == (other.value, other.kept, other.threshold)
    torch.testing.assert_close(
        closed_form_mixed(y, 0.0, 0.5).predictions, y / 1.5, rtol=1e-12, atol=1e-12
    )  # ridge
    single = closed_form_mixed(y.float(), 0.3, -0.2)
    assert single.predictions.dtype == torch.float32
    assert single.value == pytest.approx(closed_form_mixed(y, 0.3, -0.2).value, rel=1e-6)


@pytest.mark.parametrize("scheme", CLOSED.values(), ids=CLOSED.keys())
def test_targets_of_rank_one_are_shrunk_by_kappa_alone(scheme: Scheme):
    y = randn(5, 1) @ randn(1, 4)
    best, k = closed_form_of(y, scheme, 12), kappa(scheme, 12)
    torch.testing.assert_close(best.predictions, y / (1 + k), rtol=1e-10, atol=1e-10)
    assert best.value == pytest.approx(k / (1 + k) * float(y.square().sum()), rel=1e-9, abs=1e-12)


def test_schemes_without_closed_form_are_refused_by_name():
    y = randn(4, 3)
    for scheme, word in [
        (Blocks(0.5, 2, "sliding"), r'Blocks with grid="sliding" has no closed form: .*"disjoint" is near'),
        (Units((0.5,) * 3 + (0.6,) * 3), "Units with unequal rates has no closed form: .* one rate"),
        (UnitsInBlocks(0.5, 0.5, 2), "UnitsInBlocks has no closed form: .* minimise omega"),
        (Correlated((1.0,) * 6, torch.eye(6).tolist()), "Correlated has no closed form"),
        (FixedSize(1), "FixedSize at a width of 6 has no unique minimiser: no two features are ever kept"),
        (Exchangeable(1 / 6, -0.2), "Exchangeable at a width of 6 has no unique minimiser"),
    ]:
        with pytest.raises(UsageError, match=word):
            closed_form_of(y, scheme, 6)
    with pytest.raises(UsageError, match="multiple of block_size"):
        closed_form_of(y, Blocks(0.5, 4), 6)
    with pytest.raises(ArgumentError, match="scheme must be one of fallow.schemes"):
        closed_form_of(y, 0.5, 6)  # type: ignore[arg-type]


def test_numbers_without_a_least_value_are_refused():
    y = randn(4, 3)
    for alpha, beta in ((-0.1, 0.0), (0.1, -1.0), (0.1, -2.0)):
        with pytest.raises(UsageError, match="alpha must be at least 0 and beta above -1"):
            closed_form_mixed(y, alpha, beta)
    for bad in (math.nan, math.inf, "1", True):
        with pytest.raises(UsageError, match="alpha must be a finite number"):
            closed_form_mixed(y, bad, 0.0)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="beta must be a finite number"):
            closed_form_mixed(y, 0.1, bad)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="with a bias beta must be at least -alpha"):
        closed_form_mixed(y, 0.1, -0.2, bias=True)

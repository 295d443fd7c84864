"""Surrogates of the expected cross-entropy against the expectation itself, by all masks or by quadrature."""

from __future__ import annotations

import itertools
import math

import numpy
import pytest
import torch
from enumerated import SCHEMES, expected
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from fallow.errors import ArgumentError, RateError, UsageError
from fallow.penalties import jensen_bound, quadratic_surrogate, surrogates
from fallow.schemes import Blocks, FixedSize, Gaussian, Layer, Scheme, Units, characteristic_matrix


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def case(scale: float = 1.0, samples: int = 5, outputs: int = 4, width: int = 7):
    w, g, b = randn(outputs, width) * scale / width**0.5, randn(samples, width), randn(outputs)
    return w, g, torch.randint(outputs, (samples,)), b


def exact(w: Tensor, g: Tensor, y: Tensor, scheme: Scheme, bias: Tensor | None = None) -> Tensor:
    def loss(z: Tensor) -> Tensor:
        return cross_entropy((g * z) @ w.T + (0 if bias is None else bias), y, reduction="sum")

    return expected(scheme, w.shape[1], loss)


def table() -> list[list[float]]:
    """The numbers in the docstring of the module."""
    lines = (surrogates.__doc__ or "").split("===\n")[2].splitlines()
    return [[float(number) for number in line.replace(",", " ").split()] for line in lines if line[0] == "0"]


def test_the_table_in_the_docstring_is_what_is_measured():
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(2000, 32, generator=generator, dtype=torch.float64)
    unit = torch.randn(10, 32, generator=generator, dtype=torch.float64) / 32**0.5
    y = torch.randint(10, (2000,), generator=generator)
    assert len(table()) == 8
    for rate, scale, *numbers in table():
        w, mean = unit * scale, 0.0
        shares = (g.view(2000, 8, 4).transpose(0, 1) @ w.view(10, 8, 4).permute(1, 2, 0)) / rate
        for kept in itertools.product((0.0, 1.0), repeat=8):
            chance = math.prod(rate if k else 1 - rate for k in kept)
            mean += chance * float(cross_entropy(torch.tensordot(torch.tensor(kept).double(), shares, 1), y))
        plain = float(cross_entropy(g @ w.T, y))
        quadratic = float(quadratic_surrogate(w, g, Blocks(rate, 4))) / 2000
        bound = float(jensen_bound(w, g, y, survival_rate=rate, block_size=4)) / 2000
        assert [plain, mean, plain + quadratic, bound] == pytest.approx(numbers, abs=6e-5)


# --- quadratic --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_it_is_half_the_variance_of_the_noise_under_the_softmax(scheme: Scheme):
    w, g, _, b = case()
    value, c = 0.0, characteristic_matrix(scheme, 7)
    for row in g:
        p = (w @ row + b).softmax(0)
        x = w * row
        value += 0.5 * float((p.diag() - p.outer(p)).mul(x @ c @ x.T).sum())
    assert float(quadratic_surrogate(w, g, scheme, bias=b)) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_its_error_is_of_third_order_in_the_logits(scheme: Scheme):
    """Halving the logits' noise eight times less error, or sixteen, where the noise is symmetric."""
    w, g, y, b = case(scale=0.2)
    errors = []
    for factor in (1.0, 0.5, 0.25):
        small = w * factor
        added = exact(small, g, y, scheme, b) - cross_entropy(g @ small.T + b, y, reduction="sum")
        errors.append(abs(float(added - quadratic_surrogate(small, g, scheme, bias=b))) / float(added))
    assert errors[2] < 0.02
    assert errors[2] < 0.6 * errors[1] < 0.36 * errors[0]


def test_under_gaussian_noise_its_error_falls_with_the_square_of_the_variance():
    w, g, y, b = case(width=2)
    points, weights = (torch.from_numpy(v) for v in numpy.polynomial.hermite_e.hermegauss(40))
    grid = torch.stack(torch.meshgrid(points, points, indexing="ij"), -1).reshape(-1, 1, 2)
    chances = torch.outer(weights, weights).flatten() / weights.sum() ** 2
    plain, errors = cross_entropy(g @ w.T + b, y, reduction="sum"), []
    for variance in (0.04, 0.01):
        logits = (g * (1 + variance**0.5 * grid)) @ w.T + b
        losses = logits.logsumexp(2) - logits[:, range(len(y)), y]
        mean = (chances[:, None] * losses).sum()
        errors.append(abs(float(mean - plain - quadratic_surrogate(w, g, Gaussian(variance), bias=b))))
    assert errors[0] / errors[1] == pytest.approx(16, rel=0.1)


def test_surrogates_are_differentiable():
    w, g, y, b = (t.requires_grad_() if t.is_floating_point() else t for t in case(samples=2))
    for scheme in (Units(0.6), Blocks(0.6, 3), Blocks(0.6, 3, "sliding"), FixedSize(3)):
        call = lambda w, g, b, scheme=scheme: quadratic_surrogate(w, g, scheme, bias=b)  # noqa: E731
        assert torch.autograd.gradcheck(call, (w, g, b))
    for rate in (0.6, 1.0):
        call = lambda w, g, b, p=rate: jensen_bound(w, g, y, survival_rate=p, block_size=3, bias=b)  # noqa: E731
        assert torch.autograd.gradcheck(call, (w, g, b))


# --- bound ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rate=st.floats(0.05, 0.999),
    block_size=st.integers(1, 8),
    scale=st.floats(0.01, 8),
    bias=st.booleans(),
)
def test_the_bound_is_never_below_the_expectation(seed, rate, block_size, scale, bias):
    torch.manual_seed(seed)
    w, g, y, b = case(scale)
    b = b if bias else None
    mean = float(exact(w, g, y, Blocks(rate, block_size), b))
    bound = float(jensen_bound(w, g, y, survival_rate=rate, block_size=block_size, bias=b))
    assert bound >= mean * (1 - 1e-12)


def test_the_bound_is_that_of_the_formula_and_close_where_logits_are_small():
    w, g, y, b = case(0.3)
    mean = float(exact(w, g, y, Blocks(0.8, 2), b))
    bound = float(jensen_bound(w, g, y, survival_rate=0.8, block_size=2, bias=b))
    plain = float(cross_entropy(g @ w.T + b, y, reduction="sum"))
    assert plain < mean <= bound < mean + 0.1 * (mean - plain)
    value = 0.0
    for row, target in zip(g, y, strict=True):
        p = (w @ row + b).softmax(0)
        parts = [w[:, i : i + 2] @ row[i : i + 2] for i in range(0, 7, 2)]
        parts = [part - p @ part for part in parts]
        inner = b + sum(parts) + sum((0.8 * (0.25 * t).exp() + 0.2 * (-t).exp()).log() for t in parts)
        value += float(inner.logsumexp(0) - b[target] - sum(parts)[target])
    assert bound == pytest.approx(value, rel=1e-12)


def test_the_bound_without_noise_is_the_plain_loss():
    w, g, y, b = case()
    plain = cross_entropy(g @ w.T + b, y, reduction="sum")
    torch.testing.assert_close(jensen_bound(w, g, y, survival_rate=1.0, block_size=3, bias=b), plain)
    near = jensen_bound(w, g, y, survival_rate=1 - 1e-9, block_size=3, bias=b)
    torch.testing.assert_close(near, plain, rtol=1e-7, atol=0)
    assert quadratic_surrogate(w, g, Units(1.0), bias=b) == 0


def test_targets_may_be_probabilities_and_samples_have_more_axes():
    w, g, y, b = case(samples=6)
    want = jensen_bound(w, g, y, survival_rate=0.7, block_size=3, bias=b)
    hot = torch.nn.functional.one_hot(y, 4).double()
    torch.testing.assert_close(jensen_bound(w, g, hot, survival_rate=0.7, block_size=3, bias=b), want)
    smooth = 0.9 * hot + 0.1 / 4
    mean = expected(Blocks(0.7, 3), 7, lambda z: cross_entropy((g * z) @ w.T + b, smooth, reduction="sum"))
    assert jensen_bound(w, g, smooth, survival_rate=0.7, block_size=3, bias=b) >= mean
    folded = jensen_bound(w, g.view(2, 3, 7), y.view(2, 3), survival_rate=0.7, block_size=3, bias=b)
    torch.testing.assert_close(folded, want)
    torch.testing.assert_close(
        quadratic_surrogate(w, g.view(2, 3, 7), Layer(0.7)), quadratic_surrogate(w, g, Layer(0.7))
    )


def test_half_precision_and_large_logits_stay_finite():
    w, g, y, b = case()
    with torch.autocast("cpu", torch.bfloat16):
        value = quadratic_surrogate(w.bfloat16(), g.bfloat16(), Blocks(0.7, 3), bias=b.bfloat16())
        bound = jensen_bound(
            w.bfloat16(), g.bfloat16(), y, survival_rate=0.7, block_size=3, bias=b.bfloat16()
        )
    assert value.dtype == bound.dtype == torch.float32
    rounded = [t.bfloat16().double() for t in (w, g, b)]
    want = quadratic_surrogate(*rounded[:2], Blocks(0.7, 3), bias=rounded[2])
    assert float(value) == pytest.approx(float(want), rel=1e-4)
    large = (1e4 * w).float().requires_grad_()
    jensen_bound(large, g.float(), y, survival_rate=0.1, block_size=1).backward()
    assert large.grad is not None and bool(large.grad.isfinite().all())


def test_what_does_not_fit_is_refused_in_words():
    w, g, y, _ = case()
    call = lambda targets, **kw: jensen_bound(w, g, targets, **{"survival_rate": 0.5, "block_size": 2, **kw})  # noqa: E731
    with pytest.raises(UsageError, match="targets must be classes from 0 to 3, got 0 to 4"):
        call(torch.tensor([0, 1, 2, 3, 4]))
    with pytest.raises(UsageError, match=r"5 classes, one for each sample, got torch.int64 of shape \[4\]"):
        call(y[:4])
    with pytest.raises(UsageError, match=r"probabilities must have shape \[5, 4\], got \[5\]; classes"):
        call(y.float())
    with pytest.raises(ArgumentError, match="targets must be a tensor, got list"):
        call(y.tolist())
    with pytest.raises(RateError):
        call(y, survival_rate=0.0)
    with pytest.raises(UsageError, match="block_size must be an integer of at least 1"):
        call(y, block_size=0)
    with pytest.raises(UsageError, match=r"bias must have shape \[4\], got \[5\]"):
        quadratic_surrogate(w, g, Units(0.5), bias=randn(5))

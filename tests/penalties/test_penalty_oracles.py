"""Numbers and formulas from elsewhere: mpmath, the project's notes, brute minimisation, Monte Carlo."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from fallow.errors import RateError, UsageError
from fallow.penalties import (
    ARD,
    MCP,
    SCAD,
    HardConcrete,
    Log2Sum,
    LogSum,
    LpNorm,
    MolchanovFit,
    Ridge,
    Standout,
    TargetedThreshold,
    VariationalDropout,
    dawson,
    gate_moments,
    variational_kl,
)
from fallow.penalties.hard_concrete import HIGH, LOW, TEMPERATURE
from fallow.penalties.logarithmic import logsum_threshold

mpmath.mp.dps = 40


def double(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def exact_dawson(x: float) -> mpmath.mpf:
    z = mpmath.mpf(x)
    if abs(z) < 20:
        return mpmath.sqrt(mpmath.pi) / 2 * mpmath.exp(-z * z) * mpmath.erfi(z)
    return sum(mpmath.fac2(2 * k - 1) / (2 * z * z) ** k for k in range(30)) / (2 * z)


def exact_kl(r: float) -> mpmath.mpf:
    z = mpmath.mpf(r)
    if z < 300:
        return z / 2 * mpmath.hyp2f2(1, 1, mpmath.mpf(3) / 2, 2, -z / 2)
    series = sum(mpmath.fac2(2 * k - 1) / (2 * k * z**k) for k in range(1, 40))
    return (mpmath.log(z) + mpmath.log(2) + mpmath.euler) / 2 - series


def relative(found: Tensor, exact: list[mpmath.mpf]) -> float:
    return max(float(abs(mpmath.mpf(float(a)) - b) / abs(b)) for a, b in zip(found, exact, strict=True))


def test_dawsons_function_is_that_of_mpmath_to_rounding():
    x = torch.cat([torch.logspace(-12, 12, 61, dtype=torch.float64), torch.linspace(0.05, 10, 80).double()])
    assert relative(dawson(x), [exact_dawson(float(v)) for v in x]) < 2e-15
    single = x.float()
    assert relative(dawson(single), [exact_dawson(float(v)) for v in single]) < 4e-7
    assert torch.equal(dawson(-x), -dawson(x))


def test_dawsons_function_never_overflows():
    assert dawson(double(0.0, 1e300, -1e300, math.inf)).tolist() == pytest.approx([0.0, 5e-301, -5e-301, 0.0])
    assert dawson(torch.tensor([1e37])).tolist() == [pytest.approx(5e-38)]


def test_the_divergence_is_that_of_the_hypergeometric_form_to_rounding():
    r = torch.cat([torch.logspace(-12, 12, 61, dtype=torch.float64), torch.linspace(0.05, 150, 60).double()])
    assert relative(variational_kl(r), [exact_kl(float(v)) for v in r]) < 4e-15
    assert_close(
        variational_kl(double(0.01, 1, 10, 300)),
        double(0.00499168, 0.42668560, 1.72413785, 3.48539757),
        rtol=0,
        atol=5e-9,
    )
    assert variational_kl(double(0.0, math.inf)).tolist() == [0.0, math.inf]


def test_the_divergence_is_the_expectation_that_defines_it():
    """``E log |sqrt(r) + e| - E log |e|``, integrated by mpmath around the singularity."""
    mpmath.mp.dps = 20
    for r in (0.3, 4.0):
        root = mpmath.sqrt(r)

        def log_moment(shift: mpmath.mpf) -> mpmath.mpf:
            return mpmath.quad(
                lambda e: mpmath.log(abs(shift + e)) * mpmath.npdf(e), [-12, -shift, 12], maxdegree=10
            )

        expected = log_moment(root) - log_moment(mpmath.mpf(0))
        assert float(variational_kl(double(r))) == pytest.approx(float(expected), abs=1e-9)
    mpmath.mp.dps = 40


def test_derivatives_of_both_are_right():
    x = torch.linspace(-4, 4, 9, dtype=torch.float64, requires_grad=True)
    assert gradcheck(dawson, x) and gradgradcheck(dawson, x)
    r = torch.linspace(0.05, 40, 9, dtype=torch.float64, requires_grad=True)
    assert gradcheck(variational_kl, r) and gradgradcheck(variational_kl, r)


def test_variational_dropout_lies_on_its_parametric_curve():
    """``w = eta sqrt(D / x)``, ``Omega = (eta D / x + f) / 2`` with x^2 = eta / 2, in forty digits."""
    w, eta, value = [], [], []
    for x in torch.logspace(-6, 1.2, 60, dtype=torch.float64).tolist():
        e = 2 * mpmath.mpf(x) ** 2
        ratio = exact_dawson(x) / x
        w.append(float(e * mpmath.sqrt(ratio)))
        eta.append(e)
        value.append((e * ratio + 2 * exact_kl(float(e))) / 2)
    penalty = VariationalDropout()
    assert relative(penalty.eta(double(*w)), eta) < 1e-14
    assert relative(penalty.value(double(*w)), value) < 1e-14


def test_variational_dropout_has_its_limits():
    penalty = VariationalDropout()
    small, large = double(0.01), double(100.0)
    assert float((penalty.value(small) - small + small**2 / 12) / small**3) == pytest.approx(-0.003, abs=5e-4)
    limit = (1 + math.log(2) + 0.5772156649015329) / 2
    assert float(penalty.value(large) - large.log()) - limit == pytest.approx(-5e-5, abs=1e-6)
    assert_close(penalty.eta(double(1e8)), double(1e16), rtol=1e-12, atol=0)
    single = penalty.value(torch.tensor([1e-30, 3e38]))
    assert_close(single, torch.tensor([1e-30, math.log(3e38) + limit]), rtol=1e-6, atol=0)


def test_the_bend_of_variational_dropout_is_at_least_minus_0_22_at_2_41():
    w = torch.linspace(0.01, 8, 4000, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(VariationalDropout().total(w), w, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), w)
    assert float(bend.min()) == pytest.approx(-0.22, abs=0.005)
    assert float(w.detach()[bend.argmin()]) == pytest.approx(2.41, abs=0.02)


def test_the_prox_of_variational_dropout_has_the_threshold_of_one_standard_error():
    x = VariationalDropout().prox(double(0.95, 0.999, 1.001, 1.05, 1.5, 3, 10), 1.0)
    assert_close(x, double(0, 0, 0.0012, 0.0600, 0.6040, 2.4831, 9.8979), rtol=0, atol=5e-5)


def test_the_published_fit_is_off_by_0_0094():
    eta = torch.logspace(-6, 6, 20001, dtype=torch.float64)
    off = (MolchanovFit().dual(eta) - VariationalDropout().dual(eta)).abs() / 2
    assert float(off.max()) == pytest.approx(0.0094, abs=5e-5)
    assert float(eta[off.argmax()]) == pytest.approx(33, abs=1)
    value_off = (MolchanovFit().value(eta) - VariationalDropout().value(eta)).abs().max()
    assert float(value_off) == pytest.approx(0.0094, abs=5e-5)
    kl = MolchanovFit().dual(double(0.01, 1, 10, 300)) / 2
    assert_close(kl, double(0.005079, 0.431239, 1.723453, 3.488458), rtol=0, atol=5e-7)


def test_scalar_ard_is_no_stand_in_for_variational_dropout():
    w = torch.logspace(-3, 2, 2001, dtype=torch.float64)
    off = (ARD(1.0).value(w) - VariationalDropout().value(w)).abs()
    assert float(off.max()) == pytest.approx(0.635, abs=5e-4) and int(off.argmax()) == 2000


def test_logsum_comes_as_near_to_variational_dropout_as_the_notes_say():
    """On [0, 5], matched at 0.01: 1.914 log(1 + w / 1.515) within 0.067, 2 log(w + 2) only within 0.32."""
    w = torch.linspace(0, 5, 5001, dtype=torch.float64)
    exact = VariationalDropout().value(w)
    for factor, eps, expected in ((1.914, 1.515, 0.067), (2.0, 2.0, 0.32)):
        off = factor * LogSum(eps).value(w) - exact
        assert float((off - off[10]).abs().max()) == pytest.approx(expected, abs=0.005)


def test_the_duals_of_the_logarithms_have_the_signs_of_the_notes():
    assert_close(
        Log2Sum(1.0).dual(double(0.8, 2, 5)), double(0.190007, 1.272589, 2.805170), rtol=0, atol=5e-7
    )
    assert_close(LogSum(2.0).dual(double(0.1, 1, 5)), double(0.02440, 0.20488, 0.66995), rtol=0, atol=5e-6)


def test_the_slope_of_logsum_is_that_of_the_notes_table():
    w = double(1e-4, 1e-3, 1e-2, 0.1, 0.5, 1, 3)
    expected = double(0.49998, 0.49975, 0.49751, 0.47619, 0.4, 0.33333, 0.2)
    assert_close(LogSum(2.0).gradient(w), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    ("eps", "step", "jump", "first"),
    [(0.1, 0.05, 0.3744, 0.2163), (1.0, 0.2, 0.2, 0.0), (0.3, 0.5, 1.2099, 0.7194)],
)
def test_the_prox_of_logsum_jumps_where_the_notes_say(eps: float, step: float, jump: float, first: float):
    threshold = logsum_threshold(step, eps)
    assert threshold == pytest.approx(jump, abs=2e-4)
    assert 2 * math.sqrt(step) - eps <= threshold <= step / eps or step <= eps**2
    below, above = LogSum(eps).prox(double(threshold * (1 - 1e-9), threshold * (1 + 1e-9)), step)
    assert below == 0 and float(above) == pytest.approx(first, abs=2e-4)


def test_a_small_step_of_logsum_shrinks_by_the_slope_in_single_precision():
    """What (|z| - eps + sqrt(q)) / 2 would lose to cancellation."""
    w = torch.tensor([1e-4, -1e-4])
    assert_close(LogSum(2.0).prox(w, 1e-8), w - w.sign() * 5e-9, rtol=1e-6, atol=0)


@pytest.mark.parametrize("c", [0.5, 0.1, 2.0])
def test_hard_concrete_is_the_minimum_over_locations(c: float):
    log_a = torch.linspace(-14, 12, 40001, dtype=torch.float64)
    opened, first, second = gate_moments(log_a)
    spread = second / first**2 - 1
    w = torch.linspace(0.05, 2, 14, dtype=torch.float64)
    best = (w[:, None] ** 2 * spread / 2 + c * opened).amin(1).clamp(max=c)
    assert_close(HardConcrete(c).value(w), best, rtol=0, atol=1e-6)


def test_the_moments_of_a_gate_are_those_of_the_notes_and_of_draws():
    opened, first, second = gate_moments(double(0.0))
    assert (float(opened), float(first), float(second)) == pytest.approx((0.831822, 0.5, 0.398018), abs=5e-7)
    generator = torch.Generator().manual_seed(0)
    count = 400_000
    u = torch.rand(count, dtype=torch.float64, generator=generator)
    for log_a in (-1.5, 0.0, 2.0):
        gate = (torch.sigmoid((u.logit() + log_a) / TEMPERATURE) * (HIGH - LOW) + LOW).clamp(0, 1)
        for draws, expected in zip(
            ((gate > 0).double(), gate, gate**2), gate_moments(double(log_a)), strict=True
        ):
            error = 5 * float(draws.std()) / math.sqrt(count)
            assert float(draws.mean()) == pytest.approx(float(expected), abs=error)


def test_hard_concrete_has_the_facts_of_the_notes():
    penalty = HardConcrete(0.5)
    assert float(penalty.gradient(double(1e-9))) == pytest.approx(math.sqrt(2.1762), abs=2e-5)
    assert penalty.flat == pytest.approx(0.534, abs=2e-3)
    assert float(penalty.eta(double(0.534))) == pytest.approx(2.281, abs=2e-3)
    assert penalty.value(double(penalty.flat, 3.0)).tolist() == [0.5, 0.5]
    w = torch.linspace(0, 1, 1001, dtype=torch.float64)
    gap = penalty.value(w) - math.sqrt(2) * MCP(0.5, math.sqrt(2)).value(w)
    assert float(gap.max()) == pytest.approx(0.032, abs=5e-4) and float(gap.min()) >= -1e-15


@pytest.mark.parametrize("c", [0.5, 1.0, 0.1])
def test_hard_concrete_scales_and_its_unit_prox_is_that_of_l0(c: float):
    w = double(0.3, 0.01, 1.2)
    scaled = 2 * c * HardConcrete(0.5).value(w / math.sqrt(2 * c))
    assert_close(HardConcrete(c).value(w), scaled, rtol=1e-13, atol=0)
    z = torch.linspace(0, 4, 801, dtype=torch.float64)
    hard = torch.where(z > math.sqrt(2 * c), z, 0.0)
    assert torch.equal(HardConcrete(c).prox(z, 1.0), hard)
    # and that by search, which the closed form does not use
    assert_close(HardConcrete(c).prox(z, torch.ones_like(z)), hard, rtol=0, atol=1e-12)


def test_thresholds_are_the_textbook_ones():
    w = double(-3.0, -1.0, -0.4, 0.0, 0.4, 1.0, 3.0)
    assert_close(LpNorm(1.0).prox(w, 0.5), double(-2.5, -0.5, 0, 0, 0, 0.5, 2.5), rtol=0, atol=1e-15)
    assert_close(MCP(2.0, 1.0).prox(w, 0.5)[-2:], double(0.5 / 0.75, 3.0), rtol=1e-15, atol=0)
    assert_close(SCAD(3.7, 1.0).prox(double(1.2, 2.6, 4.0), 1.0), double(0.2, (2.7 * 2.6 - 3.7) / 1.7, 4.0))
    assert_close(Ridge(2.0).prox(w, 1.0), w / 1.5)
    # step >= a l: hard at the root of step a l
    assert torch.equal(MCP(2.0, 1.0).prox(double(2.82, 2.84), 4.0), double(0, 2.84))


@pytest.mark.parametrize("p", [0.3, 0.5, 0.9, 1.2, 1.7])
def test_the_prox_of_powers_solves_its_equation(p: float):
    w = torch.logspace(-4, 3, 200, dtype=torch.float64)
    for step in (1e-3, 1.0, 20.0):
        x = LpNorm(p).prox(w, step)
        kept = x > 0
        assert_close((x + step * x ** (p - 1))[kept], w[kept], rtol=1e-12, atol=0)
        assert bool(kept.all()) == (p > 1)


def test_standout_keeps_by_its_sigmoid_and_saturates():
    penalty = Standout(kappa=3.0, beta=-1.0)
    w = torch.linspace(-3, 3, 31, dtype=torch.float64)
    assert_close(penalty.survival_rate(w, 1.0), torch.sigmoid(3 * w.abs() - 1), rtol=1e-14, atol=0)
    assert float(penalty.value(double(1e3))) == pytest.approx(math.e / 9, rel=1e-15)
    assert float(penalty.value(double(1e-8)) / 1e-16) == pytest.approx(math.e / 2, rel=1e-7)
    assert penalty.dual(double(math.exp(-1) * 0.99)).tolist() == [0.0]


def test_targeted_weights_keep_their_rate():
    penalty = TargetedThreshold(0.7, survival_rate=0.3)
    rates = penalty.survival_rate(double(0.0, 0.69, 0.7, 5), 1.0)
    assert_close(rates, double(0.3, 0.3, 1, 1), rtol=1e-15, atol=0)
    everything = TargetedThreshold(0.7, survival_rate=1.0)
    assert everything.value(double(0.1, 3)).tolist() == [0, 0]
    assert everything.survival_rate(double(0.1), 1.0).tolist() == [1]


@pytest.mark.parametrize(
    "make",
    [
        lambda: LogSum(0.0),
        lambda: Log2Sum(-1.0),
        lambda: MCP(0.0, 1.0),
        lambda: MCP(1.0, math.inf),
        lambda: SCAD(2.0, 1.0),
        lambda: SCAD(3.7, 0.0),
        lambda: LpNorm(2.0),
        lambda: LpNorm(0.0),
        lambda: Standout(kappa=0.0),
        lambda: Standout(beta=math.nan),
        lambda: HardConcrete(0.0),
        lambda: ARD(math.nan),
        lambda: Ridge(0.0),
        lambda: TargetedThreshold(0.0, survival_rate=0.5),
        lambda: LogSum(True),
    ],
)
def test_parameters_out_of_range_are_refused(make):
    with pytest.raises(
        UsageError, match=r"must be (a finite number above 0|above 2|in \(0, 2\)|a finite number)"
    ):
        make()


def test_a_targeted_rate_out_of_range_is_refused():
    with pytest.raises(RateError, match=r"survival_rate must be in \(0, 1\], got 0"):
        TargetedThreshold(1.0, survival_rate=0.0)

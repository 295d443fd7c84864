"""The penalty of stochastic depth against its enumeration over all masks."""

import math

import depth_nets
import pytest
import torch
from depth_nets import LENGTH, LOSSES, RATES, data, every_mask, every_output, exact, fitted, losses_of
from torch.nn import functional as F

import fallow
from fallow.errors import UsageError
from fallow.explaining import _estimate
from fallow.explaining._control import Control
from fallow.explaining._estimate import jackknife
from fallow.explaining._noise import Noise
from fallow.explaining._outputs import OutputLoss
from fallow.explaining.depth import explain

P = list(RATES.values())
EACH = pytest.mark.parametrize(
    ("kind", "scale"), [(k, s) for k in ("cross_entropy", "quadratic") for s in ("eval", "train")]
)


def explained(kind: str, scale: str = "eval", rates=RATES, **options):
    net, batch = fitted(kind), data(kind)
    return explain(net, LOSSES[kind], [batch], rates=rates, scale=scale, **options)


def drawn_gates(noise: Noise, draw: int, rows: int) -> torch.Tensor:
    """Gates (rows, L) of one of the library's draws."""
    masks = noise.draw(draw, 0, rows)
    kept = [torch.as_tensor(masks[name]).double().expand(rows) for name in RATES]
    return torch.stack([k * noise.on(name) for k, name in zip(kept, RATES, strict=True)], -1)


# --- the identity -----------------------------------------------------------------------------------------


@EACH
def test_the_penalty_is_the_mean_divergence_from_the_mean_output_for_every_loss(kind, scale):
    """D1: E loss(Y) - loss(E Y) = E D(Y, E Y), a label-free KL or the trace of the covariance."""
    net, (x, target) = fitted(kind), data(kind)
    outputs, chance = every_output(net, x, P, scale)
    mean = torch.einsum("m,mro->ro", chance, outputs)
    r, _ = exact(kind, P, scale)
    loss = OutputLoss(LOSSES[kind], outputs[0], target, "test")
    divergence = math.fsum(float(c) * loss.bregman([y], [mean]) for c, y in zip(chance, outputs, strict=True))
    if kind == "quadratic":
        direct = torch.einsum("m,mro->ro", chance, (outputs - mean) ** 2).mean()
    else:
        pi, log = mean.softmax(-1), outputs.log_softmax(-1)
        kl = (pi * (mean.log_softmax(-1) - log)).sum(-1).mean(-1)
        direct = (chance * kl).sum()
    assert divergence == pytest.approx(r, rel=0, abs=1e-12)
    assert float(direct) == pytest.approx(r, rel=0, abs=1e-12)
    assert r > 1e-3


# --- Monte Carlo ------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("mode", ["row", "batch"])
def test_the_regulariser_agrees_with_the_enumeration_of_all_masks(kind, scale, mode):
    r, noisy = exact(kind, P, scale)
    found = explained(kind, scale, mode=mode, draws=200, site_draws=0, label_draws=0).totals
    assert abs(found.regulariser - r) < 4 * found.regulariser_error
    assert abs(found.loss_noisy - noisy) < 4 * found.loss_noisy_error
    assert found.regulariser_error < 0.4 * r  # or the first line says nothing


@EACH
def test_the_other_losses_are_those_of_the_networks_they_name(kind, scale):
    net, (x, target) = fitted(kind), data(kind)
    found = explained(kind, scale, draws=8, site_draws=0, label_draws=0)
    noise, loss = Noise(RATES, scale, "row", 0), LOSSES[kind]
    with torch.no_grad():
        one, p = torch.ones(LENGTH).double(), torch.tensor(P, dtype=torch.float64)
        outputs = torch.stack([net.gated(x, drawn_gates(noise, k, len(x))) for k in range(8)])
        assert found.totals.loss_full == pytest.approx(float(loss(net.gated(x, one), target)), rel=1e-12)
        evaluation = net.gated(x, p if scale == "eval" else one)
        assert found.totals.loss_evaluation == pytest.approx(float(loss(evaluation, target)), rel=1e-12)
        assert found.totals.loss_mean_output == pytest.approx(float(loss(outputs.mean(0), target)), rel=1e-12)
        noisy = losses_of(kind, outputs, target).mean()
        assert found.totals.loss_noisy == pytest.approx(float(noisy), rel=1e-12)
    plug_in = found.totals.loss_noisy - found.totals.loss_mean_output
    assert found.totals.plug_in == pytest.approx(plug_in, abs=1e-13)


def repeated(kind: str, draws: int, times: int) -> torch.Tensor:
    """Estimates, plug-ins and errors (times, 3) from independent draws of the enumerated outputs."""
    net, (x, target) = fitted(kind), data(kind)
    outputs, chance = every_output(net, x, P, "eval")
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(times):
        which = torch.multinomial(chance.expand(len(x), -1), draws, replacement=True, generator=generator)
        ys = outputs[which, torch.arange(len(x))[:, None]].transpose(0, 1)
        values = losses_of(kind, ys, target).tolist()
        got = jackknife(lambda z: float(losses_of(kind, z[0][None], target)[0]), values, [[y] for y in ys])
        found.append((got.value, got.plug_in, got.error))
    return torch.tensor(found, dtype=torch.float64)


def test_two_draws_halve_the_plug_in_of_a_squared_error_and_the_correction_doubles_it():
    r, _ = exact("quadratic", P, "eval")
    both = repeated("quadratic", draws=2, times=800)
    error = both.std(0) / 800**0.5
    corrected, plug_in, _ = both.mean(0)
    assert abs(corrected - r) < 4 * error[0]
    assert abs(plug_in - r / 2) < 4 * error[1]
    assert r - plug_in > 10 * error[1]
    assert torch.allclose(both[:, 0], 2 * both[:, 1], rtol=1e-9)


def test_the_correction_is_k_over_k_minus_one_for_a_squared_error():
    both = repeated("quadratic", draws=7, times=5)
    assert torch.allclose(both[:, 0], both[:, 1] * 7 / 6, rtol=1e-9)


def test_the_jackknife_takes_most_of_the_bias_from_a_cross_entropy():
    r, _ = exact("cross_entropy", P, "eval")
    both = repeated("cross_entropy", draws=4, times=800)
    error = both.std(0) / 800**0.5
    corrected, plug_in, _ = both.mean(0)
    assert r - plug_in > 8 * error[1]
    assert abs(corrected - r) < 0.35 * (r - plug_in)


def test_the_standard_error_is_that_of_the_estimates():
    both = repeated("quadratic", draws=16, times=300)
    assert float(both[:, 2].mean() / both[:, 0].std()) == pytest.approx(1, abs=0.2)


@EACH
def test_the_control_variate_has_mean_zero_over_all_masks(kind, scale):
    net, (x, target) = fitted(kind), data(kind)
    outputs, chance = every_output(net, x, P, scale)
    masks, _ = every_mask(P)
    loss = OutputLoss(LOSSES[kind], outputs[-1], target, "test")
    pairs = {}
    for i, name in enumerate(RATES):
        gates = torch.ones(2, LENGTH).double()
        gates[:, i] = torch.tensor([1 / P[i] if scale == "train" else 1.0, 0.0])
        with torch.no_grad():
            pairs[name] = tuple([net.gated(x, g)] for g in gates)
    control = Control(loss, Noise(RATES, scale, "batch", 0), pairs, [0])
    found = [control({n: bool(m) for n, m in zip(RATES, mask, strict=True)}) for mask in masks]
    assert max(map(abs, found)) > 1e-3
    assert math.fsum(c * v for c, v in zip(chance.tolist(), found, strict=True)) == pytest.approx(
        0, abs=1e-12
    )
    whole = control({n: torch.ones(len(x), dtype=torch.bool) for n in RATES})
    assert whole == pytest.approx(found[-1], rel=1e-9)


def test_near_rates_of_one_the_control_variate_takes_most_of_the_variance():
    rates = dict.fromkeys(RATES, 0.99)
    r, _ = exact("quadratic", [0.99] * LENGTH, "eval")
    found = [
        explained("quadratic", "eval", rates, draws=40, site_draws=0, label_draws=0, seed=s).totals
        for s in range(8)
    ]
    plain = torch.tensor([t.plug_in * 40 / 39 - r for t in found])
    assert torch.tensor([t.regulariser - r for t in found]).norm() < 0.3 * plain.norm()


def test_draws_that_do_not_fit_are_kept_as_means_of_groups(monkeypatch):
    r, _ = exact("quadratic", P, "eval")
    monkeypatch.setattr(_estimate, "_KEPT_BYTES", 10 * 24 * 2 * 8)
    assert _estimate.groups(200, [torch.zeros(24, 2).double()]) == 10
    found = explained("quadratic", draws=200, site_draws=0, label_draws=0).totals
    assert abs(found.regulariser - r) < 4 * found.regulariser_error
    monkeypatch.undo()
    whole = explained("quadratic", draws=200, site_draws=0, label_draws=0).totals
    assert found.plug_in == pytest.approx(whole.plug_in, rel=1e-9)
    assert found.regulariser != whole.regulariser


def test_outputs_too_large_to_keep_are_refused(monkeypatch):
    monkeypatch.setattr(_estimate, "_KEPT_BYTES", 2 * 24 * 2 * 8)
    with pytest.raises(UsageError, match="pass smaller batches"):
        explained("quadratic")


# --- the forms of single sites ----------------------------------------------------------------------------


def test_the_gate_variances_are_those_of_the_scale():
    for scale, of in (("eval", lambda p: p * (1 - p)), ("train", lambda p: (1 - p) / p)):
        found = explained("quadratic", scale, draws=4, site_draws=0, label_draws=0)
        assert [row.noise for row in found.rows] == pytest.approx([of(p) for p in P])
        assert found.totals.noise == pytest.approx(sum(of(p) for p in P))
        assert found.totals.noise_mass == pytest.approx(sum(p * (1 - p) for p in P))


@EACH
def test_hessian_bregman_and_alone_are_what_their_formulas_say(kind, scale):
    net, (x, target) = fitted(kind), data(kind)
    found = explained(kind, scale, draws=8, site_draws=0, label_draws=0)
    noise = Noise(RATES, scale, "row", 0)
    with torch.no_grad():
        mean = torch.stack([net.gated(x, drawn_gates(noise, k, len(x))) for k in range(8)]).mean(0)
        full = net.gated(x, torch.ones(LENGTH).double())
        pi, at = mean.softmax(-1), full.log_softmax(-1)
        for i, (row, p) in enumerate(zip(found.rows, P, strict=True)):
            gates = torch.ones(LENGTH).double()
            gates[i] = 0
            off = net.gated(x, gates)
            gates[i] = 1 / p if scale == "train" else 1
            on, zeta = net.gated(x, gates), full - off
            if kind == "quadratic":
                hessian = bregman = (zeta**2).mean()
            else:
                hessian = ((pi * zeta**2).sum(-1) - (pi * zeta).sum(-1) ** 2).mean() / 2
                bregman = F.kl_div(off.log_softmax(-1), at, reduction="batchmean", log_target=True)
            pair = losses_of(kind, torch.stack([on, off, p * on + (1 - p) * off]), target)
            assert row.hessian == pytest.approx(float(row.noise * hessian), rel=1e-8, abs=1e-15)
            assert row.bregman == pytest.approx(float(row.noise * bregman), rel=1e-8, abs=1e-15)
            assert row.alone == pytest.approx(float(p * pair[0] + (1 - p) * pair[1] - pair[2]), abs=1e-13)


@EACH
@pytest.mark.parametrize("mode", ["row", "batch"])
def test_monte_carlo_of_a_site_pairs_it_on_and_off_under_the_same_others(kind, scale, mode):
    net, (x, target) = fitted(kind), data(kind)
    found = explained(kind, scale, mode=mode, draws=6, site_draws=3, label_draws=0)
    noise = Noise(RATES, scale, mode, 0)
    for i, (row, p) in enumerate(zip(found.rows, P, strict=True)):
        values = []
        for k in range(3):
            gates = drawn_gates(noise, k, len(x)).clone()
            gates[..., i] = noise.on(row.name)
            with torch.no_grad():
                on = net.gated(x, gates)
                gates[..., i] = 0
                off = net.gated(x, gates)
            pair = losses_of(kind, torch.stack([on, off, p * on + (1 - p) * off]), target)
            values.append(float(p * pair[0] + (1 - p) * pair[1] - pair[2]))
        expected = torch.tensor(values, dtype=torch.float64)
        assert row.monte_carlo == pytest.approx(float(expected.mean()), abs=1e-13)
        assert row.monte_carlo_error == pytest.approx(float(expected.std() / 3**0.5), abs=1e-13)


@EACH
def test_monte_carlo_of_a_site_agrees_with_the_enumeration_of_the_others(kind, scale):
    net, (x, target) = fitted(kind), data(kind)
    found = explained(kind, scale, draws=40, site_draws=40, label_draws=0)
    outputs, chance = every_output(net, x, P, scale)
    total = 0.0
    for i, (row, p) in enumerate(zip(found.rows, P, strict=True)):
        shape = (2**i, 2, -1)
        pairs = outputs.reshape(*shape, *outputs.shape[1:])
        off, on = pairs[:, 0].flatten(0, 1), pairs[:, 1].flatten(0, 1)
        others = chance.reshape(shape).sum(1).flatten()
        gap = p * losses_of(kind, on, target) + (1 - p) * losses_of(kind, off, target)
        gap = gap - losses_of(kind, p * on + (1 - p) * off, target)
        expected = float((others * gap).sum())
        total += expected
        assert abs(row.monte_carlo - expected) < 5 * row.monte_carlo_error
    assert abs(found.totals.sums["monte_carlo"] - total) < 5 * found.totals.sum_error
    if kind == "quadratic":
        assert total > exact(kind, P, scale)[0]  # Efron and Stein


# --- orders -----------------------------------------------------------------------------------------------


def order(kind: str, scale: str, form: str, *points: float) -> float:
    """The slope of log |sum - R| over log (1 - p), from the first point to the last."""
    errors = []
    for p in points:
        rates = dict.fromkeys(RATES, p)
        found = explained(kind, scale, rates, draws=2, site_draws=0, label_draws=0)
        r, _ = exact(kind, [p] * LENGTH, scale)
        errors.append(abs(found.totals.sums[form] - r))
    return math.log(errors[-1] / errors[0]) / math.log((1 - points[-1]) / (1 - points[0]))


@pytest.mark.parametrize("scale", ["eval", "train"])
def test_the_leave_one_out_form_is_of_order_two_for_a_squared_error(scale):
    assert order("quadratic", scale, "hessian", 0.995, 0.99, 0.98) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("scale", ["eval", "train"])
def test_the_bregman_form_is_of_order_two_for_cross_entropy(scale):
    assert order("cross_entropy", scale, "bregman", 0.9995, 0.999, 0.998) == pytest.approx(2, abs=0.2)


def test_the_hessian_form_of_a_cross_entropy_never_becomes_exact():
    """D5: its error is of the order of R itself, however near 1 the rates are."""
    assert order("cross_entropy", "eval", "hessian", 0.9995, 0.999, 0.998) == pytest.approx(1, abs=0.1)


def test_bregman_and_hessian_are_one_for_a_squared_error():
    for row in explained("quadratic", draws=2, site_draws=0, label_draws=0).rows:
        assert row.bregman == pytest.approx(row.hessian, rel=1e-9)


# --- batches, and no noise --------------------------------------------------------------------------------


def test_how_samples_are_split_into_batches_changes_nothing():
    net, (x, target) = fitted("cross_entropy"), data("cross_entropy")
    options = {"rates": RATES, "draws": 12, "site_draws": 2}
    whole = explain(net, F.cross_entropy, [(x, target)], **options)
    parts = explain(net, F.cross_entropy, [(x[:17], target[:17]), (x[17:], target[17:])], **options)
    assert parts.samples == whole.samples == 24
    assert parts.totals.regulariser == pytest.approx(whole.totals.regulariser, rel=1e-9)
    for a, b in zip(whole.rows, parts.rows, strict=True):
        for form in ("bregman", "alone", "linearised", "monte_carlo", "hessian"):
            assert getattr(a, form) == pytest.approx(getattr(b, form), rel=1e-8, abs=1e-14), form


def test_the_seed_decides_and_nothing_else_does():
    first, again = explained("quadratic", draws=4), explained("quadratic", draws=4)
    assert first.as_dict() == again.as_dict()
    assert explained("quadratic", draws=4, seed=1).totals.regulariser != first.totals.regulariser


@pytest.mark.parametrize("scale", ["eval", "train"])
def test_without_noise_there_is_no_penalty(scale):
    found = explained("cross_entropy", scale, fallow.rates.uniform(1.0))
    assert found.totals.regulariser == found.totals.regulariser_error == 0
    assert found.totals.loss_noisy == found.totals.loss_full == found.totals.loss_evaluation
    assert all(v == 0 for v in found.totals.sums.values())
    assert all(r.bregman == r.alone == r.monte_carlo == r.linearised == r.noise == 0 for r in found.rows)
    assert len(found.rows) == LENGTH
    assert "no penalty" in str(found)


def test_a_site_that_never_rests_among_others_has_no_penalty():
    rates = {**RATES, "blocks.2": 1.0}
    found = explained("quadratic", rates=rates, draws=4)
    row = found.rows[2]
    assert (row.noise, row.hessian, row.alone, row.monte_carlo) == (0, 0, 0, 0)
    assert found.rows[1].hessian > 0
    assert depth_nets.exact("quadratic", list(rates.values()), "eval")[0] > 0

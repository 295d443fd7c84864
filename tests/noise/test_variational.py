"""Variational dropout: activations and weights sampled alike, divergences, the cut, the dual penalty."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from fallow import penalties
from fallow.errors import FallowError, UsageError
from fallow.noise import VariationalNoise, molchanov_kl, variational_

FORMS = ["additive", "multiplicative"]
# 1 / alpha, and by it the exact divergence (hypergeometric form) and the fit: notes, 6(a).
RATIOS = [0.01, 1.0, 10.0, 300.0]
EXACT = [0.00499168, 0.42668560, 1.72413785, 3.48539757]
FIT = [0.005079, 0.431239, 1.723453, 3.488458]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def alphas(layer: nn.Module, value: Tensor | float, form: str) -> None:
    """Give the weights of a layer these alphas."""
    log = torch.as_tensor(value, dtype=torch.float64).log().expand(layer.weight.shape)
    with torch.no_grad():
        if form == "additive":
            layer.weight_log_variance.copy_(log + (layer.weight.square() + 1e-8).log())
        else:
            layer.weight_log_alpha.copy_(log)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor, Callable[..., Tensor]]] = {
    "linear": (lambda: nn.Linear(5, 3), torch.randn(2, 4, 5, generator=generator(1)).double(), linear),
    "convolution": (
        lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        torch.randn(2, 4, 5, 5, generator=generator(1)).double(),
        lambda x, w: conv2d(x, w, stride=2, padding=1, groups=2),
    ),
    "circular": (
        lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular", bias=False),
        torch.randn(2, 2, 4, 4, generator=generator(1)).double(),
        lambda x, w: conv2d(nn.functional.pad(x, (1, 1, 1, 1), mode="circular"), w),
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sample", ["activations", "weights"])
@pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS)
def test_activations_have_the_mean_and_variance_of_random_weights(case: Any, sample: str, form: str) -> None:
    make, x, plain = case
    layer = make().double()
    expected = layer(x).detach()
    variational_(layer, form=form, sample=sample, generator=generator(2))
    rates = 0.1 + torch.rand(layer.weight.shape, generator=generator(3)).double()
    alphas(layer, rates, form)
    size = layer.weight.square() + (1e-8 if form == "additive" else 0)
    variance = plain(x.square(), (rates * size)).detach()
    count = 1500
    with torch.no_grad():
        found = torch.stack([layer(x) for _ in range(count)]) - expected
    assert bool((found.mean(0).abs() < 5 * (variance / count).sqrt()).all())
    squares = found.square()  # of a normal number: twice the squared variance
    assert bool(((squares.mean(0) - variance).abs() < 5 * variance * (2 / count) ** 0.5).all())


@pytest.mark.parametrize("sample", ["activations", "weights"])
def test_rows_have_noise_of_their_own_where_activations_are_sampled(sample: str) -> None:
    layer = nn.Linear(4, 3)
    variational_(layer, sample=sample, form="multiplicative", start=0.0)
    out = layer(torch.ones(2, 4))
    assert torch.equal(out[0], out[1]) == (sample == "weights")
    assert not torch.equal(out, layer(torch.ones(2, 4)))


def test_the_additive_form_keeps_its_noise_out_of_the_weights_gradient() -> None:
    grads = {}
    for sample in ("activations", "weights"):
        layer = nn.Linear(5, 3).double()
        x = torch.randn(7, 5, dtype=torch.float64)
        (plain,) = torch.autograd.grad(layer(x).sum(), layer.weight)
        variational_(layer, sample=sample, start=-4.0)
        found, grads[sample] = torch.autograd.grad(layer(x).sum(), (layer.weight, layer.weight_log_variance))
        torch.testing.assert_close(found, plain)
    assert all(bool(grad.any()) for grad in grads.values())


def test_gradients_reach_weights_and_variances_through_sampled_activations() -> None:
    layer = nn.Conv1d(2, 3, 2).double()
    x = torch.randn(2, 2, 4, dtype=torch.float64)
    for form in FORMS:
        noise = generator(0)
        handle = variational_(layer, form=form, start=-2.0, generator=noise)

        def output(*_: Tensor) -> Tensor:
            noise.manual_seed(3)  # noqa: B023
            return layer(x)

        assert torch.autograd.gradcheck(output, tuple(layer.parameters()))
        handle.remove()


# --- divergence ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_divergences_are_those_of_the_notes(form: str) -> None:
    layer = nn.Linear(1, 1).double()
    handle = variational_(layer, form=form)
    for ratio, exact, fit in zip(RATIOS, EXACT, FIT, strict=True):
        alphas(layer, 1 / ratio, form)
        assert abs(float(handle.kl().detach()) - exact) < 1e-8
        assert abs(float(handle.kl("fit").detach()) - fit) < 1e-6
        doubled = handle.kl(lambda r: 2 * r)
        assert abs(float(doubled.detach()) - 2 * ratio) < 1e-9


def test_divergences_sum_over_all_weights_of_a_model_but_count_shared_layers_once() -> None:
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.Conv1d(2, 3, 2), layer)
    handle = variational_(model, form="multiplicative", start=0.0)
    assert handle.names == ["0.weight", "1.weight"] and len(list(handle.parameters())) == 2
    torch.testing.assert_close(handle.kl().detach(), torch.tensor(EXACT[1] * (9 + 12)))


@pytest.mark.parametrize("divergence", ["exact", "fit"])
@pytest.mark.parametrize("form", FORMS)
def test_the_divergence_has_its_gradient(form: str, divergence: str) -> None:
    layer = nn.Linear(3, 2, bias=False).double()
    handle = variational_(layer, form=form)
    alphas(layer, torch.tensor([[0.1, 1.0, 7.0], [0.01, 3.0, 20.0]]), form)
    assert torch.autograd.gradcheck(lambda *_: handle.kl(divergence), tuple(layer.parameters()))


def test_the_fit_is_0_at_infinity_and_nowhere_far_from_the_exact_divergence() -> None:
    log_alpha = torch.linspace(-8, 8, 400, dtype=torch.float64)
    gap = (molchanov_kl(log_alpha) - penalties.variational_kl((-log_alpha).exp())).abs()
    assert 0.009 < float(gap.max()) < 0.0095  # notes, 2.1: 0.0094 near r = 33
    assert abs(float((-log_alpha[gap.argmax()]).exp()) - 33) < 5
    assert float(molchanov_kl(torch.tensor(200.0))) == 0


def test_with_the_best_alpha_the_bound_is_the_dual_penalty() -> None:
    """Equation (7): curvature 1, one sample; the penalty is the other side's own computation."""
    w = torch.tensor([0.3, 1.0, 2.41, 5.0], dtype=torch.float64)
    layer = nn.Linear(4, 1, bias=False).double()
    layer.weight.data = w.unsqueeze(0).clone()
    handle = variational_(layer, form="multiplicative", start=0.0, clip=20.0)
    logs = layer.weight_log_alpha
    optimiser = torch.optim.LBFGS([logs], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-15)

    def bound() -> Tensor:
        optimiser.zero_grad()
        found = (logs.exp() * layer.weight.detach().square() / 2).sum() + handle.kl()
        found.backward()
        return found

    optimiser.step(bound)
    expected = penalties.VariationalDropout().value(w).sum()
    torch.testing.assert_close(bound().detach(), expected, rtol=0, atol=1e-9)
    rates = penalties.VariationalDropout().survival_rate(w, 1.0)
    torch.testing.assert_close(handle.survival_rates()["weight"][0], rates, rtol=0, atol=1e-4)


# --- evaluation and the way back ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_evaluation_has_no_noise_and_zeros_below_the_cut(form: str) -> None:
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 4.0]]))
    handle = variational_(layer, form=form)
    alphas(layer, torch.tensor([[math.exp(2.94), math.exp(2.95)]]), form)  # around 2.944
    x = torch.tensor([[1.0, 100.0]])
    layer.eval()
    assert torch.equal(layer(x) - layer.bias, torch.tensor([[3.0]]))
    assert handle.masks()["weight"].tolist() == [[True, False]]
    assert torch.equal(handle.plain_state_dict()["weight"], torch.tensor([[3.0, 0.0]]))
    handle.cut = 0.0
    assert torch.equal(layer(x), linear(x, layer.weight, layer.bias))
    handle.cut = 0.05
    handle.harden()
    assert layer.weight.tolist() == [[3.0, 0.0]] and list(layer.state_dict()) == ["weight", "bias"]
    assert VariationalNoise.of(layer) is None


@pytest.mark.parametrize("form", FORMS)
def test_alpha_is_clipped_alike_in_divergence_and_noise(form: str) -> None:
    layer = nn.Linear(1, 1, bias=False).double()
    handle = variational_(layer, form=form, clip=2.0, sample="weights", generator=generator())
    alphas(layer, 1e9, form)
    assert float(handle.log_alpha()["weight"]) == 2.0
    torch.testing.assert_close(
        handle.survival_rates()["weight"], torch.sigmoid(torch.full((1, 1), -2.0)).double()
    )
    with torch.no_grad():
        e = torch.stack([layer(torch.ones(1, 1).double()) for _ in range(4000)]) / layer.weight - 1
    assert abs(float(e.square().mean()) / math.exp(2) - 1) < 5 * (2 / 4000) ** 0.5


def test_noise_on_the_weights_alone_is_for_any_module() -> None:
    module = nn.LSTM(3, 4)
    handle = variational_(module, names=("weight_hh_l0",), sample="weights", start=0.0)
    assert handle.names == ["weight_hh_l0"]
    x = torch.randn(5, 2, 3)
    assert not torch.equal(module(x)[0], module(x)[0])
    module.eval()
    assert torch.equal(module(x)[0], module(x)[0])


def test_training_drives_out_weights_that_do_not_matter() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 6)
    e = 0.3 * torch.randn(200, 1)
    e = e - x @ torch.linalg.lstsq(x, e).solution  # else a third of what does not matter is beyond one error
    y = 2 * x[:, :1] - 3 * x[:, 1:2] + e
    layer = nn.Linear(6, 1)
    handle = variational_(layer)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.05)
    for step in range(600):
        optimiser.param_groups[0]["lr"] = 0.05 * (1 - step / 600)  # or the last draws decide
        optimiser.zero_grad()
        bound = (layer(x) - y).square().mean() / (2 * 0.3**2) + min(step / 300, 1) * handle.kl() / 200
        bound.backward()
        optimiser.step()
    assert handle.masks()["weight"][0, :2].tolist() == [True, True]
    assert float(handle.survival_rates()["weight"][0, 2:].max()) < 0.5
    assert float(handle.survival_rates()["weight"][0, :2].min()) > 0.99


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: variational_(nn.Linear(3, 4), form="both"), UsageError, "form must be"),
        (lambda: variational_(nn.Linear(3, 4), sample="rows"), UsageError, "sample must be"),
        (lambda: variational_(nn.Linear(3, 4), cut=1.5), UsageError, r"cut must be in \[0, 1\]"),
        (lambda: variational_(nn.Linear(3, 4), clip=-1), UsageError, "clip must be"),
        (lambda: variational_(nn.Linear(3, 4), start=math.nan), UsageError, "start must be"),
        (
            lambda: variational_(nn.ConvTranspose1d(3, 4, 2)),
            UsageError,
            'ConvTranspose1d; use sample="weights"',
        ),
        (
            lambda: variational_(nn.Linear(3, 4), names=("weight", "bias")),
            UsageError,
            "weight, bias of Linear",
        ),
        (lambda: variational_(nn.Linear(3, 4)).kl("series"), UsageError, "divergence must be"),
    ],
)
def test_wrong_use_is_refused_in_words(call: Callable[[], Any], error: type[FallowError], words: str) -> None:
    with pytest.raises(error, match=words):
        call()

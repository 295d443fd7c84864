"""What is learned beside weights, in one pass: as torch's operations in double precision, edge for edge."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from fallow import kernels
from fallow.noise import variational_
from fallow.noise._learned import Learned, molchanov_kl
from fallow.penalties import LogSum
from fallow.sparsity import sparsify
from fallow.sparsity.totals import eta_sum, eta_total, eta_total_of

pytestmark = pytest.mark.skipif(not kernels.available(), reason=kernels.available().reason)

COUNTS = [1, 31, 33, 2**11 + 5, 10007]
Made = Callable[..., Any]
# torch's first dual number scripts its decompositions
FORWARD = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")


def numbers(count: int, additive: bool, clip: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of all sizes, some 0; log alpha within, beyond and, where it is learned, at the clip; draws.

    The draws have the signs with which nothing cancels: what is left is rounding.
    """
    g = torch.Generator().manual_seed(count)
    w = torch.randn(count, generator=g) * 10 ** (-6 * torch.rand(count, generator=g))
    w[::7] = 0
    alpha = 0.9 * clip * (2 * torch.rand(count, generator=g) - 1)
    alpha[2::5] += 2 * clip + 1
    alpha[4::5] -= 2 * clip + 1
    e = torch.randn(count, generator=g).abs()
    if additive:
        alpha += 0.5 * (clip == 0)  # whether it is at the edge is a matter of rounding
        log = alpha + (w.square() + 1e-8).log()
        log[3::35] *= 100  # beyond what exp takes
        return log, w, e.copysign(w)
    alpha[::5] = clip
    alpha[1::5] = -clip
    return alpha, w, e


def same(made: Made, plain: Made, tensors: tuple[Tensor, ...], kind: str, lost: float = 0.0) -> None:
    """Value and all gradients, for the same gradient from above; `lost` where two numbers of 1 cancel."""
    single = [t.clone().requires_grad_() for t in tensors]
    double = [t.double().requires_grad_() for t in tensors]
    value, exact = made(*single), plain(*double)
    assert kind in type(value.grad_fn).__name__
    torch.testing.assert_close(value.double(), exact, rtol=3e-6, atol=1e-30)
    above = torch.randn(value.shape, generator=torch.Generator().manual_seed(5))
    found = torch.autograd.grad(value, single, above, allow_unused=True)
    expected = torch.autograd.grad(exact, double, above.double(), materialize_grads=True)
    for a, b in zip(found, expected, strict=True):
        a = torch.zeros_like(b) if a is None else a.double()
        # what cancels in double precision is 0 here
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-12 * float(b.abs().max()) + lost)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("clip", [0.0, 3.0, 8.0, 40.0])
@pytest.mark.parametrize("additive", [True, False])
def test_variances_draws_and_divergences_are_those_of_torch(count: int, clip: float, additive: bool) -> None:
    law = Learned(additive, clip, worth=True)
    log, w, e = numbers(count, additive, clip)
    same(law.variance, lambda log, w: law.plain(log, w, None), (log, w), "_Disturbed")
    same(
        lambda log, w: law.draw(log, w, e),
        lambda log, w: law.plain(log, w, e.double()),
        (log, w),
        "_Disturbed",
    )
    for exact in (True, False):
        same(
            lambda log, w, exact=exact: law.divergence(exact, [(log, w), (2 * log, -w)]),
            lambda log, w, exact=exact: law._plain(
                exact, *((log, w, 2 * log, -w) if additive else (log, 2 * log))
            ),
            (log, w),
            "_Sum",
        )


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("strength", [1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("eps", [1e-3, 2.0])
def test_the_eta_trick_is_that_of_torch(count: int, strength: float, eps: float) -> None:
    _, w, logit = numbers(count, False, 1.0)
    law = LogSum(eps)
    same(
        lambda w, logit: eta_total(law, strength, [(w, logit), (w, logit + 1)]),
        lambda w, logit: 0.5 * strength * sum(eta_sum(law, strength, w, logit + i) for i in range(2)),
        (w, 4 * logit),
        "_Sum",
        lost=1e-6 * strength,
    )


# --- as parts of a training ---------------------------------------------------------------------------------


def trained(form: str, sample: str, divergence: str, steps: int = 4) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(130, 130), nn.ReLU(), nn.Linear(130, 5))
    noise = variational_(model, form=form, sample=sample, start=-2.0, clip=2.5)
    assert noise._layers()[0].law.worth
    optimiser = torch.optim.SGD(model.parameters(), 1e-3)
    x = torch.randn(16, 130)
    for _ in range(steps):
        optimiser.zero_grad()
        (model(x).square().mean() + 1e-3 * noise.kl(divergence)).backward()
        optimiser.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("sample", ["activations", "weights"])
@pytest.mark.parametrize("form", ["additive", "multiplicative"])
@pytest.mark.parametrize("divergence", ["exact", "fit"])
def test_a_training_ends_at_the_same_weights(form: str, sample: str, divergence: str) -> None:
    found = trained(form, sample, divergence)
    with kernels.plain():
        expected = trained(form, sample, divergence)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_so_does_one_of_weights_and_etas() -> None:
    ends = []
    for fast in (True, False):
        torch.manual_seed(0)
        layer = nn.Linear(130, 130)
        run = sparsify(layer, strategy=LogSum(0.1), strength=1e-3, method="eta")
        optimiser = torch.optim.SGD([*layer.parameters(), *run.parameters()], 0.1)
        for _ in range(4):
            optimiser.zero_grad()
            with contextlib.nullcontext() if fast else kernels.plain():
                loss = torch.as_tensor(run.penalty())
            assert ("_Sum" in type(loss.grad_fn).__name__) == fast
            (loss + layer.weight.square().sum()).backward()
            optimiser.step()
        ends.append([p.detach() for p in (layer.weight, *run.parameters())])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b)


def forms(additive: bool) -> list[tuple[Made, Made]]:
    """Each in one pass, and from torch's operations."""
    law, e, right = Learned(additive, 8.0, worth=True), torch.randn(12), LogSum(0.5)
    return [
        (law.variance, lambda log, w: law.plain(log, w, None)),
        (lambda log, w: law.draw(log, w, e), lambda log, w: law.plain(log, w, e)),
        *(
            (
                lambda log, w, exact=exact: law.divergence(exact, [(log, w)]),
                lambda log, w, exact=exact: law._plain(exact, *((log, w) if additive else (log,))),
            )
            for exact in (True, False)
        ),
        (
            lambda log, w: eta_total(right, 0.1, [(w, log)]),
            lambda log, w: 0.05 * eta_sum(right, 0.1, w, log),
        ),
    ]


@pytest.mark.parametrize("additive", [True, False])
def test_it_can_be_asked_and_differentiated_again(additive: bool) -> None:
    pair = (torch.randn(12) - 1).requires_grad_(), (torch.rand(12) - 1.5).requires_grad_()
    for both in forms(additive):
        results = []
        for made in both:
            value = made(*pair).square().sum()
            asked: dict[str, Any] = {"retain_graph": True, "materialize_grads": True}
            twice = [g for _ in range(2) for g in torch.autograd.grad(value, pair, **asked)]
            first = torch.autograd.grad(value, pair, create_graph=True, materialize_grads=True)
            bent = torch.stack([g.sin().sum() for g in first]).sum()
            second = torch.autograd.grad(bent, pair, materialize_grads=True)
            results.append([*twice, *first, *second])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("additive", [True, False])
def test_weights_that_were_changed_before_backward_are_refused(additive: bool) -> None:
    for made, _ in forms(additive):
        log, w = torch.randn(12, requires_grad=True), torch.randn(12, requires_grad=True)
        value = made(log, w).sum()
        with torch.no_grad():
            log += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()


@pytest.mark.parametrize("place", [0, 11])
def test_nan_shows_where_it_does_otherwise(place: int) -> None:
    for made, plain in forms(True):
        for which in range(2):
            pair = torch.randn(12), torch.randn(12)
            pair[which][place] = math.nan
            found, expected = (form(*(t.requires_grad_() for t in pair)) for form in (made, plain))
            assert torch.equal(found.isnan(), expected.isnan()) and bool(found.isnan().any())


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_checkpointing_the_gradients_are_the_same(reentrant: bool) -> None:
    grads = []
    for again in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(7, 130), nn.Linear(130, 130))  # a small layer before the first build
        variational_(model, start=-2.0)
        x = torch.randn(3, 7, requires_grad=True)
        out = checkpoint(model, x, use_reentrant=reentrant) if again else model(x)
        out.square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_small_models_frozen_weights_and_transforms_go_through_torch() -> None:
    log, w = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    assert "_Disturbed" not in type(Learned(True, 8.0).variance(log, w).grad_fn).__name__
    law = Learned(True, 8.0, worth=True)
    torch.testing.assert_close(law.variance(log, w.detach()), law.variance(log, w))
    assert law.divergence(True, [(log, w.detach())]) is None and law.divergence(False, []) is None
    slope = torch.func.grad(lambda log: law.variance(log, w).sum())(log)
    torch.testing.assert_close(slope, torch.autograd.grad(law.variance(log, w).sum(), log)[0])
    (rows,) = torch.autograd.grad(law.variance(log, w), log, torch.eye(4), is_grads_batched=True)
    torch.testing.assert_close(rows.diagonal(), slope)
    total = law.divergence(False, [(log, w)])
    assert total is not None
    (rows,) = torch.autograd.grad(total, log, torch.ones(2), is_grads_batched=True)
    torch.testing.assert_close(rows[0], rows[1])


# --- what is hard for a node of the graph -------------------------------------------------------------------


def repeated(additive: bool) -> list[tuple[Made, Made]]:
    """As `forms`, the sums of pairs that come twice, also the other way round."""
    law, right = Learned(additive, 8.0, worth=True), LogSum(0.5)

    def pairs(log: Tensor, w: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(log, w), (log, w), (w, log)]

    return [
        *forms(additive)[:2],
        *(
            (
                lambda log, w, exact=exact: law.divergence(exact, pairs(log, w)),
                lambda log, w, exact=exact: law._plain(
                    exact, *(t for pair in pairs(log, w) for t in pair[: 1 + additive])
                ),
            )
            for exact in (True, False)
        ),
        (
            lambda log, w: eta_total(right, 0.1, pairs(log, w)),
            lambda log, w: sum(0.05 * eta_sum(right, 0.1, *pair) for pair in pairs(log, w)),
        ),
    ]


@pytest.mark.parametrize("additive", [True, False])
@pytest.mark.parametrize("place", [None, 5])
def test_inputs_that_are_the_same_or_depend_on_each_other_count_once(
    additive: bool, place: int | None
) -> None:
    x = torch.randn(12, generator=torch.Generator().manual_seed(3))
    if place is not None:
        x[place] = math.nan  # the sums ask torch
    for both in repeated(additive):
        for other in (lambda x: x, lambda x: 0.5 * x, lambda x: x.sin()):
            results = []
            for made in both:
                leaf = x.clone().requires_grad_()
                value = made(leaf, other(leaf)).sum() * 1.5
                (once,) = torch.autograd.grad(value, leaf, retain_graph=True)
                (first,) = torch.autograd.grad(value, leaf, create_graph=True)
                second = torch.autograd.grad(first.square().sum(), leaf)
                results.append([g.detach()[x.isfinite()] for g in (once, first, *second)])
            for a, b in zip(*results, strict=True):
                # torch's own second derivatives by small w cancel
                torch.testing.assert_close(a, b, rtol=1e-4, atol=5e-4 * float(b.abs().max()))


def test_tied_layers_have_one_gradient() -> None:
    model = nn.Sequential(nn.Linear(130, 130), nn.Linear(130, 130))
    model[1].weight = model[0].weight
    noise, (w, *_) = variational_(model), model.parameters()
    assert "_Sum" in type(noise.kl("fit").grad_fn).__name__
    found = [torch.autograd.grad(noise.kl("fit"), w, create_graph=again)[0] for again in (False, True)]
    with kernels.plain():
        (expected,) = torch.autograd.grad(noise.kl("fit"), w)
    for gradient in found:
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@FORWARD
@pytest.mark.parametrize("additive", [True, False])
def test_forward_mode_gives_the_tangent_of_torch(additive: bool) -> None:
    law, right, e = Learned(additive, 8.0, worth=True), LogSum(0.5), torch.randn(12)
    x, tangent, w = torch.randn(12), torch.randn(12), torch.randn(12).requires_grad_()

    def fit(log: Tensor, w: Tensor) -> Tensor:
        found = law.divergence(False, [(log, w)])
        return molchanov_kl(law.log_alpha(log, w)).sum() if found is None else found

    def eta(log: Tensor, w: Tensor) -> Tensor:
        found = eta_total_of(right, 0.1, [(w.expand(2**11, 12).contiguous(), log)])
        return eta_sum(right, 0.1, w, log) if found is None else found

    for made in (law.variance, lambda log, w: law.draw(log, w, e), fit, eta):
        for swapped in (False, True):
            with forward_ad.dual_level():
                found = []
                for paused in (contextlib.nullcontext(), kernels.plain()):
                    dual = forward_ad.make_dual(x.clone().requires_grad_(), tangent)
                    with paused:
                        out = made(*((w, dual) if swapped else (dual, w)))
                    found.append(forward_ad.unpack_dual(out).tangent)
                if additive or made is not fit or not swapped:  # which has no weights in it
                    assert found[0] is not None
                    torch.testing.assert_close(*found)
                # what carries none is done as ever
                assert "_Disturbed" in type(law.variance(w, w).grad_fn).__name__


@FORWARD
def test_the_draws_numbers_may_carry_a_tangent() -> None:
    law, log, w = Learned(True, 8.0, worth=True), *(torch.randn(12).requires_grad_() for _ in range(2))
    with forward_ad.dual_level():
        out = law.draw(log, w, forward_ad.make_dual(torch.randn(12), torch.ones(12)))
        torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, law.variance(log, w).sqrt())


@pytest.mark.parametrize("logit", [-87.5, 87.5, 200.0])
def test_beyond_what_exp_takes_the_eta_trick_is_torchs(logit: float) -> None:
    law = LogSum(0.5)
    for value in (0.0, 1e-19):
        results = []
        for fast in (True, False):
            w = torch.full((40,), value, requires_grad=True)
            logits = torch.zeros(40).index_fill_(0, torch.tensor(3), logit).requires_grad_()
            total = eta_total(law, 1e-3, [(w, logits)]) if fast else 5e-4 * eta_sum(law, 1e-3, w, logits)
            results.append([total, *torch.autograd.grad(total, (w, logits))])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)

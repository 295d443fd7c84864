"""Losses told by their curvature, and curvature along branches from labels."""

import math

import pytest
import torch
from depth_nets import LENGTH, LOSSES, RATES, Net, data, fitted
from torch import Tensor, nn
from torch.nn import functional as F

from fallow.explaining._curvature import cotangents, recognise
from fallow.explaining._outputs import OutputLoss
from fallow.explaining._reach import reached
from fallow.explaining.depth import explain
from fallow.surgery.tap import tapped

N, C, T = 12, 5, 4


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(2)


def logits(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return 2 * torch.randn(*shape, generator=generator(), dtype=torch.float64).to(dtype)


def labels(*shape: int, classes: int = C) -> Tensor:
    return torch.randint(0, classes, shape, generator=generator())


def told(loss_fn, output, target=None):
    return recognise(OutputLoss(loss_fn, output, target, "test"), generator())


# --- which loss -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_mean_cross_entropy_weighs_each_sample_alike(dtype):
    found = told(F.cross_entropy, logits(N, C, dtype=dtype), labels(N))
    assert (found.kind, found.dim) == ("cross_entropy", 1)
    assert torch.allclose(found.weights[0], torch.full((N, 1), 1 / N).to(found.weights[0]))


def test_label_smoothing_and_soft_targets_do_not_change_the_curvature():
    plain = told(F.cross_entropy, logits(N, C), labels(N)).weights[0]
    smooth = told(lambda o, t: F.cross_entropy(o, t, label_smoothing=0.3), logits(N, C), labels(N))
    soft = told(F.cross_entropy, logits(N, C), logits(N, C).softmax(1))
    for found in (smooth, soft):
        assert found.kind == "cross_entropy"
        assert torch.allclose(found.weights[0], plain)


def test_class_weights_are_found_sample_by_sample():
    weight = torch.rand(C, generator=generator(), dtype=torch.float64)
    target = labels(N)
    found = told(lambda o, t: F.cross_entropy(o, t, weight=weight), logits(N, C), target)
    assert found.kind == "cross_entropy"
    assert torch.allclose(found.weights[0][:, 0], weight[target] / weight[target].sum())


def test_ignored_positions_have_no_weight():
    target = labels(N)
    target[::3] = -100
    found = told(F.cross_entropy, logits(N, C), target)
    assert found.kind == "cross_entropy"
    assert torch.allclose(found.weights[0][:, 0], (target >= 0).double() / (target >= 0).sum())


def test_logits_of_tokens_shifted_by_one_leave_the_last_without_weight():
    def loss(o: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(o[:, :-1].flatten(0, 1), t[:, 1:].flatten())

    found = told(loss, logits(N, T, C), labels(N, T))
    assert (found.kind, found.dim) == ("cross_entropy", 2)
    assert torch.allclose(found.weights[0][:, :-1], torch.tensor(1 / (N * (T - 1))).double())
    assert not found.weights[0][:, -1].any()


def test_classes_may_stand_in_the_middle_as_in_segmentation():
    found = told(F.cross_entropy, logits(N, C, T, 3), labels(N, T, 3))
    assert (found.kind, found.dim) == ("cross_entropy", 1)
    assert found.weights[0].shape == (N, 1, T, 3)


def test_saturated_logits_are_still_those_of_a_cross_entropy():
    found = told(F.cross_entropy, 60 * logits(N, C), labels(N))
    assert found.kind == "cross_entropy"
    assert torch.allclose(found.weights[0], torch.tensor(1 / N).double())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(N,), (N, 3), (N, T, 2)])
def test_a_squared_error_is_quadratic_whatever_its_factor(reduction, shape):
    found = told(lambda o, t: F.mse_loss(o, t, reduction=reduction), logits(*shape), torch.zeros(shape))
    assert found.kind == "quadratic"
    factor = 2 / math.prod(shape) if reduction == "mean" else 2
    assert torch.allclose(found.weights[0], torch.full(shape, factor).double())


def test_a_squared_error_with_weights_keeps_them_element_by_element():
    weight = torch.arange(N).double()
    found = told(lambda o, t: (weight * (o - t) ** 2).sum(), logits(N), torch.zeros(N))
    assert found.kind == "quadratic"
    assert torch.allclose(found.weights[0], 2 * weight)


def test_squared_errors_of_two_heads_are_quadratic_in_both():
    def loss(o: dict, t: Tensor) -> Tensor:
        return F.mse_loss(o["a"], t) + 3 * F.mse_loss(o["b"], t)

    found = told(loss, {"a": logits(N), "b": logits(N)}, torch.zeros(N).double())
    assert found.kind == "quadratic"
    assert torch.allclose(found.weights[1], 3 * found.weights[0])


def sharp(o: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(o / 2, t)


@pytest.mark.parametrize(
    ("loss", "target"),
    [
        (F.huber_loss, torch.zeros(N, C)),
        (lambda o, t: F.huber_loss(o, t, delta=4.0), torch.zeros(N, C)),
        (F.l1_loss, torch.zeros(N, C)),
        (lambda o, t: torch.log(torch.cosh(o - t)).mean(), torch.zeros(N, C)),
        (sharp, labels(N)),
        (F.binary_cross_entropy_with_logits, torch.zeros(N, C)),
        (lambda o, t: -((o - t) ** 2).mean(), torch.zeros(N, C)),
        (lambda o, t: (o.mean(0) ** 2).sum(), None),
    ],
    ids=["huber", "wide huber", "l1", "log-cosh", "temperature", "binary", "concave", "coupled"],
)
def test_other_losses_are_told_apart(loss, target):
    assert told(loss, logits(N, C), target).kind == "other"


def test_log_probabilities_leave_a_loss_that_is_linear():
    assert told(F.nll_loss, logits(N, C).log_softmax(1), labels(N)).kind == "linear"


class Once(torch.autograd.Function):
    """The square, with a gradient that cannot be differentiated again."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


def test_a_loss_that_is_differentiable_only_once_leaves_out_the_hessian():
    net, (x, target) = fitted("quadratic"), data("quadratic")
    found = explain(
        net, lambda o, t: Once.apply(o - t).mean(), [(x, target)], rates=RATES, draws=4, scale="eval"
    )
    plain = explain(net, F.mse_loss, [(x, target)], rates=RATES, draws=4, scale="eval")
    assert found.loss_kind == "other"
    assert all(row.hessian is None and row.linearised is None for row in found.rows)
    assert found.totals.sums["hessian"] is None
    assert "cannot differentiate the loss twice" in str(found)
    assert found.totals.sums["bregman"] == pytest.approx(plain.totals.sums["bregman"])


# --- curvature along the branches -------------------------------------------------------------------------


def along(net: Net, x: Tensor) -> Tensor:
    """d output / d gate, one gate a sample, at the full network: (rows, out, L)."""
    one = torch.ones(LENGTH, dtype=torch.float64)
    return torch.func.vmap(lambda row: torch.func.jacrev(lambda g: net.gated(row, g))(one))(x)


def curvatures(kind: str, net: Net, x: Tensor) -> Tensor:
    """Sum over samples of J' H J by site, from the formulas of the two losses."""
    j = along(net, x)
    with torch.no_grad():
        if kind == "quadratic":
            return 2 * (j**2).sum((0, 1)) / (j.shape[0] * j.shape[1])
        pi = net(x).softmax(-1)[..., None]
        return ((pi * j**2).sum(1) - (pi * j).sum(1) ** 2).mean(0)


@pytest.mark.parametrize("kind", list(LOSSES))
@pytest.mark.parametrize("scale", ["eval", "train"])
def test_the_linearised_form_is_the_curvature_by_gates_exactly_where_classes_are_few(kind, scale):
    net, batch = fitted(kind), data(kind)
    found = explain(net, LOSSES[kind], [batch], rates=RATES, scale=scale, draws=2, site_draws=0)
    for row, expected in zip(found.rows, curvatures(kind, net, batch[0]), strict=True):
        assert row.linearised == pytest.approx(float(row.noise / 2 * expected), rel=1e-9)
        assert row.linearised_error == 0


def test_a_gate_gradient_is_the_inner_product_of_gradient_and_branch():
    net, (x, target) = fitted("cross_entropy"), data("cross_entropy")
    gates = torch.ones(len(x), LENGTH, dtype=torch.float64, requires_grad=True)
    F.cross_entropy(net.gated(x, gates), target).backward()
    with tapped(net, x) as taps:
        loss = OutputLoss(F.cross_entropy, net(x).detach(), target, "test")
        with reached(taps, x, loss, list(RATES)) as pull:
            found = pull(loss.gradient(loss.full))
    for i, name in enumerate(RATES):
        assert torch.allclose(found[name], gates.grad[:, i], rtol=1e-12, atol=1e-15)
    net.zero_grad()


@pytest.mark.parametrize("kind", list(LOSSES))
def test_drawn_labels_agree_with_the_exact_sum_within_five_percent_at_400_draws(kind):
    torch.manual_seed(4)
    net, (x, target) = Net(3 if kind == "cross_entropy" else 2), data(kind, rows=128)
    with tapped(net, x) as taps:
        loss = OutputLoss(LOSSES[kind], net(x).detach(), target, "test")
        curvature = recognise(loss, generator())
        with reached(taps, x, loss, list(RATES)) as pull:
            sums = {}
            for single in (True, False):
                drawn, exact = cotangents(curvature, loss.full, 400, generator(), single)
                assert exact is single
                squares = [[float((s**2).sum()) for s in pull(u).values()] for u in drawn]
                sums[single] = torch.tensor(squares).sum(0) / (1 if single else 400)
    assert torch.allclose(sums[False], sums[True], rtol=0.05)
    assert not torch.equal(sums[False], sums[True])


class Tokens(Net):
    """Mixes the tokens once, so that several positions of a sample see each branch."""

    flat = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i == 3:
                x = x + x.roll(1, 1)
        x = self.head(x)
        return x.flatten(0, 1) if self.flat else x


@pytest.mark.parametrize("flat", [False, True])
def test_positions_of_one_sample_are_drawn_each_for_itself(flat):
    """A sum over classes common to all positions would add their products."""
    torch.manual_seed(0)
    net, x = Tokens(3), torch.randn(32, 3, 4, dtype=torch.float64)
    target = torch.randint(0, 3, (32, 3))

    def loss(o: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(o.reshape(-1, 3), t.flatten())

    def gated(row: Tensor, gates: Tensor) -> Tensor:
        h = net.stem(row)
        for i, block in enumerate(net.blocks):
            h = h + gates[i] * block.branch(h)
            if i == 3:
                h = h + h.roll(1, 0)
        return net.head(h)

    one = torch.ones(LENGTH, dtype=torch.float64)
    j = torch.func.vmap(lambda row: torch.func.jacrev(lambda g: gated(row, g))(one))(x)
    pi = net(x).softmax(-1)[..., None].detach()
    net.flat = flat
    expected = ((pi * j**2).sum(2) - (pi * j).sum(2) ** 2).mean((0, 1)).detach()
    found = explain(net, loss, [(x, target)], rates=RATES, draws=2, site_draws=0, label_draws=400)
    assert found.loss_kind == "cross_entropy"
    for row, e in zip(found.rows, expected, strict=True):
        assert row.linearised == pytest.approx(float(row.noise / 2 * e), rel=0.05)
        assert abs(row.linearised - float(row.noise / 2 * e)) < 4 * row.linearised_error


def test_two_branches_of_one_site_share_their_gate():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, g: float | Tensor = 1.0) -> Tensor:
            x = x + g * torch.tanh(self.a(x))
            return x + g * torch.tanh(self.b(x))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.two, self.head = Two(), nn.Linear(4, 2)
            self.double()

        def forward(self, x: Tensor, g: float | Tensor = 1.0) -> Tensor:
            return self.head(self.two(x, g))

    model, (x, target) = Model(), data("quadratic")
    found = explain(
        model,
        F.mse_loss,
        [(x, target)],
        rates={"two": 0.5},
        granularity="block",
        scale="eval",
        draws=2,
        site_draws=0,
    )
    gate = torch.ones((), dtype=torch.float64)
    j = torch.func.jacrev(lambda g: model(x, g))(gate).detach()
    assert [row.name for row in found.rows] == ["two"]
    assert found.rows[0].linearised == pytest.approx(float(0.25 * (j**2).mean()), rel=1e-9)
    off = (model(x) - model(x, 0.0)).detach()
    assert found.rows[0].hessian == pytest.approx(float(0.25 * (off**2).mean()), rel=1e-9)

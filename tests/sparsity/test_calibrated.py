"""Curvature along weights, and the penalty in its units."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fallow import penalties
from fallow.errors import RunError, UsageError
from fallow.sparsity import sparsify
from fallow.sparsity.curvature import Curvature
from fallow.sparsity.weights import weights_of


def exact(model: nn.Module, x: torch.Tensor, loss: str) -> dict[str, torch.Tensor]:
    """Mean over samples of sum_kl J_kj H_kl J_lj, one weight at a time by autograd."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        total = torch.zeros_like(parameter)
        for row in x:
            out = model(row[None])[0]
            rows = [torch.autograd.grad(o, parameter, retain_graph=True)[0] for o in out]
            jacobian = torch.stack(rows).flatten(1)
            p = out.detach().softmax(-1)
            hessian = torch.eye(len(out)) if loss == "squared" else p.diag() - p[:, None] * p
            total += ((hessian @ jacobian) * jacobian).sum(0).view_as(parameter)
        found[name] = total / len(x)
    return found


@pytest.mark.parametrize("loss", ["cross_entropy", "squared"])
def test_the_curvature_is_the_gauss_newton_diagonal(loss: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x = torch.randn(6, 4)
    curvature = Curvature(model, weights_of(model), loss=loss, every=1, decay=0.0)
    draws = []
    for _ in range(1500):
        model(x)
        draws.append({name: h.clone() for name, h in curvature.values.items()})
    for name, h in exact(model, x, loss).items():
        sampled = torch.stack([d[name] for d in draws])
        error = sampled.std(0) / math.sqrt(len(draws))
        assert bool(((sampled.mean(0) - h).abs() <= 5 * error + 1e-7).all())


def test_a_convolution_over_one_position_is_a_linear_layer() -> None:
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten())
    flat = nn.Sequential(nn.Flatten(), nn.Linear(27, 4, bias=False))
    flat[1].weight.data.copy_(conv[0].weight.data.flatten(1))
    x = torch.randn(5, 3, 3, 3)
    found = []
    for model in (conv, flat):
        curvature = Curvature(model, weights_of(model), every=1, seed=3)
        model(x)
        found.append(next(iter(curvature.values.values())).flatten(1))
    torch.testing.assert_close(*found)


def test_looking_changes_neither_gradients_nor_draws() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3))
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(1)
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return [*found, torch.rand(1)]

    before = gradients()
    curvature = Curvature(model, weights_of(model), every=1)
    after = gradients()
    assert curvature.looks == 1
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    curvature.remove()
    gradients()
    assert curvature.looks == 1
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_it_looks_every_so_often_and_only_in_training() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    curvature = Curvature(model, weights_of(model), every=3)
    for _ in range(7):
        model(torch.randn(2, 4))
    assert curvature.looks == 3
    with torch.no_grad():
        model(torch.randn(2, 4))
    model.eval()(torch.randn(2, 4))
    assert curvature.looks == 3


def test_the_penalty_is_variational_dropouts_in_units_of_standard_errors() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    run = sparsify(model, method="calibrated", samples=500)
    assert run.penalty() == 0
    assert run.sparsity() == 0
    model(torch.randn(64, 4))
    h = run.state_dict()["method"]["values"]["0.weight"]
    omega = penalties.VariationalDropout()
    scale = (500 * h).sqrt()
    w = run.weights[0].parameter
    penalty = run.penalty()
    assert isinstance(penalty, torch.Tensor)
    torch.testing.assert_close(penalty.detach(), omega.total(w.detach() * scale) / 500)
    (gradient,) = torch.autograd.grad(penalty, w)
    torch.testing.assert_close(gradient, scale / 500 * omega.gradient(w.detach() * scale))
    torch.testing.assert_close(run.survival_rates()["0.weight"], omega.survival_rate(w.detach() * scale, 1.0))


def test_a_ridge_on_an_orthogonal_design_cuts_at_one_standard_error() -> None:
    """Squared loss, x'x/n = 1: a weight whose estimate is below one standard error ends at zero."""
    n = 64
    x = torch.linalg.qr(torch.randn(n, 4, dtype=torch.float64))[0] * math.sqrt(n)
    t = torch.tensor([0.5, 0.9, 1.2, 6.0], dtype=torch.float64)
    y = (x @ (t / math.sqrt(n)))[:, None]
    model = nn.Linear(4, 1, bias=False).double()
    model.weight.data.fill_(0.2)
    run = sparsify(model, method="calibrated", samples=n, loss="squared")
    optimiser = torch.optim.SGD(model.parameters(), 0.05)
    run._method.curvature.values["weight"] = torch.ones(1, 4, dtype=torch.float64)  # pyright: ignore[reportAttributeAccessIssue]
    run.remove()
    for _ in range(4000):
        optimiser.zero_grad()
        ((model(x) - y).square().mean() / 2 + run.penalty()).backward()
        optimiser.step()
    ends = model.weight.detach()[0] * math.sqrt(n)
    assert bool((ends[:2].abs() < 0.06).all())  # a step's length, by which they move around 0
    assert ends[2] > 0.1
    assert ends[3] > 5.5


def test_copies_are_free_of_it_and_the_run_goes_on() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    run = sparsify(model, method="calibrated", samples=100)
    model(torch.randn(8, 4))
    plain = run.hardened()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied(torch.randn(8, 4))
    looks = run.state_dict()["method"]["looks"]
    assert looks == 1
    for _ in range(10):
        model(torch.randn(8, 4))
    assert run.state_dict()["method"]["looks"] == 2
    other = sparsify(copy.deepcopy(model), method="calibrated", samples=100)
    other.load_state_dict(run.state_dict())
    x = torch.randn(8, 4)
    for _ in range(10):
        run.model(x)
        other.model(x)
    ours, theirs = (r.state_dict()["method"]["values"] for r in (run, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_errors() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(UsageError, match="needs samples="):
        sparsify(model, method="calibrated")
    with pytest.raises(UsageError, match="loss must be"):
        sparsify(model, method="calibrated", samples=10, loss="hinge")
    attention = nn.MultiheadAttention(4, 2)
    with pytest.raises(UsageError, match="is of MultiheadAttention: curvature is known of linear"):
        sparsify(attention, method="calibrated", samples=10)
    pair = nn.Bilinear(2, 3, 4)
    with pytest.raises(UsageError, match="Bilinear"):
        sparsify(pair, method="calibrated", samples=10)

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            out = self.layer(x)
            return out, out

    two = Pair()
    sparsify(two, method="calibrated", samples=10)
    with pytest.raises(RunError, match="one floating-point tensor, got tuple"):
        two(torch.randn(2, 4))

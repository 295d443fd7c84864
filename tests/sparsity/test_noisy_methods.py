"""Noise on weights as methods of a run: against their duals, targets, plain copies, checkpoints."""

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fallow import penalties, schedules
from fallow.errors import RunError, UsageError
from fallow.noise import HardConcreteGates, VariationalNoise, WeightDropout, variational_
from fallow.sparsity import Noise, Sparsifier, irls, sparsify

METHODS = ["dropout", "gaussian", "variational", "hardconcrete", "targeted"]
LEARNED = {"variational": "_log_variance", "hardconcrete": "_log_a"}
CASES = [(method, control) for method in METHODS for control in ("ramp", "strength")][:-1]


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4))


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(64, 12, generator=generator), torch.randint(0, 4, (64,), generator=generator)


def start(method: str, **options: Any) -> tuple[nn.Sequential, torch.optim.Optimizer, Sparsifier]:
    model = make_model()
    optimiser = torch.optim.Adam(model.parameters(), 0.01)
    run = sparsify(model, method=method, optimiser=optimiser, samples=64, **options)
    own = [*run.parameters()]
    if own:
        optimiser.add_param_group({"params": own})
    return model, optimiser, run


def go(model: nn.Module, optimiser: torch.optim.Optimizer, run: Sparsifier, count: int) -> None:
    x, y = data()
    for _ in range(count):
        torch.manual_seed(run.time)
        optimiser.zero_grad()
        (F.cross_entropy(model(x), y) + run.penalty()).backward()
        optimiser.step()
        run.update()


def value_of(penalty: Any) -> float:
    assert isinstance(penalty, torch.Tensor)
    return float(penalty.detach())


def zeros_of(run: Sparsifier) -> int:
    return sum(int((weight.parameter == 0).sum()) for weight in run.weights)


def is_plain(model: nn.Module) -> bool:
    """No hooks, no marks, the classes and keys of the model that was given."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_load_state_dict_pre_hooks", "_backward_hooks")
    plain = make_model()
    return (
        not any(getattr(module, kind) for module in model.modules() for kind in hooks)
        and [set(module.__dict__) for module in model.modules()] == [set(m.__dict__) for m in plain.modules()]
        and [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
        and [*model.state_dict()] == [*plain.state_dict()]
    )


# --- of all of them ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "control"), CASES)
def test_a_target_is_met_to_an_entry_and_stays(method: str, control: str) -> None:
    model, optimiser, run = start(method, target=0.8, steps=40, control=control)
    go(model, optimiser, run, 40)
    total = sum(weight.parameter.numel() for weight in run.weights)
    assert zeros_of(run) == round(0.8 * total)
    assert run.sparsity() == zeros_of(run) / total


@pytest.mark.parametrize(("method", "control"), CASES)
def test_a_resumed_run_goes_on_bit_for_bit(method: str, control: str) -> None:
    options: dict[str, Any] = {"target": 0.7, "steps": 30, "control": control, "every": 3}
    whole, first, second = (start(method, **options) for _ in range(3))
    go(*whole, 30)
    go(*first, 13)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    torch.manual_seed(99)
    for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    go(*second, 17)
    for key, value in whole[0].state_dict().items():
        assert torch.equal(value, second[0].state_dict()[key])
    for key, value in whole[2].survival_rates().items():
        assert torch.equal(value, second[2].survival_rates()[key])


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_a_hardened_copy_is_plain_and_computes_what_evaluation_does(method: str, learned: bool) -> None:
    options: dict[str, Any] = {"target": 0.6, "steps": 30} if method == "targeted" else {"strength": 1e-2}
    if method == "variational":
        options["strength"] = 1.0
    model, optimiser, run = start(method, **options)
    if learned:
        go(model, optimiser, run, 20)
    before = copy.deepcopy(model.state_dict())
    copied, masks = run.hardened(), run.masks()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert is_plain(copied)
    assert not is_plain(model)
    for weight in run.weights:
        assert torch.equal(copied.get_parameter(weight.name) != 0, masks[weight.name])
    run.harden()
    x, _ = data()
    torch.testing.assert_close(copied.eval()(x), model.eval()(x), rtol=0, atol=0)
    assert not is_plain(model)
    assert run.shrink(x).model.eval()(x).shape == (64, 4)


@pytest.mark.parametrize("method", METHODS)
def test_removed_noise_leaves_the_plain_model_with_its_weights(method: str) -> None:
    model, optimiser, run = start(method, target=0.6, steps=30)
    go(model, optimiser, run, 10)
    before = {weight.name: weight.parameter.detach().clone() for weight in run.weights}
    x, _ = data()
    assert not torch.equal(model(x), model(x))
    run.remove()
    assert is_plain(model)
    assert torch.equal(model(x), model(x))
    assert all(torch.equal(weight.parameter, before[weight.name]) for weight in run.weights)
    assert run.penalty() == 0
    for _ in range(20):
        run.update()
    assert run.sparsity() == pytest.approx(0.6, abs=1e-3)
    run.remove()


@pytest.mark.parametrize("method", METHODS)
def test_noise_of_the_users_own_stays(method: str) -> None:
    model = make_model()
    own = variational_(model, names="4.weight")
    run = sparsify(model, method=method, samples=64, target=0.5, steps=9, exclude="4.weight")
    found = VariationalNoise.of(run.hardened())
    assert found is not None
    assert found.names == ["4.weight"]
    with pytest.raises(UsageError, match="4.weight_log_variance is what noise on a weight has learned"):
        sparsify(model, include="4.weight_log_variance")
    run.remove()
    assert own.names == ["4.weight"]
    assert VariationalNoise.of(model) is not None


def test_options_that_cannot_be_are_refused_and_leave_the_model_plain() -> None:
    model = make_model()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"method": "variational"}, "needs samples="),
        ({"method": "variational", "samples": 0}, "samples"),
        ({"method": "variational", "samples": 9, "strategy": "logsum"}, "penalty of its own"),
        ({"method": "variational", "samples": 9, "noise": Noise(form="both")}, "form"),
        ({"method": "hardconcrete", "strategy": "magnitude"}, "penalty of its own"),
        ({"method": "hardconcrete", "noise": Noise(survival_rate=1.0)}, "survival_rate"),
        ({"method": "targeted"}, "needs target="),
        ({"method": "targeted", "target": 0.5, "steps": 9, "control": "strength"}, "no strength to control"),
        ({"method": "targeted", "target": 0.5, "steps": 9, "groups": "inputs"}, "groups of weights, outputs"),
        ({"method": "targeted", "groups": "2:4", "steps": 9}, "groups of weights, outputs"),
        ({"method": "dropout", "strategy": "magnitude"}, "follows the survival rates"),
    ]
    for options, text in cases:
        with pytest.raises(UsageError, match=text):
            sparsify(model, **options)
        assert is_plain(model)
    model[4].weight = nn.Parameter(torch.ones(4, 16))
    tied = nn.Sequential(model[2], nn.Linear(20, 16))
    tied[1].weight = tied[0].weight
    with pytest.raises(UsageError, match="several layers"):
        sparsify(tied, method="dropout")


# --- adaptive dropout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", ["weights", "outputs", "inputs"])
def test_dropout_has_the_rates_of_the_strategy_and_no_gradient_through_them(groups: str) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 3, bias=False).double(), torch.randn(7, 5, dtype=torch.float64)
    omega, strength = penalties.LogSum(eps=0.3), 0.2
    run = sparsify(layer, method="dropout", strategy=omega, strength=strength, groups=groups)
    assert torch.equal(layer(x), x @ layer.weight.T)  # nothing before the first update
    run.update()
    w = layer.weight.detach().clone().requires_grad_()
    axes = {"weights": (), "outputs": (1,), "inputs": (0,)}[groups]
    size = w.detach().square().mean(axes, keepdim=True).sqrt() if axes else w.detach().abs()
    rates = omega.eta(size) / (omega.eta(size) + strength)
    torch.manual_seed(3)
    layer(x).square().sum().backward()
    torch.manual_seed(3)
    noise = (torch.rand(3, 5, dtype=torch.float64) < rates) / rates
    (x @ (noise * w).T).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, w.grad)
    torch.testing.assert_close(run.survival_rates()["weight"], rates.flatten().view_as(size.squeeze()))


def test_the_expected_gradient_of_groups_is_that_of_the_penalty() -> None:
    torch.manual_seed(0)
    n = 6
    x = torch.linalg.qr(torch.randn(n, 4, dtype=torch.float64)).Q * math.sqrt(n)  # curvature 1
    y = torch.randn(n, 3, dtype=torch.float64)
    options: dict[str, Any] = {"strategy": penalties.LogSum(eps=0.3), "strength": 0.2, "groups": "outputs"}
    layer = nn.Linear(4, 3, bias=False).double()
    plain = copy.deepcopy(layer)
    exact = sparsify(plain, **options)
    penalty = exact.penalty()
    assert isinstance(penalty, torch.Tensor)
    (((plain(x) - y).square().sum() / (2 * n)) + penalty).backward()
    run = sparsify(layer, method="gaussian", **options)
    run.update()
    draws = []
    for _ in range(3000):
        layer.zero_grad()
        ((layer(x) - y).square().sum() / (2 * n)).backward()
        assert layer.weight.grad is not None
        draws.append(layer.weight.grad.clone())
    found = torch.stack(draws)
    error = found.std(0) / math.sqrt(len(draws))
    assert plain.weight.grad is not None
    assert bool(((found.mean(0) - plain.weight.grad).abs() <= 5 * error).all())


@pytest.mark.parametrize("method", ["dropout", "gaussian"])
def test_adaptive_dropout_ends_where_reweighted_ridges_do(method: str) -> None:
    """Within five standard errors of batch means, which are less than what the penalty moves."""
    torch.manual_seed(0)
    x = torch.randn(200, 4, dtype=torch.float64)
    x /= x.square().mean(0).sqrt()  # curvature 1
    y = x @ torch.tensor([1.5, -1.0, 0.6, 0.4], dtype=torch.float64)
    y += 0.3 * torch.randn(200, dtype=torch.float64)
    omega, strength = penalties.LogSum(eps=0.5), 0.05
    fixed = irls(x, y, omega, strength).weights
    free = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    layer = nn.Linear(4, 1, bias=False).double()
    optimiser = torch.optim.SGD(layer.parameters(), 0.02)
    run = sparsify(layer, method=method, strategy=omega, strength=strength)
    found = []
    for _ in range(3000):
        optimiser.zero_grad()
        ((layer(x)[:, 0] - y).square().mean() / 2).backward()
        optimiser.step()
        run.update()
        found.append(layer.weight.detach()[0].clone())
    last = torch.stack(found[1000:]).unflatten(0, (20, -1)).mean(1)
    error = last.std(0) / math.sqrt(20)
    assert bool(((last.mean(0) - fixed).abs() <= 5 * error).all())
    assert bool((5 * error < (fixed - free).abs()).all())


def test_once_the_target_is_reached_nothing_is_dropped() -> None:
    model, optimiser, run = start("gaussian", strength=0.1, target=0.5, steps=20)
    x, _ = data()
    go(model, optimiser, run, 13)
    assert not torch.equal(model(x), model(x))
    go(model, optimiser, run, 1)
    assert torch.equal(model(x), model(x))


def test_weights_that_are_not_finite_are_named_and_no_rate_changes() -> None:
    model, optimiser, run = start("dropout")
    go(model, optimiser, run, 2)
    handle = WeightDropout.of(model)
    assert handle is not None
    before = handle.rates
    with torch.no_grad():
        run.weights[1].parameter[0, 0] = math.nan
    with pytest.raises(RunError, match=r"2.weight has NaN"):
        run.update()
    assert all(torch.equal(value, before[name]) for name, value in handle.rates.items())


# --- variational dropout -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "rate"), [("additive", 0.03), ("multiplicative", 0.06)])
def test_variational_dropout_keeps_what_its_dual_keeps(form: str, rate: float) -> None:
    """With orthogonal columns and unit errors each weight minimises its dual at its t statistic.

    That is 0 up to one standard error. A weight is cut at a survival rate of .05, in the dual a weight of
    .05 standard errors: t statistics of 1.6 and more have a survival rate above .45.
    """
    torch.manual_seed(0)
    n, sizes = 128, [0.1, -0.3, 0.5, 0.2, -0.4, 0.05, 0.6, 1.6, -2.0, 2.5, 3.0, -4.0]
    t = torch.tensor(sizes, dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(n, len(t), dtype=torch.float64)).Q
    error = torch.randn(n, dtype=torch.float64)
    y = q @ t + error - q @ (q.T @ error)
    x = q * math.sqrt(n)
    layer = nn.Linear(len(t), 1, bias=False).double()
    layer.weight.data.copy_(t / math.sqrt(n))
    run = sparsify(layer, method="variational", samples=n, noise=Noise(form=form))
    optimiser = torch.optim.Adam(layer.parameters())
    for i in range(2000):
        optimiser.param_groups[0]["lr"] = rate * (1 - i / 2000)
        optimiser.zero_grad()
        ((layer(x)[:, 0] - y).square().mean() / 2 + run.penalty()).backward()
        optimiser.step()
        run.update()
    omega = penalties.VariationalDropout()
    expected = omega.prox(t, 1.0)
    assert run.masks()["weight"].tolist() == [(expected != 0).tolist()]
    found = run.hardened().get_parameter("weight").detach()[0] * math.sqrt(n)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.15)
    rates = run.survival_rates()["weight"][0]
    torch.testing.assert_close(rates, omega.survival_rate(expected, 1.0), rtol=0, atol=0.05)


def test_the_penalty_is_the_divergence_by_samples_and_the_schedule_starts_it_slowly() -> None:
    model = make_model()
    run = sparsify(model, method="variational", samples=50, schedule=schedules.warmup(4))
    handle = VariationalNoise.of(model)
    assert handle is not None
    found = []
    for _ in range(6):
        found.append(value_of(run.penalty()) * 50 / float(handle.kl().detach()))
        run.update()
    assert found == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0, 1.0])


def test_masked_weights_are_without_noise() -> None:
    layer = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 0.1, 0.1, 0.1]]))
    run = sparsify(layer, method="variational", samples=10, target=0.75, steps=2, ramp=(0.0, 0.5))
    with torch.no_grad():
        layer.get_parameter("weight_log_variance").fill_(-2.0)
    x = torch.tensor([[0.0, 1.0, 1.0, 1.0]]).expand(200, 4)
    assert layer(x).std() > 0.1
    run.update()
    assert run.masks()["weight"].tolist() == [[True, False, False, False]]
    # 1e-8 is what sample="activations" adds to each variance
    assert layer(x).abs().max() < 6e-4


def test_groups_of_normal_weights_have_the_signal_of_all_of_them() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 4, bias=False).double()
    run = sparsify(layer, method="variational", samples=10, groups="outputs")
    variance = torch.randn(4, 6, dtype=torch.float64) - 3
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.0)
        layer.get_parameter("weight_log_variance").copy_(variance)
    square = layer.weight.detach().square()
    noise = variance.exp() * square / (square + 1e-8)
    expected = square.sum(1) / (square + noise).sum(1)
    torch.testing.assert_close(run.survival_rates()["weight"], expected, rtol=1e-4, atol=0)


# --- gates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", ["weights", "outputs", "inputs"])
def test_gates_cost_the_expected_number_of_weights_and_rank_the_groups(groups: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 4, bias=False)
    run = sparsify(
        layer, method="hardconcrete", groups=groups, strength=0.3, target=0.5, steps=1, ramp=(0.0, 1.0)
    )
    (log_a,) = run.parameters()
    with torch.no_grad():
        log_a.normal_(0, 2.0).clamp_(-4, 4)
    chance = torch.sigmoid(log_a.detach() - 2 / 3 * math.log(0.1 / 1.1))
    assert value_of(run.penalty()) == pytest.approx(0.3 * float(chance.expand(4, 6).sum()), rel=1e-5)
    torch.testing.assert_close(
        run.survival_rates()["weight"], chance.reshape(run.weights[0].magnitude().shape)
    )
    gates = HardConcreteGates.of(layer)
    assert gates is not None
    run.update()
    kept = run.weights[0].spread(run._masks[0]) if run._masks is not None else torch.zeros(())
    assert chance[kept].min() >= chance[~kept].max()
    expected = layer.weight.detach() * gates.gates()["weight"]
    assert torch.equal(run.hardened().get_parameter("weight").detach(), expected)


def test_a_layer_whose_gates_are_all_shut_keeps_its_best_group() -> None:
    model, _, run = start("hardconcrete", groups="outputs")
    with torch.no_grad():
        log_a = model.get_parameter("2.weight_log_a")
        log_a.fill_(-4.0)[7] = -3.5
    copied = run.hardened()
    kept = copied.get_parameter("2.weight").ne(0).any(1)
    assert kept.nonzero().flatten().tolist() == [7]
    assert torch.equal(copied.get_parameter("2.weight")[7], model.get_parameter("2.weight")[7])
    assert run.rescued == ["2.weight"]


# --- targeted dropout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", ["weights", "outputs"])
def test_each_row_loses_its_smallest_and_the_share_rises_with_the_ramp(groups: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(20, 10, bias=False)
    size = layer.weight.detach().abs() if groups == "weights" else layer.weight.detach().square().sum(1)[None]
    run = sparsify(layer, method="targeted", groups=groups, target=0.6, steps=100, ramp=(0.2, 0.7))
    shares = []
    for _ in range(100):
        run.update()
        shares.append(run.sparsity())
    assert shares[:20] == [0.0] * 20
    assert shares == sorted(shares)
    # half way up, .95 of the share; of 20 or 10 in a row whole ones
    assert shares[44] == pytest.approx({"weights": 11 / 20, "outputs": 5 / 10}[groups])
    assert shares[69:] == pytest.approx([0.6] * 31)
    zero = layer.weight.detach() == 0
    gone = zero if groups == "weights" else zero.all(1)[None]
    assert bool((gone.sum(1) == round(0.6 * gone.shape[1])).all())
    for row, mask in zip(size, gone, strict=True):
        assert row[mask].max() <= row[~mask].min()


@pytest.mark.parametrize("method", sorted(LEARNED))
def test_what_is_learned_is_in_the_state_of_the_model_alone(method: str) -> None:
    model, optimiser, run = start(method)
    go(model, optimiser, run, 2)
    assert run.state_dict()["method"] == {}
    names = [weight.name + LEARNED[method] for weight in run.weights]
    assert [id(p) for p in run.parameters()] == [id(model.get_parameter(name)) for name in names]
    assert set(names) < set(model.state_dict())

"""Sparsification in a loop of one's own: methods against their objective, targets, failures, checkpoints."""

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import nn

from fallow import penalties, schedules
from fallow.errors import ArgumentError, RunError, UsageError
from fallow.models import lenet300
from fallow.sparsity import Sparsifier, sparsify
from fallow.sparsity.control import masks_for
from fallow.sparsity.weights import Weight


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4))


def train(
    model: nn.Module, count: int, *, lr: float = 0.05, kind: type = torch.optim.SGD, **options: Any
) -> Sparsifier:
    """A few steps on a fixed problem."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(64, 12, generator=generator), torch.randint(0, 4, (64,), generator=generator)
    optimiser = kind(model.parameters(), lr)
    run = sparsify(model, optimiser=optimiser, **options)
    for group in [{"params": [*run.parameters()]}] if [*run.parameters()] else []:
        optimiser.add_param_group(group)
    for _ in range(count):
        optimiser.zero_grad()
        (nn.functional.cross_entropy(model(x), y) + run.penalty()).backward()
        optimiser.step()
        run.update()
    return run


# --- methods -----------------------------------------------------------------------------------------------


def one_weight(value: torch.Tensor, **options: Any) -> tuple[nn.Linear, Sparsifier]:
    layer = nn.Linear(value.shape[1], value.shape[0], bias=False).double()
    layer.weight.data.copy_(value)
    return layer, sparsify(layer, **options)


def value_of(run: Sparsifier) -> float:
    penalty = run.penalty()
    assert isinstance(penalty, torch.Tensor)
    return float(penalty.detach())


def grad_of(layer: nn.Linear, run: Sparsifier) -> torch.Tensor:
    layer.zero_grad()
    penalty = run.penalty()
    assert isinstance(penalty, torch.Tensor)
    penalty.backward()
    assert layer.weight.grad is not None
    return layer.weight.grad.clone()


def test_the_penalty_is_the_strategy_times_the_strength() -> None:
    w = torch.randn(5, 7, dtype=torch.float64)
    omega = penalties.LogSum(eps=0.3)
    layer, run = one_weight(w, strategy=omega, strength=0.2)
    assert value_of(run) == pytest.approx(0.2 * float(omega.total(w)))
    torch.testing.assert_close(grad_of(layer, run), 0.2 * omega.gradient(w))


@pytest.mark.parametrize("groups", ["weights", "outputs", "inputs"])
def test_tikhonov_has_the_gradient_of_the_penalty_at_its_last_update(groups: str) -> None:
    w = torch.randn(5, 7, dtype=torch.float64)
    options = {"strategy": penalties.LogSum(eps=0.3), "strength": 0.2, "groups": groups}
    layer, run = one_weight(w, **options)
    other, ridge = one_weight(w, method="tikhonov", **options)
    assert ridge.penalty() == 0
    ridge.update()
    torch.testing.assert_close(grad_of(other, ridge), grad_of(layer, run))


@pytest.mark.parametrize("groups", ["outputs", "inputs"])
def test_groups_are_penalised_by_their_root_mean_square(groups: str) -> None:
    w = torch.randn(5, 7, dtype=torch.float64)
    omega = penalties.LogSum(eps=0.3)
    layer, run = one_weight(w, strategy=omega, strength=0.2, groups=groups)
    dim, members = (1, 7) if groups == "outputs" else (0, 5)
    norms = w.square().mean(dim).sqrt()
    assert value_of(run) == pytest.approx(0.2 * members * float(omega.total(norms)))
    # the quadratic that eta makes of it has the same gradient: m Omega'(n) w / (m n)
    expected = 0.2 * w / omega.eta(norms).unsqueeze(dim)
    torch.testing.assert_close(grad_of(layer, run), expected)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("groups", ["weights", "outputs"])
def test_prox_minimises_its_definition_with_the_steps_of_the_optimiser(kind: type, groups: str) -> None:
    layer = nn.Linear(3, 2, bias=False).double()
    optimiser = kind(layer.parameters(), 0.1)
    omega, strength = penalties.LogSum(eps=0.5), 0.7
    run = sparsify(
        layer, strategy=omega, strength=strength, method="prox", optimiser=optimiser, groups=groups
    )
    layer(torch.randn(4, 3, dtype=torch.float64)).square().mean().backward()
    optimiser.step()
    before = layer.weight.detach().clone()
    run.update()
    step = torch.full_like(before, 0.1)
    if kind is torch.optim.Adam:
        state = optimiser.state[layer.weight]
        step = 0.1 / ((state["exp_avg_sq"] / (1 - 0.999)).sqrt() + 1e-8)
    if groups == "outputs":
        step = 1 / step.reciprocal().mean(1)
        norm = before.square().mean(1).sqrt()
        expected = before * (omega.prox(norm, step * strength) / norm)[:, None]
    else:
        expected = omega.prox(before, step * strength)
    torch.testing.assert_close(layer.weight.detach(), expected)


@pytest.mark.parametrize("method", ["prox", "adaprox"])
@pytest.mark.parametrize("groups", ["outputs", "heads"])
def test_an_input_that_is_always_0_does_not_take_the_groups_that_read_it(method: str, groups: str) -> None:
    model = nn.MultiheadAttention(8, 2, bias=False) if groups == "heads" else nn.Linear(8, 3)
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    run = sparsify(model, method=method, groups=groups, strength=1e-3, optimiser=optimiser)
    w = run.weights[0].parameter
    w.grad = torch.randn(w.shape)
    w.grad[:, 1] = 0.0  # as a dead ReLU before it leaves it
    before = w.detach().clone()
    optimiser.step()
    run.update()
    assert float((w.detach() - before).norm()) < 0.1 * float(before.norm())


def test_adaprox_ends_where_the_penalty_does_but_for_the_order_of_its_step() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 3, dtype=torch.float64)
    y = x @ torch.tensor([[1.5, -0.6, 0.02]], dtype=torch.float64).T
    omega, strength = penalties.LogSum(eps=0.5), 0.05

    def end(method: str, lr: float) -> torch.Tensor:
        layer = nn.Linear(3, 1, bias=False).double()
        layer.weight.data.fill_(0.7)
        optimiser = torch.optim.SGD(layer.parameters(), lr)
        run = sparsify(layer, strategy=omega, strength=strength, method=method, optimiser=optimiser)
        for _ in range(int(60 / lr)):
            optimiser.zero_grad()
            ((layer(x) - y).square().mean() / 2 + run.penalty()).backward()
            optimiser.step()
            run.update()
        return layer.weight.detach()

    exact = end("prox", 0.1)
    far, near = ((end("adaprox", lr) - exact).abs().amax() for lr in (0.2, 0.02))
    assert near < far / 5
    assert near < 1e-3


@pytest.mark.parametrize("groups", ["weights", "outputs"])
def test_eta_learns_the_strategy_and_its_least_value_is_the_penalty(groups: str) -> None:
    w = torch.randn(5, 7, dtype=torch.float64)
    options: dict[str, Any] = {"strategy": penalties.LogSum(eps=0.3), "strength": 0.2, "groups": groups}
    _, run = one_weight(w, method="eta", **options)
    _, exact = one_weight(w, **options)
    assert float(run.survival_rates()["weight"].mean()) > 0.99
    assert value_of(run) > value_of(exact)
    search = torch.optim.LBFGS(
        [*run.parameters()],
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        search.zero_grad()
        penalty = run.penalty()
        assert isinstance(penalty, torch.Tensor)
        penalty.backward()
        return penalty

    search.step(closure)  # pyright: ignore[reportArgumentType]
    assert value_of(run) == pytest.approx(value_of(exact), rel=1e-9)
    torch.testing.assert_close(
        run.survival_rates()["weight"], exact.survival_rates()["weight"], rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("groups", ["weights", "outputs"])
@pytest.mark.parametrize("strategy", ["logsum", "mcp"])
def test_a_schedule_of_eta_can_begin_at_0(groups: str, strategy: str) -> None:
    model = nn.Linear(130, 130)
    options: dict[str, Any] = {"strategy": strategy, "strength": 0.1, "groups": groups}
    run = sparsify(model, method="eta", schedule=lambda step: min(step, 1), **options)
    (logit,) = run.parameters()
    before, penalty = logit.detach().clone(), run.penalty()
    assert isinstance(penalty, torch.Tensor) and value_of(run) == 0
    penalty.backward()
    assert logit.grad is not None and not bool(logit.grad.any()) and model.weight.grad is None
    assert bool((run.survival_rates()["weight"] == 1).all())
    torch.optim.Adam(run.parameters()).step()
    run.update()
    assert torch.equal(logit, before) and 0 < value_of(run) < math.inf


# --- targets -----------------------------------------------------------------------------------------------

METHODS = ["gradient", "tikhonov", "prox", "adaprox", "eta"]


@pytest.mark.parametrize("control", ["ramp", "strength"])
@pytest.mark.parametrize("method", METHODS)
def test_a_target_is_met_to_an_entry_and_stays(method: str, control: str) -> None:
    options = {"strategy": "logsum", "method": method, "target": 0.8, "steps": 40, "control": control}
    # a ridge of learned weights is stiff: plain gradient descent on it is not stable
    kind = torch.optim.Adam if method == "eta" else torch.optim.SGD
    run = train(make_model(), 40, kind=kind, **options)
    total = sum(w.parameter.numel() for w in run.weights)
    zeros = sum(int((w.parameter == 0).sum()) for w in run.weights)
    if (method, control) == ("prox", "strength"):  # the penalty itself makes zeros, here a few too many
        assert round(0.8 * total) <= zeros <= 0.85 * total
    else:
        assert zeros == round(0.8 * total)
    assert run.sparsity() == zeros / total


def test_the_ramp_takes_more_and_more_and_gives_nothing_back() -> None:
    model = make_model()
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    run = sparsify(model, strategy="magnitude", target=0.9, steps=50, every=5, ramp=(0.2, 0.8))
    x, gone, shares = torch.randn(32, 12), [torch.zeros_like(w.parameter) for w in run.weights], []
    for _ in range(50):
        optimiser.zero_grad()
        model(x).square().mean().backward()
        optimiser.step()
        run.update()
        for zeros, weight in zip(gone, run.weights, strict=True):
            assert bool((weight.parameter[zeros == 1] == 0).all())
        gone = [(w.parameter == 0).float() for w in run.weights]
        shares.append(run.sparsity())
    assert shares[:10] == [0.0] * 10
    assert shares == sorted(shares)
    assert shares[39:] == [shares[39]] * 11
    # half way up the ramp: 1 - (1 - 1/2)^3 of the target
    assert shares[24] == pytest.approx(0.9 * 7 / 8, abs=0.01)


def test_the_magnitudes_that_go_are_the_smallest_of_all_layers() -> None:
    model = make_model()
    before = torch.cat([m.weight.detach().abs().flatten() for m in model if isinstance(m, nn.Linear)])
    run = sparsify(model, strategy="magnitude", target=0.5, steps=2, ramp=(0.0, 0.5))
    run.update()
    kept = torch.cat([mask.flatten() for mask in run.masks().values()])
    assert before[kept].min() >= before[~kept].max()


def test_groups_are_ranked_within_what_is_usual_in_their_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 30), nn.ReLU(), nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 20))
    with torch.no_grad():
        model.get_parameter("2.weight").mul_(0.01)  # small as a whole: no reason to go as a whole
    options = {"strategy": "magnitude", "groups": "outputs", "target": 0.5, "steps": 1}
    run = sparsify(model, ramp=(0.0, 1.0), **options)
    run.update()
    for weight, mask in zip(run.weights, run.masks().values(), strict=True):
        assert 0.2 < float(mask.float().mean()) < 0.8
        kept = weight.magnitude(weight.parameter.detach())[mask]
        assert bool((kept > 0).all())
    assert not run.rescued


@pytest.mark.parametrize("groups", ["outputs", "inputs"])
def test_whole_groups_go(groups: str) -> None:
    run = train(make_model(), 20, strategy="magnitude", target=0.5, steps=20, groups=groups)
    dim = 1 if groups == "outputs" else 0
    for weight in run.weights:
        zero = weight.parameter == 0
        assert bool((zero.all(dim) == zero.any(dim)).all())
    total = sum(w.parameter.numel() for w in run.weights)
    zeros = sum(int((w.parameter == 0).sum()) for w in run.weights)
    assert zeros <= round(0.5 * total)
    assert zeros > 0.5 * total - 20


def test_two_of_four_neighbours_are_left_and_they_are_the_best() -> None:
    model = make_model()
    before = [m.weight.detach().abs() for m in model if isinstance(m, nn.Linear)]
    run = sparsify(model, strategy="magnitude", groups="2:4", steps=1, ramp=(0.0, 1.0))
    run.update()
    for weight, old in zip(run.weights, before, strict=True):
        kept = weight.parameter.detach().ne(0).unflatten(1, (-1, 4))
        assert bool((kept.sum(-1) == 2).all())
        best = old.unflatten(1, (-1, 4)).topk(2, -1).indices
        assert bool(torch.gather(kept, -1, best).all())


@pytest.mark.parametrize("control", ["ramp", "strength"])
@pytest.mark.parametrize("groups", ["outputs", "inputs"])
def test_what_is_left_of_a_layer_is_a_multiple(groups: str, control: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 18), nn.ReLU(), nn.Linear(18, 16))
    options = {"strategy": "logsum", "groups": groups, "target": 0.6, "steps": 40, "control": control}
    run = train(model, 40, multiple=4, **options)
    left = [int(mask.sum()) for mask in run.masks().values()]
    whole = [mask.numel() for mask in run.masks().values()]
    assert all(n % 4 == 0 or n == all_of_it for n, all_of_it in zip(left, whole, strict=True)), left
    most = max(4 * weight.members for weight in run.weights)
    total = sum(weight.parameter.numel() for weight in run.weights)
    assert 0.6 - most / total < run.sparsity() <= 0.6


def test_packs_go_by_their_mean_whole_and_for_good() -> None:
    scores = torch.tensor([0.9, 0.1, 0.8, 0.2, 0.5])  # in twos: .9 .8, .5 .2, and .1 alone
    weight = Weight("w", nn.Parameter(torch.zeros(5, 2)), "outputs", 0)
    for share, kept in [(0.1, [0, 1, 2, 3, 4]), (0.2, [0, 2, 3, 4]), (0.5, [0, 2, 3, 4]), (0.6, [0, 3])]:
        masks, rescued = masks_for([weight], [scores], share, 2)
        assert masks[0].nonzero()[:, 0].tolist() == kept and not rescued
        scores = scores.masked_fill(~masks[0], -math.inf)
        scores[[0, 3]] = 1.0  # what grows takes the place of others
    masks, rescued = masks_for([weight], [scores], 0.99, 2)
    assert int(masks[0].sum()) == 2 and rescued == ["w"]


def test_packs_of_one_are_single_groups() -> None:
    torch.manual_seed(0)
    weights = [Weight(str(i), nn.Parameter(torch.randn(9 + i, 3)), "outputs", 0) for i in range(3)]
    scores = [weight.magnitude() for weight in weights]
    for share in (0.2, 0.5, 0.9):
        plain, packed = (masks_for(weights, scores, share, *more)[0] for more in ((), (1,)))
        assert all(torch.equal(a, b) for a, b in zip(plain, packed, strict=True))


def test_a_layer_is_never_emptied_and_says_so() -> None:
    model = make_model()
    with torch.no_grad():
        model.get_parameter("2.weight").mul_(1e-3)
    run = sparsify(model, strategy="magnitude", target=0.9, steps=1, ramp=(0.0, 1.0))
    run.update()
    assert run.rescued == ["2.weight"]
    assert int(model.get_parameter("2.weight").count_nonzero()) == 1
    assert "2.weight would be empty" in str(run)


def test_a_layer_that_survival_rates_would_empty_is_named_once() -> None:
    model = make_model()
    with torch.no_grad():
        model.get_parameter("2.weight").mul_(1e-6)
    run = sparsify(model, strategy=penalties.LogSum(2.0), strength=1e-3)
    for _ in range(2):
        hardened = run.hardened()
        assert int(hardened.get_parameter("2.weight").count_nonzero()) == 1
        for name, mask in run.masks().items():
            assert torch.equal(mask, hardened.get_parameter(name) != 0)
    assert run.rescued == ["2.weight"]


def test_the_controller_of_strength_follows_its_ramp() -> None:
    model = make_model()
    run = train(
        model, 400, strategy=penalties.LogSum(eps=0.1), strength=1e-6, target=0.7, steps=400,
        control="strength", method="prox", every=2, ramp=(0.0, 0.9),
    )  # fmt: skip
    assert run.current_strength > 1e-5
    assert run.sparsity() == pytest.approx(0.7, abs=0.002)


def test_without_a_target_the_survival_rates_decide() -> None:
    layer, run = one_weight(
        torch.tensor([[0.001, 0.2, 3.0]], dtype=torch.float64), strategy=penalties.LogSum(2.0), strength=0.05
    )
    rates = run.survival_rates()["weight"]
    eta = torch.tensor([[0.001 * 2.001, 0.2 * 2.2, 15.0]], dtype=torch.float64)
    torch.testing.assert_close(rates, eta / (eta + 0.05))
    assert run.masks()["weight"].tolist() == [[False, True, True]]
    assert run.sparsity() == pytest.approx(1 / 3)
    run.harden()
    assert layer.weight.tolist() == [[0.0, 0.2, 3.0]]


def test_a_schedule_moves_the_strength() -> None:
    _, run = one_weight(torch.ones(2, 2), strategy="logsum", strength=0.4, schedule=schedules.warmup(4))
    found = []
    for _ in range(6):
        found.append(run.current_strength)
        run.update()
    assert found == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.4])


# --- what it leaves alone ----------------------------------------------------------------------------------


def test_biases_norms_and_embeddings_are_left_alone_and_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm([6, 6]), nn.Embedding(3, 4), nn.Conv2d(1, 2, 3))
    run = sparsify(model)
    assert [weight.name for weight in run.weights] == ["0.weight", "3.weight"]
    with pytest.raises(UsageError, match="0.bias is a bias"):
        sparsify(model, include="0.bias")
    with pytest.raises(UsageError, match="1.weight is a parameter of a norm"):
        sparsify(model, include=["1.weight"])
    with pytest.raises(UsageError, match="an embedding"):
        sparsify(model, include="2.weight")
    with pytest.raises(UsageError, match="did you mean '3.weight'"):
        sparsify(model, exclude="3.weigth")
    assert [w.name for w in sparsify(model, exclude="0.*").weights] == ["3.weight"]


def test_the_model_is_the_same_object_with_the_same_keys() -> None:
    model = make_model()
    keys, ids = [*model.state_dict()], [id(p) for p in model.parameters()]
    train(model, 5, strategy="logsum", method="adaprox")
    assert [*model.state_dict()] == keys
    assert [id(p) for p in model.parameters()] == ids


def test_a_hardened_copy_leaves_the_model_as_it_is() -> None:
    model = make_model()
    run = train(model, 10, strategy="logsum", strength=1e-2)
    before = copy.deepcopy(model.state_dict())
    copied = run.hardened()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    zeros = sum(int((p == 0).sum()) for p in copied.parameters() if p.dim() > 1)
    assert zeros == round(run.sparsity() * sum(w.parameter.numel() for w in run.weights))


def test_heads_are_groups_of_columns_of_the_projection() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=4)
    run = sparsify(model, groups="heads", strategy="magnitude", target=1 / 3, steps=1, ramp=(0.0, 1.0))
    assert [(w.name, w.count, w.size) for w in run.weights] == [
        ("blocks.0.attn.proj.weight", 3, 64),
        ("blocks.1.attn.proj.weight", 3, 64),
    ]
    run.update()
    for weight in run.weights:
        zero = (weight.parameter == 0).all(0).unflatten(0, (3, 64))
        assert bool((zero.all(1) == zero.any(1)).all())


# --- failures ----------------------------------------------------------------------------------------------


def test_what_is_not_finite_is_refused_and_changes_nothing() -> None:
    model = make_model()
    run = sparsify(model, strategy="magnitude", target=0.5, steps=2, ramp=(0.0, 1.0))
    run.update()
    state = copy.deepcopy(run.state_dict())
    with torch.no_grad():
        run.weights[0].parameter[0, 0] = math.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RunError, match=r"0.weight has NaN or infinite entries after 1 steps"):
        run.update()
    with pytest.raises(RunError, match="NaN"):
        run.harden()
    assert run.time == state["time"]
    for key, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(7), before[key].nan_to_num(7))
    with pytest.raises(UsageError, match="NaN"):
        sparsify(model)


def test_options_that_cannot_be_are_refused() -> None:
    model = make_model()
    cases: list[tuple[dict[str, Any], type, str]] = [
        ({"target": 1.0, "steps": 10}, UsageError, "between 0 and 1"),
        ({"target": 0.5}, UsageError, "needs steps="),
        ({"method": "adaprox"}, UsageError, "pass optimiser="),
        ({"method": "newton"}, UsageError, "method must be"),
        ({"strategy": "logsun"}, UsageError, "logsum"),
        ({"strategy": penalties.LogSum}, ArgumentError, "must be a penalty"),
        ({"strategy": "magnitude"}, UsageError, "needs target="),
        ({"strength": -1.0}, UsageError, "strength"),
        ({"strength": math.nan}, UsageError, "strength"),
        ({"groups": "4:2", "steps": 1}, UsageError, "N below M"),
        ({"groups": "rows"}, UsageError, "groups must be"),
        ({"cut": 1.0}, UsageError, "cut"),
        ({"ramp": (0.9, 0.1), "target": 0.5, "steps": 9}, UsageError, "begin <= end"),
        ({"multiple": 8, "groups": "outputs"}, UsageError, "with a target, got 8"),
        ({"multiple": 8, "target": 0.5, "steps": 9}, UsageError, 'multiple is of groups "outputs"'),
        ({"multiple": 0, "groups": "outputs", "target": 0.5, "steps": 9}, UsageError, "multiple must be"),
        ({"optimizer": None}, ArgumentError, "did you mean optimiser"),
    ]
    for options, kind, text in cases:
        with pytest.raises(kind, match=text):
            sparsify(model, **options)
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    run = sparsify(model, method="adaprox", optimiser=other)
    with pytest.raises(UsageError, match="does not move 0.weight"):
        run.update()


# --- checkpoints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("control", ["ramp", "strength"])
def test_a_resumed_run_goes_on_bit_for_bit(method: str, control: str) -> None:
    x, y = torch.randn(32, 12), torch.randint(0, 4, (32,))
    options: dict[str, Any] = {"method": method, "target": 0.7, "steps": 30, "control": control, "every": 3}

    def start() -> tuple[nn.Module, torch.optim.Optimizer, Sparsifier]:
        model = make_model()
        optimiser = torch.optim.Adam(model.parameters(), 0.02)
        run = sparsify(model, optimiser=optimiser, **options)
        own = [*run.parameters()]
        if own:
            optimiser.add_param_group({"params": own})
        return model, optimiser, run

    def go(model: nn.Module, optimiser: torch.optim.Optimizer, run: Sparsifier, steps: int) -> None:
        for _ in range(steps):
            optimiser.zero_grad()
            (nn.functional.cross_entropy(model(x), y) + run.penalty()).backward()
            optimiser.step()
            run.update()

    whole = start()
    go(*whole, 30)
    first = start()
    go(*first, 13)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    second = start()
    for part, state in zip(second, states, strict=True):
        part.load_state_dict(state)
    go(*second, 17)
    for key, value in whole[0].state_dict().items():
        assert torch.equal(value, second[0].state_dict()[key])
    assert whole[2].state_dict()["factor"] == second[2].state_dict()["factor"]


def test_the_state_of_other_weights_is_refused() -> None:
    model = lenet300(image=4, widths=(6, 5))
    run = sparsify(model, strategy="magnitude", target=0.5, steps=1, ramp=(0.0, 1.0))
    run.update()
    other = sparsify(model, strategy="magnitude", target=0.5, steps=1, exclude="linear3.weight")
    with pytest.raises(UsageError, match="other weights"):
        other.load_state_dict(run.state_dict())

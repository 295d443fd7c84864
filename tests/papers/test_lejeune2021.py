"""The pieces of lejeune2021: figure 1 against formulas, trainings against naive loops, words and numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import optimize, special
from torch import Tensor
from torch.nn import functional as F

from fallow.errors import UsageError
from fallow.papers import lejeune2021, shelf
from fallow.papers._experiments import Cell
from fallow.papers.lejeune2021 import beyond as lejeune_beyond
from fallow.papers.lejeune2021 import figure as lejeune_figure
from fallow.papers.lejeune2021 import results as lejeune_results
from fallow.papers.lejeune2021 import sizes as lejeune_sizes
from fallow.papers.lejeune2021 import train as lejeune_train
from fallow.papers.lejeune2021.methods import METHODS
from fallow.papers.lejeune2021.penalised import FaultyLogSum, Multiplied
from fallow.papers.lejeune2021.trainee import Plan, Trainee

PAPER, PUBLISHED = shelf.PAPERS["lejeune2021"], shelf.AS_PUBLISHED["lejeune2021"]
ROOT = Path(__file__).parents[2]


def plain(_: str, compute: Any) -> Any:
    """Pieces that keep nothing."""
    return compute()


# --- the experiments as data -----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", list(PAPER.scales))
def test_cells_are_data_with_names_of_their_own(scale: str):
    cells = PAPER.cells(PAPER.items, scale)
    by_item = {cell.name: cell for item in PAPER.items for cell in item.cells.get(scale, ())}
    assert len(by_item) == len(cells) and all("/" not in name for name in by_item)
    for cell in (cell for item in PAPER.items for cell in item.cells.get(scale, ())):
        assert by_item[cell.name].options == cell.options
        assert json.loads(json.dumps(dict(cell.options))) == cell.options and cell.minutes > 0


def test_the_full_scale_has_the_settings_of_the_notes():
    rates = {"vardrop-lr": 1e-3, "vardrop": 1e-3, "eta-trick": 1e-3, "eta-trick-published": 1e-3}
    cells = {item.name: item.cells["full"] for item in PAPER.items}["table"]
    assert len(cells) == 8 * 3
    for cell in cells:
        options = cell.options
        assert (options["data"], options["epochs"], options["batch_size"]) == ("mnist", 200, 128)
        assert options["validation"] and not options["shift"] and not options["settings"]
        assert options["learning_rate"] == rates.get(options["method"], 1e-4)


def test_as_published_has_the_same_cells_and_is_of_this_paper_alone():
    for scale in PAPER.scales:
        assert PAPER.cells(PAPER.items, scale) == PUBLISHED.cells(PUBLISHED.items, scale)
    assert shelf.paper_of("lejeune2021", as_published=True) is PUBLISHED is lejeune2021.PUBLISHED
    assert shelf.paper_of("lejeune2021") is PAPER
    with pytest.raises(UsageError, match="--as-published is for lejeune2021 alone"):
        shelf.paper_of("hayou2021", as_published=True)


def test_the_authors_numbers_are_known_from_their_notebooks_and_none_is_the_papers():
    known = [one for item in PAPER.items for one in item.known]
    assert all(one.value is None for one in known if one.label == "paper")
    theirs = {one.name: one.value for one in known if "notebooks" in one.source}
    assert len(theirs) == 14 and all(one.label == "lit" for one in known if "notebooks" in one.source)
    assert theirs["AdaTikhonov: test error in %"] == 2.88
    weights = {"vardrop-lr-ar": 6333, "vardrop-lr": 23555, "vardrop": 158282, "eta-trick": 13666}
    weights |= {"adaprox": 7336, "adatikhonov": 4866, "logsum": 5046}
    for method, (_, fraction) in lejeune_results.AUTHORS.items():
        assert round(fraction * 266200) == weights[method]


def test_tiny_should_take_less_than_five_minutes_on_two_cores():
    assert sum(cell.minutes for cell in PAPER.cells(PAPER.items, "tiny")) / 2 < 5


# --- figure 1 --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def figure1() -> dict[str, Any]:
    return lejeune_figure.penalties_cell(points=100, size=32, kept=16, pieces=plain)


def var_drop(w: np.ndarray) -> np.ndarray:
    """Omega by its definition: the least of (w^2 / eta + f(eta)) / 2 with f by quadrature of Dawson's."""
    grid = np.linspace(0, 1, 4001)

    def f(eta: float) -> float:
        top = math.sqrt(eta / 2)
        return 4 * top * np.trapezoid(special.dawsn(top * grid), grid)

    def least(x: float) -> float:
        found = optimize.minimize_scalar(
            lambda log: (x * x / math.exp(log) + f(math.exp(log))) / 2, bounds=(-8, 6), method="bounded"
        )
        return found.fun

    return np.array([least(x) for x in w])


def hard_concrete(w: np.ndarray) -> np.ndarray:
    """Omega at c = 1/2 by its definition: the least over log a of w^2 Var s / (2 (E s)^2) + P(s > 0) / 2."""
    t = np.linspace(-40, 40, 20001)
    chance = special.expit(t) * special.expit(-t) * (t[1] - t[0])
    costs, ratios = [], []
    for log_a in np.linspace(-12, 25, 1201):
        s = np.clip(special.expit((t + log_a) * 1.5) * 1.2 - 0.1, 0, 1)
        mean = (chance * s).sum()
        costs.append(special.expit(log_a - 2 / 3 * math.log(0.1 / 1.1)))
        ratios.append((chance * s * s).sum() / mean**2 - 1)
    return (w[:, None] ** 2 * np.array(ratios) / 2 + np.array(costs) / 2).min(1)


def test_the_scalar_penalties_are_their_formulas(figure1: dict[str, Any]):
    w = np.array(figure1["weights"])
    assert len(w) == 100 and math.isclose(w[0], 0.01) and math.isclose(w[-1], 5)
    np.testing.assert_allclose(w[1:] / w[:-1], 500 ** (1 / 99))
    mcp = math.sqrt(2) * np.where(w < 0.5 * math.sqrt(2), w - w * w / math.sqrt(2), math.sqrt(2) / 4)
    expected = {
        "Standout": (1 - (1 + w) * np.exp(-w), 1e-12),
        "LogSum(2)": (2 * np.log(w + 2), 1e-12),
        "MCP(1/2, √2)": (mcp, 1e-12),
        "VarDrop": (var_drop(w), 1e-6),
        "HardConcrete": (hard_concrete(w), 2e-4),  # a grid over gates and quantiles
    }
    assert set(expected) == set(figure1["scalar"])
    for name, (value, bound) in expected.items():
        np.testing.assert_allclose(figure1["scalar"][name], value - value[0], atol=bound, err_msg=name)


def test_the_distances_that_the_notes_give(figure1: dict[str, Any]):
    scalar = figure1["scalar"]
    assert math.isclose(lejeune_figure.gap(scalar, "VarDrop", "LogSum(2)"), 0.32, abs_tol=0.005)
    assert math.isclose(lejeune_figure.gap(scalar, "HardConcrete", "MCP(1/2, √2)"), 0.032, abs_tol=0.001)
    said = lejeune_figure.figure([(Cell("penalties", {}), figure1)])["statements"][0]
    assert "at most 0.32 apart" in said and "at most 0.032" in said


def test_the_vectors_have_length_one_and_the_hard_threshold_sixteen_entries(figure1: dict[str, Any]):
    x = lejeune_figure.vectors(32)
    assert x.shape == (33, 32) and x.count_nonzero(1).tolist() == list(range(33)) == figure1["counts"]
    k = torch.arange(1, 33, dtype=torch.float64)
    torch.testing.assert_close(x[1:].square().sum(1), k / (k + 1e-3))
    vector = figure1["vector"]
    assert vector["HardThresh(16)"] == [0.0] * 17 + [None] * 16
    for name, values in vector.items():
        assert values[0] == 0.0, name  # attained at k = 0
        assert name.startswith("Hard") or values == sorted(values)
    entry = 1 / math.sqrt(9 + 1e-3)
    assert math.isclose(vector["LogSum(2)"][9], 2 * 9 * math.log1p(entry / 2))
    assert math.isclose(vector["Standout"][9], 9 * (1 - (1 + entry) * math.exp(-entry)))


def test_the_plot_steps_up_where_the_hard_threshold_is_infinite(figure1: dict[str, Any]):
    panels = lejeune_figure.figure([(Cell("penalties", {}), figure1)])["panels"]
    curve = next(one for one in panels[1]["series"] if one["name"] == "HardThresh(16)")
    highest = max(y for one in panels[1]["series"] if one is not curve for y in one["y"])
    assert curve["x"][-2:] == [16, 16] and curve["y"][-2] == 0 and curve["y"][-1] > highest


# --- the faulty dual -------------------------------------------------------------------------------------


def test_the_faulty_dual_has_the_values_of_the_notes():
    eta, strength = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64), 1e-3
    added = 1e-3 * (eta / strength).log()
    faulty = FaultyLogSum(2.0, strength)
    expected = torch.tensor([0.00058, 0.03331, 0.24975], dtype=torch.float64)
    torch.testing.assert_close(faulty.dual(eta) - added - 2 * math.log(2), expected, atol=5e-6, rtol=0)
    right = torch.tensor([0.02440, 0.20488, 0.66995], dtype=torch.float64)
    found = faulty.right.dual(eta)
    torch.testing.assert_close(found - found.new_tensor(0.0), right, atol=5e-6, rtol=0)


@pytest.mark.parametrize(
    ("w", "slope"), [(1e-4, 10.0), (1e-3, 1.0001), (1e-2, 0.15074), (0.1, 0.19812), (1.0, 0.22762)]
)
def test_the_faulty_eta_trick_has_the_effective_slope_of_the_notes(w: float, slope: float):
    """Where w^2 / eta + f(eta) is least, the slope of the penalty is w / eta."""
    faulty = FaultyLogSum(2.0, 1e-3)

    def derivative(log: float) -> float:
        eta = torch.tensor(math.exp(log), dtype=torch.float64, requires_grad=True)
        (w * w / eta + faulty.dual(eta)).backward()
        assert eta.grad is not None
        return float(eta.grad)

    log: Any = optimize.brentq(derivative, -25, 10, xtol=1e-12)
    assert math.isclose(w / math.exp(log), slope, rel_tol=1e-4)


# --- trainings against naive loops -----------------------------------------------------------------------


def made(method: str, seed: int = 0, pixels: int = 12, rate: float = 1e-2, **settings: Any) -> Trainee:
    """A small network under a method, in its first epoch."""
    draws = torch.Generator().manual_seed(seed)
    plan = Plan(10, 30, 50, rate, draws, settings)
    trainee = METHODS[method].make(lejeune_train._network(pixels, seed), plan)
    trainee.begin(0)
    return trainee


def batches(count: int = 3, pixels: int = 12) -> list[tuple[Tensor, Tensor]]:
    draws = torch.Generator().manual_seed(7)
    return [
        (torch.randn(16, pixels, generator=draws), torch.randint(10, (16,), generator=draws))
        for _ in range(count)
    ]


def steps(trainee: Trainee, given: list[tuple[Tensor, Tensor]], last: bool = False) -> None:
    for place, (x, y) in enumerate(given):
        trainee.optimiser.zero_grad()
        trainee.loss(F.cross_entropy(trainee.model(x), y)).backward()
        trainee.optimiser.step()
        trainee.update(last and place == len(given) - 1)


def weights_of(trainee: Trainee) -> list[Tensor]:
    return [p.detach().clone() for name, p in trainee.model.named_parameters() if name.endswith("weight")]


def fit(log_alpha: Tensor) -> Tensor:
    """Molchanov's divergence, to a constant."""
    return 0.63576 * torch.sigmoid(-1.8732 - 1.48695 * log_alpha) + 0.5 * torch.log1p(torch.exp(-log_alpha))


def naive_additive(given: list[tuple[Tensor, Tensor]], rate: float) -> list[Tensor]:
    """VarDrop+LR+AR as the notes have it: W and log sigma under one Adam, noise on the activations."""
    draws = torch.Generator().manual_seed(0)
    network = lejeune_train._network(12, 0)
    layers = [module for module in network.modules() if isinstance(module, torch.nn.Linear)]
    with torch.no_grad():
        for layer in layers:
            layer.weight.normal_(0, 0.02, generator=draws)
            layer.bias.zero_()
    sigmas = [torch.full_like(layer.weight, -5.0, requires_grad=True) for layer in layers]
    optimiser = torch.optim.Adam([*network.parameters(), *sigmas], rate)
    for x, y in given:
        for place, (layer, log_sigma) in enumerate(zip(layers, sigmas, strict=True)):
            mean, variance = layer(x), x.square() @ (2 * log_sigma).exp().T + 1e-8
            x = mean + variance.sqrt() * torch.randn(mean.shape, generator=draws)
            x = x.relu() if place < 2 else x
        alphas = [2 * s - (layer.weight**2 + 1e-8).log() for s, layer in zip(sigmas, layers, strict=True)]
        loss = 50 * F.cross_entropy(x, y) + sum(fit(a.clamp(-10, 10)).sum() for a in alphas)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return [layer.weight.detach() for layer in layers]


def test_additive_variational_dropout_is_the_naive_loop_on_log_sigma():
    """Though `variational_` learns log sigma^2: at twice the rate."""
    trainee, given = made("vardrop-lr-ar", rate=1e-3), batches(4)
    steps(trainee, given)
    for ours, naive in zip(weights_of(trainee), naive_additive(given, 1e-3), strict=True):
        torch.testing.assert_close(ours, naive, atol=2e-6, rtol=1e-3)


def test_adaprox_is_cut_by_the_rates_of_its_last_step():
    trainee, given = made("adaprox", rate=1e-1), batches(3)
    assert isinstance(trainee, Multiplied)
    steps(trainee, given[:2])
    x, y = given[2]
    trainee.optimiser.zero_grad()
    F.cross_entropy(trainee.model(x), y).backward()
    trainee.optimiser.step()
    before = weights_of(trainee)
    trainee.update(True)
    parameters = [p for name, p in trainee.model.named_parameters() if name.endswith("weight")]
    seen = set()
    for w, after, mask, p in zip(
        before, weights_of(trainee), trainee.masks().values(), parameters, strict=True
    ):
        second = trainee.optimiser.state[p]["exp_avg_sq"] / (1 - 0.999**3)
        eta = w.abs() * (w.abs() + 2)
        rate = eta / (eta + 1e-3 * 0.1 / (second.sqrt() + 1e-8))
        torch.testing.assert_close(after, w * rate)
        sure = (rate - 0.05).abs() > 1e-6
        assert torch.equal(mask[sure], (rate >= 0.05)[sure])
        seen |= set(mask.flatten().tolist())
    assert seen == {True, False}
    (by_strength,) = {  # alpha < .05 where |w| is below the root of w (w + 2) = lambda .05 / .95
        torch.equal(mask, p.abs() >= math.sqrt(1 + 1e-3 * 0.05 / 0.95) - 1)
        for mask, p in zip(trainee.masks_by_strength().values(), parameters, strict=True)
    }
    assert by_strength


def test_adatikhonov_is_logsum_after_the_first_step_of_ridge():
    """From the second step on the same gradient, as long as no weight is tiny."""
    first, second = made("logsum", rate=1e-4), made("adatikhonov", rate=1e-4)
    x, y = batches(1)[0]
    second.update(False)  # survival rates of the weights as they are
    losses = []
    for trainee in (first, second):
        trainee.loss(F.cross_entropy(trainee.model(x), y)).backward()
        losses.append([p.grad for p in trainee.model.parameters()])
    for one, other in zip(*losses, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_the_eta_trick_minimises_the_objective_of_the_notes():
    for method, dual in (
        (
            "eta-trick",
            lambda eta: 2 * torch.log1p((r := (4 + 4 * eta).sqrt()) / 4 - 0.5) - (r - 2) ** 2 / (4 * eta),
        ),
        (
            "eta-trick-published",
            lambda eta: (
                2 * (((r := (4 + 4 * eta).sqrt()) + 2) / 2).log()
                - 2 * (r - 2) ** 2 / (4 * eta)
                + 1e-3 * (eta / 1e-3).log()
            ),
        ),
    ):
        trainee = made(method)
        expected = sum(
            (w.square() / (1e-3 * math.exp(5)) + dual(torch.full_like(w, 1e-3 * math.exp(5)).double())).sum()
            for w in weights_of(trainee)
        )
        found = trainee.loss(torch.zeros(()))
        torch.testing.assert_close(found, (0.5e-3 * expected).float(), rtol=1e-4, atol=0)  # pyright: ignore


def test_schedules_of_rates_and_of_the_divergence():
    linear, sparse = made("logsum"), made("sparse-vd")
    rates, weights = {"logsum": [], "sparse-vd": []}, []
    for epoch in range(10):
        for name, trainee in (("logsum", linear), ("sparse-vd", sparse)):
            trainee.begin(epoch)
            rates[name].append(trainee.optimiser.param_groups[0]["lr"] / 1e-2)
        weights.append(sparse.weight)  # pyright: ignore[reportAttributeAccessIssue]
    torch.testing.assert_close(rates["logsum"], [1 - epoch / 10 for epoch in range(10)])
    torch.testing.assert_close(rates["sparse-vd"], [1.0] * 6 + [0.8, 0.6, 0.4, 0.2])
    assert weights == [0.0] + [1.0] * 9  # risen between 2.5 % and 10 %


# --- whole cells -----------------------------------------------------------------------------------------

SHORT = {"data": "digits", "validation": True, "epochs": 2, "batch_size": 128, "shift": 0, "seed": 0}


class Kept:
    """Pieces that keep what they are given, as files would; `only` so many of them."""

    def __init__(self, kept: dict[str, str] | None = None) -> None:
        self.kept = dict(kept or {})

    def __call__(self, name: str, compute: Any) -> Any:
        if name not in self.kept:
            self.kept[name] = json.dumps(compute())
        return json.loads(self.kept[name])


@pytest.mark.parametrize("method", METHODS)
def test_a_cell_of_each_method_runs_and_goes_on_where_it_was(method: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lejeune_train, "_SHORTEST", 1)
    settings = {"target": 0.9} if method in (lejeune_sizes.PEER, *lejeune_sizes.OURS) else {}
    options = {**SHORT, "method": method, "learning_rate": 5e-3, "settings": settings}
    whole = Kept()
    found = lejeune_train.train_cell(**options, pieces=whole)
    assert set(whole.kept) == {"epochs0", "epochs1"}
    torch.manual_seed(3)  # whatever the global generator held makes no difference
    again = lejeune_train.train_cell(**options, pieces=Kept({"epochs0": whole.kept["epochs0"]}))
    assert again == found
    assert len(found["curve"]["fraction"]) == 2 and found["curve"]["fraction"][-1] == found["fraction"]
    assert found["all_weights"] == 64 * 300 + 300 * 100 + 1000
    assert math.isclose(found["weights"], found["fraction"] * found["all_weights"])
    assert (found["trained_on"], found["validated_on"], found["tested_on"]) == (1150, 287, 360)
    assert 0 <= found["test_error"] < 0.95 and found["curve"]["train_loss"][-1] < 2.31
    if settings:
        assert math.isclose(found["fraction"], 0.1, abs_tol=1e-4)


def test_the_cut_network_is_the_one_that_is_tested():
    trainee = made("magnitude", target=0.5)
    steps(trainee, batches(30))
    masks = trainee.masks()
    layers = lejeune_train._network_of(trainee, masks)
    x = torch.randn(5, 12)
    model = trainee.model.eval()
    with torch.no_grad():
        for parameter, (weight, _) in zip([*model.parameters()][::2], layers, strict=True):
            assert (weight == 0).sum() >= (~masks_of(masks, weight)).sum() > 0
            parameter.copy_(weight)
        expected = model(x).argmax(1)
    images = lejeune_train.Images(x, expected)
    assert lejeune_train._error(layers, images) == 0.0
    assert lejeune_train._error(layers, lejeune_train.Images(x, (expected + 1) % 10)) == 1.0


def masks_of(masks: dict[str, Tensor], weight: Tensor) -> Tensor:
    return next(mask for mask in masks.values() if mask.shape == weight.shape)


def test_shifted_batches_are_images_moved_by_one_pixel_each_once():
    train, held, _ = lejeune_train._parts("digits", None, True, 1)
    again, _, _ = lejeune_train._parts("digits", None, True, 0)
    assert torch.equal(train.x, again.x) and len(held.y) == 287
    background = float(train.x.min())
    padded = F.pad(train.x.view(-1, 8, 8), (1,) * 4, value=background)
    seen, places = [], set()
    for x, y in train.batches(128, torch.Generator().manual_seed(0)):
        seen += y.tolist()
        for image in x.view(-1, 8, 8)[:10]:
            hits = [
                (down, right)
                for down in range(3)
                for right in range(3)
                if bool((padded[:, down : down + 8, right : right + 8] == image).all((1, 2)).any())
            ]
            assert hits
            places |= set(hits)
    assert sorted(seen) == sorted(train.y.tolist()) and len(places) == 9


# --- words follow numbers --------------------------------------------------------------------------------


def results(
    method: str, error: float, fraction: float, spread: float = 0.0, data: str = "mnist", **tags: Any
) -> list[tuple[Cell, dict[str, Any]]]:
    """Cells of three seeds."""
    found = []
    for seed in range(3):
        share = fraction * (1 + spread * (seed - 1))
        result = {"test_error": error / 100 + 1e-4 * (seed - 1), "fraction": share, "all_weights": 266200}
        result |= {"weights": round(share * 266200), "neurons": [10, 5], "trained_on": 48000}
        result |= {"validated_on": 12000, "tested_on": 10000}
        result["curve"] = {"fraction": [1.0, 0.5, share], "validation_error": [0.1, 0.05, 0.02]}
        options = {"data": data, "epochs": 200}
        found.append((Cell(f"{method}{seed}", options, {"method": method, "seed": seed, **tags}), result))
    return found


def as_authors(**other: tuple[float, float]) -> list[tuple[Cell, dict[str, Any]]]:
    numbers = {**lejeune_results.AUTHORS, "eta-trick-published": lejeune_results.AUTHORS["eta-trick"]}
    numbers |= {name.replace("_", "-"): value for name, value in other.items()}
    return [cell for name, (error, fraction) in numbers.items() for cell in results(name, error, fraction)]


def test_the_authors_own_numbers_agree_in_all_seven():
    gathered = lejeune_results.methods(as_authors())
    assert "7 of 7 methods agree" in gathered["statements"][1]
    assert [row[-2] for row in gathered["tables"][0]["rows"]] == ["both"] * 8
    assert not [words for words in gathered["statements"] if words.startswith("Outside")]


@pytest.mark.parametrize(
    ("error", "factor", "agree", "where"),
    [
        (0.49, 1.0, "both", None),
        (-0.51, 1.0, "compression", "in error:"),
        (0.0, 1.24, "both", None),
        (0.0, 0.76, "both", None),
        (0.0, 1.26, "error", "in compression:"),
        (0.0, 0.74, "error", "in compression:"),
        (0.6, 2.0, "neither", "in error and compression:"),
    ],
)
def test_agreement_is_within_half_a_point_and_a_quarter(
    error: float, factor: float, agree: str, where: str | None
):
    theirs, fraction = lejeune_results.AUTHORS["adaprox"]
    gathered = lejeune_results.methods(as_authors(adaprox=(theirs + error, fraction / factor)))
    row = next(row for row in gathered["tables"][0]["rows"] if row[0] == "AdaProx")
    assert row[-2] == agree
    outside = [words for words in gathered["statements"] if words.startswith("Outside")]
    assert (
        (outside == [])
        if where is None
        else (len(outside) == 1 and f"Outside, {where} AdaProx" in outside[0])
    )
    assert ("7 of 7" if where is None else "6 of 7") in gathered["statements"][1]


def test_another_cut_of_the_same_networks_is_told():
    made = as_authors()
    own = (result for cell, result in made if cell.tags["method"] == "adaprox")
    for result, fraction in zip(own, (0.02, 0.025, 0.04), strict=False):
        result["by_strength"] = {"test_error": fraction, "fraction": fraction}
    (said,) = (words for words in lejeune_results.methods(made)["statements"] if "where it is cut" in words)
    sizes = [one["by_strength"]["fraction"] for _, one in made if "by_strength" in one]
    assert len(sizes) > 1
    assert f"have {1 / max(sizes):.1f}x to {1 / min(sizes):.1f}x with" in said
    assert f"error of {100 * min(sizes):.2f} to {100 * max(sizes):.2f} %" in said


def test_as_published_counts_the_published_eta_trick_and_shows_both():
    found = as_authors(eta_trick=(2.2, 0.6))
    right, published = (lejeune_results.methods(found, as_published=flag) for flag in (False, True))
    assert "6 of 7" in right["statements"][1] and "7 of 7" in published["statements"][1]
    for gathered, last in ((right, "eta-Trick, as published"), (published, "eta-Trick")):
        assert len(gathered["tables"][0]["rows"]) == 8 and gathered["tables"][0]["rows"][-1][0] == last
        assert any(f"Beside the seven: {last} with" in words for words in gathered["statements"])
    drawn = {one["name"]: one["style"] for one in lejeune_results.curves(found, True)["panels"][0]["series"]}
    assert drawn["eta-Trick"] == "dashed" and drawn["eta-Trick, as published"] == "line" and len(drawn) == 8
    assert "60.0% of the weights" in " ".join(right["statements"])


def test_other_images_or_epochs_are_not_held_against_the_authors():
    gathered = lejeune_results.methods(results("logsum", 2.93, 0.0189557, data="digits"))
    assert gathered["tables"][0]["rows"][0][-2] == "–"
    assert "nothing is held against them" in gathered["statements"][1]
    assert not [words for words in gathered["statements"] if "agree" in words or "Outside" in words]


def test_a_network_that_is_empty_is_said_to_be():
    gathered = lejeune_results.methods(results("vardrop-lr-ar", 90.0, 0.0))
    row = gathered["tables"][0]["rows"][0]
    assert row[5] is None and row[-2] == "neither"
    assert any("lost all its weights in 3 of 3 seeds" in words for words in gathered["statements"])


def test_curves_are_means_over_seeds_and_say_what_the_end_does():
    gathered = lejeune_results.curves(results("logsum", 2.9, 0.02, spread=0.5))
    curve = gathered["panels"][0]["series"][0]
    assert curve["x"] == [1, 2, 3]
    torch.testing.assert_close(curve["y"], [1.0, 0.5, 0.02])
    long = results("logsum", 2.9, 0.02)
    for _, result in long:
        result["curve"]["fraction"] = [1.0] * 190 + [0.1] * 10
    said = lejeune_results.curves(long)["statements"]
    assert len(said) == 1 and "from 1.000 to 0.100 in the last eighth" in said[0]


@pytest.mark.parametrize("recipe", lejeune_sizes.OURS)
def test_recipes_are_compared_in_pairs_and_with_what_is_published(recipe: str):
    title = METHODS[recipe].title

    def found(ours: float) -> dict[str, Any]:
        tags: dict[str, Any] = {"shift": 0, "goal": 100}
        cells = [*results("magnitude", 2.0, 0.01, **tags), *results(recipe, ours, 0.01, **tags)]
        for place, (_, result) in enumerate(cells):
            result["test_error"] += 2e-5 * (place % 2)
        return dict(lejeune_beyond.beyond(cells))

    better, worse = found(1.8), found(2.4)
    assert any(f"{title} is better" in words for words in better["statements"])
    assert any("Gradual magnitude is better" in words for words in worse["statements"])
    said = [words for words in better["statements"] if "no worse in either" in words]
    assert len(said) == 1 and f"{title} at 100x and 1.80 %" in said[0] and "Sparse VD" in said[0]
    assert "Pruning" not in said[0]  # 1.59 %
    assert not [words for words in worse["statements"] if "no worse in either" in words]
    assert "no difference is shown" in " ".join(found(2.0)["statements"])


def test_two_seeds_call_no_recipe_better():
    tags: dict[str, Any] = {"shift": 0, "goal": 100}
    cells = [*results("magnitude", 2.0, 0.01, **tags), *results("logsum-target", 1.0, 0.01, **tags)]
    said = lejeune_beyond.beyond([pair for pair in cells if pair[0].tags["seed"] < 2])["statements"]
    assert any("too few seeds" in words for words in said)


def test_tuning_tries_no_fewer_settings_of_the_peer_and_names_the_chosen_ones():
    cells = {item.name: item.cells for item in PAPER.items}["tuning"]["small"]
    methods = ("magnitude", *lejeune_sizes.OURS)
    by_method = {method: [c for c in cells if c.tags["method"] == method] for method in methods}
    assert len(by_method["magnitude"]) > max(len(by_method[method]) for method in lejeune_sizes.OURS) > 8
    beyond = {item.name: item.cells for item in PAPER.items}["beyond"]["small"]
    for method, mine in by_method.items():
        chosen = [cell for cell in mine if cell.tags["used"]]
        assert len(chosen) == 1 and all(cell.options["validation"] for cell in mine)
        for cell in beyond:
            if cell.tags["method"] == method:
                own, other = (dict(c.options["settings"], target=0) for c in (cell, chosen[0]))
                assert own == other and cell.options["learning_rate"] == chosen[0].options["learning_rate"]
    found = [
        (cell, {"curve": {"validation_error": [0.9, 0.02 + 0.001 * place - 0.0045 * cell.tags["used"]]}})
        for mine in by_method.values()
        for place, cell in enumerate(mine)
    ]
    gathered = lejeune_beyond.tuning(found)
    errors = [row[3] for row in gathered["tables"][0]["rows"]]
    of_peer = errors[: len(by_method["magnitude"])]
    assert of_peer == sorted(of_peer)
    place = 1 + sum(error < next(r[3] for r in gathered["tables"][0]["rows"] if r[4]) for error in of_peer)
    assert f"the chosen one has the {lejeune_beyond._ordinal(place)} least" in gathered["statements"][0]


# --- what is committed -----------------------------------------------------------------------------------

COMMITTED = sorted((ROOT / "results" / "lejeune2021").glob("*.json"))


def test_the_committed_figure_is_that_of_the_penalties(figure1: dict[str, Any]):
    for path in COMMITTED:
        found = json.loads(path.read_text())
        item = next(one for one in found["items"] if one["name"] == "figure1")
        again = lejeune_figure.figure([(Cell("penalties", {}), figure1)])
        assert item["statements"] == again["statements"]
        for ours, kept in zip(again["tables"], item["tables"], strict=True):
            for row, other in zip(ours["rows"], kept["rows"], strict=True):
                numbers, kept_numbers = (
                    [value for value in one[1:] if value is not None] for one in (row, other)
                )
                assert row[0] == other[0] and numbers == pytest.approx(kept_numbers, rel=1e-9)

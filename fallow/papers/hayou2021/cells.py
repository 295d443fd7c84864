"""The cells of `hayou2021` that are no training runs: growth, Gaussian limit, penalty, toys.

Each is a function of its options alone, and what is long goes through `pieces`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fallow import rates
from fallow.explaining.gaussian import excess_kurtosis, ks_distance, lilliefors_level
from fallow.explaining.growth_simulation import simulate_growth
from fallow.explaining.random_networks import draw_masks
from fallow.papers.hayou2021.toys import DenseResNet, Task, fit, teacher_task
from fallow.recipes._batches import generator
from fallow.surgery import Handle

RULES = ("standard", "uniform", "linear", "sensemode")
NAMES = {"standard": "Standard", "uniform": "Uniform", "linear": "Linear", "sensemode": "SenseMode"}
Pieces = Callable[[str, Callable[[], Any]], Any]
_MASKS_AT_ONCE = 512
_GROUPS = 8  # of masks, for the standard error of a variance
_BINS = 30


def rates_of(rule: str, depth: int, budget: float) -> list[float]:
    """Survival rates of blocks of equal cost, first block first; "standard" is all ones."""
    if rule == "standard":
        return [1.0] * depth
    chosen = rates.linear(mean=budget) if rule == "linear" else rates.uniform(mean=budget)
    return list(chosen({str(place): 1 / depth for place in range(depth)}).values())


# --- growth of gradients ------------------------------------------------------------------------------


def growth_cell(
    kind: str, rule: str, budget: float, depth: int, width: int, draws: int, masks: int, pieces: Pieces
) -> dict[str, Any]:
    """Growth of |dloss/dy_l|^2 from the last layer to each other one, theory and simulation.

    Profiles run over the layers l = 0..L and are log2 of the second moment relative to layer L; the simulated
    one is the product of the mean factors of the blocks, which converges where the mean of the whole growth,
    carried by rare deep masks, does not.
    """

    def simulate() -> dict[str, Any]:
        found = simulate_growth(
            rates_of(rule, depth, budget), kind=kind, width=width, draws=draws, masks=masks, seed=0
        )
        theory, ours = found.theory.backward, found.backward
        return {
            "theory": _profile(theory.factors),
            "ours": _profile(ours.factors),
            "errors": _errors(ours.factors, ours.errors),
            "rate_theory": found.theory.rate,
            "rate": 2 ** (_profile(ours.factors)[0] / depth),
            "rate_error": 2 ** (_profile(ours.factors)[0] / depth)
            * math.log(2)
            * _errors(ours.factors, ours.errors)[0]
            / depth,
            "typical_theory": theory.log2_typical,
            "typical": ours.log2_median,
            "spread_theory": theory.log2_spread,
            "spread": ours.log2_spread,
            "slope": ours.slope,
        }

    return pieces("growth", simulate)


def _profile(factors: Sequence[float]) -> list[float]:
    """log2 of the growth from layer L down to layer l, for l = 0..L."""
    sums = [0.0]
    for factor in reversed(factors):
        sums.append(sums[-1] + math.log2(factor))
    return sums[::-1]


def _errors(factors: Sequence[float], errors: Sequence[float]) -> list[float]:
    """Standard errors of `_profile`, of independent factors."""
    sums = [0.0]
    for factor, error in zip(reversed(factors), reversed(errors), strict=True):
        sums.append(sums[-1] + (error / factor / math.log(2)) ** 2)
    return [math.sqrt(total) for total in sums[::-1]]


# --- law of a pre-activation over masks ------------------------------------------------------------------


def law_cell(
    scaled: bool,
    trained: bool,
    depth: int,
    width: int,
    budget: float,
    masks: int,
    steps: int,
    seed: int,
    pieces: Pieces,
) -> dict[str, Any]:
    """The law over masks of the last pre-activations y_L of one input, and how far it is from Gaussian.

    Returns:
        counts and edges of the standardised first unit; Kolmogorov-Smirnov distance to the Gaussian of the
        same mean and variance, and excess kurtosis, each as a mean over the units of the layer.
    """

    def measure() -> dict[str, Any]:
        task = teacher_task(seed, inputs=10, samples=256, noise=0.5)
        net = DenseResNet(10, width, depth, scaled, generator(seed, "weights"))
        if trained:
            for _ in fit(net, task, "uniform", budget, seed, steps=steps, learning_rate=1e-3, refresh=steps):
                pass
        hidden = _hidden(net, task.test[0][:1], [budget] * depth, masks, generator(seed, "law"))
        return _law(hidden)

    return pieces("law", measure)


def _hidden(net: DenseResNet, x: Tensor, ps: Sequence[float], masks: int, draws: torch.Generator) -> Tensor:
    """y_L of one input under many masks: [masks, width]."""
    found = []
    kept = draw_masks(ps, masks, draws).float()
    with torch.no_grad():
        for gates in kept.split(_MASKS_AT_ONCE):
            y = net.first(x).expand(len(gates), -1)
            for gate, branch in zip(gates.unbind(1), net.branches, strict=True):
                y = y + gate[:, None] * branch(y)
            found.append(y)
    return torch.cat(found).double()


def _law(values: Tensor) -> dict[str, Any]:
    """Histogram of the first column; distance from Gaussian as means over the columns that vary."""
    spread = values.std(0, correction=0)
    varies = spread > 1e-12 * values.abs().amax().clamp_min(1e-300)
    values, spread = values[:, varies], spread[varies]
    first = (values[:, 0] - values[:, 0].mean()) / spread[0]
    edges = torch.linspace(-4, 4, _BINS + 1, dtype=torch.float64)
    return {
        "edges": edges.tolist(),
        "counts": torch.histogram(first.clamp(-3.999, 3.999), edges).hist.tolist(),
        "masks": len(values),
        "distance": ks_distance(values).mean().item(),
        "kurtosis": excess_kurtosis(values)[0].mean().item(),
        "level": lilliefors_level(len(values)),
    }


# --- the penalty over training ---------------------------------------------------------------------------


def penalty_cell(
    rule: str,
    budget: float,
    depth: int,
    width: int,
    steps: int,
    looks: int,
    masks: int,
    seed: int,
    pieces: Pieces,
) -> dict[str, Any]:
    """What stochastic depth adds to the loss, over training: its single-block form and the exact term.

    For the squared loss the penalty is sum_l p_l (1 - p_l) mean_i zeta_l(x_i)^2 with the leave-one-out
    difference zeta_l of the full network, and the exact term E loss - loss(mean output) is the variance of
    the output over masks, mean over samples (derived, D1).
    """

    def train() -> dict[str, Any]:
        task = teacher_task(seed, inputs=10, samples=256, noise=1.0)
        net = DenseResNet(10, width, depth, True, generator(seed, "weights"))
        plain = copy.deepcopy(net)
        found: list[dict[str, Any]] = []

        def look(step: int, handle: Handle) -> None:
            plain.load_state_dict(net.state_dict())
            ps = [handle.rates[f"branches.{place}"] for place in range(depth)]
            draws = generator(seed, "penalty", step)
            found.append({"step": step, **_penalty(plain, task, ps, masks, draws)})

        every = max(steps // looks, 1)
        for _ in fit(
            net,
            task,
            rule,
            budget,
            seed,
            steps=steps,
            learning_rate=2e-3,
            refresh=steps,
            look=look,
            every=every,
        ):
            pass
        return {"looks": found}

    return pieces("training", train)


def _penalty(
    net: DenseResNet, task: Task, ps: Sequence[float], masks: int, draws: torch.Generator
) -> dict[str, float]:
    """Single-block form, exact term with its standard error, and the training loss of the mean output."""
    x, y = task.train
    depth = len(ps)
    with torch.no_grad():
        full = net(x)
        form = 0.0
        for place, p in enumerate(ps):
            without = torch.ones(depth)
            without[place] = 0.0
            form += p * (1 - p) * (full - _gated(net, x, without)).square().mean().item()
        kept = draw_masks(ps, masks, draws).float()
        outputs = torch.stack([_gated(net, x, gates) for gates in kept]).double()
    groups = torch.stack([part.var(0).mean() for part in outputs.chunk(_GROUPS)])
    return {
        "form": form,
        "exact": outputs.var(0).mean().item(),
        "error": (groups.std() / math.sqrt(_GROUPS)).item(),
        "loss": (outputs.mean(0) - y.double()).square().mean().item(),
    }


def _gated(net: DenseResNet, x: Tensor, gates: Tensor) -> Tensor:
    """The output under one mask; a block whose gate is 0 is not run."""
    y = net.first(x)
    for gate, branch in zip(gates.tolist(), net.branches, strict=True):
        y = y + branch(y) if gate else y
    return net.last(nn.functional.relu(y)).squeeze(1)


def final_rates(result: Mapping[str, Any]) -> list[float]:
    """Survival rates at the end of a toy's training or of a training run, first block first."""
    return list(result["rates"]) if "rates" in result else [site["asked"] for site in result["sites"]]

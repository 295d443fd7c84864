"""The cells of `pal2020` on linear networks: descent with sampled masks, minimisation without, one point.

Each is a function of its options alone. Expected values are computed, from (2) to (4) of the theory notes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fallow.noise.dropconnect import drop_connect
from fallow.noise.feature_dropout import feature_dropout
from fallow.papers._panels import mean_and_error
from fallow.papers.pal2020.train import Descent, Law, Pieces, common_target, expected_loss, minimise, start
from fallow.penalties import (
    Minimiser,
    adaptive_survival_rate,
    closed_form,
    effective_gamma,
    effective_rank,
    network_gap,
)
from fallow.recipes._batches import generator
from fallow.schemes import Units

COUNTED = 1e-3  # of the largest target value: what counts as 0 in a spectrum, closed form and trained alike


def descent_cell(
    law: str,
    survival_rate: float,
    block_size: int,
    masks: str,
    width: int,
    outputs: int,
    samples: int,
    steps: int,
    learning_rate: float,
    windows: int,
    both: bool,
    seed: int,
    pieces: Pieces,
) -> dict[str, Any]:
    """Gradient steps with fresh masks from a random start, and what they end in beside the closed form."""
    drops, targets = Law(law, survival_rate, block_size, masks), common_target(outputs, samples)
    found = Descent(drops, width, steps, learning_rate, windows, seed, both).run(targets, pieces)
    best = minimiser(targets, drops, width)
    return {
        "windows": found["windows"],
        "optimum": optimum(best, targets),
        "last": trained(targets, found["last"], drops, best),
        "mean": trained(targets, found["mean"], drops, best),
    }


def minimum_cell(
    law: str,
    survival_rate: float,
    block_size: int,
    width: int,
    outputs: int,
    samples: int,
    iterations: int,
    seed: int,
    pieces: Pieces,
) -> dict[str, Any]:
    """L-BFGS on the deterministic objective from a random start, beside the closed form."""
    drops, targets = Law(law, survival_rate, block_size), common_target(outputs, samples)
    features, weight = (p.requires_grad_() for p in start(targets, width, seed))
    parameters = features, weight
    curve = minimise(
        lambda: expected_loss(targets, features, weight, drops.scheme), parameters, iterations, pieces
    )
    best = minimiser(targets, drops, width)
    ends = trained(targets, parameters, drops, best)
    return {"curve": curve, "optimum": optimum(best, targets), "last": ends}


def adaptive_cell(
    base_rate: float,
    block_size: int,
    width: int,
    outputs: int,
    samples: int,
    iterations: int,
    seed: int,
    pieces: Pieces,
) -> dict[str, Any]:
    """`minimum_cell` at the rate (2) for this width."""
    rate = adaptive_survival_rate(survival_rate=base_rate, width=width, block_size=block_size)
    found = minimum_cell("disjoint", rate, block_size, width, outputs, samples, iterations, seed, pieces)
    return {"survival_rate": rate, **found}


def widths_cell(
    base_rate: float,
    fixed_rate: float,
    block_size: int,
    widths: list[int],
    outputs: int,
    samples: int,
    pieces: Pieces,
) -> dict[str, Any]:
    """F*/|Y|^2 over the width, at one rate for all widths and at the rate (2)."""
    targets = common_target(outputs, samples)

    def share(rate: float, width: int) -> float:
        return minimiser(targets, Law("disjoint", rate, block_size), width).value / float(
            targets.square().sum()
        )

    rates = [adaptive_survival_rate(survival_rate=base_rate, width=d, block_size=block_size) for d in widths]
    return {
        "widths": list(widths),
        "fixed": [share(fixed_rate, d) for d in widths],
        "adaptive": [share(rate, d) for rate, d in zip(rates, widths, strict=True)],
        "rates": rates,
    }


def minimiser(targets: Tensor, law: Law, width: int) -> Minimiser:
    """The closed form for blocks of this size; of sliding ones that of disjoint ones beside them."""
    gamma = effective_gamma(survival_rate=law.survival_rate, width=width, block_size=law.block_size)
    return closed_form(targets, law.block_size, gamma)


def optimum(best: Minimiser, targets: Tensor) -> dict[str, Any]:
    """The closed form in numbers; with the effective rank that decides whether it is Dropout's (3.6)."""
    dropout = closed_form(targets, 1, best.gamma / best.block_size)
    return {
        "value": best.value,
        "dropout": dropout.value,
        "share": best.value / float(targets.square().sum()),
        "head": best.head,
        "kept": best.kept,
        "effective_rank": effective_rank(best.predictions),
        "reachable_width": best.reachable_width,
        "spectrum": best.spectrum.tolist(),
        "targets": best.target_spectrum.tolist(),
        "counts": counts(best.spectrum, best.target_spectrum, best.gamma),
    }


def trained(targets: Tensor, factors: Sequence[Tensor], law: Law, best: Minimiser) -> dict[str, Any]:
    """What (features, weight) have: objective (1), certificate, predictions, spectrum, equal blocks."""
    features, weight = (t.detach() for t in factors)
    output = features @ weight.T
    values = torch.linalg.svdvals(output)
    certificate = None
    if law.name != "sliding":
        certificate = network_gap(
            targets, features, weight, survival_rate=law.survival_rate, block_size=law.block_size
        )
    norms = block_norms(features, weight, law.block_size)
    scale = float(best.predictions.norm())
    return {
        "objective": float(expected_loss(targets, features, weight, law.scheme)),
        "bound": None if certificate is None else certificate.bound,
        "distance": float((output - best.predictions).norm()) / scale if scale else None,
        "spectrum": values.tolist(),
        "counts": counts(values, best.target_spectrum, best.gamma),
        "unequal": float((norms.amax() - norms.amin()) / norms.mean()),
    }


def counts(values: Tensor, targets: Tensor, gamma: float) -> list[int]:
    """Head and kept count of a spectrum, (q, rho), where differences below `COUNTED` do not count.

    In the head a value is m / (1 + gamma), the most that (4) leaves of the target value m.
    """
    least = COUNTED * float(targets[0])
    n = min(len(values), len(targets))
    head = values[:n] >= targets[:n] / (1 + gamma) - least
    kept = values > least
    return [int((head & kept[:n]).sum()), int(kept.sum())]


def block_norms(features: Tensor, weight: Tensor, block_size: int) -> Tensor:
    """|G_b W_b^T|_F of each block."""
    blocks = features.shape[1] // block_size
    g, w = (t.unflatten(1, (blocks, block_size)).transpose(0, 1) for t in (features, weight))
    return ((g.mT @ g) * (w.mT @ w)).sum((1, 2)).clamp_min(0).sqrt()


# --- one point, many masks: DropConnect is Dropout where it is ------------------------------------------

POINT = {"samples": 24, "inputs": 6, "width": 12, "outputs": 5}
CASES = {
    "dropout": "Dropout of the hidden units",
    "outgoing": "DropConnect on the outgoing weights",
    "incoming": "DropConnect on the incoming weights",
    "both": "DropConnect on both layers (rate squared)",
}


def point_cell(whitened: bool, survival_rate: float, draws: int, seed: int, pieces: Pieces) -> dict[str, Any]:
    """Mean loss over masks at one point (X, U, V), a case at a time, and how large gradients are under them.

    It is held against Dropout's objective (1), of the squared rate where both layers have masks, and against
    the exact mean of each case.
    """
    return {
        case: pieces(case, lambda case=case: _case(case, whitened, survival_rate, draws, seed))
        for case in CASES
    }


def _case(case: str, whitened: bool, survival_rate: float, draws: int, seed: int) -> dict[str, float]:
    x, y, incoming, outgoing = _point(seed, whitened)
    rate = survival_rate**2 if case == "both" else survival_rate
    masks = generator(seed, f"point {case}")
    losses, squares = [], []
    for _ in range(draws):
        leaves = [t.clone().requires_grad_() for t in (incoming, outgoing)]
        value = (y - _output(case, x, leaves[0], leaves[1], survival_rate, masks)).square().sum()
        losses.append(float(value.detach()))
        squares.append([float(g.square().sum()) for g in torch.autograd.grad(value, leaves)])
    of = {"loss": losses, "incoming": [s for s, _ in squares], "outgoing": [s for _, s in squares]}
    found = {
        "dropout": float(expected_loss(y, x @ incoming.T, outgoing, Units(rate))),
        "formula": _formula(case, x, y, incoming, outgoing, survival_rate),
    }
    for name, values in of.items():
        found[name], error = mean_and_error(values)
        found[f"{name}_error"] = error or 0.0
    return found


def _point(seed: int, whitened: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """X [N, inputs] of mean square 1 with X^T X of one eigenvalue or with correlated columns, Y, V^T, U."""
    draws = generator(seed, "point")
    sizes = (POINT["samples"], POINT["inputs"]), (POINT["samples"], POINT["outputs"])
    sizes += (POINT["width"], POINT["inputs"]), (POINT["outputs"], POINT["width"])
    x, y, v, u = (torch.randn(*size, generator=draws, dtype=torch.float64) for size in sizes)
    x = torch.linalg.qr(x).Q if whitened else x + 2 * x[:, :1]
    return x / x.square().mean().sqrt(), y, v / x.shape[1] ** 0.5, u / len(v) ** 0.5


def _output(
    case: str, x: Tensor, incoming: Tensor, outgoing: Tensor, rate: float, masks: torch.Generator
) -> Tensor:
    """One mask for all samples, as DropConnect's."""

    def linear(x: Tensor, weight: Tensor, masked: bool) -> Tensor:
        return drop_connect(x, weight, survival_rate=rate, generator=masks) if masked else x @ weight.T

    hidden = linear(x, incoming, case in ("incoming", "both"))
    if case == "dropout":
        hidden = hidden * feature_dropout(hidden.new_ones(1, len(incoming)), Units(rate), generator=masks)
    return linear(hidden, outgoing, case in ("outgoing", "both"))


def _formula(case: str, x: Tensor, y: Tensor, incoming: Tensor, outgoing: Tensor, rate: float) -> float:
    """The exact mean loss; of the incoming weights' masks, sum_i |u_i|^2 sum_j V_ji^2 |X_j|^2 (5.2)."""
    odds = (1 - rate) / rate
    columns, hidden = x.square().sum(0), x @ incoming.T
    squares = incoming.square() @ columns  # sum_j V_ji^2 |X_j|^2, over the units
    units = outgoing.square().sum(0)
    plain = (y - hidden @ outgoing.T).square().sum()
    on_units = odds * units @ hidden.square().sum(0)
    penalty = {
        "dropout": on_units,
        "outgoing": on_units,
        "incoming": odds * units @ squares,
        "both": on_units + odds * (1 + odds) * units @ squares,
    }
    return float(plain + penalty[case])

"""Small networks of the paper's kind and their training: the dense residual net, and planted blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fallow import rates
from fallow.planning.allocate import sensemode
from fallow.planning.sensitivity import sensitivities
from fallow.recipes._batches import generator
from fallow.surgery import Handle, apply

MINIMUM_RATE = 0.1
SMOOTHING = 0.5  # weight of the newest sensitivities in their running mean


class DenseBranch(nn.Module):
    """s W relu(y): one block of the residual net of Hayou & Ayed (2021) as the notes remember it."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.linear = nn.Linear(width, width, bias=False)

    def forward(self, y: Tensor) -> Tensor:
        """(n, width) to the same shape."""
        return self.scale * self.linear(F.relu(y))


class DenseResNet(nn.Module):
    """y_l = y_{l-1} + s W_l relu(y_{l-1}) between two linear maps; pre-activations carry the identity.

    Args:
        inputs: of the first map.
        width: N.
        depth: L.
        scaled: s = 1/sqrt(L) ("stable"), else s = 1 ("vanilla").
        draws: weights come from this generator: variance 2/N, so that ReLU keeps second moments.
    """

    def __init__(self, inputs: int, width: int, depth: int, scaled: bool, draws: torch.Generator) -> None:
        super().__init__()
        scale = depth**-0.5 if scaled else 1.0
        self.first = nn.Linear(inputs, width, bias=False)
        self.branches = nn.ModuleList(DenseBranch(width, scale) for _ in range(depth))
        self.last = nn.Linear(width, 1, bias=False)
        with torch.no_grad():
            for weight in self.parameters():
                gain = 1.0 if weight is self.first.weight else 2.0
                weight.normal_(0, math.sqrt(gain / weight.shape[1]), generator=draws)

    def hidden(self, x: Tensor) -> Tensor:
        """The last pre-activation y_L."""
        y = self.first(x)
        for branch in self.branches:
            y = y + branch(y)
        return y

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs) to (n,)."""
        return self.last(F.relu(self.hidden(x))).squeeze(1)


class PlantedBranch(nn.Module):
    """A two-layer net of one part of the state that adds to the state's first number alone."""

    def __init__(self, place: int, part: int, parts: int, width: int, draws: torch.Generator) -> None:
        super().__init__()
        self.start, self.part, self.rest = 1 + place * part, part, parts * part
        self.expand, self.project = nn.Linear(part, width), nn.Linear(width, 1)
        with torch.no_grad():
            for linear in (self.expand, self.project):
                gain = 2.0 / linear.weight.shape[1]
                linear.weight.normal_(0, math.sqrt(gain), generator=draws)
                linear.bias.zero_()
            self.project.weight *= parts**-0.5

    def forward(self, state: Tensor) -> Tensor:
        """(n, 1 + parts * part) to the same shape."""
        seen = state.narrow(1, self.start, self.part)
        return F.pad(self.project(F.relu(self.expand(seen))), (0, self.rest))


class PlantedNet(nn.Module):
    """Blocks that each see their own part of the input and nothing of the others'; the output is their sum.

    The state is (sum so far, input), so every block is a residual block that rests like any other.
    """

    def __init__(self, blocks: int, part: int, width: int, draws: torch.Generator) -> None:
        super().__init__()
        self.branches = nn.ModuleList(PlantedBranch(at, part, blocks, width, draws) for at in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        """(n, blocks * part) to (n,)."""
        state = F.pad(x, (1, 0))
        for branch in self.branches:
            state = state + branch(state)
        return state[:, 0]


@dataclass(frozen=True)
class Task:
    """A regression: inputs and noisy targets to train on, inputs and clean targets to test on."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def teacher_task(seed: int, *, inputs: int, samples: int, noise: float, tests: int = 2000) -> Task:
    """Targets of a random two-layer tanh net of variance about 1, with Gaussian noise in training alone."""
    draws = generator(seed, "teacher")
    hidden = torch.randn(inputs, 20, generator=draws) / math.sqrt(inputs)
    weights = torch.randn(20, generator=draws)
    x = torch.randn(samples + tests, inputs, generator=draws)
    clean = torch.tanh(2 * x @ hidden) @ weights
    clean = (clean - clean.mean()) / clean.std()
    return _task(x, clean, noise, samples, draws)


def planted_task(
    seed: int, *, blocks: int, part: int, relevant: int, samples: int, noise: float, tests: int = 2000
) -> tuple[Task, list[int]]:
    """A sum of one smooth function for each of `relevant` parts of the input; and which parts they are."""
    draws = generator(seed, "planted")
    chosen = sorted(torch.randperm(blocks, generator=draws)[:relevant].tolist())
    x = torch.randn(samples + tests, blocks * part, generator=draws)
    clean = torch.zeros(samples + tests)
    for place in chosen:
        direction = torch.randn(part, generator=draws)
        clean += torch.sin(1.5 * x[:, place * part : (place + 1) * part] @ direction / direction.norm())
    return _task(x, clean / math.sqrt(relevant), noise, samples, draws), chosen


def _task(x: Tensor, clean: Tensor, noise: float, samples: int, draws: torch.Generator) -> Task:
    noisy = clean[:samples] + noise * torch.randn(samples, generator=draws)
    return Task((x[:samples], noisy), (x[samples:], clean[samples:]))


# --- training -----------------------------------------------------------------------------------------


def toy_rates(rule: str, sites: list[str], budget: float) -> dict[str, float]:
    """Rates at the start: of equal costs, so that the budget is the mean rate; SenseMode starts uniform."""
    costs = dict.fromkeys(sites, 1 / len(sites))
    chosen = rates.linear(mean=budget) if rule == "linear" else rates.uniform(mean=budget)
    return chosen(costs)  # type: ignore[return-value]


def fit(
    net: nn.Module,
    task: Task,
    rule: str,
    budget: float,
    seed: int,
    *,
    steps: int,
    learning_rate: float,
    refresh: int,
    minimum_rate: float = MINIMUM_RATE,
    look: Callable[[int, Handle], None] | None = None,
    every: int = 0,
) -> Iterator[Handle]:
    """Train under stochastic depth with Adam, all samples and one mask a step; yields the handle at the end.

    Args:
        net: changed in place.
        task: what to learn.
        rule: "uniform", "linear", "sensemode" or "standard" (no stochastic depth).
        budget: mean survival rate.
        seed: of the masks.
        steps: optimiser steps.
        learning_rate: of Adam.
        refresh: steps between two measurements of SenseMode's sensitivities.
        minimum_rate: the least rate that SenseMode gives.
        look: called with (step, handle) every `every` steps, and at the end.
        every: see `look`.
    """
    x, y = task.train
    sites = [f"branches.{place}" for place in range(len(net.branches))]  # type: ignore[arg-type]
    budget = 1.0 if rule == "standard" else budget
    handle = apply(net, toy_rates(rule, sites, budget), example=x[:4], mode="batch", scale="eval", seed=seed)
    optimiser = torch.optim.Adam(net.parameters(), learning_rate)
    smooth: dict[str, float] = {}
    net.train()
    try:
        for step in range(steps):
            if rule == "sensemode" and budget < 1 and step and step % refresh == 0:
                smooth = _smoothed(smooth, sensitivities(net, F.mse_loss, [(x, y)]))
                handle.set_rates(sensemode(smooth, budget=budget, minimum_rate=minimum_rate))
                net.train()
            if look is not None and every and step % every == 0:
                look(step, handle)
                net.train()
            optimiser.zero_grad(set_to_none=True)
            loss = F.mse_loss(net(x), y)
            if loss.requires_grad:  # all blocks of a planted net may rest at once
                loss.backward()
                optimiser.step()
        if look is not None:
            look(steps, handle)
        net.eval()
        yield handle
    finally:
        handle.remove()


def _smoothed(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    return {n: SMOOTHING * s + (1 - SMOOTHING) * before[n] if before else s for n, s in now.items()}


def test_error(net: nn.Module, task: Task) -> float:
    """Mean squared error of the network at evaluation, against targets without noise."""
    net.eval()
    with torch.no_grad():
        return F.mse_loss(net(task.test[0]), task.test[1]).item()


def toy_cell(
    toy: str, rule: str, budget: float, seed: int, steps: int, pieces: Callable[..., Any]
) -> dict[str, Any]:
    """One training of a toy: error, rates at the end, and for planted blocks which they were."""
    relevant: list[int] = []
    if toy == "planted":
        task, relevant = planted_task(seed, blocks=12, part=3, relevant=3, samples=512, noise=0.7)
        net: nn.Module = PlantedNet(12, 3, 32, generator(seed, "weights"))
        options: dict[str, Any] = {"learning_rate": 5e-3, "refresh": max(steps // 50, 1)}
    else:
        task = teacher_task(seed, inputs=10, samples=256, noise=1.0)
        net = DenseResNet(10, 64, 16, True, generator(seed, "weights"))
        options = {"learning_rate": 2e-3, "refresh": max(steps // 15, 1)}
    for handle in fit(net, task, rule, budget, seed, steps=steps, **options):
        return {
            "error": test_error(net, task),
            "rates": [handle.rates[name] for name in sorted(handle.rates, key=_place)],
            "relevant": relevant,
            "target_variance": task.test[1].var().item(),
        }
    raise AssertionError("fit yields its handle once")


def _place(name: str) -> int:
    return int(name.rpartition(".")[2])

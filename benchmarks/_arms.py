"""The subjects of the benchmarks and their arms: a model each, from the same weights, and its optimiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fallow
from benchmarks import _peers, _timing
from fallow.models import resnet110, vit_small

BASE = "constant depth"
ROW = "fallow row exact window"
OVERHEAD = "fallow every rate 1"

# What is asked of `fallow.apply`, and how far beyond the ideal its time may be; None: shown without a bound.
APPLIED: dict[str, tuple[dict[str, Any], float | None]] = {
    "fallow batch exact": ({"mode": "batch", "sampler": "exact"}, 0.02),
    "fallow batch bernoulli": ({"mode": "batch", "sampler": "bernoulli"}, 0.02),
    ROW: ({"mode": "row", "sampler": "exact"}, 0.03),
    "fallow row exact scattered": ({"mode": "row", "sampler": "exact", "rows": "scattered"}, None),
    "fallow row bernoulli": ({"mode": "row", "sampler": "bernoulli"}, None),
}

SUBJECTS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet110": (resnet110, 128),
    "vit": (vit_small, 64),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Case:
    """One subject in one layout and precision."""

    subject: str
    layout: str
    precision: str
    batch: int

    def __str__(self) -> str:
        return f"{self.subject}, {self.layout}, {self.precision}, batch {self.batch}"

    def build(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = SUBJECTS[self.subject][0]()
        return model.to(memory_format=LAYOUTS[self.layout]).train()  # pyright: ignore[reportCallIssue]

    def data(self, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.batch, 3, 32, 32, generator=generator)
        return x.contiguous(memory_format=LAYOUTS[self.layout]), torch.randint(
            10, (self.batch,), generator=generator
        )


@dataclass
class Arm:
    """A model with its optimiser, and what was seen of it."""

    case: Case
    model: nn.Module
    data: tuple[Tensor, Tensor]
    handle: fallow.Handle | None = None
    varies: bool = False  # from step to step
    costs: list[float] = field(default_factory=list)  # realised share of the dense FLOPs of each timed step

    def __post_init__(self) -> None:
        # The rate is small because the data never change: the point is the work, not the loss.
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)

    def step(self) -> None:
        """One training step as a user has it."""
        x, y = self.data
        low = self.case.precision == "bf16"
        with torch.autocast("cpu", dtype=torch.bfloat16) if low else nullcontext():
            loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def peak(self, steps: int) -> int:
        """Bytes at most in use during a step: what is there all the time and what the steps take."""
        state = [v for s in self.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        fixed = _timing.held([*self.model.parameters(), *self.model.buffers(), *state, *self.data])
        return fixed + max(_timing.step_memory(self.step) for _ in range(steps))


def rates_of(case: Case, last: float) -> tuple[fallow.Sites, list[float], float]:
    """Sites, survival rates in order, and the ideal: the expected share of the FLOPs of a dense step."""
    sites = fallow.sites(case.build(0), torch.randn(2, 3, 32, 32))
    costs = {s.name: s.cost for s in sites}
    rates = fallow.rates.linear(last=last)(costs)
    return sites, [rates[s.name] for s in sites], fallow.rates.expected_cost(rates, costs)


def build_arms(case: Case, rates: Sequence[float], last: float, seed: int) -> dict[str, Arm]:
    """Every arm, each with its own model from the same initial weights."""
    data = case.data(seed)
    arms = {BASE: Arm(case, case.build(seed), data)}
    settings: dict[str, tuple[fallow.rates.Rule, dict[str, Any]]] = {
        name: (fallow.rates.linear(last=last), options) for name, (options, _) in APPLIED.items()
    }
    settings[OVERHEAD] = (fallow.rates.uniform(1.0), {})
    for name, (rule, options) in settings.items():
        model = case.build(seed)
        handle = fallow.apply(model, rule, example=data[0][:2], seed=seed, **options)
        arms[name] = Arm(case, model, data, handle, varies=name != OVERHEAD)
    for name, form in _peers.PEERS.items():
        arms[name] = Arm(case, _peers.attach(case.build(seed), form, rates, seed), data, varies=True)
    return arms


def parts(sites: fallow.Sites) -> dict[str, list[bool]]:
    """Sites of one kind and size: their branches take equal time, so one number is measured for all."""
    kinds = [s.name.split(".")[-1 if s.name.startswith("blocks.") else 0] for s in sites]
    return {kind: [k == kind for k in kinds] for kind in dict.fromkeys(kinds)}

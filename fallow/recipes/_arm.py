"""One arm of a run: a model, its optimiser, and what every step of it showed."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fallow.data import Dataset
from fallow.integrations.loading import load_model
from fallow.planning import RunningSensitivities, costs
from fallow.recipes._batches import Batches, error_of, seed_of
from fallow.recipes._config import Config
from fallow.recipes._ending import NotFinite
from fallow.recipes._measure import Stopwatch, mean, median, peak_memory, ratio
from fallow.recipes._optimise import optimiser
from fallow.surgery import Handle, handle_of

# A rate in (0, 1] at which no branch is ever kept: the chance that one of a thousand is, is one in 10^9.
_NEVER = 1e-12
_PAIRS = 5


def build(config: Config, dataset: Dataset) -> nn.Module:
    """The model with the run's initial weights; the same ones at every call."""
    model = load_model(
        config.model,
        classes=dataset.classes,
        channels=dataset.channels,
        image=dataset.size,
        seed=seed_of(config.seed, "weights"),
    )
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    return model.to(device=config.device, memory_format=layout)  # type: ignore[call-overload]


class Arm:
    """A model in training with its optimiser and its log.

    Attributes:
        name: "model" or "twin".
        model: the module.
        handle: of its stochastic depth; None for the twin.
        running: sensitivities taken from its steps; None where no rates are planned from them.
        epochs: one record an epoch.
        log: for every step: cpu and wall seconds (NaN where something else was measured in it), realised
            depth and share of the dense cost; peak bytes of some steps.
    """

    def __init__(self, name: str, model: nn.Module, config: Config, sites: int) -> None:
        self.name, self.model, self.config, self.sites = name, model, config, sites
        self.handle: Handle | None = handle_of(model)
        self.running: RunningSensitivities | None = None
        self.optimiser = optimiser(model, config)
        self.epochs: list[dict[str, Any]] = []
        self.log: dict[str, list[float]] = {key: [] for key in ("cpu", "wall", "depth", "cost", "memory")}
        self._sums: dict[str, float] = {}
        self._first = _first_convolution(model)
        model.train()

    # --- a step --------------------------------------------------------------------------------------
    def step(self, batch: tuple[Tensor, Tensor], rate: float, step: int, *, how: str = "time") -> float:
        """One optimiser step.

        Args:
            batch: images and labels; taken in `accumulate` pieces.
            rate: learning rate.
            step: its number; also the seed of a model's own dropout, the same for both arms.
            how: "time": a plain step; "memory": measure its peak memory, which slows it, so its time does not
                count; "warm": its time does not count (the first after a start).

        Returns:
            The loss.

        Raises:
            NotFinite: the loss is not finite; the weights are as before the step.
        """
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        torch.manual_seed(seed_of(self.config.seed, "dropout", step))
        measured = peak_memory(self.config.device, self._held()) if how == "memory" else nullcontext()
        clock = Stopwatch(self.config.device)
        with measured as peak:
            loss, wrong, depth, cost = self._forward_backward(batch)
            if not math.isfinite(loss):
                raise self._not_finite("the loss", loss, step)
            self.optimiser.step()
        cpu, wall = clock.read()
        counts = how == "time"
        self.log["cpu"].append(cpu if counts else math.nan)
        self.log["wall"].append(wall if counts else math.nan)
        self.log["depth"].append(depth)
        self.log["cost"].append(cost)
        if peak is not None:
            self.log["memory"].append(float(peak.bytes))
        self._add(images=len(batch[1]), steps=1, loss=loss * len(batch[1]), wrong=wrong)
        self._add(gradient=self._gradient(), depth=depth, cost=cost)
        return loss

    def _forward_backward(self, batch: tuple[Tensor, Tensor]) -> tuple[float, float, float, float]:
        """Gradients of the batch; its loss, number of errors, realised depth and cost."""
        self.optimiser.zero_grad(set_to_none=True)
        # even pieces, none of one image: the last batch of an epoch may be small
        pieces = max(min(self.config.accumulate, len(batch[1]) // 2), 1)
        loss, wrong, depth, cost = 0.0, 0.0, 0.0, 0.0
        for x, y in zip(batch[0].tensor_split(pieces), batch[1].tensor_split(pieces), strict=True):
            share = len(y) / len(batch[1])
            with _autocast(self.config):
                out = self.model(x)
                found = F.cross_entropy(out, y, label_smoothing=self.config.label_smoothing)
            (found * share).backward()
            loss += found.item() * share
            wrong += float((out.detach().argmax(1) != y).sum())
            depth += share * (self.sites if self.handle is None else self.handle.last_depth)
            cost += share * (1.0 if self.handle is None else self.handle.last_cost)
        return loss, wrong, depth, cost

    def _held(self) -> list[Tensor]:
        state = [t for s in self.optimiser.state.values() for t in s.values() if isinstance(t, Tensor)]
        return [*self.model.parameters(), *self.model.buffers(), *state]

    def _gradient(self) -> float:
        grad = None if self._first is None else self._first.grad
        return math.nan if grad is None else grad.abs().mean().item()

    def _add(self, **values: float) -> None:
        for key, value in values.items():
            self._sums[key] = self._sums.get(key, 0.0) + value

    # --- what is not finite ----------------------------------------------------------------------------
    def _not_finite(self, what: str, value: float, step: int) -> NotFinite:
        rested = self.rested()
        sites = f" while {', '.join(rested)} rested" if rested else ""
        record = {"step": step, "arm": self.name, "what": what, "value": str(value), "rested": rested}
        return NotFinite(f"{what} of the {self.name} became {value} at step {step}{sites}", record)

    def rested(self) -> list[str]:
        """The sites that rested in the latest forward, for the whole batch or for some of its rows."""
        kept = {} if self.handle is None else self.handle.masks()
        return [name for name, mask in kept.items() if not bool(mask.all())]

    def refuse_not_finite(self, step: int) -> None:
        """Refuse weights that are not finite, before they become a checkpoint."""
        for name, value in self.model.state_dict().items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise self._not_finite(f"the weight {name}", math.nan, step)

    # --- an epoch --------------------------------------------------------------------------------------
    def close_epoch(self, epoch: int, step: int, rate: float, batches: Batches) -> dict[str, Any]:
        """Record an epoch that is over; `epoch` and `step` count from 1."""
        sums, self._sums = self._sums, {}
        last = slice(-int(sums["steps"]), None)
        record = {
            "epoch": epoch,
            "step": step,
            "train_loss": sums["loss"] / sums["images"],
            "train_error": sums["wrong"] / sums["images"],
            "validation_error": self.error(batches, "validation"),
            "learning_rate": rate,
            "gradient_first_convolution": sums["gradient"] / sums["steps"],
            "depth": sums["depth"] / sums["steps"],
            "cost": sums["cost"] / sums["steps"],
            "cpu_s_per_step": median(self.log["cpu"][last]),
            "wall_s_per_step": median(self.log["wall"][last]),
        }
        every = self.config.test_every
        if every and epoch % every == 0:
            record["test_error"] = self.error(batches, "test")
        self.epochs.append(record)
        return record

    def error(self, batches: Batches, part: str) -> float:
        """Share of the images of a part that the model at evaluation gets wrong."""
        with _autocast(self.config):
            return error_of(self.model, batches, part)

    # --- results and checkpoints -------------------------------------------------------------------------
    def results(self) -> dict[str, Any]:
        """What the results file holds of this arm, its test error apart."""
        memory = mean(self.log["memory"])
        return {
            "label": "constant depth" if self.handle is None else "stochastic depth",
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "epochs": self.epochs,
            "depths": [round(depth, 3) for depth in self.log["depth"]],
            "summary": {
                "validation_error": self.epochs[-1]["validation_error"] if self.epochs else None,
                "cpu_s_per_step": median(self.log["cpu"]),
                "wall_s_per_step": median(self.log["wall"]),
                "peak_memory_mb": None if memory is None else memory / 1e6,
                "realised_depth": mean(self.log["depth"]),
            },
        }

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs of this arm, in types that torch loads with weights_only=True."""
        return {
            "weights": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "handle": None if self.handle is None else self.handle.state_dict(),
            "running": None if self.running is None else self.running.state_dict(),
            "epochs": self.epochs,
            "log": {key: torch.tensor(values, dtype=torch.float64) for key, values in self.log.items()},
            "sums": self._sums,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state` was taken."""
        self.model.load_state_dict(state["weights"])
        self.optimiser.load_state_dict(state["optimiser"])
        if self.handle is not None:
            self.handle.load_state_dict(state["handle"])
        if self.running is not None:
            self.running.load_state_dict(state["running"])
        self.epochs = list(state["epochs"])
        self.log = {key: values.tolist() for key, values in state["log"].items()}
        self._sums = dict(state["sums"])


def _autocast(config: Config) -> torch.autocast:
    return torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.autocast)


def _first_convolution(model: nn.Module) -> Tensor | None:
    return next((m.weight for m in model.modules() if isinstance(m, nn.Conv2d)), None)


def droppable_time(
    model: nn.Module, config: Config, dataset: Dataset, batches: Batches
) -> dict[str, float] | None:
    """Measured share of a dense step's time that each site takes; None where no step could be timed.

    Their sum, the optimiser included: a copy whose branches all rest takes a step in turn with a dense
    copy, a few times; 1 minus the median of the paired ratios of processor time (on CUDA of wall time). It
    is shared out as `fallow.planning.costs` measures the sites' times. The run itself is not touched.
    """
    resting, dense = copy.deepcopy(model), build(config, dataset)
    handle = handle_of(resting)
    assert handle is not None
    handle.load_state_dict({**handle.state_dict(), "schedule": None})
    handle.set_rates(dict.fromkeys(handle.rates, _NEVER))
    arms = [Arm("rest", resting, config, 0), Arm("dense", dense, config, 0)]
    batch = batches.at(0)
    for step in range(_PAIRS + 1):
        for arm in arms if step % 2 else reversed(arms):
            arm.step(batch, 0.0, step, how="time" if step else "warm")
    clock = "wall" if config.device.startswith("cuda") else "cpu"
    found = ratio(arms[0].log[clock], arms[1].log[clock])
    if found is None:
        return None
    whole = min(max(1 - found["median"], 0.0), 1.0)
    include, exclude = config.include or None, config.exclude or None
    piece = [tuple(part.tensor_split(config.accumulate)[0] for part in batch)]  # what a step holds at once
    with _autocast(config):
        parts = costs(
            dense, piece, kind="time", granularity=config.granularity, include=include, exclude=exclude
        )
    total = sum(parts.values())
    return {name: whole * part / total for name, part in parts.items()} if total else None

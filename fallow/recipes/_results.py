"""results.json of a run: where it comes from, what was asked, what happened."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

import torch

from fallow import rates
from fallow._version import __version__
from fallow.recipes._arm import Arm
from fallow.recipes._batches import Batches
from fallow.recipes._config import Config, Surroundings
from fallow.recipes._measure import mean, ratio, ratio_of_means
from fallow.surgery import Handle

SCHEMA = 1


def now() -> str:
    """The time, to the second, in UTC."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def provenance(config: Surroundings, batches: Batches, command: str, started: str) -> dict[str, Any]:
    """What a reader needs to know where numbers come from, and to make them again."""
    data = batches.dataset
    return {
        "fallow": __version__,
        "torch": str(torch.__version__),  # a class of its own, which weights_only refuses
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": config.device,
        "hardware": hardware(config.device, f"{config.threads} threads"),
        "threads": config.threads,
        "seed": config.seed,
        "command": command,
        "started": started,
        "finished": None,
        "data": {
            "name": data.name,
            "fingerprint": data.fingerprint,
            **batches.sizes,
            "notes": list(data.notes),
        },
    }


def hardware(device: str, threads: str) -> str:
    """What a device is, in words; of a CPU with how many threads are taken."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU with {torch.backends.cpu.get_cpu_capability()}, {threads}"


def budget(handle: Handle, config: Config, total: int, times: Mapping[str, float] | None) -> dict[str, Any]:
    """Asked and ideal costs.

    ideal_flops is the expected share of a dense step's FLOPs over the whole run, the schedule counted in:
    1 less what each site's share of them is times how often it rests. ideal_time is the same with the sites'
    measured shares of time, `times`.
    """
    schedule = config.schedule_over_steps()
    strength = 1.0 if schedule is None else sum(schedule(step) for step in range(total)) / total
    droppable = sum(site.cost for site in handle.sites)
    ideal_time = None
    if times is not None:
        ideal_time = 1 - strength * (1 - rates.expected_cost(handle.rates, times))
    return {
        "asked": config.budget,
        "expected_cost": handle.expected_cost,
        "droppable_flops": droppable,
        "droppable_time": sum(times.values()) if times is not None else None,
        "ideal_flops": 1 - strength * (1 - handle.expected_cost),
        "ideal_time": ideal_time,
        "expected_depth": handle.expected_depth,
        "sites": len(handle.sites),
    }


def sites(handle: Handle) -> list[dict[str, Any]]:
    """Asked and realised survival rate of every site so far."""
    return [
        {"name": s.name, "kind": s.kind, "cost": s.cost, "asked": s.asked, "realised": s.realised}
        for s in handle.report().sites
    ]


def summary(arms: list[Arm], *, with_ratios: bool) -> dict[str, Any]:
    """Ratios of the model to its twin; the bootstrap takes a while and is left to the end.

    `timed_cost` is the realised cost of the steps whose time counts.
    """
    ours = arms[0]
    found: dict[str, Any] = {"realised_cost": mean(ours.log["cost"])}
    if len(arms) == 1:
        return found
    theirs = arms[1]
    memory = [mean(arm.log["memory"]) for arm in arms]
    if memory[0] is not None and memory[1]:
        found["memory_ratio"] = memory[0] / memory[1]
    if with_ratios:
        found["time_ratio"] = ratio(ours.log["cpu"], theirs.log["cpu"])
        found["wall_ratio"] = ratio(ours.log["wall"], theirs.log["wall"])
        found["mean_time_ratio"] = ratio_of_means(ours.log["cpu"], theirs.log["cpu"])
        found["mean_wall_ratio"] = ratio_of_means(ours.log["wall"], theirs.log["wall"])
        timed = zip(ours.log["cost"], ours.log["cpu"], strict=True)
        found["timed_cost"] = mean([cost for cost, seconds in timed if math.isfinite(seconds)])
    return found

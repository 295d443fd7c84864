"""Pruning by other packages beside `fallow.sparsify`: one small network, one target, one loop of training.

Every arm trains for as many steps and takes its weights along the same cubic ramp, so that what differs is
what each takes, and what it leaves: torch.nn.utils.prune leaves masks, Torch-Pruning smaller modules.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import fallow
from fallow.models import vgg_small
from fallow.penalties import LogSum
from fallow.sparsity import Shrunk
from fallow.sparsity.control import Target, target_of
from fallow.sparsity.shrinking.count import size_of

RAMP, LOOKS, BATCH, RATE, STRENGTH = (0.1, 0.7), 20, 64, 2e-3, 1e-5


@dataclass
class Data:
    """Images as floats and labels; `example` is one image."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def example(self) -> Tensor:
        return self.x[:1]


Act = Callable[[nn.Module, torch.optim.Optimizer, int], torch.optim.Optimizer]


def train(
    model: nn.Module, data: Data, steps: int, seed: int, penalty: Callable[[], Any], act: Act | None
) -> None:
    """The loop of all arms: Adam with a rate that falls to 0; `act` is called after each step, from 1 on."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), RATE)
    order = torch.randperm(len(data.x), generator=generator)
    model.train()
    for step in range(1, steps + 1):
        if len(order) < BATCH:
            order = torch.randperm(len(data.x), generator=generator)
        rows, order = order[:BATCH], order[BATCH:]
        for group in optimiser.param_groups:
            group["lr"] = RATE * (1 - (step - 1) / steps)
        loss = F.cross_entropy(model(data.x[rows]), data.y[rows]) + penalty()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if act is not None:
            optimiser = act(model, optimiser, step)
    model.eval()


def dense(model: nn.Module, data: Data, steps: int, seed: int, target: float) -> nn.Module:
    """Nothing is taken."""
    train(model, data, steps, seed, lambda: 0.0, None)
    return model


def of_fallow(strategy: Any, groups: str) -> Callable[..., nn.Module]:
    """`fallow.sparsify` and `shrink`; of filters all but the classes."""

    def arm(model: nn.Module, data: Data, steps: int, seed: int, target: float) -> nn.Module:
        run = fallow.sparsify(
            model,
            strategy=strategy,
            strength=STRENGTH,
            groups=groups,
            target=target,
            steps=steps,
            ramp=RAMP,
            every=max(steps // LOOKS, 1),
            exclude="head.weight" if groups == "outputs" else None,
        )

        def act(_: nn.Module, optimiser: torch.optim.Optimizer, step: int) -> torch.optim.Optimizer:
            run.update()
            return optimiser

        train(model, data, steps, seed, run.penalty, act)
        small: Shrunk = run.shrink(data.example)
        return small.model

    return arm


def torch_prune(model: nn.Module, data: Data, steps: int, seed: int, target: float) -> nn.Module:
    """``global_unstructured`` by magnitude along the ramp; ``remove`` in the end leaves zeros."""
    ramp = _ramp(target, steps)
    chosen = [(m, "weight") for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    count = sum(m.weight.numel() for m, _ in chosen)

    def act(_: nn.Module, optimiser: torch.optim.Optimizer, step: int) -> torch.optim.Optimizer:
        if ramp.looks(step):
            masks = [m.get_buffer("weight_mask") for m, _ in chosen if hasattr(m, "weight_mask")]
            gone = sum(mask.numel() - int(mask.count_nonzero()) for mask in masks)
            more = round(ramp.wanted(step) * count) - gone
            prune.global_unstructured(chosen, prune.L1Unstructured, amount=more)
        return optimiser

    train(model, data, steps, seed, lambda: 0.0, act)
    for module, name in chosen:
        prune.remove(module, name)
    return model


def torch_pruning(model: nn.Module, data: Data, steps: int, seed: int, target: float) -> nn.Module:
    """Torch-Pruning's magnitude pruner over all layers along the ramp, each time with a new optimiser."""
    tp: Any = importlib.import_module("torch_pruning")
    ramp = _ramp(target, steps)
    looks = [step for step in range(1, steps + 1) if ramp.looks(step)]
    pruner = tp.pruner.MagnitudePruner(
        model,
        data.example,
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=target,
        iterative_steps=len(looks),
        iterative_pruning_ratio_scheduler=lambda _, n: [0.0, *(ramp.wanted(step) for step in looks)],
        global_pruning=True,
        ignored_layers=[model.get_submodule("head")],
    )

    def act(model: nn.Module, optimiser: torch.optim.Optimizer, step: int) -> torch.optim.Optimizer:
        if not ramp.looks(step):
            return optimiser
        pruner.step()
        model.zero_grad()
        return torch.optim.Adam(model.parameters(), RATE)

    train(model, data, steps, seed, lambda: 0.0, act)
    return model


def _ramp(target: float, steps: int) -> Target:
    return target_of(target, steps, "ramp", *RAMP, max(steps // LOOKS, 1))


WEIGHTS, FILTERS = "weights", "filters"
# name -> what it takes, and the arm
ARMS: dict[str, tuple[str, Callable[..., nn.Module]]] = {
    "dense": ("", dense),
    "fallow, LogSum": (WEIGHTS, of_fallow(LogSum(eps=0.1), "weights")),
    "fallow, magnitude": (WEIGHTS, of_fallow("magnitude", "weights")),
    "torch.nn.utils.prune": (WEIGHTS, torch_prune),
    "fallow, LogSum, filters": (FILTERS, of_fallow(LogSum(eps=0.1), "outputs")),
    "fallow, magnitude, filters": (FILTERS, of_fallow("magnitude", "outputs")),
    "Torch-Pruning": (FILTERS, torch_pruning),
}


def available() -> dict[str, tuple[str, Callable[..., nn.Module]]]:
    """The arms whose packages are there."""
    if importlib.util.find_spec("torch_pruning") is not None:
        return ARMS
    return {name: arm for name, arm in ARMS.items() if name != "Torch-Pruning"}


def build(data: Data, widths: tuple[int, ...], seed: int) -> nn.Module:
    """The network that all arms begin from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        channels, height, width = data.x.shape[1:]
        return vgg_small(channels=channels, image=(height, width), widths=widths)


@torch.no_grad()
def error(model: nn.Module, data: Data) -> float:
    """The share of test images that are taken for another class."""
    wrong = [
        (model(x).argmax(1) != y) for x, y in zip(data.test_x.split(500), data.test_y.split(500), strict=True)
    ]
    return float(torch.cat(wrong).float().mean())


def sizes(model: nn.Module, data: Data) -> dict[str, int]:
    """FLOPs, parameters that are not zero, bytes of the state dict: dense, and sparse matrices as CSR."""
    state = dict(model.state_dict())
    return {
        "flops": size_of(model, ((data.example,), {})).flops,
        "nonzero": sum(int(p.count_nonzero()) for p in model.parameters()),
        "bytes": _stored(state),
        "sparse_bytes": _stored({key: _sparse(value) for key, value in state.items()}),
    }


def _sparse(value: Tensor) -> Tensor:
    if value.dim() < 2 or 3 * int(value.count_nonzero()) > value.numel():
        return value
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return value.flatten(1).to_sparse_csr()


def _stored(state: dict[str, Tensor]) -> int:
    file = io.BytesIO()
    torch.save(state, file)
    return file.tell()

"""A head on a few batches: its features and the loss over its output, and what masks do to that.

The features are computed once, with the noise off; a draw of masks then costs one product with the weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fallow.errors import UsageError
from fallow.explaining._curvature import Curvature, recognise
from fallow.explaining._estimate import mean_and_error
from fallow.explaining._head_noise import HeadNoise
from fallow.explaining._outputs import OutputLoss, inner
from fallow.feed import LossFunction, Pair, call_model, rows_of
from fallow.surgery import probe

_WHERE = "explain"


@dataclass(frozen=True)
class Reading:
    """One batch.

    Attributes:
        features: what the head takes, [rows, width], float64.
        loss: over the head's output.
        curvature: what kind of loss it is.
        share: of the batch's samples in all.
    """

    features: Tensor
    loss: OutputLoss
    curvature: Curvature
    share: float

    @property
    def output(self) -> Tensor:
        """[rows, outputs], float64."""
        z = self.loss.full[0]
        return z.double().reshape(len(self.features), -1)

    @property
    def slope(self) -> Tensor:
        """The gradient of the loss over the output, [rows, outputs], float64."""
        return self.loss.gradient(self.loss.full)[0].double().reshape(len(self.features), -1)


@dataclass(frozen=True)
class Head:
    """The head's numbers, float64, and its batches.

    Attributes:
        weight: [outputs, width].
        bias: [outputs] or None.
        readings: one a batch.
        samples: rows of the batches' inputs.
    """

    weight: Tensor
    bias: Tensor | None
    readings: Sequence[Reading]
    samples: int

    @property
    def kind(self) -> str:
        """Of the loss: "quadratic", "cross_entropy" (over the last dimension) or "other"."""
        kinds = {_kind(r) for r in self.readings}
        return kinds.pop() if len(kinds) == 1 else "other"

    @property
    def features(self) -> Tensor:
        """Of all batches, [rows, width]."""
        return torch.cat([r.features for r in self.readings])

    @property
    def predictions(self) -> Tensor:
        """Of all batches without the bias, which no mask touches, [rows, outputs]."""
        return self.features @ self.weight.T

    @property
    def loss(self) -> float:
        """The plain loss, a mean over batches weighted by samples."""
        return math.fsum(r.share * r.loss.value(r.loss.full) for r in self.readings)


def _kind(reading: Reading) -> str:
    z, curvature = reading.loss.full[0], reading.curvature
    if curvature.kind == "cross_entropy" and curvature.dim != z.dim() - 1:
        return "other"
    return curvature.kind


def read(model: nn.Module, loss_fn: LossFunction, pairs: Sequence[Pair], name: str, seed: int) -> Head:
    """The head of that name on these batches, the model in eval mode and left as it was.

    Raises:
        UsageError: its output is not what the loss is computed from; and as `OutputLoss` says.
    """
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    total = sum(rows_of(inputs) for inputs, _ in pairs)
    readings = []
    with probe.undisturbed(model), torch.inference_mode(False):
        model.eval()
        for inputs, target in pairs:
            features, out, output = run(model, module, name, inputs)
            loss = OutputLoss(loss_fn, output, target, _WHERE)
            _check_is_output(loss, out, name)
            generator = torch.Generator(device=out.device).manual_seed(seed & (2**63 - 1))
            share = rows_of(inputs) / total
            readings.append(Reading(features, loss, recognise(loss, generator), share))
        weight = module.weight.detach().double()
        bias = None if module.bias is None else module.bias.detach().double()
    return Head(weight, bias, readings, total)


def run(model: nn.Module, module: nn.Linear, name: str, inputs: Any) -> tuple[Tensor, Tensor, Any]:
    """Features [rows, width] in float64, the head's own output and the model's."""
    seen: list[tuple[Tensor, Tensor]] = []

    def watch(_: nn.Module, args: Any, kwargs: Any, out: Tensor) -> None:
        x = args[0] if args else kwargs["input"]
        seen.append((x.detach().double().reshape(-1, module.in_features), out.detach()))

    handle = module.register_forward_hook(watch, with_kwargs=True)
    try:
        with torch.no_grad():
            output = call_model(model, inputs)
    finally:
        handle.remove()
    if len(seen) != 1:
        raise UsageError(
            f"head: {name} is called {len(seen)} times in a forward: only a layer that is called once is a "
            "head"
        )
    return *seen[0], output


def _check_is_output(loss: OutputLoss, out: Tensor, name: str) -> None:
    """Refuse a loss of anything but the head's output, in whatever shape."""
    point = loss.full
    own = out.to(point[0].dtype).reshape(-1)
    if len(point) != 1 or point[0].numel() != own.numel() or not torch.equal(point[0].reshape(-1), own):
        raise UsageError(
            f"head: the loss is not computed from the output of {name} alone, in the order it has there: "
            "name the last linear layer, whose output the loss takes"
        )


# --- masks drawn -------------------------------------------------------------------------------------------


def monte_carlo(head: Head, noise: HeadNoise, draws: int, seed: int) -> tuple[float, float]:
    """E loss(masked head) - loss, and its standard error over the draws.

    Estimator:
        Unbiased for every loss. The slope of the loss times what masks change has the mean 0 and is taken
        off, which leaves the mean Bregman divergence of the draws.
    """
    found = []
    for number, reading in enumerate(head.readings):
        device = reading.features.device
        generator = torch.Generator(device=device).manual_seed((seed + 7919 * number) & (2**63 - 1))
        full, slope = reading.loss.full, reading.loss.gradient(reading.loss.full)
        plain, changes = reading.loss.value(full), []
        for _ in range(draws):
            step = _change(head.weight, reading.features, noise, generator).reshape(full[0].shape)
            step = step.to(full[0])
            changes.append(reading.loss.value([full[0] + step]) - plain - inner(slope, [step]))
        found.append((reading.share, *mean_and_error(changes)))
    value = math.fsum(share * mean for share, mean, _ in found)
    return value, math.sqrt(math.fsum((share * error) ** 2 for share, _, error in found))


def _change(weight: Tensor, features: Tensor, noise: HeadNoise, generator: torch.Generator) -> Tensor:
    """What one draw of masks, one for each row, changes in the output; of weights one for all rows."""
    masked = weight if noise.weights else features
    drawn = noise.scheme.sample(*masked.shape, generator=generator, device=masked.device, dtype=torch.float64)
    masked = masked * (drawn - 1)
    return features @ masked.T if noise.weights else masked @ weight.T

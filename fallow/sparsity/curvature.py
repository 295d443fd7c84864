"""How much the loss bends along each weight: a running estimate from the training forwards themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import grad

from fallow.errors import RunError, UsageError, check_choice, check_count
from fallow.sparsity.weights import Weight

LOSSES = ("cross_entropy", "squared")


class Curvature:
    """The Gauss-Newton diagonal of the mean loss along the weights of linear layers and convolutions.

    Formula: ``h = mean over samples of delta^2 a^2``, a the inputs of a weight and delta the derivative of
    the loss by what the weight adds to, for labels drawn from the model's own predictions ("cross_entropy"),
    or for a unit normal error ("squared", of ``sum of squares / 2``).

    Every `every` training forwards of the whole model one more backward is taken through its graph, to the
    layers' outputs alone. Nothing else changes, and the draws come from a generator of their own.

    Args:
        model: its output is one tensor [rows, ..., classes].
        weights: of `weights_of`; those of other layers are refused.
        loss: of LOSSES.
        every: training forwards from one look to the next.
        decay: of the running mean.
        seed: of the labels.

    Attributes:
        looks: how often it has looked.

    Estimator:
        Unbiased at a fixed model for weights that act once a sample, over the draws of the labels; where a
        weight acts at many positions (convolutions, tokens) products of different positions are left out.

    Raises:
        UsageError: a weight of another kind of layer, other words or numbers.
        RunError: in the forward, where the output is not one floating-point tensor.

    References:
        Derived; Schraudolph (2002) and Martens (2014) for the matrix.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Sequence[Weight],
        *,
        loss: str = "cross_entropy",
        every: int = 10,
        decay: float = 0.9,
        seed: int = 0,
    ) -> None:
        self.loss, self.every = check_choice("loss", loss, LOSSES), check_count("every", every, 1)
        if not 0 <= decay < 1:
            raise UsageError(f"decay must be in [0, 1), got {decay!r}")
        self.decay, self.looks, self._forwards = decay, 0, 0
        self.values: dict[str, Tensor] = {}
        self._generators: dict[torch.device, torch.Generator] = {}
        self._seed, self._seen, self._looking = seed, [], False
        owners = {id(p): (m, n) for m in model.modules() for n, p in m.named_parameters(recurse=False)}
        self._model, self._layers = model, []
        for weight in weights:
            layer, name = owners[id(weight.parameter)]
            if name != "weight" or not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
                raise UsageError(
                    f"{weight.name} is of {type(layer).__name__}: curvature is known of linear layers and "
                    "convolutions; leave it out with exclude="
                )
            self._layers.append((layer, weight.name))
        self._hooks: list[Any] = []
        self.attach()

    def attach(self) -> None:
        """Watch the model's forwards."""
        self.remove()
        self._hooks = [
            self._model.register_forward_pre_hook(_Hook(self._begin)),
            self._model.register_forward_hook(_Hook(self._end)),
        ]
        for layer, name in self._layers:
            self._hooks.append(layer.register_forward_hook(_Hook(partial(self._see, name))))

    def remove(self) -> None:
        """Take the hooks off the model; what is known stays."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _begin(self, model: nn.Module, _: Any) -> None:
        self._seen = []
        if model.training and torch.is_grad_enabled():
            self._looking = self._forwards % self.every == 0
            self._forwards += 1
        else:
            self._looking = False

    def _see(self, name: str, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if self._looking and output.requires_grad:
            self._seen.append((name, layer, args[0].detach(), output))

    def _end(self, model: nn.Module, _: Any, output: Any) -> None:
        seen, self._seen = self._seen, []
        if not self._looking or not seen:
            return
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise RunError(
                "curvature needs a model whose output is one floating-point tensor, got "
                f"{type(output).__name__}: wrap the model so that it gives its predictions alone"
            )
        with torch.enable_grad():
            value = self._sampled(output)
            slopes = torch.autograd.grad(
                value, [out for *_, out in seen], retain_graph=True, allow_unused=True
            )
        rows = output.shape[0]
        found: dict[str, Tensor] = {}
        for (name, layer, inputs, _), slope in zip(seen, slopes, strict=True):
            if slope is not None:
                part = _squares(layer, inputs, slope) / rows
                found[name] = found[name] + part if name in found else part
        keep = self.decay if self.looks else 0.0
        for name, h in found.items():
            before = self.values.get(name)
            self.values[name] = h if before is None else before.mul_(keep).add_(h, alpha=1 - keep)
        self.looks += 1

    def _sampled(self, output: Tensor) -> Tensor:
        """A loss whose derivatives by the output have the Hessian as their second moment."""
        device = output.device
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        generator = self._generators[device]
        flat = output.flatten(0, -2).float()
        if self.loss == "squared":
            normal = torch.randn(flat.shape, generator=generator, device=device, dtype=flat.dtype)
            return (flat * normal).sum()
        labels = torch.multinomial(flat.detach().softmax(-1), 1, generator=generator)[:, 0]
        return F.cross_entropy(flat, labels, reduction="sum")

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        draws = {str(device): generator.get_state() for device, generator in self._generators.items()}
        return {"values": dict(self.values), "looks": self.looks, "forwards": self._forwards, "draws": draws}

    def load(self, state: dict[str, Any]) -> None:
        """Bring it back."""
        self.values = {name: value.clone() for name, value in state["values"].items()}
        self.looks, self._forwards = int(state["looks"]), int(state["forwards"])
        for name, draws in state["draws"].items():
            device = torch.device(name)
            self._generators[device] = torch.Generator(device)
            self._generators[device].set_state(draws.cpu())


class _Hook:
    """A forward hook that does not go into copies of the model: they are not what is made sparse."""

    def __init__(self, call: Callable[..., None]) -> None:
        self.call = call

    def __call__(self, *args: Any) -> None:
        self.call(*args)

    def __deepcopy__(self, memo: Any) -> _Hook:
        return _Hook(_nothing)

    def __reduce__(self) -> Any:
        return _Hook, (_nothing,)


def _nothing(*_: Any) -> None:
    """The hook of a copy."""


def _squares(layer: nn.Module, inputs: Tensor, slope: Tensor) -> Tensor:
    """Sum over rows and positions of ``delta^2 a^2``, of the weight's shape."""
    a, d = inputs.float().square(), slope.float().square()
    if isinstance(layer, nn.Linear):
        return d.flatten(0, -2).T @ a.flatten(0, -2)
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise RunError("curvature of convolutions knows zero padding of given sizes alone")
    dims = a.dim() - 2
    make: Any = (grad.conv1d_weight, grad.conv2d_weight, grad.conv3d_weight)[dims - 1]
    shape = layer.weight.shape
    return make(a, shape, d, layer.stride, layer.padding, layer.dilation, layer.groups)

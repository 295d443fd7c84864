"""What the user holds of the noise on the layers of a model."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from fallow.errors import RateError, RunError, UsageError
from fallow.noise._attached import Attached, attached

Own = TypeVar("Own", bound="Handle")


class Handle:
    """Noise of one kind on layers of a model.

    All there is to know sits on the modules themselves: `of` finds it again there, on a copy for instance.

    Attributes:
        model: That in which the layers were found.
    """

    kind: ClassVar[type[Attached]] = Attached

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._found: dict[str, tuple[Any, str]] = {}
        for name, noise, own in attached(model):  # a layer that has two names is here under its first
            if isinstance(noise, self.kind) and (noise, own) not in self._found.values():
                self._found[name] = (noise, own)

    @classmethod
    def of(cls: type[Own], model: nn.Module) -> Own | None:
        """The noise of this kind on a model or one of its parts, on a copy for instance; None without."""
        handle = cls(model)
        return handle if handle._found else None

    @classmethod
    def holding(cls: type[Own], model: nn.Module, layers: Sequence[Attached]) -> Own:
        """The noise of just these layers."""
        handle = cls(model)
        handle._found = {name: pair for name, pair in handle._found.items() if pair[0] in layers}
        return handle

    @property
    def names(self) -> list[str]:
        """Of the parameters with this noise, as in the model's state dict."""
        return list(self._found)

    def remove(self) -> None:
        """Leave the model as it was before; again: nothing."""
        for noise in self._layers():
            noise.remove()
        self._found = {}

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is learned besides the model's own; they are among `model.parameters()` too."""
        for noise, name in self._found.values():
            if noise.extra:
                yield noise.learned(name)

    def survival_rates(self) -> dict[str, Tensor]:
        """The keep probabilities by the name of the weight, of a shape that broadcasts with it; detached."""
        return {name: noise.rates(own) for name, (noise, own) in self._found.items()}

    def plain_state_dict(self) -> dict[str, Any]:
        """A state dict for the plain model that computes what this one does at evaluation.

        Without what is learned for the noise; also of other kinds of noise on the model.
        """
        return plain_state_dict(self.model)

    def harden(self) -> dict[str, Tensor]:
        """Make the weights at evaluation the parameters, take the noise off; where they are not 0, by name.

        Raises:
            RunError: a weight is not finite; nothing was changed.
        """
        self._refuse_not_finite("nothing was changed")
        plain = {name: settled(noise, own) for name, (noise, own) in self._found.items()}
        with torch.no_grad():
            for name, (noise, own) in self._found.items():
                noise.weight(own).copy_(plain[name])
        self.remove()
        return {name: weight != 0 for name, weight in plain.items()}

    def _refuse_not_finite(self, words: str) -> None:
        """Zeros made from NaN would look like a result."""
        for name, (noise, own) in self._found.items():
            learned = {name + noise.extra: noise.learned(own)} if noise.extra else {}
            for key, value in {name: noise.weight(own), **learned}.items():
                if not bool(value.isfinite().all()):
                    raise RunError(f"{key} has NaN or infinite entries: {words}; load the last checkpoint")

    def _layers(self) -> list[Any]:
        return list({id(noise): noise for noise, _ in self._found.values()}.values())

    def __repr__(self) -> str:
        return f"{type(self).__name__} on {', '.join(self._found) or 'nothing'}"


def settled(noise: Attached, name: str) -> Tensor:
    """The weight that a forward sees at evaluation; detached."""
    before, noise.module.training = noise.module.training, False
    try:
        with torch.no_grad():
            return noise.seen(name, noise.weight(name)).detach()
    finally:
        noise.module.training = before


def plain_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state dict of a model without its noise: weights as at evaluation, nothing that was learned for it.

    It loads into the plain model, which then computes what the noisy one does at evaluation (of noise on
    activations, as of standout, nothing is left). A state dict with the noise's own keys does not load there.

    Examples:
        >>> from fallow.noise import weight_dropout_
        >>> layer = nn.Linear(1, 2)
        >>> drop = weight_dropout_(layer, torch.tensor([[0.0], [1.0]]))
        >>> plain_state_dict(layer)["weight"][0]
        tensor([0.])
    """
    state = model.state_dict()
    for name, noise, own in attached(model):
        if name not in state:  # noise on outputs
            continue
        state[name] = settled(noise, own)
        if noise.extra:
            del state[name + noise.extra]
    return state


def check_rates(name: str, rates: object, shape: torch.Size, *, lowest: float = 0.0) -> Tensor:
    """Survival rates as a detached tensor that broadcasts with a weight; in [lowest, 1], none NaN."""
    if isinstance(rates, bool) or not isinstance(rates, numbers.Real | Tensor):
        raise RateError(f"{name}: survival rates must be a number or a tensor, got {rates!r}")
    given = (
        rates.detach().clone()
        if isinstance(rates, Tensor)
        else torch.tensor(float(rates), dtype=torch.float64)
    )
    try:
        fits = given.is_floating_point() and torch.broadcast_shapes(given.shape, shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        raise RateError(
            f"{name}: survival rates must be floating point and broadcast with {list(shape)}, got "
            f"{given.dtype} of shape {list(given.shape)}"
        )
    wrong = ~((given >= lowest) & (given <= 1))
    if bool(wrong.any()):
        bad = float(given[wrong][0])
        raise RateError(f"{name}: survival rates must be in [{lowest:g}, 1], got {bad:g}")
    return given


def group_shape(module: nn.Module, name: str, weight: Tensor, groups: str) -> tuple[int, ...]:
    """The shape, broadcasting with a weight, of one number for each group.

    Raises:
        UsageError: The module has no such groups.
    """
    shape = tuple(weight.shape)
    if groups == "weights":
        return shape
    kind = f"{name} of {type(module).__name__}"
    path = name.rpartition(".")[0]
    owner: Any = module.get_submodule(path)
    if isinstance(owner, nn.modules.conv._ConvTransposeNd) or len(shape) < 2:
        raise UsageError(f"{kind} of shape {list(shape)} has no rows for outputs: leave it out of names")
    if groups == "outputs":
        return (shape[0], *(1,) * (len(shape) - 1))
    if getattr(owner, "groups", 1) > 1:
        raise UsageError(
            f"{kind} is in groups, whose inputs are those of its group only: leave it out of names"
        )
    return (1, shape[1], *(1,) * (len(shape) - 2))


def draw(
    how: Callable[..., Tensor], shape: Sequence[int], like: Tensor, generator: torch.Generator | None
) -> Tensor:
    """`torch.rand` or `torch.randn` in the type and on the device of `like`, drawn where the generator is."""
    place = like.device if generator is None else generator.device
    return how(tuple(shape), generator=generator, device=place, dtype=like.dtype).to(like.device)

"""Weight dropout whose survival rates are set from outside, for each weight or group: adaptive dropout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fallow.errors import ArgumentError, RateError, UsageError, check_choice, check_number, refuse_unknown
from fallow.noise._attached import Attached, placed
from fallow.noise._handle import Handle, check_rates, draw

KINDS = ("bernoulli", "gaussian")


def weight_dropout(
    weight: Tensor,
    rates: float | Tensor,
    *,
    kind: str = "bernoulli",
    shared: bool = False,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A weight times noise of mean 1 and variance ``(1 - a) / a``, a the survival rates.

    Formula: in training ``s * w``; "bernoulli": s = 1 / a with probability a, else 0; "gaussian":
    s ~ N(1, (1 - a) / a). Where a is 0 the weight is 0, at evaluation too; otherwise evaluation gives w.

    Shape:
        weight: any.
        rates: a number, or of a shape that broadcasts with the weight.
        returns: that of the weight.

    Args:
        weight: What is masked.
        rates: a in [0, 1]. No gradient goes through them: it would make another penalty of them.
        kind: "bernoulli" or "gaussian".
        shared: One draw for each number in `rates`, so that groups live and die as a whole; otherwise one for
            each weight.
        training: Noise or none.
        generator: Of the draws; None: torch's default one of the weight's device.

    Raises:
        RateError: Rates outside [0, 1], NaN, or of another shape.
        UsageError: Another kind.

    Estimator:
        Unbiased for the weight. For a loss that is quadratic in it, with curvature H, the expected loss is
        exactly ``L(w) + sum_j (1 - a_j) / a_j H_jj w_j^2 / 2``, a Tikhonov penalty; for a shared draw the
        blocks of H take the place of the diagonal. For other losses that holds to second order in the noise.

    References:
        Derived: project's notes, equations (1) and (2). LeJeune, Javadi, Baraniuk: The Flip Side of the
        Reweighted Coin (2021), for what rates that follow the weights penalise.

    Examples:
        >>> weight_dropout(torch.ones(3), 0.5, training=False)
        tensor([1., 1., 1.])
        >>> noisy = weight_dropout(torch.ones(1000), 0.5)
        >>> sorted(set(noisy.tolist()))
        [0.0, 2.0]
    """
    check_choice("kind", kind, KINDS)
    checked = check_rates("weight_dropout", rates, weight.shape)
    wide = checked.to(device=weight.device, dtype=torch.promote_types(weight.dtype, torch.float32))
    if training:
        return _noisy(weight, wide, kind, shared, generator)
    return weight if bool((wide > 0).all()) else weight.masked_fill(wide == 0, 0)


def _noisy(
    weight: Tensor, rates: Tensor, kind: str, shared: bool, generator: torch.Generator | None
) -> Tensor:
    shape = rates.shape if shared else weight.shape
    if kind == "bernoulli":
        scale = (draw(torch.rand, shape, rates, generator) < rates) / rates
    else:
        scale = 1 + ((1 - rates) / rates).sqrt() * draw(torch.randn, shape, rates, generator)
    # the product is taken in the type of the rates: a half factor would be off by up to 1 / 256 in the mean
    return (weight * torch.where(rates > 0, scale, 0.0)).to(weight.dtype)


class _Masked(Attached):
    words: ClassVar[str] = "WeightDropout"

    def __init__(
        self,
        module: nn.Module,
        names: tuple[str, ...],
        kind: str,
        shared: bool,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__(module, names, generator)
        self.kind, self.shared = kind, shared
        self.values: dict[str, Tensor] = {}
        self.gone: set[str] = set()  # names with rates of 0, so that evaluation need not look
        self.put()

    def take(self, name: str, rates: Tensor) -> None:
        if not self.shared and not rates.dim():
            rates = rates.expand_as(self.weight(name))
        self.values[name] = rates
        (self.gone.discard if bool((rates > 0).all()) else self.gone.add)(name)

    def seen(self, name: str, weight: Tensor) -> Tensor:
        rates = self.values[name] = self.values[name].to(weight.device)
        if self.module.training:
            return _noisy(weight, rates, self.kind, self.shared, self.generator)
        return weight.masked_fill(rates == 0, 0) if name in self.gone else weight

    def rates(self, name: str) -> Tensor:
        return self.values[name].clone()


class WeightDropout(Handle):
    """What `weight_dropout_` has put on a model; made by it."""

    kind: ClassVar[type[Attached]] = _Masked

    @property
    def rates(self) -> dict[str, Tensor]:
        """The survival rates by the name of the weight; set them to a mapping, or to one value for all."""
        return self.survival_rates()

    @rates.setter
    def rates(self, value: float | Tensor | Mapping[str, float | Tensor]) -> None:
        given: Mapping[str, Any] = (
            value if isinstance(value, Mapping) else dict.fromkeys(self._found, value)  # type: ignore[arg-type]
        )
        for name in given:
            if name not in self._found:
                raise RateError(
                    f"no weight {name!r} has weight dropout here; there are {', '.join(self.names)}"
                )
        checked = {}
        for name, rates in given.items():
            noise, own = self._found[name]
            weight = noise.weight(own)
            wide = torch.promote_types(weight.dtype, torch.float32)
            checked[name] = check_rates(name, rates, weight.shape).to(device=weight.device, dtype=wide)
        for name, rates in checked.items():
            noise, own = self._found[name]
            noise.take(own, rates)

    @torch.no_grad()
    def update(self, eta: Callable[[Tensor], Tensor], strength: float) -> None:
        """Set the rates to ``eta(|w|) / (eta(|w|) + strength)``, after each step of the optimiser.

        With an eta that does not fall in ``|w|`` the training minimises, to second order in the noise, the
        loss plus ``strength sum_j h_j Omega(w_j)``, ``Omega' = w / eta``, h the loss's curvature.

        Args:
            eta: From magnitudes to inverse Tikhonov weights, not negative; infinite: never dropped. A
                `fallow.penalties` object's `eta`, for instance. Of groups it gets root mean squares.
            strength: lambda, finite and not negative; 0: nothing is dropped.

        Raises:
            RunError: A weight is not finite; all rates are as they were.
            ArgumentError: eta gives no tensor of the magnitudes' shape.
            UsageError: eta gives negative numbers or NaN; a strength that cannot be.

        References:
            Derived: project's notes, 1.4 (ii) and (v).
        """
        lam = check_number("strength", strength, 0.0)
        self._refuse_not_finite("no rate was changed")
        found = {}
        for name, (noise, own) in self._found.items():
            magnitude = _magnitude(noise.weight(own).detach(), noise.rates(own).shape)
            found[name] = _rates(name, eta, magnitude, lam)
        self.rates = found

    def harden(self, cut: float = 0.05) -> dict[str, Tensor]:
        """Set weights whose survival rate is below `cut` to 0, take the noise off; True = kept, by name."""
        limit = check_number("cut", cut, 0.0, 1.0)
        rates = self.survival_rates()
        self._refuse_not_finite("nothing was changed")
        masks = {}
        with torch.no_grad():
            for name, (noise, own) in self._found.items():
                weight = noise.weight(own)
                masks[name] = ((rates[name] >= limit) & (rates[name] > 0)).expand_as(weight)
                weight.masked_fill_(~masks[name], 0)
        self.remove()
        return masks


def _magnitude(weight: Tensor, shape: torch.Size) -> Tensor:
    """Root mean square over each group, of the shape of its rates; ``|w|`` of single weights."""
    padded = (1,) * (weight.dim() - len(shape)) + tuple(shape)
    axes = [i for i, size in enumerate(padded) if size == 1 < weight.shape[i]]
    if not axes:
        return weight.abs().reshape(shape)
    count = math.prod(weight.shape[i] for i in axes)
    return (torch.linalg.vector_norm(weight, dim=axes, keepdim=True) / math.sqrt(count)).reshape(shape)


def _rates(name: str, eta: Callable[[Tensor], Tensor], magnitude: Tensor, strength: float) -> Tensor:
    found = eta(magnitude)
    if not isinstance(found, Tensor) or found.shape != magnitude.shape:
        got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ArgumentError(f"{name}: eta must give a tensor of shape {list(magnitude.shape)}, got {got}")
    if not bool((found >= 0).all()):
        bad = magnitude[~(found >= 0)].reshape(-1)[0]
        raise UsageError(f"{name}: eta must not be negative or NaN, but it is at magnitude {float(bad):g}")
    if strength == 0:
        return torch.ones_like(found)
    return torch.where(found.isinf(), 1.0, found / (found + strength))


def weight_dropout_(
    module: nn.Module,
    rates: float | Tensor | Mapping[str, float | Tensor] = 1.0,
    *,
    names: str | Iterable[str] | None = None,
    kind: str = "bernoulli",
    shared: bool = False,
    generator: torch.Generator | None = None,
    **unknown: Any,
) -> WeightDropout:
    """Put `weight_dropout` on weights of a layer or a model, with rates that may change at any time.

    In a training forward a layer sees noisy weights where its parameters are. The parameters themselves,
    state_dict keys and optimisers stay as they are; copies and pickles have noise of their own.

    Args:
        module: A layer or a whole model.
        rates: Survival rates in [0, 1]: one for all, or a mapping from names; each a number, or a tensor that
            broadcasts with the weight: [out, 1] has one rate for each output.
        names: Of parameters, as in `named_parameters`; None: the weights of all linear layers and
            convolutions.
        kind: "bernoulli" or "gaussian".
        shared: One draw for each rate instead of one for each weight.
        generator: Of the draws; None: torch's default one of the weight's device. Under activation
            checkpointing take None: what is computed again restores that one's state alone.
        unknown: Refused, with the conversion for p= and the like.

    Returns:
        The handle: `rates` may be set, `update` computes them from the weights, `harden` makes zeros of what
        is hardly ever kept, `remove` takes the noise off.

    Raises:
        RateError: Rates outside [0, 1], NaN, of a shape that does not fit; a name without weight.
        ArgumentError: No module, an unknown keyword.
        UsageError: Names that are no parameters, or have noise already; NaN weights; another kind.

    Estimator:
        As of `weight_dropout`. With rates that follow the weights the expected gradient is that of the
        penalised loss, since none goes through the rates.

    References:
        LeJeune, Javadi, Baraniuk: The Flip Side of the Reweighted Coin (2021).

    Examples:
        >>> layer = nn.Linear(3, 2)
        >>> drop = weight_dropout_(layer, 0.8)
        >>> drop.update(lambda w: w * (w + 2), strength=1e-3)
        >>> drop.rates["weight"].shape, list(layer.state_dict())
        (torch.Size([2, 3]), ['weight', 'bias'])
        >>> drop.remove()
    """
    refuse_unknown(
        "weight_dropout_", unknown, ("rates", "names", "kind", "shared", "generator"), rate="rates"
    )
    check_choice("kind", kind, KINDS)
    sites = placed("weight_dropout_", module, names)
    layers = [_Masked(site, own, kind, shared, generator) for site, own in sites]
    try:
        handle = WeightDropout.holding(module, layers)
        handle.rates = rates
    except Exception:
        for layer in layers:
            layer.remove()
        raise
    return handle

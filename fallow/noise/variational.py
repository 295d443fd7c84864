"""Variational dropout: Gaussian noise on weights, the variance of each learned with the weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fallow import kernels
from fallow.errors import UsageError, check_choice, check_number
from fallow.noise._attached import Attached, placed
from fallow.noise._handle import Handle, draw
from fallow.noise._learned import SMALL, Learned, kl, molchanov_kl

FORMS = {"additive": ("_log_variance", -10.0), "multiplicative": ("_log_alpha", -5.0)}
SAMPLES = ("activations", "weights")
_DIVERGENCES = {"exact": kl, "fit": molchanov_kl}  # of log alpha
_LOCAL = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


class _Learned(Attached):
    words: ClassVar[str] = "VariationalNoise"

    def __init__(
        self,
        module: nn.Module,
        names: tuple[str, ...],
        law: Learned,
        sample: str,
        first: float,
        cut: float,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__(module, names, generator)
        self.law, self.sample, self.first, self.cut = law, sample, first, cut
        self.extra = FORMS["additive" if law.additive else "multiplicative"][0]
        self.put()
        if sample == "activations":
            self._hooks.append(module.register_forward_hook(self._disturb, with_kwargs=True))

    def start(self, name: str, weight: Tensor) -> Tensor:
        return torch.full_like(weight, self.first)

    def log_alpha(self, name: str, weight: Tensor) -> Tensor:
        return self.law.log_alpha(self.learned(name), weight)

    def keeps(self, name: str, weight: Tensor) -> Tensor:
        return torch.sigmoid(-self.log_alpha(name, weight)) >= self.cut

    def seen(self, name: str, weight: Tensor) -> Tensor:
        if not self.module.training:
            return weight.masked_fill(~self.keeps(name, weight), 0)
        if self.sample == "activations":
            return weight
        normal = draw(torch.randn, weight.shape, weight, self.generator)
        return self.law.draw(self.learned(name), weight, normal)

    def rates(self, name: str) -> Tensor:
        with torch.no_grad():
            return torch.sigmoid(-self.log_alpha(name, self.weight(name)))

    def _disturb(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
        """Activations with the variance that noise on the weights gives them."""
        if not module.training:
            return output
        square = (args[0] if args else kwargs["input"]).square()
        variance = self.law.variance(self.learned("weight"), self.weight("weight"))
        if isinstance(module, nn.Linear):
            spread = linear(square, variance)
        else:
            spread = module._conv_forward(square, variance, None)
        return output + (spread + SMALL).sqrt() * draw(torch.randn, output.shape, output, self.generator)


class VariationalNoise(Handle):
    """What `variational_` has put on a model; made by it."""

    kind: ClassVar[type[Attached]] = _Learned

    @property
    def cut(self) -> float:
        """At evaluation weights whose survival rate is below it are 0; may be set, 0 for none."""
        return next((noise.cut for noise in self._layers()), 0.0)

    @cut.setter
    def cut(self, value: float) -> None:
        limit = check_number("cut", value, 0.0, 1.0)
        for noise in self._layers():
            noise.cut = limit

    def kl(self, divergence: str | Callable[[Tensor], Tensor] = "exact") -> Tensor:
        """The divergence from the weights' distribution to the log-uniform prior, summed; differentiable.

        The bound of n samples is the mean loss plus ``kl() / n``. Without a slow start (a factor from 0 to 1
        over the first epochs) it may take all weights before they have learned.

        Args:
            divergence: "exact"; "fit", as published; or a function of ``1 / alpha``, elementwise.

        Raises:
            UsageError: another word.
        """
        if not callable(divergence):
            check_choice("divergence", divergence, _DIVERGENCES)
            if (short := self._divergence(divergence == "exact")) is not None:
                return short
        total = torch.zeros(())
        for i, found in enumerate(self._log_alphas().values()):
            part = divergence((-found).exp()) if callable(divergence) else _DIVERGENCES[divergence](found)
            part = part.sum()
            total = part if not i else total + part.to(total.device)
        return total

    def log_alpha(self) -> dict[str, Tensor]:
        """``log alpha``, of the noise's variance over the squared weight, clipped, by name; detached."""
        return {name: found.detach() for name, found in self._log_alphas().items()}

    def masks(self) -> dict[str, Tensor]:
        """True = kept at evaluation, by name."""
        with torch.no_grad():
            return {name: noise.keeps(own, noise.weight(own)) for name, (noise, own) in self._found.items()}

    def _divergence(self, exact: bool) -> Tensor | None:
        """The divergence or its fit in one pass, where there is one law for all."""
        laws = {noise.law for noise in self._layers()}
        pairs = [(noise.learned(own), noise.weight(own)) for noise, own in self._found.values()]
        return laws.pop().divergence(exact, pairs) if len(laws) == 1 else None

    def _log_alphas(self) -> dict[str, Tensor]:
        return {name: noise.log_alpha(own, noise.weight(own)) for name, (noise, own) in self._found.items()}


def variational_(
    module: nn.Module,
    *,
    names: str | Iterable[str] | None = None,
    form: str = "additive",
    sample: str = "activations",
    start: float | None = None,
    clip: float = 8.0,
    cut: float = 0.05,
    generator: torch.Generator | None = None,
) -> VariationalNoise:
    """Let weights of a layer or a model be normal random numbers whose variances are learned.

    Formula: in training ``w + sqrt(alpha) w e``, e standard normal, for each weight; with the weight its
    ``log alpha`` is learned (multiplicative), or ``log sigma^2 = log(alpha w^2)`` (additive: gradients of
    weights are free of their own noise). At evaluation w, or 0 where the survival rate ``1 / (1 + alpha)`` is
    below `cut`. The loss wants `VariationalNoise.kl`, divided by the number of samples.

    Beside each parameter there is a new one, named ``weight_log_variance`` or ``weight_log_alpha``: make the
    optimiser afterwards. State dicts of the plain model load into the noisy one, where the new parameters
    begin anew then; for the way back see `VariationalNoise.plain_state_dict` and `VariationalNoise.harden`.

    Args:
        module: A layer or a whole model.
        names: Of parameters, as in `named_parameters`; None: the weights of all linear layers and
            convolutions.
        form: "additive" or "multiplicative".
        sample: "activations": noise on the layer's outputs, independent from row to row (and from place to
            place), with the mean and variance that noise on the weights would give; linear layers and
            convolutions only. "weights": one draw of the weights a forward.
        start: log sigma^2 or log alpha at first; None: -10 or -5.
        clip: log alpha is held in [-clip, clip].
        cut: 0 for no cut; 0.05 is ``log alpha > 2.944``.
        generator: Of the draws; None: torch's default one. Under activation checkpointing take None.

    Raises:
        ArgumentError: No module.
        UsageError: Names that are no parameters or have noise already; NaN weights; another form or sample;
            "activations" for another layer; numbers that cannot be.

    Estimator:
        Unbiased for the expected loss under the weights' distribution, for losses that sum over rows (and, of
        convolutions, see one place) in both samples; with less variance from "activations", where 1e-8 is
        added to each variance. The additive alpha is ``sigma^2 / (w^2 + 1e-8)``.

    References:
        Kingma, Salimans, Welling: Variational dropout and the local reparameterization trick (2015).
        Molchanov, Ashukha, Vetrov: Variational dropout sparsifies deep neural networks (2017), for the
        additive form, clip and start.

    Examples:
        >>> layer = nn.Linear(3, 2)
        >>> noise = variational_(layer)
        >>> list(layer.state_dict())
        ['weight', 'bias', 'weight_log_variance']
        >>> loss = layer(torch.ones(4, 3)).square().mean() + noise.kl() / 4
        >>> noise.survival_rates()["weight"].shape
        torch.Size([2, 3])
        >>> noise.remove()
    """
    check_choice("form", form, FORMS)
    check_choice("sample", sample, SAMPLES)
    first = check_number("start", FORMS[form][1] if start is None else start, -50.0, 50.0)
    bound = check_number("clip", clip, 0.0, 40.0)
    limit = check_number("cut", cut, 0.0, 1.0)
    sites = placed("variational_", module, names)
    if sample == "activations":
        for site, own in sites:
            if type(site).forward not in _LOCAL or own != ("weight",):
                raise UsageError(
                    'sample="activations" is for the weight of linear layers and convolutions, got '
                    f'{", ".join(own)} of {type(site).__name__}; use sample="weights"'
                )
    count = sum(site.get_parameter(name).numel() for site, own in sites for name in own)
    law = Learned(form == "additive", bound, count >= kernels.WORTH)
    return VariationalNoise.holding(
        module, [_Learned(site, own, law, sample, first, limit, generator) for site, own in sites]
    )

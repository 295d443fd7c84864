"""A model's last layer trained as if its features were dropped, without drawing a mask.

The expected loss over masks in front of a linear head is the plain loss and a term that the features and the
weight determine: `omega` for squared error, exactly, and a surrogate for cross-entropy. So the noise of masks
leaves the gradients and its regularisation stays.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from fallow.errors import ArgumentError, SiteError, UsageError, check_choice, nearest
from fallow.penalties._forms import check_scheme
from fallow.penalties._watch import Watch
from fallow.penalties.omega import omega
from fallow.penalties.surrogates import jensen_bound, quadratic_surrogate
from fallow.schemes import Blocks, Layer, Scheme, Units

# What F.cross_entropy leaves out by default.
_IGNORED = -100
# Where fallow.noise, which penalties do not import, keeps what sits on the parameters of a module.
_ATTACHED = "_fallow_noise"


class HeadPenalty:
    """What masks of a scheme in front of one linear layer would add to the loss in expectation.

    ``loss(model(x), y) + head.penalty()`` is, for squared error, exactly the expectation of the loss over the
    masks, and its gradient for every parameter of the model is that of the expectation. Call `penalty` once
    after each training forward; it covers all calls of the layer in it.

    The layer's output must be what the loss takes, and no noise may stand directly in front of it or on its
    weight: take a dropout out that this penalty replaces (modules are refused, ``F.dropout`` cannot be seen).
    The model computes what it did, its state-dict keys are the same, and evaluation has no penalty. A deep
    copy or a pickle of the model has none either; one of this object has its own copy of both.

    Args:
        model: Any module, before `torch.compile` and wrappers such as DistributedDataParallel.
        name: Of an nn.Linear in it, as in ``model.named_modules()``.
        scheme: One of `fallow.schemes`; may be set at any time.
        loss: "squared" or "cross_entropy", of the plain loss that it is added to.
        surrogate: For cross-entropy: "quadratic", the second order in the noise, for every scheme; or
            "bound", which makes the sum an upper bound of the expectation, for `Units` of one rate, disjoint
            `Blocks` and `Layer`.
        reduction: "mean" or "sum", as in ``F.mse_loss`` (over samples and outputs) and ``F.cross_entropy``
            (over samples; those with a target of -100 do not count, where targets are given).

    Raises:
        SiteError: no nn.Linear of that name.
        ArgumentError: a model or a scheme that is none.
        UsageError: a scheme that does not fit the layer's width or the bound, another word than those above.

    Estimator:
        Squared error: exact, for one mask a batch and for one each sample. Cross-entropy: see
        `quadratic_surrogate` and `jensen_bound`, with their measured errors. BatchNorm and noise earlier in
        the model are part of the features. Computed in float32 at least.

    References:
        Derived; for Dropout and cross-entropy Wager and others (2013).

    Examples:
        >>> from fallow.schemes import Units
        >>> model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> head = HeadPenalty(model, "2", Units(0.8))
        >>> x, y = torch.randn(8, 4), torch.randn(8, 2)
        >>> (nn.functional.mse_loss(model(x), y) + head.penalty()).backward()
        >>> head.remove()
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        scheme: Scheme,
        *,
        loss: str = "squared",
        surrogate: str = "quadratic",
        reduction: str = "mean",
    ) -> None:
        self.loss = check_choice("loss", loss, ("squared", "cross_entropy"))
        self.surrogate = check_choice("surrogate", surrogate, ("quadratic", "bound"))
        self.reduction = check_choice("reduction", reduction, ("mean", "sum"))
        if loss == "squared" and surrogate == "bound":
            raise UsageError('surrogate="bound" is for loss="cross_entropy": that of squared error is exact')
        self.model, self.name = model, name
        self._head = _linear(model, name)
        self.scheme = scheme
        self._watch = Watch(model, self._head)
        # nobody can ask for what it would hold
        weakref.finalize(self, self._watch.remove).atexit = False

    def __reduce__(self) -> Any:
        options = (self.loss, self.surrogate, self.reduction)
        return _rebuilt, (self.model, self.name, self.scheme, *options, self._watch.attached)

    def __repr__(self) -> str:
        return f"HeadPenalty({self.name!r}, {self.scheme}, loss={self.loss!r})"

    @property
    def scheme(self) -> Scheme:
        """The law of the masks."""
        return self._scheme

    @scheme.setter
    def scheme(self, scheme: Scheme) -> None:
        check_scheme(scheme).check(self._head.in_features)
        if self.surrogate == "bound":
            _blocks_of(scheme, self._head.in_features)
        self._scheme = scheme

    def penalty(self, targets: Tensor | None = None) -> Tensor:
        """The term to add to the loss of the last training forward, a scalar; lets go of what it saw.

        Args:
            targets: Needed for ``surrogate="bound"``: as in `jensen_bound`. For the quadratic one they only
                say which samples do not count.

        Raises:
            UsageError: no training forward since the last call, or one without gradients; noise directly in
                front of the layer or on its weight; targets that are missing or do not fit.
        """
        x = self._taken()
        rows = x.shape[0]
        if self.loss == "squared":
            total, count = omega(self._head.weight, x, self._scheme), rows * self._head.out_features
        else:
            x, targets = _counted(x, targets)
            total, count = self._cross_entropy(x, targets), x.shape[0]
        return total / max(count, 1) if self.reduction == "mean" else total

    def remove(self) -> None:
        """Take the hooks out of the model; `penalty` is of no use afterwards."""
        self._watch.remove()

    def _taken(self) -> Tensor:
        """The features [N, d] of the last training forward."""
        watch, inputs = self._watch, self._watch.inputs
        noise, graph = watch.noise, watch.graph
        watch.clear()
        if not watch.attached:
            raise UsageError(f"{self.name}: this penalty was removed from its model: make a new HeadPenalty")
        if not inputs:
            raise UsageError(
                f"{self.name}: no training forward since the last penalty(): call model.train() and the "
                "model first, and penalty() once after each forward"
            )
        if noise is not None:
            raise UsageError(
                f"{self.name}: {noise} drops what this layer gets, so the noise would count twice: put "
                "nn.Identity there or a rate that drops nothing, since the penalty stands for it"
            )
        for of, other in vars(self._head).get(_ATTACHED, {}).items():
            raise UsageError(
                f"{self.name}: its {of} has {other.words}, so noise would count twice: remove() that, since "
                "the penalty stands for it (for DropConnect with schemes.Units)"
            )
        if torch.is_grad_enabled() and not graph:
            raise UsageError(
                f"{self.name}: the forward ran without gradients: call penalty() under no_grad too; with "
                "checkpoints pass use_reentrant=False"
            )
        flat = [x.reshape(-1, x.shape[-1]) for x in inputs]
        return flat[0] if len(flat) == 1 else torch.cat(flat)

    def _cross_entropy(self, x: Tensor, targets: Tensor | None) -> Tensor:
        weight, bias = self._head.weight, self._head.bias
        if self.surrogate == "quadratic":
            return quadratic_surrogate(weight, x, self._scheme, bias=bias)
        if targets is None:
            raise UsageError(f'{self.name}: surrogate="bound" needs the targets: call penalty(targets)')
        rate, block_size = _blocks_of(self._scheme, x.shape[1])
        bound = jensen_bound(weight, x, targets, survival_rate=rate, block_size=block_size, bias=bias)
        return bound - jensen_bound(weight, x, targets, survival_rate=1.0, block_size=block_size, bias=bias)


def _linear(model: object, name: str) -> nn.Linear:
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be an nn.Module, got {type(model).__name__}")
    modules = dict(model.named_modules())
    found = modules.get(name)
    if isinstance(found, nn.Linear):
        return found
    names = [key for key, module in modules.items() if isinstance(module, nn.Linear)]
    close = nearest(name, names)
    hint = f"did you mean {close!r}?" if close else f"there are {', '.join(map(repr, names[-5:])) or 'none'}"
    what = f"{name!r} is a {type(found).__name__}" if found is not None else f"there is no module {name!r}"
    raise SiteError(f"name must be that of an nn.Linear, {what}; {hint}")


def _blocks_of(scheme: Scheme, width: int) -> tuple[float, int]:
    """Survival rate and block size of schemes that are independent blocks."""
    if isinstance(scheme, Units) and isinstance(scheme.survival_rate, float):
        return scheme.survival_rate, 1
    if isinstance(scheme, Blocks) and scheme.grid == "disjoint":
        return scheme.survival_rate, scheme.block_size
    if isinstance(scheme, Layer):
        return scheme.survival_rate, width
    raise UsageError(
        f'surrogate="bound" takes Units of one rate, Blocks with grid="disjoint" or Layer, got {scheme}: '
        'surrogate="quadratic" takes every scheme'
    )


def _counted(x: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Samples and targets without those that F.cross_entropy leaves out."""
    if targets is None or not isinstance(targets, Tensor) or targets.is_floating_point():
        return x, targets
    flat = targets.reshape(-1)
    if flat.shape[0] != x.shape[0]:
        raise UsageError(f"targets must be one for each of {x.shape[0]} samples, got {list(targets.shape)}")
    kept = flat != _IGNORED
    return x[kept], flat[kept]


def _rebuilt(
    model: nn.Module, name: str, scheme: Scheme, loss: str, surrogate: str, reduction: str, attached: bool
) -> HeadPenalty:
    made = HeadPenalty(model, name, scheme, loss=loss, surrogate=surrogate, reduction=reduction)
    if not attached:
        made.remove()
    return made

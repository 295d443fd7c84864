"""Noise that sits on a module: what its forward sees in place of parameters, and how it comes off again."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fallow.errors import ArgumentError, UsageError, nearest

# Where a module keeps what sits on each of its parameters.
_MARK = "_fallow_noise"


class Attached:
    """Noise on parameters of one module, which it sees during its forward and nothing else sees.

    Attributes:
        module: Whose forward it is for.
        names: Of the parameters, as in the module's `named_parameters`.
        generator: Of the draws, or None.
    """

    words: ClassVar[str] = "noise"
    extra: str = ""  # what the names of learned parameters of its own end with

    def __init__(
        self, module: nn.Module, names: tuple[str, ...], generator: torch.Generator | None = None
    ) -> None:
        self.module, self.names, self.generator = module, names, generator
        self._hooks: list[Any] = []
        for _, owner, attribute in self.places():
            owner.__dict__.setdefault(_MARK, {})[attribute] = self

    # --- what each kind of noise says -----------------------------------------------------------------------

    def seen(self, name: str, weight: Tensor) -> Tensor:
        """What the forward sees in place of a parameter, while training or not."""
        return weight

    def start(self, name: str, weight: Tensor) -> Tensor:
        """What the learned parameter beside a weight begins with, where there is one."""
        raise NotImplementedError

    def rates(self, name: str) -> Tensor:
        """The survival rates of a parameter as they are now."""
        raise NotImplementedError

    # --- putting it on and taking it off --------------------------------------------------------------------

    def put(self) -> None:
        """Register the hooks, and the learned parameters."""
        after = self.module.register_forward_hook(self._leave, always_call=True)
        self._hooks += [self.module.register_forward_pre_hook(self._enter), after]
        if not self.extra:
            return
        for owner in {id(owner): owner for _, owner, _ in self.places()}.values():
            self._hooks.append(owner._register_load_state_dict_pre_hook(self._loading, with_module=True))
        for name, owner, attribute in self.places():
            value = self.start(name, owner.get_parameter(attribute).detach())
            owner.register_parameter(attribute + self.extra, nn.Parameter(value))

    def remove(self) -> None:
        """Leave the module as it was before; again: nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._restore()
        for _, owner, attribute in self.places():
            marks = owner.__dict__.get(_MARK, {})
            if marks.get(attribute) is self:
                del marks[attribute]
                if self.extra:
                    del owner._parameters[attribute + self.extra]
            if not marks:
                owner.__dict__.pop(_MARK, None)

    def places(self) -> Iterator[tuple[str, nn.Module, str]]:
        """Name, the module that has it, and the attribute, of each parameter."""
        for name in self.names:
            path, _, attribute = name.rpartition(".")
            yield name, self.module.get_submodule(path), attribute

    def weight(self, name: str) -> Tensor:
        """The parameter itself, also during a forward."""
        path, _, attribute = name.rpartition(".")
        found = self.module.get_submodule(path)._parameters[attribute]
        assert found is not None
        return found

    def learned(self, name: str) -> nn.Parameter:
        """The learned parameter beside it."""
        return self.module.get_parameter(name + self.extra)

    # --- what happens in a forward --------------------------------------------------------------------------

    # An attribute of the instance is found before a parameter of the same name, and nothing else sees it.
    def _enter(self, module: nn.Module, _args: Any) -> None:
        self._restore()  # what an interrupt in the middle of a forward has left
        for name, owner, attribute in self.places():
            weight = getattr(owner, attribute)
            seen = self.seen(name, weight)
            if seen is not weight:
                owner.__dict__[attribute] = seen
                _tell_recurrent(owner)

    def _leave(self, module: nn.Module, _args: Any, _output: Any) -> None:
        self._restore()

    def _restore(self) -> None:
        for _, owner, attribute in self.places():
            if owner.__dict__.pop(attribute, None) is not None:
                _tell_recurrent(owner)

    def _loading(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """A checkpoint of the plain model lets the learned parameters begin anew."""
        for name, owner, attribute in self.places():
            key = prefix + attribute
            if owner is module and key in state and key + self.extra not in state:
                state[key + self.extra] = self.start(name, state[key].detach())


def _tell_recurrent(owner: nn.Module) -> None:
    """Bring the list of parameters up to date that a recurrent module reads in place of its attributes.

    Its own way to do so would also move parameters into one piece of memory, on a GPU and in every forward.
    """
    names = owner.__dict__.get("_flat_weights_names")
    if names is not None:
        flat = [getattr(owner, name, None) for name in names]
        owner.__dict__["_flat_weights"] = flat
        owner.__dict__["_flat_weight_refs"] = [w if w is None else weakref.ref(w) for w in flat]


def attached(model: nn.Module) -> list[tuple[str, Attached, str]]:
    """Name in the model, noise, and name in the noise, of each parameter that has noise."""
    found = []
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, noise in module.__dict__.get(_MARK, {}).items():
            own = next(name for name, owner, last in noise.places() if owner is module and last == attribute)
            found.append((f"{prefix}.{attribute}" if prefix else attribute, noise, own))
    return found


# --- what may get noise -------------------------------------------------------------------------------------


def placed(
    function: str, module: object, names: str | Iterable[str] | None
) -> list[tuple[nn.Module, tuple[str, ...]]]:
    """The modules in whose forwards the parameters are read, each with their names; all of it checked.

    Args:
        function: For messages.
        module: A layer or a whole model.
        names: Of parameters of it; None: the weights of all linear layers and convolutions.
    """
    if not isinstance(module, nn.Module):
        raise ArgumentError(f"{function} takes a torch.nn.Module, got {type(module).__name__}")
    if names is None:
        wanted = tuple(_plain_layers(module))
        if not wanted:
            raise UsageError(
                f"{type(module).__name__} has no linear layer or convolution: pass names= of its parameters"
            )
    else:
        wanted = (names,) if isinstance(names, str) else tuple(names)
    check_names(module, wanted)
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    for name in wanted:
        path, site = _running(module, name)
        found.setdefault(id(site), (site, []))[1].append(name[len(path) + 1 :] if path else name)
        weight = module.get_parameter(name).detach()
        if not weight.is_floating_point():
            raise ArgumentError(f"{name} is {weight.dtype}: noise is for real floating-point parameters")
        if not bool(weight.isfinite().all()):
            raise UsageError(f"{name} has NaN or infinite entries: the training has diverged before")
    return [(site, tuple(own)) for site, own in found.values()]


def _plain_layers(model: nn.Module) -> Iterator[str]:
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and _runs(module):
            yield f"{prefix}.weight" if prefix else "weight"


def _runs(module: nn.Module) -> bool:
    """Whether a module's own forward reads its parameters; that of an attention reads its out_proj's."""
    idle = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    return not idle and type(module).forward is not nn.Module.forward


def _running(module: nn.Module, name: str) -> tuple[str, nn.Module]:
    """Path and module, from the owner of a parameter outwards, whose forward reads it."""
    path = name.rpartition(".")[0]
    while not _runs(module.get_submodule(path)):
        if not path:
            raise UsageError(
                f"the forward of this {type(module).__name__} is not what reads {name}: pass the module that "
                "does, say the attention around it"
            )
        path = path.rpartition(".")[0]
    return path, module.get_submodule(path)


def check_names(module: nn.Module, names: tuple[str, ...]) -> None:
    """Refuse names whose parameters cannot have noise."""
    kind = type(module).__name__
    known = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    if not names or len(set(names)) < len(names):
        raise UsageError(f"names must be different names of parameters, at least one, got {names!r}")
    for name in names:
        if name not in known:
            close = nearest(name, known)
            hint = f"did you mean {close}?" if close else f"it has {', '.join(known) or 'none'}"
            raise UsageError(f"{kind} has no parameter {name!r}; {hint}")
        path, _, attribute = name.rpartition(".")
        owner: Any = module.get_submodule(path)
        check_free(owner, attribute, f"{name} of {kind}")
        if isinstance(owner, nn.Embedding | nn.EmbeddingBag) and (owner.sparse or owner.max_norm is not None):
            raise UsageError(
                f"{kind} with max_norm= or sparse=True writes to its weight itself, which a mask would hide; "
                "make it without them"
            )


def check_free(owner: nn.Module, attribute: str, words: str = "") -> None:
    """Refuse a second noise on the same."""
    other = owner.__dict__.get(_MARK, {}).get(attribute)
    if other is not None:
        raise UsageError(
            f"{words or type(owner).__name__} has {other.words} already; set what there is to set at "
            f"{other.words}.of(module), or remove() it first"
        )

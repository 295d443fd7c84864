"""Where a model's head is, and which noise stands in front of it: read off the data flow of one forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from fallow.errors import ArgumentError, RunError, UsageError, nearest
from fallow.noise import DropConnect
from fallow.penalties import HeadPenalty
from fallow.schemes import Gaussian, Scheme, Units
from fallow.surgery import probe
from fallow.surgery.flow import base_name
from fallow.surgery.trace import Call, Slot, Trace, record

# What leaves every number of a row where it is; of the first dimensions some may be left out.
_SHAPES = frozenset(
    """view _unsafe_view reshape flatten unflatten squeeze unsqueeze contiguous clone alias detach _to_copy to
    expand select slice""".split()
)
# Before a law that is the same for all features, those may change places too.
_ORDERS = _SHAPES | frozenset("permute transpose movedim t".split())
_ROWS = 4


@dataclass(frozen=True)
class HeadNoise:
    """What multiplies the features in front of the head, or its weights.

    Attributes:
        scheme: the law of a mask.
        source: where it was found, in words.
        weights: whether it is the head's weights that are masked, each on its own (DropConnect).
        penalty: what stands for it in training, where no masks are drawn.
    """

    scheme: Scheme
    source: str
    weights: bool = False
    penalty: HeadPenalty | None = None

    @property
    def silent(self) -> bool:
        """Whether it changes nothing."""
        rates = getattr(self.scheme, "survival_rate", None)
        return rates == 1.0 or getattr(self.scheme, "variance", None) == 0.0


def head_of(
    model: nn.Module, inputs: Any, name: str | HeadPenalty | None, scheme: Scheme | None
) -> tuple[str, HeadNoise]:
    """The head's name, and the noise asked for or found.

    Args:
        model: any module.
        inputs: of a batch.
        name: the head's, or a penalty on it; None: the last nn.Linear whose output is the model's.
        scheme: None: that of the penalty, or of the noise that feeds the head directly.

    Raises:
        ArgumentError: a scheme or a name that is none.
        UsageError: no such nn.Linear; none that can be told; no noise, or several.
    """
    if scheme is not None and not isinstance(scheme, Scheme):
        raise ArgumentError(
            f"scheme must be one of fallow.schemes, got {scheme!r}: say fallow.schemes.Units(0.9)"
        )
    if isinstance(name, HeadPenalty):
        return _of_penalty(model, name, scheme)
    if name is not None and not isinstance(name, str):
        raise ArgumentError(f"head must be the name of an nn.Linear or a HeadPenalty, got {name!r}")
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    if name is not None and name not in linear:
        raise UsageError(_no_linear(name, linear, dict(model.named_modules())))
    if name is not None and scheme is not None:
        return name, HeadNoise(scheme, "asked for")
    trace = _trace(model, inputs)
    call = _last(trace, name)
    if call is None and name is not None:
        raise UsageError(f"head: {name} is not called when the model runs: name an nn.Linear that is")
    if call is None:
        raise UsageError(
            "head: no nn.Linear's output is the model's output, or that in another shape: name the last "
            f"linear layer with head= ({', '.join(list(linear)[-3:]) or 'this model has none'})"
        )
    noise = HeadNoise(scheme, "asked for") if scheme is not None else _noise(trace, call)
    if noise is None:
        raise UsageError(
            f"head: no noise feeds {call.name} directly (nn.Dropout, fallow's BlockDropout or "
            "FeatureDropout, or a DropConnect on it, at a survival rate below 1): pass scheme=, say "
            "fallow.schemes.Units(0.5)"
        )
    return call.name, noise


def _of_penalty(model: nn.Module, penalty: HeadPenalty, scheme: Scheme | None) -> tuple[str, HeadNoise]:
    if penalty.model is not model:
        raise UsageError("head: this HeadPenalty is of another model: pass the model it was made with")
    if scheme is not None:
        raise UsageError("head: a HeadPenalty has a scheme of its own: pass its name for another one")
    return penalty.name, HeadNoise(penalty.scheme, "its HeadPenalty", penalty=penalty)


def _no_linear(name: str, linear: dict[str, nn.Linear], modules: dict[str, nn.Module]) -> str:
    if name in modules:
        kind = type(modules[name]).__name__
        return f"head: {name} must be an nn.Linear, it is a {kind}: name the last linear layer"
    close = nearest(name, linear)
    hint = f"; did you mean {close}?" if close else f"; there are {', '.join(linear) or 'none'}"
    return f"head: this model has no linear layer {name}{hint}"


# --- the trace ---------------------------------------------------------------------------------------------


def _trace(model: nn.Module, inputs: Any) -> Trace:
    """One forward with the noise on and all else at evaluation."""
    noisy = [m for m in model.modules() if _law(m) is not None]
    args, kwargs = probe.arguments(inputs)
    tiled = probe.tiled(args, kwargs, _ROWS)
    with probe.undisturbed(model), _generators_kept(noisy), torch.no_grad():
        model.eval()
        for module in noisy:
            module.training = True
        try:
            return record(model, *tiled, _ROWS)
        except Exception as error:
            said = (str(error).strip() or "-").splitlines()[0]
            raise RunError(
                f"explain: the model cannot run a batch of {_ROWS} rows of these inputs: "
                f"{type(error).__name__}: {said}"
            ) from error


@contextmanager
def _generators_kept(modules: list[nn.Module]) -> Iterator[None]:
    held = [g for m in modules if isinstance(g := getattr(m, "generator", None), torch.Generator)]
    states = [g.get_state() for g in held]
    try:
        yield
    finally:
        for generator, state in zip(held, states, strict=True):
            generator.set_state(state)


def _law(module: nn.Module) -> Scheme | None:
    """The law of a module that masks features."""
    if isinstance(module, nn.Dropout):
        if module.p >= 1:
            return None  # it gives zeros, and no multiple of them has a mean of 1
        return Units(1 - module.p)
    scheme = getattr(module, "scheme", None)
    return scheme if isinstance(scheme, Scheme) else None


def _last(trace: Trace, name: str | None) -> Call | None:
    """The last call of the head: of that name, or of the last linear layer that gives the output."""
    if name is not None:
        return next((c for c in reversed(trace.calls) if c.name == name), None)
    made = {i: c for c in trace.calls if isinstance(c.module, nn.Linear) for i in _slots(c)}
    found = [made[i] for out in trace.outputs for i in _before(trace, out, _SHAPES) if i in made]
    return max(found, key=lambda c: c.index, default=None)


def _noise(trace: Trace, head: Call) -> HeadNoise | None:
    """The module whose output the head takes, or that in another shape."""
    dropped, masked = _drop_connect(head), _masked_features(trace, head)
    if dropped is not None and masked is not None:
        raise UsageError(
            f"head: both {masked.source} and {dropped.source} are noise of {head.name}, and what they do "
            "together has no scheme: take one of them off, or pass scheme= for one alone"
        )
    return dropped or masked


def _masked_features(trace: Trace, head: Call) -> HeadNoise | None:
    start = next(iter(head.inputs.values()), None)
    if start is None:
        return None
    width = trace.values[start].shape[-1:]
    made = {i: c for c in trace.calls if _law(c.module) is not None for i in _slots(c)}
    for value in _before(trace, start, _ORDERS):
        call = made.get(value)
        law = None if call is None else _law(call.module)
        if call is None or law is None:
            continue
        noise = HeadNoise(law, f"{call.name} ({type(call.module).__name__})")
        alike = isinstance(law, Gaussian) or (isinstance(law, Units) and isinstance(law.survival_rate, float))
        if not alike and trace.values[value].shape[-1:] != width:
            return None  # a law over another axis: what it is over the head's features is not known
        return None if noise.silent else noise
    return None


def _drop_connect(head: Call) -> HeadNoise | None:
    handle = DropConnect.of(head.module)
    if handle is None or "weight" not in handle.names:
        return None
    noise = HeadNoise(Units(handle.survival_rate), f"{head.name} (DropConnect)", weights=True)
    return None if noise.silent else noise


def _before(trace: Trace, value: int, allowed: frozenset[str]) -> Iterator[int]:
    """The value, and those it is another shape of, one after the other."""
    while True:
        yield value
        op = trace.values[value].op
        if op < 0 or base_name(trace.ops[op]) not in allowed:
            return
        sources = [i for i in trace.ops[op].inputs if trace.values[i].activation]
        if len(sources) != 1:
            return
        value = sources[0]


def _slots(call: Call) -> list[int]:
    return [s.value for s in tree_leaves(call.template, is_leaf=_is_slot) if _is_slot(s)]


def _is_slot(leaf: Any) -> bool:
    return isinstance(leaf, Slot)

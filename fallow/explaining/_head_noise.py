"""The noise in front of a head: read off the data flow of one forward, modules and functions alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from fallow.errors import RunError, UsageError
from fallow.noise import DropConnect
from fallow.penalties import HeadPenalty
from fallow.schemes import Gaussian, Scheme, Units
from fallow.surgery import handle_of, probe
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


def traced(model: nn.Module, inputs: Any, training: Iterable[nn.Module] = ()) -> Trace:
    """One forward with the noise, and what else is said, in training and all else at evaluation."""
    noisy = [*training, *(m for m in model.modules() if _law(m) is not None)]
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


def last_linear(trace: Trace, name: str | None) -> Call | None:
    """The last call of the head: of that name, or of the last linear layer that gives the output."""
    if name is not None:
        return next((c for c in reversed(trace.calls) if c.name == name), None)
    made = {i: c for c in trace.calls if isinstance(c.module, nn.Linear) for i in _slots(c)}
    found = [made[i] for out in trace.outputs for i in _before(trace, out, _SHAPES) if i in made]
    return max(found, key=lambda c: c.index, default=None)


def noise_of(model: nn.Module, inputs: Any, trace: Trace, head: Call) -> HeadNoise | None:
    """What the head's weights are masked by, or the features that it takes, in another shape perhaps.

    Raises:
        UsageError: both.
    """
    dropped = _drop_connect(head)
    masked = _masked_features(trace, head) or _by_function(model, inputs, head)
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


def _by_function(model: nn.Module, inputs: Any, head: Call) -> HeadNoise | None:
    """F.dropout in the forward of a module around the head, as in timm's ResNets."""
    if handle_of(model) is not None:
        return None  # its root in training would take the next draw
    path = head.name.split(".")[:-1]
    around = [model.get_submodule(".".join(path[:i])) for i in range(len(path) + 1)]
    trace = traced(model, inputs, around)
    again = last_linear(trace, head.name)
    start = None if again is None else next(iter(again.inputs.values()), None)
    if start is None:
        return None
    for value in _before(trace, start, _ORDERS):
        rate = _dropped(trace, value)
        if rate is not None:
            call = trace.ops[trace.values[value].op].call
            name = trace.calls[call].name if call >= 0 else ""
            noise = HeadNoise(Units(rate), f"F.dropout in {name or 'the model'}")
            return None if noise.silent else noise
    return None


def _dropped(trace: Trace, value: int) -> float | None:
    """The survival rate of a dropout that a function made this value with; None for any other value."""
    op = trace.values[value].op
    if op < 0:
        return None
    if base_name(trace.ops[op]) == "native_dropout":
        share = trace.ops[op].arguments[:1]
        return 1 - share[0] if share and share[0] < 1 else None
    if base_name(trace.ops[op]) != "mul":
        return None
    for factor in trace.ops[op].inputs:
        divided = trace.values[factor].op
        if divided < 0 or base_name(trace.ops[divided]) != "div":
            continue
        drawn = trace.values[trace.ops[divided].inputs[0]].op
        if drawn < 0 or base_name(trace.ops[drawn]) != "bernoulli":
            continue
        rate, divisor = trace.ops[drawn].arguments[:1], trace.ops[divided].arguments[:1]
        alike = trace.values[factor].shape == trace.values[value].shape
        if alike and rate and rate == divisor and 0 < rate[0] <= 1:
            return float(rate[0])
    return None


def _drop_connect(head: Call) -> HeadNoise | None:
    handle = DropConnect.of(head.module, "weight")
    if handle is None:
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

"""Which linear layer is a model's head, and whose noise is meant."""

from __future__ import annotations

from typing import Any

from torch import nn

from fallow.errors import ArgumentError, UsageError, nearest
from fallow.explaining._head_noise import HeadNoise, last_linear, noise_of, traced
from fallow.penalties import HeadPenalty
from fallow.schemes import Scheme


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
    trace = traced(model, inputs)
    call = last_linear(trace, name)
    if call is None and name is not None:
        raise UsageError(f"head: {name} is not called when the model runs: name an nn.Linear that is")
    if call is None:
        raise UsageError(
            "head: no nn.Linear's output is the model's output, or that in another shape: name the last "
            f"linear layer with head= ({', '.join(list(linear)[-3:]) or 'this model has none'})"
        )
    noise = HeadNoise(scheme, "asked for") if scheme is not None else noise_of(model, inputs, trace, call)
    if noise is None:
        raise UsageError(
            f"head: no noise feeds {call.name} directly (nn.Dropout, fallow's BlockDropout or "
            "FeatureDropout, F.dropout, or a DropConnect on it, at a survival rate below 1): pass scheme=, "
            "say fallow.schemes.Units(0.5)"
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

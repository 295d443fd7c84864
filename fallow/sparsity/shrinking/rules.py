"""How labels and constants pass through operations: elementwise ones, and what to do with unknown ones."""

from __future__ import annotations

import torch
from torch import Tensor

from fallow.sparsity.shrinking import channelwise, sums, views
from fallow.sparsity.shrinking import known as constants
from fallow.sparsity.shrinking.facts import Info
from fallow.sparsity.shrinking.labels import Layers, aligned, reduced, support
from fallow.sparsity.shrinking.step import RULES, Step
from fallow.sparsity.shrinking.step import rule as for_names

_RANDOM = ("rand", "bernoulli", "normal", "uniform", "multinomial", "empty", "exponential", "dropout")
# Not marked as elementwise by torch, though they are.
_ELEMENTWISE = frozenset(
    "hardswish _prelu_kernel prelu clone _to_copy detach alias lift_fresh contiguous hardtanh log_sigmoid "
    "log_sigmoid_forward native_dropout".split()
)
_FROM_SIZES = frozenset("new_zeros new_ones new_full zeros_like ones_like full_like".split())


def infer(step: Step, out: list[Tensor]) -> list[Info]:
    """What is known of an operation's results."""
    known, sizes_alone = None, step.name in _FROM_SIZES
    fed = not sizes_alone and any(info.fed for info in step.infos)
    # of what is fed a rule says whether it is the same at other sizes
    if not step.recorder.escaped and (sizes_alone or not fed and all(map(_complete, step.infos))):
        random = step.name.startswith(_RANDOM)
        known = [None if random else t.detach().clone() for t in out]
    rule = RULES.get(step.name, unknown)
    if rule is unknown and (torch.Tag.pointwise in step.func.tags or step.name in _ELEMENTWISE):
        rule = elementwise
    try:
        results = rule(step, out)
    except Exception:  # a form of the operation that its rule did not foresee: better nothing than a guess
        results = unknown(step, out)
    for info, value in zip(results, known or [None] * len(results), strict=True):
        info.fed = fed
        info.known = info.known if value is None else value
    return results


def _complete(info: Info) -> bool:
    return constants.complete(info.known)


def elementwise(step: Step, out: list[Tensor]) -> list[Info]:
    """An operation on the elements, with broadcasting: labels at the same place are tied."""
    ndim = out[0].dim()
    operands = [
        (aligned(info.layers, ndim), [1] * (ndim - len(shape)) + list(shape))
        for info, shape in zip(step.infos, step.shapes, strict=True)
    ]
    layers = merged(step, operands)
    known = None
    if not (step.recorder.escaped and any(isinstance(a, (int, float)) for a in step.args)):
        known = constants.pointwise(step.func, step.args, step.kwargs, step.recorder.known, out[0])
    return [Info(layers, known)] + [Info(layers) for _ in out[1:]]


def merged(step: Step, operands: list[tuple[Layers, list[int]]]) -> Layers:
    """The layers of operands of broadcastable shapes, tied where they meet."""
    labels, found = step.recorder.labels, {}
    for layers, _ in operands:
        for layer in layers:
            kind = support(layer)
            if kind in found:
                labels.tie(found[kind], layer)
            found.setdefault(kind, layer)
    result: Layers = []
    for kind, layer in found.items():
        left: Layers = [layer]
        for layers, shape in operands:
            if not any(support(other) == kind for other in layers):
                # an operand that cannot lose these indices: nothing that meets them there can
                full = [d for d in kind if shape[d] > 1]
                left = reduced(labels, left, full, step.say(f"meets a tensor of fixed size ({step.name})"))
        result += [item for item in left if not any(support(o) == support(item) for o in result)]
        for item in left:
            twin = next(o for o in result if support(o) == support(item))
            labels.tie(twin, item)
    return result


def unknown(step: Step, out: list[Tensor]) -> list[Info]:
    """An operation without a rule: nothing it reads goes."""
    for info in step.infos:
        step.recorder.freeze(info.layers, step.say(f"goes through {step.name}, which has no rule,"))
    return [Info([]) for _ in out]


@for_names("zeros_like ones_like full_like empty_like rand_like randn_like bernoulli native_dropout_like")
def _like(step: Step, out: list[Tensor]) -> list[Info]:
    return [Info(list(step.infos[0].layers)) for _ in out]


@for_names("new_zeros new_ones new_full new_empty sym_size sym_numel _local_scalar_dense item")
def _sizes_alone(step: Step, out: list[Tensor]) -> list[Info]:
    return [Info([]) for _ in out]


@for_names("copy")
def _copy(step: Step, out: list[Tensor]) -> list[Info]:
    target, source = step.infos[0], step.infos[1]
    ndim = out[0].dim()
    shapes = [[1] * (ndim - len(s)) + list(s) for s in step.shapes[:2]]
    layers = merged(step, [(target.layers, shapes[0]), (aligned(source.layers, ndim), shapes[1])])
    known = None if source.known is None else source.known.to(out[0].dtype).expand(out[0].shape).clone()
    return [Info(layers, known)]


_REGISTERED = (channelwise, sums, views)

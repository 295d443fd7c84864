"""Operations that keep channels apart, or mix them: norms, pools, means, softmax, embeddings."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from fallow.sparsity.shrinking import known as constants
from fallow.sparsity.shrinking.facts import Info, Pieces, Sized
from fallow.sparsity.shrinking.labels import Layers, along, support, vector
from fallow.sparsity.shrinking.step import Step, rule

_POOLS = """
    max_pool2d_with_indices max_pool3d_with_indices max_pool2d mkldnn_max_pool2d avg_pool1d avg_pool2d
    avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_max_pool2d adaptive_max_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d
    _upsample_nearest_exact2d upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d
    _upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad1d reflection_pad2d reflection_pad3d
    replication_pad1d replication_pad2d replication_pad3d"""


@rule(_POOLS)
def _pooled(step: Step, out: list[Tensor]) -> list[Info]:
    digit = re.search(r"([123])d", step.name)
    ndim, info = out[0].dim(), step.infos[0]
    spatial = range(ndim - int(digit.group(1) if digit else 2), ndim)
    layers = step.mixed(info.layers, spatial, f"goes through {step.name}")
    known = None
    if info.known is not None:
        result = step.func(info.known, *step.args[1:], **step.kwargs)
        result = result[0] if isinstance(result, tuple) else result
        known = constants.pooled(info.known, result, spatial.start - 1)
    return [Info(layers, known)] + [Info(layers) for _ in out[1:]]


_BATCH_NORMS = """
    native_batch_norm cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit
    _native_batch_norm_legit_no_training _native_batch_norm_legit_no_stats _batch_norm_with_update
    batch_norm_no_update _batch_norm_no_update _batch_norm_impl_index batch_norm"""


@rule(_BATCH_NORMS)
def _batch_norm(step: Step, out: list[Tensor]) -> list[Info]:
    recorder, ndim = step.recorder, out[0].dim()
    x, others = step.infos[0], step.infos[1:]
    running = step.arg(3, "running_mean")
    evaluates = step.args[5] is False or "no_training" in step.name or "no_update" in step.name
    own = along(x.layers, (1,)) if x.layers else None
    layers = step.mixed(x.layers, [d for d in range(ndim) if d > 1], "is normalised over")
    for info in others:
        for layer in info.layers:
            if own is not None:
                recorder.labels.tie(layer.reshape(-1), own.reshape(-1))
            else:
                recorder.freeze([layer], step.say("normalises what cannot be removed"))
        if own is not None and not info.layers and own.numel() > 1:
            recorder.freeze([own], step.say("is normalised by tensors of fixed size"))
    rest = [Info([]) for _ in out[1:]]
    if not evaluates or not isinstance(running, Tensor):
        return [Info(layers, None), *rest]
    mean_name = recorder.of(running).leaf
    if mean_name is not None:
        recorder.norms.append((id(step.tensors[0]), mean_name))
    known, site = _normalised(step, x.known, out[0]), recorder.site_of.get(id(step.tensors[0]))
    if site is not None:
        site.flat |= ~constants.uniform(known, 1, out[0].shape[1])[0].isnan()
    return [Info(layers, known), *rest]


def _normalised(step: Step, known: Tensor | None, out: Tensor) -> Tensor | None:
    recorder = step.recorder
    values = []
    for index, name in ((1, "weight"), (2, "bias"), (3, "running_mean"), (4, "running_var")):
        tensor = step.arg(index, name)
        if isinstance(tensor, Tensor):
            value = recorder.known(tensor)
            if not constants.complete(value):
                return None
            values.append(value)
        else:
            values.append(None)
    weight, bias, mean, variance = values
    eps = step.args[6 if step.name.endswith(("no_training", "no_update")) else 7]
    scale = torch.rsqrt(variance + eps) * (1 if weight is None else weight)
    shift = (0 if bias is None else bias) - mean * scale
    shape = [1, -1] + [1] * (out.dim() - 2)
    if bias is not None and weight is not None:  # exactly the bias where the weight is zero
        shift = torch.where(weight == 0, bias, shift)
    return constants.affine(known, scale.reshape(shape), shift.reshape(shape), tuple(out.shape))


@rule("native_layer_norm layer_norm _fused_rms_norm rms_norm")
def _layer_norm(step: Step, out: list[Tensor]) -> list[Info]:
    shape = step.arg(1, "normalized_shape")
    ndim = out[0].dim()
    kind = "LayerNorm" if "layer" in step.name else "RMSNorm"
    what = f"{kind} normalises over all channels"
    layers = step.mixed(step.infos[0].layers, range(ndim - len(shape), ndim), what)
    for info in step.infos[1:]:
        step.recorder.freeze(info.layers, step.say(what))
    # Frozen labels pass on, so that what the result is tied to stays too.
    layers += [i for i in step.infos[0].layers if not any(support(i) == support(o) for o in layers)]
    return [Info(layers, _scaled_away(step, 2, 3, out[0], ndim - 1)), *(Info([]) for _ in out[1:])]


@rule("native_group_norm group_norm")
def _group_norm(step: Step, out: list[Tensor]) -> list[Info]:
    groups, channels = step.args[6], step.shapes[0][1]
    what = "GroupNorm normalises over the channels of a group"
    if groups < channels:
        for info in step.infos:
            step.recorder.freeze(info.layers, step.say(what))
    own = along(step.infos[0].layers, (1,))
    for info in step.infos[1:]:
        for layer in info.layers:
            if own is None:
                step.recorder.freeze([layer], step.say("normalises what cannot be removed"))
            else:
                step.recorder.labels.tie(layer.reshape(-1), own.reshape(-1))
    layers = step.mixed(step.infos[0].layers, range(2, out[0].dim()), "is normalised over")
    if own is not None:
        step.recorder.record.sized.append(Sized(step.recorder.where, own, 1, channels))
    return [Info(layers, _scaled_away(step, 1, 2, out[0], 1)), *(Info([]) for _ in out[1:])]


def _scaled_away(step: Step, at_weight: int, at_bias: int, out: Tensor, dim: int) -> Tensor | None:
    """What a norm whose statistics depend on the input leaves constant: channels with a weight of zero."""
    weight, bias = step.arg(at_weight, "weight"), step.arg(at_bias, "bias")
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        return None
    scale = step.recorder.known(weight)
    shift = torch.zeros_like(weight) if bias is None else step.recorder.known(bias)
    if scale is None or shift is None:
        return None
    shape = [-1 if d == dim else 1 for d in range(out.dim())]
    return constants.affine(None, scale.reshape(shape), shift.reshape(shape), tuple(out.shape))


@rule("mean sum amax amin var var_mean std max min logsumexp norm linalg_vector_norm prod any all argmax")
def _reduced(step: Step, out: list[Tensor]) -> list[Info]:
    info, ndim = step.infos[0], len(step.shapes[0])
    dims = _dims(step, ndim)
    layers = step.mixed(info.layers, dims, f"is reduced by {step.name}")
    if out[0].dim() < ndim:
        keep = [d for d in range(ndim) if d not in dims]
        layers = [layer.reshape([layer.shape[d] for d in keep]) for layer in layers]
    known = None
    if info.known is not None and step.name in ("mean", "sum", "amax", "amin"):
        result = step.func(info.known, *step.args[1:], **step.kwargs)
        free = [d for d in dims if all(layer.shape[d] == 1 for layer in info.layers)]
        known = constants.reduced(info.known, result, dims, free, keeps=step.name != "sum")
    return [Info(layers, known)] + [Info(layers) for _ in out[1:]]


def _dims(step: Step, ndim: int) -> list[int]:
    at = 2 if step.name in ("norm", "linalg_vector_norm") else 1
    given: Any = step.arg(at, "dim")
    if given is None or isinstance(given, float) or given == []:
        return list(range(ndim))
    return [d % max(ndim, 1) for d in ([given] if isinstance(given, int) else given)]


@rule("_softmax _log_softmax softmax log_softmax _safe_softmax cumsum cumprod sort")
def _over_one_dimension(step: Step, out: list[Tensor]) -> list[Info]:
    layers = step.mixed(step.infos[0].layers, [step.dim(1, out[0].dim())], f"goes through {step.name}")
    return [Info(layers) for _ in out]


@rule("embedding")
def _embedding(step: Step, out: list[Tensor]) -> list[Info]:
    table, ndim = step.infos[0], out[0].dim()
    step.recorder.freeze([i for i in table.layers if support(i) != (1,)], step.say("is a row of a table"))
    step.recorder.freeze(step.infos[1].layers, step.say("indexes a table"))
    columns = along(table.layers, (1,))
    layers: Layers = [] if columns is None else [vector(columns.reshape(-1), ndim - 1, ndim)]
    known = None
    if table.known is not None:
        same = (table.known == table.known[:1]).all(0)
        known = constants.tidy(torch.where(same, table.known[0], constants.NAN).expand(out[0].shape).clone())
    return [Info(layers, known)]


@rule("glu")
def _glu(step: Step, out: list[Tensor]) -> list[Info]:
    dim, recorder = step.dim(1, out[0].dim(), -1), step.recorder
    half, layers = out[0].shape[dim], []
    for layer in step.infos[0].layers:
        if layer.shape[dim] == 1:
            layers.append(layer)
            continue
        first, second = layer.split(half, dim) if half > 0 else (layer, layer)
        recorder.labels.tie(first, second)
        if half == 1:
            recorder.freeze([layer], step.say("is a gate of one channel"))
            continue
        recorder.record.pieces.append(Pieces(recorder.place, layer, dim, half, False))
        layers.append(first)
    known = step.infos[0].known
    if known is not None:
        a, b = known.split(half, dim)
        known = constants.tidy(torch.where(a == 0, 0.0, a * b.sigmoid()))
    return [Info(layers, known)]

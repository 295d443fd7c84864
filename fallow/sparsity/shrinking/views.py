"""Operations that move elements: views, cuts, joins and pads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fallow.sparsity.shrinking.facts import Info, Pieces, Sized
from fallow.sparsity.shrinking.known import NAN, tidy
from fallow.sparsity.shrinking.labels import Layers, along, reshaped, support, vector
from fallow.sparsity.shrinking.step import Step, rule


def _moved_known(step: Step, out: Tensor) -> Tensor | None:
    """Constants through an operation that only moves elements."""
    known = step.infos[0].known
    return None if known is None else tidy(step.func(known.clone(), *step.args[1:], **step.kwargs))


@rule("view _unsafe_view reshape _reshape_copy view_copy")
def _view(step: Step, out: list[Tensor]) -> list[Info]:
    info, old, new = step.infos[0], step.shapes[0], list(out[0].shape)
    layers = reshaped(step.recorder.labels, info.layers, old, new)
    note_sizes(step, layers, new)
    return [Info(layers, None if info.known is None else info.known.reshape(new))]


def note_sizes(step: Step, layers: Layers, sizes: Any) -> None:
    """Remember that the module may name these sizes itself."""
    for layer in layers:
        for d in support(layer):
            step.recorder.record.sized.append(Sized(step.recorder.where, layer, d, sizes[d]))


@rule("permute transpose unsqueeze")
def _turned(step: Step, out: list[Tensor]) -> list[Info]:
    turn = getattr(torch.ops.aten, step.name)
    layers = [turn(layer, *step.args[1:], **step.kwargs) for layer in step.infos[0].layers]
    known = step.infos[0].known
    return [Info(layers, None if known is None else turn(known, *step.args[1:], **step.kwargs))]


@rule("t")
def _transposed(step: Step, out: list[Tensor]) -> list[Info]:
    (info,) = _turned(step, out)
    info.turned = step.infos[0].leaf
    return [info]


@rule("squeeze")
def _squeezed(step: Step, out: list[Tensor]) -> list[Info]:
    ndim, given = len(step.shapes[0]), step.arg(1, "dim")
    dims = range(ndim) if given is None else [given] if isinstance(given, int) else given
    gone = {d % ndim for d in dims if step.shapes[0][d] == 1}
    shape = [d for d in range(ndim) if d not in gone]
    layers = [layer.reshape([layer.shape[d] for d in shape]) for layer in step.infos[0].layers]
    known = step.infos[0].known
    return [Info(layers, None if known is None else known.reshape(out[0].shape))]


@rule("expand")
def _expanded(step: Step, out: list[Tensor]) -> list[Info]:
    extra = out[0].dim() - len(step.shapes[0])
    layers = [layer.reshape([1] * extra + list(layer.shape)) for layer in step.infos[0].layers]
    known = step.infos[0].known
    return [Info(layers, None if known is None else known.expand(out[0].shape))]


@rule("as_strided")
def _restrided(step: Step, out: list[Tensor]) -> list[Info]:
    # New strides for dimensions of size one, as convolution heads get them; anything else is unknown.
    shape = step.shapes[0]
    if tuple(out[0].shape) == shape and sum(n > 1 for n in shape) <= 2:
        return [Info(step.infos[0].layers, step.infos[0].known)]
    step.recorder.freeze(step.infos[0].layers, step.say("goes through as_strided"))
    return [Info([])]


@rule("select")
def _selected(step: Step, out: list[Tensor]) -> list[Info]:
    dim, index = step.dim(1, len(step.shapes[0])), step.arg(2, "index")
    return [Info(_picked(step, dim, index), _moved_known(step, out[0]))]


@rule("unbind")
def _unbound(step: Step, out: list[Tensor]) -> list[Info]:
    dim = step.dim(1, len(step.shapes[0]))
    known = step.infos[0].known
    values = [None] * len(out) if known is None else known.unbind(dim)
    return [Info(_picked(step, dim, i), v if v is None else tidy(v)) for i, v in enumerate(values)]


def _picked(step: Step, dim: int, index: int) -> Layers:
    layers = []
    for layer in step.infos[0].layers:
        if layer.shape[dim] > 1:
            _apart(step, layer, dim, 1, whole=True)
        layers.append(layer.select(dim, index if layer.shape[dim] > 1 else 0))
    return [layer for layer in layers if support(layer) or _single(step, layer)]


def _single(step: Step, layer: Tensor) -> bool:
    step.recorder.freeze([layer], step.say("is picked by its number"))
    return False


def _apart(step: Step, layer: Tensor, dim: int, size: int, *, whole: bool) -> None:
    step.recorder.record.pieces.append(Pieces(step.recorder.place, layer, dim, size, whole))


@rule("slice")
def _sliced(step: Step, out: list[Tensor]) -> list[Info]:
    dim, layers = step.dim(1, len(step.shapes[0])), []
    if tuple(out[0].shape) == step.shapes[0] and step.arg(4, "step", 1) == 1:
        return [Info(step.infos[0].layers, step.infos[0].known)]
    for layer in step.infos[0].layers:
        layers += step.mixed([layer], [dim], "is sliced by numbers")
    return [Info(layers, _moved_known(step, out[0]))]


@rule("split split_with_sizes chunk unsafe_split unsafe_split_with_sizes unsafe_chunk")
def _split(step: Step, out: list[Tensor]) -> list[Info]:
    dim = step.dim(2, len(step.shapes[0]))
    sizes = [t.shape[dim] for t in out]
    known = step.infos[0].known
    values = [None] * len(out) if known is None else [tidy(k) for k in known.split(sizes, dim)]
    per_piece: list[Layers] = [[] for _ in out]
    for layer in step.infos[0].layers:
        if layer.shape[dim] == 1:
            pieces = [layer] * len(out)
        elif len(set(sizes)) > 1:
            step.recorder.freeze([layer], step.say("is split into unequal pieces"))
            continue
        else:
            _apart(step, layer, dim, sizes[0], whole=False)
            pieces = layer.split(sizes, dim)
        for layers, piece in zip(per_piece, pieces, strict=True):
            if support(piece):
                layers.append(piece)
            else:
                _single(step, piece)
    for layers in per_piece:
        note_sizes(step, [layer for layer in layers if dim in support(layer)], out[0].shape)
    return [Info(layers, value) for layers, value in zip(per_piece, values, strict=True)]


@rule("cat concat")
def _joined(step: Step, out: list[Tensor]) -> list[Info]:
    ndim, parts = out[0].dim(), list(zip(step.infos, step.shapes, strict=True))
    parts = [
        (info, shape) for info, shape in parts if len(shape) == ndim
    ]  # an old-style empty tensor has one
    dim = step.dim(1, ndim)
    layers: Layers = []
    kinds = {support(layer) for info, _ in parts for layer in info.layers}
    for kind in sorted(kinds - {(dim,)}):
        own = [along(info.layers, kind) for info, _ in parts]
        first = next(layer for layer in own if layer is not None)
        if dim in kind or any(layer is None for layer in own):
            _freeze_all(step, own, "is concatenated with what cannot lose the same")
            continue
        for layer in own:
            step.recorder.labels.tie(first, layer)  # pyright: ignore[reportArgumentType]
        layers.append(first)
    layers += _end_to_end(
        step, [along(i.layers, (dim,)) for i, _ in parts], [s[dim] for _, s in parts], dim, ndim
    )
    known = None
    if any(info.known is not None for info, _ in parts) and out[0].is_floating_point():
        blank = out[0].new_full((), NAN)
        known = torch.cat([blank.expand(s) if i.known is None else i.known for i, s in parts], dim)
    return [Info(layers, tidy(known))]


def _end_to_end(step: Step, own: list[Tensor | None], sizes: list[int], dim: int, ndim: int) -> Layers:
    """The labels along the joined dimension; what has none there gets labels that stay."""
    if all(layer is None for layer in own):
        return []
    filled = []
    for layer, n in zip(own, sizes, strict=True):
        if layer is None:
            layer = vector(step.recorder.labels.fresh(n), dim, ndim)
            step.recorder.freeze([layer], step.say("is concatenated"))
        filled.append(layer)
    return [torch.cat(filled, dim)]


def _freeze_all(step: Step, layers: list[Tensor | None], why: str) -> None:
    step.recorder.freeze([layer for layer in layers if layer is not None], step.say(why))


@rule("stack")
def _stacked(step: Step, out: list[Tensor]) -> list[Info]:
    dim, layers = step.dim(1, out[0].dim()), []
    for kind in sorted({support(layer) for info in step.infos for layer in info.layers}):
        own = [along(info.layers, kind) for info in step.infos]
        if any(layer is None for layer in own):
            _freeze_all(step, own, "is stacked with what cannot lose the same")
            continue
        for layer in own:
            step.recorder.labels.tie(own[0], layer)  # pyright: ignore[reportArgumentType]
        layers.append(own[0].unsqueeze(dim))  # pyright: ignore[reportOptionalMemberAccess]
    return [Info(layers)]


@rule("constant_pad_nd")
def _padded(step: Step, out: list[Tensor]) -> list[Info]:
    recorder, ndim, pads = step.recorder, out[0].dim(), list(step.arg(1, "pad"))
    sides = {ndim - 1 - i // 2: (pads[i], pads[i + 1]) for i in range(0, len(pads), 2)}
    layers: Layers = []
    for layer in step.infos[0].layers:
        padded = {d: sides[d] for d in support(layer) if any(sides.get(d, (0, 0)))}
        if not padded:
            layers.append(layer)
        elif len(support(layer)) > 1 or min(min(s) for s in padded.values()) < 0:
            recorder.freeze([layer], step.say("is padded or cropped"))
        else:
            (d, (before, after)) = next(iter(padded.items()))
            ends = [vector(recorder.labels.fresh(n), d, ndim) for n in (before, after)]
            layers.append(torch.cat([ends[0], layer, ends[1]], d))
            for end, n in zip(ends, (before, after), strict=True):
                if n:
                    recorder.record.sized.append(Sized(recorder.where, end, d, n))
    known = step.infos[0].known
    if any(any(sides.get(d, (0, 0))) for d in range(ndim - 2)) or known is not None:
        known = torch.full_like(step.tensors[0], NAN) if known is None else known
        known = tidy(F.pad(known, pads, value=step.arg(2, "value", 0.0)))
    return [Info(layers, known)]


@rule("flip roll")
def _shuffled(step: Step, out: list[Tensor]) -> list[Info]:
    ndim, dims = out[0].dim(), step.arg(2 if step.name == "roll" else 1, "dims", ())
    dims = [d % ndim for d in ([dims] if isinstance(dims, int) else dims)] or range(ndim)
    return [Info(step.mixed(step.infos[0].layers, dims, f"changes places by {step.name}"))]

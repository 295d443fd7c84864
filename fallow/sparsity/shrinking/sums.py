"""Sums over channels: matrix products, convolutions, attention."""

from __future__ import annotations

import torch
from torch import Tensor

from fallow.sparsity.shrinking import known as constants
from fallow.sparsity.shrinking.facts import Grouped, Info, Site
from fallow.sparsity.shrinking.labels import Layers, along, support, vector
from fallow.sparsity.shrinking.step import Step, rule

_FIXED = "reads what cannot be removed"


@rule("addmm")
def _addmm(step: Step, out: list[Tensor]) -> list[Info]:
    bias, plain = step.infos[0], not step.kwargs
    info, site = _mm(step, 1, out[0])
    columns = along(info.layers, (1,))
    extra = step.mixed(bias.layers, range(len(step.shapes[0]) - 1), "is added") if bias.layers else []
    for layer in extra:
        row = layer.reshape(-1)
        if columns is not None and row.numel() == columns.numel() and plain:
            step.recorder.labels.tie(row, columns.reshape(-1))
        else:
            step.recorder.freeze([layer], step.say("is added"))
    if columns is not None and not extra and step.tensors[0].shape[-1] > 1:
        step.recorder.freeze([columns], step.say("is added to a tensor of fixed size"))
    if not plain:
        step.recorder.freeze(info.layers, step.say("is scaled by addmm"))
        return [Info(info.layers)]
    if site is not None and len(step.shapes[0]) == 1:
        site.target = bias.leaf
    known = None
    if info.known is not None and bias.known is not None:
        known = constants.tidy(info.known + bias.known)
    _flat(site, known, out[0], 1)
    if site is not None:
        step.recorder.site_of[id(out[0])] = site
    return [Info(info.layers, known)]


@rule("mm")
def _plain_mm(step: Step, out: list[Tensor]) -> list[Info]:
    info, site = _mm(step, 0, out[0])
    _flat(site, info.known, out[0], 1)
    if site is not None:
        step.recorder.site_of[id(out[0])] = site
    return [info]


def _flat(site: Site | None, known: Tensor | None, out: Tensor, dim: int) -> None:
    if site is not None:
        site.flat = ~constants.uniform(known, dim, out.shape[dim])[0].isnan()


def _mm(step: Step, at: int, out: Tensor) -> tuple[Info, Site | None]:
    """``x @ weight`` of matrices; the operand without unknown values is the weight."""
    (a, b), (x, y) = step.infos[at : at + 2], step.tensors[at : at + 2]
    known = constants.product(x, a.known, y, b.known)
    if constants.complete(b.known):
        layers, site = _summed(step, a, b, x.shape[1], (0, 1))
        if site is not None and b.known is not None:
            _fill(site, b.known.t(), a.known, dim=1)
            site.matrix = (b.leaf, 0) if b.leaf else (b.turned, 1) if b.turned else None
        return Info(layers, known), site
    if constants.complete(a.known):  # the transposed product
        layers, site = _summed(step, b, a, x.shape[1], (1, 0))
        if site is not None and a.known is not None:
            _fill(site, a.known, b.known, dim=0)
            site.folds = False
        return Info(layers, known), site
    return Info(_batched(step, a.layers, b.layers, 0)), None


def _summed(
    step: Step, x: Info, weight: Info, inner: int, dims: tuple[int, int]
) -> tuple[Layers, Site | None]:
    """Layers of a product with a weight; `dims` are those of x: rows that stay, and what is summed over."""
    keep, gone = dims
    recorder, labels = step.recorder, step.recorder.labels
    inside, reads = along(x.layers, (gone,)), along(weight.layers, (keep,))
    outside = along(weight.layers, (gone,))
    for layer in x.layers + weight.layers:
        if len(support(layer)) > 1:
            recorder.freeze([layer], step.say("is in a product with more than one kind of label"))
    if inside is not None and reads is not None:
        labels.tie(inside.reshape(-1), reads.reshape(-1))
    else:
        recorder.freeze([i for i in (inside, reads) if i is not None], step.say(_FIXED))
    layers = [layer for layer in (along(x.layers, (keep,)), outside) if layer is not None]
    return layers, _new_site(step, inside, outside, inner)


def _new_site(step: Step, inside: Tensor | None, outside: Tensor | None, inner: int) -> Site:
    none = torch.full((inner,), -1)
    site = Site(
        name=step.recorder.place,
        weight=torch.empty(0),
        used=torch.empty(0),
        inside=none if inside is None else inside.reshape(-1),
        outside=torch.empty(0) if outside is None else outside.reshape(-1),
        constant=torch.empty(0),
        seen=torch.empty(0),
        flat=torch.empty(0),
    )
    step.recorder.record.sites.append(site)
    return site


def _fill(site: Site, matrix: Tensor, known: Tensor | None, *, dim: int) -> None:
    """Put the numbers into a site: (O, I) weights, and what of x is constant."""
    site.weight = matrix.detach().double().cpu()
    site.used = site.weight != 0
    _complete_site(site, known, dim)


def _complete_site(site: Site, known: Tensor | None, dim: int) -> None:
    outputs, inputs = site.used.shape
    if site.outside.numel() == 0:
        site.outside = torch.full((outputs,), -1)
    site.constant, site.seen = constants.uniform(known, dim, inputs)


@rule("convolution _convolution")
def _convolution(step: Step, out: list[Tensor]) -> list[Info]:
    recorder, labels = step.recorder, step.recorder.labels
    x, weight = step.infos[:2]
    bias = step.infos[2] if step.arg(2, "bias") is not None else None
    transposed, groups, ndim = step.args[6], step.args[8], out[0].dim()
    rest = step.args[3:9]
    if not constants.complete(weight.known) or weight.known is None or (groups > 1 and transposed):
        what = "a grouped transposed convolution" if transposed else "a convolution with computed weights"
        for info in step.infos:
            recorder.freeze(info.layers, step.say(f"goes through {what}"))
        return [Info([])]
    inside, lead = along(x.layers, (1,)), (1, 0) if transposed else (0, 1)
    recorder.freeze([i for i in x.layers if i is not inside], step.say("is convolved over"))
    outside, reads = along(weight.layers, (lead[0],)), along(weight.layers, (lead[1],))
    others = [i for i in weight.layers if i is not outside and i is not reads]
    if groups > 1:
        _group(step, inside, others, outside, groups)
    else:
        recorder.freeze(others, step.say("is a place in a kernel"))
        if inside is not None and reads is not None:
            labels.tie(inside.reshape(-1), reads.reshape(-1))
        else:
            recorder.freeze([i for i in (inside, reads) if i is not None], step.say(_FIXED))
    known_bias = None if bias is None else bias.known
    _tie_bias(step, bias, outside)
    site = _new_site(step, inside, outside, x_channels(step))
    known = None
    if bias is None or known_bias is not None:
        known = constants.convolution(x.known, weight.known, known_bias, rest, x_channels(step), out[0].shape)
    if site is not None:
        matrix = weight.known.detach().double().cpu().flatten(2)
        matrix = matrix.transpose(0, 1) if transposed else matrix
        site.weight = _dense(matrix.sum(2), groups)
        site.used = _dense((matrix != 0).any(2), groups)
        _complete_site(site, x.known, 1)
        # at a zero-padded border a constant meets fewer weights
        site.folds = not transposed and not any(step.args[4])
        site.matrix = (weight.leaf, lead[1]) if weight.leaf and groups == 1 else None
        site.target = None if bias is None else bias.leaf
        _flat(site, known, out[0], 1)
        recorder.site_of[id(out[0])] = site
    layers = [] if outside is None else [vector(outside.reshape(-1), 1, ndim)]
    return [Info(layers, known)]


def _tie_bias(step: Step, bias: Info | None, outside: Tensor | None) -> None:
    """A convolution's bias goes with its outputs."""
    if bias is None or outside is None:
        return
    for layer in bias.layers:
        step.recorder.labels.tie(layer.reshape(-1), outside.reshape(-1))
    if not bias.layers and outside.numel() > 1:
        step.recorder.freeze([outside], step.say("is added to a tensor of fixed size"))


def x_channels(step: Step) -> int:
    """Channels of a convolution's input; an unbatched one has them in front."""
    return step.shapes[0][1]


def _dense(matrix: Tensor, groups: int) -> Tensor:
    """(O, I / groups) as the (O, I) block matrix that it stands for."""
    if groups == 1:
        return matrix
    return torch.block_diag(*matrix.to(torch.float64).chunk(groups)).to(matrix.dtype)


def _group(step: Step, inside: Tensor | None, others: Layers, outside: Tensor | None, groups: int) -> None:
    """Tie a grouped convolution's inputs to its weights, a depthwise one's to its outputs."""
    recorder, labels = step.recorder, step.recorder.labels
    inner, outer = step.shapes[1][1], step.shapes[1][0]
    if inside is None or outside is None:
        recorder.freeze([i for i in (inside, outside) if i is not None] + others, step.say(_FIXED))
        return
    ins, outs = inside.reshape(groups, inner), outside.reshape(groups, outer // groups)
    if inner == 1:
        labels.tie(ins, outs)
        recorder.freeze(others, step.say("is a place in a kernel"))
        return
    own = along(others, (0, 1))
    recorder.freeze([i for i in others if i is not own], step.say("is a place in a kernel"))
    if own is None:
        recorder.freeze([inside], step.say(_FIXED))
        return
    rows = ins.reshape(groups, 1, inner).expand(groups, outer // groups, inner).reshape(outer, inner)
    labels.tie(own.reshape(outer, inner), rows)
    recorder.record.grouped.append(Grouped(recorder.place, ins, outs))


@rule("bmm baddbmm")
def _bmm(step: Step, out: list[Tensor]) -> list[Info]:
    at = 1 if step.name == "baddbmm" else 0
    (a, b), (x, y) = step.infos[at : at + 2], step.tensors[at : at + 2]
    layers = _batched(step, a.layers, b.layers, 1)
    if at:
        step.recorder.freeze(step.infos[0].layers + layers, step.say("goes through baddbmm"))
        return [Info([])]
    known = constants.product(x, a.known, y, b.known)
    if known is not None and a.fed and b.fed:  # a sum over as many as the input has
        known = constants.tidy(known.masked_fill(known != 0, constants.NAN))
    return [Info(layers, known)]


def _batched(step: Step, left: Layers, right: Layers, batch: int) -> Layers:
    """A product of two activations, (b, n, k) @ (b, k, m): entries of b can go, rows and columns too."""
    recorder, labels = step.recorder, step.recorder.labels
    rows, columns = batch, batch + 1
    slabs: list[Tensor | None] = []
    kept: Layers = []
    for layers, free, summed in ((left, rows, columns), (right, columns, rows)):
        slab = None
        for layer in layers:
            if batch and 0 in support(layer):
                (slab,) = step.mixed([layer], [rows, columns], "is in a product") or [None]
            elif summed in support(layer):
                recorder.freeze([layer], step.say("is summed over in a product of two activations"))
            elif support(layer) == (free,):
                kept.append(layer)
            else:
                recorder.freeze([layer], step.say("is in a product of two activations"))
        slabs.append(slab)
    one, other = slabs
    if one is not None and other is not None:
        labels.tie(one, other)
        return [*kept, one]
    recorder.freeze([s for s in slabs if s is not None], step.say(_FIXED))
    return kept


def attention(step: Step, out: list[Tensor]) -> list[Info]:
    """Scaled dot-product attention, (batch, heads, tokens, width): heads go as a whole."""
    recorder, labels = step.recorder, step.recorder.labels
    heads: list[Tensor] = []
    for info in step.infos[:3]:
        for layer in info.layers:
            if 1 in support(layer):
                heads += step.mixed([layer], [0, 2, 3], "is in attention")
            else:
                recorder.freeze([layer], step.say("is within an attention head"))
    for info in step.infos[3:]:
        recorder.freeze(info.layers, step.say("masks attention"))
    layers: Layers = []
    full_mask = any(len(s) == 4 and s[1] > 1 for s in step.shapes[3:])
    if len(heads) == 3 and not full_mask:
        for other in heads[1:]:  # where queries share keys, a key's head goes with all its queries' heads
            labels.tie(heads[0], other.repeat_interleave(heads[0].shape[1] // other.shape[1], 1))
        layers = [heads[0]]
    else:
        recorder.freeze(heads, step.say(_FIXED))
    results = [Info(layers, _averaged(step.infos[2].known, out[0]))]
    return results + [Info([]) for _ in out[1:]]


def _averaged(values: Tensor | None, out: Tensor) -> Tensor | None:
    """Rows of attention sum to one, so what is the same for all tokens comes out as it is."""
    if values is None:
        return None
    values = values.repeat_interleave(out.shape[1] // values.shape[1], 1)
    first = values[:, :, :1]
    same = (values == first).all(2, keepdim=True)
    return constants.tidy(torch.where(same, first, constants.NAN).expand(out.shape).clone())


for _name in (
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
    "scaled_dot_product_attention _scaled_dot_product_fused_attention_overrideable"
).split():
    rule(_name)(attention)

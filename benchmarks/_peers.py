"""What others do, and what one would write by hand, for one residual sum; written from the descriptions.

Each form is called as ``form(x, shortcut, branch, rate, rng)`` and returns ``shortcut + branch(x)`` with the
branch dropped by its own rule. The form draws; the arithmetic is a function beside it that takes the draw.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from fallow.models import BasicBlock, Block

Branch = Callable[[Tensor], Tensor]
Form = Callable[[Tensor, Tensor, Branch, float, random.Random], Tensor]


def kept_count(rows: int, rate: float, rng: random.Random) -> int:
    """Floor or ceil of ``rate * rows``, with mean ``rate * rows``."""
    whole = int(rate * rows)
    return whole + (rng.random() < rate * rows - whole)


# --- masks: the branch always runs -------------------------------------------------------------------------


def drop_path(x: Tensor, shortcut: Tensor, branch: Branch, rate: float, rng: random.Random) -> Tensor:
    """timm's DropPath: a Bernoulli mask for each sample times the branch, divided by its mean."""
    z = branch(x)
    mask = z.new_empty((z.shape[0],) + (1,) * (z.dim() - 1)).bernoulli_(rate)
    return shortcut + masked(z, mask, rate)


def stochastic_depth_batch(
    x: Tensor, shortcut: Tensor, branch: Branch, rate: float, rng: random.Random
) -> Tensor:
    """torchvision's StochasticDepth(mode="batch"): one Bernoulli number for the batch times the branch."""
    z = branch(x)
    mask = z.new_empty((1,) * z.dim()).bernoulli_(rate)
    return shortcut + masked(z, mask, rate)


def masked(z: Tensor, mask: Tensor, rate: float) -> Tensor:
    """The branch's result, masked and scaled."""
    return z * mask.div_(rate)


# --- one draw for the batch: the branch runs or not ---------------------------------------------------------


def skip_batch(x: Tensor, shortcut: Tensor, branch: Branch, rate: float, rng: random.Random) -> Tensor:
    """Huang's rule by hand, inverted scaling: the branch is not called where it is dropped."""
    return torch.add(shortcut, branch(x), alpha=1 / rate) if rng.random() < rate else shortcut


# --- subsets of rows: the branch runs on a fixed number of them -------------------------------------------


def gather(x: Tensor, shortcut: Tensor, branch: Branch, rate: float, rng: random.Random) -> Tensor:
    """The common form (DINOv2): index with a random permutation, flatten, index_add."""
    count = kept_count(x.shape[0], rate, rng)
    index = torch.randperm(x.shape[0])[:count]
    return gathered(x, shortcut, branch, index, 1 / rate) if count else shortcut


def gathered(x: Tensor, shortcut: Tensor, branch: Branch, index: Tensor, scale: float) -> Tensor:
    """``shortcut`` with the scaled branch on those rows added, by flat index_add."""
    z = branch(x[index])
    return torch.index_add(
        shortcut.flatten(1), 0, index, z.flatten(1).to(shortcut.dtype), alpha=scale
    ).view_as(shortcut)


def select(x: Tensor, shortcut: Tensor, branch: Branch, rate: float, rng: random.Random) -> Tensor:
    """The same with sorted rows, index_select and no flattening."""
    count = kept_count(x.shape[0], rate, rng)
    index = torch.randperm(x.shape[0])[:count].sort().values
    return selected(x, shortcut, branch, index, 1 / rate) if count else shortcut


def selected(x: Tensor, shortcut: Tensor, branch: Branch, index: Tensor, scale: float) -> Tensor:
    """``shortcut`` with the scaled branch on those rows added, by index_add in all dimensions."""
    z = branch(x.index_select(0, index))
    return shortcut.index_add(0, index, z.to(shortcut.dtype), alpha=scale)


def window(x: Tensor, shortcut: Tensor, branch: Branch, rate: float, rng: random.Random) -> Tensor:
    """A circular window of neighbouring rows, with cat around it."""
    count = kept_count(x.shape[0], rate, rng)
    start = rng.randrange(x.shape[0])
    return windowed(x, shortcut, branch, start, count, 1 / rate) if count else shortcut


def windowed(x: Tensor, shortcut: Tensor, branch: Branch, start: int, count: int, scale: float) -> Tensor:
    """``shortcut`` with the scaled branch on ``count`` rows from ``start`` added, circularly."""
    rows = x.shape[0]
    end = start + count
    if end <= rows:
        z = branch(x[start:end])
        return torch.cat([shortcut[:start], torch.add(shortcut[start:end], z, alpha=scale), shortcut[end:]])
    wrapped, head = end - rows, rows - start
    z = branch(torch.cat([x[start:], x[:wrapped]]))
    low = torch.add(shortcut[:wrapped], z[head:], alpha=scale)
    high = torch.add(shortcut[start:], z[:head], alpha=scale)
    return torch.cat([low, shortcut[wrapped:start], high])


PEERS: dict[str, Form] = {
    "timm DropPath": drop_path,
    "torchvision batch": stochastic_depth_batch,
    "hand: skip (batch)": skip_batch,
    "hand: x[i] index_add": gather,
    "hand: index_select": select,
    "hand: window": window,
}


# --- putting a form into a model ---------------------------------------------------------------------------


def attach(model: nn.Module, form: Form, rates: Sequence[float], seed: int = 0) -> nn.Module:
    """Give the residual sums of a model of `fallow.models` this form, in the order they run, for training.

    Args:
        model: a CifarResNet (one sum a block) or a SmallViT (two).
        form: of every sum whose rate is below 1.
        rates: survival rate of each sum.
        seed: of the draws made on the host.
    """
    blocks = [b for b in model.modules() if isinstance(b, (BasicBlock, Block))]
    wanted = sum(2 if isinstance(b, Block) else 1 for b in blocks)
    if len(rates) != wanted:
        raise ValueError(f"{len(rates)} rates for a model with {wanted} residual sums")
    rng, left = random.Random(seed), iter(rates)
    for block in blocks:
        if isinstance(block, BasicBlock):
            block.forward = partial(_resnet_block, block, _bound(form, next(left), rng))
        else:
            forms = _bound(form, next(left), rng), _bound(form, next(left), rng)
            block.forward = partial(_vit_block, block, *forms)
    return model


def without(model: nn.Module, chosen: Sequence[bool]) -> nn.Module:
    """Take branches out for good: what is left of the sum is the shortcut."""
    return attach(
        model, lambda x, shortcut, branch, rate, rng: shortcut, [0.5 if gone else 1.0 for gone in chosen]
    )


def _bound(form: Form, rate: float, rng: random.Random) -> Callable[[Tensor, Tensor, Branch], Tensor]:
    if rate == 1:
        return lambda x, shortcut, branch: shortcut + branch(x)
    return lambda x, shortcut, branch: form(x, shortcut, branch, rate, rng)


def _resnet_block(block: BasicBlock, total: Callable[..., Tensor], x: Tensor) -> Tensor:
    return block.relu(total(x, block.shortcut(x), block.branch))


def _vit_block(
    block: Block, first: Callable[..., Tensor], second: Callable[..., Tensor], x: Tensor
) -> Tensor:
    x = first(x, x, lambda v: block.attention(block.norm1(v)))
    return second(x, x, lambda v: block.mlp(block.norm2(v)))

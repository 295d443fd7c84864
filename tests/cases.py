"""One table of models: our own, toys of every residual form, torch's own, timm's and Hugging Face's."""

from __future__ import annotations

from typing import Any

import torch
import toys
from casework import Case, Sum, each, masked_tokens, noise
from library_cases import HF, TIMM, hf, timm
from torch import Tensor, nn

from fallow import models

__all__ = ["POSITIVE", "Case", "Sum", "each", "hf", "masked_tokens", "noise", "timm"]

# --- our own and toys ------------------------------------------------------------------------------------


def _cifar(depth: int) -> tuple[Sum, ...]:
    n = (depth - 2) // 6
    return tuple(
        Sum(
            name := f"group{g}.{b}",
            name,
            kind="transition" if g > 1 and b == 0 else "identity",
            norms=(f"{name}.branch.norm1", f"{name}.branch.norm2"),
        )
        for g in (1, 2, 3)
        for b in range(n)
    )


OWN = (
    Case("resnet20", lambda: models.resnet20(channels=1), noise(1, 8, 8), _cifar(20)),
    Case("resnet56", lambda: models.resnet56(channels=1), noise(1, 8, 8), _cifar(56), big=True),
    Case(
        "vit_small",
        lambda: models.vit_small(width=24, depth=3, image=16),
        noise(3, 16, 16),
        each(3, Sum("blocks.{}.attention", "blocks.{}", 0), Sum("blocks.{}.mlp", "blocks.{}", 1)),
    ),
)

TOYS = (
    Case(
        "pre-activation, fed by the raw input",
        lambda: nn.Sequential(*(toys.PreActivation(4) for _ in range(3))),
        noise(4, 5, 5),
        each(3, Sum("{}", "{}", norms=("{}.norm1", "{}.norm2"))),
    ),
    Case(
        "post-activation",
        lambda: nn.Sequential(*(toys.PostActivation(4) for _ in range(3))),
        noise(4, 5, 5),
        each(3, Sum("{}", "{}", branch=0, norms=("{}.norm1", "{}.norm2"))),
    ),
    Case(
        "transitions",
        lambda: nn.Sequential(toys.Projected(3, 4), toys.Pooled(4, 8), toys.Projected(8, 6)),
        noise(3, 8, 8),
        each(3, Sum("{}", "{}", kind="transition", norms=("{}.branch.1", "{}.branch.4"))),
    ),
    Case(
        "two branches",
        lambda: nn.Sequential(toys.TwoBranches(8), toys.TwoBranches(8)),
        noise(5, 8),
        each(2, Sum("{}.mix", "{}", 0), Sum("{}.mlp", "{}", 1)),
    ),
    Case(
        "parallel branches",
        lambda: nn.Sequential(toys.Parallel(8), toys.Parallel(8)),
        noise(5, 8),
        each(2, Sum("{}.attention", "{}", 0), Sum("{}.mlp", "{}", 1)),
    ),
    Case(
        "GPT-J: one sum of both branches",
        lambda: nn.Sequential(toys.GptJ(8), toys.GptJ(8)),
        noise(5, 8),
        each(2, Sum("{}", "{}", 1, branch=0)),
    ),
    Case(
        "in place on the shortcut",
        lambda: nn.Sequential(nn.Linear(6, 6), toys.OntoShortcut(6), toys.OntoShortcut(6)),
        noise(6),
        tuple(Sum(str(i), str(i)) for i in (1, 2)),
    ),
    Case(
        "in place on the branch",
        lambda: nn.Sequential(toys.OntoBranch(4), toys.OntoBranch(4)),
        noise(4, 5, 5),
        each(2, Sum("{}", "{}", branch=0)),
    ),
    Case(
        "add_ on the shortcut, with alpha",
        lambda: nn.Sequential(nn.Linear(6, 6), toys.Alpha(6), toys.Alpha(6)),
        noise(6),
        tuple(Sum(str(i), str(i)) for i in (1, 2)),
    ),
    Case(
        "functional glue",
        lambda: nn.Sequential(toys.Glue(8), toys.Glue(8)),
        noise(5, 8),
        each(2, Sum("{}", "{}")),
    ),
    Case(
        "glue that reads the batch size",
        lambda: nn.Sequential(toys.Heads(8), toys.Heads(8)),
        noise(5, 8),
        each(2, Sum("{}", "{}")),
    ),
    Case(
        "layer scale",
        lambda: nn.Sequential(toys.Scaled(8), toys.Scaled(8)),
        noise(5, 8),
        each(2, Sum("{}", "{}")),
    ),
    Case(
        "keyword arguments and tuple outputs",
        lambda: toys.Stack([toys.Masked(8), toys.Masked(8)]),
        lambda rows: {"x": torch.randn(rows, 5, 8), "mask": torch.rand(rows, 1, 5) < 0.8},
        each(2, Sum("layers.{}.attention", "layers.{}", 0), Sum("layers.{}.mlp", "layers.{}", 1)),
    ),
    Case(
        "squeeze and excitation inside the branch",
        lambda: nn.Sequential(toys.Squeezed(4), toys.Squeezed(4)),
        noise(4, 5, 5),
        each(2, Sum("{}", "{}", norms=("{}.norm",))),
    ),
    Case(
        "residual written in the root",
        lambda: toys.Flat(6),
        noise(6),
        (Sum("first", ""), Sum("second", "", 1)),
    ),
)

# --- torch's own -----------------------------------------------------------------------------------------


def _encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _attention_then_mlp(layers: str, attention: str, mlp: str, dim: int = 0) -> tuple[Sum, ...]:
    sums = Sum(f"{layers}.{attention}", layers, 0, dim=dim), Sum(f"{layers}.{mlp}", layers, 1, dim=dim)
    return each(2, *sums)


TORCH = (
    Case(
        "TransformerEncoderLayer, norm last",
        lambda: _encoder(batch_first=True),
        noise(5, 8),
        _attention_then_mlp("layers.{}", "self_attn", "linear1"),
    ),
    Case(
        "TransformerEncoderLayer, norm first",
        lambda: _encoder(batch_first=True, norm_first=True),
        noise(5, 8),
        _attention_then_mlp("layers.{}", "self_attn", "linear1"),
    ),
)


def _decoder(rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 5, 8), torch.randn(rows, 6, 8)


TORCH += (
    Case(
        "TransformerEncoderLayer, batch second",
        lambda: toys.BatchSecond(_encoder(norm_first=True)),
        noise(5, 8),
        _attention_then_mlp("inner.layers.{}", "self_attn", "linear1", dim=1),
    ),
    Case(
        "TransformerDecoderLayer",
        lambda: nn.TransformerDecoder(
            nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True), 2
        ),
        _decoder,
        each(
            2,
            Sum("layers.{}.self_attn", "layers.{}", 0),
            Sum("layers.{}.multihead_attn", "layers.{}", 1),
            Sum("layers.{}.linear1", "layers.{}", 2),
        ),
    ),
)

POSITIVE = (*OWN, *TOYS, *TORCH, *TIMM, *HF)

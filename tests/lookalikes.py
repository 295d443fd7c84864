"""Models with sums that are no residual sites, or that only a name can take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import toys
from cases import Case, hf, masked_tokens, noise, timm
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Lookalike:
    """What ``sites`` says of a model: names of sites, ambiguous ones, words of refusals."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    sites: tuple[str, ...] = ()
    ambiguous: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()

    model, feed, __str__ = Case.model, Case.feed, Case.__str__


class TanhGelu(nn.Module):
    """Its activation is written out: h + 0.044715 h^3 is no residual sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        h = 0.5 * h * (1 + torch.tanh(0.7978845608 * (h + 0.044715 * h**3)))
        return x + self.down(h)


class Snake(nn.Module):
    """An activation with a parameter: x + sin^2(a x) / a."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(self.a * x).pow(2) / self.a


class SnakeMlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, 2 * width), Snake(2 * width), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class LoraLinear(nn.Module):
    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class LoraBlock(nn.Module):
    """LoRA on the attention's projections, inside a residual branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = toys.Attention(width)
        self.attention.qkv = LoraLinear(self.attention.qkv)
        self.attention.project = LoraLinear(self.attention.project)
        self.mlp = toys.mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class DenseLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(width), nn.Conv2d(width, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


class Pyramid(nn.Module):
    """Lateral sums: an upsampled deep map plus a 1x1 convolution of a shallow one."""

    def __init__(self, width: int, outputs: int = 3) -> None:
        super().__init__()
        self.outputs = outputs
        self.levels = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width if i else 3, width, 3, 2, 1), *(toys.OntoBranch(width) for _ in range(2))
            )
            for i in range(3)
        )
        self.laterals = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for level in self.levels:
            maps.append(x := level(x))
        out = [self.laterals[2](maps[2])]
        for i in (1, 0):
            out.insert(0, self.laterals[i](maps[i]) + F.interpolate(out[0], scale_factor=2.0, mode="nearest"))
        return out[: self.outputs]


class Highway(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body, self.gate = toys.mlp(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        t = torch.sigmoid(self.gate(x))
        return t * self.body(x) + (1 - t) * x


class GatedShortcut(nn.Module):
    """A learnable factor on the shortcut: resting the branch would leave alpha x, not x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body, self.alpha = toys.mlp(width), nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha * x + self.body(x)


class Edsr(nn.Module):
    """Residual blocks inside one long skip."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.Sequential(
            *(toys.OntoBranch(width) for _ in range(blocks)), nn.Conv2d(width, width, 3, padding=1)
        )
        self.tail = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        return self.tail(x + self.body(x))


class Nested(nn.Module):
    """A residual branch that holds a small residual sum of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.inner, self.down = nn.Linear(width, width), toys.mlp(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.up(x))
        h = h + self.inner(h)
        return x + self.down(torch.tanh(h))


def _blocks(count: int, *names: str) -> tuple[str, ...]:
    return tuple(n.format(i) for i in range(count) for n in names)


_DEBERTA = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
_DEBERTA |= {"num_hidden_layers": 2, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
_DEBERTA |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 16}

LOOKALIKES = (
    Lookalike("tanh-GELU written out", lambda: nn.Sequential(TanhGelu(6), TanhGelu(6)), noise(6), ("0", "1")),
    Lookalike("Snake alone", lambda: nn.Sequential(nn.Linear(6, 6), Snake(6), nn.Linear(6, 3)), noise(6)),
    Lookalike("Snake in a branch", lambda: nn.Sequential(SnakeMlp(6), SnakeMlp(6)), noise(6), ("0", "1")),
    Lookalike(
        "LoRA alone", lambda: nn.Sequential(LoraLinear(nn.Linear(6, 6)), nn.ReLU(), nn.Linear(6, 3)), noise(6)
    ),
    Lookalike(
        "LoRA in attention",
        lambda: nn.Sequential(LoraBlock(8), LoraBlock(8)),
        noise(5, 8),
        _blocks(2, "{}.attention", "{}.mlp"),
    ),
    Lookalike("DenseNet", lambda: nn.Sequential(DenseLayer(3), DenseLayer(7)), noise(3, 8, 8)),
    Lookalike(
        "feature pyramid",
        lambda: Pyramid(4),
        noise(3, 16, 16),
        tuple(f"levels.{i}.{b}" for i in range(3) for b in (1, 2)),
        refused=("used outside", "used outside"),
    ),
    Lookalike(
        "feature pyramid, finest map alone",
        lambda: Pyramid(4, outputs=1),
        noise(3, 16, 16),
        tuple(f"levels.{i}.{b}" for i in range(3) for b in (1, 2)),
        ambiguous=("levels.2", "levels.1"),
    ),
    Lookalike("highway", lambda: nn.Sequential(Highway(6), Highway(6)), noise(6), refused=("gated", "gated")),
    Lookalike("gate on the shortcut", lambda: nn.Sequential(GatedShortcut(6)), noise(6), refused=("gated",)),
    Lookalike(
        "long skip around residual blocks",
        lambda: Edsr(4, 4),
        noise(3, 8, 8),
        _blocks(4, "body.{}"),
        ambiguous=("body",),
    ),
    Lookalike(
        "nested", lambda: nn.Sequential(Nested(6), Nested(6)), noise(6), ("0", "1"), ("0.inner", "1.inner")
    ),
    Lookalike(
        "no residual sum", lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)), noise(6)
    ),
    Lookalike("timm densenet", timm("densenet121", growth_rate=4, block_config=(2, 2)), noise(3, 32, 32)),
    Lookalike("timm RepVGG", timm("repvgg_a0"), noise(3, 32, 32)),
    Lookalike(
        "timm Res2Net: a chain of sums inside each branch",
        timm("res2net50_26w_4s"),
        noise(3, 32, 32),
        tuple(f"layer{g}.{b}" for g, count in enumerate((3, 4, 6, 3), 1) for b in range(count)),
    ),
    Lookalike(
        "timm HRNet: sums of maps of several sizes between its blocks",
        timm("hrnet_w18_small"),
        noise(3, 64, 64),
        (
            "layer1.0",
            *(f"stage{s}.0.branches.{b}.{i}" for s in (2, 3, 4) for b in range(s) for i in (0, 1)),
            *(f"incre_modules.{i}.0" for i in range(4)),
        ),
    ),
    Lookalike(
        "HF DeBERTa",
        hf("DebertaV2Model", "DebertaV2Config", **_DEBERTA),
        masked_tokens(7),
        _blocks(2, "encoder.layer.{}.attention", "encoder.layer.{}.intermediate"),
    ),
)

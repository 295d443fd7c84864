"""Models that drop paths already are refused, with the place and the switch; switched off they are taken."""

from __future__ import annotations

import pytest
import torch
from kit import HALF, X, refused
from torch import Tensor, nn

import fallow
from fallow import integrations


def test_timm_with_drop_path():
    timm = integrations.need_timm()
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2}
    make = timm.models.vision_transformer.VisionTransformer
    example = torch.randn(2, 3, 16, 16)
    refused(
        fallow.SiteError,
        r"blocks\.1\.drop_path1.*drop_path_rate=0",
        make(drop_path_rate=0.2, **options),
        example=example,
    )
    assert len(fallow.apply(make(**options), HALF, example=example).sites) == 4


@pytest.mark.parametrize("mode", ["batch", "row"])
def test_torchvision_stochastic_depth(mode):
    assert integrations.mend_torchvision() in (True, False)
    from torchvision.ops import StochasticDepth

    class Dropping(nn.Module):
        def __init__(self, rate: float) -> None:
            super().__init__()
            self.linear, self.drop = nn.Linear(4, 4), StochasticDepth(rate, mode)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.drop(torch.tanh(self.linear(x)))

    refused(
        fallow.SiteError,
        r"1\.drop drops paths already.*Switch it off",
        nn.Sequential(Dropping(0.0), Dropping(0.3)),
    )
    assert len(fallow.apply(nn.Sequential(Dropping(0.0), Dropping(0.0)), HALF, example=X).sites) == 2


def test_hugging_face_layerdrop():
    transformers = integrations.need_transformers()
    sizes = {"vocab_size": 20, "d_model": 8, "max_position_embeddings": 16, "pad_token_id": 0}
    sizes |= {
        f"{side}_{what}": n
        for side in ("encoder", "decoder")
        for what, n in (("layers", 1), ("ffn_dim", 8), ("attention_heads", 2))
    }
    example = {"input_ids": torch.randint(3, 20, (2, 5))}
    for layerdrop in ({"encoder_layerdrop": 0.3}, {"decoder_layerdrop": 0.2}):
        model = transformers.BartModel(transformers.BartConfig(**sizes, **layerdrop))
        refused(fallow.SiteError, "layerdrop.*Switch it off.*layerdrop=0", model, example=example)
    model = transformers.BartModel(transformers.BartConfig(**sizes))
    assert len(fallow.apply(model, HALF, example=example).sites) >= 4


def test_hand_written_drop_path():
    class Dropping(nn.Module):
        def __init__(self, rate: float) -> None:
            super().__init__()
            self.linear, self.rate = nn.Linear(4, 4), rate

        def forward(self, x: Tensor) -> Tensor:
            z = torch.tanh(self.linear(x))
            if self.training and self.rate:
                z = z * (torch.rand(len(x), 1) > self.rate) / (1 - self.rate)
            return x + z

    refused(fallow.SiteError, "1 drops paths already", nn.Sequential(Dropping(0.0), Dropping(0.3)))

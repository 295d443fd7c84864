"""Transformers, and timm's networks: heads and neurons go, what is normalised over channels stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shrink_cases import assert_same, deaden, lively, reasons, shape, unread
from torch import Tensor, nn

from fallow.models import SmallViT
from fallow.sparsity.shrink import shrink

SMALL = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4)).double()


def timm_model(name: str, **options: Any) -> nn.Module:
    timm = pytest.importorskip("timm")
    return lively(timm.create_model(name, num_classes=7, **options)).double()


def vit(fused: bool = True) -> Any:
    net: Any = timm_model("vit_tiny_patch16_224", depth=3, img_size=32)
    for block in net.blocks:
        block.attn.fused_attn = fused
    return net


@pytest.mark.parametrize("fused", [True, False])
def test_heads_of_timm_vit_go_with_their_rows_and_columns(fused: bool) -> None:
    net = vit(fused)
    with torch.no_grad():
        values = net.blocks[0].attn.qkv  # the value rows of head 1
        values.weight[2 * 192 + 64 : 2 * 192 + 128] = 0.0
        values.bias[2 * 192 + 64 : 2 * 192 + 128] = 0.0
        net.blocks[1].attn.proj.weight[:, :64] = 0.0  # the columns of heads 0 and 2
        net.blocks[1].attn.proj.weight[:, 128:] = 0.0
    result = shrink(net, SMALL)
    assert_same(net, result.model, SMALL)
    small: Any = result.model
    assert [block.attn.num_heads for block in small.blocks] == [2, 1, 3]
    assert [block.attn.attn_dim for block in small.blocks] == [128, 64, 192]
    assert [block.attn.head_dim for block in small.blocks] == [64, 64, 64]
    assert shape(small, "blocks.0.attn.qkv") == (3 * 128, 192)
    assert shape(small, "blocks.1.attn.proj") == (192, 64)
    rows = result.plan["kept"]["blocks.1.attn.qkv.weight"]["0"]
    assert rows == [192 * part + i for part in range(3) for i in range(64, 128)]


def test_a_head_whose_values_are_the_same_for_all_tokens_is_folded() -> None:
    net = vit()
    with torch.no_grad():
        net.blocks[2].attn.qkv.weight[2 * 192 : 2 * 192 + 64] = 0.0  # its bias stays
    result = shrink(net, SMALL)
    assert shape(result.model, "blocks.2.attn.qkv") == (3 * 128, 192)
    assert not torch.equal(
        result.model.get_parameter("blocks.2.attn.proj.bias"), net.blocks[2].attn.proj.bias
    )
    assert_same(net, result.model, SMALL)


def test_half_a_head_stays_and_a_block_keeps_its_last_head() -> None:
    net = vit()
    unread(net, "blocks.0.attn.proj", range(32))
    unread(net, "blocks.1.attn.proj", range(192))
    result = shrink(net, SMALL)
    assert shape(result.model, "blocks.0.attn.qkv") == (576, 192)
    assert shape(result.model, "blocks.1.attn.qkv") == (192, 192)
    assert "would be empty" in reasons(result)["blocks.1.attn.qkv"]
    assert_same(net, result.model, SMALL)


def test_neurons_of_timm_vit_go_and_channels_of_the_stream_stay() -> None:
    net = vit()
    unread(net, "blocks.0.mlp.fc2", range(700))
    deaden(net, "blocks.1.mlp.fc1", range(100))
    deaden(net, "blocks.2.mlp.fc2", [3])
    result = shrink(net, SMALL)
    assert shape(result.model, "blocks.0.mlp.fc1") == (68, 192)
    assert shape(result.model, "blocks.1.mlp.fc2") == (192, 668)
    assert "LayerNorm normalises over all channels" in reasons(result)["blocks.2.mlp.fc2"]
    assert_same(net, result.model, SMALL)


def test_our_transformer_loses_neurons_and_heads() -> None:
    net = lively(SmallViT(width=24, depth=2, heads=3, patch=8)).double()
    unread(net, "blocks.0.mlp.project", range(10))
    unread(net, "blocks.1.attention.project", range(8))
    result = shrink(net, SMALL)
    assert shape(result.model, "blocks.0.mlp.expand") == (86, 24)
    assert shape(result.model, "blocks.1.attention.qkv") == (48, 24)
    assert_same(net, result.model, SMALL)


class Separate(nn.Module):
    """Attention with a projection each for queries, keys and values, and sizes asked of the tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 12) for _ in range(3))
        self.size = 4
        self.out = nn.Linear(12, 8)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.size)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        weights = (q @ k.transpose(-2, -1) * self.size**-0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


def test_separate_projections_lose_the_same_heads() -> None:
    net = lively(Separate()).double()
    unread(net, "out", range(4, 8))
    x = torch.randn(3, 5, 8).double()
    result = shrink(net, x)
    assert [shape(result.model, name) for name in "qkv"] == [(8, 8)] * 3
    assert result.model.size == 4
    assert_same(net, result.model, x)


def test_torchs_encoder_loses_neurons() -> None:
    net = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False
    )
    net = lively(net).double()
    unread(net, "layers.0.linear2", [3, 4])
    unread(net, "layers.1.self_attn.out_proj", range(8))
    x = torch.randn(2, 5, 16).double()
    result = shrink(net, x)
    assert shape(result.model, "layers.0.linear1") == (30, 16)
    assert "MultiheadAttention) fixes its sizes" in reasons(result)["layers.1.self_attn"]
    assert_same(net, result.model, x)


def test_timm_resnet18() -> None:
    net = timm_model("resnet18")
    for name in ("layer1.0", "layer3.1", "layer4.0"):
        width = shape(net, f"{name}.conv1")[0]
        deaden(net, f"{name}.conv1", range(width // 2), norm=f"{name}.bn1")
    # the stream of the last stage: both blocks and the shortcut
    for name in ("0.conv2", "1.conv2"):
        deaden(net, f"layer4.{name}", range(100), norm=f"layer4.{name.replace('conv', 'bn')}")
    deaden(net, "layer4.0.downsample.0", range(120), norm="layer4.0.downsample.1")
    result = shrink(net, SMALL)
    assert shape(result.model, "layer3.1.conv1")[0] == 128
    assert shape(result.model, "layer4.1.conv2") == (412, 512, 3, 3)
    assert shape(result.model, "layer4.0.downsample.0")[0] == 412
    assert shape(result.model, "fc") == (7, 412)
    assert reasons(result)["layer4.0.downsample.0"].startswith("tied to layer4.")
    assert_same(net, result.model, SMALL, tolerance=1e-11)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "convnext_atto"])
def test_other_networks_of_timm_with_random_dead_channels(name: str) -> None:
    net = timm_model(name)
    generator = torch.Generator().manual_seed(0)
    for path, module in net.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and "classifier" not in path and "head" not in path:
            columns = module.weight.shape[1]
            gone = (torch.rand(columns, generator=generator) < 0.1).nonzero().flatten().tolist()
            unread(net, path, gone)
    result = shrink(net, SMALL)
    assert result.after.parameters < result.before.parameters
    assert_same(net, result.model, SMALL, tolerance=1e-10)


class Grouping(nn.Module):
    """Two heads of queries share a head of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (
            nn.Linear(8, 16),
            nn.Linear(8, 8),
            nn.Linear(8, 8),
            nn.Linear(16, 3),
        )
        self.width, self.shared = 4, 2

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.width)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


def test_shared_keys_go_with_all_their_queries_and_other_numbers_stay() -> None:
    net = lively(Grouping()).double()
    unread(net, "out", range(8))
    x = torch.randn(3, 5, 8).double()
    result = shrink(net, x)
    assert shape(result.model, "q")[0] == 8 and shape(result.model, "k")[0] == 4
    assert result.model.shared == 2  # as many as there were heads of keys, yet not their number
    assert_same(net, result.model, x)
    unread(net, "out", [8, 9, 10, 11])
    assert shape(shrink(net, x).model, "q")[0] == 8  # the other query needs the keys

"""Models of timm and Hugging Face, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from casework import Case, Sum, each, masked_tokens, noise
from torch import nn

# --- timm ------------------------------------------------------------------------------------------------


def timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=7, **options)

    return build


def _resnet18() -> tuple[Sum, ...]:
    return tuple(
        Sum(
            name := f"layer{g}.{b}",
            name,
            branch=0,
            kind="transition" if g > 1 and b == 0 else "identity",
            norms=(f"{name}.bn1", f"{name}.bn2"),
        )
        for g in (1, 2, 3, 4)
        for b in (0, 1)
    )


def _resnetv2_50() -> tuple[Sum, ...]:
    # the first norm of a transition serves its shortcut too
    return tuple(
        Sum(
            name := f"stages.{s}.blocks.{b}",
            name,
            branch=0,
            kind="identity" if b else "transition",
            norms=tuple(f"{name}.norm{n}" for n in ((1, 2, 3) if b else (2, 3))),
        )
        for s, count in enumerate((3, 4, 6, 3))
        for b in range(count)
    )


TIMM = (
    Case("timm resnet18", timm("resnet18"), noise(3, 32, 32), _resnet18(), big=True),
    Case("timm resnetv2_50", timm("resnetv2_50"), noise(3, 32, 32), _resnetv2_50(), big=True),
    Case(
        "timm convnext_atto",
        timm("convnext_atto"),
        noise(3, 64, 64),
        tuple(
            Sum(name := f"stages.{s}.blocks.{b}", name, branch=0)
            for s, count in enumerate((2, 2, 6, 2))
            for b in range(count)
        ),
        big=True,
    ),
    Case(
        "timm vit_tiny_patch16_224",
        timm("vit_tiny_patch16_224", img_size=32),
        noise(3, 32, 32),
        each(12, Sum("blocks.{}.attn", "blocks.{}", 0), Sum("blocks.{}.mlp", "blocks.{}", 1)),
        big=True,
    ),
    Case(
        "timm swin",
        timm(
            "swin_tiny_patch4_window7_224",
            img_size=32,
            window_size=4,
            embed_dim=12,
            depths=(2, 2),
            num_heads=(2, 2),
            drop_path_rate=0.0,
        ),
        noise(3, 32, 32),
        tuple(
            s
            for layer in (0, 1)
            for s in each(
                2,
                Sum(f"layers.{layer}.blocks.{{}}.attn", f"layers.{layer}.blocks.{{}}", 0),
                Sum(f"layers.{layer}.blocks.{{}}.mlp", f"layers.{layer}.blocks.{{}}", 1),
            )
        ),
    ),
)

# --- Hugging Face ----------------------------------------------------------------------------------------

_BERT = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
_PLAIN = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def hf(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        settings = getattr(transformers, config)(**options)
        return getattr(transformers, model)(settings)

    return build


HF = (
    Case(
        "HF ViTModel",
        hf(
            "ViTModel",
            "ViTConfig",
            **{k: v for k, v in _BERT.items() if k != "vocab_size"},
            **_PLAIN,
            num_hidden_layers=3,
            image_size=8,
            patch_size=4,
        ),
        noise(3, 8, 8),
        each(3, Sum("layers.{}.attention", "layers.{}", 0, 0), Sum("layers.{}.mlp", "layers.{}", 1, 0)),
    ),
    Case(
        "HF BertModel",
        hf("BertModel", "BertConfig", **_BERT, **_PLAIN, num_hidden_layers=12),
        masked_tokens(7),
        each(
            12,
            Sum("encoder.layer.{}.attention", "encoder.layer.{}.attention.output", branch=0),
            Sum("encoder.layer.{}.intermediate", "encoder.layer.{}.output", branch=0),
        ),
        big=True,
    ),
    Case(
        "HF GPT2",
        hf("GPT2Model", "GPT2Config", n_embd=16, n_layer=3, n_head=2, vocab_size=50, n_positions=16),
        masked_tokens(7),
        each(3, Sum("h.{}.attn", "h.{}", 0, branch=0), Sum("h.{}.mlp", "h.{}", 1)),
    ),
    Case(
        "HF Llama",
        hf(
            "LlamaModel",
            "LlamaConfig",
            **_BERT,
            num_hidden_layers=3,
            num_key_value_heads=1,
        ),
        masked_tokens(7),
        each(3, Sum("layers.{}.self_attn", "layers.{}", 0), Sum("layers.{}.mlp", "layers.{}", 1)),
    ),
)

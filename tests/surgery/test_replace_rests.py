"""`replace` with an example: what a drop path masked rests instead, by the same law, in many models."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fallow
from fallow import integrations
from fallow.errors import SiteError
from fallow.noise import DropBlock2d
from fallow.noise.drop_path import DropPath
from fallow.surgery.replace import replace

timm, transformers = integrations.need_timm(), integrations.need_transformers()
from timm.layers import DropBlock2d as TimmBlock  # noqa: E402 - torchvision has to be mended first
from timm.layers import DropPath as TimmPath  # noqa: E402
from torchvision import models as tv  # noqa: E402
from torchvision.ops import StochasticDepth  # noqa: E402

IMAGES = torch.randn(4, 3, 32, 32)


class Block(nn.Module):
    def __init__(self, path: nn.Module, width: int = 6, factor: float | None = None) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 8), nn.Linear(8, width)
        self.path = path
        self.scale = nn.Parameter(torch.full((width,), factor)) if factor else None

    def forward(self, x: Tensor) -> Tensor:
        z = self.path(self.down(self.up(self.norm(x)).relu()))
        return x + (z if self.scale is None else z * self.scale)


def net(*paths: nn.Module, **options: Any) -> nn.Sequential:
    return nn.Sequential(*[Block(p, **options) for p in paths])


class Masked(nn.Module):
    """A drop path with masks that are known, one a call."""

    def __init__(self, masks: list[Tensor], rate: float) -> None:
        super().__init__()
        self.masks, self.rate = iter(masks), rate

    def forward(self, x: Tensor) -> Tensor:
        return x * (next(self.masks).double() / self.rate).to(x).view(-1, *[1] * (x.dim() - 1))


# --- models ------------------------------------------------------------------------------------------------


def vit() -> nn.Module:
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 3, "num_heads": 2}
    return timm.models.vision_transformer.VisionTransformer(drop_path_rate=0.5, num_classes=3, **options)


def timm_convnext() -> nn.Module:
    options = {"depths": (1, 1, 2, 1), "dims": (8, 8, 16, 16), "num_classes": 3}
    return timm.models.convnext.ConvNeXt(drop_path_rate=0.5, ls_init_value=None, **options)


def timm_swin() -> nn.Module:
    options = {"img_size": 32, "patch_size": 2, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 2)}
    return timm.models.swin_transformer.SwinTransformer(drop_path_rate=0.5, window_size=4, **options)


def tv_swin() -> nn.Module:
    options = {"patch_size": [2, 2], "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2]}
    return tv.SwinTransformer(window_size=[4, 4], stochastic_depth_prob=0.5, **options)


def tv_convnext() -> nn.Module:
    setting = tv.convnext.CNBlockConfig
    return tv.ConvNeXt([setting(8, 16, 1), setting(16, None, 2)], stochastic_depth_prob=0.5, layer_scale=0.5)


def hf_convnext() -> nn.Module:
    config = transformers.ConvNextConfig(
        hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, drop_path_rate=0.5
    )
    return transformers.ConvNextModel(config)


def hf_swin() -> nn.Module:
    options = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2]}
    return transformers.SwinModel(transformers.SwinConfig(window_size=4, drop_path_rate=0.5, **options))


def hf_beit() -> nn.Module:
    options = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 3}
    options |= {"num_attention_heads": 2, "intermediate_size": 16, "layer_scale_init_value": 0.5}
    return transformers.BeitModel(transformers.BeitConfig(drop_path_rate=0.5, **options))


# drop paths, and the branches that rest for them
MODELS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "timm ViT": (vit, 4, 4),
    "timm ConvNeXt": (timm_convnext, 4, 4),
    "timm Swin": (timm_swin, 6, 6),
    "torchvision ConvNeXt": (tv_convnext, 2, 2),
    "torchvision Swin: one module for two branches": (tv_swin, 3, 6),
    "HF ConvNext": (hf_convnext, 2, 2),
    "HF Swin: the attention's branch alone": (hf_swin, 3, 3),
    "HF Beit: one module for two branches": (hf_beit, 2, 4),
}


def values(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.last_hidden_state


def known_masks(model: nn.Module, result: Any) -> None:
    """Put the masks of the handle's draw where the original's drop paths are."""
    masks = result.handle.masks()
    for change in result.replaced:
        holder, _, attribute = change.name.rpartition(".")
        known = Masked([masks[s] for s in change.sites], change.survival_rate)
        setattr(model.get_submodule(holder), attribute, known)


@pytest.mark.parametrize("name", MODELS)
def test_resting_equals_masking_in_values_and_gradients(name):
    """None of these has BatchNorm, which alone would see the difference."""
    build, modules, branches = MODELS[name]
    model = build().double().train()
    for dropout in model.modules():
        if isinstance(dropout, nn.Dropout):
            dropout.p = 0.0
    with torch.no_grad():  # what starts at zero would hide everything
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    reference, x = copy.deepcopy(model), torch.randn(6, 3, 32, 32).double()
    result = replace(model, example=x[:2])
    assert len(result.replaced) == modules and all(c.note == "" for c in result.replaced)
    assert sum(len(c.sites) for c in result.replaced) == branches
    assert (result.handle.options.mode, result.handle.options.scale) == ("row", "train")
    got = values(model(x))
    known_masks(reference, result)
    wanted = values(reference(x))
    assert any(not bool(m.all()) for m in result.handle.masks().values())
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    got.square().mean().backward()
    wanted.square().mean().backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    for n, p in reference.named_parameters():
        mine = torch.zeros_like(p) if grads[n] is None else grads[n]
        torch.testing.assert_close(
            mine, torch.zeros_like(p) if p.grad is None else p.grad, rtol=1e-8, atol=1e-10
        )


@pytest.mark.parametrize("name", MODELS)
def test_undo_copies_and_keys(name):
    model = MODELS[name][0]().train()
    before, keys = dict(model.named_modules()), list(model.state_dict())
    torch.manual_seed(3)
    wanted = values(model(IMAGES))
    result = replace(model, example=IMAGES[:2])
    assert list(model.state_dict()) == keys
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert values(other(IMAGES)).isfinite().all() and fallow.handle_of(other) is not result.handle
    evaluated = values(model.eval()(IMAGES))
    result.undo()
    assert torch.equal(evaluated, values(model(IMAGES)))
    assert fallow.handle_of(model) is None and result.handle is None
    after = dict(model.train().named_modules())
    assert list(after) == list(before) and all(after[n] is m for n, m in before.items())
    torch.manual_seed(3)
    assert torch.equal(values(model(IMAGES)), wanted)


def test_efficientnet_rests_where_its_blocks_have_a_sum():
    """The first block of a stage has a StochasticDepth that its forward never calls."""
    setting = tv.efficientnet.MBConvConfig
    stages = [setting(2, 3, 1, 16, 8, 2), setting(2, 3, 2, 8, 16, 2)]
    model = tv.EfficientNet(stages, dropout=0.0, stochastic_depth_prob=0.5).train()
    result = replace(model, example=IMAGES)
    rest = {c.name.rpartition(".")[0]: c.sites for c in result.replaced if c.sites}
    assert rest == {n: (n,) for n in ("features.1.1", "features.2.1")}
    assert {c.note for c in result.replaced if not c.sites} == {"the example does not call it"}
    model(IMAGES).sum().backward()
    assert "BatchNorm in a branch that rests row by row" in str(result.report())


# --- one rate, one mode, one site --------------------------------------------------------------------------


def test_every_branch_keeps_its_rate_and_its_report():
    rates = (0.1, 0.4, 0.5)
    result = replace(net(*map(TimmPath, rates)), example=torch.randn(2, 6))
    assert result.handle.rates == pytest.approx({"0": 0.9, "1": 0.6, "2": 0.5})
    assert all(type(result.model[i].path) is nn.Identity for i in range(3))
    for _ in range(50):
        result.model(torch.randn(64, 6))
    for row, drop in zip(result.report().rows, rates, strict=True):
        assert row.now.startswith("rests ") and row.asked == pytest.approx(1 - drop)
        assert abs(row.realised - row.asked) < 4 * (drop * (1 - drop) / (50 * 64)) ** 0.5


def test_batch_mode_rests_by_batch_and_beside_row_mode_it_masks():
    example = torch.randn(2, 6)
    alone = replace(net(StochasticDepth(0.5, "batch"), StochasticDepth(0.2, "batch")), example=example)
    assert alone.handle.options.mode == "batch" and alone.handle.rates == {"0": 0.5, "1": 0.8}
    both = replace(net(StochasticDepth(0.5, "batch"), StochasticDepth(0.2, "row")), example=example)
    assert both.handle.options.mode == "row" and both.handle.rates == {"0": 1.0, "1": 0.8}
    assert isinstance(both.model[0].path, DropPath) and both.model[0].path.mode == "batch"
    assert 'whose mode is "row"' in both.replaced[0].note


def test_a_factor_after_the_drop_path_is_no_matter():
    result = replace(net(TimmPath(0.5), factor=0.3), example=torch.randn(2, 6))
    assert result.replaced[0].sites == ("0",)


class Odd(nn.Module):
    """A residual block whose branch can rest, but is not what its drop path masks."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.path, self.one, self.two = how, TimmPath(0.5), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        z = self.one(x).relu()
        if self.how == "inside":
            return x + self.two(self.path(z).sigmoid())
        if self.how == "half":
            return x + (self.path(z) + self.two(x))
        if self.how == "piece":
            return x + torch.cat([self.path(z[:, :3]), z[:, 3:]], 1)
        if self.how == "used twice":
            dropped = self.path(z)
            return (x + dropped) * dropped.mean()
        if self.how == "twice":
            return x + self.path(self.path(z))
        if self.how == "other rows":
            return x + self.path(z.unsqueeze(0)).squeeze(0)
        return x + z


ODD = {
    "inside": "not the branch of a residual sum",
    "half": "not the branch of a residual sum",
    "piece": "not the branch of a residual sum",
    "used twice": "not the branch of a residual sum",
    "twice": "masked twice",
    "other rows": "does not have the batch's rows",
    "not at all": "does not call it",
}


@pytest.mark.parametrize("how", ODD)
def test_what_is_not_a_branch_is_masked_where_it_was(how):
    model = nn.Sequential(Odd(how), Block(TimmPath(0.2)))
    result = replace(model, example=torch.randn(2, 6))
    assert {c.name: c.sites for c in result.replaced} == {"0.path": (), "1.path": ("1",)}
    assert ODD[how] in result.replaced[0].note and result.handle.rates["1"] == 0.8
    assert result.handle.rates.get("0", 1) == 1 and isinstance(model[0].path, DropPath)
    assert "masks and saves no work: 0.path" in str(result.report())
    model(torch.randn(5, 6)).sum().backward()


def test_of_two_drop_paths_on_one_branch_the_first_rests_and_the_second_masks():
    model = net(nn.Sequential(TimmPath(0.5), TimmPath(0.2)))
    result = replace(model, example=torch.randn(2, 6))
    assert [c.sites for c in result.replaced] == [("0",), ()]
    assert "masked twice" in result.replaced[1].note and result.handle.rates == {"0": 0.5}


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 60), nn.ReLU(), nn.Linear(60, 6))
        self.last, self.path = nn.Linear(6, 6), TimmPath(0.5)
        self.inner = Block(TimmPath(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.path(self.last(self.inner(self.first(x))))


def test_of_two_branches_one_around_the_other_the_inner_one_rests():
    model = Nested()
    result = replace(model, example=torch.randn(2, 6))
    assert {c.name: c.sites for c in result.replaced} == {"path": (), "inner.path": ("inner",)}
    assert "lie inside its own" in result.replaced[0].note
    model(torch.randn(5, 6)).sum().backward()


class BatchAlone(Block):
    """Its branch is normalised over the batch, so it cannot rest row by row."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.up(x - x.mean(0, keepdim=True)).relu()
        return x + self.path(self.down(z - z.mean(0, keepdim=True)))


def test_a_site_that_cannot_rest_by_row_masks_and_the_others_rest():
    model = nn.Sequential(BatchAlone(TimmPath(0.5)), Block(TimmPath(0.5)))
    result = replace(model, example=torch.randn(2, 6))
    assert {c.name: c.sites for c in result.replaced} == {"0.path": (), "1.path": ("1",)}
    assert result.replaced[0].note and isinstance(model[0].path, DropPath)
    model(torch.randn(5, 6)).sum().backward()


def test_weights_that_are_shared_do_not_rest():
    block = Block(TimmPath(0.5))
    result = replace(nn.Sequential(block, block), example=torch.randn(2, 6))
    assert result.handle is None and "called 2 times" in result.replaced[0].note
    assert [c.names for c in result.replaced] == [("0.path",)]


def test_a_drop_path_that_stays_makes_the_others_mask():
    model = net(TimmPath(0.5, scale_by_keep=False), TimmPath(0.5))
    result = replace(model, example=torch.randn(2, 6))
    assert [x.name for x in result.left] == ["0.path"]
    assert result.handle is None and "drops paths already" in result.replaced[0].note
    assert type(model[0].path) is TimmPath and isinstance(model[1].path, DropPath)


def test_a_model_with_a_handle_is_refused_and_left():
    model = net(TimmPath(0.0), TimmPath(0.0))
    handle = fallow.apply(model, fallow.rates.uniform(0.5), example=torch.randn(2, 6))
    model[1].path.drop_prob = 0.3
    path = model[1].path
    with pytest.raises(SiteError, match="on this model already"):
        replace(model, example=torch.randn(2, 6))
    assert model[1].path is path and fallow.handle_of(model) is handle


def test_options_go_to_apply():
    options = {"sampler": "exact", "grads": "zero", "rows": "scattered", "seed": 7}
    result = replace(net(TimmPath(0.5)), example=torch.randn(2, 6), **options)
    found = result.handle.options
    assert (found.sampler, found.grads, found.rows, found.seed) == ("exact", "zero", "scattered", 7)
    warmup = replace(net(TimmPath(0.5)), example=torch.randn(2, 6), schedule=fallow.schedules.warmup(10))
    assert warmup.handle.current_rates == {"0": 1.0}


# --- DropBlock in a branch that rests ----------------------------------------------------------------------


class Convolutions(nn.Module):
    def __init__(self, couple: bool) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.block = nn.GroupNorm(1, 4), TimmBlock(0.3, 3, couple_channels=couple)
        self.act, self.path = nn.ReLU(inplace=True), TimmPath(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.path(self.two(self.act(self.block(self.norm(self.one(x))))))


@pytest.mark.parametrize("couple", [True, False])
def test_a_drop_block_works_on_the_rows_that_are_kept(couple):
    model = nn.Sequential(Convolutions(couple), Convolutions(couple))
    result = replace(model, example=torch.randn(2, 4, 8, 8))
    tally, ran = model[0].block.tally, 0
    for _ in range(30):
        model(torch.randn(2, 4, 8, 8, requires_grad=True)).square().sum().backward()
        ran += int(result.handle.masks()["0"].any())
    assert isinstance(model[0].block, DropBlock2d)
    assert 0 < tally.forwards == ran < 30
    seen = result.handle.report().sites[0].realised * 60 * 64
    assert int(tally.seen[0]) == round(seen)
    assert abs(tally.share - 0.7) < 4 * (0.21 / (seen / 9)) ** 0.5

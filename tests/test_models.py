"""The models: depth, shapes, shortcuts against a transcription, initialisation, clear refusals."""

import pickle

import pytest
import torch
from torch import nn

from fallow import models
from fallow.errors import UsageError
from fallow.models import MODELS, BasicBlock, CifarResNet, PoolPad, SmallViT, build


def weighted_layers(model):
    return sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules())


@pytest.mark.parametrize(
    "name", [name for name in MODELS if name.startswith("resnet") and name != "resnet1202"]
)
def test_the_name_is_the_number_of_weighted_layers(name):
    assert weighted_layers(build(name)) == int(name.removeprefix("resnet"))


def test_resnet1202_has_600_branches():
    with torch.device("meta"):
        model = models.resnet1202(classes=10)
    assert sum(isinstance(m, BasicBlock) for m in model.modules()) == 600
    assert weighted_layers(model) == 1202


@pytest.mark.parametrize(("name", "millions"), [("resnet20", 0.27), ("resnet56", 0.85), ("resnet110", 1.73)])
def test_parameters_of_the_published_table(name, millions):
    # He et al. 2016, table 6: 0.27 M, 0.85 M, 1.7 M (with shortcuts that have no parameters).
    count = sum(p.numel() for p in build(name).parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (7, 9), (1, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_input_size_and_channels_are_free(size, channels):
    model = CifarResNet(14, classes=7, channels=channels, widths=(4, 6, 9)).eval()
    assert model(torch.randn(2, channels, *size)).shape == (2, 7)


def test_the_pooling_shortcut_against_a_loop():
    x = torch.randn(2, 3, 5, 4)
    out = PoolPad(3, 8)(x)
    assert out.shape == (2, 8, 3, 2)
    for row in range(3):
        for column in range(2):
            window = x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            torch.testing.assert_close(out[:, :3, row, column], window.mean((2, 3)))
    assert not out[:, 3:].any()


def test_the_shortcut_keeps_channels_last():
    x = torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last)
    assert PoolPad(16, 32)(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [4, 7])
def test_a_block_is_the_relu_of_a_sum(stride, size):
    block = BasicBlock(4, 4 * stride, stride).eval()
    x = torch.randn(3, 4, size, size)
    torch.testing.assert_close(block(x), (block.shortcut(x) + block.branch(x)).relu())
    assert not list(block.shortcut.parameters())
    for parameter in block.branch.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(block(x.relu()), block.shortcut(x.relu()))


def test_he_initialisation():
    torch.manual_seed(0)
    model = build("resnet56")
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            expected = (2 / (module.out_channels * 9)) ** 0.5
            # The relative standard error of a standard deviation over n draws is 1 / sqrt(2 n).
            error = expected / (2 * module.weight.numel()) ** 0.5
            assert abs(module.weight.std().item() - expected) < 5 * error
    assert not model.head.bias.any()


def test_every_parameter_gets_a_gradient():
    for model, size in ((build("resnet20", channels=1), 8), (SmallViT(24, 2, 3, 2, 8, 1), 8)):
        model(torch.randn(4, 1, size, size)).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_vit_shapes_and_blocks():
    model = build("vit_small", classes=5)
    assert model.positions.shape == (1, 64, 192)
    assert [type(b).__name__ for b in model.blocks] == ["Block"] * 12
    assert {type(m).__name__ for m in model.blocks[0].children()} == {"LayerNorm", "Attention", "Mlp"}
    small = SmallViT(24, 2, 3, 4, (8, 12), 1, 5)
    assert small.positions.shape[1] == 6
    assert small(torch.randn(2, 1, 8, 12)).shape == (2, 5)


def test_attention_against_the_written_formula():
    attention = models.Attention(12, 3)
    x = torch.randn(2, 5, 12)
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    heads = []
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / 2).softmax(-1)
        heads.append(weights @ v[..., part])
    torch.testing.assert_close(attention(x), attention.project(torch.cat(heads, -1)))


def test_build_gives_the_image_size_to_the_transformer_alone():
    assert build("vit_small", channels=1, image=8, width=24, depth=1).positions.shape == (1, 4, 24)
    assert build("resnet20", channels=1, image=8)(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_models_pickle():
    model = build("resnet20")
    again = pickle.loads(pickle.dumps(model))
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: build("resnet65"), 'got "resnet65": did you mean "resnet56"'),
        (lambda: build("qqq"), "choose one of these"),
        (lambda: CifarResNet(21), "got 21: the nearest is 20"),
        (lambda: CifarResNet(2), "got 2: the nearest is 8"),
        (lambda: CifarResNet(20, widths=(16, 32)), "three numbers"),
        (lambda: CifarResNet(20, widths=(32, 16, 8)), "must not decrease, got 32 then 16"),
        (lambda: SmallViT(image=30), "got patch 4 and image 30x30"),
        (lambda: SmallViT(width=100), "got width 100 and 3 heads"),
        (lambda: SmallViT(24, 1, image=8)(torch.randn(1, 3, 16, 16)), "takes 8x8 images, got 16x16"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(UsageError, match=words):
        call()


def test_the_feedforward_networks_have_the_sizes_of_the_literature() -> None:
    lenet = build("lenet300", channels=1, image=28)
    weights = sum(p.numel() for p in lenet.parameters() if p.dim() == 2)
    assert weights == 784 * 300 + 300 * 100 + 100 * 10 == 266_200
    # Caffe's: 500 + 25,000 + 400,000 + 5,000 weights
    caffe = build("lenet5", channels=1, image=28)
    assert sum(p.numel() for p in caffe.parameters() if p.dim() > 1) == 430_500
    for name, model in (
        ("lenet300", lenet),
        ("lenet5", caffe),
        ("vgg_small", build("vgg_small", channels=1)),
    ):
        side = 32 if name == "vgg_small" else 28
        assert model(torch.randn(2, 1, side, side)).shape == (2, 10)


def test_the_feedforward_networks_follow_images_and_classes() -> None:
    for name in models.FEEDFORWARD:
        model = build(name, classes=3, channels=2, image=(20, 24))
        assert model(torch.randn(2, 2, 20, 24)).shape == (2, 3)
    with pytest.raises(UsageError, match="at least 16x16"):
        build("lenet5", channels=1, image=8)
    with pytest.raises(UsageError, match="too small"):
        build("vgg_small", image=4)

"""Residual additions, concatenations, groups, gates: channels that are tied go together or stay."""

from __future__ import annotations

import pytest
import torch
from shrink_cases import (
    Dense,
    Grouped,
    InvertedResidual,
    UNet,
    assert_same,
    deaden,
    lively,
    reasons,
    shape,
    unread,
)
from torch import Tensor, nn
from torch.nn import functional as F

from fallow.models import build
from fallow.sparsity.shrink import Shrunk, shrink

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3)).double()


def shrunk(net: nn.Module, x: Tensor = IMAGE, tolerance: float = 1e-12) -> Shrunk:
    """Shrink, and require the same outputs and that a second time finds nothing more."""
    result = shrink(net, x[:1])
    assert_same(net, result.model, x, tolerance=tolerance)
    assert not shrink(result.model, x[:1]).removed
    return result


def test_a_residual_channel_goes_when_it_is_dead_in_every_term() -> None:
    net = lively(build("resnet20", widths=(6, 8, 10))).double()
    deaden(net, "stem.conv", [0, 1, 4], norm="stem.norm")
    for group in (1, 2, 3):  # the shortcuts lead each channel on through all groups
        for i in range(3):
            dead = [0, 4] if group == 3 and i == 2 else [0, 1, 4]
            deaden(net, f"group{group}.{i}.branch.conv2", dead, norm=f"group{group}.{i}.branch.norm2")
    for group, i in ((1, 0), (2, 1), (3, 2)):
        deaden(net, f"group{group}.{i}.branch.conv1", [1, 3], norm=f"group{group}.{i}.branch.norm1")
    result = shrunk(net)
    small = result.model
    assert shape(small, "stem.conv") == (4, 3, 3, 3)
    assert shape(small, "group1.0.branch.conv1") == (4, 4, 3, 3)
    assert shape(small, "group1.2.branch.conv2") == (4, 6, 3, 3)
    assert shape(small, "group2.0.branch.conv1")[1] == 4
    assert shape(small, "group3.2.branch.conv1") == (8, 8, 3, 3)
    assert reasons(result)["stem.conv"] == "tied to group3.2.branch.conv2, which is not constant"
    # the shortcut of group 2 pads by two channels, whatever comes in: nothing of it had to change
    assert small.get_submodule("group2.0.shortcut").extra == 2


def test_channels_that_a_shortcut_pads_go_with_the_padding() -> None:
    net = lively(build("resnet20", widths=(4, 7, 9))).double()
    for name in (f"group{group}.{i}.branch" for group in (2, 3) for i in range(3)):
        deaden(net, f"{name}.conv2", [5, 6], norm=f"{name}.norm2")
    result = shrunk(net)
    assert net.get_submodule("group2.0.shortcut").extra == 3
    assert result.model.get_submodule("group2.0.shortcut").extra == 1
    assert result.plan["attributes"]["group2.0.shortcut"] == {"extra": 1}
    assert shape(result.model, "group3.0.branch.conv1")[1] == 5


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("depth", [8, 14])
def test_resnets_with_random_dead_channels(seed: int, depth: int) -> None:
    from fallow.models import CifarResNet

    net = lively(CifarResNet(depth, widths=(5, 6, 8)), seed).double()
    generator = torch.Generator().manual_seed(seed)
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            dead = (torch.rand(module.out_channels, generator=generator) < 0.4).nonzero().flatten().tolist()
            deaden(net, name, dead, norm=name.replace("conv", "norm"))
            unseen = (torch.rand(module.in_channels, generator=generator) < 0.3).nonzero().flatten().tolist()
            unread(net, name, unseen)
    result = shrunk(net)
    assert result.after.parameters < result.before.parameters


def test_depthwise_channels_go_with_their_inputs_and_outputs() -> None:
    net = lively(InvertedResidual()).double()
    deaden(net, "depthwise", [2, 3], norm="norm2")  # dead behind: its input is read by nothing else
    unread(net, "project", [5])
    deaden(net, "expand", [7], norm="norm1")
    with torch.no_grad():
        net.norm2.bias[7] = -3.0  # pyright: ignore[reportIndexIssue]  relu6 makes it zero
        net.depthwise.weight[7] = 0.0  # pyright: ignore[reportIndexIssue]
    result = shrunk(net)
    assert shape(result.model, "expand") == (8, 6, 1, 1)
    assert shape(result.model, "depthwise") == (8, 1, 3, 3)
    depthwise = result.model.get_submodule("depthwise")
    assert (depthwise.groups, depthwise.in_channels, depthwise.out_channels) == (8, 8, 8)
    assert shape(result.model, "project") == (6, 8, 1, 1)


def test_a_depthwise_convolution_with_a_multiplier_loses_whole_groups() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, groups=4), nn.ReLU(), nn.Conv2d(8, 2, 1))
    net = lively(net).double()
    unread(net, "3", [2, 3, 4])  # both outputs of group 1, one of group 2
    result = shrunk(net)
    assert shape(result.model, "1") == (6, 1, 3, 3) and result.model[1].groups == 3  # pyright: ignore
    assert "tied" in reasons(result).get("1", "tied")


def test_grouped_convolutions_lose_the_same_number_in_each_group() -> None:
    net = lively(Grouped()).double()
    deaden(net, "stem", [0, 5, 6, 11])  # one, two and one of four
    unread(net, "head", [1, 3, 4])  # one of two, two of ... : one, one and one
    result = shrunk(net)
    grouped = result.model.get_submodule("grouped")
    assert shape(result.model, "stem")[0] == 9
    assert (grouped.groups, grouped.in_channels, grouped.out_channels) == (3, 9, 3)
    assert shape(result.model, "grouped") == (3, 3, 3, 3)
    assert reasons(result)["stem"] == "grouped needs the same number in each of its groups"
    kept = result.plan["kept"]["grouped.weight"]
    assert kept["0"] == [0, 2, 5] and kept["1"][0] == [1, 2, 3] and kept["1"][2] == [0, 1, 2]


def test_a_whole_group_goes() -> None:
    net = lively(Grouped()).double()
    unread(net, "head", [2, 3])
    result = shrunk(net)
    grouped = result.model.get_submodule("grouped")
    assert (grouped.groups, grouped.in_channels, grouped.out_channels) == (2, 8, 4)
    assert shape(result.model, "stem")[0] == 8


def test_concatenated_channels_keep_their_offsets() -> None:
    net = lively(Dense()).double()
    deaden(net, "one", [1], norm="norm")
    deaden(net, "two", [0, 4])
    unread(net, "three", [6])
    unread(net, "head", [2, 3])
    result = shrunk(net)
    assert shape(result.model, "one")[0] == 3 and shape(result.model, "two")[:2] == (2, 3)
    assert shape(result.model, "three")[:2] == (4, 5)
    assert result.plan["kept"]["three.weight"]["1"] == [0, 2, 3, 5, 7]


def test_a_channel_that_one_of_two_readers_ignores_stays() -> None:
    net = lively(Dense()).double()
    unread(net, "two", [0])
    assert not shrunk(net).removed


def test_a_unet_with_a_transposed_convolution() -> None:
    net = lively(UNet()).double()
    deaden(net, "down1", [3])
    deaden(net, "down2", [0, 1])
    unread(net, "join", [0, 4, 5])  # two of the upsampled, and one that the way down reads
    with torch.no_grad():
        net.up.bias[2] = 0.0  # pyright: ignore[reportIndexIssue]
        net.up.weight[:, 2] = 0.0  # pyright: ignore[reportIndexIssue]
    result = shrunk(net, torch.randn(2, 1, 8, 8).double())
    assert shape(result.model, "up") == (4, 2, 2, 2)
    up = result.model.get_submodule("up")
    assert (up.in_channels, up.out_channels) == (4, 2)
    assert shape(result.model, "join")[:2] == (4, 5)


class Gated(nn.Module):
    """Squeeze-and-excitation around a convolution, then a gated linear unit."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.wide, self.head = nn.Linear(8, 12), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        gate = self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu())
        x = (x * torch.sigmoid(gate)).mean((2, 3))
        a, b = self.wide(x).chunk(2, 1)
        return self.head(a * torch.sigmoid(b))


def test_gates_go_with_what_they_gate() -> None:
    net = lively(Gated()).double()
    deaden(net, "conv", [2, 5], norm="norm")
    unread(net, "excite", [1])
    unread(net, "head", [0, 4])
    result = shrunk(net)
    assert shape(result.model, "conv")[0] == 6 and shape(result.model, "excite")[:2] == (6, 3)
    assert shape(result.model, "wide") == (8, 6)
    assert result.plan["kept"]["wide.weight"]["0"] == [1, 2, 3, 5, 7, 8, 9, 11]


class Normed(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.conv(x)).relu())


def test_channels_under_a_norm_over_channels_stay_and_are_listed() -> None:
    net = lively(Normed(nn.GroupNorm(2, 8))).double()
    deaden(net, "conv", [1, 2])
    result = shrunk(net)
    assert not result.removed
    assert [(i.name, i.count) for i in result.left] == [("conv", 2)]
    assert "GroupNorm normalises over the channels of a group" in result.left[0].reason


def test_channels_under_a_norm_of_each_channel_alone_go() -> None:
    net = lively(Normed(nn.GroupNorm(8, 8))).double()
    unread(net, "out", [1, 2])
    result = shrunk(net)
    assert result.model.get_submodule("norm").num_groups == 6
    assert shape(result.model, "conv")[0] == 6


def test_batch_statistics_in_eval_are_no_constants() -> None:
    net = lively(Normed(nn.BatchNorm2d(8, track_running_stats=False))).double()
    unread(net, "out", [1])
    assert shape(shrunk(net, IMAGE).model, "conv")[0] == 7


class Shuffled(nn.Module):
    """A channel shuffle by numbers, as in ShuffleNet."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups, self.conv, self.out = groups, nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        n, c, h, w = x.shape
        x = x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.out(x)


def test_a_shuffle_lets_whole_slabs_go() -> None:
    net = lively(Shuffled(2)).double()
    unread(net, "out", [2, 3, 4])  # positions 1 and 2 of the groups: channels 1 and 5, and 2
    result = shrunk(net)
    assert shape(result.model, "conv")[0] == 6
    assert result.plan["kept"]["conv.weight"]["0"] == [0, 2, 3, 4, 6, 7]
    assert "only whole slabs can go" in reasons(result)["conv"]


class Stubborn(nn.Module):
    """Flattens to a number written in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.out = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc(F.relu(self.conv(x)).view(-1, 144)).relu())


def test_a_forward_that_fixes_its_sizes_keeps_them_and_the_rest_goes() -> None:
    net = lively(Stubborn()).double()
    deaden(net, "conv", [1])
    unread(net, "out", [0, 3])
    result = shrunk(net)
    assert shape(result.model, "conv")[0] == 4 and shape(result.model, "fc")[0] == 3
    assert reasons(result)["conv"] == "the forward of the model itself (Stubborn) fixes its sizes"


class Remembering(Stubborn):
    def __init__(self) -> None:
        super().__init__()
        self.features = 144

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc(F.relu(self.conv(x)).view(-1, self.features)).relu())


def test_a_size_that_the_module_remembers_follows() -> None:
    net = lively(Remembering()).double()
    deaden(net, "conv", [1])
    result = shrunk(net)
    assert result.model.features == 108 and net.features == 144
    assert result.plan["attributes"][""] == {"features": 108}


class InPlace(nn.Module):
    """Adds and activates in place, and writes through a view."""

    def __init__(self, through_view: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 2, 1)
        self.through_view = through_view

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.through_view:
            x.flatten(2).mul_(2.0)
        y = F.relu_(self.b(x))
        y += x
        return self.c(y)


def test_sums_in_place() -> None:
    net = lively(InPlace(False)).double()
    deaden(net, "a", [1])
    deaden(net, "b", [1, 2])
    result = shrunk(net)
    assert shape(result.model, "b") == (5, 5, 1, 1)


def test_memory_written_through_a_view_keeps_its_channels() -> None:
    net = lively(InPlace(True)).double()
    deaden(net, "a", [1])
    deaden(net, "b", [1, 2])
    result = shrunk(net)
    assert not result.removed
    assert "another view" in " ".join(reasons(result).values())


def test_masks_kept_by_torch_prune_shrink_after_they_are_made_permanent() -> None:
    from torch.nn.utils import prune

    net = lively(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))).double()
    prune.ln_structured(net[2], "weight", amount=2, n=1, dim=1)
    prune.remove(net[2], "weight")
    assert shape(shrunk(net, torch.randn(3, 4).double()).model, "0")[0] == 4

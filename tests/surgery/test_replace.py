"""`replace`: DropBlocks of other libraries become ours at the rates that were asked; counts, the way back."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from fallow import integrations
from fallow.errors import ArgumentError, SiteError, UsageError
from fallow.noise import DropBlock2d, DropBlock3d
from fallow.noise.drop_path import DropPath
from fallow.surgery.replace import replace

timm = integrations.need_timm()
from timm.layers import DropBlock2d as TimmBlock  # noqa: E402 - torchvision has to be mended first
from timm.layers import DropPath as TimmPath  # noqa: E402
from torchvision import ops  # noqa: E402


class Net(nn.Module):
    """A convolution, DropBlock, ReLU in place, and a head with a drop path that masks."""

    def __init__(self, block: nn.Module, path: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.block = nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(1, 4), block
        self.path, self.head = path, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.norm(self.conv(x))).relu_()
        return self.head(self.path(x.mean((2, 3))))


def net() -> Net:
    return Net(TimmBlock(0.2, 3), TimmPath(0.3))


def share_by_position(module: nn.Module, side: int, rows: int = 20_000) -> tuple[Tensor, float]:
    """The share dropped at each position, and the largest difference that four standard errors allow."""
    torch.manual_seed(5)
    y = module(torch.ones(rows, 1, side, side))
    p = module.survival_rate
    return (y == 0).double().mean((0, 1)), 4 * math.sqrt(p * (1 - p) / rows)


# --- what becomes of each module ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "cls", "rate", "size", "shared"),
    [
        (TimmBlock(0.1, 7), DropBlock2d, 0.9, 7, True),
        (TimmBlock(0.1, 5, gamma_scale=0.25), DropBlock2d, 0.975, 5, True),
        (TimmBlock(0.2, 4, couple_channels=False, inplace=True), DropBlock2d, 0.8, 4, False),
        (ops.DropBlock2d(0.3, 3), DropBlock2d, 0.7, 3, False),
        (ops.DropBlock3d(0.3, 3, inplace=True), DropBlock3d, 0.7, 3, False),
    ],
)
def test_a_drop_block_keeps_its_block_its_sharing_and_the_rate_that_was_asked(
    theirs, cls, rate, size, shared
):
    model, _ = replace(nn.Sequential(theirs))
    ours = model[0]
    assert isinstance(ours, cls)
    assert ours.survival_rate == pytest.approx(rate, abs=1e-12)
    assert (ours.block_size, ours.shared_channels, ours.normalise) == (size, shared, "expected")


@pytest.mark.parametrize("couple", [True, False])
def test_the_realised_rate_is_the_asked_one_where_theirs_drops_nine_tenths(couple):
    model, _ = replace(nn.Sequential(TimmBlock(0.1, 7, couple_channels=couple)))
    dropped, allowed = share_by_position(model[0], side=7)
    assert float((dropped - 0.1).abs().amax()) < allowed


@pytest.mark.parametrize("stage", [2, 3])
def test_the_presets_of_timm_resnets_drop_what_they_ask(stage):
    """.025 and .1 for ``drop_block_rate=.1``, which timm realises as about .04 and .15."""
    build = timm.models.resnet.drop_blocks(0.1)[stage]
    model, _ = replace(nn.Sequential(build()))
    asked = {2: 0.025, 3: 0.1}[stage]
    dropped, allowed = share_by_position(model[0], side={2: 14, 3: 7}[stage])
    assert 1 - model[0].survival_rate == pytest.approx(asked)
    assert float((dropped - asked).abs().amax()) < allowed


@pytest.mark.parametrize(
    ("theirs", "mode", "rate"),
    [
        (TimmPath(0.3), "row", 0.7),
        (ops.StochasticDepth(0.4, "row"), "row", 0.6),
        (ops.StochasticDepth(0.4, "batch"), "batch", 0.6),
    ],
)
def test_a_drop_path_without_an_example_masks_by_the_same_law(theirs, mode, rate):
    result = replace(nn.Sequential(nn.Identity(), theirs))
    ours = result.model[1]
    assert isinstance(ours, DropPath) and (ours.mode, ours.survival_rate) == (mode, pytest.approx(rate))
    assert result.handle is None and "example=" in str(result.report())
    y = torch.stack([result.model(torch.ones(8, 2)) for _ in range(1000)])
    kept = (y != 0).double().mean((1, 2)) if mode == "batch" else (y != 0).double()[..., 0].flatten()
    assert abs(float(kept.mean()) - rate) < 4 * math.sqrt(rate * (1 - rate) / kept.numel())


def test_subclasses_count_unless_their_forward_is_their_own():
    class Named(TimmPath):
        pass

    class Other(TimmPath):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).neg()

    result = replace(nn.Sequential(Named(0.2), Other(0.2)))
    assert [c.name for c in result.replaced] == ["0"]
    assert [(x.name, "forward of its own" in x.reason) for x in result.left] == [("1", True)]


def test_what_has_no_counterpart_stays_and_is_listed():
    class DropPathOfMine(nn.Module):
        drop_prob = 0.3

    class MyDropPath(nn.Module):
        drop_prob = 0.3

    theirs = [
        TimmBlock(0.1, 3, with_noise=True),
        TimmBlock(0.1, 3, scale_by_keep=False),
        TimmPath(0.1, scale_by_keep=False),
        TimmPath(1.0),
        TimmBlock(0.5, 3, gamma_scale=2.0),
        MyDropPath(),
        DropPathOfMine(),
        TimmPath(0.1),
    ]
    result = replace(nn.Sequential(*theirs))
    reasons = {x.name: x.reason for x in result.left}
    expected = ["with_noise=True", "scale_by_keep=False", "scale_by_keep=False", "share of 1"]
    expected += ["share of 1", "no class of timm"]
    for i, words in enumerate(expected):
        assert words in reasons[str(i)]
    assert set(reasons) == set("012345") and [c.name for c in result.replaced] == ["7"]
    assert all(result.model[i] is theirs[i] for i in range(7))
    assert "left as it is: 0: with_noise=True" in str(result.report())


def test_modules_that_drop_nothing_are_passed_over():
    modules = TimmPath(0.0), ops.StochasticDepth(0.0, "row"), TimmBlock(0.0), nn.Dropout(0.5), TimmPath(0.1)
    result = replace(nn.Sequential(*modules))
    assert [c.name for c in result.replaced] == ["4"] and result.left == ()


@pytest.mark.parametrize(("what", "names"), [("drop_path", ["path"]), (("drop_block",), ["block"])])
def test_what_chooses(what, names):
    assert [c.name for c in replace(net(), what=what).replaced] == names


# --- one module in two places, copies, the way back --------------------------------------------------------


def test_a_shared_module_is_one_module_of_ours_in_all_its_places():
    shared = TimmBlock(0.2, 3)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(nn.Identity(), shared)})
    result = replace(model)
    assert model["a"][0] is model["b"][1] and isinstance(model["a"][0], DropBlock2d)
    assert [c.names for c in result.replaced] == [("a.0", "b.1")]
    assert "a.0 = b.1" in str(result.report())
    result.undo()
    assert model["a"][0] is shared and model["b"][1] is shared


def test_undo_gives_back_the_same_objects_and_bitwise_the_same_forward():
    model, x = net(), torch.randn(6, 2, 8, 8)
    before, keys = dict(model.named_modules()), list(model.state_dict())
    torch.manual_seed(1)
    state, wanted = torch.get_rng_state(), model(x)
    torch.manual_seed(1)
    model, undo = replace(model)
    assert torch.equal(torch.get_rng_state(), state) and list(model.state_dict()) == keys
    undo()
    undo()
    after = dict(model.named_modules())
    assert list(after) == list(before) and all(after[n] is m for n, m in before.items())
    assert torch.equal(model(x), wanted)


def test_training_flags_go_there_and_back():
    model = net()
    model.block.eval()
    result = replace(model)
    assert not model.block.training and model.path.training
    model.train()
    assert model.block.training
    model.eval()
    x = torch.randn(2, 2, 8, 8)
    assert torch.equal(model(x), model(x))
    result.undo()
    assert not model.block.training and not model.path.training


def test_copies_work_and_count_for_themselves():
    result = replace(net())
    x = torch.randn(6, 2, 8, 8)
    for other in (copy.deepcopy(result.model), pickle.loads(pickle.dumps(result.model))):
        torch.manual_seed(2)
        wanted = result.model(x)
        torch.manual_seed(2)
        assert torch.equal(other(x), wanted)
        assert other.block.tally is not result.model.block.tally
    assert result.model.block.tally.forwards == 2


def test_a_copy_of_the_result_undoes_the_copy():
    result = replace(net())
    other = copy.deepcopy(result)
    other.undo()
    assert type(other.model.block) is TimmBlock and isinstance(result.model.block, DropBlock2d)


def test_a_failure_on_the_way_leaves_the_model_as_it_was():
    model = net()
    block, path = model.block, model.path
    with pytest.raises(SiteError, match="cannot run the example"):
        replace(model, example=torch.randn(2, 9, 8, 8))
    assert model.block is block and model.path is path
    model.block.block_size = 0
    model.path, model.block = model.block, model.path  # so that one is in place when the other fails
    with pytest.raises(UsageError, match="block_size"):
        replace(model)
    assert model.path is block and model.block is path


# --- reports -----------------------------------------------------------------------------------------------


def test_the_count_is_the_share_that_was_kept():
    model, _ = replace(nn.Sequential(ops.DropBlock2d(0.3, 3)))
    x = torch.randn(50, 1, 9, 9)
    kept = [float((model(x) != 0).double().mean()) for _ in range(3)]
    assert model[0].tally.share == pytest.approx(sum(kept) / 3, abs=1e-12)
    model.eval()(x)
    assert model[0].tally.forwards == 3


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_reported_rate_is_the_asked_one_whatever_the_input(layout):
    """Half of it zeros already, a channel dead: what is looked at in turn has the law of all."""
    result = replace(nn.Sequential(TimmBlock(0.2, 3, couple_channels=False)))
    x = torch.randn(64, 5, 8, 8).relu()
    x[:, 2] = 0
    for _ in range(40):
        result.model(x.to(memory_format=layout))
    (row,) = result.report().rows
    assert (row.was, row.now, row.asked) == ("DropBlock2d", "DropBlock2d", 0.8)
    # places of one block go together: count each map as a handful of independent ones
    assert abs(row.realised - 0.8) < 4 * math.sqrt(0.16 / (40 * 64 * 4))


def test_the_report_before_and_after_training():
    result = replace(net())
    assert [r.realised for r in result.report().rows] == [None, None]
    assert result.report().as_dict() == {"rate/asked/block": 0.8, "rate/asked/path": 0.7}
    result.model(torch.randn(6, 2, 8, 8)).sum().backward()
    flat = result.report().as_dict()
    assert flat.keys() == {f"rate/{w}/{n}" for w in ("asked", "realised") for n in ("block", "path")}
    assert f"{flat['rate/realised/block']:.3f}" in str(result.report())
    assert repr(result) == "Replaced(2 modules, 0 of them rest, 0 left as they are)"


def test_a_timm_resnet50_trains_and_reports_realised_rates():
    model = timm.create_model("resnet50", drop_block_rate=0.1, num_classes=3)
    result = replace(model.train())
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    x, target, before = torch.randn(8, 3, 64, 64), torch.arange(8) % 3, copy.deepcopy(model.state_dict())
    for _ in range(3):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimiser.step()
    assert loss.isfinite()
    assert all(not torch.equal(before[n], p) for n, p in model.named_parameters() if "conv" in n)
    rows = result.report().rows
    assert {r.name[:8]: r.asked for r in rows} == {"layer3.0": 0.975} | {
        f"layer{s}.{b}": p for s, b, p in [(3, i, 0.975) for i in range(6)] + [(4, i, 0.9) for i in range(3)]
    }
    assert all(0 < r.realised <= 1 for r in rows) and any(r.realised < 1 for r in rows)


# --- refusals ----------------------------------------------------------------------------------------------


def test_nothing_to_replace_says_what_was_looked_for_unless_that_is_fine():
    plain = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    with pytest.raises(SiteError, match="looked for an active DropPath of timm.*DropBlock2d of timm"):
        replace(plain)
    result = replace(plain, missing_ok=True)
    assert (result.replaced, result.left, result.handle) == ((), (), None)
    assert list(result)[0] is plain


def test_a_second_call_changes_nothing_and_says_so():
    model = net()
    first = replace(model)
    inside = dict(model.named_modules())
    with pytest.raises(SiteError, match="2 of its modules are fallow's already"):
        replace(model)
    assert all(m is inside[n] for n, m in model.named_modules())
    first.undo()
    assert type(model.block) is TimmBlock


def test_refusals_name_the_remedy():
    with pytest.raises(ArgumentError, match="replace does not take drop_prob; it takes what, ex"):
        replace(net(), drop_prob=0.1)
    with pytest.raises(ArgumentError, match="does not take sampel; did you mean sampler"):
        replace(net(), sampel="exact")
    with pytest.raises(ArgumentError, match="sampler is for branches that rest, which need example="):
        replace(net(), sampler="exact")
    with pytest.raises(UsageError, match='"drop_path" or "drop_block"'):
        replace(net(), what="droppath")
    with pytest.raises(UsageError, match="names nothing"):
        replace(net(), what=())
    with pytest.raises(ArgumentError, match=r"torch\.nn\.Module"):
        replace("resnet50")

"""What is found, what it is called, what it costs, and that looking changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import laws
import lookalikes
import pytest
import torch
import toys
from cases import POSITIVE, Case
from lookalikes import LOOKALIKES, Lookalike
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import fallow

BY_NAME = {case.name: case for case in (*POSITIVE, *LOOKALIKES)}


def found(case: Case | Lookalike, **options: Any) -> fallow.Sites:
    return fallow.sites(case.model(), case.feed(2), **options)


# --- which ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", POSITIVE, ids=str)
def test_sites_are_exactly_the_residual_sums_in_order(case: Case) -> None:
    sites = found(case)
    assert [(s.name, s.kind) for s in sites] == [(s.site, s.kind) for s in case.sums]
    assert all(s.modes == ("batch", "row") for s in sites), [s.why_not_row for s in sites]
    assert all(0 < s.cost < 1 for s in sites) and sum(s.cost for s in sites) < 1 + 1e-9
    assert not sites.ambiguous and not sites.refused


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("timm resnet18", 8),
        ("timm vit_tiny_patch16_224", 24),
        ("timm convnext_atto", 12),
        ("HF BertModel", 24),
    ],
)
def test_published_architectures_have_as_many_sites_as_branches(name: str, count: int) -> None:
    assert len(BY_NAME[name].sums) == count


@pytest.mark.parametrize("case", LOOKALIKES, ids=str)
def test_sums_that_only_look_residual_are_left_alone(case: Lookalike) -> None:
    sites = found(case)
    assert [s.name for s in sites] == list(case.sites)
    assert [r.name for r in sites.ambiguous] == list(case.ambiguous)
    assert len(sites.refused) == len(case.refused)
    for refused, words in zip(sites.refused, case.refused, strict=True):
        assert words in refused.reason


def test_an_example_of_one_row_a_tuple_or_a_dict_finds_the_same() -> None:
    case = BY_NAME["keyword arguments and tuple outputs"]
    model, feed = case.model(), case.feed(1)
    names = [s.name for s in fallow.sites(model, feed)]
    assert names == [s.site for s in case.sums]
    assert names == [s.name for s in fallow.sites(model, (feed["x"], feed["mask"]))]


def test_a_module_that_is_called_twice_cannot_rest() -> None:
    block = toys.TwoBranches(8)
    sites = fallow.sites(nn.Sequential(block, nn.Linear(8, 8), block), torch.randn(2, 5, 8))
    assert not sites and all("called 2 times" in r.reason for r in sites.refused) and sites.refused


def test_a_branch_whose_inside_is_used_elsewhere_is_refused() -> None:
    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            h = torch.tanh(self.one(x))
            return x + self.two(h), h

    sites = fallow.sites(Leaky(), torch.randn(2, 6))
    assert not sites and ["used outside" in r.reason for r in sites.refused] == [True]


def test_a_model_that_drops_paths_already_is_refused_until_it_does_not() -> None:
    import timm

    x = torch.randn(1, 3, 32, 32)
    with pytest.raises(fallow.SiteError, match=r"blocks\.1\.drop_path1 drops paths already"):
        fallow.sites(timm.create_model("vit_tiny_patch16_224", img_size=32, drop_path_rate=0.1), x)


def test_dropout_is_no_dropped_path() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), toys.Flat(6))
    assert [s.name for s in fallow.sites(model, torch.randn(2, 6))] == ["2.first", "2.second"]


# --- by name -------------------------------------------------------------------------------------------


def test_include_and_exclude_take_patterns() -> None:
    case = BY_NAME["two branches"]
    assert [s.name for s in found(case, include="*.mlp")] == ["0.mlp", "1.mlp"]
    assert [s.name for s in found(case, exclude=["0.*"])] == ["1.mix", "1.mlp"]
    assert [s.name for s in found(case, include="1.*", exclude="*.mlp")] == ["1.mix"]
    for option in ("include", "exclude"):
        with pytest.raises(fallow.SiteError, match=r"'0\.mlps'; did you mean '0\.mlp'"):
            found(case, **{option: "0.mlps"})


@pytest.mark.parametrize(
    ("case", "name"),
    [("feature pyramid, finest map alone", "levels.2"), ("long skip around residual blocks", "body")],
)
def test_ambiguous_sums_are_taken_by_their_name_alone(case: str, name: str) -> None:
    assert name not in [s.name for s in found(BY_NAME[case], include="*")]
    assert name in [s.name for s in found(BY_NAME[case], include=[name, "*"])]
    handle = fallow.apply(BY_NAME[case].model(), {name: 0.5}, example=BY_NAME[case].feed(2))
    assert handle.rates[name] == 0.5


def test_blocks_group_the_branches_of_one_block() -> None:
    case = BY_NAME["two branches"]
    blocks, branches = found(case, granularity="block"), found(case)
    assert [s.name for s in blocks] == ["0", "1"]
    assert sum(s.cost for s in blocks) == pytest.approx(sum(s.cost for s in branches))


# --- cost ----------------------------------------------------------------------------------------------


def counted(model: nn.Module, feed: Any) -> int:
    """FLOPs of a training step, forward and backward, by torch's own counter."""
    with FlopCounterMode(display=False) as counter:
        out = laws.floats(laws.call(model, feed))
        torch.stack([t.sum() for t in out]).sum().backward()
    return counter.get_total_flops()


class Without(nn.Module):
    """Stands for a branch that does nothing, in the shape the branch has."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(self.shape)


@pytest.mark.parametrize("name", ["resnet20", "two branches", "timm resnet18"])
def test_costs_are_shares_of_the_flops_torch_counts_in_a_whole_step(name: str) -> None:
    case = BY_NAME[name]
    model, feed, shapes = case.model(), case.feed(2), {}
    branches = {
        "resnet20": lambda s: [f"{s}.branch"],
        "two branches": lambda s: [s],
        "timm resnet18": lambda s: [f"{s}.{m}" for m in ("conv1", "conv2")],
    }[name]
    for path, module in model.named_modules():
        module.register_forward_hook(lambda m, a, out, path=path: shapes.__setitem__(path, tuple(out.shape)))
    dense = counted(model, feed)
    for site in fallow.sites(model, feed):
        without = copy.deepcopy(model)
        for path in branches(site.name):
            without.set_submodule(path, Without(shapes[path]))
        assert site.cost == pytest.approx(1 - counted(without, feed) / dense, abs=1e-9), site.name


def test_frozen_parameters_cost_a_forward_and_the_way_back_alone() -> None:
    model = toys.Flat(6)
    model.second.requires_grad_(False)
    first, second = fallow.sites(model, torch.randn(2, 6))
    # two maps each: forward, gradient of the input and of the weight; without the last where frozen
    assert first.cost / second.cost == pytest.approx((3 + 3) / (2 + 2))


# --- nothing changes -------------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> dict[str, Any]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "modules": [(n, type(m), m.training, id(m)) for n, m in model.named_modules()],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
        "hooks": [len(getattr(m, h)) for m in model.modules() for h in hooks],
        "grads": [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()],
        "parameters": [(id(p), p.requires_grad) for p in model.parameters()],
        "random": torch.get_rng_state(),
    }


def assert_untouched(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key in ("modules", "attributes", "hooks", "parameters"):
        assert before[key] == after[key], key
    assert list(before["state"]) == list(after["state"])
    assert all(torch.equal(v, after["state"][k]) for k, v in before["state"].items())
    for a, b in zip(before["grads"], after["grads"], strict=True):
        assert (a is None and b is None) or (a[0] == b[0] and torch.equal(a[1], b[1]))
    assert torch.equal(before["random"], after["random"])


def used(case: Case) -> nn.Module:
    """Trained a step, with one module in eval mode and a hook of its own."""
    model = case.model()
    laws.backward(laws.call(model, case.feed(3)))
    list(model.modules())[-1].eval()
    model.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("case", POSITIVE, ids=str)
def test_looking_changes_nothing(case: Case) -> None:
    model = used(case)
    feed = case.feed(2)
    before = snapshot(model)
    fallow.sites(model, feed)
    assert_untouched(before, snapshot(model))


@pytest.mark.parametrize("name", ["resnet20", "two branches", "HF GPT2", "timm swin"])
@pytest.mark.parametrize("mode", ["batch", "row"])
def test_apply_then_remove_changes_nothing(name: str, mode: str) -> None:
    model, feed = used(BY_NAME[name]), BY_NAME[name].feed(2)
    before = snapshot(model)
    handle = fallow.apply(model, fallow.rates.linear(last=0.5), example=feed, mode=mode)
    assert list(model.state_dict()) == list(before["state"])
    assert fallow.handle_of(model) is handle
    handle.remove()
    assert fallow.handle_of(model) is None
    assert_untouched(before, snapshot(model))


@pytest.mark.parametrize("broken", [torch.randn(2, 7), torch.zeros(2, 6, dtype=torch.long)])
def test_an_example_that_cannot_run_is_an_error_and_changes_nothing(broken: torch.Tensor) -> None:
    model = BY_NAME["residual written in the root"].model()
    before = snapshot(model)
    with pytest.raises(fallow.SiteError, match="cannot run the example"):
        fallow.sites(model, broken)
    assert_untouched(before, snapshot(model))


@pytest.mark.parametrize("example", [3, "x", [1, 2], {}, torch.tensor(1.0), torch.zeros(0, 6)])
def test_what_is_no_example_is_said_so(example: Any) -> None:
    with pytest.raises(fallow.FallowError, match="example"):
        fallow.sites(toys.Flat(6), example)


def test_the_toys_of_these_tests_are_what_they_say() -> None:
    x = torch.randn(3, 6)
    gelu = F.gelu(x, approximate="tanh")
    block = lookalikes.TanhGelu(6)
    with torch.no_grad():
        block.up.weight.copy_(torch.eye(12, 6)), block.up.bias.zero_()
        block.down.weight.copy_(torch.eye(6, 12)), block.down.bias.zero_()
    assert torch.allclose(block(x), x + gelu, atol=1e-6)

"""Deep copies, pickles and averaged models, each with a handle and draws of its own; and the way back."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from kit import Net, Residual, gradients, kept, net, same, snapshot, unchanged
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fallow
from fallow import models
from fallow.surgery import Handle

MODES = [{"mode": "batch"}, {"mode": "row"}, {"mode": "row", "sampler": "exact"}]


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def averaged(model: nn.Module) -> nn.Module:
    return AveragedModel(model)


def copied_twice(model: nn.Module) -> nn.Module:
    return copy.deepcopy(saved(copy.deepcopy(model)))


COPIERS = pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, saved, pickled, averaged, copied_twice], ids=lambda f: f.__name__
)
EVERY_MODE = pytest.mark.parametrize("options", MODES, ids=lambda o: "-".join(o.values()))
Duplicate = Callable[[nn.Module], nn.Module]


def handle_of(model: nn.Module) -> Handle:
    handle = fallow.handle_of(model)
    assert handle is not None
    return handle


def steps(model: nn.Module, count: int) -> list[tuple[dict, dict]]:
    """Masks and gradients of some training steps."""
    out = []
    generator = torch.Generator().manual_seed(7)
    for _ in range(count):
        model.zero_grad()
        model(torch.randn(5, 4, generator=generator)).square().sum().backward()
        grads = {name.removeprefix("module."): g for name, g in gradients(model).items()}
        out.append((kept(handle_of(model)), grads))
    return out


@EVERY_MODE
@COPIERS
def test_a_copy_made_in_training_goes_on_as_the_original_does(duplicate: Duplicate, options):
    model, handle = net(**options)
    steps(model, 3)
    model.zero_grad()
    other = duplicate(model)
    mine = handle_of(other)
    assert mine is not handle and (mine.draw, mine.rates) == (handle.draw, handle.rates)
    assert mine.model is (other.module if isinstance(other, AveragedModel) else other)
    expected = steps(model, 5)
    assert handle.draw == 8 and mine.draw == 3, "the copy's draws are its own"
    for (masks, grads), (its_masks, its_grads) in zip(expected, steps(other, 5), strict=True):
        assert masks == its_masks and same(grads, its_grads)
    assert mine.report().as_dict() == handle.report().as_dict()


@COPIERS
def test_rates_and_removal_of_a_copy_are_its_own(duplicate: Duplicate):
    model, handle = net()
    other = duplicate(model)
    mine, inner = handle_of(other), handle_of(other).model
    mine.set_rates({"blocks.1": 0.25})
    assert handle.rates["blocks.1"] == 0.5 and handle.rates["blocks.0"] == 0.5
    mine.remove()
    assert fallow.handle_of(other) is None and fallow.handle_of(model) is handle
    assert type(inner.blocks[0].branch) is nn.Sequential
    other(torch.randn(2, 4))
    depths = set()
    for _ in range(20):
        model(torch.randn(2, 4))
        depths.add(handle.last_depth)
    assert len(depths) > 1 and handle.draw == 20
    handle.remove()
    assert torch.equal(model(torch.ones(2, 4)), other(torch.ones(2, 4)))
    fallow.apply(inner, fallow.rates.uniform(0.5), example=torch.randn(2, 4))
    assert fallow.handle_of(model) is None


@COPIERS
def test_a_copy_outlives_its_original(duplicate: Duplicate):
    model, handle = net()
    expected = torch.ones(2, 4)
    other = duplicate(model)
    plain = Net()
    plain.load_state_dict(model.state_dict())
    expected = plain(torch.ones(2, 4))
    ref = weakref.ref(model)
    del model, handle
    gc.collect()
    assert ref() is None, "nothing of a copy points at the original, and no global registry keeps it"
    other.train()
    for _ in range(10):
        other(torch.ones(2, 4))
    other.eval()
    assert torch.allclose(other(torch.ones(2, 4)), expected)


@pytest.mark.parametrize("use", ["ema", "swa"])
def test_averaged_models_follow_training_and_evaluate_plainly(use):
    model, handle = net()
    averaging = (
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)) if use == "ema" else averaged(model)
    )
    assert isinstance(averaging, AveragedModel)
    mean = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for i in range(6):
        model(torch.randn(3, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        averaging.update_parameters(model)
        for n, p in model.named_parameters():
            if i == 0:
                mean[n] = p.detach().clone()
            else:
                mean[n] = mean[n].lerp(p.detach(), 0.1 if use == "ema" else 1 / (i + 1))
    plain = Net()
    plain.load_state_dict(mean)
    x = torch.randn(3, 4)
    assert torch.allclose(averaging.eval()(x), plain(x), atol=1e-6)
    assert handle.draw == 6 and handle_of(averaging).draw == 0


def test_the_handle_of_a_model_inside_wrappers_is_found():
    model, handle = net()
    assert fallow.handle_of(model) is handle
    assert fallow.handle_of(nn.Sequential(nn.Identity(), model)) is handle
    assert fallow.handle_of(Net()) is None


def test_a_copy_in_the_middle_of_a_forward_is_in_no_forward():
    model, handle = net()
    taken = []
    hook = model.head.register_forward_pre_hook(lambda module, args: taken.append(copy.deepcopy(model)))
    model(torch.randn(2, 4))
    hook.remove()
    other = taken[0]
    assert handle_of(other).draw == 1
    for i in range(4):
        other(torch.randn(2, 4))
        assert handle_of(other).draw == 2 + i, "each forward draws"
    assert handle.draw == 1


@pytest.mark.parametrize("granularity", ["branch", "block"])
@EVERY_MODE
def test_remove_leaves_nothing_behind(options, granularity):
    model = Net()
    model.blocks[1].branch[0].register_forward_hook(lambda *_: None)
    before = snapshot(model)
    schedule = fallow.schedules.warmup(5)
    for _ in range(2):  # and it can be applied again
        handle = fallow.apply(
            model,
            fallow.rates.uniform(0.5),
            example=torch.randn(2, 4),
            granularity=granularity,
            schedule=schedule,
            **options,
        )
        keys = list(model.state_dict())
        model(torch.randn(3, 4))
        model.forward_features(torch.randn(3, 4))
        handle.remove()
        assert list(model.state_dict()) == keys == list(before["values"])
        assert unchanged(model, before)
        handle.remove()  # a second time does nothing
    out = model(torch.ones(1, 4))
    assert torch.equal(out, model(torch.ones(1, 4)))


@EVERY_MODE
def test_names_classes_and_state_keys_stay(options):
    model = models.CifarResNet(8, channels=1, widths=(4, 4, 8))
    before = {n: type(m) for n, m in model.named_modules()}
    state, parameters = list(model.state_dict()), list(model.parameters())
    text = str(model)
    fallow.apply(model, fallow.rates.uniform(0.5), example=torch.randn(2, 1, 8, 8), **options)
    assert list(model.state_dict()) == state and str(model) == text
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    for name, module in model.named_modules():
        assert isinstance(module, before[name]) and type(module).__name__ == before[name].__name__
    plain = models.CifarResNet(8, channels=1, widths=(4, 4, 8))
    plain.load_state_dict(model.state_dict())
    model.load_state_dict(plain.state_dict())


def test_applying_twice_is_refused_until_the_first_is_removed():
    model, handle = net()
    before = snapshot(model)
    for target in (model, copy.deepcopy(model), nn.Sequential(model), model.blocks):
        with pytest.raises(fallow.SiteError, match="already: .*set_rates.*remove"):
            fallow.apply(target, fallow.rates.uniform(0.5), example=torch.randn(2, 4))
    assert unchanged(model, before) and fallow.handle_of(model) is handle
    handle.remove()
    again = fallow.apply(model, fallow.rates.uniform(0.5), example=torch.randn(2, 4))
    assert fallow.handle_of(model) is again and again is not handle
    with pytest.raises(fallow.RunError, match="spent"):
        handle.set_rates({"blocks.0": 0.5})
    handle.remove()  # the spent one takes nothing from its successor
    assert fallow.handle_of(model) is again
    model(torch.randn(2, 4))
    assert again.draw == 1


def test_a_rate_of_one_takes_the_gate_off_and_a_lower_one_puts_it_on_again():
    model, handle = net()
    plain = type(Residual(4).branch)
    gated = type(model.blocks[0].branch)
    assert gated is not plain
    handle.set_rates({"blocks.0": 1.0, "blocks.1": 0.3})
    kinds = [type(block.branch) for block in model.blocks]
    assert kinds == [plain, gated, plain, plain]
    assert handle.rates == {"blocks.0": 1.0, "blocks.1": 0.3, "blocks.2": 1.0, "blocks.3": 1.0}
    handle.set_rates(fallow.rates.uniform(0.5))
    assert all(type(block.branch) is gated for block in model.blocks)
    assert handle.expected_depth == 2


def test_a_gated_module_that_is_parametrised_is_copied_and_pickled_as_torch_has_it():
    block = nn.TransformerDecoderLayer(4, 1, 8, 0.0, batch_first=True)
    x = torch.randn(3, 5, 4)
    example = {"tgt": x, "memory": x}
    handle = fallow.apply(block, fallow.rates.uniform(0.5), example=example, mode="row")
    assert "linear1" in {name for site in handle.sites for name in site.modules}
    nn.utils.parametrizations.weight_norm(block.linear1)
    other = copy.deepcopy(block)
    assert torch.equal(other(**example), block(**example))
    with pytest.raises(RuntimeError, match="parametrized modules"):
        pickle.dumps(block)
    handle.remove()
    nn.utils.parametrize.remove_parametrizations(block.linear1, "weight")
    assert type(block.linear1) is nn.Linear

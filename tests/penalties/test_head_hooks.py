"""What the hooks of a head's penalty see, keep and leave behind."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from headed import batch, net
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint

from fallow.errors import UsageError
from fallow.noise import drop_connect_, weight_dropout_
from fallow.noise.feature_dropout import BlockDropout, FeatureDropout
from fallow.penalties import HeadPenalty
from fallow.schemes import Blocks, Gaussian, Units


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_nothing_is_kept_alive_and_nothing_changes_in_the_model():
    model, (x, *_) = net(), batch()
    keys, before = list(model.state_dict()), hooks(model)
    head = HeadPenalty(model, "fc", Units(0.6))
    kept: list[weakref.ref] = []
    model.body.register_forward_hook(lambda m, a, out: kept.append(weakref.ref(out)) or None)
    model(x)
    head.penalty()
    gc.collect()
    assert [ref() for ref in kept] == [None]
    model(x)
    assert kept[1]() is not None
    head.remove()
    gc.collect()
    assert kept[1]() is None
    assert hooks(model) == before + 1 and list(model.state_dict()) == keys
    head.remove()
    with pytest.raises(UsageError, match="fc: this penalty was removed"):
        head.penalty()


def test_a_penalty_that_is_dropped_takes_its_hooks_with_it():
    model, (x, *_) = net(nn.Dropout(0.5)), batch()
    head = HeadPenalty(model, "fc", Units(0.6))
    model(x)
    assert hooks(model) == 4
    del head
    gc.collect()
    assert hooks(model) == 0


def test_a_hook_that_fails_before_ours_confuses_nothing():
    model, (x, *_) = net(), batch()

    def fail(*_):
        raise KeyError

    handle = model.register_forward_pre_hook(fail)
    head = HeadPenalty(model, "fc", Units(0.6))
    for _ in range(2):
        with pytest.raises(KeyError):
            model(x)
    handle.remove()
    model(x)
    want = head.penalty()
    model(2 * x)
    model(x)
    torch.testing.assert_close(head.penalty(), want)


def test_only_training_forwards_count():
    model, (x, *_) = net(), batch()
    head = HeadPenalty(model, "fc", Units(0.6))
    message = r"fc: no training forward since the last penalty\(\): call model.train\(\)"
    with pytest.raises(UsageError, match=message):
        head.penalty()
    model.eval()(x)
    with pytest.raises(UsageError, match=message):
        head.penalty()
    model.train()(x)
    model.eval()(2 * x)  # an evaluation in between changes nothing
    value = head.penalty()
    with pytest.raises(UsageError, match=message):
        head.penalty()
    model.train()(x)
    torch.testing.assert_close(value, head.penalty())


def test_a_forward_that_fails_or_is_not_the_models_leaves_no_trace():
    model, (x, *_) = net(), batch()
    head = HeadPenalty(model, "fc", Units(0.6))
    model(x)
    want = head.penalty()
    model.fc(model.body(2 * x))
    model.fc(model.body(3 * x))
    model.fc(model.body(x))  # each a forward of its own
    torch.testing.assert_close(head.penalty(), want)
    with pytest.raises(RuntimeError):
        model(x[:, :2])
    model.fc(model.body(2 * x))
    model(x)
    torch.testing.assert_close(head.penalty(), want)


@pytest.mark.parametrize(
    "noise", [nn.Dropout(0.3), nn.AlphaDropout(0.3), BlockDropout(survival_rate=0.5, block_size=2)]
)
def test_noise_in_front_of_the_head_is_refused(noise: nn.Module):
    model, (x, *_) = net(noise), batch()
    head = HeadPenalty(model, "fc", Units(0.7))
    model(x)
    with pytest.raises(UsageError, match="fc: between drops what this layer gets, so the noise would count"):
        head.penalty()
    noise.eval()
    model(x)
    assert head.penalty() > 0
    head.remove()
    assert hooks(model) == 0


@pytest.mark.parametrize(
    "off", [nn.Dropout(0.0), FeatureDropout(Units(1.0)), FeatureDropout(Gaussian(0.0))], ids=repr
)
def test_noise_that_is_off_or_further_away_is_not(off):
    model, (x, *_) = net(off), batch()
    model.body.add_module("drop", nn.Dropout(0.5))
    model.body.add_module("after", nn.Linear(7, 7).double())
    head = HeadPenalty(model, "fc", Units(0.7))
    model(x)
    assert head.penalty() > 0


@pytest.mark.parametrize(
    ("put", "words"),
    [
        (lambda model: drop_connect_(model.fc, survival_rate=0.5), "DropConnect"),
        (lambda model: drop_connect_(model.fc, survival_rate=0.5, mode="row"), "DropConnect"),
        (lambda model: weight_dropout_(model, 0.5, names="fc.weight"), "WeightDropout"),
    ],
)
def test_noise_on_the_weights_is_refused(put, words):
    model, (x, *_) = net(), batch()
    masks = put(model)
    head = HeadPenalty(model, "fc", Units(0.5))
    model(x)
    with pytest.raises(UsageError, match=f"fc: its weight has {words}, so noise would count twice"):
        head.penalty()
    masks.remove()
    model(x)
    assert head.penalty() > 0


def test_copies_of_the_model_have_no_penalty_and_copies_of_the_penalty_their_own():
    model, (x, *_) = net(), batch()
    head = HeadPenalty(model, "fc", Blocks(0.6, 3), reduction="sum")
    output = model(x)  # a graph is held at this moment
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(again(x), output)
    want = head.penalty()
    for again in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert again.model is not model and repr(again) == repr(head)
        again.model(x)
        torch.testing.assert_close(again.penalty(), want)
        again.remove()
    twin, other = copy.deepcopy((model, head))
    assert other.model is twin
    twin(x)
    torch.testing.assert_close(other.penalty(), want)
    head.remove()
    with pytest.raises(UsageError, match="was removed"):
        copy.deepcopy(head).penalty()


def test_checkpoints_run_the_head_again_without_being_counted():
    model, (x, y, _) = net(), batch()
    head = HeadPenalty(model, "fc", Units(0.6))
    loss = mse_loss(model(x), y) + head.penalty()
    want = torch.autograd.grad(loss, list(model.parameters()))
    output = checkpoint(model, x, use_reentrant=False)
    loss = mse_loss(output, y) + head.penalty()  # type: ignore[arg-type]
    for one, other in zip(torch.autograd.grad(loss, list(model.parameters())), want, strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(UsageError, match="no training forward since"):
        head.penalty()
    checkpoint(model, x.requires_grad_(), use_reentrant=True)
    with pytest.raises(UsageError, match="fc: the forward ran without gradients"):
        head.penalty()
    with torch.no_grad():
        model(x)
        assert head.penalty() > 0


# the compiler's own look at a tensor, of which it hides the warning where warnings are no errors
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("whole", [False, True])
def test_it_works_with_compiled_models(whole: bool):
    model, (x, y, _) = net(), batch()
    head = HeadPenalty(model, "fc", Blocks(0.6, 3))
    loss = mse_loss(model(x), y) + head.penalty()
    want = torch.autograd.grad(loss, list(model.parameters()))
    run = model
    if whole:
        run = torch.compile(model, backend="aot_eager")
    else:
        model.body.compile(backend="aot_eager")
    for _ in range(3):
        loss = mse_loss(run(x), y) + head.penalty()
        for one, other in zip(torch.autograd.grad(loss, list(model.parameters())), want, strict=True):
            torch.testing.assert_close(one, other)
    run(x)
    run(2 * x)  # without a penalty in between
    run(x)
    torch.testing.assert_close(mse_loss(model.fc(model.body(x)), y) + head.penalty(), loss)

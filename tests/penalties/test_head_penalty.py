"""The deterministic term of a head against the loss under all masks, and what its hooks do to a model."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from enumerated import SCHEMES, expected
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.checkpoint import checkpoint

from fallow.errors import ArgumentError, SiteError, UsageError
from fallow.noise.dropconnect import drop_connect_
from fallow.noise.feature_dropout import BlockDropout, feature_dropout
from fallow.penalties import HeadPenalty, jensen_bound, quadratic_surrogate
from fallow.schemes import Blocks, FixedSize, Layer, Scheme, Units

EVERY = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())


class Net(nn.Module):
    """A backbone to seven features and a head, with a place between them."""

    def __init__(self, between: nn.Module | None = None, bias: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 7))
        self.between = between or nn.Identity()
        self.fc = nn.Linear(7, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.between(self.body(x)))


def net(*args, **kwargs) -> Net:
    return Net(*args, **kwargs).double()


def batch(samples: int = 5):
    return torch.randn(samples, 4).double(), torch.randn(samples, 3).double(), torch.randint(3, (samples,))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# --- squared error ----------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_and_gradients_are_those_of_the_mean_over_all_masks(scheme: Scheme, reduction: str):
    model, (x, y, _) = net(), batch()
    head = HeadPenalty(model, "fc", scheme, reduction=reduction)
    loss = mse_loss(model(x), y, reduction=reduction) + head.penalty()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    features = model.body(x)
    mean = expected(scheme, 7, lambda z: mse_loss(model.fc(features * z), y, reduction=reduction))
    torch.testing.assert_close(loss, mean, rtol=1e-12, atol=0)
    for one, other in zip(gradients, torch.autograd.grad(mean, list(model.parameters())), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_it_is_the_mean_of_a_head_that_is_sampled():
    """A mask for each row, from the layers of the other package, which know nothing of this one."""
    model, (x, y, _) = net(bias=False), batch()
    scheme = Blocks(0.7, 3)
    head = HeadPenalty(model, "fc", scheme)
    exact = mse_loss(model(x), y) + head.penalty()
    features, generator = model.body(x), torch.Generator().manual_seed(1)
    losses = []
    for _ in range(400):
        noisy = feature_dropout(features.repeat(50, 1), scheme, generator=generator)
        losses.append((model.fc(noisy) - y.repeat(50, 1)).square().view(50, -1).mean(1))
    values = torch.cat(losses).detach()
    error = float(values.std()) / len(values) ** 0.5
    assert abs(float(values.mean() - exact.detach())) < 5 * error


def test_leading_axes_are_samples():
    model, x, y = nn.Linear(7, 3).double(), torch.randn(2, 4, 7).double(), torch.randn(2, 4, 3).double()
    head = HeadPenalty(model, "", FixedSize(3))  # the model itself is the layer
    loss = mse_loss(model(x), y) + head.penalty()
    torch.testing.assert_close(loss, expected(FixedSize(3), 7, lambda z: mse_loss(model(x * z), y)))
    loss = mse_loss(model(x[0, 0]), y[0, 0]) + head.penalty()
    torch.testing.assert_close(
        loss, expected(FixedSize(3), 7, lambda z: mse_loss(model(x[0, 0] * z), y[0, 0]))
    )


def test_all_calls_of_one_forward_count():
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.fc(self.body(x)), self.fc(input=self.body(-x))])

    model, (x, y, _) = Twice().double(), batch()
    head = HeadPenalty(model, "fc", Units(0.6))
    model(x)  # of an earlier forward, whose penalty nobody asked for
    loss = mse_loss(model(x), y.repeat(2, 1)) + head.penalty()
    features = torch.cat([model.body(x), model.body(-x)])
    mean = expected(Units(0.6), 7, lambda z: mse_loss(model.fc(features * z), y.repeat(2, 1)))
    torch.testing.assert_close(loss, mean)


def test_the_scheme_may_change_between_steps():
    model, (x, *_) = net(), batch()
    head = HeadPenalty(model, "fc", Units(0.5))
    model(x)
    first = head.penalty()
    head.scheme = Units(0.8)
    model(x)
    torch.testing.assert_close(head.penalty(), first / 4)
    with pytest.raises(UsageError):
        head.scheme = FixedSize(8)


def test_a_model_under_autocast_has_a_penalty_in_single_precision():
    model, (x, *_) = net().float(), batch()
    head = HeadPenalty(model, "fc", Blocks(0.6, 3))
    model(x.float())
    want = head.penalty()
    with torch.autocast("cpu", torch.bfloat16):
        model(x.float())
        value = head.penalty()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, want, rtol=0.05, atol=0)


# --- cross-entropy ----------------------------------------------------------------------------------------


@EVERY
def test_cross_entropy_has_the_quadratic_surrogate(scheme: Scheme):
    model, (x, _, y) = net(), batch(8)
    head = HeadPenalty(model, "fc", scheme, loss="cross_entropy")
    plain = cross_entropy(model(x), y)
    penalty, features = head.penalty(), model.body(x)
    want = quadratic_surrogate(model.fc.weight, features, scheme, bias=model.fc.bias) / 8
    torch.testing.assert_close(penalty, want)
    mean = expected(scheme, 7, lambda z: cross_entropy(model.fc(features * z), y))
    assert (plain + penalty - mean).detach().abs() < 0.15 * (mean - plain).detach()


@pytest.mark.parametrize(("scheme", "size"), [(Units(0.6), 1), (Blocks(0.6, 3), 3), (Layer(0.6), 7)])
def test_cross_entropy_has_the_bound(scheme: Scheme, size: int):
    model, (x, _, y) = net(), batch(8)
    for reduction, share in (("mean", 8), ("sum", 1)):
        head = HeadPenalty(model, "fc", scheme, loss="cross_entropy", surrogate="bound", reduction=reduction)
        total = cross_entropy(model(x), y, reduction=reduction) + head.penalty(y)
        features = model.body(x)
        want = jensen_bound(
            model.fc.weight, features, y, survival_rate=0.6, block_size=size, bias=model.fc.bias
        )
        torch.testing.assert_close(total, want / share)
        mean = expected(scheme, 7, lambda z: cross_entropy(model.fc(features * z), y, reduction=reduction))  # noqa: B023
        assert mean <= total
        head.remove()


def test_samples_that_the_loss_ignores_do_not_count():
    model, (x, _, y) = net(), batch(8)
    model.eval()
    model.fc.train()  # rows are independent
    some = torch.tensor([0, 3, 4, 7])
    masked = torch.full_like(y, -100)
    masked[some] = y[some]
    for surrogate in ("quadratic", "bound"):
        head = HeadPenalty(model, "fc", Units(0.6), loss="cross_entropy", surrogate=surrogate)
        model(x)
        value = head.penalty(masked)
        model(x[some])
        torch.testing.assert_close(value, head.penalty(y[some]))
        model(x)
        assert head.penalty(torch.full_like(y, -100)) == 0
        head.remove()


# --- the hooks --------------------------------------------------------------------------------------------


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


def test_noise_that_is_off_or_further_away_is_not():
    model, (x, *_) = net(nn.Dropout(0.0)), batch()
    model.body.add_module("drop", nn.Dropout(0.5))
    model.body.add_module("after", nn.Linear(7, 7).double())
    head = HeadPenalty(model, "fc", Units(0.7))
    model(x)
    assert head.penalty() > 0


def test_masked_weights_are_refused():
    model, (x, *_) = net(), batch()
    masks = drop_connect_(model.fc, survival_rate=0.5)
    head = HeadPenalty(model, "fc", Units(0.5))
    model(x)
    with pytest.raises(UsageError, match="fc: its weight is masked by drop_connect_"):
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


# --- what is refused --------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_in_words():
    model, (x, _, y) = net(), batch()
    for name, message in [
        ("fd", "there is no module 'fd'; did you mean 'fc'"),
        ("body", "'body' is a Sequential; did you mean 'body"),
        ("xyz", "there is no module 'xyz'; there are 'body.0', 'body.3', 'fc'"),
    ]:
        with pytest.raises(SiteError, match=f"name must be that of an nn.Linear, {message}"):
            HeadPenalty(model, name, Units(0.5))
    with pytest.raises(SiteError, match="there are none"):
        HeadPenalty(nn.ReLU(), "fc", Units(0.5))
    with pytest.raises(ArgumentError, match="model must be an nn.Module, got function"):
        HeadPenalty(lambda x: x, "fc", Units(0.5))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="scheme must be one of fallow.schemes"):
        HeadPenalty(model, "fc", 0.5)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="kept must be at most the width"):
        HeadPenalty(model, "fc", FixedSize(8))
    for word, value in (("loss", "mse"), ("surrogate", "exact"), ("reduction", "none")):
        with pytest.raises(UsageError, match=f'{word} must be .* got "{value}"'):
            HeadPenalty(model, "fc", Units(0.5), **{word: value})
    with pytest.raises(UsageError, match="that of squared error is exact"):
        HeadPenalty(model, "fc", Units(0.5), surrogate="bound")
    for scheme in (Blocks(0.5, 2, "sliding"), FixedSize(3), Units((0.5,) * 7)):
        with pytest.raises(UsageError, match="takes Units of one rate, .* got (Blocks|FixedSize|Units)"):
            HeadPenalty(model, "fc", scheme, loss="cross_entropy", surrogate="bound")
    assert hooks(model) == 0
    head = HeadPenalty(model, "fc", Units(0.5), loss="cross_entropy", surrogate="bound")
    model(x)
    with pytest.raises(UsageError, match=r"fc: surrogate=\"bound\" needs the targets: call"):
        head.penalty()
    model(x)
    with pytest.raises(UsageError, match=r"targets must be one for each of 5 samples, got \[3\]"):
        head.penalty(y[:3])

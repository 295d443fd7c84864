"""The deterministic term of a head against the loss under all masks."""

from __future__ import annotations

import pytest
import torch
from enumerated import SCHEMES, expected
from headed import Headed, batch, net
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from fallow.errors import ArgumentError, SiteError, UsageError
from fallow.noise.feature_dropout import feature_dropout
from fallow.penalties import HeadPenalty, jensen_bound, quadratic_surrogate
from fallow.schemes import Blocks, FixedSize, Layer, Scheme, Units

EVERY = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())


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
    class Twice(Headed):
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
    assert not model._forward_hooks and not model.fc._forward_hooks
    head = HeadPenalty(model, "fc", Units(0.5), loss="cross_entropy", surrogate="bound")
    model(x)
    with pytest.raises(UsageError, match=r"fc: surrogate=\"bound\" needs the targets: call"):
        head.penalty()
    model(x)
    with pytest.raises(UsageError, match=r"targets must be one for each of 5 samples, got \[3\]"):
        head.penalty(y[:3])

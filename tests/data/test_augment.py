"""Augmentation: against loops, with its distribution, and never from a global generator."""

import pytest
import torch

from fallow.data import augment
from fallow.errors import DataError, UsageError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count, channels=2, height=5, width=6, dtype=torch.uint8):
    values = torch.randint(1, 256, (count, channels, height, width), generator=generator(99))
    return values.to(dtype)


def shifted(image, down, right):
    """One image moved, pixel by pixel."""
    out = torch.zeros_like(image)
    height, width = image.shape[1:]
    for row in range(height):
        for column in range(width):
            if 0 <= row - down < height and 0 <= column - right < width:
                out[:, row, column] = image[:, row - down, column - right]
    return out


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_each_image_is_mirrored_or_not(dtype):
    x = images(400, dtype=dtype)
    y = augment.flip(x, generator())
    assert y.dtype == dtype
    mirrored = (y == x.flip(-1)).flatten(1).all(1)
    kept = (y == x).flatten(1).all(1)
    assert (mirrored ^ kept).all()
    assert abs(mirrored.sum().item() - 200) < 5 * 10  # five standard deviations of 400 fair draws


@pytest.mark.parametrize("pixels", [1, 4, 7])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_each_image_is_moved_by_one_of_the_offsets(pixels, dtype):
    x = images(12, dtype=dtype)
    y = augment.shift(x, pixels, generator(1))
    assert y.shape == x.shape and y.dtype == dtype
    offsets = [(d, r) for d in range(-pixels, pixels + 1) for r in range(-pixels, pixels + 1)]
    found = []
    for before, after in zip(x, y, strict=True):
        matches = [offset for offset in offsets if shifted(before, *offset).equal(after)]
        assert matches
        found.append(matches[0])
    assert len(set(found)) > 1


def test_offsets_are_uniform_in_both_directions():
    draws, pixels = 9000, 1
    x = torch.zeros(draws, 1, 3, 3)
    x[:, :, 1, 1] = 1  # the centre's place tells the offset
    counts = augment.shift(x, pixels, generator(2)).sum((0, 1)).flatten()
    assert counts.sum() == draws
    expected = draws / 9
    chi_square = ((counts - expected).square() / expected).sum()
    assert chi_square < 26.1  # the .999 quantile for 8 degrees of freedom


def test_no_shift_is_the_same_tensor_and_draws_nothing():
    x, drawn = images(3), generator()
    state = drawn.get_state()
    assert augment.shift(x, 0, drawn) is x
    assert drawn.get_state().equal(state)


@pytest.mark.parametrize(
    "change", [lambda x, g: augment.flip(x, g), lambda x, g: augment.shift(x, 2, g)], ids=["flip", "shift"]
)
def test_the_generator_decides_and_nothing_else(change):
    x = images(64)
    before, copy = torch.get_rng_state(), x.clone()
    first = change(x, generator(3))
    torch.rand(5)
    torch.set_rng_state(before)
    assert change(x, generator(3)).equal(first)
    assert not change(x, generator(4)).equal(first)
    assert torch.get_rng_state().equal(before) and x.equal(copy)
    assert change(x[:0], generator()).shape == (0, 2, 5, 6)


def test_normalised_images_have_mean_0_and_deviation_1():
    x = images(50, channels=3)
    scaled = x.double() / 255
    mean, std = scaled.mean((0, 2, 3)), scaled.std((0, 2, 3), correction=0)
    y = augment.normalise(x, mean, std)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(augment.normalise(scaled.float(), mean.tolist(), std.tolist()), y)


def test_channels_repeat():
    x = images(2, channels=1)
    assert augment.repeat_channels(x, 3).equal(torch.cat([x, x, x], 1))
    assert augment.repeat_channels(x, 1) is x


@pytest.mark.parametrize("pixels", [-1, 1.5, True, None])
def test_pixels_that_cannot_be(pixels):
    with pytest.raises(UsageError, match="pixels must be a whole number of at least 0"):
        augment.shift(images(2), pixels, generator())


def test_a_constant_channel_cannot_be_normalised():
    with pytest.raises(DataError, match=r"std must be positive, got \[1.0, 0.0\]"):
        augment.normalise(images(2), [0.0, 0.0], [1.0, 0.0])

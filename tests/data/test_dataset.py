"""The data set itself: the digits, subsets, validation splits, moments, fingerprints, channels."""

import numpy as np
import pytest
import torch
import written_sets as w
from hypothesis import given
from hypothesis import strategies as st

from fallow.data import load
from fallow.data._common import stratified
from fallow.errors import UsageError


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def colours(tmp_path, **kwargs):
    w.write_npz(tmp_path / "cifar10.npz", w.arrays(**kwargs))
    return load("cifar10", tmp_path)


def test_digits_are_all_there_once(digits):
    from sklearn.datasets import load_digits

    bunch = load_digits()
    key = lambda image: tuple(image.reshape(-1).tolist())  # noqa: E731
    expected = sorted(
        (key(np.rint(i * 255 / 16)), y) for i, y in zip(bunch.images, bunch.target, strict=True)
    )
    images, labels = torch.cat([digits.train_x, digits.test_x]), torch.cat([digits.train_y, digits.test_y])
    assert sorted((key(i), y) for i, y in zip(images, labels.tolist(), strict=True)) == expected
    assert digits.train_x.min() == 0 and digits.train_x.max() == 255


def test_the_split_of_the_digits_is_stratified_and_fixed(digits):
    assert digits.train_x.shape == (1437, 1, 8, 8) and digits.test_x.shape == (360, 1, 8, 8)
    share = digits.test_y.bincount() / (digits.test_y.bincount() + digits.train_y.bincount())
    assert (share - 360 / 1797).abs().max() < 1 / 170
    other = load("digits", seed=7)
    assert other.fingerprint == digits.fingerprint
    assert load("digits", train_size=50, seed=7).test_x.equal(digits.test_x)


@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**64 - 1),
)
def test_stratified_takes_each_class_in_proportion(counts, share, seed):
    labels = np.repeat(np.arange(len(counts)), counts)
    total = round(share * len(labels))
    kept = stratified(labels, total, seed)
    assert len(kept) == total and (np.diff(kept) > 0).all()
    assert np.array_equal(kept, stratified(labels, total, seed))
    got = np.bincount(labels[kept], minlength=len(counts))
    # With the threshold t on the keys a class of m gives m t up to one, and so does the whole set up to one a
    # class: so the largest gap to its share is under 2.
    assert (np.abs(got - np.array(counts) * total / len(labels)) < 2).all()


def test_subsets(digits):
    small = load("digits", train_size=100, seed=1)
    assert small.train_y.bincount().tolist() == pytest.approx([10] * 10, abs=1)
    assert small.fingerprint == load("digits", train_size=100, seed=1).fingerprint
    assert small.fingerprint == digits.subset(100, seed=1).fingerprint
    assert small.fingerprint != load("digits", train_size=100, seed=2).fingerprint
    assert digits.subset(1437).fingerprint == digits.fingerprint
    same = (digits.train_x[:, None] == small.train_x[None, :5]).flatten(2).all(2).any(0)
    assert same.all()


@pytest.mark.parametrize("share", [0.1, 0.5, 1, 200, 1436])
def test_validation_splits_are_partitions(digits, share):
    train, validation = digits.split_validation(share, seed=3)
    assert torch.cat([train, validation]).sort().values.equal(torch.arange(1437))
    assert len(validation) == (share if isinstance(share, int) else round(share * 1437))
    again = digits.split_validation(share, seed=3)
    assert again[0].equal(train) and again[1].equal(validation)
    assert not digits.split_validation(share, seed=4)[1].equal(validation)


def test_the_default_split_is_the_papers_share(digits):
    assert len(digits.split_validation()[1]) == 144  # 45,000 + 5,000 of 50,000, scaled


def test_moments_against_the_plain_ones(tmp_path):
    dataset = colours(tmp_path)
    scaled = dataset.train_x.double() / 255
    torch.testing.assert_close(dataset.mean, scaled.mean((0, 2, 3)).float())
    torch.testing.assert_close(dataset.std, scaled.std((0, 2, 3), correction=0).float())
    assert dataset.channels == 3 and dataset.size == (32, 32)


def test_the_fingerprint_sees_every_array(tmp_path):
    data = w.arrays()
    prints = set()
    for part in (None, *range(4)):
        changed = [array.copy() for array in data]
        if part is not None:
            changed[part].flat[0] ^= 1
        w.write_npz(tmp_path / "cifar10.npz", changed)
        prints.add(load("cifar10", tmp_path).fingerprint)
    assert len(prints) == 5


def test_the_format_does_not_change_the_fingerprint(tmp_path):
    data = w.arrays()
    w.write_cifar_binary(tmp_path / "a", data)
    w.write_cifar_python(tmp_path / "b", data)
    w.write_npz(tmp_path / "c" / "cifar10.npz", data)
    assert len({load("cifar10", tmp_path / place).fingerprint for place in "abc"}) == 1


def test_one_channel_repeats_and_says_so(digits, tmp_path):
    wide = digits.with_channels(3)
    assert wide.channels == 3 and wide.test_x.shape == (360, 3, 8, 8)
    for channel in range(3):
        assert wide.train_x[:, channel].equal(digits.train_x[:, 0])
    assert wide.notes == ("the one channel of the images is repeated to 3",)
    assert wide.mean.tolist() == digits.mean.tolist() * 3
    assert digits.with_channels(1) is digits
    with pytest.raises(UsageError, match="images of 3 channels cannot serve a model of 1"):
        colours(tmp_path).with_channels(1)


@pytest.mark.parametrize("count", [0, -1, 1438, 10.0, True])
def test_train_sizes_that_cannot_be(digits, count):
    for call in (lambda: load("digits", train_size=count), lambda: digits.subset(count)):
        with pytest.raises(UsageError, match="train_size must be a whole number from 1 to 1437, got"):
            call()


@pytest.mark.parametrize("share", [0, 1437, 0.0, 1.0, -0.1, True, None])
def test_validation_shares_that_cannot_be(digits, share):
    with pytest.raises(UsageError, match="validation"):
        digits.split_validation(share)


def test_the_global_generators_are_untouched():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    load("digits", train_size=100, seed=3).split_validation(0.2)
    assert torch.get_rng_state().equal(before[0]) and np.random.get_state()[1].tolist() == before[1]

"""What users pass: batches in every form, and losses."""

from __future__ import annotations

from collections import UserDict, namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fallow import feed
from fallow.errors import ArgumentError, FallowError, RunError, UsageError

MODEL = nn.Linear(3, 2)
X, Y = torch.randn(4, 3), torch.arange(4)
Pair = namedtuple("Pair", "inputs target")


@pytest.mark.parametrize(
    "batch",
    [(X, Y), [X, Y], Pair(X, Y), ({"input": X}, Y), ((X,), Y), (X, None), ({"a": {"b": X}}, {"c": Y})],
)
def test_a_pair_is_inputs_and_target(batch: Any):
    ((inputs, target),) = feed.pairs(MODEL, [batch], 8, "here")
    assert type(inputs) is type(batch[0]) and type(target) is type(batch[1])
    assert feed.inputs_of(batch) is batch[0] and feed.rows_of(inputs) == 4


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_a_dict_is_inputs_and_goes_to_the_loss_whole(kind: type):
    batch = kind({"input": X, "labels": Y})
    ((inputs, target),) = feed.pairs(MODEL, [batch], 8, "here")
    assert inputs == target == {"input": X, "labels": Y}
    assert feed.inputs_of(batch) is batch


def test_loaders_and_endless_generators_are_read_as_far_as_asked():
    loader = DataLoader(TensorDataset(X, Y), batch_size=1)
    assert [int(y) for _, y in feed.pairs(MODEL, loader, 3, "here")] == [0, 1, 2]
    read = []

    def endless():
        while True:
            read.append(1)
            yield X, Y

    assert len(feed.pairs(MODEL, endless(), 5, "here")) == len(read) == 5


def test_everything_goes_to_the_models_device():
    model = nn.Linear(3, 2, device="meta")
    ((inputs, target),) = feed.pairs(model, [({"x": X, "flag": True}, (Y, "name"))], 1, "here")
    assert inputs["x"].device.type == target[0].device.type == "meta"
    assert inputs["flag"] is True and target[1] == "name"
    assert feed.pairs(nn.ReLU(), [(X, Y)], 1, "here")[0][0] is X, "a model without parameters is on the CPU"


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [(X, X.sum(1)), ((X, X), 2 * X.sum(1)), ([X], X.sum(1)), ({"a": X, "b": X}, 2 * X.sum(1))],
)
def test_the_model_is_called_as_its_inputs_are(inputs: Any, expected: Tensor):
    class Summing(nn.Module):
        def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor:
            return (a if b is None else a + b).sum(1)

    torch.testing.assert_close(feed.call_model(Summing(), inputs), expected)


@pytest.mark.parametrize(
    ("batches", "error", "words"),
    [
        ([], UsageError, "here: batches is empty: pass at least one"),
        (iter([]), UsageError, "batches is empty"),
        ([(X[:0], Y[:0])], UsageError, "a batch has no rows"),
        ([(X, Y), (X[:0], Y[:0])], UsageError, "a batch has no rows"),
        (X, ArgumentError, "got Tensor: pass"),
        ({"input": X}, ArgumentError, "got dict: pass"),
        (None, ArgumentError, "got NoneType"),
        ((X, Y), ArgumentError, "got Tensor"),
        ([(X, Y, Y)], ArgumentError, "got tuple of 3"),
        ([X for _ in range(2)], ArgumentError, "a batch must be an"),
        (((X, Y) for _ in range(2)), None, ""),
        ([((x for x in X), Y)], ArgumentError, "no tensor with a batch dimension"),
        ([(torch.tensor(1.0), Y)], ArgumentError, "no tensor with a batch dimension"),
        ("batches", ArgumentError, "got str"),
    ],
)
def test_what_is_no_batch_is_said(batches: Any, error: type[FallowError] | None, words: str):
    if error is None:
        assert len(feed.pairs(MODEL, batches, 8, "here")) == 2
        return
    with pytest.raises(error, match=words):
        feed.pairs(MODEL, batches, 8, "here")


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, None])
def test_a_limit_is_a_count(limit: Any):
    with pytest.raises(UsageError, match="here: max_batches must be an integer of at least 1"):
        feed.pairs(MODEL, [(X, Y)], limit, "here")


@pytest.mark.parametrize("value", [torch.tensor(2.5), torch.tensor([2.5]), torch.tensor([[2.5]])])
def test_one_number_is_a_loss_in_any_shape(value: Tensor):
    value.requires_grad_()
    loss = feed.loss_of(lambda *given: value * (given == (X, Y)), X, Y, "here")
    assert loss.shape == () and loss.item() == 2.5 and loss.requires_grad


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (torch.ones(3), UsageError, r"here: loss_fn must return one number, got a tensor of shape \(3,\)"),
        (torch.ones(0), UsageError, r"one number, got a tensor of shape \(0,\)"),
        (1.5, UsageError, "must return a tensor, got float"),
        (None, UsageError, "must return a tensor, got NoneType"),
        (torch.tensor(torch.nan), RunError, "here: the loss is nan"),
        (torch.tensor([-torch.inf]), RunError, "here: the loss is -inf"),
    ],
)
def test_what_is_no_loss_is_said(value: Any, error: type[FallowError], words: str):
    with pytest.raises(error, match=words):
        feed.loss_of(lambda *_: value, X, Y, "here")

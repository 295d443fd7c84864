"""A model at rest equals the dense model masked: values, gradients of inputs and parameters, statistics."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import laws
import pytest
import torch
from cases import POSITIVE, Case, masked_tokens, noise

import fallow

RATE = 0.6
WAYS = {
    "batch": {"mode": "batch"},
    "batch, exact": {"mode": "batch", "sampler": "exact"},
    "rows, window": {"mode": "row", "sampler": "exact"},
    "rows, scattered": {"mode": "row", "sampler": "exact", "rows": "scattered"},
    "rows, independent": {"mode": "row"},
}
SMALL = [case for case in POSITIVE if not case.big]
BY_NAME = {case.name: case for case in POSITIVE}
# inputs of other sizes than those the sites were found with; 8 tokens with 8 rows, to confuse them
OTHER_SIZES = {
    "resnet20": noise(1, 12, 10),
    "transitions": noise(3, 12, 8),
    "two branches": noise(8, 8),
    "functional glue": noise(8, 8),
    "TransformerEncoderLayer, batch second": noise(8, 8),
    "HF BertModel": masked_tokens(8),
    "HF GPT2": masked_tokens(8),
    "HF Llama": masked_tokens(8),
}
WHOLE = [c for c in POSITIVE if c.big]


def follow(
    case: Case, forwards: int, frozen: bool = False, example: Any = None, rows_fed: int = 5, **way: Any
) -> None:
    model, dense = laws.pair(case)
    if frozen:
        for module in (*model.modules(), *dense.modules()):
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()
    feed = laws.cast(case.feed(rows_fed), torch.float64)
    example = laws.cast(case.feed(2) if example is None else example, torch.float64)
    handle = fallow.apply(model, fallow.rates.uniform(RATE), example=example, seed=3, **way)
    kept: list[bool] = []
    for _ in range(forwards):
        masks = laws.assert_same_run(model, dense, case, feed, handle, 1e-7, 1 / RATE)
        kept += torch.cat([mask.reshape(-1) for mask in masks.values()]).tolist()
    assert {True, False} == set(kept), "nothing rested, or nothing ran"
    dense.load_state_dict(model.state_dict())
    model.eval(), dense.eval()
    with torch.no_grad():
        for ours, theirs in zip(
            laws.floats(laws.call(model, feed)), laws.floats(laws.call(dense, feed)), strict=True
        ):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_small_models_equal_the_masked_reference(case: Case, way: str) -> None:
    follow(case, 4, **WAYS[way])


@pytest.mark.parametrize("way", ["batch", "rows, window", "rows, scattered"])
@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_whole_models_equal_the_masked_reference(case: Case, way: str) -> None:
    follow(case, 1, **WAYS[way])


@pytest.mark.parametrize("way", ["batch", "rows, window", "rows, scattered"])
@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("name", OTHER_SIZES)
def test_inputs_of_other_sizes_than_the_example(name: str, rows: int, way: str) -> None:
    case = BY_NAME[name]
    follow(
        replace(case, inputs=OTHER_SIZES[name]),
        3,
        example=case.feed(2),
        rows_fed=rows,
        frozen=True,
        **WAYS[way],
    )

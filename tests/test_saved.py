"""Rows that lie apart are saved for the backward as the tensor they are of, and taken again there."""

from __future__ import annotations

import pytest
import torch

from fallow import rows
from fallow.rows import Selection
from fallow.saved import saved_as_rows

AROUND = Selection(5, 3, 4)
SCATTERED = Selection(5, 3, index=torch.tensor([0, 2, 4]))


def test_rows_that_lie_apart_are_kept_as_the_tensor_they_are_of() -> None:
    for selection in (AROUND, SCATTERED):
        leaf = torch.randn(5, 3, requires_grad=True)
        x = leaf * 1
        kept = rows.take(x, selection)
        with saved_as_rows(x, kept, selection):
            out = kept.square()
        again = out.grad_fn._saved_self  # pyright: ignore
        assert torch.equal(again, kept) and again.data_ptr() != kept.data_ptr()
        out.sum().backward()
        assert leaf.grad is not None
        assert torch.allclose(leaf.grad, 2 * leaf.detach() * selection.mask()[:, None], atol=1e-6)


def test_rows_of_a_tensor_that_was_written_into_are_refused() -> None:
    x = torch.randn(5, 3, requires_grad=True) * 1
    kept = rows.take(x, AROUND)
    with saved_as_rows(x, kept, AROUND):
        out = kept.square()
    x.mul_(2)
    with pytest.raises(RuntimeError, match="written into before its backward"):
        out.sum().backward()

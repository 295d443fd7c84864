"""Subsets of rows: windows and scattered rows, any batch dimension, any layout, gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fallow import rows
from fallow.rows import Selection

LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "a strided view": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
}


@st.composite
def selections(draw: st.DrawFn) -> Selection:
    total = draw(st.integers(1, 6))
    count = draw(st.integers(0, total))
    if draw(st.booleans()):
        return Selection(total, count, draw(st.integers(0, total - 1)))
    index = sorted(draw(st.permutations(range(total)))[:count])
    return Selection(total, count, index=torch.tensor(index, dtype=torch.int64))


def kept_rows(selection: Selection) -> list[int]:
    """In the order of the subset: a window's from its start on, around the end."""
    if selection.index is not None:
        return selection.index.tolist()
    return [(selection.start + i) % selection.total for i in range(selection.count)]


def by_hand(x: Tensor, z: Tensor, selection: Selection, scale: float, dim: int) -> Tensor:
    """Row by row."""
    out = list(x.to(torch.promote_types(x.dtype, z.dtype)).unbind(dim))
    for j, i in enumerate(kept_rows(selection)):
        out[i] = out[i] + scale * z.select(dim, j)
    return torch.stack(out, dim)


def tensors(
    selection: Selection, dim: int, layout: str, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = [3, 2, 4, 5]
    shape[dim] = selection.total
    x = LAYOUTS[layout](torch.randn(shape, generator=generator, dtype=dtype))
    shape[dim] = selection.count
    z = LAYOUTS[layout](torch.randn(shape, generator=generator, dtype=dtype))
    return x, z


@given(selections())
def test_the_mask_marks_the_kept_rows(selection: Selection) -> None:
    mask = selection.mask()
    assert mask.dtype == torch.bool and mask.shape == (selection.total,)
    assert mask.nonzero().flatten().tolist() == sorted(kept_rows(selection))
    if selection.index is None:
        covered = [i for first, n, _ in selection.pieces() for i in range(first, first + n)]
        others = [i for first, n in selection.rest() for i in range(first, first + n)]
        assert covered == kept_rows(selection) and sorted(covered + others) == list(range(selection.total))


@given(st.lists(st.booleans(), min_size=1, max_size=8))
def test_a_mask_and_its_selection_are_the_same(kept: list[bool]) -> None:
    selection = rows.select_mask(torch.tensor(kept))
    assert (selection.total, selection.count) == (len(kept), sum(kept))
    assert selection.mask().tolist() == kept


@settings(deadline=None)
@given(selections(), st.integers(0, 3), st.sampled_from(sorted(LAYOUTS)))
def test_take_gives_the_kept_rows(selection: Selection, dim: int, layout: str) -> None:
    x, _ = tensors(selection, dim, layout)
    assert torch.equal(
        rows.take(x, selection, dim), x.index_select(dim, torch.tensor(kept_rows(selection)).long())
    )


@settings(deadline=None)
@given(selections(), st.integers(0, 3), st.sampled_from(sorted(LAYOUTS)), st.sampled_from([1.0, -0.75]))
def test_add_and_its_form_in_place_add_row_by_row(
    selection: Selection, dim: int, layout: str, scale: float
) -> None:
    x, z = tensors(selection, dim, layout)
    expected, before = by_hand(x, z, selection, scale, dim), x.clone()
    assert torch.allclose(rows.add(x, z, selection, scale, dim), expected, rtol=0, atol=1e-14)
    assert torch.equal(x, before)
    again = rows.add_(x, z, selection, scale, dim)
    assert again is x and torch.allclose(x, expected, rtol=0, atol=1e-14)


@settings(deadline=None, max_examples=40)
@given(selections(), st.integers(0, 2), st.sampled_from([1.0, 0.3]))
def test_gradients_are_right(selection: Selection, dim: int, scale: float) -> None:
    shape = [2, 2, 2]
    shape[dim] = selection.total
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    shape[dim] = selection.count
    z = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rows.take(x, selection, dim), (x,))
    assert torch.autograd.gradcheck(lambda x, z: rows.add(x, z, selection, scale, dim), (x, z))
    assert torch.autograd.gradcheck(lambda x, z: rows.add_(x.clone(), z, selection, scale, dim), (x, z))


WINDOW, AROUND = Selection(5, 3, 1), Selection(5, 3, 4)
SCATTERED = Selection(5, 3, index=torch.tensor([0, 2, 4]))


@pytest.mark.parametrize("selection", [WINDOW, AROUND, SCATTERED])
@pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)
def test_layouts_are_kept_on_the_way_in_and_out(selection: Selection, layout: torch.memory_format) -> None:
    x = torch.randn(5, 3, 4, 4).contiguous(memory_format=layout).requires_grad_()
    part = rows.take(x, selection)
    assert part.is_contiguous(memory_format=layout)
    z = torch.randn(3, 3, 4, 4).contiguous(memory_format=layout)
    out = rows.add(x, z, selection)
    assert out.is_contiguous(memory_format=layout)
    out.backward(torch.randn(5, 3, 4, 4).contiguous(memory_format=layout))
    assert x.grad is not None and x.grad.is_contiguous(memory_format=layout)


def test_a_window_that_does_not_wrap_is_a_view() -> None:
    x = torch.randn(5, 3)
    assert rows.take(x, WINDOW).data_ptr() == x[1].data_ptr()


@pytest.mark.parametrize("selection", [WINDOW, AROUND, SCATTERED])
@pytest.mark.parametrize(
    ("x_type", "z_type"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16",) * 2]
)
def test_the_sum_has_the_dtype_torch_gives_it_and_gradients_their_own(
    selection: Selection, x_type: str, z_type: str
) -> None:
    x = torch.randn(5, 4, dtype=getattr(torch, x_type), requires_grad=True)
    z = torch.randn(3, 4, dtype=getattr(torch, z_type), requires_grad=True)
    out = rows.add(x, z, selection, 2.0)
    assert out.dtype == (x.detach() + x.detach().to(z.dtype)).dtype
    expected = by_hand(x.detach().double(), z.detach().double(), selection, 2.0, 0)
    assert torch.allclose(out.detach().double(), expected, rtol=1e-2, atol=1e-2)
    out.sum().backward()
    assert x.grad is not None and z.grad is not None
    assert (x.grad.dtype, z.grad.dtype) == (x.dtype, z.dtype)


def test_only_what_needs_a_gradient_gets_one() -> None:
    x, z = torch.randn(5, 4), torch.randn(3, 4, requires_grad=True)
    rows.add(x, z, AROUND, 2.0).sum().backward()
    assert x.grad is None and z.grad is not None and torch.equal(z.grad, torch.full((3, 4), 2.0))
    assert not rows.add(x, z.detach(), AROUND).requires_grad


def test_zeros_arrive_through_the_graph() -> None:
    x, w = torch.randn(3, requires_grad=True), torch.randn(2, requires_grad=True)
    frozen = torch.randn(2)
    out = rows.zero_grads(x, [w, frozen])
    assert torch.equal(out, x)
    w.grad = torch.ones(2)
    out.sum().backward()
    assert torch.equal(w.grad, torch.ones(2)) and x.grad is not None and torch.equal(x.grad, torch.ones(3))
    w.grad = None
    rows.zero_grads(x, [w], "copy").sum().backward()
    assert w.grad is not None and torch.equal(w.grad, torch.zeros(2))


def test_a_copy_is_new_memory_and_no_graph_without_gradients() -> None:
    x, w = torch.randn(3), torch.randn(2, requires_grad=True)
    assert rows.zero_grads(x, [w], "copy").data_ptr() != x.data_ptr()
    with torch.no_grad():
        assert rows.zero_grads(x, [w]) is x
        assert rows.zero_grads(x, [w], "copy").data_ptr() != x.data_ptr()
    assert rows.zero_grads(x, [w.detach()]) is x

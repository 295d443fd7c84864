import pytest
import test_precision
import test_reference
import test_scale_grads
import torch
import toys
from lookalikes import LOOKALIKES, Pyramid
from torch import nn

import fallow

BY_NAME = {case.name: case for case in LOOKALIKES}


def test_a_nested_sum_is_taken_by_its_name():
    case = BY_NAME["nested"]
    with pytest.raises(fallow.SiteError, match="one is inside the branch of the other"):
        fallow.sites(case.model(), case.feed(2), include=["0.inner", "0"])
    handle = fallow.apply(case.model(), {"0.inner": 0.5}, example=case.feed(2))
    assert handle.rates["0.inner"] == 0.5


def test_a_nested_sum_alone_is_taken_by_its_name():
    case = BY_NAME["nested"]
    assert ["0.inner"] == [s.name for s in fallow.sites(case.model(), case.feed(2), include=["0.inner"])]


def test_a_highway_gate_is_refused_with_the_reason():
    case = BY_NAME["highway"]
    sites = fallow.sites(case.model(), case.feed(2))
    assert len(sites.refused) == 2 and all("gated" in r.reason for r in sites.refused)


def test_no_rows_is_an_argument_error():
    with pytest.raises(fallow.ArgumentError, match="no rows"):
        fallow.sites(nn.Linear(3, 3), torch.zeros(0, 3))


class PlainPyramid(Pyramid):
    """Over a backbone without residual blocks; the finest map alone is an output."""

    def __init__(self, width):
        super().__init__(width, outputs=1)
        self.levels = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width if i else 3, width, 3, 2, 1), nn.ReLU()) for i in range(3)
        )


def test_lateral_sums_over_a_plain_backbone_are_no_sites():
    assert not fallow.sites(PlainPyramid(4), torch.randn(2, 3, 16, 16))


CHANNELS, ROWS, RATE = 4, 6, 0.5


def test_recalibrate_without_batches_is_an_error_and_keeps_the_statistics() -> None:
    model = nn.Sequential(toys.PostActivation(CHANNELS))
    x = torch.randn(ROWS, CHANNELS, 5, 5)
    handle = fallow.apply(model, fallow.rates.uniform(RATE), example=x)
    model(x), model(x), model(x)
    before = [b.clone() for b in model.buffers()]
    with pytest.raises(fallow.UsageError, match="no batch"):
        handle.recalibrate([])
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


@pytest.mark.parametrize("way", test_scale_grads.WAYS)
@pytest.mark.parametrize("name", test_scale_grads.WRITTEN)
def test_zeros_where_the_shortcut_is_written_into(name, way):
    test_scale_grads.test_parameters_of_what_rests_get_none_or_zeros(name, way)


@pytest.mark.parametrize("way", test_precision.WAYS)
def test_autocast_keeps_the_dtype_of_a_sum_written_into_its_branch(way):
    test_precision.test_autocast("in place on the branch", way)


def test_a_sum_at_rest_keeps_the_dtype_of_a_sum_written_into_its_branch():
    test_precision.test_a_sum_at_rest_has_the_dtype_it_has_when_its_branch_runs("in place on the branch")


class Router(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gate, self.experts = nn.Linear(width, 3), nn.Linear(width, 3 * width)

    def forward(self, x):
        share = self.gate(x).softmax(-1)
        return (self.experts(x).unflatten(-1, (3, -1)) * share[..., None]).sum(-2), share


class Routed(nn.Module):
    """Keeps an auxiliary loss of a value of its branch."""

    def __init__(self, width):
        super().__init__()
        self.router, self.auxiliary = Router(width), None

    def forward(self, x):
        z, share = self.router(x)
        self.auxiliary = (share * share).mean()
        return x + z


@pytest.mark.parametrize("mode", ["batch", "row"])
def test_a_side_value_of_a_branch_is_added_to_a_loss_as_it_is(mode):
    model = nn.Sequential(Routed(6), nn.Linear(6, 1))
    x = torch.randn(4, 6)
    fallow.apply(model, {"0": 0.5}, example=x, mode=mode, sampler="exact", seed=1)
    for _ in range(8):
        model(x)
        side = model[0].auxiliary
        plain = side.detach().as_subclass(torch.Tensor) if isinstance(side, torch.Tensor) else None
        if plain is not None and plain.dim() == 0:
            assert torch.allclose(torch.ones(()) + side, 1 + plain, equal_nan=True)
            assert type(torch.ones(()) * side) is torch.Tensor


@pytest.mark.parametrize("way", ["batch", "rows, window", "rows, scattered"])
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_glue_that_splits_by_shape_with_inputs_of_other_sizes(rows, way, monkeypatch):
    name = "glue that reads the batch size"
    monkeypatch.setitem(test_reference.OTHER_SIZES, name, test_reference.noise(8, 8))
    test_reference.test_inputs_of_other_sizes_than_the_example(name, rows, way)

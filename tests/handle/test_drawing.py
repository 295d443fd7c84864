"""When a draw is made: once for each outermost training forward, from the seed alone."""

import pytest
import torch
from kit import Net, generators_untouched, kept, net, numbered, watched
from torch import Tensor, nn

import fallow

MODES = [
    {"mode": "batch"},
    {"mode": "batch", "sampler": "exact"},
    {"mode": "row"},
    {"mode": "row", "sampler": "exact"},
    {"mode": "row", "sampler": "exact", "rows": "scattered"},
]


def sequence(options: dict, steps: int = 12) -> list[dict[str, list[bool]]]:
    model, handle = watched(0.5, **options)
    out = []
    for _ in range(steps):
        model(numbered(6))
        out.append(kept(handle))
    return out


@pytest.mark.parametrize("options", MODES, ids=str)
def test_the_seed_decides_and_no_global_generator_is_read_or_moved(options):
    torch.manual_seed(1)
    first = sequence(options)
    torch.manual_seed(2)
    assert sequence(options) == first
    assert sequence({**options, "seed": 1}) != first
    assert len({str(masks) for masks in first}) > 3, "draws differ from step to step"
    model, handle = watched(0.5, **options)
    with generators_untouched():
        for _ in range(3):
            model(numbered(6))
        handle.report()


def test_apply_and_sites_move_no_global_generator():
    model, x = Net(), torch.randn(2, 4)
    model.blocks.insert(1, nn.Dropout(0.2))
    with generators_untouched():
        fallow.sites(model, x)
        fallow.apply(model, fallow.rates.uniform(0.5), example=x).remove()


@pytest.mark.parametrize("options", MODES, ids=str)
def test_one_draw_for_each_training_forward_and_none_at_evaluation(options):
    model, handle = net(**options)
    x = torch.randn(5, 4)
    for i in range(4):
        assert handle.draw == i
        model(x)
    model.eval()
    masks = kept(handle)
    plain = model(x)
    assert handle.draw == 4 and kept(handle) == masks
    handle.remove()
    assert torch.equal(plain, model(x)), "evaluation is the plain model"


def test_a_part_in_eval_mode_neither_rests_nor_draws():
    model, handle = watched(0.2)
    model.branches[0].eval()
    model.branches[1].eval()
    for _ in range(10):
        model(numbered(3))
    assert handle.draw == 10
    assert len(model.branches[2].seen) < 10
    model.eval()
    model.branches[
        2
    ].train()  # training parts of a model in eval mode: the block decides, and that is the root
    model.watch()
    for _ in range(5):
        model(numbered(3))
    assert all(len(b.seen) == 5 for b in model.branches) and handle.draw == 10


@pytest.mark.parametrize("options", MODES, ids=str)
def test_hold_repeats_the_masks_and_then_goes_on_where_it_was(options):
    model, handle = net(**options)
    x = torch.randn(6, 4)
    first = model(x)
    with handle.hold():
        assert torch.equal(model(x), first) and torch.equal(model(x), first)
        with handle.hold():
            model(x)
        model(x)
        assert handle.draw == 1
    model(x)
    again, other = net(**options)
    again(x)
    again(x)
    assert handle.draw == 2 and kept(handle) == kept(other)


def test_hold_before_the_first_forward_holds_its_draw():
    model, handle = net(mode="row")
    x = torch.randn(6, 4)
    with handle.hold():
        assert torch.equal(model(x), model(x))
    assert handle.draw == 1


def test_hold_keeps_a_draw_made_outside_the_root():
    model, handle = net(mode="row")
    x = torch.randn(6, 4)
    first = model.forward_features(x)
    with handle.hold():
        assert torch.equal(model.forward_features(x), first)
        assert torch.equal(model(x), model.head(first))


def test_holding_does_not_count_a_draw_twice():
    model, handle = net(mode="batch")
    x = torch.randn(6, 4)
    model(x)
    before = handle.metrics()
    with handle.hold():
        model(x)
    assert handle.metrics() == before


@pytest.mark.parametrize("options", MODES, ids=str)
@pytest.mark.parametrize("scale", ["train", "eval"])
def test_dense_is_the_network_of_evaluation(options, scale):
    model, handle = net(scale=scale, **options)
    x = torch.randn(6, 4)
    model(x)
    with handle.dense():
        model.train()
        before = handle.draw, handle.last_depth
        inside = model(x)
        assert before == (handle.draw, handle.last_depth), "no draw is made, and none is used up"
    noisy = model(x)
    model.eval()
    assert torch.allclose(inside, model(x), atol=1e-6) and not torch.allclose(noisy, inside)
    with pytest.raises(KeyError), handle.dense():
        raise KeyError
    model.train()
    assert not torch.allclose(model(x), inside), "noise is back after an error inside"


def test_forward_features_draws_afresh_at_every_call():
    model, handle = watched(0.5, sites=6)
    seen = set()
    for i in range(20):
        model.watch()
        x = numbered(2)
        for branch in model.branches:  # the parts alone, without the root
            x = x + branch(x)
        seen.add(tuple(len(b.seen) for b in model.branches))
        assert handle.draw == i + 1
    assert len(seen) > 8


def test_a_part_called_after_the_root_does_not_reuse_its_draw():
    model, handle = net(mode="batch", seed=4)
    x = torch.randn(3, 4)
    for i in range(5):
        model(x)
        model.forward_features(x)
        assert handle.draw == 2 * i + 2
    for i in range(5):
        model.blocks[3](x)  # the last block alone, again and again
        assert handle.draw == 11 + i


def test_the_first_and_the_second_half_called_in_turn_share_a_draw():
    model, handle = net(mode="batch", seed=4)
    x = torch.randn(3, 4)
    for i in range(5):
        model.blocks[2:](model.blocks[:2](model.stem(x)))
        assert handle.draw == i + 1


class Twice(Net):
    """Calls itself: only the outermost forward draws."""

    inner = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.inner and self.training:
            self.inner = True
            try:
                return self(x) + self(x)
            finally:
                self.inner = False
        return super().forward(x)


def test_a_root_forward_inside_a_root_forward_shares_its_draw():
    model = Twice()
    model.inner = True
    handle = fallow.apply(model, fallow.rates.uniform(0.5), example=torch.randn(2, 4), mode="row")
    x = torch.randn(6, 4)
    alone, masks = model(x), kept(handle)
    model.inner = False
    with handle.hold():
        assert torch.allclose(model(x), 2 * alone)
    model(x)
    assert handle.draw == 2 and kept(handle) != masks
    model(x)
    assert handle.draw == 3


class Again(Net):
    """Calls its blocks several times when asked to."""

    times = 1

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(self.times):
            x = self.blocks(x)
        return self.head(x)


@pytest.mark.parametrize("options", MODES, ids=str)
def test_several_calls_of_a_part_inside_one_forward_share_its_draw(options):
    model = Again()
    handle = fallow.apply(model, fallow.rates.uniform(0.5), example=torch.randn(2, 4), **options)
    model.times = 3
    x = torch.randn(6, 4)
    out = model(x)
    assert handle.draw == 1
    with handle.hold():
        z = model.stem(x)
        for _ in range(3):
            z = model.blocks(z)
    assert handle.draw == 1 and torch.allclose(out, model.head(z), atol=1e-6)
    assert handle.last_depth == pytest.approx(sum(sum(m) / len(m) for m in kept(handle).values()))


def test_modules_shared_by_several_calls_are_no_sites():
    model = Again()
    model.times = 2
    with pytest.raises(fallow.SiteError, match="called 2 times in one forward"):
        fallow.apply(model, fallow.rates.uniform(0.5), example=torch.randn(2, 4))


def test_another_batch_size_in_one_run():
    model, handle = watched(0.5, mode="row", sampler="exact")
    for rows in (8, 3, 1, 8):
        model.watch()
        model(numbered(rows))
        assert all(mask.numel() == rows for mask in handle.masks().values())

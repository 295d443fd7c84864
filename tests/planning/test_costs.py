"""What sites cost: against counted FLOPs and kept bytes of real steps in which they rest."""

from __future__ import annotations

from collections.abc import Callable

import laws
import pytest
import torch
from cases import POSITIVE
from casework import Case
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import fallow
from fallow import planning
from fallow.errors import SiteError, UsageError
from fallow.surgery.branch import Run

SMALL = {case.name: case for case in POSITIVE if not case.big}
# Branches that keep a tensor together with a neighbour: resting one of them alone frees less than it costs.
SHARING = ("parallel branches", "TransformerEncoderLayer, norm first", "TransformerDecoderLayer")


def every(names: dict[str, Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", names.values(), ids=names)


def _attention(q, k, v, *_: object, **__: object) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward(grad, q, k, v, *_: object, **__: object) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


# torch's table has attention on CUDA alone.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def flops(model: nn.Module, feed) -> float:
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        laws.backward(laws.call(model, feed))
    return counter.get_total_flops()


def kept_bytes(model: nn.Module, feed) -> float:
    """Bytes that a forward keeps for its backward, parameters and buffers aside."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, torch.Tensor] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if (key := t.untyped_storage()._cdata) not in own:
            seen[key] = t.detach()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        laws.call(model, feed)
    return sum(t.untyped_storage().nbytes() for t in seen.values())


class Stem(nn.Module):
    """The model behind a stem that trains and costs next to nothing, so that every block passes gradients on.

    Without one, the block after one that rests is the first, and saves the gradient of its input too.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))
        self.model = model

    def forward(self, *args, **kwargs):
        return laws.call(self.model, tree_map(self._shifted, kwargs or args))

    def _shifted(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.shift if x.is_floating_point() else x


def freed(
    model: nn.Module, feed, measure: Callable[[nn.Module, object], float]
) -> tuple[dict[str, float], float]:
    """Share of a dense training step that is saved where one site rests, and where all of them do."""
    handle = fallow.apply(model, fallow.rates.uniform(0.5), example=feed)

    def resting(*names: str) -> float:
        def decide(branch, _entry) -> Run | None:
            return Run(branch, 0.0, None, True) if branch.site in names else None

        with handle.deciding(decide), handle.dense():
            return measure(model, feed)

    full, names = resting(), [site.name for site in handle.sites]
    return {n: 1 - resting(n) / full for n in names}, 1 - resting(*names) / full


@every(SMALL)
def test_flops_are_those_a_resting_site_saves(case: Case):
    model, feed = Stem(case.model()), case.feed(8)
    shares = planning.costs(model, [(feed, None)])
    one, together = freed(model, feed, flops)
    assert list(shares) == list(one)
    assert shares == pytest.approx(one, abs=1e-9)
    assert sum(shares.values()) == pytest.approx(together, abs=1e-9)


@every(SMALL)
def test_memory_is_what_a_resting_site_does_not_keep(case: Case):
    model, feed = Stem(case.model()), case.feed(8)
    shares = planning.costs(model, [(feed, None)], kind="memory")
    one, together = freed(model, feed, kept_bytes)
    # BatchNorm in training keeps a mean and a deviation more: a few bytes.
    assert sum(shares.values()) == pytest.approx(together, abs=0.01)
    if case.name not in SHARING:
        assert shares == pytest.approx(one, abs=0.01)


def test_count_and_time_are_shares():
    case = SMALL["resnet20"]
    model, batch = case.model(), (case.feed(4), torch.arange(4))
    count = planning.costs(model, [batch], kind="count")
    assert list(count.values()) == [1 / 9] * 9
    for loss in (None, nn.functional.cross_entropy):
        time = planning.costs(model, [batch], loss, kind="time")
        assert list(time) == list(count)
        assert all(t > 0 for t in time.values()) and sum(time.values()) <= 1


@pytest.mark.parametrize("kind", ["flops", "memory", "time", "count"])
def test_sites_are_chosen_and_grouped_as_in_sites(kind: str):
    model, x = fallow.models.vit_small(width=12, depth=2, image=16), torch.randn(3, 3, 16, 16)
    blocks = planning.costs(model, [(x, None)], kind=kind, granularity="block")
    assert list(blocks) == ["blocks.0", "blocks.1"]
    assert list(planning.costs(model, [(x, None)], kind=kind, exclude="*.mlp")) == [
        "blocks.0.attention",
        "blocks.1.attention",
    ]
    if kind in ("flops", "memory"):
        branches = planning.costs(model, [(x, None)], kind=kind)
        for name, share in blocks.items():
            inside = [c for site, c in branches.items() if site.startswith(name)]
            assert share == pytest.approx(sum(inside))


def test_what_cannot_be_counted_is_said():
    x = torch.randn(3, 3, 8, 8)
    with pytest.raises(UsageError, match='kind must be "flops", "time", "memory" or "count", got "energy"'):
        planning.costs(fallow.models.resnet20(), [(x, None)], kind="energy")
    with pytest.raises(SiteError, match="no residual site"):
        planning.costs(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), [(x, None)])
    frozen = fallow.models.resnet20().requires_grad_(False)
    for kind in ("memory", "time"):
        with pytest.raises(UsageError, match="frozen"):
            planning.costs(frozen, [(x, None)], kind=kind)

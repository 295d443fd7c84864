"""Groups that go by so many at a time: the share that is reached, what stays of a layer, and what is said."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fallow.models import resnet20, vgg_small
from fallow.sparsity import Sparsifier, sparsify
from fallow.sparsity.control import Shortfall, masks_for, pack_of, shortfall_of
from fallow.sparsity.weights import Weight, weights_of

SHARES = [i / 50 for i in range(1, 50)]


def scored(make: Callable[[], nn.Module], groups: str) -> tuple[list[Weight], list[Tensor]]:
    torch.manual_seed(0)
    weights = weights_of(make(), groups=groups)
    return weights, [weight.magnitude() / weight.magnitude().mean() for weight in weights]


def entries(weights: list[Weight], counts: list[int]) -> int:
    return sum(n * weight.members for n, weight in zip(counts, weights, strict=True))


def weight_of(count: int, members: int, name: str = "w") -> Weight:
    return Weight(name, nn.Parameter(torch.zeros(count, members)), "outputs", 0)


def at_once(model: nn.Module, share: float, multiple: int, groups: str = "outputs") -> Sparsifier:
    options = {"strategy": "magnitude", "target": share, "steps": 1, "ramp": (0.0, 1.0)}
    run = sparsify(model, groups=groups, multiple=multiple, **options)
    run.update()
    return run


# --- the share ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "multiple"), [(resnet20, 16), (vgg_small, 32), (vgg_small, 64), (vgg_small, 1)]
)
@pytest.mark.parametrize("groups", ["outputs", "inputs"])
def test_the_share_is_met_to_one_pack_or_all_that_may_go_is_gone(
    make: Callable[[], nn.Module], multiple: int, groups: str
) -> None:
    weights, scores = scored(make, groups)
    total = sum(weight.parameter.numel() for weight in weights)
    least = [min(multiple, weight.count) for weight in weights]
    most = 1 - entries(weights, least) / total
    pack = max(n * weight.members for n, weight in zip(least, weights, strict=True)) / total
    for share in SHARES:
        masks, rescued = masks_for(weights, scores, share, multiple)
        left = [int(mask.sum()) for mask in masks]
        reached = 1 - entries(weights, left) / total
        assert min(share, most) - pack < reached <= share + 0.5 / total
        for mask, score, n, name in zip(masks, scores, least, (w.name for w in weights), strict=True):
            assert bool(mask.flatten()[score.flatten().topk(n).indices].all())
            assert (name not in rescued) or int(mask.sum()) == n
        short = shortfall_of(weights, masks, share, multiple)
        assert (short is not None) >= (share - reached > pack)
        assert short is None or (left == least and short.reached == reached < short.asked == share)


@pytest.mark.parametrize("multiple", [1, 4])
def test_others_go_in_the_place_of_a_layer_that_would_be_empty(multiple: int) -> None:
    weights = [weight_of(4, 6, "small"), weight_of(16, 6, "large")]
    scores = [torch.arange(4) / 100, 1 + torch.rand(16, generator=torch.Generator().manual_seed(0))]
    masks, rescued = masks_for(weights, scores, 0.6, multiple)  # 12 of the 20 groups
    assert [int(mask.sum()) for mask in masks] == [multiple, 8 - multiple]
    assert rescued == ["small"]
    assert bool(masks[0][3]) and scores[1][masks[1]].min() > scores[1][~masks[1]].max()


def test_a_layer_of_one_good_pack_is_not_called_rescued() -> None:
    weights = [weight_of(4, 6, "good"), weight_of(16, 6, "other")]
    masks, rescued = masks_for(weights, [torch.full((4,), 9.0), torch.rand(16)], 0.6, 4)
    assert [int(mask.sum()) for mask in masks] == [4, 4] and not rescued


def test_of_equal_packs_the_odd_one_goes_first() -> None:
    weight = weight_of(18, 5)
    for scores in (torch.zeros(18), torch.full((18,), 0.1)):
        for share, left in [(0.1, 18), (0.12, 16), (0.4, 12), (0.9, 4)]:
            masks, _ = masks_for([weight], [scores], share, 4)
            assert int(masks[0].sum()) == left
            assert bool(masks[0][pack_of(scores, 4) == 0].all())


def test_what_is_gone_stays_gone_along_a_ramp_that_rescues() -> None:
    weights, scores = scored(resnet20, "outputs")
    generator = torch.Generator().manual_seed(0)
    before = [torch.ones_like(score, dtype=torch.bool) for score in scores]
    for share in (0.1, 0.3, 0.5, 0.6, 0.64, 0.64, 0.7):
        found = zip(scores, before, strict=True)
        scores = [torch.rand(s.shape, generator=generator).masked_fill(~mask, -math.inf) for s, mask in found]
        masks, _ = masks_for(weights, scores, share, 16)
        assert not any(bool((new & ~old).any()) for new, old in zip(masks, before, strict=True))
        assert all(int(mask.sum()) % 16 == 0 or bool(mask.all()) for mask in masks)
        before = masks


def test_blocks_keep_their_best_and_a_larger_target_says_so() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    run = at_once(model, 0.9, 1, "2:4")
    assert run.sparsity() == 0.5 and not run.rescued
    assert run.shortfall() == Shortfall(0.9, 0.5, "2 of each 4 neighbours stay, and all else is gone")
    assert at_once(nn.Sequential(nn.Linear(8, 4)), 0.5, 1, "2:4").shortfall() is None


# --- what is said ------------------------------------------------------------------------------------------


def test_a_target_that_cannot_be_met_is_said_with_what_was_reached() -> None:
    torch.manual_seed(0)
    run = at_once(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 20)), 0.9, 8)
    short = run.shortfall()
    assert short is not None and (short.asked, short.reached) == (0.9, run.sparsity())
    assert short.reached == pytest.approx(12 * 8 / 200)
    said = str(run)
    assert (
        "the target was not met: 48.00% zeros instead of 90.00%: 8 outputs of each layer stay, or all" in said
    )
    assert (
        "0.weight would be empty: it has 8 groups, no more than the multiple of 8, and stayed whole" in said
    )
    assert "2.weight" not in run.rescued  # its best 160 entries are more than what is missing


def test_a_target_that_is_met_or_not_yet_due_is_not_lamented() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 20))
    assert at_once(model, 0.45, 8).shortfall() is None
    run = sparsify(model, strategy="magnitude", groups="outputs", target=0.9, steps=10, multiple=8)
    run.update()
    assert run.shortfall() is None and "not met" not in str(run)
    assert sparsify(model, strength=1e-3).shortfall() is None


def test_what_stayed_of_a_rescued_layer_is_said_by_how_many() -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 24))

    assert "0.weight would be empty: the 4 largest of its groups stayed" in str(at_once(model(), 0.9, 4))
    said = str(at_once(model(), 0.999, 1))
    assert "0.weight would be empty: the largest of its groups stayed" in said
    assert "one output of each layer stays, and all else is gone" in said


def test_a_rescue_is_remembered_when_later_looks_take_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 24))
    run = sparsify(
        model, strategy="magnitude", groups="weights", target=0.5, steps=400, every=1, ramp=(0.0, 1.0)
    )
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(1e-4)
    for _ in range(400):
        run.update()
    assert run.rescued == ["0.weight"] and run.shortfall() is None
    assert int(model.get_parameter("0.weight").count_nonzero()) == 1
    assert run.sparsity() == pytest.approx(0.5, abs=1e-3)

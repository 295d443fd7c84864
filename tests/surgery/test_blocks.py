"""granularity="block": the branches of one block rest together."""

import pytest
import torch

import fallow
from fallow import models


def vit() -> models.SmallViT:
    torch.manual_seed(0)
    return models.build("vit_small", image=8, width=16, depth=3, heads=2)


def test_blocks_are_sites_and_their_costs_are_those_of_their_branches() -> None:
    x = torch.randn(2, 3, 8, 8)
    blocks = fallow.sites(vit(), x, granularity="block")
    branches = fallow.sites(vit(), x)
    assert [s.name for s in blocks] == ["blocks.0", "blocks.1", "blocks.2"]
    for block in blocks:
        own = [s.cost for s in branches if s.block == block.name]
        assert len(own) == 2 and block.cost == pytest.approx(sum(own))


@pytest.mark.parametrize("mode", ["batch", "row"])
def test_the_branches_of_a_block_share_every_draw(mode: str) -> None:
    model, x = vit(), torch.randn(6, 3, 8, 8)
    handle = fallow.apply(
        model, fallow.rates.uniform(0.5), example=x, mode=mode, sampler="exact", granularity="block", seed=4
    )
    rows: dict[str, list[int]] = {}
    for name, module in model.named_modules():
        if name.endswith((".attention", ".mlp")):
            # patched below the gate, so that only work that is done counts
            forward = module.forward

            def counted(x, forward=forward, name=name):
                rows[name][-1] = len(x)
                return forward(x)

            module.forward = counted
            rows[name] = []
    for _ in range(12):
        for seen in rows.values():
            seen.append(0)
        model(x)
    for b in range(3):
        assert rows[f"blocks.{b}.attention"] == rows[f"blocks.{b}.mlp"]
        assert set(rows[f"blocks.{b}.mlp"]) == ({0, 6} if mode == "batch" else {3})
    assert handle.report().depth == pytest.approx(1.5, abs=0.5)


def test_a_flat_model_has_no_blocks_beyond_its_branches() -> None:
    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.a(x)
            return x + self.b(x)

    assert [s.name for s in fallow.sites(Flat(), torch.randn(2, 4), granularity="block")] == ["a", "b"]

"""One of two processes that train together; `test_processes.py` gives case, rank and a store file."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from kit import Net, kept
from torch.nn.parallel import DistributedDataParallel

import fallow
from fallow.planning import RunningSensitivities, from_sensitivities

WORLD = 2


def start(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)


def everywhere(value: object) -> list:
    values: list = [None] * WORLD
    dist.all_gather_object(values, value)
    return values


def refused_in_words(rank: int, store: str) -> None:
    """Resting without gradients: refused by `apply`, and at the first forward where the group came later."""
    x = torch.randn(4, 4)
    half = fallow.rates.uniform(0.5)
    early = {mode: Net() for mode in ("batch", "row")}
    handles = {mode: fallow.apply(model, half, example=x, mode=mode) for mode, model in early.items()}
    start(rank, store)
    for mode, model in early.items():
        ours = DistributedDataParallel(model)
        for call in (ours, model, model.forward_features):
            try:
                call(x)
            except fallow.UsageError as error:
                assert 'grads="none" with 2 processes' in str(error) and 'grads="zero"' in str(error)
            else:
                raise AssertionError(f"a forward ran, {mode}")
        assert handles[mode].draw == 0
        model.eval()
        model(x)  # evaluation needs no gradients
        try:
            fallow.apply(Net(), half, example=x, mode=mode)
        except fallow.UsageError as error:
            assert 'Pass grads="zero" to apply' in str(error)
        else:
            raise AssertionError(f"apply went through, {mode}")


def trained(rank: int, store: str) -> None:
    """Gradients are means over the ranks and the replicas stay equal, whatever rests where."""
    start(rank, store)
    for mode, sampler, ranks in (
        ("batch", "bernoulli", "same"),
        ("batch", "exact", "same"),
        ("batch", "bernoulli", "independent"),
        ("row", "exact", "same"),
        ("row", "bernoulli", "same"),
    ):
        torch.manual_seed(0)
        model = Net()
        handle = fallow.apply(
            model,
            fallow.rates.uniform(0.4),
            example=torch.randn(2, 4),
            mode=mode,
            sampler=sampler,
            ranks=ranks,
            grads="zero",
        )
        plain = Net()
        ours = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        generator = torch.Generator().manual_seed(rank)
        agreed, rested = set(), 0
        for _ in range(8):
            x = torch.randn(2, 4, generator=generator)  # few: whole branches rest by rows, too
            plain.load_state_dict(model.state_dict())
            optimizer.zero_grad()
            ours(x).square().mean().backward()
            check_gradients(model, plain, handle, x)
            masks = everywhere(kept(handle))
            agreed.add(masks[0] == masks[1])
            rested += sum(not any(mask) for mask in masks[0].values())
            optimizer.step()
            first, second = everywhere(torch.cat([p.detach().flatten() for p in model.parameters()]))
            assert torch.equal(first, second), "the replicas drift apart"
        assert rested > 4
        assert agreed == {True} if (mode, ranks) == ("batch", "same") else False in agreed, (mode, ranks)


def agreed(rank: int, store: str) -> None:
    """Running sensitivities are of all ranks' samples, and the ranks plan the same rates from them."""
    start(rank, store)
    torch.manual_seed(0)
    model = Net()
    handle = fallow.apply(model, fallow.rates.uniform(0.6), example=torch.randn(2, 4), grads="zero")
    running = RunningSensitivities(handle)
    ours = DistributedDataParallel(model)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(12):
        ours(torch.randn(8, 4, generator=generator)).square().mean().backward()
    own = {name: float(running._sums[name]) / seen for name, seen in running.rows.items()}
    known = running.update()
    assert known is not None
    seen = everywhere(own)
    assert seen[0] != seen[1], "both ranks saw the same, so nothing is tested"
    for name, value in known.items():
        low, high = sorted(s[name] for s in seen)
        assert low <= value <= high, name
    plans = everywhere(from_sensitivities(handle.costs, known, budget=0.7).table)
    assert plans[0] == plans[1]


def check_gradients(model: Net, plain: Net, handle: fallow.Handle, x: torch.Tensor) -> None:
    """Against each rank's masked dense model, averaged by hand."""
    plain.zero_grad()
    z = plain.stem(x)
    for i, block in enumerate(plain.blocks):
        z = z + handle.masks()[f"blocks.{i}"].reshape(-1, 1) * block.branch(z) / 0.4
    plain.head(z).square().mean().backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        mean = sum(everywhere(q.grad)) / WORLD
        assert torch.allclose(p.grad, mean, rtol=1e-4, atol=1e-6), f"{name} is not reduced"


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases = {"refused": refused_in_words, "trained": trained, "agreed": agreed}
    cases[sys.argv[1]](int(sys.argv[2]), sys.argv[3])
    dist.barrier()
    dist.destroy_process_group()

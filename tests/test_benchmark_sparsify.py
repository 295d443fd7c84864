"""benchmarks/sparsify.py: ratios to the right arm, bounds, peers that reach their target, what it writes."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from benchmarks import _sparse_peers as peers
from benchmarks import _timing, sparsify
from benchmarks._timing import Times

SMALL = "--batch-size 4 --pairs 2 --epochs 1 --seeds 1 --train-size 200 --size 1000 --image 8".split()
NARROW = "--widths 4 8 --peer-widths 4 8 --share 0.5 --multiple 1 2".split()


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    net = lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 10))  # noqa: E731
    monkeypatch.setattr(sparsify, "SUBJECTS", {"tiny": (net, (3, 2, 2), 2)})


def clocked(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> None:
    """Every arm takes the seconds it is said to take, else 1; it is run once."""

    def interleave(arms, pairs, **_):
        for step in arms.values():
            step()
        return {name: Times([seconds.get(name, 1.0)] * pairs, [1.0] * pairs) for name in arms}

    monkeypatch.setattr(_timing, "interleave", interleave)


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_bound_methods_alone_fail_and_only_above_the_bound(monkeypatch, optimiser: str) -> None:
    clocked(monkeypatch, {"plain": 2.0, "logsum gradient": 2.2, "logsum adaprox": 2.21, "logsum prox": 9.0})
    row = sparsify.overhead("tiny", optimiser, sparsify.parse(["--subject", "tiny", *SMALL]))
    assert row["fails"] == ["logsum adaprox"]
    assert row["over_plain"]["logsum prox"]["median"] == 4.5
    assert row["plain_s"]["median"] == 1.0  # two steps a run
    assert set(row["over_plain"]) == set(sparsify.METHODS)


def test_a_step_trains_and_the_methods_start_alike(monkeypatch) -> None:
    made = []
    build, shape, repeats = sparsify.SUBJECTS["tiny"]
    monkeypatch.setattr(
        sparsify, "SUBJECTS", {"tiny": (lambda: made.append(build()) or made[-1], shape, repeats)}
    )
    options = sparsify.parse(["--subject", "tiny", *SMALL])
    run = [sparsify.trainer("tiny", "sgd", name, options) for name in (sparsify.PLAIN, "logsum adaprox")]
    before = [{k: v.clone() for k, v in model.state_dict().items()} for model in made]
    assert all(torch.equal(v, before[1][k]) for k, v in before[0].items())
    for steps in run:
        steps()
    assert all(not torch.equal(v, before[0][k]) for k, v in made[0].state_dict().items())
    plain, sparse = (model[1].weight.detach() for model in made)
    assert float(sparse.norm()) < float(plain.norm())


@pytest.mark.parametrize(("takes", "fails"), [(12.0, []), (12.1, ["logsum"])])
def test_the_prox_of_logsum_is_bound(monkeypatch, takes: float, fails: list[str]) -> None:
    clocked(monkeypatch, {"abs sqrt": 2.0, "logsum": takes, "mcp": 90.0})
    row = sparsify.proxes(sparsify.parse(SMALL))
    assert row["fails"] == fails and row["over_abs_sqrt"]["mcp"]["median"] == 45


@pytest.mark.parametrize(
    ("share", "multiple", "left"), [(0.5, 1, 6), (0.5, 4, 8), (0.01, 4, 4), (1.0, 16, 12)]
)
def test_the_smallest_filters_go_and_widths_are_multiples(share: float, multiple: int, left: int) -> None:
    model = nn.Sequential(nn.Conv2d(2, 12, 3))
    norms = model[0].weight.detach().flatten(1).norm(dim=1)
    cut = sparsify.without_filters(model, share, multiple)
    kept = cut[0].weight.detach().flatten(1).norm(dim=1) > 0
    assert int(kept.sum()) == left and bool((norms[~kept] < norms[kept].min()).all())
    assert bool((model[0].weight != 0).all())


@pytest.mark.parametrize("over", [1.19, 1.21])
def test_time_is_bound_in_proportion_to_flops_down_to_a_quarter(monkeypatch, over: float) -> None:
    options = sparsify.parse([*SMALL, "--widths", "8", "16", "--share", "0.75", "0.25", "--multiple", "1"])
    clocked(monkeypatch, {})
    flops = {name: row["flops"] for name, row in sparsify.latencies(options)["rows"].items()}
    clocked(monkeypatch, {name: share * over for name, share in flops.items()})
    found = sparsify.latencies(options)
    wide, narrow = found["rows"].values()
    assert wide["widths"] == [6, 6, 12, 12] and wide["over_proportional"]["median"] == pytest.approx(
        over, rel=1e-3
    )
    assert narrow["flops"] < sparsify.LATENCY_SHARE and narrow["bound"] is None
    assert len(found["fails"]) == (over > sparsify.LATENCY_BOUND)


@pytest.fixture
def data() -> peers.Data:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(256, 1, 8, 8, generator=generator), torch.arange(256) % 10
    return peers.Data(x, y, x[:50], y[:50])


@pytest.mark.parametrize("name", peers.ARMS)
def test_every_arm_reaches_its_target_from_the_same_network(data: peers.Data, name: str) -> None:
    if name == "Torch-Pruning":
        pytest.importorskip("torch_pruning")
    kind, arm = peers.ARMS[name]
    model = peers.build(data, (8, 16), 0)
    before = peers.sizes(model, data)
    after = arm(model, data, 30, 0, 0.5)
    got = peers.sizes(after, data)
    assert after(data.example).shape == (1, 10)
    if not kind:
        assert got["nonzero"] >= before["nonzero"]  # the biases of norms were zero
    elif kind == peers.WEIGHTS:
        zeros = [int((p == 0).sum()) for p in after.parameters() if p.dim() > 1]
        count = sum(p.numel() for p in peers.build(data, (8, 16), 0).parameters() if p.dim() > 1)
        kept = sum(p.numel() for p in after.parameters() if p.dim() > 1) - sum(zeros)
        assert kept == pytest.approx(count / 2, abs=2)
        assert got["sparse_bytes"] <= got["bytes"]
    else:
        assert got["flops"] < before["flops"] and got["nonzero"] < 0.75 * before["nonzero"]


def test_sparse_matrices_are_stored_as_csr() -> None:
    model = nn.Linear(200, 100)
    x = torch.zeros(1, 200)
    example = peers.Data(x, x, x, x)
    dense = peers.sizes(model, example)
    assert dense["sparse_bytes"] == dense["bytes"] and dense["flops"] == 2 * 200 * 100
    model.weight.data[5:] = 0
    sparse = peers.sizes(model, example)
    assert sparse["nonzero"] == 5 * 200 + 100 and sparse["sparse_bytes"] < dense["bytes"] / 2


def test_the_program_measures_prints_and_writes(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(peers, "ARMS", {k: peers.ARMS[k] for k in ("dense", "fallow, magnitude, filters")})
    file = tmp_path / "sparsify.json"
    code = sparsify.main(["--subject", "tiny", *SMALL, *NARROW, "--json", str(file)])
    report = json.loads(file.read_text())
    assert report["kind"] == "sparsify" and [len(report[part]) for part in sparsify.PARTS] == [2, 1, 1, 1]
    fails = [name for part in sparsify.PARTS for found in report[part] for name in found["fails"]]
    printed = capsys.readouterr().out
    assert code == bool(fails) and ("every bound holds" in printed) == (not fails)
    assert "fallow, magnitude, filters" in printed and "multiples of 2" in printed
    assert ("Torch-Pruning is not installed" in printed) == ("Torch-Pruning" not in peers.available())


@pytest.mark.parametrize("words", ["--pairs 0", "--share 1.5", "--share 0", "--part all", "--seeds 0"])
def test_bad_options_are_refused(words: str) -> None:
    with pytest.raises(SystemExit) as stop:
        sparsify.parse(words.split())
    assert stop.value.code == 2

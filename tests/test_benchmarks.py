"""The benchmarks' own arithmetic: what they compare must be the same sum, and their intervals right."""

import json
import math
import random
from functools import partial

import pytest
import torch
from torch import nn

import fallow
from benchmarks import _peers, _timing, skip
from benchmarks._arms import BASE, OVERHEAD, ROW, Case, parts, rates_of
from fallow.models import CifarResNet, SmallViT

SHAPES = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def _sum_and_gradients(form, x, shortcut, branch):
    x, shortcut = x.clone().requires_grad_(), shortcut.clone().requires_grad_()
    out = form(x, shortcut)
    weights = list(branch.parameters())
    grads = torch.autograd.grad(
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum(), [x, shortcut, *weights]
    )
    return [out, *grads]


def _reference(branch, rows, scale):
    """The dense branch on the kept rows, put back by hand."""

    def form(x, shortcut):
        z = torch.zeros_like(shortcut)
        z[rows] = branch(x[rows])
        return shortcut + scale * z

    return form


@pytest.fixture(params=SHAPES)
def setting(request):
    layout = SHAPES[request.param]
    branch = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh()).to(
        memory_format=layout
    )
    x = torch.randn(6, 3, 5, 5).contiguous(memory_format=layout)
    return (
        branch.double(),
        x.double(),
        torch.randn(6, 4, 5, 5, dtype=torch.float64).contiguous(memory_format=layout),
    )


@pytest.mark.parametrize("start, count", [(0, 6), (1, 3), (3, 3), (4, 4), (5, 6), (2, 1)])
def test_a_window_is_the_dense_branch_on_its_rows(setting, start, count):
    branch, x, shortcut = setting
    rows = [(start + i) % 6 for i in range(count)]
    got = _sum_and_gradients(
        lambda x, s: _peers.windowed(x, s, branch, start, count, 1.6), x, shortcut, branch
    )
    want = _sum_and_gradients(_reference(branch, rows, 1.6), x, shortcut, branch)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("form", [_peers.gathered, _peers.selected])
@pytest.mark.parametrize("rows", [[0], [1, 2, 5], [0, 1, 2, 3, 4, 5]])
def test_gathered_rows_are_the_dense_branch_on_them(setting, form, rows):
    branch, x, shortcut = setting
    index = torch.tensor(rows)
    got = _sum_and_gradients(lambda x, s: form(x, s, branch, index, 1.6), x, shortcut, branch)
    want = _sum_and_gradients(_reference(branch, rows, 1.6), x, shortcut, branch)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_masked_forms_drop_whole_rows_and_scale_the_others():
    x = torch.ones(4000, 2)
    rng = random.Random(0)
    dropped = _peers.drop_path(x, torch.zeros_like(x), lambda v: v, 0.8, rng)
    assert set(dropped.unique().tolist()) == {0.0, 1.25} and bool((dropped[:, 0] == dropped[:, 1]).all())
    assert dropped.mean().item() == pytest.approx(1, abs=5 * math.sqrt(0.25 / 4000))
    one = [_peers.stochastic_depth_batch(x, torch.zeros_like(x), lambda v: v, 0.8, rng) for _ in range(40)]
    assert all(len(out.unique()) == 1 for out in one)
    assert {out[0, 0].item() for out in one} == {0.0, 1.25}


def test_kept_counts_are_floor_or_ceil_with_the_right_mean():
    rng = random.Random(0)
    counts = [_peers.kept_count(7, 0.45, rng) for _ in range(4000)]
    assert set(counts) == {3, 4}
    assert sum(counts) / 4000 == pytest.approx(3.15, abs=5 * math.sqrt(0.15 * 0.85 / 4000))
    assert {_peers.kept_count(8, 0.5, rng) for _ in range(50)} == {4}


@pytest.mark.parametrize("name", _peers.PEERS)
def test_every_peer_calls_the_branch_with_its_own_rows_only(name):
    seen = []

    def branch(v):
        seen.append(v.shape[0])
        return v

    rng = random.Random(1)
    for _ in range(60):
        _peers.PEERS[name](torch.ones(8, 3), torch.zeros(8, 3), branch, 0.5, rng)
    masks, batch = ("timm DropPath", "torchvision batch"), "hand: skip (batch)"
    assert set(seen) == ({8} if name in (*masks, batch) else {4})
    assert len(seen) < 60 if name == batch else len(seen) == 60


@pytest.mark.parametrize("build", [partial(CifarResNet, 14), partial(SmallViT, width=12, depth=3)])
def test_a_form_is_attached_to_every_sum_in_the_order_of_the_sites(build):
    model, x = build(), torch.randn(2, 3, 32, 32)
    rates = [1 - 0.1 * i for i in range(len(fallow.sites(model, x)))]
    seen = []

    def form(x, shortcut, branch, rate, rng):
        seen.append(rate)
        return shortcut + branch(x)

    plain = model.eval()(x)
    torch.testing.assert_close(_peers.attach(model, form, rates)(x), plain)
    assert seen == rates[1:]  # a rate of 1 is the sum itself


@pytest.mark.parametrize("count", [2, 4])
def test_another_number_of_rates_than_sums_is_refused(count):
    with pytest.raises(ValueError, match=f"{count} rates for a model with 3 residual sums"):
        _peers.attach(CifarResNet(8), _peers.window, [0.5] * count)


def test_without_its_branches_a_model_is_its_shortcuts():
    model, x = CifarResNet(8).eval(), torch.randn(2, 3, 8, 8)
    bare = model.stem(x)
    for group in (model.group1, model.group2, model.group3):
        bare = torch.relu(group[0].shortcut(bare))
    torch.testing.assert_close(_peers.without(model, [True] * 3)(x), model.head(bare.mean((2, 3))))


def test_the_interval_of_a_median_follows_the_binomial():
    # For odd n the bootstrap median is at most the k-th value with probability P(Binomial(n, k/n) > n/2).
    values = [random.Random(3).gauss(1, 0.1) for _ in range(31)]
    random.Random(4).shuffle(values)
    got = _timing.median_interval(values, draws=20000)

    def quantile(q):
        for k, value in enumerate(sorted(values), start=1):
            if sum(math.comb(31, j) * (k / 31) ** j * (1 - k / 31) ** (31 - j) for j in range(16, 32)) >= q:
                return value

    assert got.median == sorted(values)[15]
    assert (got.low, got.high) == (quantile(0.025), quantile(0.975))


def test_an_interval_of_equal_values_is_that_value_and_of_broken_ones_refused():
    assert _timing.median_interval([0.7] * 5) == _timing.Interval(0.7, 0.7, 0.7)
    for bad in ([], [1.0, math.nan]):
        with pytest.raises(ValueError, match="finite"):
            _timing.median_interval(bad)


def test_arms_are_interleaved_and_each_pays_for_its_own_time():
    now, order = [0.0], []

    def arm(name, takes):
        def step():
            order.append(name)
            now[0] += takes

        return step

    after = []
    clocks = (lambda: now[0], lambda: 2 * now[0])
    arms = {"a": arm("a", 1.0), "b": arm("b", 3.0)}
    times = _timing.interleave(
        arms, 8, warmup=2, seed=0, clocks=clocks, after=lambda n, t: after.append((n, t))
    )
    assert len(order) == 20 and all({order[i], order[i + 1]} == {"a", "b"} for i in range(0, 20, 2))
    assert len({tuple(order[i : i + 2]) for i in range(0, 20, 2)}) == 2
    assert times["a"].cpu == [1.0] * 8 and times["b"].wall == [6.0] * 8
    assert sorted(after) == [(n, t) for n in "ab" for t in range(8)]
    assert _timing.ratios(times["b"].cpu, times["a"].cpu) == [3.0] * 8


def test_the_peak_is_the_highest_running_sum():
    assert _timing.highest_sum([4, 4, -4, 6, -10]) == 10
    assert _timing.highest_sum([-4, 2]) == 0


def test_memory_of_a_step_counts_what_is_alive_at_once():
    mega = 1 << 20

    def step():
        for _ in range(3):
            a = torch.empty(2 * mega, dtype=torch.uint8)
            b = torch.empty(3 * mega, dtype=torch.uint8)
            del a, b

    assert 5 * mega <= _timing.step_memory(step) < 5.1 * mega
    x = torch.empty(10)
    assert _timing.held([x, x, torch.empty(5)]) == 60


def test_the_plain_table_is_aligned():
    lines = _timing.plain_table(
        "title", ("arm", "time"), [["constant depth", "1"], ["b", "0.75"]]
    ).splitlines()
    assert lines[0] == "title" and len({len(line) for line in lines[1:]}) == 1


def test_sites_of_one_kind_are_measured_together():
    sites, rates, ideal = rates_of(Case("vit", "contiguous", "fp32", 4), last=0.5)
    kinds = parts(sites)
    assert {k: sum(v) for k, v in kinds.items()} == {"attention": 12, "mlp": 12}
    assert rates[-1] == 0.5 and len(rates) == 24
    assert ideal == pytest.approx(1 - sum(s.cost * (1 - p) for s, p in zip(sites, rates, strict=True)))


def test_a_bound_holds_if_the_lower_end_is_at_most_it():
    def row(median, low, memory):
        return {"cpu": {"median": median, "low": low, "high": 1.1}, "memory": memory}

    rows = dict.fromkeys((*skip.APPLIED, BASE), row(0.80, 0.75, 0.9)) | {OVERHEAD: row(1.02, 1.01, 1.0)}
    found = {
        (c["arm"], c["what"]): c for c in skip.checks(rows, {"flops": 0.70, "time": 0.75, "memory": 0.85})
    }
    time = found[ROW, "cpu"]
    assert time["bound"] == pytest.approx(0.73) and not time["holds"]
    assert time["measured_bound"] == pytest.approx(0.78) and time["measured_holds"]
    assert not found[ROW, "memory"]["holds"] and found[ROW, "memory"]["measured_holds"]
    assert found[OVERHEAD, "cpu"]["holds"]


def test_the_program_measures_prints_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(skip.SUBJECTS, "resnet110", (lambda: CifarResNet(14, widths=(4, 4, 8)), 8))
    file = tmp_path / "skip.json"
    words = "--subject resnet110 --layout channels_last --precision bf16"
    words += " --pairs 2 --warmup 0 --threads 1 --memory-steps 1"
    code = skip.main([*words.split(), "--json", str(file)])
    report = json.loads(file.read_text())
    (case,) = report["cases"]
    assert code == (0 if all(c["measured_holds"] for c in case["checks"]) else 1)
    assert {BASE, ROW, OVERHEAD, *_peers.PEERS, "without group1"} <= set(case["arms"])
    assert case["arms"][BASE]["cpu"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert all(len(arm["cpu_s"]) == 2 for arm in case["arms"].values())
    assert report["command"].endswith(str(file)) and report["hardware"]["threads"] == 1
    printed = capsys.readouterr().out
    assert ROW in printed and "by counted FLOPs" in printed


@pytest.mark.parametrize("words", ["--pairs 0", "--subject resnet9", "--threads 0", "--warmup -1"])
def test_bad_options_are_refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        skip.parse(words.split())
    assert stop.value.code == 2


def test_cases_are_the_combinations_asked_for():
    every = skip.cases(skip.parse([]))
    assert len(every) == 6 and {c.batch for c in every} == {128, 64}
    quick = skip.cases(skip.parse(["--quick", "--subject", "vit", "--precision", "bf16"]))
    assert [str(c) for c in quick] == ["vit, contiguous, bf16, batch 16"]

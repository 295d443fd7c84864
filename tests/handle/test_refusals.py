"""Bad input: a fallow error that names the site and the remedy, and a model that is exactly as before."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kit import HALF, Net, X, net, refused
from torch import Tensor, nn

import fallow
from fallow import models


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.2, math.nan, math.inf, True, "0.5", None, 1])
def test_rates_outside_0_to_1(rate):
    if rate == 1 and rate is not True:
        assert fallow.apply(Net(), {"blocks.2": 1}, example=X).rates["blocks.2"] == 1
        return
    refused(
        fallow.RateError,
        r"blocks\.2.*must be in \(0, 1\], got " + re.escape(repr(rate)),
        rates={"blocks.2": rate},
    )
    _, handle = net()
    before = handle.rates
    with pytest.raises(fallow.RateError, match="must be in"):
        handle.set_rates({"blocks.1": 0.4, "blocks.2": rate})
    assert handle.rates == before


def test_unknown_site_names_with_the_nearest():
    refused(fallow.SiteError, r"blocks\.O: no such site; did you mean blocks\.\d", rates={"blocks.O": 0.5})
    refused(fallow.SiteError, r"block\.1.*blocks\.1", rates=fallow.rates.explicit({"block.1": 0.5}))
    _, handle = net()
    with pytest.raises(fallow.SiteError, match=r"blocks\.9.*blocks\."):
        handle.set_rates({"blocks.9": 0.5})
    assert handle.rates["blocks.0"] == 0.5
    for which in ("include", "exclude"):
        refused(fallow.SiteError, r"blokcs\.0.*did you mean 'blocks\.0'", **{which: "blokcs.0"})


@pytest.mark.parametrize(
    ("keyword", "value", "words"),
    [
        ("drop_prob", 0.1, r"drop_prob=0\.1.*0\.9"),
        ("drop_path_rate", 0.2, r"drop_path_rate=0\.2.*0\.8"),
        ("survival_prob", 0.7, r"survival_prob=0\.7.*0\.7"),
        ("p", 0.1, r"p=0\.1.*0\.1 if it is the share kept.*0\.9 if it is the share dropped"),
        ("modes", "row", "modes.*did you mean mode"),
        ("sample", "exact", "sample.*did you mean sampler"),
        ("nonsense", 1, "does not take nonsense"),
    ],
)
def test_keywords_of_other_libraries(keyword, value, words):
    refused(fallow.ArgumentError, words, **{keyword: value})


def test_what_is_missing():
    refused(fallow.ArgumentError, r"needs example.*example=x", example=None)
    refused(fallow.ArgumentError, r"needs rates.*uniform\(0\.8\)", rates=None)


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("mode", "rows", '"batch" or "row"'),
        ("mode", None, '"batch" or "row"'),
        ("sampler", "Exact", '"bernoulli" or "exact"'),
        ("scale", True, '"train" or "eval"'),
        ("grads", "None", '"none" or "zero"'),
        ("ranks", "all", '"same" or "independent"'),
        ("rows", "strided", '"window" or "scattered"'),
        ("granularity", "blocks", '"branch" or "block"'),
    ],
)
def test_words_that_are_not_among_the_choices(option, value, allowed):
    text = refused(fallow.UsageError, f"{option} must be {allowed}, got ", **{option: value})
    assert str(value) in text


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)),
        lambda: nn.Identity(),
        lambda: nn.Linear(4, 4),
    ],
)
def test_a_model_without_residual_sites(make: Callable[[], nn.Module]):
    refused(fallow.SiteError, r"no residual site.*x \+ f\(x\)", make())
    assert fallow.sites(make(), X) == []


def test_what_is_not_a_model():
    refused(fallow.ArgumentError, r"model must be a torch\.nn\.Module, got function", lambda x: x)
    refused(fallow.ArgumentError, r"model must be a torch\.nn\.Module, got type", Net)


@pytest.mark.parametrize(
    ("example", "error", "words"),
    [
        (torch.randn(2, 5), fallow.SiteError, "cannot run the example.*RuntimeError.*example="),
        (torch.zeros(2, 4, dtype=torch.int64), fallow.SiteError, "cannot run the example.*example="),
        ((X, X), fallow.SiteError, "cannot run the example.*TypeError"),
        ({"y": X}, fallow.SiteError, "cannot run the example.*TypeError"),
        ("x", fallow.ArgumentError, "example must be a tensor, a tuple.*or a dict.*got str"),
        (7, fallow.ArgumentError, "example must be.*got int"),
        ((), fallow.ArgumentError, "no tensor with a batch dimension"),
        (torch.tensor(1.0), fallow.ArgumentError, "no tensor with a batch dimension"),
    ],
    ids=["shape", "type", "too many", "keyword", "str", "int", "empty", "scalar"],
)
def test_an_example_the_model_cannot_run(example, error, words):
    refused(error, words, example=example)


def test_a_model_that_fails_on_its_own():
    class Broken(Net):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise KeyError("targets")
            return super().forward(x)

    refused(fallow.SiteError, "cannot run the example.*training mode.*KeyError.*targets", Broken())


@pytest.mark.parametrize("rule", [fallow.rates.uniform, fallow.rates.linear])
def test_a_budget_that_cannot_be(rule):
    model = models.CifarResNet(8, channels=1, widths=(4, 4, 8))
    example = torch.randn(2, 1, 8, 8)
    text = refused(fallow.RateError, "budget", model, rule(budget=0.01), example=example)
    smallest = max(float(number) for number in re.findall(r"\d*\.\d+", text) if float(number) < 1)
    with pytest.raises(fallow.RateError):
        fallow.apply(model, rule(budget=smallest - 0.02), example=example)
    handle = fallow.apply(model, rule(budget=smallest + 0.02), example=example)
    assert handle.expected_cost == pytest.approx(smallest + 0.02), "the budget named as feasible is"


def test_data_parallel():
    refused(fallow.UsageError, "DataParallel.*DistributedDataParallel.*model inside", nn.DataParallel(Net()))
    model, handle = net()
    model._is_replica = True  # as DataParallel marks its copies
    with pytest.raises(fallow.FallowError, match="DataParallel.*DistributedDataParallel"):
        model(X)
    del model._is_replica
    model(X)
    assert handle.draw == 1


def test_a_spent_handle():
    model, handle = net(scale="eval")
    handle.remove()
    for use in (
        lambda: handle.set_rates(HALF),
        lambda: handle.recalibrate([X]),
        lambda: handle.load_state_dict(handle.state_dict()),
        handle.fold,
    ):
        with pytest.raises(fallow.RunError, match=r"spent.*fallow\.apply"):
            use()
    model, handle = net(scale="eval")
    handle.fold()
    assert fallow.handle_of(model) is None
    with pytest.raises(fallow.RunError, match="spent"):
        handle.set_rates(HALF)


def test_fold_of_the_wrong_scale():
    _, handle = net()
    with pytest.raises(fallow.UsageError, match=r'fold is for scale="eval".*remove\(\)'):
        handle.fold()
    handle.set_rates(HALF)


def test_a_state_with_fields_missing():
    _, handle = net()
    for field in ("rates", "schedule", "draw", "seed"):
        state = handle.state_dict()
        del state[field]
        with pytest.raises(fallow.UsageError, match=rf"lacks {field}; .*state_dict\(\)"):
            handle.load_state_dict(state)


def test_a_state_of_other_sites():
    _, handle = net()
    with pytest.raises(fallow.SiteError, match=r"layers\.0"):
        handle.load_state_dict({**handle.state_dict(), "rates": {"layers.0": 0.5}})
    assert handle.rates["blocks.0"] == 0.5


class Normed(nn.Module):
    """BatchNorm over the rows alone."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


@pytest.mark.parametrize(
    ("rate", "rows", "right"),
    [(0.5, 4, True), (0.5, 3, False), (0.4, 5, True), (0.4, 4, False), (0.99, 2, False)],
)
@pytest.mark.parametrize("layout", ["window", "scattered"])
def test_too_few_values_for_batch_norm(rate, rows, right, layout):
    model = nn.Sequential(Normed(), Normed())
    rule = fallow.rates.uniform(rate)
    options: dict[str, Any] = {"mode": "row", "sampler": "exact", "rows": layout}
    handle = fallow.apply(model, rule, example=torch.randn(8, 4), **options)
    model(torch.randn(64, 4))
    if right:
        for _ in range(20):
            model(torch.randn(rows, 4)).sum().backward()
        return
    remedy = f"0: at batch size {rows} and survival rate {rate:g}.*BatchNorm.*larger batch or a higher rate"
    with pytest.raises(fallow.RateError, match=remedy):  # at once, not when chance keeps too few
        model(torch.randn(rows, 4))
    handle.set_rates(fallow.rates.uniform(1.0))
    model(torch.randn(rows, 4))


def test_too_few_values_for_batch_norm_after_the_rates_changed():
    model = nn.Sequential(Normed(), Normed())
    handle = fallow.apply(
        model, fallow.rates.uniform(0.9), example=torch.randn(8, 4), mode="row", sampler="exact"
    )
    model(torch.randn(4, 4))
    handle.set_rates(fallow.rates.uniform(0.3))
    with pytest.raises(fallow.RateError, match=r"batch size 4 and survival rate 0\.3"):
        model(torch.randn(4, 4))


def test_batch_norm_with_many_values_a_row_and_in_eval_mode_is_no_concern():
    model = models.CifarResNet(8, channels=1, widths=(4, 4, 8))
    fallow.apply(
        model, fallow.rates.uniform(0.1), example=torch.randn(2, 1, 8, 8), mode="row", sampler="exact"
    )
    for _ in range(10):
        model(torch.randn(1, 1, 8, 8))
    model = nn.Sequential(Normed(), Normed())
    fallow.apply(model, HALF, example=torch.randn(8, 4), mode="row")
    for block in model:
        block.branch[1].eval()
    for _ in range(10):
        model(torch.randn(2, 4))


def test_a_compiled_model_is_refused_before_and_after_apply(monkeypatch):
    for compiled in (torch.compile(Net(), backend="eager"), Net()):
        if isinstance(compiled, Net):
            compiled.compile(backend="eager")
        with pytest.raises(fallow.UsageError, match="compiled"):
            fallow.apply(compiled, HALF, example=torch.randn(2, 4))
    model, _ = net()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # as while a graph is made
    with pytest.raises(fallow.UsageError, match=r"torch\.compile of an applied model is not supported yet"):
        model(torch.randn(2, 4))


@pytest.mark.parametrize(
    ("field", "value"),
    [("stats", 3), ("stats", {"blocks.0": 3}), ("clock", "x"), ("time", "x"), ("time", -3), ("draw", 1.5)],
)
def test_a_damaged_state_is_refused_and_changes_nothing(field, value):
    model, handle = net()
    model(torch.randn(2, 4))
    state = handle.state_dict()
    with pytest.raises(fallow.UsageError, match=field):
        handle.load_state_dict({**state, "seed": 5, field: value})
    assert handle.state_dict() == state


def test_running_sensitivities_refuse_what_is_no_state_of_theirs():
    _, handle = net()
    with pytest.raises(fallow.UsageError, match="decay"):
        fallow.planning.RunningSensitivities(handle, decay="fast")  # pyright: ignore[reportArgumentType]
    running = fallow.planning.RunningSensitivities(handle)
    for state in ({}, 3, {"seen": {}, "sums": {}}):
        with pytest.raises(fallow.UsageError, match="state_dict"):
            running.load_state_dict(state)  # pyright: ignore[reportArgumentType]

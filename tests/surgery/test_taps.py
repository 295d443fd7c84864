"""Trying a model branch by branch: decisions reach the right branch, and nothing of them stays."""

from __future__ import annotations

import copy

import laws
import pytest
import torch
from cases import POSITIVE
from casework import Case
from torch import Tensor, nn

import fallow
from fallow.errors import ArgumentError, RunError, SiteError, UsageError
from fallow.surgery.branch import Run
from fallow.surgery.tap import gated, inputs_only, seed_of_graph, tapped

CASES = [case for case in POSITIVE if not case.big]
BY_NAME = {case.name: case for case in CASES}
EVERY = pytest.mark.parametrize("case", CASES, ids=str)


def opened(case: Case, rows: int = 4):
    """The model in eval mode in double precision, a dense copy of it, and inputs."""
    model, dense = laws.pair(case)
    return model.eval(), dense.eval(), laws.cast(case.feed(rows), torch.float64)


def assert_outputs(got, wanted) -> None:
    for i, (a, b) in enumerate(zip(laws.floats(got), laws.floats(wanted), strict=True)):
        laws.assert_close(a, b, 1e-10, f"output {i}")


@EVERY
def test_numbers_gate_the_branch_they_are_given_for(case: Case):
    """None and 1 leave it alone, 0 rests it, others scale it."""
    model, dense, feed = opened(case)
    numbers = dict(zip((s.site for s in case.sums), (0.0, 1.0, 0.3, 0.0, -2.0, 0.5) * 9, strict=False))
    masks = {n: torch.tensor(g != 0) for n, g in numbers.items()}
    with tapped(model, feed) as taps, torch.no_grad():
        assert [s.name for s in taps.sites] == [s.site for s in case.sums]
        assert_outputs(taps.forward(laws.cast(feed)), laws.call(dense, laws.cast(feed)))
        got = taps.forward(laws.cast(feed), lambda branch: gated(branch, numbers[branch.site]))
        assert_outputs(got, laws.dense_run(dense, case, laws.cast(feed), masks, numbers))
        assert taps.costs == {s.name: s.cost for s in taps.sites}


@EVERY
def test_a_tensor_gates_row_by_row(case: Case):
    model, dense, feed = opened(case)
    gate = torch.tensor([1.0, 0.0, 1.0, 0.0])
    masks = {s.site: gate.bool() for s in case.sums}
    with tapped(model, feed) as taps, torch.no_grad():
        if any(branch.dim is None for branch in taps.branches):
            pytest.skip("its rows cannot be told apart")
        got = taps.forward(laws.cast(feed), lambda branch: gated(branch, gate))
        assert_outputs(got, laws.dense_run(dense, case, laws.cast(feed), masks, {}))


@EVERY
def test_a_watch_sees_every_part_of_the_sum_and_its_gradient(case: Case):
    """``out = shortcut + scale * value``; its hook gets the gradient also where it is written into later."""
    model, _, feed = opened(case)
    seen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    grads: dict[str, Tensor] = {}

    def watch(run: Run, shortcut: Tensor, value: Tensor | None, out: Tensor) -> None:
        name = run.branch.name
        seen[name] = shortcut.detach().clone(), value.detach().clone(), out.detach().clone()
        out.register_hook(lambda grad: grads.__setitem__(name, grad.clone()))

    def decide(branch) -> Run:
        return Run(branch, 0.5, None, False, watch=watch, gate=lambda _, z: z * start)

    start = seed_of_graph(torch.device("cpu"))
    with tapped(model, feed) as taps, inputs_only(model):
        assert not any(p.requires_grad for p in model.parameters())
        laws.backward(taps.forward(laws.cast(feed), decide))
        assert list(seen) == [b.name for b in taps.branches] and set(grads) == set(seen)
    in_place = case.name.startswith(("in place on the shortcut", "add_"))
    for name, (shortcut, value, out) in seen.items():
        expected = shortcut if in_place else shortcut + 0.5 * value  # written into before it is seen
        torch.testing.assert_close(out, expected)
        assert grads[name].shape == out.shape
    assert start.grad is not None and all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_what_is_not_asked_for_runs_as_if_untouched():
    case = BY_NAME["vit_small"]
    model, dense, feed = opened(case)
    asked = []
    with tapped(model, feed, include="*.mlp", exclude="blocks.0.*") as taps, torch.no_grad():
        taps.forward(feed, lambda branch: asked.append(branch.name))
        assert asked == [s.name for s in taps.sites] == ["blocks.1.mlp", "blocks.2.mlp"]
        got = taps.forward(feed, lambda branch: gated(branch, 0))
    masks = {n: torch.tensor(False) for n in asked}
    assert_outputs(got, laws.dense_run(dense, case, feed, masks, {}))


def test_an_applied_model_is_tried_through_its_handle():
    """The full network whatever its rates and scale; draws and gates are as before, also after an error."""
    case = BY_NAME["resnet20"]
    model, dense, feed = opened(case)
    handle = fallow.apply(model, {"group1.0": 0.3}, example=feed, scale="eval")
    model.train()(*feed)
    masks, draw, classes = handle.masks(), handle.draw, [type(m) for m in model.modules()]
    with tapped(model, feed, include="group[12].*") as taps, torch.no_grad():
        assert [s.name for s in taps.sites] == [s.site for s in case.sums if s.site < "group3"]
        state = {k: v for k, v in model.state_dict().items() if "num_batches" not in k}
        dense.load_state_dict(state, strict=False)
        assert_outputs(taps.forward(feed), dense(*feed))
        with pytest.raises(RunError, match="probed already"), handle.deciding(lambda *_: None):
            taps.forward(feed)
    with pytest.raises(KeyError), tapped(model, feed):
        raise KeyError
    assert handle.draw == draw and handle.masks() == masks and fallow.handle_of(model) is handle
    assert [type(m) for m in model.modules()] == classes and model.training


def test_what_surrounds_an_applied_model_is_run_with_it():
    torch.manual_seed(0)
    inner, x = BY_NAME["residual written in the root"].model(), torch.randn(3, 6)
    fallow.apply(inner, fallow.rates.uniform(0.5), example=x)
    around, average = nn.Sequential(inner, nn.Linear(3, 2)), torch.optim.swa_utils.AveragedModel(inner)
    for model in (around, average):
        with torch.no_grad(), tapped(model, x) as taps:
            torch.testing.assert_close(taps.forward(x), model.eval()(x))


def test_a_model_without_a_handle_is_left_without_one():
    case = BY_NAME["two branches"]
    model, _, feed = opened(case)
    before = copy.deepcopy(model.state_dict())
    for error in (None, KeyError):
        try:
            with tapped(model, feed):
                if error is not None:
                    raise error
        except KeyError:
            pass
        assert fallow.handle_of(model) is None
        assert not any(key.startswith("_fallow") for m in model.modules() for key in m.__dict__)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("model", "options", "error", "words"),
    [
        (nn.Linear(6, 6), {}, SiteError, "no residual site"),
        ("resnet", {}, ArgumentError, "model must be a torch.nn.Module, got str"),
        (None, {"include": "firts"}, SiteError, "did you mean 'first'"),
        (None, {"granularity": "layers"}, UsageError, "granularity must be"),
        (None, {"exclude": "*"}, SiteError, "no residual site"),
    ],
)
@pytest.mark.parametrize("applied", [False, True])
def test_what_cannot_be_opened_is_said(model, options, error, words, applied: bool):
    x = torch.randn(2, 6)
    if model is None:
        model = BY_NAME["residual written in the root"].model()
        if applied:
            fallow.apply(model, fallow.rates.uniform(0.5), example=x)
    with pytest.raises(error, match=words), tapped(model, x, **options):
        pass


def test_observing_shows_each_branch_that_runs_in_training_and_its_draw():
    model, _, feed = opened(BY_NAME["resnet20"])
    handle = fallow.apply(model, {"group1.0": 0.5, "group3.2": 0.4}, example=feed, seed=2)
    shown: list[tuple[str, int]] = []
    handle.observe(lambda run, draw: shown.append((run.branch.site, draw.index)))
    model.eval()(*feed)
    assert not shown
    for index in range(6):
        model.train()(*feed)
        kept = [n for n, mask in handle.masks().items() if bool(mask)]
        assert shown == [(n, index) for n in kept]
        shown.clear()
    handle.observe(None)
    model(*feed)
    assert not shown
    handle.remove()
    with pytest.raises(RunError, match="spent"):
        handle.observe(None)

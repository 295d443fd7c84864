"""A branch that rests is not executed, forward or backward; in row mode it runs on the kept rows alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import laws
import pytest
import torch
from cases import POSITIVE, Case
from torch import Tensor, nn

import fallow
from fallow.surgery import Site

BY_NAME = {case.name: case for case in POSITIVE}
MANY = [case for case in POSITIVE if not case.big or case.name in ("timm resnet18", "HF BertModel")]


class Watch:
    """Counts calls by hooks and by a patched forward, and nodes of weights in the backward."""

    def __init__(self, model: nn.Module) -> None:
        self.hooked, self.forwards = Counter(), Counter()
        self.rows: dict[str, set[int]] = {}
        for name, module in model.named_modules():
            module.register_forward_hook(lambda m, a, out, name=name: self.hooked.update([name]))
            module.forward = self.patched(name, module.forward)

    def patched(self, name: str, forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.forwards[name] += 1
            if args and isinstance(args[0], Tensor):
                self.rows.setdefault(name, set()).add(tuple(args[0].shape))
            return forward(*args, **kwargs)

        return run

    def clear(self) -> None:
        self.hooked.clear(), self.forwards.clear(), self.rows.clear()


def inside(model: nn.Module, site: Site) -> list[str]:
    """The site's modules and all below them."""
    return [
        f"{top}.{n}".rstrip(".") for top in site.modules for n, _ in model.get_submodule(top).named_modules()
    ]


@pytest.mark.parametrize("case", MANY, ids=str)
def test_no_module_of_a_resting_branch_is_called(case: Case) -> None:
    model, feed = case.model(), case.feed(3)
    handle = fallow.apply(model, fallow.rates.uniform(0.5), example=feed, seed=5)
    watch = Watch(model)
    outcomes = set()
    for _ in range(6):
        watch.clear()
        model.zero_grad()
        laws.backward(laws.call(model, laws.cast(feed, requires_grad=True)))
        for site in handle.sites:
            kept = bool(handle.masks()[site.name])
            outcomes.add(kept)
            names = inside(model, site)
            calls = [watch.forwards[n] for n in site.modules], [watch.hooked[n] for n in site.modules]
            assert calls == ([int(kept)] * len(site.modules),) * 2, site.name
            if not kept:
                assert not any(watch.forwards[n] or watch.hooked[n] for n in names)
                own = [p.grad for n in site.modules for p in model.get_submodule(n).parameters()]
                assert all(g is None for g in own), f"{site.name}: backward ran"
    assert outcomes == {True, False}


@pytest.mark.parametrize("case", MANY, ids=str)
def test_the_modules_of_a_branch_hold_its_weighted_work(case: Case) -> None:
    model = case.model()
    for site in fallow.sites(model, case.feed(2)):
        assert any(p.requires_grad for n in site.modules for p in model.get_submodule(n).parameters())


@pytest.mark.parametrize("rows", ["window", "scattered"])
@pytest.mark.parametrize(
    "name",
    [
        "resnet20",
        "vit_small",
        "two branches",
        "in place on the branch",
        "TransformerEncoderLayer, batch second",
    ],
)
def test_branch_modules_see_exactly_the_kept_rows(name: str, rows: str) -> None:
    case = BY_NAME[name]
    model, total = case.model(), 7  # no other dimension is 7
    handle = fallow.apply(
        model, fallow.rates.uniform(0.5), example=case.feed(2), mode="row", sampler="exact", rows=rows
    )
    watch = Watch(model)
    for _ in range(3):
        watch.clear()
        laws.backward(laws.call(model, laws.cast(case.feed(total), requires_grad=True)))
        for site, table in zip(handle.sites, case.sums, strict=True):
            kept = int(handle.masks()[site.name].sum())
            assert kept in (3, 4)
            for module in site.modules:
                (shape,) = watch.rows[module]
                assert shape[table.dim] == kept and total not in shape, module


def test_no_gate_and_no_work_at_rate_one() -> None:
    case = BY_NAME["two branches"]
    model, feed = case.model(), case.feed(3)
    classes = [type(m) for m in model.modules()]
    dense = laws.call(case.model(), feed)
    handle = fallow.apply(model, {"0.mix": 0.5}, example=feed)
    gated = {name for name, m in model.named_modules() if "_fallow_gate" in m.__dict__}
    assert gated == set(handle.sites[0].modules)
    handle.set_rates(fallow.rates.uniform(1.0))
    assert classes == [type(m) for m in model.modules()]
    assert torch.equal(laws.call(model, feed), dense)
    handle.set_rates(fallow.rates.uniform(0.5))
    assert all("_fallow_gate" in model.get_submodule(n).__dict__ for s in handle.sites for n in s.modules)
    handle.remove()
    assert classes == [type(m) for m in model.modules()]


def test_gated_modules_keep_name_class_and_keys() -> None:
    case = BY_NAME["resnet20"]
    model = case.model()
    keys, kinds = list(model.state_dict()), [type(m).__name__ for m in model.modules()]
    bases = [type(m) for m in model.modules()]
    fallow.apply(model, fallow.rates.uniform(0.5), example=case.feed(2))
    assert keys == list(model.state_dict()) and kinds == [type(m).__name__ for m in model.modules()]
    assert all(isinstance(m, base) for m, base in zip(model.modules(), bases, strict=True))


def test_a_block_at_rest_is_the_identity_itself() -> None:
    model = nn.Sequential(*(BY_NAME["two branches"].model() for _ in range(1)))
    x = torch.randn(3, 5, 8)
    fallow.apply(model, fallow.rates.uniform(1e-6), example=x)
    out = model(x)
    assert torch.equal(out, x) and out.data_ptr() == x.data_ptr()


def test_what_is_written_into_after_a_rest_is_not_the_input() -> None:
    case = BY_NAME["in place on the branch"]  # relu_ writes into the sum
    model, (x,) = case.model(), case.feed(3)
    before = x.clone()
    fallow.apply(model, fallow.rates.uniform(1e-6), example=x)
    assert torch.equal(model(x), before.relu())
    assert torch.equal(x, before)

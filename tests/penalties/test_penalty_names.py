"""The registry: every name makes its penalty, and what it does not know it says."""

from __future__ import annotations

import inspect

import pytest
import torch

from fallow.errors import ArgumentError, UsageError
from fallow.penalties import NAMES, LogSum, Separable, penalty

REQUIRED = {
    "hardthreshold": {"k": 2},
    "targeted": {"k": 2, "survival_rate": 0.5},
    "targetedthreshold": {"threshold": 0.5, "survival_rate": 0.5},
    "vectorard": {"inputs": torch.eye(4)},
    "ksupport": {"k": 2},
}


@pytest.mark.parametrize("name", NAMES)
def test_every_name_makes_a_penalty_of_the_common_shape(name: str):
    made = penalty(name, **REQUIRED.get(name, {}))
    assert isinstance(made, NAMES[name].make)  # pyright: ignore
    assert isinstance(made, Separable) == NAMES[name].separable
    w = torch.tensor([0.5, -1.0, 0.0, 2.0])
    for method in ("value", "total", "gradient", "eta"):
        assert isinstance(getattr(made, method)(w), torch.Tensor)
    assert made.prox(w, 0.1).shape == w.shape
    rates = made.survival_rate(w, 0.5)
    assert bool(((rates >= 0) & (rates <= 1)).all())
    assert made.dual(made.eta(w)).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_every_name_has_words_and_says_what_it_needs(name: str):
    entry = NAMES[name]
    assert name == name.lower() and entry.words and "\n" not in entry.words
    needed = {p for p, default in entry.parameters.items() if default is inspect.Parameter.empty}
    assert needed == set(REQUIRED.get(name, {}))
    if needed:
        with pytest.raises(ArgumentError, match=f"{name} needs "):
            penalty(name)


def test_case_hyphens_and_underscores_do_not_matter():
    assert penalty("Log-Sum", eps=0.1) == penalty("log_sum", eps=0.1) == LogSum(0.1)


def test_what_is_unknown_is_named_with_the_nearest():
    with pytest.raises(UsageError, match='no penalty is called "logsun"; did you mean "logsum"'):
        penalty("logsun")
    with pytest.raises(UsageError, match='no penalty is called "qqq"; the names are logsum, log2sum'):
        penalty("qqq")
    with pytest.raises(ArgumentError, match="logsum has no parameter epsi; did you mean eps"):
        penalty("logsum", epsi=1.0)
    with pytest.raises(ArgumentError, match="welsch has no parameter eps; it takes none"):
        penalty("welsch", eps=1.0)


def test_the_names_cannot_be_changed():
    with pytest.raises(TypeError):
        NAMES["logsum"] = NAMES["mcp"]  # pyright: ignore

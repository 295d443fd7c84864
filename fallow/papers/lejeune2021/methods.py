"""The seven methods of `lejeune2021` and what stands beside them, as one thing that is trained.

Nothing here makes weights sparse itself: penalties, learned rates, targets and noise are those of
`fallow.sparsity` and `fallow.noise`. What is here is which of them, with which settings, a method is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from fallow.papers.lejeune2021.penalised import STRENGTH, FaultyLogSum, Learned, Multiplied, Penalised
from fallow.papers.lejeune2021.trainee import Plan, Trainee
from fallow.papers.lejeune2021.variational import Scheduled, Variational
from fallow.penalties import LogSum

EPS = 2.0  # of LogSum, in all methods of the case study


@dataclass(frozen=True)
class Method:
    """One curve of the figure.

    Attributes:
        title: in plots and tables.
        learning_rate: Adam's at the start, on MNIST.
        make: the network and the plan -> what is trained.
    """

    title: str
    learning_rate: float
    make: Callable[[nn.Module, Plan], Trainee]


def _logsum(plan: Plan) -> LogSum:
    return LogSum(eps=plan.settings.get("eps", EPS))


METHODS: dict[str, Method] = {
    "vardrop-lr-ar": Method(
        "VarDrop+LR+AR", 1e-4, lambda model, plan: Variational(model, plan, "additive", "activations")
    ),
    "vardrop-lr": Method(
        "VarDrop+LR", 1e-3, lambda model, plan: Variational(model, plan, "multiplicative", "activations")
    ),
    "vardrop": Method(
        "VarDrop", 1e-3, lambda model, plan: Variational(model, plan, "multiplicative", "weights")
    ),
    "eta-trick": Method("eta-Trick", 1e-3, lambda model, plan: Penalised(model, plan, _logsum(plan), "eta")),
    "eta-trick-published": Method(
        "eta-Trick, as published",
        1e-3,
        lambda model, plan: Penalised(model, plan, FaultyLogSum(EPS, STRENGTH), "eta"),
    ),
    "adaprox": Method("AdaProx", 1e-4, lambda model, plan: Multiplied(model, plan, _logsum(plan), "adaprox")),
    "adatikhonov": Method(
        "AdaTikhonov", 1e-4, lambda model, plan: Penalised(model, plan, _logsum(plan), "tikhonov")
    ),
    "logsum": Method("LogSum", 1e-4, lambda model, plan: Penalised(model, plan, _logsum(plan))),
    "sparse-vd": Method("Sparse VD", 1e-3, Scheduled),
    "magnitude": Method("Gradual magnitude", 1e-3, lambda model, plan: Penalised(model, plan, "magnitude")),
    "logsum-target": Method(
        "LogSum to a target", 1e-3, lambda model, plan: Penalised(model, plan, _logsum(plan))
    ),
    "vardrop-target": Method("VarDrop to a target", 1e-3, Learned),
}

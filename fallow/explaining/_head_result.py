"""What `explain_head` returns: the penalty of noise in front of the head, and its distance to the optimum."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fallow._version import __version__
from fallow.explaining._shared import SCHEMA, with_error
from fallow.jsonable import finite

_LEADING, _LONG = 6, 80  # singular values and letters of a scheme in the table


@dataclass(frozen=True)
class HeadOptimum:
    """A head under squared loss beside the global minimum of what it is trained on, on these samples.

    Attributes:
        objective: loss and penalty of the head.
        bound: what no network's objective can be below, by weak duality at this head; for laws that penalise
            as disjoint blocks do.
        minimum: the least value in closed form; no network can be below, and those of a width from
            ``reachable_width`` on reach it where their features can be anything.
        best_head: the least value with the features as they are, by the head alone; None: too wide for it.
        gamma: weight of the squared spectral norm.
        beta: weight of the squared Frobenius norm beside it.
        block_size: r, in features.
        width: d.
        reachable_width: a width that reaches the minimum.
        head: how many singular values of the targets the minimiser only divides.
        kept: how many it keeps.
        threshold: what the others lose.
        spectrum: singular values of the predictions, without the bias.
        optimal_spectrum: those of the minimiser's.
        linear: whether the features are linear in the inputs, and the minimum that of linear networks.
    """

    objective: float
    bound: float | None
    minimum: float
    best_head: float | None
    gamma: float
    beta: float
    block_size: int
    width: int
    reachable_width: int
    head: int
    kept: int
    threshold: float
    spectrum: tuple[float, ...]
    optimal_spectrum: tuple[float, ...]
    linear: bool

    @property
    def above(self) -> float | None:
        """How far above the global minimum the objective is at most, as a share of it; None if it is 0."""
        return max(self.objective / self.minimum - 1, 0.0) if self.minimum > 0 else None


@dataclass(frozen=True)
class HeadExplanation:
    """What noise in front of a last linear layer penalises; made by `explain_head`, prints as a table.

    Attributes:
        name: the head's.
        scheme: the law of the masks.
        source: where that was found.
        loss_kind: "quadratic", "cross_entropy" or "other".
        width: features.
        outputs: of the head.
        samples: how many it was measured on.
        draws: of masks.
        loss: without the noise.
        exact: penalty, for a quadratic loss.
        quadratic: its second-order form, for cross-entropy.
        jensen: a bound of it, for cross-entropy.
        monte_carlo: E loss(masked head) - loss.
        monte_carlo_error: its standard error over the draws.
        share: penalty (the exact one where there is one, else by Monte Carlo) over loss and penalty.
        kappa: least weight of the predictions' square (`fallow.penalties.kappa`); None: too wide for it.
        effective_rank: nuclear over spectral norm of the predictions without the bias.
        optimum: distance to the global minimum, for a quadratic loss and laws that have a closed form.
        notes: what to make of it.
        settings: how it was measured.
    """

    name: str
    scheme: str
    source: str
    loss_kind: str
    width: int
    outputs: int
    samples: int
    draws: int
    loss: float
    exact: float | None
    quadratic: float | None
    jensen: float | None
    monte_carlo: float
    monte_carlo_error: float
    share: float | None
    kappa: float | None
    effective_rank: float
    optimum: HeadOptimum | None
    notes: tuple[str, ...]
    settings: dict[str, Any]

    @property
    def penalty(self) -> float:
        """The exact penalty where there is one, else that by Monte Carlo."""
        return self.monte_carlo if self.exact is None else self.exact

    def as_dict(self) -> dict[str, Any]:
        """The whole as JSON takes it; numbers that are not finite become None."""
        found = asdict(self)
        if self.optimum is not None:
            found["optimum"] |= {"above": self.optimum.above}
        return finite(
            {"schema": SCHEMA, "kind": "head_explanation", **found, "provenance": {"fallow": __version__}}
        )

    def __str__(self) -> str:
        """The table."""
        kind = self.loss_kind.replace("_", "-")
        lines = [
            f"head {self.name}: {self.width} features, {self.outputs} outputs; {_short(self.scheme)}, "
            + self.source,
            f"loss without the noise: {self.loss:.6g} ({kind}, {self.samples} samples)",
        ]
        rows = [
            ("penalty, exact", self.exact, None),
            ("penalty, quadratic form", self.quadratic, None),
            ("penalty, Jensen bound", self.jensen, None),
            ("penalty, Monte Carlo", self.monte_carlo, self.monte_carlo_error),
        ]
        lines += [f"{name:<24}{with_error(v, error)}" for name, v, error in rows if v is not None]
        if self.share is not None:
            lines.append(f"{'share of the loss':<24}{100 * self.share:.3g} %")
        if self.kappa is not None:
            lines.append(f"{'kappa':<24}{self.kappa:.4g}")
        lines.append(f"{'effective rank':<24}{self.effective_rank:.4g}")
        lines += [] if self.optimum is None else self._optimum(self.optimum)
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])

    def _optimum(self, best: HeadOptimum) -> list[str]:
        lines = [
            f"{'objective':<24}{best.objective:.6g} = loss + penalty",
            f"{'global minimum':<24}{best.minimum:.6g} in closed form: the objective is "
            + _distance(best.above),
        ]
        if best.bound is not None:
            lines.append(f"{'lower bound':<24}{best.bound:.6g} by duality, from this head alone")
        if best.best_head is not None:
            lines.insert(1, f"{'least of any head':<24}{best.best_head:.6g} on these features")
        for name, values in (("singular values", best.spectrum), ("of the minimiser", best.optimal_spectrum)):
            more = " ..." if len(values) > _LEADING else ""
            lines.append(f"{name:<24}" + " ".join(f"{v:.4g}" for v in values[:_LEADING]) + more)
        return lines


def _distance(above: float | None) -> str:
    """How far above the minimum, in words."""
    if above is None:
        return "above it"
    if above < 1e-4:
        return "less than 0.01 % above it"
    return f"at most {100 * above:.3g} % above it" if above < 9 else f"at most {above + 1:.3g} times that"


def _short(text: str) -> str:
    return text if len(text) <= _LONG else f"{text[: _LONG - 4]}...)"

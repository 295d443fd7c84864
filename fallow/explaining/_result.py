"""What `fallow.explain` returns: a table of sites, totals, and what to make of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fallow._version import __version__
from fallow.explaining._head_result import HeadExplanation
from fallow.explaining._shared import SCHEMA, with_error
from fallow.jsonable import finite

TITLES = {
    "hessian": "Hessian",
    "bregman": "Bregman",
    "linearised": "linearised",
    "alone": "alone",
    "monte_carlo": "Monte Carlo",
}


@dataclass(frozen=True)
class SitePenalty:
    """The penalty of one site; a form that is not to be had is None.

    Attributes:
        name: the site.
        rate: its survival rate p.
        noise: variance of its gate, p (1 - p) for ``scale="eval"``, (1 - p)/p for "train".
        hessian: noise / 2 times zeta' H zeta, H at the mean output, zeta = y(1) - y(1_l).
        bregman: noise times the Bregman divergence of y(1_l) from y(1), for cross-entropy a KL.
        linearised: noise / 2 times the curvature along the branch at the full network.
        linearised_error: its standard error over the labels drawn; 0: summed exactly.
        alone: mean loss less loss of the mean with this site's noise alone, exact.
        monte_carlo: the same with all other sites drawn at random.
        monte_carlo_error: its standard error over the draws.
        share: monte_carlo (alone, where that was not drawn) over the mean loss under noise.
    """

    name: str
    rate: float
    noise: float
    hessian: float | None
    bregman: float
    linearised: float | None
    linearised_error: float | None
    alone: float
    monte_carlo: float | None
    monte_carlo_error: float | None
    share: float | None


@dataclass(frozen=True)
class Totals:
    """What the noise of all sites does together.

    Attributes:
        regulariser: R = E loss(Y) - loss(E Y), without the 1/K bias.
        regulariser_error: its standard error over the draws, given the samples.
        plug_in: mean loss under noise less loss at the mean output, biased by 1/draws.
        sums: form -> its sum over the sites.
        ratios: form -> sum / R.
        verdicts: form -> "holds", "off" or "undecided".
        sum_error: standard error of the Monte Carlo form's sum.
        noise_mass: sum of p (1 - p).
        noise: sum of the gates' variances; equals noise_mass for ``scale="eval"``.
        loss_full: loss of the full network.
        loss_evaluation: loss of the network at evaluation.
        loss_noisy: mean loss under the noise.
        loss_noisy_error: its standard error over the draws.
        loss_mean_output: loss at the mean output.
    """

    regulariser: float
    regulariser_error: float
    plug_in: float
    sums: dict[str, float | None]
    ratios: dict[str, float | None]
    verdicts: dict[str, str]
    sum_error: float | None
    noise_mass: float
    noise: float
    loss_full: float
    loss_evaluation: float
    loss_noisy: float
    loss_noisy_error: float
    loss_mean_output: float


@dataclass(frozen=True)
class Explanation:
    """What stochastic depth penalises, and how much; made by `fallow.explain`, prints as a table.

    Attributes:
        rows: one a site, in the order they run; none where the model has noise in front of its head alone.
        totals: of all sites.
        loss_kind: "cross_entropy", "quadratic", "linear" or "other", told by the curvature.
        scale: "train" or "eval".
        mode: whether masks were drawn for each sample ("row") or for each batch ("batch").
        samples: how many samples it was measured on.
        draws: draws of all masks.
        notes: what to make of it, in words.
        settings: how it was measured.
        head: what noise in front of the last linear layer penalises, the sites at rest; None without any.
    """

    rows: tuple[SitePenalty, ...]
    totals: Totals
    loss_kind: str
    scale: str
    mode: str
    samples: int
    draws: int
    notes: tuple[str, ...]
    settings: dict[str, Any]
    head: HeadExplanation | None = None

    def as_dict(self) -> dict[str, Any]:
        """The whole as JSON takes it; numbers that are not finite become None."""
        return {
            "schema": SCHEMA,
            "kind": "explanation",
            "loss": self.loss_kind,
            "scale": self.scale,
            "mode": self.mode,
            "samples": self.samples,
            "draws": self.draws,
            "sites": [finite(asdict(row)) for row in self.rows],
            "totals": finite(asdict(self.totals)),
            "notes": list(self.notes),
            "settings": finite(self.settings),
            "head": None if self.head is None else self.head.as_dict(),
            "provenance": {"fallow": __version__},
        }

    def __str__(self) -> str:
        """The table, and below it that of the head."""
        head = [] if self.head is None else [str(self.head)]
        if not self.rows:
            return "\n".join([*head, *(f"note: {n}" for n in self.notes)])
        return "\n".join([*self._table(), *head])

    def _table(self) -> list[str]:
        noise = "p(1-p)" if self.scale == "eval" else "(1-p)/p"
        width = max([len(r.name) for r in self.rows] + [4])
        heads = "".join(f"{TITLES[form]:>12}" for form in ("hessian", "bregman", "linearised", "alone"))
        lines = [f"{'site':<{width}}  {'rate':>6} {noise:>8}{heads}  {'Monte Carlo':>22}  share of loss %"]
        for r in self.rows:
            forms = "".join(f"{_number(v):>12}" for v in (r.hessian, r.bregman, r.linearised, r.alone))
            mc = with_error(r.monte_carlo, r.monte_carlo_error)
            share = "-" if r.share is None else f"{100 * r.share:.3g}"
            lines.append(f"{r.name:<{width}}  {r.rate:6.3f} {r.noise:8.4g}{forms}  {mc:>22}  {share:>15}")
        return [*lines, *self._totals(), *(f"note: {n}" for n in self.notes)]

    def _totals(self) -> list[str]:
        t = self.totals
        lines = [
            f"penalty R = E loss - loss(mean output): {with_error(t.regulariser, t.regulariser_error)} "
            f"({self.draws} draws {'a sample' if self.mode == 'row' else 'a batch'}, {self.samples} samples; "
            f"{t.plug_in:.4g} straight from the draws, biased)",
            f"loss: full network {t.loss_full:.6g}, at evaluation {t.loss_evaluation:.6g}, under noise "
            f"{with_error(t.loss_noisy, t.loss_noisy_error)}, at the mean output {t.loss_mean_output:.6g}; "
            f"{self.loss_kind.replace('_', '-')}",
            f"noise mass sum p(1-p): {t.noise_mass:.4g}"
            + (f"; sum (1-p)/p: {t.noise:.4g}" if self.scale == "train" else ""),
        ]
        for form, title in TITLES.items():
            value, ratio = t.sums[form], t.ratios[form]
            if value is None:
                lines.append(f"sum, {title}: not to be had")
                continue
            error = t.sum_error if form == "monte_carlo" else None
            said = "" if ratio is None else f" = {ratio:.3g} R: {said_of(t.verdicts[form], ratio)}"
            lines.append(f"sum, {title}: {with_error(value, error)}{said}")
        return lines


def of_head(head: HeadExplanation) -> Explanation:
    """The explanation of a model whose noise is in front of its head alone."""
    nothing = dict.fromkeys(("regulariser", "regulariser_error", "plug_in", "noise_mass", "noise"), 0.0)
    losses = dict.fromkeys(("loss_full", "loss_evaluation", "loss_noisy", "loss_mean_output"), head.loss)
    return Explanation(
        rows=(),
        totals=Totals(
            **nothing, **losses, loss_noisy_error=0.0, sums={}, ratios={}, verdicts={}, sum_error=None
        ),
        loss_kind=head.loss_kind,
        scale="train",
        mode="row",
        samples=head.samples,
        draws=head.draws,
        notes=(
            "no survival rates of branches were said (rates=): this is the noise in front of the head alone",
        ),
        settings=head.settings,
        head=head,
    )


def said_of(verdict: str, ratio: float) -> str:
    """A verdict in words."""
    if verdict == "off":
        return f"off by {100 * (ratio - 1):+.0f} %"
    return "too few draws to tell" if verdict == "undecided" else verdict


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"

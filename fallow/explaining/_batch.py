"""What one batch says about the penalty: the exact regulariser by Monte Carlo, and each site's forms."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fallow.explaining._control import Control, alone, placed
from fallow.explaining._curvature import Curvature, cotangents, recognise
from fallow.explaining._estimate import Draws, Estimate, fits, mean_and_error
from fallow.explaining._noise import Noise, inverted, kept_alone, resting
from fallow.explaining._outputs import OutputLoss, Point, inner, minus
from fallow.explaining._reach import reached
from fallow.feed import LossFunction, Pair, rows_of
from fallow.surgery.tap import Taps

FORMS = ("hessian", "bregman", "linearised", "monte_carlo", "alone")


@dataclass(frozen=True)
class Effort:
    """How much is drawn: masks, masks for each site, labels."""

    draws: int
    site_draws: int
    label_draws: int


@dataclass
class Measured:
    """The measurements of one batch.

    Attributes:
        rows: its samples.
        curvature: what its loss is.
        losses: of the full network, the one at evaluation, under noise (mean and standard error over the
            draws), and at the mean output.
        regulariser: E loss(Y) - loss(E Y).
        forms: form -> site -> penalty; a form that is not to be had is not there.
        errors: the same for their standard errors.
        sum_error: standard error of the sum of the Monte Carlo form, whose sites share their draws.
    """

    rows: int
    curvature: Curvature
    losses: dict[str, float]
    regulariser: Estimate
    forms: dict[str, dict[str, float]] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    sum_error: float = 0.0
    scalars: bool = False


class Trial:
    """One batch on trial.

    Args:
        taps: the model, its branches to be told what to do.
        noise: the noise.
        effort: how much is drawn.
        dims: batch dimension of each tensor of the output's point, known where ``noise.mode`` is "row".
    """

    def __init__(self, taps: Taps, noise: Noise, effort: Effort, generator: torch.Generator) -> None:
        self.taps, self.noise, self.effort, self.generator = taps, noise, effort, generator

    def measure(
        self, loss: OutputLoss, inputs: Any, dims: list[int | None], first: int, number: int
    ) -> Measured:
        """Everything about one batch.

        Args:
            loss: at the full network's output for this batch.
            inputs: of the batch.
            dims: batch dimension of each tensor of a point; None: unknown.
            first: samples before this batch.
            number: batches before it.
        """
        rows, curvature = rows_of(inputs), recognise(loss, self.generator)
        if not self.noise.active:
            return _without_noise(rows, curvature, loss)
        control = self._control(loss, curvature, inputs, dims)
        kept, conditional = Draws(self.effort.draws, loss.full), {n: [] for n in self.noise.active}
        for draw in range(self.effort.draws):
            masks = self.noise.draw(draw, first if self.noise.mode == "row" else number, rows)
            point, value = self._at(loss, inputs, self.noise.decide(masks))
            kept.add(point, value, None if control is None else control(masks))
            if draw < self.effort.site_draws:
                for name, values in conditional.items():
                    flipped, _ = self._at(loss, inputs, self.noise.decide(inverted(masks, name)))
                    values.append(self._conditional(loss, name, masks[name], point, flipped, dims))
        noisy, error = mean_and_error(kept.losses)
        mean = kept.mean()
        losses = {"full": loss.value(loss.full), "noisy": noisy, "noisy_error": error}
        losses["evaluation"] = self._at(loss, inputs, self.noise.evaluated)[1]
        losses["mean_output"] = loss.value(mean)
        found = Measured(rows, curvature, losses, kept.regulariser(loss.value), scalars=loss.scalars)
        self._fill_monte_carlo(found, conditional)
        self._fill_left_out(found, loss, inputs, mean)
        self._fill_linearised(found, loss, inputs, dims == [0])
        return found

    def _control(
        self, loss: OutputLoss, curvature: Curvature, inputs: Any, dims: list[int | None]
    ) -> Control | None:
        """The control variate, where its mean is known and its tensors are few."""
        by_sample = curvature.kind in ("cross_entropy", "quadratic") or self.noise.mode == "batch"
        if not by_sample or not fits(4 * len(self.noise.active), loss.full):
            return None
        pairs = {name: (on, off) for name, on, off, _ in self._left_out(loss, inputs)}
        return Control(loss, self.noise, pairs, dims)

    def _left_out(self, loss: OutputLoss, inputs: Any) -> Iterator[tuple[str, Point, Point, float]]:
        """Each site's outputs on and off with the others kept, and the loss of the latter."""
        for name in self.noise.active:
            gate = self.noise.on(name)
            on = loss.full if gate == 1 else self._at(loss, inputs, kept_alone(name, gate))[0]
            yield name, on, *self._at(loss, inputs, resting(name))

    def _at(self, loss: OutputLoss, inputs: Any, decide: Any) -> tuple[Point, float]:
        with torch.no_grad():
            return loss.of(self.taps.forward(inputs, decide))

    def _conditional(
        self,
        loss: OutputLoss,
        site: str,
        mask: Tensor | bool,
        drawn: Point,
        flipped: Point,
        dims: list[int | None],
    ) -> float:
        """Gap of one site with rate p: p loss(on) + (1 - p) loss(off) - loss(p on + (1 - p) off).

        The other sites are as drawn. What was drawn has this one on in some samples and off in the others;
        turned over it is the reverse.
        """
        on, off = placed(mask, drawn, flipped, dims), placed(mask, flipped, drawn, dims)
        return alone(loss, self.noise.rates[site], on, off)

    def _fill_monte_carlo(self, found: Measured, conditional: dict[str, list[float]]) -> None:
        if not self.effort.site_draws:
            return
        forms, errors = {}, {}
        for name, values in conditional.items():
            forms[name], errors[name] = mean_and_error(values)
        found.forms["monte_carlo"], found.errors["monte_carlo"] = forms, errors
        by_draw = [math.fsum(values) for values in zip(*conditional.values(), strict=True)]
        found.sum_error = mean_and_error(by_draw)[1]

    def _fill_left_out(self, found: Measured, loss: OutputLoss, inputs: Any, mean: Point) -> None:
        """The forms of the leave-one-out output y(1_l): one forward a site, and one more for "train"."""
        hessian = loss.curvature(mean) if found.curvature.twice else None
        value, slope = loss.value(loss.full), loss.gradient(loss.full)
        forms: dict[str, dict[str, float]] = {"bregman": {}, "alone": {}}
        if hessian is not None:
            forms["hessian"] = {}
        for name, on, off, without in self._left_out(loss, inputs):
            weight, zeta = self.noise.weight(name), minus(loss.full, off)
            forms["bregman"][name] = weight * (without - value + inner(slope, zeta))
            if hessian is not None:
                forms["hessian"][name] = weight * inner(zeta, hessian(zeta)) / 2
            forms["alone"][name] = alone(loss, self.noise.rates[name], on, off)
        found.forms |= forms

    def _fill_linearised(self, found: Measured, loss: OutputLoss, inputs: Any, single: bool) -> None:
        """Curvature along every branch at once; also finds sites that the loss's gradient does not reach."""
        with reached(self.taps, inputs, loss, self.noise.active) as pull:
            if found.curvature.kind not in ("cross_entropy", "quadratic") or not self.effort.label_draws:
                if found.curvature.kind == "linear":
                    found.forms["linearised"] = dict.fromkeys(self.noise.active, 0.0)
                return
            single = single and self.noise.mode == "row" and _one_position(loss.full, found)
            drawn, exact = cotangents(
                found.curvature, loss.full, self.effort.label_draws, self.generator, single
            )
            squares: dict[str, list[float]] = {name: [] for name in self.noise.active}
            for cotangent in drawn:
                for name, s in pull(cotangent).items():
                    squares[name].append(float((s.double() ** 2).sum()))
        forms, errors = {}, {}
        for name, values in squares.items():
            half = self.noise.weight(name) / 2
            mean, error = mean_and_error(values)
            forms[name] = half * (math.fsum(values) if exact else mean)
            errors[name] = 0.0 if exact else half * error
        found.forms["linearised"], found.errors["linearised"] = forms, errors


def _without_noise(rows: int, curvature: Curvature, loss: OutputLoss) -> Measured:
    value = loss.value(loss.full)
    losses = {**dict.fromkeys(("full", "noisy", "evaluation", "mean_output"), value), "noisy_error": 0.0}
    forms: dict[str, dict[str, float]] = {form: {} for form in FORMS}
    return Measured(rows, curvature, losses, Estimate(0.0, 0.0, 0.0), forms, scalars=loss.scalars)


def _one_position(point: Point, found: Measured) -> bool:
    """Whether each sample has one position, or one vector, in the loss."""
    if len(point) != 1 or point[0].dim() == 0 or point[0].shape[0] != found.rows:
        return False
    return found.curvature.kind == "quadratic" or (point[0].dim() == 2 and found.curvature.dim == 1)


def on_trial(taps: Taps, loss_fn: LossFunction, pair: Pair) -> OutputLoss:
    """The loss of a batch at the full network's output."""
    with torch.no_grad():
        output = taps.forward(pair[0])
    return OutputLoss(loss_fn, output, pair[1], "explain")

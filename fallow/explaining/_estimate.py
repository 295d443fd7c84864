"""Monte Carlo of the regulariser: mean loss less loss of the mean, from the same draws without bias."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fallow.errors import UsageError
from fallow.explaining._outputs import Point

# What a batch's draws may keep in memory; beyond it they are kept as means of groups.
_KEPT_BYTES = 1 << 30
_FEWEST = 4


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error over the draws, and the biased one it came from."""

    value: float
    error: float
    plug_in: float


def jackknife(
    loss: Callable[[Point], float],
    values: Sequence[float],
    means: Sequence[Point],
    controls: Sequence[float] = (),
) -> Estimate:
    """E loss(Y) - loss(E Y) from draws of Y.

    Formula: with R the plug-in mean_k loss(Y_k) - loss(mean_k Y_k) and R_(k) the same without draw k, the
    pseudo-values K R - (K - 1) R_(k); their mean, and the standard error of it.

    Args:
        loss: the loss at a point.
        values: loss(Y_k) for each draw, or the mean of it over each of several groups of equal size.
        means: Y_k, or the mean of Y over each group.
        controls: numbers of mean zero that go with them, to be taken off.

    Estimator:
        The plug-in's bias is -tr(H Cov Y)/2K + O(1/K^2): the mean of the outputs follows the draws. For a
        squared error the jackknife removes all of it, and equals the plug-in times K/(K - 1), groups of one
        draw given; groups remove the same bias at more variance. For any other loss a bias of order 1/K^2
        remains.

    References:
        Quenouille: Notes on bias in estimation (1956). Miller: The jackknife, a review (1974).
    """
    count = len(values)
    total = _sum(means)
    plug_in = math.fsum(values) / count - loss([t / count for t in total])
    if count < 2:
        return Estimate(plug_in, math.nan, plug_in)
    pseudo = []
    for value, mean in zip(values, means, strict=True):
        left = (math.fsum(values) - value) / (count - 1)
        left -= loss([(t - m) / (count - 1) for t, m in zip(total, mean, strict=True)])
        pseudo.append(count * plug_in - (count - 1) * left)
    if controls:
        pseudo = [p - c for p, c in zip(pseudo, controls, strict=True)]
    value, error = mean_and_error(pseudo)
    return Estimate(value, error, plug_in)


def _sum(points: Sequence[Point]) -> Point:
    total = [t.clone() for t in points[0]]
    for point in points[1:]:
        for into, t in zip(total, point, strict=True):
            into.add_(t)
    return total


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; of one number the error is NaN, of none both are."""
    count = len(values)
    if count == 0:
        return math.nan, math.nan
    mean = math.fsum(values) / count
    if count == 1:
        return mean, math.nan
    spread = math.fsum((v - mean) ** 2 for v in values) / (count - 1)
    return mean, math.sqrt(spread / count)


def fits(count: int, point: Point) -> bool:
    """Whether so many outputs may be kept."""
    return count * sum(t.numel() * t.element_size() for t in point) <= _KEPT_BYTES


def groups(draws: int, point: Point) -> int:
    """In how many groups of equal size draws of such outputs can be kept: as many as draws where they fit.

    Raises:
        UsageError: not even four fit.
    """
    size = sum(t.numel() * t.element_size() for t in point)
    fit = max(_KEPT_BYTES // max(size, 1), 1)
    best = max(g for g in range(1, draws + 1) if draws % g == 0 and (g <= fit or g == 1))
    if best < min(_FEWEST, draws):
        raise UsageError(
            f"explain: outputs of {size / 2**20:.0f} MiB a batch, of which {fit} fit in "
            f"{_KEPT_BYTES >> 20} MiB: pass smaller batches, or draws that are a multiple of {_FEWEST}"
        )
    return best


class Draws:
    """Losses and outputs of the draws, in groups."""

    def __init__(self, count: int, point: Point) -> None:
        self.losses: list[float] = []
        self._size = count // groups(count, point)
        self._means: list[Point] = []
        self._controls: list[float] = []

    def add(self, point: Point, loss: float, control: float | None = None) -> None:
        """One draw more."""
        if control is not None:
            self._controls.append(control)
        if len(self.losses) % self._size == 0:
            self._means.append([t / self._size for t in point])
        else:
            for mean, t in zip(self._means[-1], point, strict=True):
                mean.add_(t, alpha=1 / self._size)
        self.losses.append(loss)

    def mean(self) -> Point:
        """The mean output."""
        return [t / len(self._means) for t in _sum(self._means)]

    def regulariser(self, loss: Callable[[Point], float]) -> Estimate:
        """E loss(Y) - loss(E Y)."""
        return jackknife(loss, self._grouped(self.losses), self._means, self._grouped(self._controls))

    def _grouped(self, values: list[float]) -> list[float]:
        size = self._size
        return [math.fsum(values[i : i + size]) / size for i in range(0, len(values), size)]

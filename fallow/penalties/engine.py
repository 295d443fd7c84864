"""The penalty of any strategy: a monotone eta(|w|) or survival rate(|w|), checked, classified and integrated.

    Omega(w) = int_0^|w| v / eta(v) dv,    strength Omega(w) = int_0^|w| v (1 - alpha(v)) / alpha(v) dv   (5)

Given eta, the penalty does not depend on the strength; given the survival rate alpha, strength times the
penalty does not. What has a closed form is quicker as one of the named penalties.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fallow.errors import ArgumentError, RateError, UsageError
from fallow.penalties._checks import check_positive
from fallow.penalties._prox import numeric_prox
from fallow.penalties.separable import AtZero, Separable
from fallow.special import integral_from

Strategy = Callable[[Tensor], Tensor]

# Magnitudes looked at: 2^-66 to 2^66, 1.4e-20 to 7.4e19.
_OCTAVES = 66
_PER_OCTAVE = 16
_NODES = 64
# Halvings of a piece that 32 and 64 nodes integrate differently; as many as a jump needs to be isolated.
_HALVINGS = 50
_AT_ONCE = 16
_AGREE = 1e-14
# Rounding of a strategy that is called monotone all the same.
_RATE_SLACK = 1e-12
_ETA_SLACK = 1e-9


def from_eta(function: Strategy, *, kinks: Sequence[float] = ()) -> FromStrategy:
    """The penalty whose eta(|w|) is `function`.

    Args:
        function: Takes a double tensor of magnitudes of any shape, gives eta of the same shape: in
            [0, infinity], not decreasing. Made of torch functions if second derivatives are wanted.
        kinks: Magnitudes at which it jumps or bends. Those left out are searched for by halving.

    Raises:
        ArgumentError: `function` is not callable or does not give a tensor of floats of the same shape.
        UsageError: It gives NaN or negative numbers, or decreases; the message says where and by how much.

    Estimator:
        Value within 1e-13 relative of the integral by 64 Gauss-Legendre nodes on pieces an octave long, prox
        and dual by bisection, gradient exact. Checked on 16 magnitudes an octave from 1.4e-20 to 7.4e19: a
        dip between two of them is not seen.

    References:
        Derived: project's notes, equation (5) and their engine.

    Examples:
        >>> penalty = from_eta(lambda w: w * (w + 2))  # LogSum(2)
        >>> penalty.at_zero, penalty.value(torch.tensor([2.0, -6.0]))
        ('slope', tensor([0.6931, 1.3863]))
    """
    return FromStrategy(function, tuple(kinks))


def from_survival_rate(
    function: Strategy, *, strength: float = 1.0, kinks: Sequence[float] = ()
) -> FromStrategy:
    """The penalty of the adaptive dropout that keeps a weight with probability `function` of ``|w|``.

    Args:
        function: Takes a double tensor of magnitudes of any shape, gives the survival rate of the same shape:
            in [0, 1], not decreasing.
        strength: The multiplier at which the penalty stands for this strategy: ``strength * value`` does not
            depend on it, and ``survival_rate(w, strength)`` is `function`.
        kinks: Magnitudes at which it jumps or bends. Those left out are searched for by halving.

    Raises:
        ArgumentError: `function` is not callable or does not give a tensor of floats of the same shape.
        RateError: It gives a number outside [0, 1].
        UsageError: It gives NaN or decreases; the message says where and by how much.

    Estimator:
        As `from_eta`. Where the rate is so close to 1 that 1 - rate has few digits, so has the slope.

    Examples:
        >>> penalty = from_survival_rate(torch.sigmoid)  # Standout()
        >>> penalty.at_zero, penalty.value(torch.tensor([1.0]))
        ('ridge', tensor([0.2642]))
    """
    return FromStrategy(function, tuple(kinks), check_positive("strength", strength))


@dataclass(frozen=True)
class FromStrategy(Separable):
    """The penalty of a strategy; made by `from_eta` and `from_survival_rate`.

    Attributes:
        function: eta, or the survival rate, as a function of ``|w|``.
        kinks: Where it jumps or bends, as far as the caller said.
        strength: None where `function` is eta, else the strength at which it is the survival rate.
    """

    function: Strategy
    kinks: tuple[float, ...] = ()
    strength: float | None = None

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ArgumentError(f"a strategy is a function of |w|, got {self.function!r}")
        for kink in self.kinks:
            check_positive("every kink", kink)
        object.__setattr__(self, "kinks", tuple(sorted(float(kink) for kink in self.kinks)))
        _check_strategy(self)
        _ = self.at_zero

    @functools.cached_property
    def at_zero(self) -> AtZero:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What the penalty is like at 0, from the power with which eta leaves it."""
        with torch.no_grad():
            grid = torch.logspace(-_OCTAVES, _OCTAVES, 2 * _OCTAVES + 1, base=2, dtype=torch.float64)
            eta = self._eta(grid)
        positive = (eta > 0).nonzero().flatten()
        if not positive.numel() or float(grid[positive[0]]) > 2.0**-20:
            return "barrier"
        # Where the first values round to 0 their neighbours are rounding too: a few octaves on.
        at = int(positive[0]) + (16 if int(positive[0]) else 0)
        if math.isinf(float(eta[at + 4])):
            return "ridge"
        power = float((eta[at + 4] / eta[at]).log2()) / 4
        if power > 1.999:
            return "barrier"
        return "ridge" if power < 0.99 else "slope" if power < 1.01 else "singular"

    def _eta(self, magnitude: Tensor) -> Tensor:
        wide = _called(self.function, magnitude.double())
        if self.strength is not None:
            wide = self.strength * wide / (1 - wide)
        return wide.to(magnitude.dtype)

    def _slope(self, magnitude: Tensor) -> Tensor:
        wide = magnitude.double()
        # Away from 0, where 0 / 0 would be NaN in the derivative too.
        moved = torch.where(wide > 0, wide, 2.0**-_OCTAVES)
        return (moved / self._eta(moved)).to(magnitude.dtype)

    def _value(self, magnitude: Tensor) -> Tensor:
        wide = magnitude.double()
        if self.at_zero == "barrier":
            return torch.where(wide > 0, torch.inf, wide).to(magnitude.dtype)
        edges, sums, nodes = self._pieces
        edges, sums = edges.to(wide.device), sums.to(wide.device)
        index = (torch.searchsorted(edges, wide.contiguous()) - 1).clamp(min=0)
        rest = integral_from(edges[index], torch.maximum(wide, edges[index]), self._integrand, nodes)
        head = (wide > 0) & (wide < edges[0])
        total = torch.where(wide > 0, sums[index] + rest, wide)
        if bool(head.any()):
            end = torch.where(head, wide, edges[0])
            total = torch.where(head, self._start(end), total)
        return torch.where(wide == torch.inf, sums[-1], total).to(magnitude.dtype)

    def _prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        if self.at_zero == "barrier":
            free = torch.as_tensor(step, dtype=w.dtype, device=w.device).expand(w.shape) == 0
            return torch.where(free, w, torch.zeros_like(w))
        return numeric_prox(w, step, self._value, self._slope, self.kinks)

    def _start(self, end: Tensor) -> Tensor:
        """The integral from 0, where v = end u^4 takes the singularity of v^(p - 1) away."""
        return integral_from(torch.zeros_like(end), end, self._integrand, _NODES, 4)

    def _integrand(self, v: Tensor) -> Tensor:
        return v / self._eta(v)

    @functools.cached_property
    def _pieces(self) -> tuple[Tensor, Tensor, int]:
        """Edges of pieces, the penalty at each edge, and how many nodes a piece needs."""
        octaves = torch.logspace(-_OCTAVES, _OCTAVES, 2 * _OCTAVES + 1, base=2, dtype=torch.float64)
        edges = torch.cat([octaves, torch.tensor(self.kinks, dtype=torch.float64)]).unique()

        def piecewise(nodes: int) -> Tensor:
            return integral_from(edges[:-1], edges[1:], self._integrand, nodes)

        with torch.no_grad():
            for _ in range(_HALVINGS):
                exact = piecewise(_NODES)
                rough = (piecewise(_NODES // 2) - exact).abs() / exact.cumsum(0).clamp(min=2.0**-1000)
                # The worst alone: where a strategy has few digits all pieces are rough, and halving no help.
                worst = rough.topk(min(_AT_ONCE, rough.numel())).indices
                worst = worst[rough[worst] > _AGREE]
                if not worst.numel():
                    break
                edges = torch.cat([edges, ((edges[:-1] + edges[1:]) / 2)[worst]]).unique()
            exact = piecewise(_NODES)
            sums = torch.cat([self._start(edges[:1]), exact]).cumsum(0)
            close = [n for n in (16, 32) if bool(((piecewise(n) - exact).abs() <= _AGREE * sums[1:]).all())]
        return edges, sums, min(close, default=_NODES)


def _called(function: Strategy, magnitude: Tensor) -> Tensor:
    """What the strategy gives, if it is a tensor of floats of the shape it got."""
    result = function(magnitude)
    if not isinstance(result, Tensor) or not result.is_floating_point():
        got = str(result.dtype) if isinstance(result, Tensor) else type(result).__name__
        raise ArgumentError(f"a strategy must give a tensor of floats, got {got}: use torch functions")
    if result.shape != magnitude.shape:
        raise ArgumentError(
            f"a strategy must give one number for each magnitude, got shape {list(result.shape)} for "
            f"{list(magnitude.shape)}: make it elementwise"
        )
    return result


def _check_strategy(penalty: FromStrategy) -> None:
    """Refuse a strategy that is NaN, out of range or that decreases, and say where."""
    count = 2 * _OCTAVES * _PER_OCTAVE + 1
    grid = torch.logspace(-_OCTAVES, _OCTAVES, count, base=2, dtype=torch.float64)
    grid = torch.cat([grid, torch.tensor(penalty.kinks, dtype=torch.float64)]).unique()
    with torch.no_grad():
        found = _called(penalty.function, grid)
    is_rate = penalty.strength is not None
    what = "the survival rate" if is_rate else "eta"
    _refuse(
        found.isnan(), grid, found, f"{what} is {{y:g}} at |w| = {{x:.6g}}: write it so that it stays defined"
    )
    if is_rate:
        bad = (found < 0) | (found > 1)
        _refuse(bad, grid, found, f"{what} is {{y:.6g}} at |w| = {{x:.6g}}: it must be in [0, 1]", RateError)
    else:
        _refuse(found < 0, grid, found, f"{what} is {{y:.6g}} at |w| = {{x:.6g}}: it must not be negative")
    highest = found.cummax(0).values
    slack = torch.full_like(found, _RATE_SLACK) if is_rate else _ETA_SLACK * found.abs()
    fall = torch.where(found == highest, 0.0, highest - found)
    if bool((fall > slack).any()):
        end = int(fall.argmax())
        begin = int((found[: end + 1] == highest[end]).nonzero()[-1])
        raise UsageError(
            f"{what} must not decrease in |w|, but it falls by {float(fall[end]):.6g}, from "
            f"{float(found[begin]):.6g} at |w| = {float(grid[begin]):.6g} to {float(found[end]):.6g} at "
            f"{float(grid[end]):.6g}: a strategy that drops larger weights more often has no penalty; "
            "take its running maximum"
        )


def _refuse(
    bad: Tensor, x: Tensor, y: Tensor, message: str, error: type[UsageError] | type[RateError] = UsageError
) -> None:
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise error(message.format(x=float(x[at]), y=float(y[at])))

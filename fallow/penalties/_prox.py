"""Prox and dual of a separable penalty of which only value, slope and eta are known: tables and bisection."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Scalar = Callable[[Tensor], Tensor]

# Nodes are a constant factor apart, so that one grid serves a penalty at whatever scale it bends.
_NODES = 1024
_DECADES = 13
_CHUNK = 2**20
# Weights below this part of the largest have a grid of their own.
_REACH = 1e-10
# A node's objective is off by at most about 1e-3 of the jump's place: within this much of it both sides
# of a jump are tried.
_NEAR_JUMP = 0.02


def numeric_prox(
    w: Tensor, step: float | Tensor, value: Scalar, slope: Scalar, kinks: Sequence[float] = ()
) -> Tensor:
    """The global minimiser of ``(x - w)^2 / 2 + step value(x)`` for each entry, in double precision inside.

    With H(x) = x^2 / 2 + step value(x), the minimiser of H(x) - |w| x over the nodes of a grid is a vertex
    of the lower convex hull of H, found by bisection in the hull's slopes; the grid's neighbours bracket the
    root of H'(x) = |w|, found by Ridders' method. Where the hull jumps near |w|, both its ends are refined,
    and in the end the best of these and of 0 is taken. A tensor of steps has no common hull: there the two
    lowest local minima on the grid are refined.

    Estimator:
        Exact to rounding where H' is monotone between neighbouring nodes (2.9 % apart), besides at jumps.
    """
    magnitude = w.detach().abs().double().flatten()
    finite = magnitude.isfinite()
    top = float(torch.where(finite, magnitude, 0.0).max()) if magnitude.numel() else 0.0
    if top == 0.0 or (isinstance(step, float) and step == 0.0):
        return w.detach().clone()
    if bool((beneath := (magnitude > 0) & (magnitude < _REACH * top)).any()):
        return _by_sizes(w, step, beneath.reshape(w.shape), value, slope, kinks)
    nodes = _grid(top, kinks, w.device)
    table = value(nodes)
    rounds = 52 if w.dtype == torch.float64 else 30
    moved = finite
    if isinstance(step, float):
        best = _common_step(magnitude, step, nodes, table, value, slope, rounds)
    else:
        steps = torch.as_tensor(step).double().expand(w.shape).flatten()
        moved = finite & (steps > 0)
        rows = max(_CHUNK // nodes.numel(), 1)
        best = torch.cat(
            [
                _own_steps(m, s, nodes, table, value, slope, rounds)
                for m, s in zip(magnitude.split(rows), steps.split(rows), strict=True)
            ]
        )
    return torch.where(moved, best, magnitude).to(w.dtype).reshape(w.shape).copysign(w)


def _by_sizes(
    w: Tensor, step: float | Tensor, small: Tensor, value: Scalar, slope: Scalar, kinks: Sequence[float]
) -> Tensor:
    """The prox of the small ones and of the others, each with a grid that reaches them."""
    steps = step.expand(w.shape) if isinstance(step, Tensor) else None
    result = torch.empty_like(w)
    for which in (small, ~small):
        own = step if steps is None else steps[which]
        result[which] = numeric_prox(w.detach()[which], own, value, slope, kinks)
    return result


def _grid(top: float, kinks: Sequence[float], device: torch.device) -> Tensor:
    """0 and nodes a constant factor apart up to just above `top`, kinks among them."""
    exponents = torch.linspace(-_DECADES, 0, _NODES, dtype=torch.float64, device=device)
    inside = torch.tensor([kink for kink in kinks if 0 < kink < top], dtype=torch.float64, device=device)
    return torch.cat([exponents.new_zeros(1), 1.001 * top * 10.0**exponents, inside]).unique()


def _common_step(
    magnitude: Tensor, step: float, nodes: Tensor, table: Tensor, value: Scalar, slope: Scalar, rounds: int
) -> Tensor:
    """The minimisers for one step, by the hull of H."""
    heights = nodes.square() / 2 + step * table
    rising = bool(((nodes + step * slope(nodes))[1:].diff() > 0).all())
    hull = range(nodes.numel()) if rising else lower_hull(nodes.tolist(), heights.tolist())
    vertex = torch.tensor(hull, device=nodes.device)
    slopes = heights[vertex].diff() / nodes[vertex].diff()
    at = torch.searchsorted(slopes, magnitude)
    best = _refine(magnitude, step, vertex[at], nodes, value, slope, rounds)
    jumps = (vertex.diff() > 1).nonzero().flatten().tolist()
    for jump in jumps:
        near = (magnitude - slopes[jump]).abs() <= _NEAR_JUMP * slopes[jump]
        if not bool(near.any()):
            continue
        m = magnitude[near]
        for end in (vertex[jump], vertex[jump + 1]):
            other = _refine(m, step, end.expand(m.shape), nodes, value, slope, rounds)
            best[near] = _better(m, step, value, best[near], other)
    return best


def _own_steps(
    magnitude: Tensor, steps: Tensor, nodes: Tensor, table: Tensor, value: Scalar, slope: Scalar, rounds: int
) -> Tensor:
    """The minimisers where each entry has its own step, by the two lowest local minima on the grid."""
    pull = magnitude.unsqueeze(-1)
    objective = nodes * (nodes / 2 - pull) + steps.unsqueeze(-1) * table
    falls = objective.diff() < 0
    edge = torch.ones_like(falls[:, :1])
    lowest = torch.cat([edge, falls], -1) & ~torch.cat([falls, ~edge], -1)
    index = torch.where(lowest, objective, torch.inf).topk(2, largest=False).indices
    best = _refine(magnitude, steps, index[:, 0], nodes, value, slope, rounds)
    other = _refine(magnitude, steps, index[:, 1], nodes, value, slope, rounds)
    return _better(magnitude, steps, value, best, other)


def _refine(
    m: Tensor, step: float | Tensor, at: Tensor, nodes: Tensor, value: Scalar, slope: Scalar, rounds: int
) -> Tensor:
    """The root of ``x + step slope(x) = m`` between the neighbours of a node, or 0 where that is better."""
    low, high = nodes[(at - 1).clamp(min=0)], nodes[(at + 1).clamp(max=nodes.numel() - 1)]
    root = _ridders(lambda x: x + step * slope(x) - m, low, high, rounds)
    return _better(m, step, value, torch.zeros_like(m), root)


def _ridders(excess: Scalar, low: Tensor, high: Tensor, rounds: int) -> Tensor:
    """Where `excess` turns from below to above 0, by Ridders' method; by bisection where no end is beyond it.

    Each round halves the bracket at least, so that `rounds` bits of it are found even across a jump.
    """
    at_low, at_high = excess(low), excess(high)
    tolerance = 2.0 ** (6 - rounds)
    done = (low == 0) & (at_low >= 0)  # the minimum of this bracket is its end
    root = torch.where(done, low, high)
    for _ in range(rounds):
        middle = (low + high) / 2
        at_middle = excess(middle)
        guess = middle - (middle - low) * at_middle / (at_middle.square() - at_low * at_high).sqrt()
        guess = torch.where((at_low < 0) & (at_high > 0) & guess.isfinite(), guess, middle)
        at_guess = excess(guess)
        swap = guess < middle
        left, right = torch.where(swap, guess, middle), torch.where(swap, middle, guess)
        at_left, at_right = torch.where(swap, at_guess, at_middle), torch.where(swap, at_middle, at_guess)
        # the bracket is [low, left], [left, right] or [right, high]
        above, below = at_left >= 0, at_right < 0
        low, at_low = (
            torch.where(above, low, torch.where(below, right, left)),
            torch.where(above, at_low, torch.where(below, at_right, at_left)),
        )
        high, at_high = (
            torch.where(above, left, torch.where(below, high, right)),
            torch.where(above, at_left, torch.where(below, at_high, at_right)),
        )
        close = ((guess - root).abs() <= tolerance * guess) | (high - low <= tolerance * high)
        root = torch.where(done, root, guess)
        done = done | close | (at_guess == 0)
        if bool(done.all()):
            break
    return root


def _better(m: Tensor, step: float | Tensor, value: Scalar, one: Tensor, other: Tensor) -> Tensor:
    """The entries of `other` where their objective is lower, else those of `one`."""

    def objective(x: Tensor) -> Tensor:
        return x * (x / 2 - m) + step * value(x)

    return torch.where(objective(other) < objective(one), other, one)


def lower_hull(x: Sequence[float], y: Sequence[float]) -> list[int]:
    """Indices of the vertices of the lower convex hull of points with ascending `x`."""
    hull: list[int] = []
    for i in range(len(x)):
        if y[i] == float("inf"):
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (y[b] - y[a]) * (x[i] - x[b]) < (y[i] - y[b]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(i)
    return hull


def conjugate(eta: Tensor, value: Scalar, eta_of: Scalar) -> Tensor:
    """``f(eta) = sup_w 2 value(w) - w^2 / eta``, taken at the largest w whose eta is at most the one asked.

    It is found by bisection in its logarithm; f is infinite where no w exceeds an eta that is finite.
    """
    asked = eta.detach().double()
    low, high = torch.full_like(asked, -66.0), torch.full_like(asked, 66.0)
    for _ in range(64):
        middle = (low + high) / 2
        below = eta_of(middle.exp2()) <= asked
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    v = low.exp2()
    none, all_ = low == -66.0, high == 66.0
    # by the envelope theorem the derivative is that at a fixed w
    f = 2 * value(v) - torch.where(asked == torch.inf, 0.0, v * v / eta.double())
    f = torch.where(all_ & asked.isfinite(), torch.inf, torch.where(none, 0.0, f))
    return torch.where(asked.isnan(), torch.nan, f).to(eta.dtype)

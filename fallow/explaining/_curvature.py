"""How a loss bends over the output, told from its Hessian alone, and labels drawn to match.

A loss is given as a function; that it is a cross-entropy or a squared error shows in products H v:

    cross-entropy    (H v)_i = w_i (diag(pi_i) - pi_i pi_i') v_i    at each position i, w_i >= 0
    quadratic        (H v)_j = c_j v_j                              wherever it is taken, c_j >= 0

Label smoothing and soft targets do not change H, class weights and ignored positions are in w.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fallow.explaining._outputs import OutputLoss, Point, inner, minus


@dataclass(frozen=True)
class Curvature:
    """What the Hessian of a loss over the output is.

    Attributes:
        kind: "cross_entropy", "quadratic", "linear" or "other".
        weights: w, one a position (the class dimension kept, of size 1), or c, like the point; else empty.
        dim: the class dimension of a cross-entropy.
        twice: whether autograd can differentiate the loss twice.
    """

    kind: str
    weights: tuple[Tensor, ...] = ()
    dim: int = -1
    twice: bool = True


def recognise(loss: OutputLoss, generator: torch.Generator) -> Curvature:
    """Tell the loss by its curvature at the full network's output and at points drawn at random.

    Estimator:
        The weights are fitted to one product H v and must explain others, at other points and with other
        v, to about the square root of the dtype's precision. A loss that differs from both kinds only
        where no point fell (a Huber loss with a huge threshold) is taken for the one it equals there.
    """
    z = loss.full
    try:
        here, tests = loss.curvature(z), [_probe(z, generator) for _ in range(3)]
        mine = [here(v) for v in tests]
    except RuntimeError:
        return Curvature("other", twice=False)
    if not _agrees(loss, tests[0], mine[0]):
        return Curvature("other", twice=False)
    far = [t + 3 * (1 + t.std(correction=0)) * v for t, v in zip(z, _probe(z, generator), strict=True)]
    near = [0.5 * v for v in _probe(z, generator)]
    try:
        points = [(p, loss.curvature(p)) for p in (near, far)]
    except (RuntimeError, ValueError):  # not defined there: of probabilities, say
        return Curvature("other")
    found = _quadratic(tests, mine, points) or _cross_entropy(z, tests, mine, points)
    if found is None and _linear(loss, far, mine):
        found = Curvature("linear")
    return found or Curvature("other")


def _probe(z: Point, generator: torch.Generator) -> Point:
    return [torch.randn(t.shape, generator=generator, device=t.device, dtype=t.dtype) for t in z]


def _agrees(loss: OutputLoss, v: Point, product: Point) -> bool:
    """Whether H v is the change of the gradient along v: a function of once_differentiable gives zeros."""
    z = loss.full
    eps = max(torch.finfo(t.dtype).eps for t in z)
    step = eps ** (1 / 3) * (1 + max(float(t.std(correction=0)) for t in z))
    sides = [[t + s * step * u for t, u in zip(z, v, strict=True)] for s in (1, -1)]
    try:
        up, down = (loss.gradient(side) for side in sides)
    except (RuntimeError, ValueError):  # at the edge of where the loss is defined
        return True
    gap = [(a - b) / (2 * step) - h for a, b, h in zip(up, down, product, strict=True)]
    slack = 0.05 * inner(product, product) ** 0.5 + 10 * eps / step * inner(up, up) ** 0.5
    return inner(gap, gap) ** 0.5 <= slack


def _quadratic(tests: list[Point], mine: list[Point], points: list) -> Curvature | None:
    signs = [torch.sign(v) + (v == 0) for v in tests[0]]
    weights = [h * s for h, s in zip(points[1][1](signs), signs, strict=True)]
    pairs = [(h, v) for h, v in zip(mine, tests, strict=True)]
    pairs += [(hessian(v), v) for (_, hessian), v in zip(points, tests, strict=False)]
    for h, v in pairs:
        if not _same(h, [w * u for w, u in zip(weights, v, strict=True)]):
            return None
    if not _weights(weights):
        return None
    return Curvature("quadratic", tuple(w.clamp_min(0) for w in weights))


def _cross_entropy(z: Point, tests: list[Point], mine: list[Point], points: list) -> Curvature | None:
    if len(z) != 1 or z[0].dim() < 2:
        return None
    (near,), hessian = points[0]
    (first,), (other,) = tests[0], tests[1]
    for dim in sorted({1, z[0].dim() - 1}):
        if z[0].shape[dim] < 2:
            continue
        u, h = _covariance(near, first, dim), hessian([first])[0]
        w = (h * u).sum(dim, keepdim=True) / (u * u).sum(dim, keepdim=True)
        again = (hessian([other])[0], w * _covariance(near, other, dim))
        if (
            _same([h], [w * u])
            and _same([again[0]], [again[1]])
            and all(_explained(m, z[0], v[0], w, dim) for m, v in zip(mine, tests, strict=True))
            and _weights([w])
        ):
            return Curvature("cross_entropy", (w.clamp_min(0),), dim)
    return None


def _covariance(z: Tensor, v: Tensor, dim: int) -> Tensor:
    """(diag(pi) - pi pi') v along a dimension, pi = softmax(z)."""
    pi = z.softmax(dim)
    return pi * (v - (pi * v).sum(dim, keepdim=True))


def _explained(product: Point, z: Tensor, v: Tensor, w: Tensor, dim: int) -> bool:
    """Whether a product at the output is that of weights w, up to what rounding leaves of a sure softmax."""
    rounding = 100 * torch.finfo(z.dtype).eps * inner([w * v], [w * v]) ** 0.5
    return _same(product, [w * _covariance(z, v, dim)], rounding)


def _linear(loss: OutputLoss, far: Point, mine: list[Point]) -> bool:
    if any(bool(h.any()) for product in mine for h in product):
        return False
    step = minus(far, loss.full)
    slope = inner(loss.gradient(loss.full), step)
    rest = loss.value(far) - loss.value(loss.full) - slope
    return abs(rest) <= _tolerance(far) * (abs(slope) + abs(loss.value(loss.full)))


def _tolerance(z: Point) -> float:
    return max(torch.finfo(t.dtype).eps for t in z) ** 0.5


def _same(a: Point, b: Point, rounding: float = 0.0) -> bool:
    if not all(bool(torch.isfinite(t).all()) for t in (*a, *b)):
        return False
    size = inner(a, a) ** 0.5 + inner(b, b) ** 0.5
    gap = minus(a, b)
    return inner(gap, gap) ** 0.5 <= _tolerance(a) * size + rounding


def _weights(weights: list[Tensor]) -> bool:
    """Whether they are weights: none negative but for rounding, some positive."""
    top = max(float(w.max()) for w in weights)
    return top > 0 and min(float(w.min()) for w in weights) >= -1e-3 * top


def cotangents(
    curvature: Curvature, point: Point, draws: int, generator: torch.Generator, single: bool
) -> tuple[Iterator[Point], bool]:
    """Vectors u at the output with E u u' = H, and whether they sum up to it exactly.

    Cross-entropy: u_i = sqrt(w_i) (onehot(c) - pi_i), c drawn from pi_i (Fisher identity); with no more
    classes than draws, one vector for each class c, times sqrt(pi_c). Quadratic: u = sqrt(c) xi with standard
    normal xi; with no more numbers a sample than draws, sqrt(c_j) e_j for each of them.

    Args:
        curvature: of kind "cross_entropy" or "quadratic".
        point: where.
        draws: how many to draw.
        generator: of the labels.
        single: whether the loss has one position a sample, so that the sums over classes are exact.

    References:
        Derived, D23.
    """
    if curvature.kind == "quadratic":
        numbers = point[0][0].numel() if single else 0
        if single and len(point) == 1 and numbers <= draws:
            return _axes(point[0], curvature.weights[0]), True
        return _normals(curvature, point, draws, generator), False
    z, w, dim = point[0], curvature.weights[0], curvature.dim
    if single and z.dim() == 2 and z.shape[dim] <= draws:
        return _classes(z, w, dim), True
    return _labels(z, w, dim, draws, generator), False


def _axes(z: Tensor, weights: Tensor) -> Iterator[Point]:
    flat = weights.reshape(z.shape[0], -1)
    for j in range(flat.shape[1]):
        u = torch.zeros_like(flat)
        u[:, j] = flat[:, j].sqrt()
        yield [u.reshape(z.shape)]


def _normals(curvature: Curvature, point: Point, draws: int, generator: torch.Generator) -> Iterator[Point]:
    for _ in range(draws):
        xi = _probe(point, generator)
        yield [w.sqrt() * x for w, x in zip(curvature.weights, xi, strict=True)]


def _classes(z: Tensor, w: Tensor, dim: int) -> Iterator[Point]:
    pi = z.softmax(dim)
    for c in range(z.shape[dim]):
        u = -pi
        u.select(dim, c).add_(1)
        yield [(w * pi.narrow(dim, c, 1)).sqrt() * u]


def _labels(z: Tensor, w: Tensor, dim: int, draws: int, generator: torch.Generator) -> Iterator[Point]:
    pi = z.softmax(dim)
    rows = pi.movedim(dim, -1)
    for _ in range(draws):
        drawn = torch.multinomial(rows.reshape(-1, rows.shape[-1]), 1, generator=generator)
        label = drawn.reshape(*rows.shape[:-1], 1).movedim(-1, dim)
        u = (-pi).scatter_add_(dim, label, torch.ones_like(label, dtype=pi.dtype))
        yield [w.sqrt() * u]

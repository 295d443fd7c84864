"""Training of `pal2020`: a linear map of features under a law of masks, by sampling or without.

Rows are samples. The stochastic loss is ``|Y - (mask * G) W^T|_F^2`` and its expectation over masks, equation
(1) of the theory notes, ``|Y - G W^T|_F^2 + omega(W, G)``. Both are sums, in double precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fallow.noise.dropconnect import drop_connect
from fallow.noise.feature_dropout import feature_dropout
from fallow.papers._packed import pack, unpack
from fallow.penalties import omega
from fallow.recipes._batches import generator
from fallow.schemes import Blocks, Scheme, Units

Pieces = Callable[[str, Callable[[], Any]], Any]
_MEMORY = 20  # pairs that L-BFGS keeps


@dataclass(frozen=True)
class Law:
    """What drops: the name of a law, its rate and block size, and for what one mask is drawn.

    Attributes:
        name: "disjoint", "sliding" (blocks of features; disjoint ones of 1 are Dropout) or "dropconnect".
        survival_rate: of a block, a feature or a weight.
        block_size: r.
        masks: "row" for one mask a sample, "batch" for one a step; DropConnect's is always one a step.
    """

    name: str
    survival_rate: float
    block_size: int = 1
    masks: str = "row"

    @property
    def scheme(self) -> Scheme:
        """The law of a mask over features that has the same expected loss."""
        if self.name == "dropconnect" or self.block_size == 1:
            return Units(self.survival_rate)
        return Blocks(self.survival_rate, self.block_size, self.name)

    def noisy(self, features: Tensor, weight: Tensor, draws: torch.Generator) -> Tensor:
        """Predictions [N, outputs] under fresh masks."""
        if self.name == "dropconnect":
            return drop_connect(features, weight, survival_rate=self.survival_rate, generator=draws)
        if self.masks == "row":
            return feature_dropout(features, self.scheme, generator=draws) @ weight.T
        mask = feature_dropout(features.new_ones(1, features.shape[1]), self.scheme, generator=draws)
        return (features * mask) @ weight.T


def sampled_loss(
    targets: Tensor, features: Tensor, weight: Tensor, law: Law, draws: torch.Generator
) -> Tensor:
    """The squared error under fresh masks."""
    return (targets - law.noisy(features, weight, draws)).square().sum()


def expected_loss(targets: Tensor, features: Tensor, weight: Tensor, scheme: Scheme) -> Tensor:
    """Its mean over all masks, (1)."""
    return (targets - features @ weight.T).square().sum() + omega(weight, features, scheme)


# --- linear networks -----------------------------------------------------------------------------------


def common_target(outputs: int, samples: int, *, top: float = 10.0, decay: float = 8.0) -> Tensor:
    """Y [samples, outputs] with singular values ``top exp(-i / decay)`` and random singular vectors."""
    draws = generator(0, "target")
    rank = min(outputs, samples)
    p, q = (
        torch.linalg.qr(torch.randn(n, rank, generator=draws, dtype=torch.float64)).Q
        for n in (samples, outputs)
    )
    return (p * (top * torch.exp(-torch.arange(rank, dtype=torch.float64) / decay))) @ q.T


def start(targets: Tensor, width: int, seed: int, scale: float = 0.1) -> list[Tensor]:
    """Random features [samples, width], the first layer for one-hot inputs, and weight [outputs, width]."""
    draws = generator(seed, "weights")
    sizes = targets.shape
    return [scale * torch.randn(size, width, generator=draws, dtype=torch.float64) for size in sizes]


@dataclass(frozen=True)
class Descent:
    """Plain gradient steps on the sampled loss beside those, from the same start, on the expected one.

    Attributes:
        law: what drops.
        width: d.
        steps: of each.
        rate: learning rate, constant for half of the steps and then falling linearly to 0.
        windows: of equal length, over which curves are means.
        seed: of the start and of the masks.
        both: whether to take the steps on the expected loss too.
    """

    law: Law
    width: int
    steps: int
    rate: float
    windows: int
    seed: int
    both: bool = True

    def run(self, targets: Tensor, pieces: Pieces, parts: int = 4) -> dict[str, Any]:
        """The curves, and features and weight after the last step and as means over the last fifth.

        Returns:
            windows: mean sampled and expected loss at the same iterates, the standard error of their
                difference, and the mean of the expected loss of the descent without masks.
            last, mean: (features, weight).

        Estimator:
            Given the iterate, sampled less expected loss has mean 0, and is uncorrelated over the steps: the
            root of the sum of its squares is the standard error of its sum, whatever its variance does.
        """
        first = start(targets, self.width, self.seed)
        # Clones: packed tensors that share memory come back sharing it, and both descents would be one.
        state = pack([*first, *(t.clone() for t in first), *(torch.zeros_like(t) for t in first)])
        windows: list[dict[str, float]] = []
        for part in range(parts):
            mine = range(self.windows * part // parts, self.windows * (part + 1) // parts)

            def stretch(state: str = state, mine: range = mine) -> dict[str, Any]:
                tensors = unpack(state)
                found = [self._window(targets, tensors, window) for window in mine]
                return {"windows": found, "state": pack(tensors)}

            found = pieces(f"part{part}", stretch)
            windows, state = windows + found["windows"], found["state"]
        tensors = unpack(state)
        tail = self._last_fifth
        return {"windows": windows, "last": tensors[:2], "mean": [t / len(tail) for t in tensors[4:]]}

    @property
    def _length(self) -> int:
        return self.steps // self.windows

    @property
    def _last_fifth(self) -> range:
        total = self._length * self.windows
        return range(total - total // 5, total)

    def _window(self, targets: Tensor, state: list[Tensor], window: int) -> dict[str, float]:
        """The steps of one window; the state (stochastic, deterministic, sums) is changed in place."""
        noisy, plain, sums = state[:2], state[2:4], state[4:]
        draws, scheme = generator(self.seed, f"masks of {self.law}", window), self.law.scheme
        totals = [0.0] * 4
        for step in range(window * self._length, (window + 1) * self._length):
            rate = self.rate * min(1.0, 2 * (1 - step / self.steps))
            with torch.no_grad():
                expected = float(expected_loss(targets, noisy[0], noisy[1], scheme))
            sampled = _step(noisy, rate, lambda g, w: sampled_loss(targets, g, w, self.law, draws))
            other = 0.0
            if self.both:
                other = _step(plain, rate, lambda g, w: expected_loss(targets, g, w, scheme))
            terms = sampled, expected, other, (sampled - expected) ** 2
            totals = [total + term for total, term in zip(totals, terms, strict=True)]
            if step in self._last_fifth:
                for total, now in zip(sums, noisy, strict=True):
                    total += now
        sampled, expected, other, squares = totals
        n = self._length
        return {
            "step": (window + 0.5) * n,
            "sampled": sampled / n,
            "expected": expected / n,
            "error": math.sqrt(squares) / n,
            **({"descent": other / n} if self.both else {}),
        }


def _step(factors: Sequence[Tensor], rate: float, loss: Callable[[Tensor, Tensor], Tensor]) -> float:
    """One gradient step, in place; the loss before it."""
    leaves = [p.requires_grad_() for p in factors]
    value = loss(leaves[0], leaves[1])
    gradients = torch.autograd.grad(value, leaves)
    with torch.no_grad():
        for p, gradient in zip(leaves, gradients, strict=True):
            p.requires_grad_(False).sub_(gradient, alpha=rate)
    return float(value.detach())


# --- without sampling ----------------------------------------------------------------------------------


def minimise(
    loss: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    iterations: int,
    pieces: Pieces,
    *,
    parts: int = 4,
    looks: int = 5,
) -> list[tuple[int, float]]:
    """L-BFGS with strong Wolfe steps; the parameters are changed in place.

    Each part starts with an empty memory, so that a part that was kept and one that is computed go on alike.

    Returns:
        (iterations, loss) at the start and `looks` times in each part.
    """
    curve = [(0, float(loss().detach()))]
    each = iterations // (parts * looks)
    for part in range(parts):

        def stretch(part: int = part) -> dict[str, Any]:
            optimiser = torch.optim.LBFGS(
                list(parameters),
                max_iter=each,
                max_eval=2 * each,
                history_size=_MEMORY,
                tolerance_grad=0.0,
                tolerance_change=0.0,
                line_search_fn="strong_wolfe",
            )

            def closure() -> Tensor:
                optimiser.zero_grad()
                value = loss()
                value.backward()
                return value

            found = []
            for look in range(looks):
                optimiser.step(closure)
                found.append((each * (part * looks + look + 1), float(loss().detach())))
            return {"curve": found, "state": pack([p.detach() for p in parameters])}

        found = pieces(f"part{part}", stretch)
        curve += [(int(step), float(value)) for step, value in found["curve"]]
        with torch.no_grad():
            for p, kept in zip(parameters, unpack(found["state"]), strict=True):
                p.copy_(kept)
    return curve

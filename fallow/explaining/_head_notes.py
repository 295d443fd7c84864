"""What to make of a head's explanation, in words: what is exact, what the global minimum supposes."""

from __future__ import annotations

from fallow.explaining._head_noise import HeadNoise
from fallow.explaining._head_readings import Head
from fallow.explaining._head_result import HeadOptimum
from fallow.penalties import HeadPenalty, block_size_note
from fallow.schemes import Blocks


def notes(head: Head, noise: HeadNoise, best: HeadOptimum | None, missing: str | None) -> list[str]:
    """In the order a reader needs them; `missing` says why there is no optimum."""
    found = ["features are those of the network at evaluation; the standard error is over the masks"]
    if noise.silent:
        return [*found, "every survival rate is 1: there is no noise and no penalty"]
    found += {"quadratic": _squared, "cross_entropy": _entropy}.get(head.kind, _other)(noise)
    predictions = head.predictions
    if noise.penalty is not None:
        found.append(_of_penalty(head, noise.penalty))
    if isinstance(noise.scheme, Blocks) and bool(predictions.any()):
        found.append(block_size_note(predictions, min(noise.scheme.block_size, head.weight.shape[1])))
    if missing is not None:
        found.append(f"no distance to the global minimum: {missing}")
    return found if best is None else found + _of_optimum(best)


def _squared(noise: HeadNoise) -> list[str]:
    same = "; masks of weights penalise as masks of features do" if noise.weights else ""
    return [
        "the penalty is exact for a squared error, whatever makes the features, and the same for one mask a "
        f"batch and one a sample{same}"
    ]


def _entropy(noise: HeadNoise) -> list[str]:
    found = [
        "for cross-entropy the quadratic form is of second order in the noise: trust Monte Carlo where they "
        "differ. A distance to a global minimum is known for a squared error only"
    ]
    if noise.weights:
        found.append(
            "weights masked one by one are noise that is independent between the classes, which under "
            "cross-entropy is not that of masked features; Jensen's bound is for the latter"
        )
    return found


def _other(_: HeadNoise) -> list[str]:
    return [
        "the loss is neither a squared error nor a cross-entropy over the last dimension, told by its "
        "curvature: its penalty has no form of its own, Monte Carlo is unbiased all the same"
    ]


def _of_penalty(head: Head, penalty: HeadPenalty) -> str:
    if {"squared": "quadratic"}.get(penalty.loss, penalty.loss) != head.kind:
        return f"the HeadPenalty is made for {penalty.loss.replace('_', '-')}, which this loss is not"
    form = "exact penalty" if penalty.loss == "squared" else "quadratic form"
    form = "Jensen bound" if penalty.surrogate == "bound" else form
    return (
        f"training adds the {form} and draws no masks (HeadPenalty); Monte Carlo is what masks would have "
        "added on average"
    )


def _of_optimum(best: HeadOptimum) -> list[str]:
    over = "linear networks on these inputs" if best.linear else "networks that can fit anything"
    found = [
        f"the global minimum is that on these samples, over all {over} (A3), of the loss and this penalty "
        "alone (A1, A2): weight decay, BatchNorm on the features, noise elsewhere or a schedule move "
        "training away from it. It bounds every network from below in any case"
    ]
    if best.width < best.reachable_width:
        found.append(
            f"{best.width} features may be too few to reach the minimum, {best.reachable_width} are enough "
            "(A4)"
        )
    return found

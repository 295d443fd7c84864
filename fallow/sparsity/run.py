"""A model on its way to fewer weights, in the user's own loop."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fallow.errors import RunError, UsageError, check_count
from fallow.schedules import Schedule
from fallow.sparsity.base import Method
from fallow.sparsity.control import (
    Shortfall,
    Target,
    best_of_blocks,
    masks_for,
    rescue_words,
    shortfall_of,
)
from fallow.sparsity.weights import Weight

if TYPE_CHECKING:
    from fallow.sparsity.shrink import Shrunk

# The strength follows the share of zeros: by this factor for a share that is off by 1, within these bounds.
_GAIN, _MOST = 4.0, 1e6


class Sparsifier:
    """A model on its way to fewer weights; made by `sparsify`.

    Attributes:
        model: the user's model.
        weights: what is made sparse.
        strength: lambda, before the schedule and the controller.
        target: how the share is reached; None where survival rates decide.
        time: optimiser steps so far.
        rescued: weights of which the best group was kept that the target would have taken; with a multiple
            the best so many, which is the whole weight where it has no more.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: list[Weight],
        method: Method,
        strength: float,
        target: Target | None,
        schedule: Schedule | None,
        cut: float,
    ) -> None:
        self.model, self.weights, self.strength, self.target = model, weights, strength, target
        self.schedule, self.cut = schedule, cut
        self.time, self.rescued = 0, []
        self._method, self._factor = method, 1.0
        self._masks: list[Tensor] | None = None
        self._applied: list[Tensor] | None = None  # the masks that the factors are of
        self._factors: list[Tensor] = []

    @property
    def current_strength(self) -> float:
        """The strength in force now, schedule and controller applied."""
        share = 1.0 if self.schedule is None else float(self.schedule(self.time))
        return self.strength * share * self._factor

    def penalty(self) -> Tensor | float:
        """What to add to the loss, that of the current weights; 0 for methods that act after the step."""
        if self._settled():
            return 0.0
        return self._method.penalty(self.current_strength)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the method itself, for the optimiser.

        "eta", "variational" and "hardconcrete" have some; those of the latter two are the model's as well.
        """
        return self._method.parameters()

    def update(self) -> None:
        """Act after the optimiser's step, and before the scheduler's.

        Raises:
            RunError: a weight is not finite; weights and masks are as they were.
        """
        looks = self.target is not None and self.target.looks(self.time + 1)
        if looks:
            self._refuse_not_finite()
        if not self._settled():
            self._method.update(self.current_strength)
        self.time += 1
        if looks:
            self._control()
        self._apply_masks()
        if self._masks is not None:
            self._method.masked(self._masks)

    def _settled(self) -> bool:
        """Whether the target is reached: what is left trains on without a penalty."""
        return self.target is not None and self._masks is not None and self.time >= self.target.last

    def _refuse_not_finite(self) -> None:
        """Masks and zeros made from NaN would look like a result."""
        for weight in self.weights:
            if not bool(weight.parameter.detach().isfinite().all()):
                raise RunError(
                    f"{weight.name} has NaN or infinite entries after {self.time} steps: nothing was "
                    "changed; load the last checkpoint and lower the learning rate"
                )

    def _control(self) -> None:
        target = self.target
        assert target is not None
        wanted = target.wanted(self.time)
        ramp = target.control == "ramp" and not self._method.ramps
        if ramp or self.time == target.last:
            self._masks, rescued = masks_for(self.weights, self._scores(), wanted, target.multiple)
            # what was rescued stays so: a later look may find nothing to take that would show it
            self.rescued = [name for name in self._names() if name in rescued or name in self.rescued]
            if self.time == target.last:
                self._method.settle()
        elif target.control == "strength":
            factor = self._factor * math.exp(_GAIN * (wanted - self.sparsity()))
            self._factor = min(max(factor, 1 / _MOST), _MOST)

    def _scores(self) -> list[Tensor]:
        """The method's; what is masked already stays so, and so do the best N of M."""
        scores = [best_of_blocks(weight, self._method.score(weight)) for weight in self.weights]
        if self._masks is None:
            return scores
        return [score.masked_fill(~mask, -math.inf) for score, mask in zip(scores, self._masks, strict=True)]

    def _apply_masks(self) -> None:
        if self._masks is None:
            return
        if self._applied is not self._masks:  # a product with booleans takes five times as long
            found = zip(self.weights, self._masks, strict=True)
            self._factors = [weight.spread(mask.to(weight.parameter.dtype)) for weight, mask in found]
            self._applied = self._masks
        with torch.no_grad():
            for weight, factor in zip(self.weights, self._factors, strict=True):
                weight.parameter.mul_(factor)

    def remove(self) -> None:
        """Take what watches the model or puts noise on it off; the weights stay as they are.

        What is cut and plain is in `hardened`, before.
        """
        self._method.remove()

    # --- what there is --------------------------------------------------------------------------------------

    def survival_rates(self) -> dict[str, Tensor]:
        """Keep probability of each group of each weight, by the weight's name; 0 where it is masked."""
        strength, rates = self.current_strength, {}
        for i, weight in enumerate(self.weights):
            rate = self._method.rate(weight, strength)
            rates[weight.name] = rate if self._masks is None else rate * self._masks[i]
        return rates

    def masks(self) -> dict[str, Tensor]:
        """True = kept: the groups that are not zero in the end, as of now.

        Of a weight of which survival rates leave nothing the best group stays.
        """
        return dict(zip(self._names(), self._kept()[0], strict=True))

    def _kept(self) -> tuple[list[Tensor], list[str]]:
        """The masks, and the weights that would be empty."""
        if self._masks is not None:
            kept = self._masks
        elif self.target is not None and self.target.control == "ramp":
            kept = [torch.ones_like(w.magnitude(), dtype=torch.bool) for w in self.weights]
        else:
            kept = [rate >= self.cut for rate in self.survival_rates().values()]
        masks, saved = [], []
        for weight, mask in zip(self.weights, kept, strict=True):
            there = weight.magnitude(self._method.final(weight)) > 0
            mask = mask & there
            if not bool(mask.any()):
                saved.append(weight.name)
                if not bool(there.any()):  # cut to 0 by the method itself
                    there = weight.magnitude() > 0
                score = self._method.score(weight).masked_fill(~there, -math.inf)
                best = torch.unravel_index(score.argmax(), score.shape)
                mask[best] = there[best]
            masks.append(mask)
        return masks, saved

    def sparsity(self) -> float:
        """The share of the chosen weights that is zero in the end, as of now."""
        found = zip(self.weights, self.masks().values(), strict=True)
        kept = sum(int(mask.sum()) * weight.members for weight, mask in found)
        return 1 - kept / sum(w.parameter.numel() for w in self.weights)

    def stayed(self) -> dict[str, str]:
        """In words, what was kept of each weight in `rescued`."""
        multiple = 1 if self.target is None else self.target.multiple
        counts = {weight.name: weight.count for weight in self.weights}
        return {name: rescue_words(counts[name], multiple) for name in self.rescued}

    def shortfall(self) -> Shortfall | None:
        """How the target was missed; None where it is not due, or is met to one group, or one pack."""
        if self.target is None or self.time < self.target.last:
            return None
        return shortfall_of(self.weights, [*self.masks().values()], self.target.share, self.target.multiple)

    def harden(self) -> None:
        """Set what is cut to zero in the model itself, at the end of the training.

        Raises:
            RunError: a weight is not finite; nothing was changed.
        """
        self._refuse_not_finite()
        masks, saved = self._kept()
        self.rescued = [name for name in self._names() if name in self.rescued or name in saved]
        with torch.no_grad():
            for weight, mask in zip(self.weights, masks, strict=True):
                weight.parameter.mul_(weight.spread(mask))

    def hardened(self) -> nn.Module:
        """A plain copy of the model with zeros in it, noise taken off; the model stays as it is."""
        before = [weight.parameter.detach().clone() for weight in self.weights]
        try:
            self.harden()
            with self._method.off():
                copied = copy.deepcopy(self.model)
            self._method.strip(copied)
            return copied
        finally:
            with torch.no_grad():
                for weight, value in zip(self.weights, before, strict=True):
                    weight.parameter.copy_(value)

    def shrink(self, example: Any) -> Shrunk:
        """A smaller model of plain modules without what is zero, as `fallow.sparsity.shrink` makes it.

        The model and the run stay as they are, whatever happens.
        """
        from fallow.sparsity.shrink import shrink

        return shrink(self.hardened(), example)

    # --- checkpoints ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Time, controller, masks and the method's memory; `torch.load` takes it with ``weights_only``."""
        masks = None if self._masks is None else dict(zip(self._names(), self._masks, strict=True))
        return {
            "time": self.time,
            "factor": self._factor,
            "masks": masks,
            "rescued": list(self.rescued),
            "method": self._method.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a run with the same arguments was.

        Raises:
            UsageError: the state is of other weights; nothing is changed.
        """
        masks = state["masks"]
        if masks is not None and [*masks] != self._names():
            raise UsageError("the state is of a run with other weights: pass the same include and exclude")
        self.time = check_count("time", state["time"])
        self._factor, self.rescued = float(state["factor"]), list(state["rescued"])
        self._masks = None
        if masks is not None:
            self._masks = [masks[w.name].to(w.parameter.device) for w in self.weights]
        self._method.load(dict(state["method"]))

    def _names(self) -> list[str]:
        return [weight.name for weight in self.weights]

    def __str__(self) -> str:
        """A line for each weight: how many of its groups are left."""
        lines = [f"{self.sparsity():.2%} of {len(self.weights)} weights zero after {self.time} steps"]
        for weight, mask in zip(self.weights, self.masks().values(), strict=True):
            kind = "" if weight.groups == "weights" else f" {weight.groups}"
            lines.append(f"  {weight.name}: {int(mask.sum())} of {weight.count}{kind}")
        lines += [f"  {name} {words}" for name, words in self.stayed().items()]
        short = self.shortfall()
        if short is not None:
            lines.append(f"  the target was not met: {short}")
        return "\n".join(lines)

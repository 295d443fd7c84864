"""The two presets: Huang's SGD with two drops of the learning rate, and AdamW with a cosine."""

from __future__ import annotations

import math

import torch
from torch import nn

from fallow.recipes._config import Config


def optimiser(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The preset's optimiser; of a settled configuration.

    huang: SGD with Nesterov momentum .9 and weight decay on every parameter. adamw: decay on matrices alone,
    not on biases, norms and other vectors.

    References:
        Huang et al. 2016, section 4; Loshchilov and Hutter 2019.
    """
    rate, decay = config.learning_rate, config.weight_decay
    assert rate is not None and decay is not None
    if config.preset == "huang":
        return torch.optim.SGD(model.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=decay)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, rate)


def learning_rate(step: int, per_epoch: int, config: Config) -> float:
    """The learning rate of a step, counted from 0.

    Both rise linearly first, for `learning_rate_warmup` epochs. huang: then the peak, a tenth of it from half
    of the epochs on, a hundredth from three quarters on. adamw: then a cosine to zero.
    """
    peak, rise, epochs = config.learning_rate, config.learning_rate_warmup, config.epochs
    assert peak is not None and rise is not None and epochs is not None
    done = step / per_epoch
    if done < rise:
        return peak * min((step + 1) / (rise * per_epoch), 1.0)
    if config.preset == "huang":
        return peak * (0.1 if done >= epochs / 2 else 1.0) * (0.1 if done >= epochs * 3 / 4 else 1.0)
    return peak * 0.5 * (1 + math.cos(math.pi * (done - rise) / max(epochs - rise, 1e-9)))

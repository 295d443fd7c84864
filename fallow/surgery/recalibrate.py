"""Re-estimate BatchNorm statistics for the network as it is at evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fallow.errors import UsageError
from fallow.feed import call_model, inputs_of


def recalibrate(model: nn.Module, batches: Iterable[Any]) -> None:
    """Replace running statistics by the average over ``batches``, equal weight each; all or nothing."""
    norms = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    flags = [(m, m.training) for m in model.modules()]
    momenta = [m.momentum for m in norms]
    before = [{name: b.clone() for name, b in m.named_buffers(recurse=False)} for m in norms]
    model.eval()
    done = False
    try:
        for m in norms:
            m.reset_running_stats()
            m.train()
            m.momentum = None  # cumulative average
        with torch.no_grad():
            for batch in batches:
                call_model(model, inputs_of(batch))
                done = True
        if not done:
            raise UsageError("recalibrate got no batch: pass at least one batch of inputs")
    except BaseException:
        for m, buffers in zip(norms, before, strict=True):
            m.load_state_dict(buffers, strict=False)
        raise
    finally:
        for m, momentum in zip(norms, momenta, strict=True):
            m.momentum = momentum
        for m, training in flags:
            m.training = training

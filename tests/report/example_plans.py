"""A plan and an explanation like those that the commands write, made without measuring anything."""

from __future__ import annotations

import math
from typing import Any

SITES = 24


def example_plan() -> dict[str, Any]:
    """Every call makes a new one, to be changed at will."""
    sites = [
        {
            "name": f"blocks.{i // 2}.{'mlp' if i % 2 else 'attn'}",
            "rate": 1.0 if i % 5 == 1 else 0.55 + 0.3 * math.sin(i),
            "cost": 0.046 if i % 2 else 0.037,
            "sensitivity": 0.004 + 0.003 * math.cos(2.1 * i),
        }
        for i in range(SITES)
    ]
    return {
        "schema": 1,
        "kind": "plan",
        "method": "sensemode",
        "asked": "auto",
        "budget": 0.7,
        "cost_kind": "flops",
        "expected_cost": 0.7,
        "expected_depth": 16.4,
        "droppable": 0.995,
        "sites": sites,
        "notes": ["auto took sensemode: the blocks differ"],
        "settings": {
            "model": "timm:vit_tiny_patch16_224",
            "weights": "random",
            "data": "digits",
            "inputs": "1x224x224",
            "gamma": 1.0,
            "samples": 64,
        },
        "provenance": {"fallow": "0.1.0", "torch": "2.13.0"},
    }


def example_explanation() -> dict[str, Any]:
    """Every call makes a new one, to be changed at will."""
    sites = [
        {
            "name": f"group{i // 3 + 1}.{i % 3}",
            "rate": 1 - 0.05 * (i + 1),
            "noise": 0.05 * (i + 1),
            "hessian": 0.01 + 0.002 * i,
            "bregman": 0.011 + 0.002 * i,
            "linearised": None if i == 4 else 0.012 + 0.002 * i,
            "linearised_error": 0.0,
            "alone": 0.009 + 0.002 * i,
            "monte_carlo": 0.02 + 0.004 * i,
            "monte_carlo_error": 0.002,
            "share": 0.01,
        }
        for i in range(9)
    ]
    totals = {
        "regulariser": 0.211,
        "regulariser_error": 0.0055,
        "plug_in": 0.2,
        "sums": {
            "hessian": 0.16,
            "bregman": 0.21,
            "linearised": None,
            "alone": 0.15,
            "monte_carlo": 0.29,
        },
        "ratios": {
            "hessian": 0.76,
            "bregman": 1.0,
            "linearised": None,
            "alone": 0.71,
            "monte_carlo": 1.37,
        },
        "verdicts": {"hessian": "off", "bregman": "holds", "alone": "undecided", "monte_carlo": "off"},
        "sum_error": 0.017,
        "noise_mass": 1.775,
        "noise": 8.46,
        "loss_full": 2.0121,
        "loss_evaluation": 2.0122,
        "loss_noisy": 2.275,
        "loss_noisy_error": 0.01,
        "loss_mean_output": 2.064,
    }
    return {
        "schema": 1,
        "kind": "explanation",
        "loss": "cross_entropy",
        "scale": "train",
        "mode": "row",
        "samples": 64,
        "draws": 64,
        "sites": sites,
        "totals": totals,
        "notes": ["standard errors are over the masks, given these samples"],
        "settings": {"model": "runs/digits", "rates": "of the run"},
        "provenance": {"fallow": "0.1.0"},
    }


def example_head() -> dict[str, Any]:
    """The part of an explanation on noise in front of the head; every call makes a new one."""
    return {
        "schema": 1,
        "kind": "head_explanation",
        "name": "fc",
        "scheme": "Blocks(survival_rate=0.5, block_size=8, grid='disjoint')",
        "source": "drop (BlockDropout)",
        "loss_kind": "quadratic",
        "width": 64,
        "outputs": 10,
        "samples": 64,
        "draws": 64,
        "loss": 0.5,
        "exact": 0.25,
        "quadratic": None,
        "jensen": None,
        "monte_carlo": 0.2,
        "monte_carlo_error": 0.02,
        "share": 1 / 3,
        "kappa": 0.125,
        "effective_rank": 3.2,
        "optimum": {
            "objective": 0.75,
            "bound": 0.5,
            "minimum": 0.6,
            "best_head": 0.7,
            "above": 0.25,
            "spectrum": [9.0, 4.0, 2.0, 0.5],
            "optimal_spectrum": [6.0, 5.0, 2.0],
        },
        "notes": ["at block size 8 DropBlock is more than Dropout here"],
        "settings": {"batches": 2},
        "provenance": {"fallow": "0.1.0"},
    }

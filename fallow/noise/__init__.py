"""Structured noise, one method a file."""

from fallow.noise._handle import plain_state_dict
from fallow.noise.drop_path import DropPath, drop_path
from fallow.noise.dropblock import (
    DropBlock1d,
    DropBlock2d,
    DropBlock3d,
    drop_block1d,
    drop_block2d,
    drop_block3d,
    drop_block_mask,
)
from fallow.noise.dropconnect import DropConnect, drop_connect, drop_connect_, drop_connect_mask
from fallow.noise.feature_dropout import BlockDropout, FeatureDropout, block_dropout, feature_dropout
from fallow.noise.hard_concrete import HardConcreteGates, hard_concrete_, hard_concrete_gate, open_probability
from fallow.noise.standout import StandoutNoise, standout, standout_
from fallow.noise.stochastic_depth import StochasticDepth, stochastic_depth
from fallow.noise.targeted import TargetedDropout, targeted_dropout, targeted_dropout_
from fallow.noise.variational import VariationalNoise, molchanov_kl, variational_
from fallow.noise.weight_dropout import WeightDropout, weight_dropout, weight_dropout_

__all__ = [
    "BlockDropout",
    "DropBlock1d",
    "DropBlock2d",
    "DropBlock3d",
    "DropConnect",
    "DropPath",
    "FeatureDropout",
    "HardConcreteGates",
    "StandoutNoise",
    "StochasticDepth",
    "TargetedDropout",
    "VariationalNoise",
    "WeightDropout",
    "block_dropout",
    "drop_block1d",
    "drop_block2d",
    "drop_block3d",
    "drop_block_mask",
    "drop_connect",
    "drop_connect_",
    "drop_connect_mask",
    "drop_path",
    "feature_dropout",
    "hard_concrete_",
    "hard_concrete_gate",
    "molchanov_kl",
    "open_probability",
    "plain_state_dict",
    "standout",
    "standout_",
    "stochastic_depth",
    "targeted_dropout",
    "targeted_dropout_",
    "variational_",
    "weight_dropout",
    "weight_dropout_",
]

"""Structured noise, one method a file."""

from fallow.noise.stochastic_depth import StochasticDepth, stochastic_depth

__all__ = ["StochasticDepth", "stochastic_depth"]

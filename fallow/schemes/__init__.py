"""Laws of one random mask over the features of a layer, and the matrix that says what each penalises.

A scheme says how the multipliers of d features are drawn. With z of mean mu and covariance C they are always
``z / mu``, so their mean is 1, and their covariance is the characteristic matrix ``C_ij / (mu_i mu_j)``:
under squared loss on a linear map a scheme acts through this matrix alone. Noise draws from schemes,
penalties compute from them.

References:
    Pal et al. 2020 name the framework; the matrices are derived.
"""

from fallow.schemes._base import Masks, Scheme, characteristic_matrix, odds
from fallow.schemes._blocks import Blocks, UnitsInBlocks
from fallow.schemes._features import Exchangeable, FixedSize, Layer, Units
from fallow.schemes._normal import Correlated, Gaussian

__all__ = [
    "Blocks",
    "Correlated",
    "Exchangeable",
    "FixedSize",
    "Gaussian",
    "Layer",
    "Masks",
    "Scheme",
    "Units",
    "UnitsInBlocks",
    "characteristic_matrix",
    "odds",
]

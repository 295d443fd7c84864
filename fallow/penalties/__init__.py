"""Penalties and what structured dropout minimises: functions first, one object for each penalty."""

from fallow.penalties._factors import balanced_factors
from fallow.penalties.ard import ARD, VectorARD
from fallow.penalties.certificate import Certificate, duality_gap, network_gap
from fallow.penalties.class_activation import class_activation_omega
from fallow.penalties.concave import MCP, SCAD, GemanMcClure, Welsch
from fallow.penalties.engine import FromStrategy, from_eta, from_survival_rate
from fallow.penalties.hard_concrete import HardConcrete, gate_moments
from fallow.penalties.hard_threshold import HardThreshold
from fallow.penalties.head import HeadPenalty
from fallow.penalties.ksupport import (
    KSupport,
    ksupport_dual_norm,
    ksupport_gradient,
    ksupport_prox,
    ksupport_sq,
)
from fallow.penalties.logarithmic import Log2Sum, LogSum
from fallow.penalties.minimiser import (
    Minimiser,
    adaptive_survival_rate,
    closed_form,
    dropblock_objective,
    effective_gamma,
)
from fallow.penalties.mixed import closed_form_mixed, closed_form_of
from fallow.penalties.omega import acts_as_dropout, block_size_note, effective_rank, kappa, omega
from fallow.penalties.powers import LpNorm, Ridge
from fallow.penalties.registry import NAMES, penalty
from fallow.penalties.separable import Separable
from fallow.penalties.spectral import (
    SpectralKSupport,
    spectral_ksupport_dual_norm,
    spectral_ksupport_gradient,
    spectral_ksupport_prox,
    spectral_ksupport_sq,
)
from fallow.penalties.standout import Standout
from fallow.penalties.surrogates import jensen_bound, quadratic_surrogate
from fallow.penalties.targeted import Targeted, TargetedThreshold
from fallow.penalties.variational_dropout import MolchanovFit, VariationalDropout
from fallow.special import dawson, variational_kl

__all__ = [
    "ARD",
    "MCP",
    "NAMES",
    "SCAD",
    "Certificate",
    "FromStrategy",
    "GemanMcClure",
    "HardConcrete",
    "HardThreshold",
    "HeadPenalty",
    "KSupport",
    "Log2Sum",
    "LogSum",
    "LpNorm",
    "Minimiser",
    "MolchanovFit",
    "Ridge",
    "Separable",
    "SpectralKSupport",
    "Standout",
    "Targeted",
    "TargetedThreshold",
    "VariationalDropout",
    "VectorARD",
    "Welsch",
    "acts_as_dropout",
    "adaptive_survival_rate",
    "balanced_factors",
    "block_size_note",
    "class_activation_omega",
    "closed_form",
    "closed_form_mixed",
    "closed_form_of",
    "dawson",
    "dropblock_objective",
    "duality_gap",
    "effective_gamma",
    "effective_rank",
    "from_eta",
    "from_survival_rate",
    "gate_moments",
    "jensen_bound",
    "kappa",
    "ksupport_dual_norm",
    "ksupport_gradient",
    "ksupport_prox",
    "ksupport_sq",
    "network_gap",
    "omega",
    "penalty",
    "quadratic_surrogate",
    "spectral_ksupport_dual_norm",
    "spectral_ksupport_gradient",
    "spectral_ksupport_prox",
    "spectral_ksupport_sq",
    "variational_kl",
]

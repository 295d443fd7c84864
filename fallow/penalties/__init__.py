"""Penalties and what structured dropout minimises: functions first, one object for each penalty."""

from fallow.penalties._factors import balanced_factors
from fallow.penalties.certificate import Certificate, duality_gap, network_gap
from fallow.penalties.ksupport import (
    KSupport,
    ksupport_dual_norm,
    ksupport_gradient,
    ksupport_prox,
    ksupport_sq,
)
from fallow.penalties.minimiser import (
    Minimiser,
    adaptive_survival_rate,
    closed_form,
    dropblock_objective,
    effective_gamma,
)
from fallow.penalties.spectral import (
    SpectralKSupport,
    spectral_ksupport_dual_norm,
    spectral_ksupport_gradient,
    spectral_ksupport_prox,
    spectral_ksupport_sq,
)

__all__ = [
    "Certificate",
    "KSupport",
    "Minimiser",
    "SpectralKSupport",
    "adaptive_survival_rate",
    "balanced_factors",
    "closed_form",
    "dropblock_objective",
    "duality_gap",
    "effective_gamma",
    "ksupport_dual_norm",
    "ksupport_gradient",
    "ksupport_prox",
    "ksupport_sq",
    "network_gap",
    "spectral_ksupport_dual_norm",
    "spectral_ksupport_gradient",
    "spectral_ksupport_prox",
    "spectral_ksupport_sq",
]

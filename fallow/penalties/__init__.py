"""Penalties and what structured dropout minimises: functions first, one object for each penalty."""

from fallow.penalties.ksupport import (
    KSupport,
    ksupport_dual_norm,
    ksupport_gradient,
    ksupport_prox,
    ksupport_sq,
)
from fallow.penalties.spectral import (
    SpectralKSupport,
    spectral_ksupport_dual_norm,
    spectral_ksupport_gradient,
    spectral_ksupport_prox,
    spectral_ksupport_sq,
)

__all__ = [
    "KSupport",
    "SpectralKSupport",
    "ksupport_dual_norm",
    "ksupport_gradient",
    "ksupport_prox",
    "ksupport_sq",
    "spectral_ksupport_dual_norm",
    "spectral_ksupport_gradient",
    "spectral_ksupport_prox",
    "spectral_ksupport_sq",
]

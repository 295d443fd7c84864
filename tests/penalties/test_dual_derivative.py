"""The dual functions under autograd: what the eta-trick's joint descent and variable projection follow."""

import pytest
import torch

from fallow.penalties import from_eta
from fallow.penalties.registry import NAMES, penalty

# The ridge's dual is an indicator; the others need numbers of their own.
SMOOTH = [
    name for name, entry in NAMES.items() if entry.separable and name not in ("ridge", "targetedthreshold")
]


@pytest.mark.parametrize("name", SMOOTH)
def test_the_derivative_of_the_dual_is_its_difference_quotient(name: str) -> None:
    omega = penalty(name, **({"p": 0.5} if name == "lp" else {}))
    eta = torch.logspace(-2.03, 2, 9, dtype=torch.float64).requires_grad_()
    (found,) = torch.autograd.grad(omega.dual(eta).sum(), eta)
    with torch.no_grad():
        quotient = (omega.dual(eta * (1 + 1e-6)) - omega.dual(eta * (1 - 1e-6))) / (2e-6 * eta)
    torch.testing.assert_close(found, quotient, rtol=1e-5, atol=1e-6)


def test_the_engines_dual_has_the_weight_in_its_derivative() -> None:
    eta = torch.logspace(-2, 2, 9, dtype=torch.float64).requires_grad_()
    omega = from_eta(lambda w: w * (w + 0.5))
    (found,) = torch.autograd.grad(omega.dual(eta).sum(), eta)
    w = (-0.5 + (0.25 + 4 * eta.detach()).sqrt()) / 2  # the root of w (w + 1/2) = eta
    torch.testing.assert_close(found, w.square() / eta.detach().square(), rtol=1e-8, atol=0)

"""What every test starts from: one thread, a fixed seed, a torchvision that imports."""

import pytest
import torch

from fallow import models
from fallow.integrations import mend_torchvision

# Several threads on a busy machine are slower than one, and sums in another order differ in the last digits.
torch.set_num_threads(1)
mend_torchvision()


@pytest.fixture(autouse=True)
def _same_seed_for_every_test() -> None:
    torch.manual_seed(0)


@pytest.fixture
def resnet8(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network by name that is smaller than any of the package's."""
    monkeypatch.setitem(models.MODELS, "resnet8", lambda **options: models.CifarResNet(8, **options))

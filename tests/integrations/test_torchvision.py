"""The mend of torchvision, on stand-ins that fail as the real one does and as it does not."""

import subprocess
import sys
from pathlib import Path

import pytest

# How torchvision fails beside a torch that its compiled part does not fit: in a submodule, half-way.
BROKEN = """
from torchvision import operators
import torch

@torch.library.register_fake("torchvision::nms")
def nms(dets, scores, iou_threshold):
    return dets
"""

REPORT = """
import sys
from fallow.integrations import mend_torchvision
from fallow.errors import MissingExtra

def outcome(function):
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

print(outcome(mend_torchvision))
print(outcome(mend_torchvision))
print("torchvision" in sys.modules)
import torch
print(hasattr(torch.ops.torchvision, "nms"))
"""


@pytest.fixture
def outcome(tmp_path: Path):
    """Runs code where `torchvision` is the given source, and returns the printed lines."""

    def run(source: str, code: str = REPORT) -> list[str]:
        package = tmp_path / "torchvision"
        package.mkdir()
        (package / "__init__.py").write_text(source)
        (package / "operators.py").write_text("")
        code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{code}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


def test_missing_operators_are_declared_once(outcome):
    assert outcome(BROKEN) == ["True", "True", "True", "True"]


def test_an_import_that_works_is_left_alone(outcome):
    assert outcome("") == ["False", "False", "True", "False"]


def test_another_failure_shows_itself(outcome):
    message = "RuntimeError: something else is wrong"
    assert outcome("raise RuntimeError('something else is wrong')") == [message, message, "False", "False"]


def test_without_the_packages_the_extra_is_named(outcome):
    code = """
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torchvision", "timm", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

import sys
sys.meta_path.insert(0, Absent())
from fallow.integrations import mend_torchvision, need_timm, need_transformers
from fallow.errors import MissingExtra
print(mend_torchvision())
for need in (need_timm, need_transformers):
    try:
        need()
    except MissingExtra as error:
        print(error)
"""
    assert outcome("", code) == [
        "False",
        "this needs timm, which is not installed: pip install 'fallow[models]'",
        "this needs transformers, which is not installed: pip install 'fallow[models]'",
    ]


def test_the_models_that_need_torchvision_import_here():
    pytest.importorskip("timm", reason="timm is not installed")
    from fallow.integrations import need_timm, need_transformers

    assert need_timm().__name__ == "timm"
    assert need_transformers().ViTModel.__name__ == "ViTModel"

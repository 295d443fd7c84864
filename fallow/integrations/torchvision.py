"""Importing torchvision, and what needs it, where its compiled part does not fit the installed torch.

torchvision's wheels link CUDA. Beside a CPU build of torch, or one of another version, their compiled
operators do not load, and `import torchvision` fails because one of them, nms, is missing; timm and the image
models of transformers fail with it. Models and transforms need none of these operators, so it is enough that
they are declared.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

from fallow.errors import need

_OPERATORS = ("nms", "qnms")
_SYMPTOM = "torchvision::nms does not exist"

# The declarations last as long as the object that made them.
_declarations: list[torch.library.Library] = []


def mend_torchvision() -> bool:
    """Make `import torchvision` work where only its compiled operators are missing.

    Does nothing where torchvision imports, is not installed, or fails for another reason, which then shows
    itself when it is imported. Afterwards its models and transforms work; nms and image decoding do not, as
    before.

    Returns:
        Whether the operators are declared in place of torchvision's own.
    """
    if _declarations:
        return True
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return False
    except RuntimeError as error:
        if _SYMPTOM not in str(error):
            raise
        _declare()
        importlib.import_module("torchvision")
        return True
    return False


def need_timm() -> ModuleType:
    """Import timm.

    Raises:
        MissingExtra: Where it is not installed.
    """
    mend_torchvision()
    return need("timm", "models")


def need_transformers() -> ModuleType:
    """Import Hugging Face's transformers; its image models import torchvision later.

    Raises:
        MissingExtra: Where it is not installed.
    """
    mend_torchvision()
    return need("transformers", "models")


def _declare() -> None:
    """Declare the operators, and forget the modules of the import that failed half-way."""
    library = torch.library.Library("torchvision", "DEF")
    for name in _OPERATORS:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declarations.append(library)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]

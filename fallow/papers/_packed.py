"""Tensors as text, for what a long cell keeps between its parts."""

from __future__ import annotations

import base64
import io
from typing import Any

import torch


def pack(state: Any) -> str:
    """Tensors in lists and mappings as text, bit for bit."""
    file = io.BytesIO()
    torch.save(state, file)
    return base64.b64encode(file.getvalue()).decode()


def unpack(text: str) -> Any:
    """The tensors again, on the CPU."""
    return torch.load(io.BytesIO(base64.b64decode(text)), map_location="cpu", weights_only=True)

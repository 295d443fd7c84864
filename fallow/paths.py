"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(path: str | os.PathLike[str]) -> Path:
    """With ``~`` as the home folder; where there is no such user it stays, and the path is missed as any."""
    return Path(os.path.expanduser(path))

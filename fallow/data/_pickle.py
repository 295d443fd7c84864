"""Pickles of plain values and numpy arrays, and of nothing else.

A pickle is a program: plain `pickle.load` of a file from the network runs what its author wrote. Here the
only names it may call are the functions below, which rebuild arrays of numbers: the worst it can do is fail.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np

from fallow.errors import DataError


def load_arrays(data: bytes, where: object) -> Any:
    """The object in a pickle of dicts, lists, strings, numbers and numpy arrays; Python 2's come as bytes.

    Raises:
        DataError: the pickle names anything else, or it is cut short or corrupt.
    """
    try:
        return _ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
    except _Forbidden as error:
        raise DataError(
            f"{where}: this pickle asks for {error}, and only plain values and arrays of numbers are read "
            "from one: it is not the published file, so do not open it elsewhere; fetch it again."
        ) from error
    except Exception as error:  # corrupt bytes can make the pickle machine fail in any way
        kind = type(error).__name__
        raise DataError(
            f"{where}: not a whole pickle ({kind}: {error}): it is corrupt or cut short; fetch it again."
        ) from error


class _Forbidden(Exception):
    """What a pickle asked for that it does not get."""


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        """The one place where a pickle gets at code."""
        # numpy 2 moved numpy.core to numpy._core; the published files know the old name.
        name = f"{module_name}.{global_name}".replace("numpy._core", "numpy.core")
        if name not in _ALLOWED:
            raise _Forbidden(name)
        return _ALLOWED[name]

    def persistent_load(self, pid: Any) -> Any:
        """References to objects outside the pickle: never in these sets."""
        raise _Forbidden("an object outside itself")


def _dtype(name: str | bytes, *_flags: object) -> np.dtype[Any]:
    """A type of numbers by its name, as "u1"."""
    kind = np.dtype(name.decode("ascii") if isinstance(name, bytes) else name)
    if kind.kind not in "biuf":
        raise _Forbidden(f"an array of {kind}")
    return kind


def _empty(*_arguments: object) -> np.ndarray:
    """The array that a pickle fills by its state (numpy's _reconstruct; its arguments never vary)."""
    return np.empty(0, np.uint8)


def _frombuffer(buffer: bytes, kind: np.dtype[Any], shape: tuple[int, ...], order: Any) -> np.ndarray:
    """What protocol 5 calls."""
    return np.frombuffer(buffer, kind).reshape(shape, order=order)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """How Python 3 writes bytes in protocol 2; other codecs are refused."""
    if encoding != "latin1":
        raise _Forbidden(f"the codec {encoding}")
    return text.encode("latin1")


_ALLOWED: dict[str, object] = {
    "numpy.ndarray": "the class that _reconstruct is told of; a word here, since nothing may call it",
    "numpy.dtype": _dtype,
    "numpy.core.multiarray._reconstruct": _empty,
    "numpy.core.numeric._frombuffer": _frombuffer,
    "_codecs.encode": _encode,
}

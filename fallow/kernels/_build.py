"""The compiled library: built on first use as torch's extensions are, kept, and done without."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

_SOURCE = Path(__file__).with_name("dropblock.cpp")
_INCLUDED = tuple(Path(__file__).with_name(name) for name in ("weights.h", "learned.h"))
_COMMON = tuple("-O3 -std=c++17 -shared -fPIC -fno-exceptions -fno-math-errno -ffp-contract=off".split())
# Tried in this order: what the compiler knows of the processor and of threads differs.
_FLAGS = (("-march=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",), ())
_TIMEOUT = 60.0  # seconds for all of them together
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_OFF = ("0", "off", "false", "no")

_log = logging.getLogger("fallow")
_lock = threading.Lock()


@dataclass(frozen=True)
class Availability:
    """Whether the compiled kernels are used; true or false by itself.

    Attributes:
        used: they are.
        reason: why not; empty where they are.
    """

    used: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.used


class State:
    """What this process has: nothing yet, the library and the dtypes it takes, or why there is none."""

    library: ctypes.CDLL | None = None
    codes: ClassVar[dict[torch.dtype, int]] = {}
    reason: str = ""
    asked: bool = False
    paused: int = 0


def available() -> Availability:
    """Whether this process uses the compiled kernels, and why not; builds them if nothing has yet.

    They are built once for a compiler and processor, in a few seconds, at the first call that gains from it:
    with ``$CXX``, else ``c++``, into ``$TORCH_EXTENSIONS_DIR/fallow``, else ``$XDG_CACHE_HOME/fallow``
    (``~/.cache/fallow``). Where that fails, and under ``FALLOW_KERNELS=0``, which is looked at once, the same
    results come from torch's own operations.

    Examples:
        >>> bool(available()) == (available().reason == "")
        True
    """
    if State.paused:
        return Availability(False, "fallow.kernels.plain() is in force")
    return Availability(library() is not None, State.reason)


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Torch's own operations in place of the compiled kernels, in all threads, for comparisons.

    Examples:
        >>> with plain():
        ...     bool(available())
        False
    """
    State.paused += 1
    try:
        yield
    finally:
        State.paused -= 1


def library() -> ctypes.CDLL | None:
    """The library, built and loaded at the first call; None for the rest of the process if that fails."""
    if not State.asked:
        with _lock:
            if not State.asked:
                try:
                    State.library = _load_or_build()
                    takes = State.library.fallow_dropblock_takes
                    State.codes = {dtype: code for dtype, code in _DTYPES.items() if takes(code)}
                except Exception as error:  # whatever it is, the plain form does the work
                    State.reason = f"{error}" or type(error).__name__
                    _log.debug("no compiled kernels: %s", State.reason)
                State.asked = True
    return State.library


class _CannotBuild(Exception):
    """Why there will be no library."""


def _load_or_build() -> ctypes.CDLL:
    if (wish := os.environ.get("FALLOW_KERNELS", "")).lower() in _OFF:
        raise _CannotBuild(f"FALLOW_KERNELS={wish} switches them off")
    compiler = _compiler()
    folder = _folder()
    path = folder / f"dropblock-{_key(compiler)}.so"
    if path.exists():
        try:
            return _load(path)
        except (OSError, AttributeError):
            pass  # a file of another system, or a damaged one: made anew
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _CannotBuild(f"{folder} cannot be written ({error}); set TORCH_EXTENSIONS_DIR") from error
    deadline, complaint = time.monotonic() + _TIMEOUT, ""
    for flags in _FLAGS:
        # a name of its own until it is whole: other processes may be at it, or waiting to load it
        with tempfile.TemporaryDirectory(dir=folder, prefix="building-") as part:
            built = Path(part) / path.name
            complaint = _compile([*compiler, *_COMMON, *flags, str(_SOURCE), "-o", str(built)], deadline)
            if not complaint:
                try:
                    found = _load(built)
                except (OSError, AttributeError) as error:
                    complaint = str(error)
                    continue
                os.replace(built, path)
                return found
    raise _CannotBuild(f"{shlex.join(compiler)} does not compile them: {complaint}")


def _load(path: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(path))
    found.fallow_dropblock_takes.argtypes = [ctypes.c_int32]
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    found.fallow_dropblock.argtypes = [
        *(pointer, pointer, ctypes.c_double, ctypes.c_uint64),
        *(pointer, pointer, ctypes.c_double, pointer, pointer, number, number),
    ]
    size = ctypes.c_double
    found.fallow_logsum.argtypes, found.fallow_logsum.restype = [pointer, pointer, number, size, size], size
    found.fallow_logsum_adaprox.argtypes = [pointer, pointer, number, size, size, size, size]
    found.fallow_logsum_prox.argtypes = [pointer, pointer, number, size, size, size]
    found.fallow_logsum_adaprox.restype = found.fallow_logsum_prox.restype = None
    flag = ctypes.c_int32
    found.fallow_disturbed.argtypes = [*[pointer] * 4, number, flag, size]
    found.fallow_disturbed_back.argtypes = [*[pointer] * 6, number, flag, size]
    found.fallow_disturbed.restype = found.fallow_disturbed_back.restype = None
    found.fallow_diverged.argtypes = [*[pointer] * 4, number, flag, size, pointer, flag, size, size]
    found.fallow_diverged.restype = size
    found.fallow_eta_trick.argtypes, found.fallow_eta_trick.restype = (
        [*[pointer] * 4, number, size, size],
        size,
    )
    return found


def _compiler() -> list[str]:
    """The compiler's command, as torch.utils.cpp_extension.get_cxx_compiler has it.

    That module is not imported: it takes longer than the build's answer from the cache, and setuptools.
    """
    if sys.platform == "win32":
        raise _CannotBuild("they are not built on Windows")
    command = shlex.split(os.environ.get("CXX", "c++"))
    found = shutil.which(command[0]) if command else None
    if found is None:
        raise _CannotBuild(f"there is no C++ compiler {command[0] if command else ''}; set CXX to one")
    return [found, *command[1:]]


def _folder() -> Path:
    if root := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(root) / "fallow"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fallow"


def _key(compiler: list[str]) -> str:
    """Of everything that makes another library: home directories are shared by unlike machines."""
    program = os.stat(os.path.realpath(compiler[0]))  # its version, without the time to ask for it
    parts = (
        _SOURCE.read_bytes(),
        *(path.read_bytes() for path in _INCLUDED),
        *map(str, (compiler, program.st_size, program.st_mtime_ns, _COMMON, _FLAGS, sys.platform)),
        *(platform.machine(), *platform.libc_ver(), _processor()),
    )
    joined = b"\0".join(part.encode() if isinstance(part, str) else part for part in parts)
    return hashlib.sha256(joined).hexdigest()[:20]


def _processor() -> str:
    """What -march=native depends on."""
    lines = []
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if not line.strip():
                    break  # the others are like the first
                if not line.startswith(("processor", "cpu MHz", "bogomips", "apicid", "core id", "initial")):
                    lines.append(line.strip())
    except OSError:
        lines = [platform.processor(), platform.node()]
    return "\n".join(lines)


def _compile(command: list[str], deadline: float) -> str:
    """Run the compiler; what it says if that fails, else nothing."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
        )
        try:
            code = process.wait(max(deadline - time.monotonic(), 0))
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # its children too, which do the work
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise _CannotBuild(f"{command[0]} took more than {_TIMEOUT:g} s") from None
            raise
        said.seek(0)
        words = said.read(2000).decode(errors="replace").strip()
    return "" if code == 0 else words or f"exit status {code}"

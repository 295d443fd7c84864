"""The folder of a run: config.json, results.json, model.safetensors, state.pt.

Every file is written beside itself, brought to the disk and moved into place, so a reader or a resumed run
meets a whole file or the one before it, whenever the process was killed.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fallow.errors import DataError, RunError, UsageError, need
from fallow.jsonable import finite

CONFIG, RESULTS, WEIGHTS = "config.json", "results.json", "model.safetensors"
STATE, PREVIOUS, BROKEN = "state.pt", "state.previous.pt", "state.broken.pt"
_TEMPORARY = ".writing-"


class RunFolder:
    """One run's folder.

    Attributes:
        path: where it is.
        again: the command that continues what is in it, for messages.
    """

    def __init__(self, path: str | os.PathLike[str], again: str | None = None) -> None:
        self.path = Path(path)
        self.again = again or f"fallow train --resume {self.path}"

    def refuse_used(self) -> None:
        """Refuse a folder that holds anything.

        Raises:
            UsageError: it exists and is not an empty folder.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise UsageError(f"{self.path} is a file, not a folder: name another place with --out")
        if any(not entry.name.startswith(_TEMPORARY) for entry in self.path.iterdir()):
            known = (self.path / CONFIG).is_file()
            remedy = f"continue it with --resume {self.path}, or n" if known else "n"
            raise UsageError(
                f"the folder {self.path} exists and is not empty: {remedy}ame another place with --out"
            )

    def create(self, config: Mapping[str, Any]) -> None:
        """Make the folder and write the configuration.

        Raises:
            UsageError: it is in use.
            RunError: it cannot be made.
        """
        self.refuse_used()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"the run folder {self.path} cannot be made ({error.strerror})") from None
        self.write_json(CONFIG, dict(config))

    def config(self) -> dict[str, Any]:
        """The configuration it was made with.

        Raises:
            UsageError: this is no run folder.
            DataError: the configuration cannot be read.
        """
        path = self.path / CONFIG
        if not path.is_file():
            raise UsageError(
                f"{self.path} holds no {CONFIG}, so there is no run to resume: name the folder of a run, "
                "or start one with --out"
            )
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{path} cannot be read ({error}): restore it, or start the run anew") from None

    def status(self) -> str | None:
        """What the results say of the run's state; None where there are none to read."""
        try:
            found = json.loads((self.path / RESULTS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found.get("status") if isinstance(found, dict) else None

    # --- writing -----------------------------------------------------------------------------------
    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file whole or not at all; numbers that are not finite become null."""
        text = json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False)
        self._write(name, lambda file: file.write(text.encode()))

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file whole or not at all."""
        self._write(name, lambda file: file.write(content))

    def write_weights(self, name: str, weights: Mapping[str, Tensor]) -> None:
        """Write a state dict as safetensors."""
        save = need("safetensors.torch", "lab").save
        content = save({key: value.detach().cpu().contiguous().clone() for key, value in weights.items()})
        self._write(name, lambda file: file.write(content))

    def write_state(self, state: Mapping[str, Any]) -> None:
        """Write the checkpoint; the one before stays as `state.previous.pt`."""
        content = io.BytesIO()  # torch.save into a file would hide why the disk refused
        torch.save(dict(state), content)

        def keep_previous() -> None:
            if (self.path / STATE).exists():
                os.replace(self.path / STATE, self.path / PREVIOUS)

        self._write(STATE, lambda file: file.write(content.getbuffer()), keep_previous)

    def _write(
        self, name: str, fill: Callable[[io.BufferedWriter], object], before: Callable[[], None] | None = None
    ) -> None:
        try:
            handle, temporary = tempfile.mkstemp(dir=self.path, prefix=_TEMPORARY)
            try:
                with os.fdopen(handle, "wb") as file:
                    fill(file)
                    file.flush()
                    os.fsync(file.fileno())
                os.chmod(temporary, 0o644)  # mkstemp makes files that nobody else may read
                if before is not None:
                    before()
                os.replace(temporary, self.path / name)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
        except OSError as error:
            raise RunError(
                f"{self.path / name} could not be written ({error.strerror}): what was written before is "
                f"whole. Make room there, then continue with {self.again}"
            ) from error

    def has_state(self) -> bool:
        """Whether there is a checkpoint."""
        return (self.path / STATE).exists() or (self.path / PREVIOUS).exists()

    def remove_temporaries(self) -> None:
        """Remove what a killed process had begun to write."""
        for path in self.path.glob(f"{_TEMPORARY}*"):
            with contextlib.suppress(OSError):
                path.unlink()

    # --- reading the checkpoint ----------------------------------------------------------------------
    def read_state(self, say: Callable[[str], None]) -> dict[str, Any] | None:
        """The latest checkpoint that is whole; None where there is none yet.

        A broken `state.pt` is set aside, and the one before it is used and said so.

        Raises:
            RunError: there are checkpoints and none of them is whole.
        """
        reasons = []
        for name in (STATE, PREVIOUS):
            path = self.path / name
            if not path.exists():
                continue
            try:
                state = _load(path)
            except Exception as error:  # unpickling broken bytes may raise anything
                reasons.append(f"{path} is broken ({_first_line(error)})")
                if name == STATE:  # or the next checkpoint would make it the previous one
                    os.replace(path, self.path / BROKEN)
                continue
            if reasons:
                say(f"{reasons[0]}: going on from the one before, {PREVIOUS}, at step {state['step']}")
            return state
        if reasons:
            raise RunError(f"{'; '.join(reasons)}: no whole checkpoint is left, start the run anew")
        return None


def _load(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    # torch does not compare the check sums that its archive holds.
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"wrong check sum in {damaged}")
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or "step" not in state:
        raise ValueError("it is not the checkpoint of a run")
    return state


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def first_free(data: str, model: str, root: str | os.PathLike[str] = "runs") -> Path:
    """runs/DATA-MODEL-N with the first N that is free."""
    stem = f"{data}-{model}".replace(":", "-").replace("/", "-")
    return next(p for n in itertools.count(1) if not (p := Path(root) / f"{stem}-{n}").exists())

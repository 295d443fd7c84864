"""What tests of the program share: a call in this process, in an empty folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fallow import cli, models

Call = Callable[..., tuple[int, str, str]]


def caller(capsys: pytest.CaptureFixture, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Runs the program: exit code, output, errors. It knows a network of three branches, resnet8."""
    monkeypatch.chdir(folder)
    monkeypatch.setitem(models.MODELS, "resnet8", lambda **options: models.CifarResNet(8, **options))

    def run(*arguments: object) -> tuple[int, str, str]:
        code = cli.run([str(argument) for argument in arguments])
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


def refused(call: Call, *arguments: object) -> str:
    """The error of a call that must be refused: one paragraph, exit code 2, nothing printed."""
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("fallow: ") and err.count("\n") == 1
    return err

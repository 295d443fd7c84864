"""The compiled library: found, built, kept, shared between processes, and done without."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fallow import kernels
from fallow.kernels import _build, _dropblock
from fallow.noise import drop_block2d


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """As in a process that has not asked yet, with a cache of its own."""
    for name, value in {"library": None, "codes": {}, "reason": "", "asked": False, "paused": 0}.items():
        monkeypatch.setattr(_build.State, name, value)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FALLOW_KERNELS", raising=False)
    return tmp_path / "cache" / "fallow"


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library for compilers that only copy it."""
    found = shutil.which("c++")
    if found is None:
        pytest.skip("there is no c++ here")
    path = tmp_path_factory.mktemp("built") / "library.so"
    command = [found, *_build._COMMON, str(_build._SOURCE), "-o", str(path)]
    assert _build._compile(command, time.monotonic() + 60) == ""
    return path


def compiler(folder: Path, body: str) -> str:
    """A compiler that runs this, with its output's name in $out."""
    path = folder / "compiler"
    path.write_text(
        f'#!/bin/sh\nfor word; do last="$out"; out="$word"; done\necho >> {folder}/calls\n{body}\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def calls(folder: Path) -> int:
    path = folder / "calls"
    return len(path.read_text().splitlines()) if path.exists() else 0


def again(monkeypatch: pytest.MonkeyPatch) -> kernels.Availability:
    monkeypatch.setattr(_build.State, "asked", False)
    monkeypatch.setattr(_build.State, "library", None)
    monkeypatch.setattr(_build.State, "reason", "")
    return kernels.available()


def assert_the_plain_form_works() -> None:
    x = torch.ones(4, 16, 20, 20)
    out = drop_block2d(x, survival_rate=0.5, block_size=3)
    assert set(out.unique().tolist()) == {0, 2}


def test_it_is_built_once_and_then_taken_from_the_cache(
    fresh: Path, tmp_path: Path, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path, f'cp {built} "$out"'))
    for _ in range(3):
        assert again(monkeypatch) == kernels.Availability(True)
    assert calls(tmp_path) == 1
    assert [path.suffix for path in fresh.iterdir()] == [".so"]


def test_a_damaged_library_is_built_anew(
    fresh: Path, tmp_path: Path, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path, f'cp {built} "$out"'))
    fresh.mkdir(parents=True)
    path = fresh / f"dropblock-{_build._key(_build._compiler())}.so"
    path.write_bytes(b"not a library")
    assert kernels.available()
    assert path.read_bytes() == built.read_bytes()


def test_another_compiler_processor_or_source_has_another_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = compiler(tmp_path, "exit 0")
    keys = [_build._key([program]), _build._key([program, "-g"])]
    os.utime(program, ns=(1, 1))
    keys.append(_build._key([program]))
    monkeypatch.setattr(_build, "_processor", lambda: "another")
    keys.append(_build._key([program]))
    source = tmp_path / "source.cpp"
    source.write_text("another")
    monkeypatch.setattr(_build, "_SOURCE", source)
    keys.append(_build._key([program]))
    assert len(set(keys)) == 5 and keys[-1] == _build._key([program])


def test_flags_that_a_compiler_does_not_know_are_left_out(
    fresh: Path, tmp_path: Path, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = f'case "$*" in *native*|*openmp*) echo "what?" >&2; exit 1;; esac\ncp {built} "$out"'
    monkeypatch.setenv("CXX", compiler(tmp_path, body))
    assert kernels.available()
    assert calls(tmp_path) == len(_build._FLAGS)


def test_a_library_that_does_not_load_is_left_and_others_are_tried(
    fresh: Path, tmp_path: Path, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = f'case "$*" in *openmp*) echo no > "$out"; exit 0;; esac\ncp {built} "$out"'
    monkeypatch.setenv("CXX", compiler(tmp_path, body))
    assert kernels.available()
    assert calls(tmp_path) == 2


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('echo "no such header" >&2; exit 1', "does not compile them: no such header"),
        ("exit 3", "exit status 3"),
        ('echo no > "$out"', "does not compile them"),
    ],
)
def test_a_compiler_that_fails_is_asked_once_and_the_plain_form_works(
    fresh: Path, tmp_path: Path, body: str, reason: str, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path, body))
    with caplog.at_level("DEBUG", "fallow"):
        assert_the_plain_form_works()
        tried = calls(tmp_path)
        assert_the_plain_form_works()
    assert calls(tmp_path) == tried > 0
    found = kernels.available()
    assert not found and reason in found.reason
    assert [(record.name, record.levelname) for record in caplog.records] == [("fallow", "DEBUG")]
    assert list(fresh.iterdir()) == []


def test_a_compiler_that_hangs_is_ended_with_its_children(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_build, "_TIMEOUT", 0.5)
    monkeypatch.setenv("CXX", compiler(tmp_path, f"sleep 600 & echo $! > {tmp_path}/child; wait"))
    assert_the_plain_form_works()
    assert "took more than 0.5 s" in kernels.available().reason
    child = Path(f"/proc/{(tmp_path / 'child').read_text().strip()}/stat")
    for _ in range(100):  # gone, or a zombie that nobody has asked after
        if not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.02)
    pytest.fail("the compiler's child is still there")


def test_without_a_compiler_the_reason_says_what_to_do(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert_the_plain_form_works()
    assert kernels.available().reason == "there is no C++ compiler no-such-compiler; set CXX to one"


def test_a_cache_that_cannot_be_written_is_named(
    fresh: Path, tmp_path: Path, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("CXX", compiler(tmp_path, f'cp {built} "$out"'))
    assert_the_plain_form_works()
    assert "set TORCH_EXTENSIONS_DIR" in kernels.available().reason


@pytest.mark.parametrize("word", ["0", "off", "False"])
def test_the_environment_switches_them_off(
    fresh: Path, tmp_path: Path, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path, "exit 1"))
    monkeypatch.setenv("FALLOW_KERNELS", word)
    assert_the_plain_form_works()
    assert kernels.available().reason == f"FALLOW_KERNELS={word} switches them off"
    assert calls(tmp_path) == 0


def test_small_tensors_do_not_build(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path, "exit 1"))
    drop_block2d(torch.ones(2, 3, 8, 8), survival_rate=0.5, block_size=3)
    assert calls(tmp_path) == 0 and 2 * 3 * 8 * 8 < _dropblock._WORTH
    with kernels.plain():
        assert_the_plain_form_works()
        assert kernels.available().reason == "fallow.kernels.plain() is in force"
    assert calls(tmp_path) == 0


def test_the_folders_are_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert _build._folder() == Path("/a/fallow")
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    assert _build._folder() == Path("/b/fallow")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert _build._folder() == Path.home() / ".cache" / "fallow"


def test_processes_that_build_at_once_all_have_a_whole_library(
    fresh: Path, tmp_path: Path, built: Path
) -> None:
    # slow and in pieces: one who loaded the other's file would see half of it
    body = f'head -c 4000 {built} > "$out"; sleep 0.3; cat {built} > "$out"'
    environment = {**os.environ, "CXX": compiler(tmp_path, body)}
    code = "from fallow import kernels; found = kernels.available(); assert found, found.reason"
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) for _ in range(2)]
    for process in running:
        assert process.communicate()[1] == b"" and process.returncode == 0
    assert [path.read_bytes() for path in fresh.iterdir()] == [built.read_bytes()]

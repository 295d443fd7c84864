"""Imports point down: the floors of the package, read from its source."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A module or package may import those on lower floors; the longest prefix counts. New ones are added here.
FLOORS = {
    "fallow.errors": 0,
    "fallow._version": 0,
    "fallow.paths": 0,
    "fallow.jsonable": 0,
    "fallow.rates": 1,
    "fallow.schedules": 1,
    "fallow.masks": 1,
    "fallow.rows": 1,
    "fallow.special": 1,
    "fallow.schemes": 1,
    "fallow.feed": 1,
    "fallow.saved": 2,
    "fallow.kernels": 1,
    "fallow.noise": 2,
    "fallow.penalties": 2,
    "fallow.planning.allocate": 2,
    "fallow.models": 2,
    "fallow.data": 2,
    "fallow.surgery": 3,
    "fallow.integrations": 3,
    "fallow.sparsity": 4,
    "fallow.planning": 4,
    "fallow.explaining": 5,
    "fallow.recipes": 6,
    "fallow.papers": 7,
    "fallow.report": 6,
    "fallow.cli": 8,
    "fallow.__main__": 9,
    "fallow": 10,  # __init__ alone: it gathers, and nothing inside imports it
}

# These may need an optional dependency as soon as they are imported; the rest needs torch alone.
MAY_NEED_EXTRAS = (
    "fallow.recipes",
    "fallow.papers",
    "fallow.report",
    "fallow.cli",
    "fallow.data",
    "fallow.integrations",
)


@dataclass(frozen=True)
class Import:
    """One imported name: by which module, of which module, where in the file."""

    source: str
    target: str
    line: int
    at_top: bool
    for_types: bool


def module_files(root: Path = ROOT) -> dict[str, Path]:
    """Module name to file, for all of the package."""
    found = {}
    for path in sorted((root / "fallow").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(module: str, files: dict[str, Path]) -> Iterator[Import]:
    """Every import in a module's file, those inside functions and for type checkers too."""
    path = files[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    pending: list[tuple[ast.AST, bool, bool]] = [(ast.parse(path.read_text()), True, False)]
    while pending:
        node, at_top, for_types = pending.pop()
        for target in _targets(node, package, files):
            yield Import(module, target, getattr(node, "lineno", 0), at_top, for_types)
        at_top = at_top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        guard = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            pending.append((child, at_top, for_types or guard))


def _targets(node: ast.AST, package: str, files: dict[str, Path]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        parents = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*parents, *filter(None, [node.module])])
    # `from package import module` imports the module, `from module import name` the module that has the name
    return sorted({f"{base}.{a.name}" if f"{base}.{a.name}" in files else base for a in node.names})


def unit_of(module: str) -> str:
    """The module or package of the table that a module belongs to."""
    if module == "fallow":
        return module
    parts = module.split(".")
    candidates = (".".join(parts[:n]) for n in range(len(parts), 1, -1))
    return next((name for name in candidates if name in FLOORS), "")


def violations(files: dict[str, Path]) -> list[str]:
    """Every import that does not point down, in words."""
    found = []
    for module in files:
        if not unit_of(module):
            found.append(f"{module} has no floor: give it one in this file")
            continue
        for item in imports_of(module, files):
            if item.target.split(".")[0] != "fallow" or unit_of(item.target) == unit_of(module):
                continue
            if not unit_of(item.target) or FLOORS[unit_of(item.target)] >= FLOORS[unit_of(module)]:
                found.append(f"{module}:{item.line} imports {item.target}, which is not on a lower floor")
    return found


def cycle(files: dict[str, Path]) -> list[str]:
    """A cycle of imports, imports inside functions included; empty where there is none."""
    graph = {
        module: {i.target for i in imports_of(module, files) if i.target in files and not i.for_types}
        for module in files
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def foreign_at_top(files: dict[str, Path]) -> list[str]:
    """Imports, at the top of a core module, of anything but torch and the standard library."""
    own = {"fallow", "torch", *sys.stdlib_module_names}
    return [
        f"{module}:{item.line} imports {item.target}"
        for module in files
        if not module.startswith(MAY_NEED_EXTRAS)
        for item in imports_of(module, files)
        if item.at_top and not item.for_types and item.target.split(".")[0] not in own
    ]


def test_every_import_points_down():
    assert violations(module_files()) == []


def test_no_imports_go_in_a_circle():
    assert cycle(module_files()) == []


def test_the_core_needs_torch_alone():
    assert foreign_at_top(module_files()) == []


@pytest.mark.parametrize(("one", "other"), [("noise", "penalties"), ("penalties", "noise")])
def test_noise_and_penalties_stay_independent_checks_of_each_other(one, other):
    """Even through a third module, or the one's test could not be the other's oracle."""
    files = module_files()
    reached = {module for module in files if module.startswith(f"fallow.{one}")}
    pending = list(reached)
    while pending:
        for item in imports_of(pending.pop(), files):
            if item.target in files and item.target not in reached:
                reached.add(item.target)
                pending.append(item.target)
    assert [module for module in reached if module.startswith(f"fallow.{other}")] == []


def test_a_report_is_drawn_from_files_alone():
    files = module_files()
    allowed = ("fallow.report", "fallow.errors", "fallow._version")
    for module in files:
        if module.startswith("fallow.report"):
            targets = [i.target for i in imports_of(module, files)]
            assert [
                t for t in targets if t.startswith(("fallow", "torch")) and not t.startswith(allowed)
            ] == []


@pytest.fixture
def package(tmp_path: Path):
    """Writes a package of the given sources and returns its modules."""

    def write(**sources: str) -> dict[str, Path]:
        for name, source in sources.items():
            path = tmp_path.joinpath("fallow", *name.split("__")).with_suffix(".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        return module_files(tmp_path)

    return write


def test_the_checks_see_each_kind_of_violation(package):
    files = package(
        errors="from fallow.rates import x\n",
        rates="def f():\n    from . import masks\n",
        masks="import numpy\n",
        models="import fallow\n",
        surprise="",
    )
    assert violations(files) == [
        "fallow.errors:1 imports fallow.rates, which is not on a lower floor",
        "fallow.models:1 imports fallow, which is not on a lower floor",
        "fallow.rates:2 imports fallow.masks, which is not on a lower floor",
        "fallow.surprise has no floor: give it one in this file",
    ]
    assert foreign_at_top(files) == ["fallow.masks:1 imports numpy"]


def test_the_checks_see_circles_but_not_those_for_types(package):
    guarded = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from fallow.noise import b\n"
    assert cycle(package(noise__a=guarded, noise__b="from fallow.noise.a import x\n")) == []
    files = package(noise__a="def f():\n    from fallow.noise import b\n")
    assert violations(files) == []
    assert set(cycle(files)) == {"fallow.noise.a", "fallow.noise.b"}

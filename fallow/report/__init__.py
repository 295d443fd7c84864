"""One self-contained HTML page from the results of one or several runs, or of a reproduced paper.

The page is drawn from `results.json` alone and never re-runs anything. It needs no JavaScript, makes no
request, follows the reader's light or dark scheme, and has a table beside each plot. The same results give
the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fallow.errors import DataError, RunError, UsageError

__all__ = ["read_results", "write_report"]

RESULTS = "results.json"
SCHEMA = 1
KINDS = ("train", "sparsify", "plan", "explanation", "paper")
_ALONE = {"plan", "explanation"}  # kinds whose page stands beside their file, under its name
# Control characters but tab and newline, lone surrogates, non-characters: no place in XML or UTF-8.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def read_results(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The results of a run or of a reproduced paper, a plan or an explanation.

    Args:
        folder: the run's folder, the one `fallow train --out` was given; or a .json file itself.

    Returns:
        What `results.json` there holds. Any part may be missing: the run may have failed or be under way.

    Raises:
        DataError: there are no results there, they are not JSON, or their schema or kind is not known.
    """
    path = Path(folder) if Path(folder).suffix == ".json" else Path(folder) / RESULTS
    try:
        results = _printable(json.loads(path.read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        if path == Path(folder):
            raise DataError(
                f"there is no file {folder}: name a file of results, or a run's folder."
            ) from None
        what = f"holds no {RESULTS}" if path.parent.is_dir() else "is not a folder"
        raise DataError(
            f"{folder} {what}: name the folder of a run, the one that fallow train --out was "
            "given and whose path it prints."
        ) from None
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): check its permissions and the disk."
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is not valid JSON ({error}): it was cut off or changed; continue the run with "
            f"fallow train --resume {folder}, which writes it anew, or restore a copy."
        ) from None
    return _checked(results, path)


def _checked(results: Any, path: Path) -> dict[str, Any]:
    """`results` if this version knows their schema and kind."""
    if not isinstance(results, dict):
        raise DataError(
            f"{path} holds a {type(results).__name__}, not the mapping that fallow train writes there."
        )
    if isinstance(results.get("schema"), bool) or results.get("schema") != SCHEMA:
        raise DataError(
            f"{path} has schema {results.get('schema')!r}, this version of fallow reads schema {SCHEMA}: "
            "use the version of fallow that wrote it."
        )
    if results.get("kind") not in KINDS:
        raise DataError(f"{path} has kind {results.get('kind')!r}, fallow report reads: {', '.join(KINDS)}.")
    return results


def _printable(value: Any) -> Any:
    """`value` with every character that HTML or UTF-8 cannot hold replaced."""
    if isinstance(value, str):
        return _UNPRINTABLE.sub("\ufffd", value)
    if isinstance(value, list):
        return [_printable(item) for item in value]
    if isinstance(value, dict):
        return {_printable(key): _printable(item) for key, item in value.items()}
    return value


def write_report(
    folders: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] | None = None,
) -> Path:
    """Write the page of one or several runs, plans, explanations or reproductions.

    Args:
        folders: the folder of a run, or several of them; or those of reproductions, or their results files;
            or the files of plans, or of explanations.
        out: where to write; a folder gets a `report.html`. Default: `report.html` in the first run's folder,
            of a plan or an explanation a page of its file's name beside it.
            Reproductions of one paper also make a page of documentation: a path that ends in `.md`.

    Returns:
        The path of the page.

    Raises:
        UsageError: no run is named; several kinds are named together; Markdown of anything but one paper.
        DataError: a run's results are missing or cannot be understood.
        RunError: the page cannot be written.
        MissingExtra: matplotlib or jinja2 is not installed.
    """
    from fallow.report import _page, _words

    listed = [folders] if isinstance(folders, str | os.PathLike) else list(folders)
    paths = [Path(folder) for folder in listed]
    if not paths:
        raise UsageError("A report needs at least one run: name the folder of a run.")
    found = [read_results(path) for path in paths]
    kinds = {results["kind"] for results in found}
    beside = paths[0].parent if paths[0].suffix == ".json" else paths[0]
    beside = paths[0].with_suffix(".html") if kinds <= _ALONE and beside != paths[0] else beside
    target = Path(out) if out is not None else beside
    target = target / "report.html" if target.is_dir() else target
    if len(kinds) > 1:
        raise UsageError(f"A report is of one kind of results, got {' and '.join(sorted(kinds))}: make two.")
    papers = {str(_words.get(results, "paper", "name")) for results in found}
    if target.suffix == ".md" and (kinds != {"paper"} or len(papers) > 1):
        raise UsageError(
            f"A page in Markdown is of one reproduced paper: name {target.with_suffix('.html')}."
        )
    if kinds == {"paper"}:
        from fallow.report import _markdown, _paper

        page = _markdown.render(found) if target.suffix == ".md" else _paper.render(found)
    else:
        page = _page.render(list(zip(_names(paths), found, strict=True)))
    try:
        _replace(target, page.encode("utf-8"))
    except OSError as error:
        raise RunError(
            f"The report could not be written to {target} ({error.strerror}): free some space there or name "
            "another place with --out."
        ) from None
    return target


def _names(paths: Sequence[Path]) -> list[str]:
    """The folders' own names where they tell the runs apart, else their paths as given."""
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _replace(target: Path, content: bytes) -> None:
    """Write a file whole or not at all: a reader never meets half a page."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp makes files that nobody else may read
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise

"""What is committed of the papers: whole, of today's cells, and what the documentation says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fallow.papers import shelf
from fallow.report import write_report

ROOT = Path(__file__).parents[2]
COMMITTED = sorted((ROOT / "results").glob("*/*.json"))


def test_every_paper_has_results_of_the_smallest_scale_and_a_page():
    assert {path.parent.name for path in COMMITTED} == set(shelf.PAPERS)
    for name in shelf.PAPERS:
        assert ROOT / "results" / name / "tiny.json" in COMMITTED
        assert (ROOT / "docs" / "reproduce" / f"{name}.md").is_file()


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_results_are_of_these_cells_and_whole(path: Path):
    found, paper = json.loads(path.read_text()), shelf.PAPERS[path.parent.name]
    cells = {cell.name: cell for cell in paper.cells(paper.items, path.stem)}
    assert found["status"] == "done" and found["scale"] == path.stem
    assert {cell["name"] for cell in found["cells"]} == set(cells)
    for cell in found["cells"]:
        assert cell["status"] == "done"
        assert cell["options"] == json.loads(json.dumps(dict(cells[cell["name"]].options)))
    command = found["provenance"]["command"].split()
    assert command[:2] == ["fallow", "reproduce"] and command[2] in (paper.name, shelf.ALL)
    assert path.stat().st_size < 400_000


@pytest.mark.parametrize("name", shelf.PAPERS)
def test_the_documentation_is_what_the_results_say(name: str, tmp_path: Path):
    kept = [ROOT / "results" / name / f"{scale}.json" for scale in shelf.PAPERS[name].scales]
    page = write_report([path for path in kept if path in COMMITTED], tmp_path / "page.md").read_text()
    assert (ROOT / "docs" / "reproduce" / f"{name}.md").read_text() == page

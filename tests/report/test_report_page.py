import copy
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import fallow.report
from fallow.errors import MissingExtra
from fallow.report import _plots, _shapes, _svg, write_report

FIGURES = ("error", "loss", "ideal", "survival", "depth", "gradient")
VOID = {"meta", "link", "br"}


class Outline(HTMLParser):
    """The tags of a page in order, their attributes' names, and its text; fails on tags that do not close."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text, self.ids, self.open = [], set(), "", [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def change(tree, leaf):
    """A copy of nested containers with `leaf` applied to everything in them that is not a container."""
    if isinstance(tree, dict):
        return {key: change(value, leaf) for key, value in tree.items()}
    if isinstance(tree, list):
        return [change(value, leaf) for value in tree]
    return leaf(tree)


def page_of(results, save, name="digits-resnet56"):
    return write_report(save(results, name)).read_text()


def test_the_page_has_every_figure_each_with_its_table(results, save):
    page = page_of(results, save)
    outline = Outline(page)
    for figure in FIGURES:
        assert f'id="run-1-{figure}"' in page
    assert outline.tags.count("svg") == outline.tags.count("figure") == len(FIGURES)
    assert outline.tags.count("table") == 1 + len(FIGURES) + 3  # summary, figures; provenance, data, options
    assert len(outline.ids) == len(set(outline.ids))
    for text in (
        "stages.0.0",
        "sha256:5a1f",
        "bundled with scikit-learn",
        "lr_drops",
        "2.1\u00a0±\u00a00.8\u00a0%",
    ):
        assert text in outline.text


def test_the_page_asks_for_nothing_and_runs_nothing(results, save):
    page = page_of(results, save)
    outline = Outline(page)
    assert not {"script", "img", "iframe", "object", "embed", "base", "form"} & set(outline.tags)
    assert not [name for name in outline.attributes if name.startswith("on")]
    assert not re.search(r"@import|@font-face|https?:", page)
    assert set(re.findall(r"url\((.)", page)) <= {"#"}
    assert "default-src 'none'" in page


def test_every_reference_inside_a_drawing_is_found(results, save):
    page = page_of(results, save)
    ids = set(Outline(page).ids)
    targets = set(re.findall(r'href="#([^"]+)"', page)) | set(re.findall(r"url\(#([^)]+)\)", page))
    assert targets and targets <= ids


def test_colours_come_from_the_style_sheet(results, save):
    drawings = "".join(re.findall(r"<svg.*?</svg>", page_of(results, save), re.S))
    assert not re.search(r"#[0-9a-fA-F]{6}\b", drawings)
    used = set(re.findall(r"var\(--([a-z0-9-]+)\)", drawings))
    sheet = (Path(fallow.report.__file__).parent / "page.css").read_text()
    assert {"ink", "soft", "grid", "model", "twin"} <= used
    for role in _svg.ROLES:
        assert len(re.findall(rf"--{role}: #", sheet)) == 2  # light and dark


def test_the_same_results_give_the_same_bytes(results, save, tmp_path):
    folder = save(results)
    first = write_report(folder).read_bytes()
    assert write_report(folder, tmp_path / "again.html").read_bytes() == first
    assert b"2026-01-02" in first  # the run's own times are there; the rendering's are not


EVIL = "</td></svg><script>alert(1)</script> & \" ' $\\frac{ {{ 7 * 7 }} \x00\x1b \ud800"


def test_text_from_data_stays_text(results, save):
    keep = ("done", "train")
    plain = change(results, lambda x: "calm" if isinstance(x, str) and x not in keep else x)
    evil = change(results, lambda x: EVIL if isinstance(x, str) and x not in keep else x)
    expected = Outline(page_of(plain, save, "calm"))
    got = Outline(page_of(evil, save, "<b>&amp;"))
    assert got.tags == expected.tags
    assert got.attributes == expected.attributes
    assert "<script>alert(1)</script> & \" ' $\\frac{ {{ 7 * 7 }} \ufffd\ufffd \ufffd" in got.text
    assert "<b>&amp;" in got.text


def test_names_of_keys_are_text_too(results, save):
    results["config"]["<script>"] = {"<script>": ["<script>"]}
    outline = Outline(page_of(results, save))
    assert "script" not in outline.tags
    assert '{"<script>": ["<script>"]}' in outline.text


ODD = [None, math.nan, math.inf, -math.inf, "text", True, [], {}, 0, -1.5, 1e38, 1e-38, 1.7e308, 10**400]


@pytest.mark.parametrize("odd", ODD, ids=lambda value: repr(value)[:8])
def test_no_number_in_the_results_can_break_the_page(results, save, odd):
    changed = change(results, lambda x: x if isinstance(x, str) else odd) | {"schema": 1}
    assert "scikit-learn" in Outline(page_of(changed, save)).text


@pytest.mark.parametrize("odd", [math.nan, 0.0, 1.7e308, None])
def test_one_odd_epoch_leaves_the_others(results, save, odd):
    for key in (
        "train_loss",
        "train_error",
        "validation_error",
        "learning_rate",
        "gradient_first_convolution",
    ):
        results["arms"]["model"]["epochs"][3][key] = odd
    results["arms"]["model"]["depths"][7] = odd
    results["sites"][2] |= {"asked": odd, "realised": odd}
    page = page_of(results, save)
    assert [f for f in FIGURES if f'id="run-1-{f}"' in page] == list(FIGURES)


TREE = [(key,) for key in ("provenance", "config", "sites", "budget", "arms", "summary", "status")]
TREE += [("arms", "model"), ("arms", "twin")]
TREE += [("arms", "model", key) for key in ("label", "parameters", "epochs", "depths", "summary")]


@pytest.mark.parametrize("path", TREE, ids="/".join)
@pytest.mark.parametrize("instead", ["missing", None, [], {}, "text", [None, 3, "x"]], ids=repr)
def test_any_part_may_be_missing(results, save, path, instead, monkeypatch):
    if instead != "missing":  # drawing takes a second: most of the cases do without
        monkeypatch.setattr(_svg, "draw", lambda *_, **__: "<svg></svg>")
    *way, last = path
    inner = results
    for key in way:
        inner = inner[key]
    inner[last] = instead
    if instead == "missing":
        del inner[last]
    assert "fallow" in Outline(page_of(results, save)).text


def test_the_least_there_can_be(save):
    outline = Outline(page_of({"schema": 1, "kind": "train"}, save))
    assert "svg" not in outline.tags
    assert "no test error yet" in outline.text


def test_a_run_without_a_twin(results, save):
    del results["arms"]["twin"]
    results["summary"] = {"realised_cost": 0.75}
    outline = Outline(page_of(results, save))
    assert "no constant-depth twin" in outline.text
    assert outline.tags.count("svg") == len(FIGURES)


def test_an_interrupted_run_says_so(results, save):
    results["status"] = "interrupted"
    assert "interrupted after 24 epochs" in Outline(page_of(results, save)).text


def test_several_runs_share_a_page(results, save):
    other = copy.deepcopy(results)
    other["summary"]["time_ratio"]["median"] = 0.987
    lone = copy.deepcopy(results)
    del lone["arms"]["twin"], lone["summary"]
    folders = [save(results, "one"), save(other, "two"), save(lone, "three")]
    path = write_report(folders)
    outline = Outline(path.read_text())
    assert path == folders[0] / "report.html"
    assert "3 runs compared" in outline.text and "0.987" in outline.text
    assert outline.tags.count("svg") == 2 + 3 * len(FIGURES) - 1  # the lone one has nothing to be a ratio of
    assert len(outline.ids) == len(set(outline.ids))
    assert {"run-1", "run-2", "run-3"} <= set(outline.ids)


def test_more_runs_than_colours_and_runs_of_one_name(results, save, tmp_path, monkeypatch):
    monkeypatch.setattr(_plots, "of_run", lambda *_: [])
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    folders = [save(results, f"{'ab'[i % 2]}/run" if i < 2 else f"run-{i}") for i in range(_svg.RUNS + 2)]
    text = Outline(write_report(folders).read_text()).text
    assert str(folders[0]) in text and str(folders[1]) in text


def test_bands_hold_every_value_once():
    values = [math.sin(k * k) for k in range(1003)]
    parts = _shapes.bands(values, 110)
    assert len(parts) == 110
    assert [first for first, *_ in parts] == [1, *(last + 1 for _, last, *_ in parts[:-1])]
    assert parts[-1][1] == len(values)
    assert sum(mean * (last - first + 1) for first, last, mean, *_ in parts) == pytest.approx(sum(values))
    for first, last, mean, low, high in parts:
        assert (low, high) == (min(values[first - 1 : last]), max(values[first - 1 : last]))
        assert low <= mean <= high
    assert _shapes.bands([1.0, 2.0], 110) == [(1, 1, 1.0, 1.0, 1.0), (2, 2, 2.0, 2.0, 2.0)]
    assert _shapes.bands([], 110) == []


def test_learning_rate_drops_are_where_the_rate_falls(results):
    assert _plots._drops(results) == [12.5, 18.5]


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_contrast_is_enough_to_read(scheme):
    sheet = (Path(fallow.report.__file__).parent / "page.css").read_text()
    colour = {name: found[scheme] for name in _svg.ROLES + ("paper", "card", "link", "alarm", "alarm-ink")
              if (found := re.findall(rf"--{name}: (#[0-9a-f]{{6}})", sheet))}  # fmt: skip

    def contrast(first, second):
        low, high = sorted((luminance(colour[first]), luminance(colour[second])))
        return (high + 0.05) / (low + 0.05)

    for ground in ("paper", "card"):  # WCAG 2.2 AA: 4.5 for text, 3 for lines that carry meaning
        assert min(contrast(role, ground) for role in ("ink", "soft", "link")) >= 4.5
        assert (
            min(contrast(role, ground) for role in _svg.ROLES if role.startswith(("model", "twin", "run")))
            >= 3
        )
    assert contrast("alarm-ink", "alarm") >= 4.5


def test_a_missing_extra_says_what_to_install(results, save, monkeypatch):
    def missing(module, extra):
        raise MissingExtra(f"this needs {module}, which is not installed: pip install 'fallow[{extra}]'")

    monkeypatch.setattr(_svg, "need", missing)
    with pytest.raises(MissingExtra, match=r"pip install 'fallow\[lab\]'"):
        write_report(save(results))


def test_the_readers_own_matplotlib_settings_change_nothing(results, save, tmp_path):
    import matplotlib

    folder = save(results)
    first = write_report(folder).read_bytes()
    with matplotlib.rc_context(
        {"font.size": 30, "text.usetex": False, "axes.facecolor": "red", "svg.fonttype": "path"}
    ):
        before = dict(matplotlib.rcParams)
        assert write_report(folder, tmp_path / "again.html").read_bytes() == first
        assert dict(matplotlib.rcParams) == before


def test_the_numbers_of_the_file_are_in_the_tables(results, save):
    text = Outline(page_of(results, save)).text
    for site in json.loads(json.dumps(results["sites"])):
        assert site["name"] in text and f"{site['realised']:.3f}" in text
    for record in results["arms"]["twin"]["epochs"]:
        assert f"{100 * record['validation_error']:.2f}\u00a0%" in text

"""The page in a real browser: what a reader sees, in both schemes, at a desk and on a phone."""

import json
import os
import re
from pathlib import Path

import pytest
from example_plans import example_explanation, example_plan

from fallow.report import write_report

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run "
    "--disable-component-update --disable-sync"
).split()
FIGURES = 6
DESK, PHONE = 1200, 390


@pytest.fixture(scope="module")
def browser():
    missing = "" if CHROMIUM.exists() else f"no {CHROMIUM}: apt-get install chromium"
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing = "no playwright: pip install 'fallow[test]'"
    if missing and os.environ.get("FALLOW_REQUIRE_BROWSER") == "1":
        pytest.fail(f"FALLOW_REQUIRE_BROWSER=1, but there is {missing}")
    if missing:
        pytest.skip(missing)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser):
    """Open a page; whatever it says on the console or asks of the network ends up in the lists."""
    contexts = []

    def open_page(path, scheme, width):
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
        contexts.append(context)
        page = context.new_page()
        said, asked = [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri(), wait_until="networkidle")
        return page, said, asked

    yield open_page
    for context in contexts:
        context.close()


def brightness(page, selector, role):
    colour = page.eval_on_selector(selector, f"element => getComputedStyle(element).{role}")
    red, green, blue = (int(x) for x in re.findall(r"\d+", colour)[:3])
    return (red + green + blue) / 3


@pytest.fixture
def report(results, save):
    results["sites"][0]["name"] = "a.very.long.name." * 12  # must scroll in its table, not widen the page
    results["config"]["path"] = "x" * 300
    results["provenance"]["data"]["notes"].append("y" * 300)
    return write_report(save(results, "long-name-" * 12))


@pytest.mark.parametrize("width", [DESK, PHONE])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_as_a_reader_meets_it(report, visit, scheme, width):
    page, said, asked = visit(report, scheme, width)
    assert said == []
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"}
    assert [url for url in asked if url.startswith("file")] == [report.as_uri()]

    plots = page.locator("svg.plot").all()
    assert len(plots) == FIGURES
    for plot in plots:
        box = plot.bounding_box()
        assert plot.is_visible() and box["width"] > 250 and box["height"] > 100
        assert 0 <= box["x"] and box["x"] + box["width"] <= width
        assert plot.get_attribute("aria-label")
    assert page.evaluate("document.documentElement.scrollWidth") <= width

    ground, ink = brightness(page, "body", "backgroundColor"), brightness(page, "body", "color")
    assert (ground < 40 and ink > 200) if scheme == "dark" else (ground > 220 and ink < 60)
    assert (
        abs(brightness(page, "svg.plot text", "fill") - brightness(page, "figure", "backgroundColor")) > 100
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_curve_is_painted(report, visit, scheme):
    page, _, _ = visit(report, scheme, DESK)
    # Colours that the style sheet did not know would be painted black, or not at all.
    unknown = """elements => elements.filter(element => {
        const style = getComputedStyle(element);
        return (element.getAttribute('style') || '').includes('var(--')
            && [style.stroke, style.fill].every(paint => paint === 'none' || paint === 'rgb(0, 0, 0)');
    }).length"""
    assert page.eval_on_selector_all("svg.plot *", unknown) == 0
    shapes = page.eval_on_selector_all(
        "svg.plot g[id*=line2d] path[style*='--model']", "all => all.map(x => x.getTotalLength())"
    )
    assert len(shapes) >= 5 and min(shapes) > 100


def test_tables_open_without_javascript(report, browser):
    context = browser.new_context(java_script_enabled=False, viewport={"width": PHONE, "height": 900})
    page = context.new_page()
    page.goto(report.as_uri())
    assert page.get_by_text("CPU time per step (median)").is_visible()  # the summary is open from the start
    hidden = page.get_by_role("cell", name="stages.0.1", exact=True)
    assert not hidden.is_visible()
    page.get_by_text("Table: Survival rate of every site").click()
    assert hidden.is_visible()
    context.close()


def test_opened_tables_do_not_widen_the_page(report, visit):
    page, _, _ = visit(report, "light", PHONE)
    page.evaluate("document.querySelectorAll('details').forEach(element => element.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE


def test_print_is_light_whatever_the_scheme(report, visit):
    page, _, _ = visit(report, "dark", DESK)
    page.emulate_media(media="print", color_scheme="dark")
    assert brightness(page, "body", "backgroundColor") == 255
    assert brightness(page, "body", "color") < 60


@pytest.mark.parametrize(("scheme", "width"), [("light", DESK), ("dark", PHONE)])
@pytest.mark.parametrize("make", [example_plan, example_explanation])
def test_plans_and_explanations(make, tmp_path, visit, scheme, width):
    found = make()
    found["sites"][0]["name"] = "a.very.long.name." * 12
    file = tmp_path / "document.json"
    file.write_text(json.dumps(found))
    page, said, asked = visit(write_report(file), scheme, width)
    assert said == [] and {url.partition(":")[0] for url in asked} <= {"file", "data"}
    plots = page.locator("svg.plot").all()
    assert len(plots) == 2 and all(plot.is_visible() for plot in plots)
    bars = page.eval_on_selector_all(
        "svg.plot g[id*=site-] path",
        "all => all.map(x => [x.getBoundingClientRect().height, getComputedStyle(x).fill])",
    )
    assert len(bars) >= len(found["sites"]) and all(height > 1 for height, _ in bars)
    assert {fill for _, fill in bars} == {"rgb(15, 118, 110)" if scheme == "light" else "rgb(60, 201, 180)"}
    page.evaluate("document.querySelectorAll('details').forEach(element => element.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground, ink = brightness(page, "body", "backgroundColor"), brightness(page, "body", "color")
    assert (ground < 40 and ink > 200) if scheme == "dark" else (ground > 220 and ink < 60)


@pytest.mark.parametrize("width", [DESK, PHONE])
def test_several_runs_and_an_unfinished_one(results, save, visit, width):
    lone = results | {"status": "interrupted", "arms": {"model": results["arms"]["model"]}, "summary": {}}
    page, said, _ = visit(write_report([save(results, "one"), save(lone, "two")]), "dark", width)
    assert said == []
    assert page.get_by_text("This run was interrupted after 24 epochs").is_visible()
    assert all(plot.is_visible() for plot in page.locator("svg.plot").all())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.get_by_role("link", name="two").click()
    assert page.url.endswith("#run-2")

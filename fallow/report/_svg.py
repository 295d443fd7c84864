"""Plots drawn by matplotlib, turned into inline SVG that takes its colours from the page's style sheet.

Matplotlib writes fixed colours. Here every role has a stand-in colour that nothing else uses; after drawing,
the stand-ins become CSS variables, so that one drawing serves the light and the dark scheme and the printer.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from typing import Any

from fallow.errors import need

RUNS = 6  # colours for the runs of a comparison; later runs begin again at the first
ROLES = ("ink", "soft", "grid", "model", "twin", *(f"run-{i}" for i in range(RUNS)))
COLOUR = {role: f"#f00d{i:02x}" for i, role in enumerate(ROLES)}
_ROLE = {colour: role for role, colour in COLOUR.items()}
_STAND_IN = re.compile("#f00d[0-9a-f]{2}")
_FAMILY = re.compile(r"font-family:[^;]*;? ?")  # the page's own font is inherited
_SHORTHAND = re.compile(r"font: *(\d+px)[^;]*")

# 400 units wide: the letters of 11.5 units come out at 10 px on a phone and at 14 on a desk.
WIDTH, HEIGHT = 400, 244
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # letters stay letters: selectable, in the page's font
    "svg.hashsalt": "fallow",  # the same ids in every rendering
    "text.parse_math": False,  # a name may hold a dollar sign
    "axes.formatter.use_mathtext": False,
    "font.size": 11.5,
    "text.color": COLOUR["ink"],
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.edgecolor": COLOUR["soft"],
    "axes.labelcolor": COLOUR["soft"],
    "axes.titlecolor": COLOUR["soft"],
    "axes.titlelocation": "left",
    "axes.titlesize": 11.5,
    "axes.titlepad": 8,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": COLOUR["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": COLOUR["soft"],
    "ytick.color": COLOUR["soft"],
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "patch.linewidth": 0,
}


def draw(
    name: str, label: str, paint: Callable[[Any], Mapping[str, str] | None], *, height: float = HEIGHT
) -> str:
    """One set of axes as an inline `<svg>`.

    Args:
        name: prefix of the drawing's ids, unique on the page.
        label: what a screen reader says for the drawing.
        paint: draws on the axes; may return tooltips, gid of an artist -> text.
        height: in units of which the drawing is `WIDTH` wide.

    Returns:
        The element as text, colours as CSS variables, all text escaped.
    """
    figures, styles = need("matplotlib.figure", "lab"), need("matplotlib.style", "lab")
    target = io.StringIO()
    with styles.context(["default", STYLE]):  # whatever the user's own matplotlibrc says
        figure = figures.Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
        tips = paint(figure.subplots()) or {}
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
    return _inline(target.getvalue(), name, label, tips)


def _inline(svg: str, name: str, label: str, tips: Mapping[str, str]) -> str:
    """Matplotlib's document as an element of a page."""
    root = ElementTree.fromstring(svg)
    for parent in root.iter():
        parent.tag = parent.tag.rpartition("}")[2]
        for child in list(parent):
            # The style element there would reach over the whole page; the metadata says nothing.
            if child.tag.rpartition("}")[2] in ("style", "metadata"):
                parent.remove(child)
    for element in root.iter():
        _adopt(element, name, tips)
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-label": label,
        "id": name,
        "class": "plot",
    }
    return ElementTree.tostring(root, encoding="unicode")


def _adopt(element: ElementTree.Element, name: str, tips: Mapping[str, str]) -> None:
    """Own ids, CSS colours, the page's font, tooltips: for one element."""
    attributes: dict[str, str] = {}
    for key, value in element.attrib.items():
        key = key.rpartition("}")[2]
        if key == "id":
            if value in tips:
                title = ElementTree.Element("title")
                title.text = tips[value]
                element.insert(0, title)
            value = f"{name}-{value}"
        elif key == "href":
            value = f"#{name}-{value.removeprefix('#')}"
        elif key == "clip-path":
            value = value.replace("url(#", f"url(#{name}-")
        elif key == "style":
            value = _STAND_IN.sub(lambda match: f"var(--{_ROLE[match[0]]})", value)
            value = _FAMILY.sub("", _SHORTHAND.sub(r"font-size: \1", value))
        attributes[key] = value
    element.attrib = attributes

"""The part of the page that shows an explanation: the penalty of stochastic depth, site by site.

What noise in front of the head penalises is `fallow.report._heads`.
"""

from __future__ import annotations

from typing import Any

from fallow.errors import need
from fallow.report import _heads, _shapes, _svg, _tables, _words
from fallow.report._section import Section, Tile
from fallow.report._shapes import Bar, Plot
from fallow.report._svg import COLOUR
from fallow.report._tables import Table
from fallow.report._words import get, number, records

# Forms of the penalty beside its Monte Carlo estimate, and the colour of each.
FORMS = {
    "hessian": ("Hessian", "run-1"),
    "bregman": ("Bregman", "run-2"),
    "linearised": ("linearised", "run-3"),
    "alone": ("alone", "run-5"),
}
MONTE_CARLO = "Monte Carlo"
TITLES = {**{form: title for form, (title, _) in FORMS.items()}, "monte_carlo": MONTE_CARLO}


def headline(found: dict[str, Any]) -> str:
    """One sentence with what was found."""
    totals = get(found, "totals")
    penalty, noisy = number(get(totals, "regulariser")), number(get(totals, "loss_noisy"))
    if penalty is None:
        return "What stochastic depth penalises was not measured."
    error = _words.plain(get(totals, "regulariser_error"), ".2g")
    share = f", {100 * penalty / noisy:.1f}\u00a0% of the loss under noise" if noisy else ""
    return (
        f"Stochastic depth adds {_words.plain(penalty, '.4g')} \u00b1 {error} to the loss of the mean output"
        f"{share}{_forms_in_words(totals)}."
    )


def _forms_in_words(totals: Any) -> str:
    """Which forms of single sites stand for the penalty, and which do not."""
    said = []
    for verdict, does in (("holds", "add"), ("off", "do not add")):
        names = [title for form, (title, _) in FORMS.items() if get(totals, "verdicts", form) == verdict]
        if names:
            listed = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
            said.append(f"; the sites' {listed} forms {does} up to it")
    return "".join(said)


def tiles(found: dict[str, Any]) -> tuple[Tile, ...]:
    """The figures a reader looks for first, those of them that there are."""
    totals = get(found, "totals")
    mass = "sum of p (1 \u2212 p) over the sites"
    candidates = [
        (get(totals, "regulariser"), "penalty", "mean loss less loss of the mean output"),
        (get(totals, "loss_noisy"), "loss under noise", _beside(totals)),
        (get(totals, "noise_mass"), "noise mass", mass),
    ]
    return tuple(
        Tile(name, _words.plain(value), aside)
        for value, name, aside in candidates
        if number(value) is not None
    )


def _beside(totals: Any) -> str:
    full, at = get(totals, "loss_full"), get(totals, "loss_evaluation")
    return f"full network {_words.plain(full)}, at evaluation {_words.plain(at)}"


def summary(found: dict[str, Any]) -> Table:
    """The sums over sites beside the penalty they stand for."""
    totals = get(found, "totals")
    rows = [
        (
            f"sum over sites, {title}",
            _with_error(
                get(totals, "sums", form), get(totals, "sum_error") if form == "monte_carlo" else None
            ),
            _words.plain(get(totals, "ratios", form), ".3g"),
            _said(get(totals, "verdicts", form)),
        )
        for form, title in TITLES.items()
        if number(get(totals, "sums", form)) is not None
    ]
    penalty = _with_error(get(totals, "regulariser"), get(totals, "regulariser_error"))
    columns = ("measure", "value", "of the penalty", "verdict")
    return Table("Penalty", columns, (("penalty, measured", penalty, "1", _words.MISSING), *rows))


def _said(verdict: Any) -> str:
    words = {"holds": "holds", "off": "off", "undecided": "too few draws to tell"}
    return words.get(str(verdict), _words.MISSING)


def _with_error(value: Any, error: Any) -> str:
    found = _words.plain(value)
    return found if number(error) is None else f"{found}\u00a0\u00b1\u00a0{_words.plain(error, '.2g')}"


def sites(found: dict[str, Any]) -> Table:
    """Every site with its rate, its noise and its penalty in every form."""
    rows = [
        (
            str(index + 1),
            str(site.get("name", _words.MISSING)),
            _words.ratio(site.get("rate")),
            _words.plain(site.get("noise")),
            *(_words.plain(site.get(form)) for form in FORMS),
            _with_error(site.get("monte_carlo"), site.get("monte_carlo_error")),
            _words.percent(site.get("share")),
        )
        for index, site in enumerate(records(found.get("sites")))
    ]
    titles = (title for title, _ in FORMS.values())
    columns = ("site", "name", "survival rate", "noise", *titles, MONTE_CARLO, "share of the loss")
    return Table("Penalty of every site", columns, tuple(rows))


def penalties(found: dict[str, Any], prefix: str) -> Plot | None:
    """The penalty site by site: Monte Carlo with its error, and the forms that stand for it."""
    listed = list(enumerate(records(found.get("sites")), start=1))
    drawn = [
        (place, str(site.get("name", "")), value, number(site.get("monte_carlo_error")))
        for place, site in listed
        if (value := number(site.get("monte_carlo"))) is not None
    ]
    forms = {
        form: [(place, value) for place, site in listed if (value := number(site.get(form))) is not None]
        for form in FORMS
    }
    forms = {form: points for form, points in forms.items() if points}
    if not drawn and not forms:
        return None

    def paint(axes: Any) -> dict[str, str]:
        return _paint(axes, drawn, forms, len(listed))

    name = f"{prefix}penalties"
    legend = [("bar model", MONTE_CARLO)] if drawn else []
    legend += [("whisker ink", "one standard error")] if any(e is not None for *_, e in drawn) else []
    legend += [(f"line {FORMS[form][1]}", FORMS[form][0]) for form in forms]
    label = "Penalty of every site by Monte Carlo, and by each form. The numbers are in the table beside."
    note = (
        "Where the lines leave the bars by more than the whiskers, the form does not stand for the penalty "
        "at these rates."
    )
    return Plot(name, "Penalty by site", note, _svg.draw(name, label, paint), tuple(legend), sites(found))


def sums(found: dict[str, Any], prefix: str) -> Plot | None:
    """The sums over the sites as ratios to the penalty that they stand for."""
    totals = get(found, "totals")
    penalty, error = number(get(totals, "regulariser")), number(get(totals, "sum_error"))
    bars: list[Bar] = []
    for form, title in TITLES.items():
        ratio = number(get(totals, "ratios", form))
        if ratio is not None:
            spread = error / penalty if form == "monte_carlo" and error is not None and penalty else None
            low, high = (None, None) if spread is None else (ratio - spread, ratio + spread)
            bars.append((title, ratio, low, high, None))
    if not bars:
        return None
    colours = [dict(FORMS.values()).get(title, "model") for title, *_ in bars]
    name = f"{prefix}sums"
    drawing = _svg.draw(
        name,
        "Sums over the sites as ratios to the penalty measured. The numbers are in the table beside.",
        lambda axes: _shapes.bars(axes, bars, colours, "ratio to the penalty"),
        height=44 + 44 * len(bars),
    )
    note = "The penalty is measured with all sites drawn together; each sum takes the sites one by one."
    legend = [("line twin", "the penalty")]
    legend += [("whisker ink", "one standard error")] if any(bar[2] is not None for bar in bars) else []
    return Plot(name, "Sums over the sites", note, drawing, tuple(legend), summary(found))


def _paint(
    axes: Any,
    drawn: list[tuple[int, str, float, float | None]],
    forms: dict[str, list[tuple[int, float]]],
    count: int,
) -> dict[str, str]:
    tips = {}
    if drawn:
        bars = [(place, name, value) for place, name, value, _ in drawn]
        tips = _shapes.columns(axes, bars, lambda name, value: f"{name}: {value:.4g}")
    for place, _, value, error in drawn:
        if error is not None:
            axes.vlines(place, value - error, value + error, color=COLOUR["ink"], linewidth=1.4)
    for form, points in forms.items():
        left, right = [i - 0.45 for i, _ in points], [i + 0.45 for i, _ in points]
        axes.hlines([y for _, y in points], left, right, color=COLOUR[FORMS[form][1]], linewidth=1.8)
    ticker = need("matplotlib.ticker", "lab")
    axes.set_xlim(0.3, count + 0.7)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(9, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:g}"))
    axes.set_title("added to the loss")
    axes.set_xlabel("site, from the input to the output")
    return tips


def section(name: str, found: dict[str, Any], index: int) -> Section:
    """One explanation's part of the page: of branches, of a head, or of both."""
    head, prefix = found.get("head"), f"run-{index + 1}-"
    headed = isinstance(head, dict)
    alone = headed and not records(found.get("sites"))
    both = (headline(found), _heads.headline(head)) if headed else (headline(found),)
    plots = () if alone else (penalties(found, prefix), sums(found, prefix))
    plots = (*plots, _heads.forms(head, prefix), _heads.spectra(head, prefix)) if headed else plots
    notes = [*_notes(found), *(_notes(head) if headed else ())]
    details = (
        _tables.pairs("Totals", found.get("totals")),
        _tables.pairs("Settings", found.get("settings")),
        _tables.pairs("Provenance", found.get("provenance")),
    )
    return Section(
        anchor=f"run-{index + 1}",
        name=name,
        status="",
        warning="",
        headline=both[-1] if alone else " ".join(both),
        tiles=_heads.tiles(head) if alone else tiles(found),
        summary=_heads.table(head) if alone else summary(found),
        plots=tuple(plot for plot in plots if plot is not None),
        notes=tuple(dict.fromkeys(notes)),
        details=tuple(table for table in details if table.rows),
        small="Standard errors are over the masks drawn, given the samples.",
        notes_title="What to mind",
        source=name,
    )


def _notes(found: dict[str, Any]) -> list[str]:
    notes = found.get("notes")
    return [note for note in notes if isinstance(note, str)] if isinstance(notes, list) else []

"""The report as one HTML file that needs nothing else: words, tables, charts, and the scripts that draw and sort."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any, NamedTuple

from elbozoo import plots
from elbozoo.inference.comparison import Comparison
from elbozoo.report import captions, charts, scatter
from elbozoo.report.images import Decoded, decoded_images
from elbozoo.report.markup import (
    chart,
    data,
    definitions,
    image,
    items,
    pairs,
    paragraphs,
    picture,
    policy,
    scrolling,
    section,
    sortable,
)
from elbozoo.report.posteriors import is_thinned, posterior_figures
from elbozoo.report.settings import about_model, reproduction, settings, versions
from elbozoo.report.tables import full_table, heldout_table, summary_table
from elbozoo.report.words import GLOSSARY, headline, notes, subtitle

WITHOUT_SCRIPTS = "<p>An interactive chart stands here where scripts run. The tables hold the figures at the end.</p>"
NO_CHART = "<p>An interactive chart stands here where scripts run.</p>"


class Drawing(NamedTuple):
    """A part of the page with the figures of the charts in it, by the names that the script finds them by."""

    html: str
    figures: Mapping[str, Any]
    title: str = ""


NOTHING = Drawing("", {})


def html(comparison: Comparison) -> str:
    """Return the report of ``comparison`` as the text of an HTML page."""
    title = f"{comparison.model} on {comparison.data['name']}"
    curves, ledger = _curves(comparison), _ledger(comparison)
    latent, posterior = _latent(comparison), _posterior(comparison)
    drawings = (curves, ledger, latent, posterior)
    figures = {name: figure for drawing in drawings for name, figure in drawing.figures.items()}
    library, script = _plotly(), _asset("report.js")
    heldout = heldout_table(comparison)
    sections = [
        section("In words", items(headline(comparison), "headline")),
        section("Summary", sortable(summary_table(comparison)), paragraphs(map(str, comparison.failures))),
        section("Held-out rows", sortable(heldout) if heldout else ""),
        section("Along the fits", curves.html),
        section("Where the nats go", ledger.html),
        section(latent.title, latent.html),
        section("q and the posterior", posterior.html),
        section("Images", _images(comparison)),
        section("Every fit", sortable(full_table(comparison))),
        section("Notes of the fits", items(notes(comparison))),
        section("The model", paragraphs(about_model(comparison))),
        section("Data, options, seeds", pairs(settings(comparison))),
        section("To reproduce", _reproduction(comparison)),
        section("Versions", pairs(versions(comparison.fits))),
        section("Glossary", definitions(GLOSSARY)),
    ]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{escape(policy([library, script]), quote=False)}">',
            f"<title>{escape(title)} · elbozoo</title>",
            '<link rel="icon" href="data:,">',
            f"<style>{_asset('report.css')}</style>",
            "</head>",
            "<body>",
            f"<header><h1>{escape(title)}</h1>",
            f'<p class="faint">{escape(subtitle(comparison))}</p></header>',
            "<main>",
            *filter(None, sections),
            "</main>",
            data("charts", figures),
            # Not run where it stands: the script reads it once the page is on the screen.
            f'<script type="text/plain" id="plotly">{library}</script>',
            f"<script>{script}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


@cache
def _plotly() -> str:
    """Return Plotly's own script, as its Python package brings it."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


@cache
def _asset(name: str) -> str:
    return files("elbozoo.report").joinpath("assets", name).read_text(encoding="utf-8")


def _curves(comparison: Comparison) -> Drawing:
    figure, caption, alt = (
        charts.curves(comparison),
        captions.CURVES + captions.POINTED_AT,
        captions.curves_alt(comparison),
    )
    if figure is None:
        figure, caption, alt = charts.objectives(comparison), captions.OBJECTIVES, "Line chart of the objectives."
    if figure is None:
        return NOTHING
    shown = chart("curves", ["curves"], alt, caption + captions.BY_POINTER, WITHOUT_SCRIPTS)
    return Drawing(shown, {"curves": figure})


def _ledger(comparison: Comparison) -> Drawing:
    figure = charts.ledger_bars(comparison)
    if figure is None:
        return NOTHING
    alt, caption = captions.ledger_alt(comparison), captions.ledger_caption(comparison)
    # Where no script runs, the picture is the one that comparisons save.
    still = plots.ledger_bars(comparison)
    width = f"min-width: {4 * still.get_figwidth():.1f}rem"
    instead = scrolling(image(plots.png(still), alt, width), "Picture, scrolls sideways")
    return Drawing(chart("ledger", ["ledger"], alt, caption, instead), {"ledger": figure})


def _latent(comparison: Comparison) -> Drawing:
    panels, has_labels = scatter.latent_panels(comparison), scatter.labels_of(comparison) is not None
    title = "Latent space"
    caption = captions.latent_caption(has_labels)
    alt = "Scatter plots of the mean of q for every row in the latent space, a panel for each method."
    if not panels:
        title, panels, caption = "Classes", scatter.class_panels(comparison), captions.CLASSES
        alt = "Scatter plots of the rows, coloured by the most probable class under q, a panel for each method."
    if not panels:
        return NOTHING
    caption += captions.THINNED if scatter.is_thinned(panels) else ""
    figures = {f"latent-{i}": scatter.figure(panel, len(panels)) for i, panel in enumerate(panels)}
    return Drawing(chart("latent", figures, alt, caption, NO_CHART), figures, title)


def _posterior(comparison: Comparison) -> Drawing:
    found = posterior_figures(comparison)
    if not found:
        return NOTHING
    is_local = all(fit.guide.is_local for fit in comparison.fits)
    what = "Points of q against the exact posterior." if is_local else "Means and intervals of each latent by method."
    figures = {f"posterior-{i}": figure for i, figure in enumerate(found)}
    caption = captions.AGREEMENT if is_local else captions.INTERVALS
    caption += captions.THINNED if is_local and is_thinned(comparison) else ""
    return Drawing(chart("posterior", figures, what, caption, NO_CHART), figures)


def _images(comparison: Comparison) -> str:
    pictures = decoded_images(comparison)
    return f'<div id="images" class="pictures">{"".join(map(_image, pictures))}</div>' if pictures else ""


def _image(decoded: Decoded) -> str:
    return picture(decoded.png, f"Images: {decoded.title}.", decoded.title, f"{decoded.width}px")


def _reproduction(comparison: Comparison) -> str:
    words, code = reproduction(comparison)
    return f"{paragraphs(words)}\n<pre><code>{escape(code)}</code></pre>"

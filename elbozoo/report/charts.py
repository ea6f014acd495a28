"""The charts of a report as figures of Plotly: curves and ledger, in nats per datum.

A figure is plain data, a list of traces and a layout, which Plotly's script draws in a browser. Ink, grid and boxes
have their colours from the page's style, so that they follow the reader's light or dark screen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from elbozoo.inference.comparison import Comparison
from elbozoo.series import (
    AMORTIZATION,
    APPROXIMATION,
    CLASS_PALETTE,
    ELBO,
    LEARNING,
    PALETTE,
    UNSPLIT,
    Curve,
    LedgerBar,
    Span,
    best_known,
    curves_of,
    first_finite,
    ledger,
    number,
    short,
    span_of_bars,
    span_of_x,
    span_of_y,
    thinned,
)
from elbozoo.words import NOT_A_BOUND

Figure = dict[str, Any]

# What is too dark for a dark page gives way to a lighter neighbour.
ON_ANY_PAPER = {"#4D4D4D": "#808080", "#882255": "#B5477F", "#332288": "#7464D0"}
COLOURS = tuple(ON_ANY_PAPER.get(colour, colour) for colour in PALETTE)
CLASS_COLOURS = tuple(ON_ANY_PAPER.get(colour, colour) for colour in CLASS_PALETTE)
SYMBOLS = (
    *("circle", "square", "triangle-up", "diamond", "triangle-down"),
    *("cross", "x", "star", "pentagon", "hexagon"),
)
NEUTRAL = "#808080"

MOST_POINTS = 6000  # of the lines of all fits together, so that a page of fifty opens in under a second
FEWEST_POINTS = 100  # of the lines of one fit
DIGITS = 7
LETTER, TITLE, GUTTER = 7.6, 30, 12  # pixels: a letter of a label, a title beside an axis, what is left free
BELOW = 54  # pixels: labels and title under an axis
TICKS, MOST_LETTERS = 6, 11
FEW_DECADES = 50  # ratio of ends up to which a logarithmic axis is labelled between the powers of ten too

AXES = {"steps": "step", "seconds": "seconds of fitting, evaluation left out"}
SEGMENTS: dict[str, dict[str, Any]] = {
    AMORTIZATION: {"color": "#E69F00"},
    APPROXIMATION: {"color": "#CC79A7"},
    UNSPLIT: {"color": NEUTRAL},
    LEARNING: {"color": NEUTRAL, "pattern": {"shape": "/", "size": 6, "fillmode": "replace", "fgopacity": 1}},
}


class Look(NamedTuple):
    """Colour and mark of a method."""

    colour: str
    symbol: str


def looks(methods: Iterable[str]) -> dict[str, Look]:
    """Return colour and mark of each method, the same in all charts of a page."""
    names = list(dict.fromkeys(methods))
    return {m: Look(COLOURS[i % len(COLOURS)], SYMBOLS[i % len(SYMBOLS)]) for i, m in enumerate(names)}


def curves(comparison: Comparison) -> Figure | None:
    """Return ELBO and exact evidence of every fit against steps, or seconds by a button.

    An objective that is no ELBO is not drawn. None where no fit has anything to draw.
    """
    drawn, best = curves_of(comparison), best_known(comparison)
    span = span_of_y(drawn, best)
    if span is None:
        return None
    look = looks(curve.method for curve in drawn)
    points = max(FEWEST_POINTS, MOST_POINTS // len(drawn))
    lines = [line for curve in drawn for line in _lines(curve, look[curve.method], points)]
    ends = [mark for method in look for mark in _ends([c for c in drawn if c.method == method], look[method])]
    traces = [*lines, *ends]
    layout = plain_layout(
        480,
        room_for_numbers(span.low, span.high),
        yaxis={"title": {"text": "nats per datum"}, "range": [span.low, span.high]},
    )
    layout["margin"]["t"] = 56
    layout["xaxis"] |= _axis_of_x(drawn, "steps", span)
    layout["updatemenus"] = [_toggle(drawn, traces, span)]
    if math.isfinite(best):
        layout |= _level(best, "y")
    return {"data": [trace["steps"] for trace in traces], "layout": layout}


def objectives(comparison: Comparison) -> Figure | None:
    """Return what each fit maximised, step by step, where none of them has an ELBO or an evidence to draw."""
    rows, fits = comparison.data["rows"], [fit for fit in comparison.fits if len(fit.trajectory)]
    if not fits:
        return None
    look, traces, seen = looks(fit.method for fit in comparison.fits), [], set()
    for fit in fits:
        shown = thinned(len(fit.trajectory), max(FEWEST_POINTS, MOST_POINTS // len(fits)))
        values = fit.trajectory["objective"].to_numpy(float)[shown] / rows
        traces.append(
            {
                **_of_method(fit.method, look[fit.method], first=fit.method not in seen),
                "mode": "lines",
                "line": {"color": look[fit.method].colour, "width": 1.4},
                "x": numbers(fit.trajectory["step"].to_numpy(float)[shown] + 1),
                "y": numbers(values),
                "meta": [escape(fit.method), fit.seed],
                "hovertemplate": "<b>%{meta[0]}</b>, seed %{meta[1]}<br>step %{x:,}<br>objective %{y:.4f}"
                "<extra></extra>",
            }
        )
        seen.add(fit.method)
    known = [value for trace in traces for value in trace["y"] if value is not None] or [0.0]
    left = room_for_numbers(min(known), max(known))
    layout = plain_layout(420, left, yaxis={"title": {"text": "objective, nats per datum"}})
    layout["xaxis"]["title"] = {"text": "step", "font": {"size": 13}}
    return {"data": traces, "layout": layout}


def ledger_bars(comparison: Comparison) -> Figure | None:
    """Return for every method a bar from its ELBO through the gaps to the best known log p(x).

    The axis begins where the differences do. None where no method has a figure to draw.
    """
    bars = ledger(comparison)
    if not any(math.isfinite(value) for bar in bars for value in (bar.elbo, bar.log_evidence)):
        return None
    span, best = span_of_bars(bars), first_finite([bar.best_known for bar in bars])
    names = [escape(short(bar.method)) for bar in bars]
    present = [name for name in SEGMENTS if any(name in bar.segments() for bar in bars)]
    traces = [_elbo_part(bars, names, span.low), *(_segment(bars, names, name) for name in present)]
    traces.append(_seed_marks(bars, names))
    layout = plain_layout(
        150 + 46 * len(bars),
        room_for_names(short(bar.method) for bar in bars),
        barmode="overlay",
        bargap=0.4,
        yaxis={"autorange": "reversed", "showgrid": False, "ticks": "", "fixedrange": True},
        xaxis={
            "title": {"text": "nats per datum, not from 0"},
            "range": [span.low, span.high],
            "nticks": 6,
        },
    )
    if math.isfinite(best):
        layout |= _level(best, "x")
    layout["annotations"] = [
        {"x": span.low, "y": name, "text": NOT_A_BOUND, "showarrow": False, "xanchor": "left", "xshift": 6}
        for name, bar in zip(names, bars, strict=True)
        if not math.isfinite(bar.elbo)
    ]
    return {"data": traces, "layout": layout}


def plain_layout(height: int, left: int, **parts: Any) -> Figure:
    """Return a layout without ornament: the page has title and caption, and its style the colours.

    Parameters
    ----------
    height : int
        Height of the chart in pixels.
    left : int
        Pixels for what stands at the left axis, see :func:`room_for_numbers` and :func:`room_for_names`. A margin that
        Plotly finds by itself takes it three times as long to draw.
    **parts
        Further parts of the layout.
    """
    axis = {"zeroline": False, "separatethousands": True}
    layout: Figure = {
        "height": height,
        "margin": {"l": left, "r": 16, "t": 16, "b": BELOW},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "hovermode": "closest",
        "hoverlabel": {"align": "left"},
        # At the foot of the chart, however many lines it takes on a phone: the axis and its title end above it.
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
    }
    layout |= {key: value for key, value in parts.items() if key not in ("xaxis", "yaxis")}
    for name in ("xaxis", "yaxis"):
        layout[name] = {**axis, **parts.get(name, {})}
        layout[name].get("title", {})["font"] = {"size": 13}
    # Only so does the axis make room for itself above a legend of many lines.
    layout["xaxis"]["automargin"] = "height"
    return layout


def room_for_numbers(low: float, high: float) -> int:
    """Return pixels for the labels of an axis with numbers from ``low`` to ``high``, and for its title."""
    step = max(high - low, 1e-9) / TICKS
    decimals = max(0, math.ceil(-math.log10(step)))
    widest = max(len(f"{value:,.{decimals}f}") for value in (low, high))
    return round(LETTER * min(widest, MOST_LETTERS)) + TITLE


def room_for_names(names: Iterable[str]) -> int:
    """Return pixels for the names at an axis."""
    return round(LETTER * max(map(len, names))) + GUTTER


def numbers(values: Iterable[float]) -> list[float | None]:
    """Return ``values`` as JSON knows them: to seven digits, null for what is not finite."""
    return [float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None for value in map(float, values)]


# ---- curves ----------------------------------------------------------------------------------------------------------

Trace = dict[str, dict[str, Any]]  # the trace as drawn against steps, and its x against seconds


def _lines(curve: Curve, look: Look, points: int) -> list[Trace]:
    """Lines of one fit: its ELBO, and dashed its log p(x), which may be known at some steps only."""
    latest = pd.Series(curve.evidence).ffill().bfill().to_numpy()
    found = []
    for values, dash, width in ((curve.elbo, "solid", 1.3), (curve.evidence, "dash", 1.5)):
        known = np.flatnonzero(np.isfinite(values))
        if not len(known):
            continue
        shown = known[thinned(len(known), points)]
        facts = _facts(curve.steps[shown], curve.seconds[shown], curve.elbo[shown], latest[shown])
        trace = {
            **_of_method(curve.method, look),
            "mode": "lines",
            "line": {"color": look.colour, "width": width, "dash": dash},
            "y": numbers(values[shown]),
            "customdata": facts,
            "meta": [escape(curve.method), curve.seed],
            "hovertemplate": _template("ELBO, smoothed", facts, curve.final_evidence),
        }
        found.append(_against_both(trace, curve.steps[shown], curve.seconds[shown]))
    return found


def _ends(of_method: Sequence[Curve], look: Look) -> list[Trace]:
    """Marks of all seeds of a method at the end: log p(x) hollow, and the ELBO, evaluated once more."""
    steps, seconds = ([curve.x(against)[-1] for curve in of_method] for against in AXES)
    elbo, evidence = ([getattr(curve, name) for curve in of_method] for name in ("final_elbo", "final_evidence"))
    facts = _facts(steps, seconds, elbo, evidence)
    seeds = [[*fact, curve.seed] for fact, curve in zip(facts, of_method, strict=True)]
    template = _template("ELBO at the end", facts, math.nan).replace("%{meta[1]}", "%{customdata[4]}")
    found = []
    for values, hollow in ((evidence, "-open"), (elbo, "")):
        trace = {
            **_of_method(of_method[0].method, look, first=not hollow),
            "mode": "markers",
            "marker": {"color": look.colour, "symbol": look.symbol + hollow, "size": 9 if hollow else 7},
            "y": numbers(values),
            "customdata": seeds,
            "meta": [escape(of_method[0].method)],
            "hovertemplate": template,
        }
        found.append(_against_both(trace, steps, seconds))
    return found


def _of_method(method: str, look: Look, *, first: bool = False) -> dict[str, Any]:
    """What all traces of a method share: one entry of the legend shows and hides them together."""
    return {
        "type": "scatter",
        "name": escape(short(method)),
        "legendgroup": escape(method),
        "showlegend": first,
        "marker": {"color": look.colour, "symbol": look.symbol},
    }


def _against_both(trace: dict[str, Any], steps: Iterable[float], seconds: Iterable[float]) -> Trace:
    return {"steps": {**trace, "x": numbers(steps)}, "seconds": {"x": numbers(seconds)}}


def _facts(*columns: Iterable[float]) -> list[list[float | None]]:
    """Step, seconds, ELBO and log p(x) of each point, for the hover."""
    return [list(fact) for fact in zip(*map(numbers, columns), strict=True)]


def _template(name: str, facts: Sequence[Sequence[float | None]], at_the_end: float) -> str:
    """Return the hover of a line; where log p(x) is not known on the way, it is that of the end."""
    has_elbo, has_evidence = (any(fact[place] is not None for fact in facts) for place in (2, 3))
    elbo = f"{name} %{{customdata[2]:.4f}}" if has_elbo else "no ELBO"
    evidence = "log p(x) %{customdata[3]:.4f}" if has_evidence else f"log p(x) at the end {number(at_the_end, 4)}"
    return (
        "<b>%{meta[0]}</b>, seed %{meta[1]}<br>step %{customdata[0]:,}<br>%{customdata[1]:.3~g} seconds"
        f"<br>{elbo}<br>{evidence}<extra></extra>"
    )


def _toggle(drawn: list[Curve], traces: Sequence[Trace], span: Span) -> dict[str, Any]:
    """Return the buttons that draw all against steps, or against seconds."""
    buttons = [
        {
            "label": against,
            "method": "update",
            "args": [
                {"x": [trace[against]["x"] for trace in traces]},
                {f"xaxis.{key}": value for key, value in _axis_of_x(drawn, against, span).items()},
            ],
        }
        for against in AXES
    ]
    place = {"x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "pad": {"t": 0, "b": 4}}
    return {"type": "buttons", "direction": "right", "showactive": True, "active": 0, "buttons": buttons, **place}


def _axis_of_x(drawn: list[Curve], against: str, y: Span) -> dict[str, Any]:
    span = span_of_x(drawn, against, y.low)
    title = {"text": AXES[against], "font": {"size": 13}}
    if span is None:
        longest = max(float(curve.x(against)[-1]) for curve in drawn)
        linear = {"type": "linear", "range": [-0.02 * longest, 1.03 * longest], "tickmode": "auto"}
        return {"title": title, **linear, "tickvals": None, "ticktext": None}
    return {"title": title, "type": "log", "range": [math.log10(span.low), math.log10(span.high)], **log_ticks(span)}


def log_ticks(span: Span) -> dict[str, Any]:
    """Return ticks at powers of ten, and between few of them at their doubles and quintuples too, written in full."""
    factors = (1,) if span.high > FEW_DECADES * span.low else (1, 2, 5)
    powers = range(math.floor(math.log10(span.low)), math.ceil(math.log10(span.high)) + 1)
    found = [factor * 10.0**power for power in powers for factor in factors]
    inside = [value for value in found if span.low <= value <= span.high]
    shown = inside if len(inside) > 1 else [span.low, span.high]
    labels = [f"{value:,.0f}" if value >= 10 else f"{value:.3g}" for value in shown]
    return {"tickmode": "array", "tickvals": shown, "ticktext": labels}


def _level(best: float, axis: str) -> dict[str, Any]:
    """Return a dotted line through the best known log p(x), across the chart."""
    other = "x" if axis == "y" else "y"
    line = {
        "type": "line",
        axis + "0": best,
        axis + "1": best,
        other + "ref": "paper",
        other + "0": 0,
        other + "1": 1,
        "line": {"color": NEUTRAL, "width": 1.4, "dash": "dot"},
    }
    return {"shapes": [line]}


# ---- ledger ----------------------------------------------------------------------------------------------------------


def _elbo_part(bars: Sequence[LedgerBar], names: list[str], left: float) -> dict[str, Any]:
    return {
        "type": "bar",
        "orientation": "h",
        "name": ELBO,
        "y": names,
        "base": left,
        "x": numbers(max(bar.elbo - left, 0.0) if math.isfinite(bar.elbo) else 0.0 for bar in bars),
        "customdata": numbers(bar.elbo for bar in bars),
        # Not by the opacity of the trace, which the legend does not show.
        "marker": {"color": "rgba(128,128,128,0.45)"},
        "hovertemplate": "<b>%{y}</b><br>ELBO %{customdata:.4f} nats per datum<extra></extra>",
    }


def _segment(bars: Sequence[LedgerBar], names: list[str], name: str) -> dict[str, Any]:
    spans = [bar.segments().get(name, (0.0, 0.0)) for bar in bars]
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "y": names,
        "base": numbers(start for start, _ in spans),
        "x": numbers(width for _, width in spans),
        "customdata": _facts((_figure(bar, name) for bar in bars), (bar.log_evidence for bar in bars)),
        "marker": SEGMENTS[name],
        "hovertemplate": f"<b>%{{y}}</b><br>{name} %{{customdata[0]:.4f}}<br>log p(x) %{{customdata[1]:.4f}}"
        "<br>nats per datum<extra></extra>",
    }


def _figure(bar: LedgerBar, name: str) -> float:
    """The figure itself, where what is drawn of it is cut at 0."""
    figures = {
        AMORTIZATION: bar.amortization_gap,
        APPROXIMATION: bar.approximation_gap,
        UNSPLIT: bar.gap,
        LEARNING: bar.learning_gap,
    }
    return figures[name]


def _seed_marks(bars: Sequence[LedgerBar], names: list[str]) -> dict[str, Any]:
    marks = [(name, value) for name, bar in zip(names, bars, strict=True) for value in bar.seeds]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "ELBO of each seed",
        "y": [name for name, _ in marks],
        "x": numbers(value for _, value in marks),
        "marker": {"symbol": "line-ns", "size": 16, "line": {"width": 1.6, "color": NEUTRAL}},
        "hovertemplate": "<b>%{y}</b><br>ELBO of one seed %{x:.4f}<extra></extra>",
    }

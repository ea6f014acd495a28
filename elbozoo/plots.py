"""Pictures of a comparison: bound and evidence along the fits, the ledger as bars, the latent space.

Every function returns a figure of its own and leaves matplotlib as it was: no pyplot, no backend, no rcParams.
All values are in nats per datum, totals over the rows divided by their number, unless a label says otherwise.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, FigureBase
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, ScalarFormatter
from torch import Tensor

from elbozoo.inference.comparison import Comparison
from elbozoo.inference.rate_distortion import RateDistortion
from elbozoo.series import (
    AMORTIZATION,
    APPROXIMATION,
    CLASS_PALETTE,
    ELBO,
    LEARNING,
    MARKERS,
    NONE,
    PALETTE,
    UNSPLIT,
    Curve,
    Floats,
    LedgerBar,
    best_known,
    curves_of,
    first_finite,
    first_fits,
    is_continuous,
    latent_means,
    ledger,
    number,
    short,
    span_of_bars,
    span_of_x,
    span_of_y,
    thinned,
)
from elbozoo.words import NOT_A_BOUND

DPI = 150
INK, FAINT = "#222222", "#6B6B6B"
GAP, BEYOND = "#E69F00", "#EFEFEF"
LEGEND_INCHES_PER_ENTRY, LEGEND_INCHES_PER_LETTER = 0.6, 0.078
STYLE = {
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "hatch.linewidth": 0.7,
    "text.parse_math": False,  # names of files may hold dollar signs
}

SEGMENTS: dict[str, dict[str, Any]] = {
    ELBO: {"facecolor": "#D5D9DD"},
    AMORTIZATION: {"facecolor": "#E69F00"},
    APPROXIMATION: {"facecolor": "#CC79A7"},
    UNSPLIT: {"facecolor": "#8C8C8C"},
    LEARNING: {"facecolor": "white", "edgecolor": FAINT, "hatch": "////", "linewidth": 0.6},
}

VISIBLE = 1e-3  # share of the axis below which a segment cannot be seen


class Picture(Figure):
    """A figure that notebooks show without pyplot."""

    def _repr_png_(self) -> bytes:
        return png(self)


def overview(comparison: Comparison) -> Figure:
    """Draw ELBO and evidence against steps beside the ledger as stacked bars."""
    bars = ledger(comparison)
    with _styled():
        keys, bar_keys = _curve_handles(comparison), _bar_handles(bars)
        widths = [6.6, 8.4 + _room_for_names(bars)]
        heights = [4.0 + _legend_height(keys, widths[0]), 1.8 + 0.42 * len(bars) + _legend_height(bar_keys, widths[1])]
        figure = _figure(sum(widths), max(heights))
        _head(figure, _title(comparison))
        left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=widths, wspace=0.04)[0]
        ax = left.subplots()
        _draw_curves(ax, comparison, against="steps")
        ax.set_title("ELBO and log p(x) along the fits")
        _outside_legend(left, keys)
        ax, numbers = right.subplots(1, 2, width_ratios=[1.0, 0.85])
        _draw_bars(ax, bars)
        ax.set_title("From the ELBO to the best known log p(x)")
        _draw_numbers(numbers, bars)
        _outside_legend(right, bar_keys)
    return figure


def curves(comparison: Comparison) -> Figure:
    """Draw ELBO and exact evidence of every fit against steps and against seconds.

    An objective that is no ELBO is not drawn; such a method shows its log p(x) only.
    """
    with _styled():
        keys = _curve_handles(comparison)
        figure = _figure(11.0, 4.5 + _legend_height(keys, 11.0), space=0.05)
        _head(figure, f"{_title(comparison)}: ELBO and log p(x) along the fits")
        left, right = figure.subplots(1, 2, sharey=True)
        _draw_curves(left, comparison, against="steps")
        _draw_curves(right, comparison, against="seconds")
        left.set_title("against steps")
        right.set_title("against time")
        right.set_ylabel("")
        _outside_legend(figure, keys)
    return figure


def ledger_bars(comparison: Comparison) -> Figure:
    """Draw for every method a bar from its ELBO through the gaps to the best known log p(x).

    The axis begins where the differences do. Values are means over the seeds.
    """
    bars = ledger(comparison)
    with _styled():
        keys = _bar_handles(bars)
        figure = _figure(11.0 + _room_for_names(bars), 1.8 + 0.42 * len(bars) + _legend_height(keys, 11.0))
        _head(figure, f"{_title(comparison)}: where the nats go")
        left, right = figure.subplots(1, 2, width_ratios=[1.0, 0.78])
        _draw_bars(left, bars)
        _draw_numbers(right, bars)
        _outside_legend(figure, keys)
    return figure


def latent_space(comparison: Comparison, labels: Tensor | None = None) -> Figure | None:
    """Draw the means of q(z given x) for a continuous latent of two dimensions, a panel per method (first seed).

    Parameters
    ----------
    comparison : Comparison
        Fits that still have their rows; those of a loaded comparison do not.
    labels : Tensor (N,), optional
        Class of each row, for the colours; by default ``comparison.labels`` where there is such a thing.

    Returns
    -------
    Figure or None
        None if no fit has a latent of two dimensions per datum.
    """
    if labels is None:
        labels = getattr(comparison, "labels", None)
    panels = [(fit, means) for fit in first_fits(comparison) if (means := latent_means(fit)) is not None]
    if not panels:
        return None
    classes = None if labels is None else np.asarray(labels)
    with _styled():
        columns = min(3, len(panels))
        rows = math.ceil(len(panels) / columns)
        figure = _figure(max(5.0, 3.7 * columns), 3.7 * rows + 1.0)
        _head(figure, f"{_title(comparison)}: latent space")
        axes = figure.subplots(rows, columns, squeeze=False)
        for ax, (fit, means) in zip(axes.flat, panels, strict=False):
            _scatter(ax, means, classes)
            ax.set_title(f"{short(fit.method)}, seed {fit.seed}")
        for ax in axes.flat[len(panels) :]:
            ax.set_axis_off()
        if classes is not None:
            _label_key(figure, axes, classes)
    return figure


def rate_distortion(curve: RateDistortion) -> Figure:
    """Draw distortion against rate, a point for each fit and a line through the means of each β.

    A line of slope -1 joins what has the same ELBO as the best of the fits. Under a point a stroke leads down to where
    it would be if its q were the posterior: its length is the gap. Below the best log p(x) of the fits' models there is
    nothing that one of them could reach. Both are left out where no evidence is known.
    """
    with _styled():
        keys = _curve_of_rates_handles(curve)
        figure = _figure(7.4, 4.9 + _legend_height(keys, 7.4))
        _head(figure, f"{_curve_title(curve)}: rate and distortion by β")
        _draw_rates(figure.subplots(), curve)
        _outside_legend(figure, keys)
    return figure


def figures(comparison: Comparison) -> dict[str, Figure]:
    """Return all figures by name: curves, ledger and, where there is one, latent_space."""
    found = {"curves": curves(comparison), "ledger": ledger_bars(comparison), "latent_space": latent_space(comparison)}
    return {name: figure for name, figure in found.items() if figure is not None}


def save(figure: Figure, path: str | Path) -> Path:
    """Write ``figure`` as PNG at 150 dots per inch and return the path."""
    path = Path(path)
    path.write_bytes(png(figure))
    return path


def png(figure: Figure) -> bytes:
    """Return ``figure`` as a PNG file's content, at 150 dots per inch."""
    content = io.BytesIO()
    with _styled():
        figure.savefig(content, format="png", dpi=DPI)
    return content.getvalue()


# ---- curves ----------------------------------------------------------------------------------------------------------


def _draw_curves(ax: Axes, comparison: Comparison, against: str) -> None:
    drawn = curves_of(comparison)
    looks = _looks(comparison)
    for curve in drawn:
        x, (colour, marker) = curve.x(against), looks[curve.method]
        if len(curve.elbo):
            shown = thinned(len(x))
            ax.plot(x[shown], curve.elbo[shown], color=colour, lw=1.1, alpha=0.9)
            known = np.isfinite(curve.evidence)
            ax.plot(x[known], curve.evidence[known], color=colour, lw=1.3, ls=(0, (4, 2)))
        ends: dict[str, Any] = {"color": colour, "marker": marker, "ms": 6, "mew": 1.2, "ls": "none", "zorder": 4}
        ax.plot(x[-1], curve.final_evidence, **ends, mfc="white")
        ax.plot(x[-1], curve.final_elbo, **{**ends, "ms": 4.5})
    best = best_known(comparison)
    if math.isfinite(best):
        ax.axhline(best, color=FAINT, lw=1.2, ls=":", zorder=1)
    ax.set_xlabel("step" if against == "steps" else "seconds of fitting, evaluation left out")
    ax.set_ylabel("nats per datum")
    ax.yaxis.set_major_formatter(_plain_formatter())
    _limit_y(ax, drawn, best)
    _scale_x(ax, drawn, against)


def _scale_x(ax: Axes, drawn: list[Curve], against: str) -> None:
    span = span_of_x(drawn, against, ax.get_ylim()[0])
    if span is None:
        return
    ax.set_xscale("log")
    ax.set_xlim(span.low, span.high)
    subs = (1.0,) if span.high > 50 * span.low else (1.0, 2.0, 5.0)
    ax.xaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value < 1e5 else f"{value:.0e}"))
    ax.xaxis.set_minor_formatter(NullFormatter())


def _limit_y(ax: Axes, drawn: list[Curve], best: float) -> None:
    span = span_of_y(drawn, best)
    if span is not None:
        ax.set_ylim(span.low, span.high)


def _curve_handles(comparison: Comparison) -> list[Artist]:
    drawn = curves_of(comparison)
    without = {curve.method for curve in drawn if not np.isfinite(curve.elbo).any()}
    handles: list[Artist] = [
        Line2D([], [], color=colour, marker=marker, ms=5, lw=1.8, label=short(method) + _no_bound(method, without))
        for method, (colour, marker) in _looks(comparison).items()
    ]
    neutral: dict[str, Any] = {"color": FAINT}
    if len(without) < len(_looks(comparison)):
        handles.append(Line2D([], [], **neutral, lw=1.1, label="ELBO, smoothed; a line per seed"))
    if any(np.isfinite(curve.evidence).any() for curve in drawn):
        handles.append(Line2D([], [], **neutral, lw=1.3, ls=(0, (4, 2)), label="log p(x) at the θ of the fit"))
    handles += [
        Line2D([], [], **neutral, marker="o", ms=4.5, ls="none", label="ELBO at the end"),
        Line2D([], [], **neutral, marker="o", ms=6, mfc="white", ls="none", label="log p(x) at the end"),
    ]
    if math.isfinite(best_known(comparison)):
        handles.append(Line2D([], [], **neutral, lw=1.2, ls=":", label="best known log p(x)"))
    return handles


def _no_bound(method: str, without: set[str]) -> str:
    return " (its objective is no ELBO)" if method in without else ""


# ---- ledger ----------------------------------------------------------------------------------------------------------


def _draw_bars(ax: Axes, bars: list[LedgerBar]) -> None:
    places = np.arange(len(bars))
    left, right, _ = span_of_bars(bars)
    cut = [max(bar.elbo - left, 0.0) if math.isfinite(bar.elbo) else 0.0 for bar in bars]
    ax.barh(places, cut, left=left, height=0.56, label=ELBO, **SEGMENTS[ELBO])
    for name in _segments_of(bars):
        spans = [bar.segments().get(name, (left, 0.0)) for bar in bars]
        ax.barh(
            places,
            [w for _, w in spans],
            left=[s for s, _ in spans],
            height=0.56,
            label=name,
            zorder=2,
            **SEGMENTS[name],
        )
    for place, bar in zip(places, bars, strict=True):
        if math.isfinite(bar.elbo):
            ax.plot(bar.seeds, [place] * len(bar.seeds), ls="none", marker="|", ms=13, mew=1.3, color=INK, zorder=3)
        else:
            ax.annotate(
                NOT_A_BOUND,
                (left, place),
                (7, 0),
                textcoords="offset points",
                va="center",
                style="italic",
                bbox=_PAPER,
                zorder=4,
            )
    best = first_finite([bar.best_known for bar in bars])
    if math.isfinite(best):
        ax.axvline(best, color=INK, lw=1.2, ls=":", zorder=3)
    ax.set_yticks(places, [short(bar.method) for bar in bars])
    ax.set_ylim(len(bars) - 0.45, -0.75)
    ax.set_xlim(left, right)
    ax.grid(visible=False, axis="y")
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("nats per datum (the axis does not begin at 0)")
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_formatter(_plain_formatter())


_PAPER = {"boxstyle": "square,pad=0.15", "facecolor": "white", "edgecolor": "none"}


def _segments_of(bars: list[LedgerBar]) -> list[str]:
    present = {name for bar in bars for name in bar.segments()}
    return [name for name in SEGMENTS if name in present]


def _unsplit_texts(gap: str, columns: int) -> list[str]:
    if columns == 1 or gap == NONE:
        return [gap] * columns
    return ["", f"together {gap}"]


def _room_for_names(bars: list[LedgerBar]) -> float:
    """Inches that long names of methods need beyond what every figure has for them."""
    return LEGEND_INCHES_PER_LETTER * max(0, max(len(short(bar.method)) for bar in bars) - 12)


def _widest(bars: list[LedgerBar], name: str) -> float:
    return max(bar.segments().get(name, (0.0, 0.0))[1] for bar in bars)


def _draw_numbers(ax: Axes, bars: list[LedgerBar]) -> None:
    """Write the figures of each bar beside it, nats per datum."""
    ax.set_axis_off()
    ax.set_xlim(0, 1)
    ax.set_ylim(len(bars) - 0.45, -0.75)
    heads, places = ["ELBO", "amortization\ngap", "approximation\ngap", "learning\ngap"], [0.20, 0.47, 0.77, 0.99]
    if not any(bar.is_split for bar in bars):
        heads, places = ["ELBO", "gap", "learning\ngap"], [0.24, 0.55, 0.86]
    for place, head in zip(places, heads, strict=True):
        ax.text(place, -0.45, head, ha="right", va="bottom", fontsize=8.5, color=FAINT)
    for row, bar in enumerate(bars):
        parts = [number(bar.amortization_gap, 4), number(bar.approximation_gap, 4)]
        if not bar.is_split:
            parts = _unsplit_texts(number(bar.gap, 4), columns=len(heads) - 2)
        texts = [number(bar.elbo, 4), *parts, number(bar.learning_gap, 4)]
        for place, text in zip(places, texts, strict=True):
            ax.text(place, row, text, ha="right", va="center", fontsize=9)


def _bar_handles(bars: list[LedgerBar]) -> list[Artist]:
    left, right, _ = span_of_bars(bars)
    visible = [name for name in _segments_of(bars) if _widest(bars, name) > VISIBLE * (right - left)]
    handles: list[Artist] = [Patch(label=name, **SEGMENTS[name]) for name in (ELBO, *visible)]
    handles.append(Line2D([], [], color=INK, ls="none", marker="|", ms=11, mew=1.3, label="ELBO of each seed"))
    if math.isfinite(first_finite([bar.best_known for bar in bars])):
        handles.append(Line2D([], [], color=INK, lw=1.2, ls=":", label="best known log p(x)"))
    return handles


# ---- latent space ----------------------------------------------------------------------------------------------------


def _scatter(ax: Axes, means: Floats, classes: npt.NDArray[Any] | None) -> None:
    size = float(np.clip(9000 / len(means), 9, 40))
    if classes is None:
        ax.scatter(means[:, 0], means[:, 1], s=size, color=PALETTE[0], alpha=0.65, lw=0)
    elif is_continuous(classes):
        ax.scatter(means[:, 0], means[:, 1], s=size, c=classes, cmap="viridis", alpha=0.8, lw=0)
    else:
        for look, value in _class_looks(classes):
            of_class = means[classes == value]
            ax.scatter(of_class[:, 0], of_class[:, 1], s=size, alpha=0.7, lw=0, **look)
            # The name stands on its class, so that colours need not be told apart.
            x, y = np.median(of_class, axis=0)
            halo = [withStroke(linewidth=3, foreground="white")]
            ax.text(x, y, f"{value}", ha="center", va="center", fontweight="bold", path_effects=halo, zorder=4)
    ax.set_aspect("equal", adjustable="datalim")
    ax.set_xlabel("mean of z₁")
    ax.set_ylabel("mean of z₂")


def _class_looks(classes: npt.NDArray[Any]) -> list[tuple[dict[str, Any], Any]]:
    """Return colour and marker of each class; beyond the tenth they come again."""
    looks = zip(itertools.cycle(CLASS_PALETTE), itertools.cycle(MARKERS), np.unique(classes).tolist(), strict=False)
    return [({"color": colour, "marker": marker}, value) for colour, marker, value in looks]


def _label_key(figure: Figure, axes: Any, classes: npt.NDArray[Any]) -> None:
    if is_continuous(classes):
        scale = ScalarMappable(Normalize(classes.min(), classes.max()), "viridis")
        figure.colorbar(scale, ax=list(axes.flat), label="label", shrink=0.8)
        return
    handles: list[Artist] = [Line2D([], [], ls="none", ms=6, label=f"{v}", **look) for look, v in _class_looks(classes)]
    _outside_legend(figure, handles, title="label")


# ---- rate and distortion ---------------------------------------------------------------------------------------------


def _draw_rates(ax: Axes, curve: RateDistortion) -> None:
    rows = curve.data["rows"]
    points = curve.table[["weight", "rate", "distortion", "log_evidence"]].copy()
    points[["rate", "distortion", "log_evidence"]] /= rows
    best_elbo, evidence = float(curve.table["elbo"].max()) / rows, curve.best_log_evidence / rows
    left, right, bottom, top = _rate_limits(points, best_elbo, evidence)
    ends = np.array([left, right])
    ax.plot(ends, -best_elbo - ends, color=INK, lw=1.1, ls=(0, (5, 3)), zorder=2)
    if math.isfinite(evidence):
        ax.fill_between(ends, -evidence - ends, bottom, color=BEYOND, lw=0, zorder=1)
        ax.plot(ends, -evidence - ends, color=INK, lw=1.2, ls=":", zorder=2)
        own = -points["log_evidence"] - points["rate"]
        ax.vlines(points["rate"], own, points["distortion"], color=GAP, lw=2.2, zorder=2)
    means = points.groupby("weight")[["rate", "distortion"]].mean()
    ax.plot(means["rate"], means["distortion"], color=PALETTE[0], lw=1.4, alpha=0.7, zorder=3)
    ax.plot(
        points["rate"], points["distortion"], ls="none", marker="o", ms=6.5, color=PALETTE[0], mec="white", zorder=4
    )
    ax.set_xlim(left, right)
    ax.set_ylim(bottom, top)
    halo = [withStroke(linewidth=3, foreground="white")]
    for weight, (rate, distortion) in zip(means.index, means.to_numpy(), strict=True):
        # Up and to the right of a falling curve there is room.
        ax.annotate(
            f"β = {weight:g}",
            (rate, distortion),
            (7, 6),
            textcoords="offset points",
            fontweight="bold",
            path_effects=halo,
            zorder=5,
        )
    ax.set_xlabel("rate, KL(q ‖ prior), nats per datum")
    ax.set_ylabel("distortion, −E[log p(x | z)], nats per datum")


def _rate_limits(points: pd.DataFrame, best_elbo: float, evidence: float) -> tuple[float, float, float, float]:
    """Return left, right, bottom and top: all points, and both lines where the points are."""
    rate, distortion = points["rate"], points["distortion"]
    width, height = max(float(np.ptp(rate)), 0.5), max(float(np.ptp(distortion)), 0.5)
    left = min(0.0, float(rate.min())) - 0.02 * width
    right = float(rate.max()) + 0.14 * (float(rate.max()) - left)
    nearest = float(rate[distortion.idxmin()])
    floors = [float(distortion.min()), -max(best_elbo, evidence if math.isfinite(evidence) else best_elbo) - nearest]
    return left, right, min(floors) - 0.06 * height, float(distortion.max()) + 0.1 * height


def _curve_of_rates_handles(curve: RateDistortion) -> list[Artist]:
    each = "a fit at each β" if curve.table["seed"].nunique() == 1 else "a fit at each β and seed; line: means"
    handles: list[Artist] = [
        Line2D([], [], color=PALETTE[0], marker="o", ms=6.5, mec="white", lw=1.4, label=each),
        Line2D([], [], color=INK, lw=1.1, ls=(0, (5, 3)), label="equal to the best ELBO"),
    ]
    if math.isfinite(curve.best_log_evidence):
        handles += [
            Line2D([], [], color=GAP, lw=2.2, label="gap to log p(x) at its own θ"),
            Line2D([], [], color=INK, lw=1.2, ls=":", label="best log p(x) at a θ of these fits"),
            Patch(facecolor=BEYOND, label="out of reach at all of them"),
        ]
    return handles


def _curve_title(curve: RateDistortion) -> str:
    seeds = curve.table["seed"].nunique()
    size = f"{curve.data['rows']} rows, {seeds} seed{'' if seeds == 1 else 's'}"
    return f"{short(curve.model)} on {short(curve.data['name'])} ({size})"


# ---- what they share -------------------------------------------------------------------------------------------------


@contextmanager
def _styled() -> Iterator[None]:
    """Draw in the project's style, whatever style the caller has, and put the caller's back."""
    with matplotlib.rc_context(), matplotlib.style.context(["default", STYLE]):
        yield


def _figure(width: float, height: float, space: float = 0.02) -> Figure:
    return Picture(figsize=(width, height), layout=ConstrainedLayoutEngine(wspace=space))


def _head(figure: Figure, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", fontweight="bold", fontsize=11.5)


def _title(comparison: Comparison) -> str:
    seeds, data = comparison.table["seed"].nunique(), comparison.data
    size = f"{data['rows']} rows, {seeds} seed{'' if seeds == 1 else 's'}"
    return f"{short(comparison.model)} on {short(data['name'])} ({size})"


def _looks(comparison: Comparison) -> dict[str, tuple[str, str]]:
    methods = comparison.table["method"].unique()
    return {str(m): (PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]) for i, m in enumerate(methods)}


def _plain_formatter() -> ScalarFormatter:
    formatter = ScalarFormatter(useOffset=False)
    formatter.set_scientific(False)
    return formatter


def _outside_legend(figure: FigureBase, handles: list[Artist], title: str | None = None) -> None:
    """Put a legend below, in as many columns as the width of the figure takes."""
    columns = _legend_columns(handles, figure.bbox.width / figure.dpi)  # type: ignore[attr-defined]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, title=title, columnspacing=1.6)


def _legend_columns(handles: list[Artist], width: float) -> int:
    return next((n for n in range(len(handles), 1, -1) if _legend_width(handles, n) <= width), 1)


def _legend_height(handles: list[Artist], width: float) -> float:
    """Height of a legend in inches, in a figure of this width in inches."""
    return 0.2 + 0.2 * math.ceil(len(handles) / _legend_columns(handles, width))


def _legend_width(handles: list[Artist], columns: int) -> float:
    """Width of a legend in inches, roughly; its columns are filled one after the other."""
    split = np.array_split(np.array([len(str(handle.get_label())) for handle in handles]), columns)
    return float(sum(LEGEND_INCHES_PER_ENTRY + LEGEND_INCHES_PER_LETTER * lengths.max() for lengths in split))

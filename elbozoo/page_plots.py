"""Pictures for pages: as wide as a phone shows without shrinking its letters; see `plots` for those of a report.

Totals over the rows, in nats. Every function returns a figure of its own and leaves matplotlib as it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib.style
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from elbozoo.inference.comparison import Comparison
from elbozoo.inference.fit import Fit
from elbozoo.plots import FAINT, GAP, INK, PALETTE, STYLE, Picture, number
from elbozoo.words import NOT_A_BOUND

Floats = npt.NDArray[np.float64]

WIDTH = 5.6  # inches
# Where the first steps would leave the end no room: the share of the picture's height that belongs to the end.
END = 0.6
SMOOTHING = 0.05  # share of the steps so far that the average takes in on each side
BAR = 0.56
COLOURS = {
    "approximation gap": "#CC79A7",
    "amortization gap": GAP,
    "gap": "#8C8C8C",
    "learning gap": "white",
}


class Segment(NamedTuple):
    """A part of a bar: its name, where it starts and how wide it is, nats."""

    name: str
    start: float
    width: float


def climb(fit: Fit, ledger: pd.Series) -> Figure:
    """Draw the ELBO of a fit and log p(x) at its θ against the steps; what is shaded between them is the gap.

    The axis shows the end at its full height, so that the first steps may lie below it. Where the q has no ELBO, the
    objective is drawn.
    """
    steps = fit.trajectory["step"].to_numpy(float) + 1 if len(fit.trajectory) else np.ones(1)
    bound = fit.trajectory["elbo" if ledger["is_bound"] else "objective"].to_numpy(float)
    truth = fit.trajectory["log_evidence"].to_numpy(float)
    if not len(bound):  # nothing had to be learned
        bound, truth = np.full(1, ledger["elbo"]), np.full(1, ledger["log_evidence"])
    with _styled():
        figure = Picture(figsize=(WIDTH, 3.7), layout="constrained")
        axes = figure.subplots()
        smooth, known = smoothed(bound), np.isfinite(truth)
        name = "ELBO" if ledger["is_bound"] else "objective"
        axes.plot(steps, bound, color=PALETTE[0], lw=0.6, alpha=0.25)
        axes.plot(steps, smooth, color=PALETTE[0], lw=1.6, label=f"{name}, smoothed")
        if known.any():
            axes.plot(steps[known], truth[known], color=PALETTE[1], lw=1.6, ls=(0, (5, 2)), label="log p(x) at this θ")
            if ledger["is_bound"]:
                at_truth = np.interp(steps[known], steps, smooth)
                axes.fill_between(steps[known], at_truth, truth[known], color=GAP, alpha=0.3, lw=0, label="gap")
        elif math.isfinite(ledger["log_evidence"]):
            axes.axhline(ledger["log_evidence"], color=PALETTE[1], lw=1.3, ls=":", label="log p(x) at the last θ")
        _mark_end(axes, ledger, steps[-1])
        axes.set_ylim(*climb_limits(smooth, truth, ledger))
        axes.set(xlabel="step", ylabel="nats, total over the rows")
        axes.yaxis.set_major_formatter(_plain())
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def climb_limits(bound: Floats, truth: Floats, ledger: pd.Series) -> tuple[float, float]:
    """Return the ends of the axis: all of the end, and as much of the climb as leaves it readable."""
    ends = _finite([ledger["elbo"], ledger["log_evidence"], bound[-1] if len(bound) else math.nan])
    top = float(max([*ends, *_finite(truth)], default=0.0))
    low = float(min(ends, default=top))
    late = _finite(bound[len(bound) // 3 :])
    depth = max((top - low) / END, top - float(min(late, default=low)), 1e-3 * max(1.0, abs(top)))
    return top - 1.1 * depth, top + 0.08 * depth


def ledger_bar(ledger: pd.Series) -> Figure:
    """Draw one ledger as a stacked bar, from the ELBO through the gaps to the best known log p(x)."""
    return _bars({"": ledger}, {})


def method_bars(comparison: Comparison) -> Figure:
    """Draw the ledger of each method as a stacked bar, mean over its seeds; a stroke is the ELBO of one seed."""
    means = comparison.table.groupby("method").mean(numeric_only=True)
    seeds = {name: part["elbo"].to_numpy(float) for name, part in comparison.table.groupby("method")}
    return _bars({name: means.loc[name] for name in comparison.summary.index}, seeds)


def method_curves(comparison: Comparison) -> Figure:
    """Draw the ELBO of each method against its steps, and log p(x) at its θ dashed, for the first seed."""
    fits = list({fit.method: fit for fit in reversed(comparison.fits)}.values())[::-1]
    with _styled():
        figure = Picture(figsize=(WIDTH, 4.0), layout="constrained")
        axes = figure.subplots()
        limits = []
        for fit, colour in zip(fits, _colours(len(fits)), strict=True):
            record = comparison.table[comparison.table["method"] == fit.method].iloc[0]
            limits.append(_draw_method(axes, fit, record, colour))
        tops = [top for _, top in limits]
        axes.set_ylim(min(low for low, _ in limits), max(tops))
        axes.set(xlabel="share of the steps of each method", ylabel="nats, total over the rows")
        axes.yaxis.set_major_formatter(_plain())
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def smoothed(values: Floats) -> Floats:
    """Average over a window that grows with the step, so that the quick beginning is not blurred."""
    position = np.arange(len(values))
    reach = (SMOOTHING * position).astype(int)
    total = np.concatenate([[0.0], values.cumsum()])
    first, last = position - reach, np.minimum(position + reach + 1, len(values))
    smooth: Floats = (total[last] - total[first]) / (last - first)
    return smooth


def segments(ledger: pd.Series) -> list[Segment]:
    """Return the parts of a bar from the ELBO up to the best known log p(x).

    What Monte Carlo noise or an unfinished search made negative has width 0, and its neighbour takes in no more than
    the gap itself, so that the segments end where the evidence is.
    """
    found = []
    evidence, gap = float(ledger["log_evidence"]), max(float(ledger["gap"]), 0.0)
    approximation = float(ledger["approximation_gap"])
    if math.isfinite(approximation):
        approximation = min(max(approximation, 0.0), gap)
        found.append(Segment("amortization gap", evidence - gap, gap - approximation))
        found.append(Segment("approximation gap", evidence - approximation, approximation))
    elif math.isfinite(ledger["gap"]):
        found.append(Segment("gap", evidence - gap, gap))
    if math.isfinite(ledger["learning_gap"]):
        found.append(Segment("learning gap", evidence, max(float(ledger["learning_gap"]), 0.0)))
    return found


# ---- parts -----------------------------------------------------------------------------------------------------------


def _mark_end(axes: Axes, ledger: pd.Series, last: float) -> None:
    ends: dict[str, Any] = {"ls": "none", "zorder": 4, "clip_on": False}
    if math.isfinite(ledger["log_evidence"]):
        axes.plot(last, ledger["log_evidence"], marker="s", ms=5.5, color=PALETTE[1], mfc="white", **ends)
    if math.isfinite(ledger["elbo"]):
        axes.plot(last, ledger["elbo"], marker="o", ms=5.5, color=PALETTE[0], **ends)


def _draw_method(axes: Axes, fit: Fit, record: pd.Series, colour: str) -> tuple[float, float]:
    """Draw one fit and return the limits of the axis that suit it."""
    bound, truth = (fit.trajectory[name].to_numpy(float) for name in ("elbo", "log_evidence"))
    shares = (np.arange(len(bound)) + 1) / max(1, len(bound))
    known = np.isfinite(truth)
    label = fit.method if record["is_bound"] else f"{fit.method} ({NOT_A_BOUND})"
    axes.plot(shares, smoothed(bound), color=colour, lw=1.6, label=label)
    axes.plot(shares[known], truth[known], color=colour, lw=1.3, ls=(0, (4, 2)))
    _ends_of(axes, record, colour)
    return climb_limits(smoothed(bound), truth[-len(truth) // 2 :], record)


def _ends_of(axes: Axes, record: pd.Series, colour: str) -> None:
    ends: dict[str, Any] = {"ls": "none", "zorder": 4, "clip_on": False, "color": colour}
    axes.plot(1.0, record["log_evidence"], marker="s", ms=6, mfc="white", **ends)
    axes.plot(1.0, record["elbo"], marker="o", ms=4.5, **ends)


def _bars(ledgers: dict[str, pd.Series], seeds: dict[str, Floats]) -> Figure:
    left, right = bar_limits(list(ledgers.values()), seeds)
    with _styled():
        figure = Picture(figsize=(WIDTH, 1.75 + 0.62 * len(ledgers)), layout="constrained")
        axes = figure.subplots()
        for place, (name, ledger) in enumerate(ledgers.items()):
            _draw_bar(axes, place, ledger, left, right)
            marks = seeds.get(name, np.empty(0))
            axes.plot(marks, [place] * len(marks), ls="none", marker="|", ms=15, mew=1.3, color=INK, zorder=4)
        best = _finite([ledger["log_evidence"] + ledger["learning_gap"] for ledger in ledgers.values()])
        if len(best):
            axes.axvline(max(best), color=INK, lw=1.2, ls=":", zorder=3, label="best known log p(x)")
        axes.set_yticks(
            range(len(ledgers)), [name.replace("-", "-\n", 1) if len(name) > 14 else name for name in ledgers]
        )
        axes.set_ylim(len(ledgers) - 0.4, -0.6)
        axes.set_xlim(left, right)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("nats, total over the rows (the axis does not begin at 0)")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(_plain())
        handles = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2)
    return figure


def _draw_bar(axes: Axes, place: int, ledger: pd.Series, left: float, right: float) -> None:
    look: dict[str, Any] = {"height": BAR, "zorder": 2}
    if math.isfinite(ledger["elbo"]):
        axes.barh(place, ledger["elbo"] - left, left=left, color="#D5D9DD", label="ELBO", **look)
        text = number(ledger["elbo"], 2)
        axes.annotate(text, (left, place), (5, 0), textcoords="offset points", va="center", fontsize=9, zorder=5)
    else:
        axes.annotate(
            NOT_A_BOUND, (left, place), (5, 0), textcoords="offset points", va="center", style="italic", zorder=5
        )
    for segment in segments(ledger):
        is_hatched = segment.name == "learning gap"
        edges: dict[str, Any] = {"edgecolor": FAINT, "hatch": "////", "lw": 0.6} if is_hatched else {}
        # What cannot be seen needs no place in the legend.
        name = segment.name if segment.width > 2e-3 * (right - left) else None
        axes.barh(
            place, segment.width, left=segment.start, facecolor=COLOURS[segment.name], label=name, **edges, **look
        )


def bar_limits(ledgers: list[pd.Series], seeds: dict[str, Floats]) -> tuple[float, float]:
    """Return where the axis of the bars begins and ends: the differences fill most of it."""
    bounds = [ledger["elbo"] for ledger in ledgers] + [value for part in seeds.values() for value in part]
    tops = [ledger["log_evidence"] + max(0.0, np.nan_to_num(ledger["learning_gap"])) for ledger in ledgers]
    lows = _finite([*bounds, *[ledger["log_evidence"] for ledger in ledgers]])
    if not len(lows):
        return -1.0, 0.0
    top = float(max([*_finite(tops), *lows]))
    span = max(top - float(min(lows)), 1e-6 * max(1.0, abs(top)))
    return top - 1.45 * span, top + 0.05 * span


def _finite(values: Any) -> Floats:
    array = np.asarray(list(values), dtype=float)
    found: Floats = array[np.isfinite(array)]
    return found


def _colours(count: int) -> list[str]:
    return [PALETTE[i % len(PALETTE)] for i in range(count)]


def _plain() -> ScalarFormatter:
    formatter = ScalarFormatter(useOffset=False)
    formatter.set_scientific(False)
    return formatter


@contextmanager
def _styled() -> Iterator[None]:
    with matplotlib.rc_context(), matplotlib.style.context(["default", STYLE]):
        yield

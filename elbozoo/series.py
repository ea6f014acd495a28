"""What pictures of a comparison show, as numbers: curves, ledger and latent space, in nats per datum.

The pictures of :mod:`elbozoo.plots` and the charts of a report draw the same numbers.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from elbozoo.inference.comparison import Comparison
from elbozoo.inference.fit import Fit

Floats = npt.NDArray[np.float64]

# Okabe and Ito's palette, told apart with any colour vision; without its yellow, which vanishes on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#56B4E9", "#4D4D4D", "#CC79A7", "#E69F00")
CLASS_PALETTE = (*PALETTE, "#882255", "#999933", "#332288")  # the last three are Tol's
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "p", "h")
NONE = "–"
SMOOTHING = 0.05  # share of the steps so far that the average takes in on each side
EARLY = 3  # the first third of the steps may lie outside the picture
LOG_RATIO = 4.0
DRAWN_POINTS = 600
MOST_CLASSES = 20

ELBO, AMORTIZATION, APPROXIMATION, UNSPLIT, LEARNING = (
    "ELBO",
    "amortization gap",
    "approximation gap",
    "gap, not split",
    "learning gap",
)


class LedgerBar(NamedTuple):
    """The ledger of one method, mean over its seeds, nats per datum; NaN where a figure does not apply."""

    method: str
    elbo: float
    amortization_gap: float
    approximation_gap: float
    gap: float
    log_evidence: float
    learning_gap: float
    seeds: list[float]
    is_local: bool

    @property
    def is_split(self) -> bool:
        """Whether family and source are told apart: not where one q stands for the whole data set."""
        return self.is_local and math.isfinite(self.amortization_gap)

    @property
    def best_known(self) -> float:
        """Best known log p(x) on these rows."""
        return self.log_evidence + self.learning_gap

    def segments(self) -> dict[str, tuple[float, float]]:
        """Return start and width of each segment from the ELBO up to the best known log p(x).

        What Monte Carlo noise or an unfinished search made negative is drawn with width 0, and its neighbour
        takes in no more than the gap itself, so that the segments end where the evidence is.
        """
        found = {}
        gap = max(self.gap, 0.0)
        if self.is_split:
            approximation = min(max(self.approximation_gap, 0.0), gap)
            found[AMORTIZATION] = (self.log_evidence - gap, gap - approximation)
            found[APPROXIMATION] = (self.log_evidence - approximation, approximation)
        elif math.isfinite(self.gap):
            found[UNSPLIT] = (self.log_evidence - gap, gap)
        if math.isfinite(self.learning_gap):
            found[LEARNING] = (self.log_evidence, max(self.learning_gap, 0.0))
        return found


def ledger(comparison: Comparison) -> list[LedgerBar]:
    """Return the ledger of every method, mean over its seeds, nats per datum, best evidence first."""
    rows = comparison.data["rows"]
    names = ("elbo", "amortization_gap", "approximation_gap", "gap", "log_evidence", "learning_gap")
    bars = []
    for method, means in comparison.summary.iterrows():
        of_method = comparison.table[comparison.table["method"] == method]
        means_per_datum = {name: float(means[name, "mean"]) / rows for name in names}
        is_local = next(fit.guide.is_local for fit in comparison.fits if fit.method == method)
        bars.append(LedgerBar(str(method), **means_per_datum, seeds=list(of_method["elbo"] / rows), is_local=is_local))
    return bars


def number(value: float, decimals: int) -> str:
    """Return ``value`` with a proper minus sign and without a negative zero; an en dash for NaN."""
    if not math.isfinite(value):
        return NONE
    text = f"{value:.{decimals}f}"
    is_zero = not text.strip("-0.")
    return text.lstrip("-") if is_zero else text.replace("-", "−")


class Curve(NamedTuple):
    """What is drawn of one fit, nats per datum; arrays are empty where there is nothing to draw."""

    method: str
    seed: int
    steps: Floats
    seconds: Floats
    elbo: Floats
    evidence: Floats
    final_elbo: float
    final_evidence: float

    def x(self, against: str) -> Floats:
        """Return the steps or the seconds."""
        return self.steps if against == "steps" else self.seconds


def curves_of(comparison: Comparison) -> list[Curve]:
    """Return what is drawn of every fit."""
    rows = comparison.data["rows"]
    records = comparison.table.to_dict("records")
    return [_curve(fit, record, rows) for fit, record in zip(comparison.fits, records, strict=True)]


def _curve(fit: Fit, record: dict[Any, Any], rows: int) -> Curve:
    trajectory = fit.trajectory
    return Curve(
        fit.method,
        fit.seed,
        # The first step is 1, so that an axis can be logarithmic.
        steps=trajectory["step"].to_numpy(float) + 1 if len(trajectory) else np.ones(1),
        seconds=trajectory["seconds"].to_numpy(float).cumsum() if len(trajectory) else np.array([fit.seconds]),
        elbo=_smooth(trajectory["elbo"].to_numpy(float) / rows),
        evidence=trajectory["log_evidence"].to_numpy(float) / rows,
        final_elbo=record["elbo"] / rows,
        final_evidence=record["log_evidence"] / rows,
    )


def _smooth(values: Floats) -> Floats:
    """Average over a window that grows with the step, so that the quick beginning is not blurred."""
    position = np.arange(len(values))
    reach = (SMOOTHING * position).astype(int)
    total = np.concatenate([[0.0], values.cumsum()])
    first, last = position - reach, np.minimum(position + reach + 1, len(values))
    smooth: Floats = (total[last] - total[first]) / (last - first)
    return smooth


def thinned(length: int, points: int = DRAWN_POINTS) -> npt.NDArray[np.int64]:
    """Return the points to draw: all of a short line, geometrically spaced ones of a long one."""
    if length <= points:
        return np.arange(length)
    geometric = np.geomspace(1, length, points).astype(np.int64) - 1
    even = np.linspace(0, length - 1, points).astype(np.int64)
    return np.union1d(geometric, even)


def best_known(comparison: Comparison) -> float:
    """Return the best log p(x) known on these rows, nats per datum; NaN where none is."""
    table = comparison.table
    return first_finite(list((table["log_evidence"] + table["learning_gap"]) / comparison.data["rows"]))


def first_fits(comparison: Comparison) -> list[Fit]:
    """Return the fit of the first seed of each method."""
    return list({fit.method: fit for fit in reversed(comparison.fits)}.values())[::-1]


def latent_means(fit: Fit) -> Floats | None:
    """Means of q for the rows of the fit, (N, 2); None unless the latent is one pair of reals per datum."""
    if fit.x is None or not fit.guide.is_local or fit.guide.is_discrete:
        return None
    sites = fit.entry.latent_sites()
    if len(sites) != 1 or sites[0].dim != 2 or not sites[0].is_real:
        return None
    means: Floats = fit.transform().detach().double().cpu().numpy()
    return means


def is_continuous(classes: npt.NDArray[Any]) -> bool:
    """Whether labels are too many values to be classes."""
    return len(np.unique(classes)) > MOST_CLASSES


def short(name: str, length: int = 40) -> str:
    """Return ``name``, cut off with an ellipsis where it is long."""
    return name if len(name) <= length else f"{name[: length - 1]}…"


def first_finite(values: list[float]) -> float:
    """Return the first value that is finite, NaN where none is."""
    return next((value for value in values if math.isfinite(value)), math.nan)


def finite(values: list[float]) -> Floats:
    """Return the values that are finite."""
    array = np.asarray(values, dtype=np.float64)
    return array[np.isfinite(array)]


class Span(NamedTuple):
    """What an axis shows, and whether it is logarithmic."""

    low: float
    high: float
    is_log: bool


def span_of_y(drawn: list[Curve], best: float) -> Span | None:
    """Show where the fits end and how they come there; their first wild steps may lie below.

    None where there is no figure to show.
    """
    ends = finite([value for c in drawn for value in (c.final_elbo, c.final_evidence)])
    if not len(ends):
        return None
    top = max(ends.max(), best if math.isfinite(best) else -math.inf)
    lates = finite([c.elbo[len(c.elbo) // EARLY] for c in drawn if len(c.elbo)])
    late = float(lates.min()) if len(lates) else top
    depth = max(1.35 * (top - ends.min()), top - late, 1e-6 * max(1.0, abs(top)))
    return Span(float(top - depth), float(top + 0.06 * depth), is_log=False)


def span_of_x(drawn: list[Curve], against: str, bottom: float) -> Span | None:
    """Take a logarithmic axis where runs differ much in length, from where the first one rises above ``bottom``.

    None where an axis from the first step to the last will do.
    """
    ends = np.array([curve.x(against)[-1] for curve in drawn])
    if ends.max() <= LOG_RATIO * ends.min() or ends.min() <= 0:
        return None
    entries = [
        curve.x(against)[(curve.elbo >= bottom) | (curve.evidence >= bottom)] for curve in drawn if len(curve.elbo)
    ]
    first = min([ends.min(), *(float(x[0]) for x in entries if len(x))])
    return Span(0.8 * max(float(first), 1e-6), 1.35 * float(ends.max()), is_log=True)


def span_of_bars(bars: list[LedgerBar]) -> Span:
    """Begin where the differences do, with some of the ELBO's part to the left."""
    bounds = finite([value for bar in bars for value in (bar.elbo, *bar.seeds)])
    lowest = bounds if len(bounds) else finite([bar.log_evidence for bar in bars])
    tops = finite([bar.best_known for bar in bars])
    if not len(lowest):
        return Span(-1.0, 0.0, is_log=False)
    top = max(float(tops.max()) if len(tops) else -math.inf, float(lowest.max()))
    span = max(top - float(lowest.min()), 1e-6 * max(1.0, abs(top)))
    return Span(top - 1.22 * span, top + 0.05 * span, is_log=False)

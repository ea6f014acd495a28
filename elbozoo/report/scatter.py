"""Where q puts the rows: scatter plots of a latent space, and of the data with the class that q gives each row."""

from __future__ import annotations

from html import escape
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from elbozoo.inference.comparison import Comparison
from elbozoo.inference.fit import Fit
from elbozoo.models.contract.sequences import StackedEntry, by_row, observations
from elbozoo.report.charts import CLASS_COLOURS, SYMBOLS, Figure, numbers, plain_layout, room_for_numbers
from elbozoo.series import Floats, first_fits, is_continuous, short

MOST_POINTS = 3000  # of all panels together
HEIGHT = 420
PLACE = "row"  # name of the axis of a row's place in the table

Labels = npt.NDArray[Any] | None


class Panel(NamedTuple):
    """One scatter plot.

    Attributes
    ----------
    title : str
        Method and seed.
    points : array (N, 2)
        Where the rows are.
    classes : array (N,) or None
        What the colours say.
    axes : (str, str)
        Names of the axes.
    """

    title: str
    points: Floats
    classes: Labels
    axes: tuple[str, str]
    hover: str


def latent_panels(comparison: Comparison) -> list[Panel]:
    """Return the means of q of every row, a panel for the first seed of each method.

    Latents of more than two dimensions are shown along the two principal axes of their means.
    """
    labels = labels_of(comparison)
    found = []
    for fit in first_fits(comparison):
        means = _continuous_means(fit)
        if means is not None:
            points, axes = _in_two_dimensions(means, ("mean of z₁", "mean of z₂"), "the means")
            found.append(Panel(_title(fit), points, _fitting(labels, len(points)), axes, "label"))
    return found


def class_panels(comparison: Comparison) -> list[Panel]:
    """Return the rows with the class that is most probable under q, a panel for the first seed of each method."""
    found = []
    for fit in first_fits(comparison):
        data, probabilities = _rows_of(fit), _class_probabilities(fit)
        if data is not None and probabilities is not None and len(data) == len(probabilities):
            names = (f"{fit.entry.names[0]}", f"{fit.entry.names[-1]}")
            points, axes = _in_two_dimensions(data, names, "the rows")
            found.append(Panel(_title(fit), points, probabilities.argmax(1), axes, "class"))
    return found


def figure(panel: Panel, panels: int) -> Figure:
    """Return one of ``panels`` panels as a figure of Plotly; of many rows evenly spaced ones."""
    shown = np.unique(np.linspace(0, len(panel.points) - 1, min(len(panel.points), MOST_POINTS // panels)).astype(int))
    if panel.classes is None or is_continuous(panel.classes):
        traces = [_of_all(panel, shown)]
    else:
        traces = [
            _of_class(panel, shown[panel.classes[shown] == value], value, place)
            for place, value in enumerate(np.unique(panel.classes).tolist())
        ]
    layout = plain_layout(
        HEIGHT,
        room_for_numbers(float(panel.points[:, 1].min()), float(panel.points[:, 1].max())),
        title={"text": escape(short(panel.title)), "font": {"size": 14}, "x": 0, "xref": "paper"},
        xaxis={"title": {"text": escape(panel.axes[0])}},
        # A row's place in the table has another unit than its value.
        yaxis={"title": {"text": escape(panel.axes[1])}, **({} if panel.axes[0] == PLACE else {"scaleanchor": "x"})},
        showlegend=len(traces) > 1,
    )
    layout["margin"]["t"] = 40
    return {"data": traces, "layout": layout}


def labels_of(comparison: Comparison) -> Labels:
    """Return the labels of the data, where they have some."""
    labels = getattr(comparison, "labels", None)
    return None if labels is None else np.asarray(labels)


def is_thinned(panels: list[Panel]) -> bool:
    """Whether some rows are left out."""
    return any(len(panel.points) > MOST_POINTS // len(panels) for panel in panels)


def _title(fit: Fit) -> str:
    return f"{fit.method}, seed {fit.seed}"


def _continuous_means(fit: Fit) -> Floats | None:
    """Means of q of each row, (N, K); None unless there is one latent of at least two reals per row or step."""
    if fit.x is None or not fit.guide.is_local or fit.guide.has_discrete:
        return None
    sites = fit.entry.latent_sites(fit.x)
    if len(sites) != 1 or not sites[0].is_real:
        return None
    means: Floats = fit.transform().detach().double().cpu().numpy()
    return means if means.ndim == 2 and means.shape[1] > 1 else None


def _class_probabilities(fit: Fit) -> Floats | None:
    """Probabilities under q of the classes of each row, (N, K); None unless each has one finite latent."""
    if fit.x is None or not fit.guide.is_local:
        return None
    sites = fit.entry.latent_sites(fit.x)
    if len(sites) != 1 or not sites[0].is_discrete:
        return None
    probabilities: Floats = fit.transform().detach().double().cpu().numpy()
    return probabilities


def _rows_of(fit: Fit) -> Floats | None:
    """Rows of the table; None where they are not at hand, or some of their values are missing."""
    if fit.x is None:
        return None
    rows = by_row(fit.x, observations(fit.x)) if isinstance(fit.entry, StackedEntry) else fit.x
    return None if rows.ndim != 2 or rows.isnan().any() else rows.double().cpu().numpy()


def _in_two_dimensions(values: Floats, names: tuple[str, str], what: str) -> tuple[Floats, tuple[str, str]]:
    """Return points for a plane: the values themselves, against their position, or along two principal axes."""
    if values.shape[1] == 1:
        return np.column_stack([np.arange(1, len(values) + 1), values[:, 0]]), (PLACE, names[0])
    if values.shape[1] == 2:
        return values, names
    centred = values - values.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    return centred @ axes[:2].T, (f"first principal axis of {what}", "second principal axis")


def _fitting(labels: Labels, rows: int) -> Labels:
    return labels if labels is not None and len(labels) == rows else None


def _of_all(panel: Panel, shown: npt.NDArray[np.int64]) -> dict[str, Any]:
    marker: dict[str, Any] = {"size": _size(len(shown)), "opacity": 0.75, "color": CLASS_COLOURS[0]}
    if panel.classes is not None:
        marker |= {"color": numbers(panel.classes[shown]), "colorscale": "Viridis", "showscale": True}
    return _trace(
        panel, shown, marker, "%{customdata}" if panel.classes is None else "%{customdata}, label %{marker.color}"
    )


def _of_class(panel: Panel, shown: npt.NDArray[np.int64], value: Any, place: int) -> dict[str, Any]:
    marker = {
        "size": _size(len(shown)),
        "opacity": 0.8,
        "color": CLASS_COLOURS[place % len(CLASS_COLOURS)],
        "symbol": SYMBOLS[place % len(SYMBOLS)],
    }
    name = escape(f"{panel.hover} {value}")
    return {**_trace(panel, shown, marker, f"%{{customdata}}, {name}"), "name": name}


def _trace(panel: Panel, shown: npt.NDArray[np.int64], marker: dict[str, Any], what: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "x": numbers(panel.points[shown, 0]),
        "y": numbers(panel.points[shown, 1]),
        "customdata": (shown + 1).tolist(),
        "marker": marker,
        "hovertemplate": f"row {what}<br>%{{x:.4~g}}, %{{y:.4~g}}<extra></extra>",
    }


def _size(points: int) -> float:
    return float(np.clip(90 / max(points, 1) ** 0.5, 4, 9))

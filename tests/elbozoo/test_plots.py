"""The pictures show the table's numbers, and leave matplotlib as it was."""

from __future__ import annotations

import ast
import io
import math
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import image
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from elbozoo import plots, series
from elbozoo.data import load_data
from elbozoo.inference.comparison import Comparison, run_comparison

IRIS = load_data("iris")
METHODS = ["closed-form", "amortized", "mean-field", "free-delta"]
TOLERANCE = 1e-9  # nats per datum


@pytest.fixture(scope="module")
def ppca() -> Comparison:
    return run_comparison("ppca", IRIS.x, METHODS, 2, {"steps": 60}, name="iris", progress=False)


@pytest.fixture(scope="module")
def normal_mean() -> Comparison:
    """One latent for the whole data set."""
    options = {"steps": 40}
    return run_comparison("normal-mean", IRIS.x, ["mean-field", "laplace"], 1, options, name="iris", progress=False)


@pytest.fixture(scope="module")
def mixture() -> Comparison:
    """A discrete latent."""
    options = {"iterations": 5, "restarts": 1}
    return run_comparison("gaussian-mixture", IRIS.x, ["em"], 1, options, name="iris", progress=False)


def with_figures(comparison: Comparison, method: str, **figures: float) -> Comparison:
    table = comparison.table.copy()
    for name, value in figures.items():
        table.loc[table["method"] == method, name] = value
    return replace(comparison, table=table)


def renamed(comparison: Comparison, names: dict[str, str], data: str = "iris") -> Comparison:
    table = comparison.table.assign(method=comparison.table["method"].replace(names))
    fits = [replace(fit, method=names.get(fit.method, fit.method)) for fit in comparison.fits]
    return replace(comparison, table=table, fits=fits, data={**comparison.data, "name": data})


def bar_axes(figure: Figure) -> Axes:
    return next(ax for ax in figure.axes if ax.containers)


def drawn_widths(figure: Figure) -> dict[tuple[str, str], float]:
    """Return the width of each bar by method and segment, as drawn."""
    ax = bar_axes(figure)
    methods = [label.get_text() for label in ax.get_yticklabels()]
    containers = [container for container in ax.containers if isinstance(container, BarContainer)]
    return {
        (method, str(container.get_label())): patch.get_width()
        for container in containers
        for method, patch in zip(methods, container.patches, strict=True)
    }


def ends(figure: Figure, segment: str) -> dict[str, float]:
    ax = bar_axes(figure)
    methods = [label.get_text() for label in ax.get_yticklabels()]
    container = next(c for c in ax.containers if c.get_label() == segment)
    return {m: p.get_x() + p.get_width() for m, p in zip(methods, container.patches, strict=True)}


def assert_bars_show(figure: Figure, table: pd.DataFrame, rows: int) -> None:
    """Every gap is drawn as wide as its mean over the seeds, and the grey part ends at the ELBO."""
    means = table.groupby("method")[["elbo", "amortization_gap", "approximation_gap", "learning_gap"]].mean() / rows
    widths, elbo_ends = drawn_widths(figure), ends(figure, plots.ELBO)
    for method, figures in means.iterrows():
        for segment, name in (
            (plots.AMORTIZATION, "amortization_gap"),
            (plots.APPROXIMATION, "approximation_gap"),
            (plots.LEARNING, "learning_gap"),
        ):
            expected = 0.0 if math.isnan(figures[name]) else max(figures[name], 0.0)
            assert abs(widths[method, segment] - expected) < TOLERANCE, (method, segment)
        if not math.isnan(figures["elbo"]):
            assert abs(elbo_ends[method] - figures["elbo"]) < TOLERANCE, method


# ---- ledger ----------------------------------------------------------------------------------------------------------


def test_bars_are_as_wide_as_the_gaps(ppca: Comparison) -> None:
    assert_bars_show(plots.ledger_bars(ppca), ppca.table, 150)


@pytest.mark.parametrize("name", ["elbo", "amortization_gap", "approximation_gap", "learning_gap"])
def test_bars_of_other_numbers_are_found_out(ppca: Comparison, name: str) -> None:
    """The negative control: a table that differs by a millionth of a nat per datum in one figure."""
    other = ppca.table.copy()
    other.loc[other["method"] == "mean-field", name] += 150 * 1e-6
    with pytest.raises(AssertionError):
        assert_bars_show(plots.ledger_bars(ppca), other, 150)


def test_overview_shows_the_same_bars(ppca: Comparison) -> None:
    assert_bars_show(plots.overview(ppca), ppca.table, 150)


def test_segments_lead_from_the_elbo_to_the_best_known_evidence(ppca: Comparison) -> None:
    best = float((ppca.table["log_evidence"] + ppca.table["learning_gap"]).iloc[0]) / 150
    widths, elbo = drawn_widths(plots.ledger_bars(ppca)), ends(plots.ledger_bars(ppca), plots.ELBO)
    for method in ("closed-form", "amortized", "mean-field"):
        gaps = sum(widths[method, s] for s in (plots.AMORTIZATION, plots.APPROXIMATION, plots.LEARNING))
        assert elbo[method] + gaps == pytest.approx(best, abs=1e-9)
    assert elbo["mean-field"] != pytest.approx(best, abs=0.1)


def test_best_evidence_stands_on_top(ppca: Comparison) -> None:
    ax = bar_axes(plots.ledger_bars(ppca))
    order = [label.get_text() for label in ax.get_yticklabels()]
    assert order == list(ppca.summary.index)
    assert order[0] == "closed-form"
    assert ax.yaxis_inverted()


def test_numbers_stand_beside_the_bars(ppca: Comparison) -> None:
    texts = [text.get_text() for ax in plots.ledger_bars(ppca).axes for text in ax.texts]
    row = ppca.table[ppca.table["method"] == "mean-field"].mean(numeric_only=True) / 150
    for name in ("elbo", "amortization_gap", "approximation_gap", "learning_gap"):
        assert plots.number(row[name], 4) in texts


def test_seeds_are_marked(ppca: Comparison) -> None:
    lines = [line for line in bar_axes(plots.ledger_bars(ppca)).lines if line.get_marker() == "|"]
    drawn = sorted(float(x) for line in lines for x in np.asarray(line.get_xdata()))
    assert drawn == pytest.approx(sorted(ppca.table["elbo"].dropna() / 150), abs=1e-12)


def test_only_methods_without_a_bound_say_so(ppca: Comparison) -> None:
    ax = bar_axes(plots.ledger_bars(ppca))
    (text,) = [text for text in ax.texts if text.get_text() == "not a bound"]
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels[round(text.xy[1])] == "free-delta"  # type: ignore[attr-defined]
    assert drawn_widths(plots.ledger_bars(ppca))["free-delta", plots.ELBO] == 0


@pytest.mark.parametrize(
    ("approximation", "amortization", "drawn"),
    [(-0.3, 10.3, (0.0, 10.0)), (10.4, -0.4, (10.0, 0.0)), (4.0, 6.0, (4.0, 6.0))],
)
def test_negative_gaps_are_drawn_with_no_width(
    ppca: Comparison, approximation: float, amortization: float, drawn: tuple[float, float]
) -> None:
    evidence = float(ppca.table["log_evidence"].max())
    noisy = with_figures(
        ppca,
        "amortized",
        log_evidence=evidence,
        elbo=evidence - 10,
        gap=10.0,
        learning_gap=0.0,
        approximation_gap=approximation,
        amortization_gap=amortization,
    )
    figure = plots.ledger_bars(noisy)
    widths = drawn_widths(figure)
    found = (widths["amortized", plots.APPROXIMATION], widths["amortized", plots.AMORTIZATION])
    assert found == pytest.approx([150**-1 * width for width in drawn], abs=1e-12)
    # The number itself is not prettified.
    texts = [text.get_text() for ax in figure.axes for text in ax.texts]
    assert plots.number(min(approximation, amortization) / 150, 4) in texts


def test_gap_of_a_global_latent_is_not_split(normal_mean: Comparison) -> None:
    widths = drawn_widths(plots.ledger_bars(normal_mean))
    gap = normal_mean.table.set_index("method")["gap"] / 150
    assert widths["laplace", plots.UNSPLIT] == pytest.approx(gap["laplace"], abs=1e-12)
    assert ("laplace", plots.APPROXIMATION) not in widths


def test_a_ledger_without_evidence_can_be_drawn(ppca: Comparison) -> None:
    nothing = {
        name: math.nan
        for name in ("elbo", "log_evidence", "gap", "approximation_gap", "amortization_gap", "learning_gap")
    }
    table = ppca.table.assign(**nothing, log_evidence_kind=None)
    empty = replace(ppca, table=table)
    for figure in (plots.ledger_bars(empty), plots.curves(empty), plots.overview(empty)):
        assert plots.png(figure)
    assert len([t for t in bar_axes(plots.ledger_bars(empty)).texts if t.get_text() == "not a bound"]) == 4


# ---- curves ----------------------------------------------------------------------------------------------------------


def curve_lines(figure: Figure, comparison: Comparison, method: str, style: str) -> list[Line2D]:
    """Return the lines of a method in the first panel: solid ones are ELBOs, dashed ones evidence."""
    position = list(comparison.table["method"].unique()).index(method)
    colour = plots.PALETTE[position]
    lines = [line for line in figure.axes[0].lines if line.get_color() == colour and line.get_linestyle() == style]
    return [line for line in lines if np.isfinite(np.asarray(line.get_ydata(), dtype=float)).any()]


def test_curves_show_steps_and_cumulated_seconds(ppca: Comparison) -> None:
    steps, seconds = plots.curves(ppca).axes
    fit = ppca.fits[2]
    assert fit.method == "amortized"
    wanted = [np.arange(1, 61), fit.trajectory["seconds"].cumsum().to_numpy()]
    for ax, x in zip((steps, seconds), wanted, strict=True):
        assert any(np.array_equal(np.asarray(line.get_xdata()), x) for line in ax.lines)
    assert "nats per datum" in steps.get_ylabel()
    assert "step" in steps.get_xlabel() and "seconds" in seconds.get_xlabel()


def test_elbo_is_averaged_over_a_growing_window(ppca: Comparison) -> None:
    raw = ppca.fits[2].trajectory["elbo"].to_numpy() / 150
    reach = [int(series.SMOOTHING * t) for t in range(len(raw))]
    expected = [raw[t - r : t + r + 1].mean() for t, r in enumerate(reach)]
    drawn = np.asarray(curve_lines(plots.curves(ppca), ppca, "amortized", "-")[0].get_ydata())
    assert np.abs(drawn - expected).max() < 1e-9
    assert np.abs(drawn - raw).max() > 1e-6  # it does smooth


def test_evidence_is_drawn_where_it_was_recorded(ppca: Comparison) -> None:
    record = ppca.fits[2].trajectory["log_evidence"].dropna() / 150
    line = curve_lines(plots.curves(ppca), ppca, "amortized", "--")[0]
    assert np.asarray(line.get_ydata()) == pytest.approx(record.to_numpy(), abs=1e-12)
    assert len(record) < 60


def test_an_objective_that_is_no_elbo_is_not_drawn(ppca: Comparison) -> None:
    figure = plots.curves(ppca)
    assert curve_lines(figure, ppca, "free-delta", "-") == []
    assert len(curve_lines(figure, ppca, "free-delta", "--")) == 2
    (label,) = [t.get_text() for t in figure.legends[0].get_texts() if t.get_text().startswith("free-delta")]
    assert "no ELBO" in label
    # The negative control: where the column holds numbers, there are lines.
    fits = [replace(f, trajectory=f.trajectory.assign(elbo=f.trajectory["objective"])) for f in ppca.fits]
    assert len(curve_lines(plots.curves(replace(ppca, fits=fits)), ppca, "free-delta", "-")) == 2


def test_the_legend_explains_what_is_drawn_and_nothing_else(ppca: Comparison) -> None:
    def legend(comparison: Comparison) -> str:
        return " ".join(text.get_text() for text in plots.curves(comparison).legends[0].get_texts())

    fits = [replace(f, trajectory=f.trajectory.assign(log_evidence=math.nan)) for f in ppca.fits]
    dashed = "log p(x) at the θ of the fit"
    assert dashed in legend(ppca) and "smoothed" in legend(ppca)
    assert dashed not in legend(replace(ppca, fits=fits))
    unbounded = replace(ppca, fits=ppca.fits[6:], table=ppca.table.iloc[6:])
    assert "smoothed" not in legend(unbounded) and dashed in legend(unbounded)


def test_fits_end_at_the_numbers_of_the_table(ppca: Comparison) -> None:
    points = {
        float(np.asarray(line.get_ydata())[0])
        for line in plots.curves(ppca).axes[0].lines
        if len(np.asarray(line.get_xdata())) == 1 and line.get_marker() != "None"
    }
    for value in [*(ppca.table["elbo"].dropna() / 150), *(ppca.table["log_evidence"] / 150)]:
        assert min(abs(point - value) for point in points if not math.isnan(point)) < 1e-12


def test_best_known_evidence_is_a_level_line(ppca: Comparison) -> None:
    levels = [line for line in plots.curves(ppca).axes[0].lines if line.get_linestyle() == ":"]
    assert [float(np.asarray(line.get_ydata())[0]) for line in levels] == pytest.approx(
        [ppca.table["log_evidence"].max() / 150], abs=1e-12
    )


def test_wild_first_steps_do_not_set_the_limits(ppca: Comparison) -> None:
    def wild(trajectory: pd.DataFrame) -> pd.DataFrame:
        changed = trajectory.copy()
        if len(changed) > 3:
            changed.loc[:2, "elbo"] -= 1e9
        return changed

    fits = [replace(fit, trajectory=wild(fit.trajectory)) for fit in ppca.fits]
    bottom, top = plots.curves(replace(ppca, fits=fits)).axes[0].get_ylim()
    assert (bottom, top) == pytest.approx(plots.curves(ppca).axes[0].get_ylim(), abs=1e-9)
    ends_ = ppca.table["elbo"].dropna() / 150
    assert bottom < ends_.min() and ends_.max() < top
    assert top - bottom < 20


def test_runs_of_unlike_length_get_a_logarithmic_axis(ppca: Comparison) -> None:
    alike = replace(ppca, fits=ppca.fits[2:6], table=ppca.table.iloc[2:6])
    assert plots.curves(ppca).axes[0].get_xscale() == "log"  # one step of the closed form, sixty of the others
    assert plots.curves(alike).axes[0].get_xscale() == "linear"


def test_a_fit_without_steps_is_drawn_as_its_end(ppca: Comparison) -> None:
    fits = [replace(fit, trajectory=fit.trajectory.iloc[:0]) for fit in ppca.fits]
    assert plots.png(plots.overview(replace(ppca, fits=fits)))


def test_long_lines_are_thinned_but_keep_their_ends(ppca: Comparison) -> None:
    n = 20_000
    ramp = np.linspace(-9.0, -3.0, n)
    long = pd.DataFrame(
        {"step": range(n), "seconds": 0.01, "objective": 150 * ramp, "elbo": 150 * ramp, "log_evidence": math.nan}
    )
    one = replace(ppca, fits=[replace(ppca.fits[2], trajectory=long)], table=ppca.table.iloc[2:3])
    (line,) = curve_lines(plots.curves(one), one, "amortized", "-")
    x = np.asarray(line.get_xdata())
    assert len(x) < 3 * series.DRAWN_POINTS
    assert (x[0], x[-1]) == (1, n)
    assert np.diff(x).min() > 0


# ---- latent space ----------------------------------------------------------------------------------------------------


def scatter_points(ax: Axes) -> np.ndarray:
    return np.concatenate([np.asarray(collection.get_offsets()) for collection in ax.collections])


def test_latent_space_shows_the_means_of_the_first_seed(ppca: Comparison) -> None:
    figure = plots.latent_space(ppca)
    assert figure is not None
    panels = [ax for ax in figure.axes if ax.collections]
    assert [ax.get_title(loc="left") for ax in panels] == [f"{method}, seed 0" for method in METHODS]
    for ax, fit in zip(panels, ppca.fits[::2], strict=True):
        assert np.array_equal(scatter_points(ax), fit.transform().numpy())
    assert not np.array_equal(scatter_points(panels[1]), ppca.fits[3].transform().numpy())  # the other seed


def test_labels_colour_the_rows(ppca: Comparison) -> None:
    assert IRIS.labels is not None
    figure = plots.latent_space(ppca, IRIS.labels)
    assert figure is not None
    means = ppca.fits[0].transform()
    for value, collection in enumerate(figure.axes[0].collections):
        assert np.array_equal(np.asarray(collection.get_offsets()), means[IRIS.labels == value].numpy())
    assert len({tuple(c.get_facecolor()[0]) for c in figure.axes[0].collections}) == 3
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["0", "1", "2"]


def test_labels_are_taken_from_the_comparison(ppca: Comparison) -> None:
    class Labelled(Comparison):
        labels = IRIS.labels

    labelled = Labelled(**{name: getattr(ppca, name) for name in ppca.__dataclass_fields__})
    figure = plots.latent_space(labelled)
    assert figure is not None and len(figure.axes[0].collections) == 3


def test_many_labels_become_a_scale(ppca: Comparison) -> None:
    figure = plots.latent_space(ppca, torch.arange(150))
    assert figure is not None and len(figure.axes[0].collections) == 1
    assert plots.png(figure)


def test_there_is_no_latent_space_to_draw(ppca: Comparison, mixture: Comparison, normal_mean: Comparison) -> None:
    assert plots.latent_space(mixture) is None
    assert plots.latent_space(normal_mean) is None
    assert plots.latent_space(replace(ppca, fits=[replace(fit, x=None) for fit in ppca.fits])) is None
    options = {"steps": 2, "latent_dim": 3}
    wide = run_comparison("ppca", IRIS.x, ["closed-form"], 1, options, name="iris", progress=False)
    assert plots.latent_space(wide) is None
    assert plots.latent_space(ppca) is not None


# ---- all figures -----------------------------------------------------------------------------------------------------


def test_figures_have_names(ppca: Comparison, mixture: Comparison) -> None:
    assert list(plots.figures(ppca)) == ["curves", "ledger", "latent_space"]
    assert list(plots.figures(mixture)) == ["curves", "ledger"]


def test_saved_figures_have_150_dots_per_inch(ppca: Comparison, tmp_path: Path) -> None:
    figure = plots.ledger_bars(ppca)
    path = plots.save(figure, tmp_path / "ledger.png")
    pixels = image.imread(path)
    width, height = figure.get_size_inches()
    assert pixels.shape[:2] == (round(150 * height), round(150 * width))
    assert pixels.std() > 0.01


def test_matplotlib_is_left_as_it_was(ppca: Comparison) -> None:
    with matplotlib.rc_context({"figure.facecolor": "black", "font.size": 31, "lines.linewidth": 9}):
        before = dict(matplotlib.rcParams)
        figure = plots.overview(ppca)
        plots.png(figure)
        assert dict(matplotlib.rcParams) == before
    assert figure.get_facecolor() == (1, 1, 1, 1)


def test_no_pyplot() -> None:
    tree = ast.parse(Path(plots.__file__).read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert any(name.startswith("matplotlib") for name in names)
    assert not any("pyplot" in name for name in names)


def test_the_same_comparison_gives_the_same_picture(ppca: Comparison) -> None:
    assert plots.png(plots.curves(ppca)) == plots.png(plots.curves(ppca))


def test_names_are_no_formulas(ppca: Comparison) -> None:
    name = r"$\frac$ <b> & 数"
    hostile = renamed(ppca, {"amortized": r"$\foo$"}, data=r"$\frac$.csv")
    for figure in (*plots.figures(hostile).values(), plots.overview(hostile)):
        assert plots.png(figure)
    with pytest.raises(ValueError, match="frac"):  # the negative control: matplotlib's own way
        figure = Figure()
        figure.text(0, 0, name)
        figure.savefig(io.BytesIO())


@pytest.mark.filterwarnings("error:constrained_layout not applied")
def test_long_names_and_many_methods_fit_the_figure(ppca: Comparison) -> None:
    tables, fits = [], []
    for i in range(5):
        one = renamed(ppca, {method: f"{method}-{'long-' * 9}{i}" for method in METHODS})
        tables.append(one.table)
        fits += one.fits
    many = replace(ppca, table=pd.concat(tables, ignore_index=True), fits=fits)
    for figure in (plots.curves(many), plots.ledger_bars(many), plots.overview(many)):
        figure.draw_without_rendering()
        legends = [*figure.legends, *(legend for sub in figure.subfigs for legend in sub.legends)]
        assert legends
        for legend in legends:
            box = legend.get_window_extent()
            assert box.x0 >= figure.bbox.x0 and box.x1 <= figure.bbox.x1
        for ax in figure.axes:
            assert ax.get_window_extent().width > 100
            assert ax.get_window_extent().height > 100


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [
        (-1234.5678, 2, "−1234.57"),
        (0.00004, 4, "0.0000"),
        (-0.00004, 4, "0.0000"),
        (-0.00006, 4, "−0.0001"),
        (10.0, 0, "10"),
        (math.nan, 2, "–"),
        (math.inf, 2, "–"),
    ],
)
def test_numbers_are_typeset(value: float, decimals: int, text: str) -> None:
    assert plots.number(value, decimals) == text

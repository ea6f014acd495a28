"""The charts of a report show the table's numbers, tell them to the pointer, and are figures that Plotly knows."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from elbozoo import report, series
from elbozoo.comparison import from_results
from elbozoo.data import load_data
from elbozoo.inference.comparison import Comparison, run_comparison
from elbozoo.inference.fit import Fit
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.report import charts, images, posteriors, scatter
from elbozoo.series import Span

IRIS = load_data("iris")
METHODS = ["closed-form", "amortized", "mean-field", "free-delta"]
ROUNDED = 1e-6  # relative: charts hold seven digits


@pytest.fixture(scope="module")
def ppca() -> Comparison:
    options = {"steps": 60, "latent_dim": 2}
    return run_comparison("ppca", IRIS.x, METHODS, 2, options, name="iris", progress=False)


@pytest.fixture(scope="module")
def normal_gamma() -> Comparison:
    """Global latents with a known posterior."""
    options = {"steps": 30}
    return run_comparison("normal-gamma", IRIS.x, ["mean-field", "exact"], 1, options, name="iris", progress=False)


@pytest.fixture(scope="module")
def mixture() -> Comparison:
    options = {"iterations": 20, "restarts": 1, "components": 3, "steps": 10}
    return run_comparison("gaussian-mixture", IRIS.x, ["em", "amortized"], 1, options, name="iris", progress=False)


@pytest.fixture(scope="module")
def digits() -> Comparison:
    data = load_data("digits-binary")
    results = run_comparison("vae", data.x[:60], ["amortized"], 1, {"steps": 4, "latent_dim": 2}, progress=False)
    return from_results(results, data.labels[:60] if data.labels is not None else None, data.image_shape)


def figures_of(page: str) -> dict[str, Any]:
    """Read the charts off a page, as its script does."""
    (text,) = re.findall(r'<script type="application/json" id="charts">(.*?)</script>', page, re.DOTALL)
    found: dict[str, Any] = json.loads(text)
    return found


def traces_of(figure: dict[str, Any] | None, mode: str) -> list[dict[str, Any]]:
    assert figure is not None
    return [trace for trace in figure["data"] if trace.get("mode") == mode]


def knows(figure: dict[str, Any]) -> None:
    """Refuse what Plotly's own schema has no name or no such value for."""
    from plotly import graph_objects

    graph_objects.Figure(json.loads(json.dumps(figure)))


# ---- what Plotly knows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ppca", "normal_gamma", "mixture", "digits"])
def test_every_chart_is_a_figure_of_plotly(name: str, request: pytest.FixtureRequest) -> None:
    found = figures_of(report.html(request.getfixturevalue(name)))
    assert {"curves", "ledger"} < set(found)
    for figure in found.values():
        knows(figure)


def test_a_figure_that_plotly_does_not_know_is_refused(ppca: Comparison) -> None:
    """The negative control."""
    figure = charts.ledger_bars(ppca)
    assert figure is not None
    with pytest.raises(ValueError, match="notatrait"):
        knows({**figure, "layout": {**figure["layout"], "notatrait": 1}})


def test_plotly_is_in_the_page_as_it_came_and_the_policy_names_it(ppca: Comparison) -> None:
    """A browser runs it only if the policy holds its checksum; one letter more and it is another script."""
    from plotly.offline import get_plotlyjs

    page, library = report.html(ppca), get_plotlyjs()
    assert f'<script type="text/plain" id="plotly">{library}</script>' in page
    assert "</script" not in library.lower()

    def is_allowed(script: str) -> bool:
        return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in page[: page.index("</head>")]

    assert is_allowed(library)
    assert not is_allowed(library + " ")


# ---- curves ----------------------------------------------------------------------------------------------------------


def test_hover_tells_step_seconds_elbo_evidence_method_and_seed(ppca: Comparison) -> None:
    """At the last step of every fit, as in its trajectory, smoothed as its line."""
    solid = [trace for trace in traces_of(charts.curves(ppca), "lines") if trace["line"]["dash"] == "solid"]
    lines = {tuple(trace["meta"]): trace for trace in solid}
    curves = {(curve.method, curve.seed): curve for curve in series.curves_of(ppca)}
    assert set(lines) == {key for key, curve in curves.items() if np.isfinite(curve.elbo).any()} != set()
    for key, line in lines.items():
        template, curve = line["hovertemplate"], curves[key]
        assert "%{meta[0]}" in template and "seed %{meta[1]}" in template
        assert "step %{customdata[0]" in template and "seconds" in template and "log p(x)" in template
        step, seconds, elbo, _ = line["customdata"][-1]
        assert (step, line["x"][-1], line["y"][-1]) == (curve.steps[-1], curve.steps[-1], elbo)
        assert seconds == pytest.approx(curve.seconds[-1], rel=ROUNDED)
        assert elbo == pytest.approx(curve.elbo[-1], rel=ROUNDED)


def test_an_evidence_that_is_known_now_and_then_is_joined_and_told(ppca: Comparison) -> None:
    """At -300 nats over 150 rows; where it is never known, the hover has that of the end."""
    evidence = [-300.0 if step % 7 == 0 else math.nan for step in range(60)]
    told = []
    for known in (evidence, math.nan):
        fit = replace(ppca.fits[2], trajectory=ppca.fits[2].trajectory.assign(log_evidence=known))
        one = replace(ppca, fits=[fit], table=ppca.table.iloc[2:3].reset_index(drop=True))
        told.append(traces_of(charts.curves(one), "lines"))
    (solid, dashed), (alone,) = told
    assert (solid["line"]["dash"], dashed["line"]["dash"]) == ("solid", "dash")
    assert dashed["x"] == list(range(1, 60, 7)) and set(dashed["y"]) == {-2.0}
    assert {fact[3] for fact in solid["customdata"]} == {-2.0}
    assert "log p(x) %{customdata[3]:.4f}" in solid["hovertemplate"]
    at_the_end = series.number(ppca.table["log_evidence"][2] / 150, 4)
    assert f"log p(x) at the end {at_the_end}" in alone["hovertemplate"]


def test_marks_at_the_end_are_the_table(ppca: Comparison) -> None:
    marks = traces_of(charts.curves(ppca), "markers")
    for hollow, column in ((True, "log_evidence"), (False, "elbo")):
        drawn = {
            (mark["meta"][0], fact[4]): y
            for mark in marks
            if mark["marker"]["symbol"].endswith("-open") is hollow
            for fact, y in zip(mark["customdata"], mark["y"], strict=True)
        }
        for row in ppca.table.to_dict("records"):
            shown = drawn[row["method"], row["seed"]]
            if math.isfinite(row[column]):
                assert shown == pytest.approx(row[column] / 150, rel=ROUNDED)
            else:
                assert shown is None


def test_buttons_turn_steps_into_seconds(ppca: Comparison) -> None:
    figure = charts.curves(ppca)
    assert figure is not None
    steps, seconds = figure["layout"]["updatemenus"][0]["buttons"]
    assert (steps["label"], seconds["label"]) == ("steps", "seconds")
    assert steps["args"][0]["x"] == [trace["x"] for trace in figure["data"]]
    for trace, x in zip(figure["data"], seconds["args"][0]["x"], strict=True):
        assert x == [fact[1] for fact in trace["customdata"]]
    assert seconds["args"][1]["xaxis.title"]["text"].startswith("seconds")


def test_one_entry_of_the_legend_hides_a_method(ppca: Comparison) -> None:
    figure = charts.curves(ppca)
    assert figure is not None
    assert [trace["name"] for trace in figure["data"] if trace["showlegend"]] == METHODS
    assert {trace["legendgroup"] for trace in figure["data"]} == set(METHODS)


def test_many_fits_are_drawn_with_few_points(ppca: Comparison) -> None:
    """Fifty fits of a thousand steps hold as many points as the page can draw at once; ends stay."""
    import pandas as pd

    fit, row = ppca.fits[2], ppca.table.iloc[2:3]
    long = pd.concat([fit.trajectory] * 17, ignore_index=True).iloc[:1000]
    long["step"] = np.arange(1000)
    fits = [replace(fit, seed=seed, trajectory=long) for seed in range(50)]
    table = pd.concat([row.assign(seed=seed) for seed in range(50)], ignore_index=True)
    lines = traces_of(charts.curves(replace(ppca, fits=fits, table=table)), "lines")
    solid = [line for line in lines if line["line"]["dash"] == "solid"]
    assert len(solid) == 50
    assert sum(len(line["x"]) for line in solid) < 2 * charts.MOST_POINTS  # two kinds of spacing, together
    assert all((line["x"][0], line["x"][-1]) == (1, 1000) for line in solid)


def test_without_any_bound_the_objective_is_drawn(ppca: Comparison) -> None:
    """And called one; where there is a bound it is not."""
    table = ppca.table.assign(elbo=math.nan, log_evidence=math.nan, learning_gap=math.nan)
    without = replace(ppca, table=table)
    assert charts.curves(without) is None and charts.ledger_bars(without) is None
    page = report.html(without)
    assert figures_of(page)["curves"]["layout"]["yaxis"]["title"]["text"] == "objective, nats per datum"
    assert "bounds nothing, and lines of different methods cannot be compared" in page
    assert "bounds nothing, and lines" not in report.html(ppca)


# ---- ledger ----------------------------------------------------------------------------------------------------------


def test_segments_are_the_ledger(ppca: Comparison) -> None:
    figure = charts.ledger_bars(ppca)
    assert figure is not None
    bars = {trace["name"]: trace for trace in figure["data"]}
    means = ppca.table.groupby("method").mean(numeric_only=True) / 150
    for name, column in (("amortization gap", "amortization_gap"), ("approximation gap", "approximation_gap")):
        trace = bars[name]
        for method, width, told in zip(trace["y"], trace["x"], trace["customdata"], strict=True):
            gap = means.loc[method, column]
            if math.isfinite(gap):
                # Parts below 0 are drawn with no width, and their neighbour with the gap.
                assert width == pytest.approx(min(max(gap, 0), max(means.loc[method, "gap"], 0)), abs=1e-6)
                assert told[0] == pytest.approx(gap, rel=ROUNDED, abs=1e-12)
        assert "%{customdata[0]:.4f}" in trace["hovertemplate"]
    told = dict(zip(bars["ELBO"]["y"], bars["ELBO"]["customdata"], strict=True))
    assert told["mean-field"] == pytest.approx(means.loc["mean-field", "elbo"], rel=ROUNDED)
    assert told["free-delta"] is None
    assert [note["y"] for note in figure["layout"]["annotations"]] == ["free-delta"]


# ---- latent space, posterior -----------------------------------------------------------------------------------------


def test_latent_space_shows_the_means_of_q(ppca: Comparison) -> None:
    panels = scatter.latent_panels(replace(ppca))
    assert [panel.title for panel in panels] == [f"{method}, seed 0" for method in METHODS]
    means = ppca.fits[2].transform().numpy()
    assert np.array_equal(panels[1].points, means)
    (trace,) = scatter.figure(panels[1], 1)["data"]
    assert trace["x"] == pytest.approx(means[:, 0], rel=ROUNDED)
    assert trace["customdata"] == list(range(1, 151))


def test_labels_are_told_apart(ppca: Comparison) -> None:
    labelled = from_results(ppca, IRIS.labels)
    traces = scatter.figure(scatter.latent_panels(labelled)[0], 4)["data"]
    assert [trace["name"] for trace in traces] == ["label 0", "label 1", "label 2"]
    assert len({trace["marker"]["symbol"] for trace in traces} | {t["marker"]["color"] for t in traces}) == 6
    assert sum(len(trace["x"]) for trace in traces) == 150


def test_larger_latents_are_shown_along_their_principal_axes() -> None:
    """Distances of a flat cloud in three dimensions stay, to rounding; those of a solid one do not."""
    flat = np.random.default_rng(0).normal(size=(30, 2)) @ np.array([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]])
    solid = flat + np.random.default_rng(1).normal(size=flat.shape)

    def distances(points: np.ndarray) -> np.ndarray:
        return np.linalg.norm(points[:, None] - points[None], axis=-1)

    for points, stays in ((flat, True), (solid, False)):
        shown, _ = scatter._in_two_dimensions(points, ("a", "b"), "x")
        assert np.allclose(distances(shown), distances(points), atol=1e-9) is stays


def test_classes_are_those_of_q(mixture: Comparison) -> None:
    em, _ = scatter.class_panels(mixture)
    assert np.array_equal(em.classes, mixture.fits[0].transform().argmax(1).numpy())
    assert scatter.latent_panels(mixture) == []


def test_exact_methods_agree_with_the_posterior(mixture: Comparison, ppca: Comparison) -> None:
    """To rounding; an encoder after ten steps does not, which is the negative control."""
    (em,), (encoder,) = (list(posteriors.agreements(fit)) for fit in mixture.fits)
    assert em.what == "probability"
    assert np.abs(em.exact - em.q).max() < 1e-9
    assert np.abs(encoder.exact - encoder.q).max() > 1e-3
    closed = list(posteriors.agreements(ppca.fits[0]))
    assert [each.what for each in closed] == ["mean", "standard deviation"]
    assert all(np.abs(each.exact - each.q).max() < 1e-9 for each in closed)
    amortized = list(posteriors.agreements(ppca.fits[2]))
    assert all(np.abs(each.exact - each.q).max() > 1e-3 for each in amortized)


def test_steps_of_a_sequence_stand_in_the_order_of_the_table() -> None:
    x = load_data("simulate:hidden-markov-model", rows=40).x
    options = {"iterations": 3, "restarts": 1}
    (fit,) = run_comparison("hidden-markov-model", x, ["em"], 1, options, progress=False).fits
    (found,) = posteriors.agreements(fit)
    assert len(found.exact) == fit.transform().numel()
    assert np.abs(found.exact - found.q).max() < 1e-9


def test_intervals_of_a_global_latent_are_those_of_its_posterior(normal_gamma: Comparison) -> None:
    """Within six standard errors of 4000 draws; those of another site are not."""
    exact = posteriors._exact_intervals(normal_gamma.fits[0])
    q = posteriors.intervals(normal_gamma.fits[1])
    assert set(exact) == set(q) == {"mean", "precision"}
    for name, several in exact.items():
        for one, other in zip(several, q[name], strict=True):
            error = (one.high - one.low) / 3.29 / math.sqrt(posteriors.DRAWS)
            assert abs(one.mean - other.mean) < 6 * math.sqrt(2) * error
    assert abs(exact["mean"][0].mean - q["precision"][0].mean) > 1
    names = {trace["name"] for figure in posteriors.posterior_figures(normal_gamma) for trace in figure["data"]}
    assert names == {"exact posterior", "mean-field", "exact"}


# ---- images ----------------------------------------------------------------------------------------------------------


def test_images_are_decoded_on_a_grid(digits: Comparison) -> None:
    (picture,) = images.decoded_images(digits)
    assert picture.png.startswith(b"\x89PNG")
    codes = images.codes_on_grid(digits.fits[0])
    assert codes.shape == (images.GRID**2, 2)
    # Quantiles of the normal, to rounding.
    assert torch.allclose(codes.sort(0).values, -codes.sort(0, descending=True).values, atol=1e-12)
    middle = digits.fits[0].decode(codes)[len(codes) // 2]
    assert torch.allclose(middle, digits.fits[0].decode(torch.zeros(1, 2))[0], atol=1e-9)
    assert images.decoded_images(replace(digits, image_shape=None)) == []
    assert 'id="images"' in report.html(digits)


def test_larger_codes_are_drawn_and_rows_reconstructed() -> None:
    data = load_data("digits-binary")
    results = run_comparison("vae", data.x[:40], ["amortized"], 1, {"steps": 2, "latent_dim": 3}, progress=False)
    drawn, rows = images.decoded_images(from_results(results, None, data.image_shape))
    assert "draws of z from its prior" in drawn.title and "the first rows" in rows.title


def test_a_code_decodes_to_what_its_row_is_reconstructed_as(ppca: Comparison, digits: Comparison) -> None:
    """To rounding; another code decodes to something else."""
    for fit in (ppca.fits[2], digits.fits[0]):
        codes = fit.transform()
        assert torch.allclose(fit.decode(codes), fit.reconstruct(), atol=1e-9)
        assert not torch.allclose(fit.decode(codes + 1), fit.reconstruct(), atol=1e-3)


def test_codes_that_do_not_fit_are_refused(ppca: Comparison, mixture: Comparison) -> None:
    def refused(fit: Fit, codes: torch.Tensor) -> str:
        with pytest.raises(InvalidInput) as error:
            fit.decode(codes)
        return str(error.value)

    assert refused(ppca.fits[2], torch.zeros(4, 3)) == (
        "found codes of shape (4, 3), expected (M, 2): a code for each row"
    )
    assert "expected one continuous latent for each row" in refused(mixture.fits[0], torch.zeros(4, 3))


def numbers_in(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(each)
    elif isinstance(value, float):
        yield value


def test_no_chart_holds_what_json_does_not_know(ppca: Comparison) -> None:
    figures = figures_of(report.html(ppca))
    assert all(math.isfinite(value) for value in numbers_in(figures))
    assert not all(math.isfinite(value) for value in numbers_in([math.nan]))  # the negative control


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (340.0, 6400.0, ["500", "1,000", "2,000", "5,000"]),
        (0.4, 90_000.0, ["1", "10", "100", "1,000", "10,000"]),
        (11.0, 19.0, ["11", "19"]),
    ],
)
def test_ticks_of_a_logarithmic_axis_are_written_in_full(low: float, high: float, labels: list[str]) -> None:
    ticks = charts.log_ticks(Span(low, high, True))
    assert ticks["ticktext"] == labels
    assert all(low <= value <= high for value in ticks["tickvals"])

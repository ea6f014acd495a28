"""Rate-distortion curves: PPCA's in closed form, the bound at every β, and a picture that shows the table."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.text import Annotation

import elbozoo as ez
from elbozoo.inference.rate_distortion import RateDistortion, run_rate_distortion
from elbozoo.models.contract.errors import InvalidInput

Z_BOUND = 5.0  # two-sided, normal: a false alarm of 6e-7 for each number compared
ROUNDING = 1e-9  # relative: sums of some hundred float64 terms
IRIS = ez.load_data("iris")
QUICK = {"latent_dim": 1, "steps": 20, "progress": False}


@pytest.fixture(scope="module")
def quick() -> ez.RateDistortion:
    """PPCA after 20 steps: far from its optimum, with exact evidence all the same."""
    return ez.rate_distortion("ppca", IRIS, [3.0, 0.3, 1.0], 2, **QUICK)


# ---- the table -------------------------------------------------------------------------------------------------------


def test_the_table_has_a_row_for_each_weight_and_seed(quick: ez.RateDistortion) -> None:
    """In the order of β; the ELBO is minus rate and distortion (1e-9 relative) and below the exact log p(x)."""
    table = quick.table
    assert list(zip(table["weight"], table["seed"], strict=True)) == [
        (weight, seed) for weight in (0.3, 1.0, 3.0) for seed in (0, 1)
    ]
    assert quick.data == {"name": "iris", "rows": 150, "columns": 4}
    assert (quick.model, quick.method, quick.options) == ("ppca", "amortized", {"latent_dim": 1, "steps": 20})
    np.testing.assert_allclose(table["elbo"], -table["rate"] - table["distortion"], rtol=ROUNDING, atol=0)
    assert (table["log_evidence_kind"] == "exact").all() and (table["log_evidence_se"] == 0).all()
    assert (table["elbo"] <= table["log_evidence"] + Z_BOUND * table["elbo_se"]).all()
    # Negative control: with β in its place the sum is another number.
    assert (table["elbo"] + table["weight"] * table["rate"] + table["distortion"]).abs()[table["weight"] != 1].min() > 1
    for fit, row in zip(quick.fits, table.itertuples(), strict=True):
        assert fit.objective == "beta" and fit.options["kl_weight"] == row.weight
        with torch.no_grad():
            assert row.log_evidence == pytest.approx(float(fit.entry.log_evidence(IRIS.x).sum()), rel=ROUNDING)
    assert quick.best_log_evidence == table["log_evidence"].max()


def test_the_summary_averages_over_seeds(quick: ez.RateDistortion) -> None:
    summary = quick.summary
    assert list(summary.index) == [0.3, 1.0, 3.0]
    of_one = quick.table[quick.table["weight"] == 3.0]["rate"].to_numpy()
    assert summary.loc[3.0, ("rate", "mean")] == pytest.approx(of_one.mean(), rel=ROUNDING)
    assert summary.loc[3.0, ("rate", "std")] == pytest.approx(of_one.std(ddof=1), rel=ROUNDING)


def test_a_fit_of_the_curve_is_the_fit_by_itself(quick: ez.RateDistortion) -> None:
    alone = ez.fit("ppca", IRIS, guide="amortized", objective="beta", kl_weight=0.3, seed=1, **QUICK)
    assert alone.trajectory["objective"].equals(quick.fits[1].trajectory["objective"])
    assert not alone.trajectory["objective"].equals(quick.fits[0].trajectory["objective"])


def test_evidence_that_is_an_estimate_is_left_out() -> None:
    """Three latent dimensions of a network have no integral, and an estimate by q would be no bound for q."""
    x = ez.load_data("digits-binary").x[:20]
    curve = ez.rate_distortion("beta-vae", x, [1.0], latent_dim=3, hidden=4, steps=3, progress=False)
    assert curve.table["log_evidence"].isna().all() and curve.table["log_evidence_kind"].isna().all()
    assert math.isnan(curve.best_log_evidence)
    labels = [text.get_text() for text in curve.plot().legends[0].get_texts()]
    assert labels == ["a fit at each β", "equal to the best ELBO"]


# ---- what is known ---------------------------------------------------------------------------------------------------


def ppca_curve(x: np.ndarray, weight: float, latent_dim: int) -> tuple[float, float]:
    """Rate and distortion per datum at the best θ and q of PPCA for the objective beta, in closed form.

    The best q at a given θ is normal, and what is left is the likelihood of x ~ N(μ, W Wᵀ + s I) with s = β σ², a power
    of β and a constant: W as in PPCA at the noise s, and s = β Σ_{k>K} λ_k / (D - β K) for the eigenvalues λ of the
    covariance, if that is below λ_K. Then R = 1/2 Σ_{k≤K} log(λ_k / s) and D = D/2 (1 + log 2π s/β).
    """
    eigenvalues = np.linalg.eigvalsh(np.cov(x.T, bias=True))[::-1]
    columns = len(eigenvalues)
    noise = weight * eigenvalues[latent_dim:].sum() / (columns - weight * latent_dim)
    assert noise < eigenvalues[latent_dim - 1]
    rate = 0.5 * np.log(eigenvalues[:latent_dim] / noise).sum()
    return float(rate), columns / 2 * (1 + math.log(2 * math.pi * noise / weight))


def test_the_closed_form_is_the_known_one_at_one() -> None:
    """At β = 1 rate and distortion add up to minus PPCA's largest log-likelihood, to rounding (1e-9 relative)."""
    best = ez.fit("ppca", IRIS, method="closed-form", latent_dim=1, progress=False)
    with torch.no_grad():
        expected = -float(best.entry.log_evidence(IRIS.x).mean())
    assert sum(ppca_curve(IRIS.x.numpy(), 1.0, 1)) == pytest.approx(expected, rel=ROUNDING)
    assert sum(ppca_curve(IRIS.x.numpy(), 0.9, 1)) > expected + 1e-3  # negative control: others have a lower ELBO


@pytest.mark.slow
def test_ppca_reaches_its_curve() -> None:
    """Rate and distortion within 0.04 nats per datum of the closed form, as far as 400 steps go (seen: 0.021)."""
    options = {"encoder": "linear", "kl": "analytic", "schedule": "cosine", "learning_rate": 0.05, "steps": 400}
    guide = "amortized-full-rank-normal"
    curve = ez.rate_distortion("ppca", IRIS, [0.3, 2.0], guide=guide, latent_dim=1, progress=False, **options)

    def reaches(row: pd.Series, weight: float) -> bool:
        rate, distortion = ppca_curve(IRIS.x.numpy(), weight, 1)
        return abs(row["rate"] / 150 - rate) < 0.04 and abs(row["distortion"] / 150 - distortion) < 0.04

    assert all(reaches(row, row["weight"]) for _, row in curve.table.iterrows())
    assert not any(reaches(row, 0.9 * row["weight"]) for _, row in curve.table.iterrows())  # negative control


@pytest.fixture(scope="module")
def digits() -> ez.RateDistortion:
    """A small β-VAE on 300 binary digits at four β, 400 steps each."""
    options = {"latent_dim": 2, "hidden": 16, "steps": 400, "schedule": "cosine", "particles": 1, "progress": False}
    return ez.rate_distortion("beta-vae", ez.load_data("digits-binary").x[:300], [0.1, 0.5, 1.0, 4.0], **options)


@pytest.mark.slow
def test_rates_fall_and_distortions_rise_with_beta(digits: ez.RateDistortion) -> None:
    """By more than half a nat per datum from each β to the next, and what z tells of the datum falls with the rate."""
    table = digits.table
    assert (table["rate"].diff().dropna() < -0.5 * 300).all()
    assert (table["distortion"].diff().dropna() > 0.5 * 300).all()
    assert (table["mutual_information"].diff().dropna() < 0).all()
    assert (table["mutual_information"] <= math.log(300)).all()
    assert not (table["objective"].diff().dropna() > 0).any()  # negative control: this falls with β


@pytest.mark.slow
def test_no_beta_prints_an_elbo_above_the_evidence(digits: ez.RateDistortion) -> None:
    """ELBO ≤ log p(x) by quadrature within five standard errors at every β; the objective at β = 0.1 would not pass."""
    table = digits.table.set_index("weight")
    assert (table["log_evidence_kind"] == "quadrature").all()
    allowed = Z_BOUND * np.hypot(table["elbo_se"], table["log_evidence_se"])
    assert (table["elbo"] <= table["log_evidence"] + allowed).all()
    assert table["objective"][0.1] > table["log_evidence"][0.1] + allowed[0.1]  # negative control
    # Above β = 1 the objective is below the ELBO too, by (β - 1) times the rate.
    assert table["objective"][4.0] < table["elbo"][4.0] - table["rate"][4.0]


@pytest.mark.slow
def test_the_objective_is_what_the_weights_make_of_the_parts(digits: ez.RateDistortion) -> None:
    """Its last values are -D - β R of the fit, within 3 % of D: they are means over steps that still move."""
    table = digits.table
    weighed = -table["distortion"] - table["weight"] * table["rate"]
    allowed = 0.03 * table["distortion"]
    assert ((table["objective"] - weighed).abs() < allowed).all()
    unweighed = -table["distortion"] - table["rate"]
    assert ((table["objective"] - unweighed).abs() > allowed)[table["weight"] < 1].all()  # negative control


# ---- the picture -----------------------------------------------------------------------------------------------------


def axes(curve: RateDistortion) -> Axes:
    return ez.RateDistortion(**vars(curve)).plot().axes[0]


def assert_shows(ax: Axes, curve: RateDistortion) -> None:
    """Points, the strokes below them, and both lines of slope -1, to 1e-9 nats per datum; labels at the mean points."""
    table, rows = curve.table, curve.data["rows"]
    dots = next(line for line in ax.lines if line.get_marker() == "o").get_xydata()
    np.testing.assert_allclose(dots, table[["rate", "distortion"]] / rows, rtol=0, atol=1e-9)
    dashed, dotted = (line.get_xydata() for line in ax.lines[:2])
    np.testing.assert_allclose(dashed.sum(1), -table["elbo"].max() / rows, rtol=0, atol=1e-9)
    np.testing.assert_allclose(dotted.sum(1), -table["log_evidence"].max() / rows, rtol=0, atol=1e-9)
    strokes = np.array([path.vertices for path in ax.collections[1].get_paths()])
    lengths = strokes[:, 1, 1] - strokes[:, 0, 1]
    np.testing.assert_allclose(lengths, (table["log_evidence"] - table["elbo"]) / rows, rtol=0, atol=1e-9)
    means = table.groupby("weight")[["rate", "distortion"]].mean() / rows
    labels = {text.get_text(): text.xy for text in ax.texts if isinstance(text, Annotation)}
    assert list(labels) == [f"β = {weight:g}" for weight in means.index]
    np.testing.assert_allclose(list(labels.values()), means, rtol=0, atol=1e-9)


def test_the_picture_shows_the_table(quick: ez.RateDistortion) -> None:
    ax = axes(quick)
    assert_shows(ax, quick)
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    points = quick.table[["rate", "distortion"]].to_numpy() / 150
    assert (points > [left, bottom]).all() and (points < [right, top]).all()
    assert "ppca on iris (150 rows, 2 seeds)" in ax.figure._suptitle.get_text()  # type: ignore[union-attr]


@pytest.mark.parametrize("column", ["rate", "distortion", "elbo", "log_evidence"])
def test_a_picture_of_other_numbers_is_found_out(quick: ez.RateDistortion, column: str) -> None:
    """The negative control: one figure of the best fit that differs by a millionth of a nat per datum."""
    other = quick.table.copy()
    best = other["log_evidence"].idxmax() if column == "log_evidence" else other["elbo"].idxmax()
    other.loc[best, column] += 150 * 1e-6
    with pytest.raises(AssertionError):
        assert_shows(axes(quick), replace(quick, table=other))


def test_a_single_point_has_a_picture(quick: ez.RateDistortion) -> None:
    one = replace(quick, table=quick.table.head(1))
    assert_shows(axes(one), one)


# ---- what may be asked -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "weights", "options", "message"),
    [
        ("ppca", [], {}, r"option weights: found none, expected at least one, such as weights=\[0.1, 1, 10\]"),
        (
            "ppca",
            [1.0, -0.5],
            {},
            "option weights: found -0.5, expected finite numbers above 0: a rate without a price",
        ),
        ("ppca", 0.0, {}, "option weights: found 0, expected finite numbers above 0"),
        ("ppca", ["many"], {}, "option weights: found .'many'., expected numbers above 0, values of β"),
        ("ppca", [1.0], {"kl_weight": 2.0}, r"option kl_weight: found 2.0 with a rate-dist.*; set weights=\[...\]"),
        ("ppca", [1.0], {"objective": "elbo"}, "option objective: found 'elbo' with a rate-distortion curve"),
        ("ppca", [1.0], {"seeds": 0}, "option seeds: found 0, expected at least 1"),
        ("ppca", [1.0], {"guide": "em"}, "no rate-distortion curve of ppca by 'em': it has no β; name a guide"),
        ("ppca", [1.0], {"guide": "free-delta"}, "by 'free-delta': a point mass has no density"),
        ("ppca", [1.0], {"no_such": 1}, "unknown option 'no_such'"),
        ("normal-mean", [1.0], {"guide": "mean-field"}, "it needs latents that belong to one row each"),
    ],
)
def test_bad_input_gets_one_line(model: str, weights: object, options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        ez.rate_distortion(model, IRIS, weights, progress=False, **options)
    assert "\n" not in str(caught.value)


def test_repeated_weights_count_once() -> None:
    curve = run_rate_distortion(
        "ppca", IRIS.x, "amortized", [1, 1.0], [5], {"latent_dim": 1, "steps": 2}, progress=False
    )
    assert list(curve.table["weight"]) == [1.0] and list(curve.table["seed"]) == [5]

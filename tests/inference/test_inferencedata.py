"""What ArviZ gets: groups, dimensions and numbers, for every entry with every guide; and what it does with them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import arviz
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pytest
import torch
from contract import entry_for, every_pair, example_data, guide_for
from pyro import distributions as dist
from scipy import stats
from scipy.special import logsumexp
from torch import Tensor

import elbozoo as ez
from elbozoo.inference import inferencedata
from elbozoo.inference.inferencedata import inference_data
from elbozoo.inference.nuts import NUTSOptions, run_nuts
from elbozoo.models import Batch, Entry, get_entry
from elbozoo.models.contract.entry import Program
from elbozoo.models.contract.sequences import StackedEntry, steps_mask

SCHOOLS = ez.load_data("eight-schools").x
DRAWS = 5
GROUPS = {"posterior", "posterior_predictive", "log_likelihood", "prior", "prior_predictive", "observed_data"}


@pytest.fixture(scope="module")
def schools() -> Entry:
    return get_entry("eight-schools").from_data(SCHOOLS, names=("effect", "standard_error"))


@pytest.fixture(scope="module")
def nuts_schools(schools: Entry) -> arviz.InferenceData:
    """Two short chains: the conversion does not mind whether they have converged."""
    run = run_nuts(schools, SCHOOLS, NUTSOptions(chains=2, warmup=40, draws=60), seed=0, progress=False)
    return inference_data(schools, run.guide(), SCHOOLS, 50, seed=1)


@pytest.fixture(scope="module")
def vi_schools(schools: Entry) -> arviz.InferenceData:
    return inference_data(schools, guide_for(schools, "diagonal-normal", SCHOOLS), SCHOOLS, 120, seed=1)


@pytest.fixture
def no_complaints(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail on any warning, and on anything that ArviZ logs, such as shapes that it does not take."""
    backend = matplotlib.get_backend()
    matplotlib.use("Agg")
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        # pandas, xarray and ArviZ warn of each other's future; that is about their code, not about ours.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        yield
    plt.close("all")
    matplotlib.use(backend)
    assert not [record.getMessage() for record in caplog.records]


# ---- every entry with every guide ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "guide"), every_pair())
def test_every_fit_has_every_group_with_named_dimensions(name: str, guide: str) -> None:
    entry, x = entry_for(name), example_data(name)
    data = inference_data(entry, guide_for(entry, guide, x), x, DRAWS, seed=0)
    # Where nothing is latent there is nothing to have drawn.
    latent = entry.latent_sites(x)
    groups = GROUPS if latent else GROUPS - {"posterior", "prior"}
    # From a flat prior there is nothing to draw.
    groups = groups if all(site.is_proper for site in latent) else groups - {"prior", "prior_predictive"}
    assert set(data.groups()) >= groups
    assert ("constant_data" in data.groups()) == bool(entry.constant_data(x))
    rows = entry.stack_dims if isinstance(entry, StackedEntry) else ("row",)
    sites = {site.name: site for site in entry.latent_sites(x)}
    in_q = {n: s for n, s in sites.items() if s.is_local == all(each.is_local for each in sites.values())}
    for group in (data[name] for name in ("posterior", "prior") if name in groups):
        assert set(in_q) <= set(group.data_vars)
        for site in in_q.values():
            values = group[site.name]
            assert values.sizes["chain"] == 1 and values.sizes["draw"] == DRAWS
            # The latent of a group has no dimension of its rows.
            own = rows if site.event_shape[: len(rows) - 1] == x.shape[1 : len(rows)] else rows[:1]
            assert values.dims[2 : 2 + len(own)] == own if site.is_local else "row" not in values.dims
            assert values.shape[len(values.dims) - len(site.event_shape) :] == site.event_shape
            finite = np.isfinite(values.to_numpy())
            assert (finite[:, :, steps_mask(x).numpy()] if len(own) == 2 else finite).all()
    likelihood = data.log_likelihood["x"]
    assert likelihood.dims == ("chain", "draw", rows[0]) and likelihood.shape == (1, DRAWS, len(x))
    observed = data.observed_data["x"]
    assert observed.dims[: len(rows)] == rows
    for group in (data[name] for name in ("posterior_predictive", "prior_predictive") if name in groups):
        assert group["x"].dims == ("chain", "draw", *observed.dims)
        assert group["x"].shape == (1, DRAWS, *observed.shape)
    if "column" in observed.dims:
        assert list(observed.coords["column"].to_numpy()) == list(entry.names)


@pytest.mark.parametrize(
    ("name", "guide"), [(n, g) for n, g in every_pair() if g in ("exact", "diagonal-normal", "free-diagonal-normal")]
)
def test_the_same_seed_gives_the_same_draws_and_leaves_the_callers_state(name: str, guide: str) -> None:
    entry, x = entry_for(name), example_data(name)
    q = guide_for(entry, guide, x)
    before = torch.get_rng_state()
    first, again, other = (inference_data(entry, q, x, DRAWS, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    for group in {"posterior", "prior_predictive"} & set(first.groups()):
        assert first[group].equals(again[group])
        assert not first[group].equals(other[group])


# ---- the numbers -----------------------------------------------------------------------------------------------------


def test_the_log_likelihood_of_schools_is_scipys(nuts_schools: arviz.InferenceData) -> None:
    """Log N(effect; θ, σ²) at each draw's θ: 1e-12 nats; at the θ of the next school it is another number."""
    theta = nuts_schools.posterior["theta"].to_numpy()
    expected = stats.norm.logpdf(SCHOOLS[:, 0].numpy(), theta, SCHOOLS[:, 1].numpy())
    found = nuts_schools.log_likelihood["x"].to_numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    assert np.abs(np.roll(found, 1, -1) - expected).max() > 0.1


def test_what_the_program_computes_stands_beside_what_it_samples(nuts_schools: arviz.InferenceData) -> None:
    """θ = μ + τ η at every draw of posterior and prior: 1e-12."""
    for group in (nuts_schools.posterior, nuts_schools.prior):
        np.testing.assert_allclose(group["theta"], group["mu"] + group["tau"] * group["eta"], rtol=0, atol=1e-12)
        assert np.abs(group["theta"] - group["mu"]).max() > 1e-3


def test_nuts_keeps_its_chains_and_says_what_happened(nuts_schools: arviz.InferenceData) -> None:
    assert dict(nuts_schools.posterior.sizes) == {"chain": 2, "draw": 60, "school": 8}
    assert nuts_schools.log_likelihood["x"].shape == (2, 60, 8)
    assert nuts_schools.posterior_predictive["x"].shape == (2, 60, 8)
    assert nuts_schools.prior["mu"].shape == (1, 50)
    assert {"diverging", "lp", "n_steps", "step_size"} <= set(nuts_schools.sample_stats.data_vars)
    assert nuts_schools.sample_stats["diverging"].dtype == bool
    assert nuts_schools.sample_stats["lp"].dims == ("chain", "draw")


def test_the_observed_site_is_observed_and_the_rest_is_constant(nuts_schools: arviz.InferenceData) -> None:
    np.testing.assert_array_equal(nuts_schools.observed_data["x"], SCHOOLS[:, 0])
    np.testing.assert_array_equal(nuts_schools.constant_data["standard_error"], SCHOOLS[:, 1])
    assert nuts_schools.observed_data["x"].dims == nuts_schools.constant_data["standard_error"].dims == ("row",)
    assert nuts_schools.attrs["model"] == "eight-schools" and nuts_schools.attrs["guide"] == "draws"


def test_columns_and_coefficients_have_their_names() -> None:
    x = example_data("linear-regression")
    entry = get_entry("linear-regression").from_data(x, names=("age", "dose", "y"), target="y")
    data = inference_data(entry, guide_for(entry, "exact", x), x, DRAWS, seed=0)
    coefficients = data.posterior["coefficients"]
    assert list(coefficients.coords["coefficient"].to_numpy()) == ["intercept", "age", "dose"]
    np.testing.assert_array_equal(data.observed_data["x"], x[:, 2])
    assert data.constant_data["design"].dims[0] == "row"
    x = example_data("ppca")
    names = tuple("abcde")
    entry = get_entry("ppca").from_data(x, names=names)
    data = inference_data(entry, guide_for(entry, "exact", x), x, DRAWS, seed=0)
    assert tuple(data.observed_data["x"].coords["column"].to_numpy()) == names
    assert tuple(data.posterior_predictive["x"].coords["column"].to_numpy()) == names


def test_predictive_draws_have_the_moments_of_the_model() -> None:
    """Normal mean, N = 1: x ~ N(m₀, s₀² + σ²) under the prior, N(m, s² + σ²) under the posterior.

    2000 independent draws: mean and variance within 5 standard errors, a false alarm of 6e-7 each.
    """
    x = torch.tensor([[3.0]], dtype=torch.float64)
    entry = get_entry("normal-mean").from_data(x, scale=1.0, prior_mean=-1.0, prior_scale=2.0)
    data = inference_data(entry, guide_for(entry, "exact", x), x, 2000, seed=3)
    precision = 1 / 4 + 1
    posterior_mean = (-1 / 4 + 3) / precision

    def agrees(values: Any, mean: float, variance: float) -> bool:
        z = (np.asarray(values).ravel() - mean) / np.sqrt(variance)
        return bool(abs(z.mean()) < 5 / np.sqrt(2000) and abs((z**2).mean() - 1) < 5 * np.sqrt(2 / 2000))

    predictive, prior = data.posterior_predictive["x"], data.prior_predictive["x"]
    assert agrees(predictive, posterior_mean, 1 / precision + 1)
    assert agrees(prior, -1.0, 5.0)
    assert agrees(data.posterior["mu"], posterior_mean, 1 / precision)
    assert agrees(data.prior["mu"], -1.0, 4.0)
    assert not agrees(predictive, -1.0, 5.0) and not agrees(predictive, posterior_mean, 1 / precision)
    assert not agrees(prior, posterior_mean, 1 / precision + 1)


def test_a_latent_that_is_summed_out_is_absent_and_the_likelihood_is_marginal() -> None:
    """Log Σ_k π_k N(x_n; μ_k, 1/λ_k) at each draw, by SciPy: 1e-9 nats."""
    x = example_data("bayesian-gaussian-mixture")
    entry = get_entry("bayesian-gaussian-mixture").from_data(x, covariance="diagonal", components=2)
    data = inference_data(entry, guide_for(entry, "diagonal-normal", x), x, DRAWS, seed=0)
    assert set(data.posterior.data_vars) == {"weights", "precisions", "means"} == set(data.prior.data_vars)
    assert data.posterior["means"].dims == ("chain", "draw", "component", "column")
    expected = mixture_log_density(data, x)
    np.testing.assert_allclose(data.log_likelihood["x"][0], expected, rtol=0, atol=1e-9)
    assert np.abs(np.roll(expected, 1, -1) - expected).max() > 1e-3


def mixture_log_density(data: arviz.InferenceData, x: Tensor) -> Any:
    """Log p(x_n given weights, precisions, means) of diagonal components at each draw, (draw, row), by SciPy."""
    weights, precisions, means = (data.posterior[n].to_numpy()[0] for n in ("weights", "precisions", "means"))
    terms = stats.norm.logpdf(x.numpy()[:, None, None], means, precisions**-0.5).sum(-1)  # row, draw, component
    return logsumexp(terms + np.log(weights), -1).T


class Anscombe(torch.nn.Module):
    """A program of the user's with two observed sites, a factor, and something computed for each row."""

    def forward(self, batch: Batch) -> Tensor:
        slope = pyro.sample("slope", dist.Normal(batch.x.new_zeros(()), 1.0))
        pyro.factor("soft_constraint", -slope.square())
        with pyro.plate("data", batch.total, subsample=batch.index):
            mean = pyro.deterministic("mean", slope * batch.x[:, 0], event_dim=0)
            pyro.sample("other", dist.Normal(mean, 1.0), obs=batch.x[:, 0])
            return pyro.sample("x", dist.Normal(mean, 1.0), obs=batch.x[:, 1])


def test_a_program_of_the_users_shows_its_latents_and_what_it_computes_from_them() -> None:
    x = torch.randn(6, 2).double()
    entry = Program(Anscombe(), 2)
    data = inference_data(entry, guide_for(entry, "diagonal-normal", x), x, DRAWS, seed=0)
    assert set(data.posterior.data_vars) == {"slope", "mean"}
    assert data.posterior["mean"].dims == ("chain", "draw", "row")
    slope = data.posterior["slope"].to_numpy()[..., None]
    np.testing.assert_allclose(data.posterior["mean"], slope * x[:, 0].numpy(), rtol=0, atol=1e-12)
    np.testing.assert_array_equal(data.observed_data["x"], x[:, 1])


def test_padded_steps_hold_no_numbers() -> None:
    """Two sequences of 3 and 5 steps: NaN beyond the third of the first, -1 for its states, and nowhere else."""
    table = torch.tensor([[0.0] * 3 + [1.0] * 5, [0.1, 2.0, 0.3, 1.0, 1.1, 0.9, 2.1, 0.2]]).T.double()
    entry = get_entry("hidden-markov-model").from_data(table, sequence=0, states=2)
    x = entry.arrange(table, entry.options)
    data = inference_data(entry, guide_for(entry, "exact", x), x, DRAWS, seed=0)
    padding = np.array([[False] * 3 + [True] * 2, [False] * 5])
    for group in (data.posterior_predictive, data.prior_predictive, data.observed_data):
        values = group["x"].transpose("sequence", "step", ...).to_numpy()
        np.testing.assert_array_equal(
            np.isnan(values), np.broadcast_to(padding.reshape(2, 5, *[1] * (values.ndim - 2)), values.shape)
        )
    states = data.posterior["z"].to_numpy()
    np.testing.assert_array_equal(states == -1, np.broadcast_to(padding, states.shape))
    assert data.posterior["z"].dims == ("chain", "draw", "sequence", "step")
    assert np.isfinite(data.log_likelihood["x"]).all()
    np.testing.assert_array_equal(data.observed_data["x"].to_numpy()[0, :3].ravel(), table[:3, 1])


def test_chunks_of_draws_change_nothing_but_what_is_drawn_anew(
    schools: Entry, vi_schools: arviz.InferenceData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inferencedata, "CHUNK_ELEMENTS", 16 * 50)
    guide = guide_for(schools, "diagonal-normal", SCHOOLS)
    chunked = inference_data(schools, guide, SCHOOLS, 120, seed=1)
    assert chunked.posterior.equals(vi_schools.posterior)
    assert chunked.log_likelihood.equals(vi_schools.log_likelihood)
    assert chunked.prior.sizes == vi_schools.prior.sizes
    assert not chunked.prior.equals(vi_schools.prior)  # so there were chunks: sites are drawn in turn in each


# ---- ArviZ runs on it ------------------------------------------------------------------------------------------------


def test_arviz_summarises_and_draws_nuts(nuts_schools: arviz.InferenceData, no_complaints: None) -> None:
    table = arviz.summary(nuts_schools)
    assert {"mu", "tau", "theta[0]", "eta[7]"} <= set(table.index)
    assert np.isfinite(table[["mean", "sd", "r_hat", "ess_bulk"]].to_numpy()).all()
    arviz.plot_ppc(nuts_schools, num_pp_samples=20)
    arviz.plot_ppc(nuts_schools, group="prior", num_pp_samples=20)
    arviz.plot_trace(nuts_schools, var_names=["mu", "tau"])
    arviz.plot_pair(nuts_schools, var_names=["mu", "tau"], divergences=True)


def test_arviz_takes_one_chain_of_draws_from_q(vi_schools: arviz.InferenceData, no_complaints: None) -> None:
    """r-hat and ESS are about chains, and left out: the summary of a q has statistics alone."""
    table = arviz.summary(vi_schools, kind="stats")
    assert {"mu", "tau", "theta[0]", "eta[7]"} <= set(table.index)
    assert np.isfinite(table.to_numpy()).all()
    arviz.plot_ppc(vi_schools, num_pp_samples=20)
    arviz.plot_ppc(vi_schools, group="prior", num_pp_samples=20)


def test_nuts_and_vi_lie_side_by_side_in_a_forest(
    nuts_schools: arviz.InferenceData, vi_schools: arviz.InferenceData, no_complaints: None
) -> None:
    axes = arviz.plot_forest(
        [nuts_schools, vi_schools], model_names=["nuts", "mean-field"], var_names=["mu", "tau", "theta"], combined=True
    )
    labels = [label.get_text() for label in axes[0].get_yticklabels()]
    assert any("mu" in label for label in labels) and any("theta[7]" in label or "[7]" in label for label in labels)


@pytest.mark.parametrize(
    ("name", "guide"), [("normal-mean", "exact"), ("ppca", "exact"), ("linear-regression", "exact")]
)
def test_loo_runs_on_the_likelihood_of_each_row(name: str, guide: str, no_complaints: None) -> None:
    entry, x = entry_for(name), example_data(name)
    data = inference_data(entry, guide_for(entry, guide, x), x, 500, seed=0)
    # Where one row moves its own latent, or a coefficient, far, Pareto's k is large by right.
    warnings.filterwarnings("ignore", message="Estimated shape parameter of Pareto distribution")
    loo = arviz.loo(data, pointwise=True)
    assert loo.loo_i.dims == ("row",) and loo.n_data_points == len(x)
    assert np.isfinite(float(loo.elpd_loo))


def test_loo_is_the_exact_leave_one_out_density_of_a_conjugate_model() -> None:
    """Normal mean: log p(x_n given the other rows) is normal; PSIS-LOO of 4000 draws within 0.05 nats of it.

    Its error is that of importance weights with k-hat below 0.5: about a hundredth of a nat per row here.
    """
    x = example_data("normal-mean")
    entry = get_entry("normal-mean").from_data(x)
    data = inference_data(entry, guide_for(entry, "exact", x), x, 4000, seed=0)
    precision = 1 / 100 + (len(x) - 1) / 1.0
    mean = (x.sum(0) - x) / precision
    exact = stats.norm.logpdf(x, mean, np.sqrt(1 + 1 / precision)).sum()
    assert float(arviz.loo(data).elpd_loo) == pytest.approx(exact, abs=0.05)
    in_sample = stats.norm.logpdf(x, x.sum(0) / (precision + 1), np.sqrt(1 + 1 / (precision + 1))).sum()
    assert in_sample != pytest.approx(exact, abs=0.05)


@pytest.mark.parametrize(
    ("model", "method", "options"),
    [
        ("gaussian-mixture", "em", {}),
        ("ppca", "mean-field", {"steps": 3}),
        ("normal-mean", "laplace", {"steps": 3}),
        ("normal-mean", "closed-form", {}),
        ("bayesian-gaussian-mixture", "cavi", {"restarts": 1}),
        ("normal-mean", "nuts", {"chains": 2, "warmup": 10, "draws": 8}),
    ],
)
def test_every_method_converts_through_its_fit_and_after_a_round_trip(
    model: str, method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    x = example_data(model)
    fit = ez.fit(model, x, method=method, progress=False, **options)
    back = ez.load_fit(fit.save(tmp_path / "fit"))
    data, again = fit.to_inferencedata(draws=DRAWS), back.to_inferencedata(x, draws=DRAWS)
    assert set(data.groups()) == set(again.groups()) >= GROUPS
    assert ("sample_stats" in data.groups()) == (method == "nuts")
    for group in data.groups():
        assert data[group].equals(again[group]), group
    if method == "nuts":
        assert data.posterior["mu"].shape == (2, 8, 1)


def test_all_fits_of_a_mixture_have_the_same_variables_and_a_marginal_likelihood() -> None:
    """The q of CAVI has a factor for z too; it is summed out of the likelihood as for every other guide."""
    x = example_data("bayesian-gaussian-mixture")
    fit = ez.fit("bayesian-gaussian-mixture", x, method="cavi", covariance="diagonal", restarts=1, progress=False)
    data = fit.to_inferencedata(draws=DRAWS)
    assert set(data.posterior.data_vars) == {"weights", "precisions", "means"}
    expected = mixture_log_density(data, x)
    np.testing.assert_allclose(data.log_likelihood["x"][0], expected, rtol=0, atol=1e-9)
    assert np.abs(np.roll(expected, 1, -1) - expected).max() > 1e-3

"""The public functions: what they promise, on the zoo's own entries and on programs that the user brings."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.nn import PyroModule, PyroParam
from scipy import stats
from torch import Tensor
from torch.distributions import constraints

import elbozoo as ez
from elbozoo import api
from elbozoo.inference.comparison import ROW, TABLE_ONLY
from elbozoo.inference.method import Plan
from elbozoo.models import Batch, entry_names, get_entry

QUICK: dict[str, Any] = {"steps": 5, "iterations": 4, "restarts": 1, "progress": False}


@pytest.fixture
def x() -> Tensor:
    """40 rows of 3 columns that vary together."""
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(40, 1, generator=generator, dtype=torch.float64)
    return common + 0.7 * torch.randn(40, 3, generator=generator, dtype=torch.float64) + torch.tensor([1.0, -2.0, 0.5])


def refused(match: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """Assert that the call is refused with one line that matches."""
    with pytest.raises(ez.InvalidInput, match=match) as error:
        call(*arguments, **options)
    assert len(str(error.value).splitlines()) == 1, str(error.value)


def without_seconds(table: pd.DataFrame) -> pd.DataFrame:
    return table.drop(columns="seconds")


# ---- names -----------------------------------------------------------------------------------------------------------


def test_every_public_name_is_there_and_says_what_it_is() -> None:
    assert ez.__all__ == sorted(ez.__all__)
    for name in ez.__all__:
        value = getattr(ez, name)
        assert inspect.getdoc(value), name
        assert name in dir(ez)
        if inspect.isclass(value):
            methods = [m for m, f in vars(value).items() if not m.startswith("_") and callable(f)]
            assert all(inspect.getdoc(getattr(value, method)) for method in methods), name


def test_every_public_function_of_the_api_is_exported_and_names_what_it_raises() -> None:
    assert set(ez.__all__) >= set(api.__all__) - {"guide_overview"}
    for name in ("fit", "compare", "list_guides", "describe", "tutorial", "load_data"):
        assert "Raises\n------\nInvalidInput" in (inspect.getdoc(getattr(ez, name)) or ""), name


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'elbozoo' has no attribute 'nonsense'"):
        _ = ez.nonsense


# ---- lists -----------------------------------------------------------------------------------------------------------


def test_list_models() -> None:
    table = ez.list_models()
    assert list(table.index) == entry_names()
    assert list(table.columns) == ["summary", "latent", "capabilities"]
    assert table.loc["ppca", "capabilities"] == "oracle, posterior, EM, closed form, quadrature, simulation"
    assert table.loc["gaussian-mixture", "latent"] == "local discrete"
    assert table.loc["normal-mean", "latent"] == "global continuous"
    assert "oracle" not in table.loc["vae", "capabilities"]


@pytest.mark.parametrize("model", entry_names())
def test_list_guides_agrees_with_describe_and_with_fit(model: str) -> None:
    table, card = ez.list_guides(model), ez.describe(model)
    assert list(table.columns) == ["family", "source", "fits", "reason"]
    assert list(table.index[table["fits"]]) == card["guides"]
    assert set(card["guides"]) <= set(card["methods"])
    assert ((table["reason"] == "") == table["fits"]).all()
    example = get_entry(model).example().simulate_table(20, seed=1)[0]
    for guide in table.index[~table["fits"]]:
        refused(f"guide '{guide}' does not fit {model}: ", ez.fit, model, example, guide=guide)


def test_describe_can_be_written_as_json() -> None:
    for model in entry_names():
        card = ez.describe(model)
        assert json.loads(json.dumps(card, allow_nan=False)) == card
        assert card["page"].startswith(card["summary"])
    refused("unknown model 'pcca'; did you mean 'ppca'", ez.describe, "pcca")
    refused("unknown model 'pcca'; did you mean 'ppca'", ez.list_guides, "pcca")


def test_list_datasets_is_what_load_data_takes() -> None:
    assert {"digits", "digits-binary", "iris", "wine", "breast-cancer", "diabetes", "eight-schools"} <= set(
        ez.list_datasets().index
    )
    assert ez.load_data("iris").rows == ez.list_datasets().loc["iris", "rows"]


# ---- one fit ---------------------------------------------------------------------------------------------------------


def test_data_come_in_many_shapes(x: Tensor, tmp_path: Path) -> None:
    frame = pd.DataFrame(x.numpy(), columns=["a", "b", "c"])
    path = tmp_path / "x.csv"
    frame.to_csv(path, index=False)
    results = [ez.fit("ppca", each, **QUICK).elbo() for each in (x, x.numpy(), frame, path, str(path), ez.load_data(x))]
    assert len(set(results)) == 1
    two = ez.fit("ppca", frame, columns=["c", "a"], latent_dim=1, **QUICK)
    assert torch.equal(two.x, x[:, [2, 0]])


def test_what_is_fitted_by_default_is_mean_field(x: Tensor) -> None:
    fit = ez.fit("ppca", x, **QUICK)
    assert (fit.method, fit.guide.name, fit.seed) == ("mean-field", "free-diagonal-normal", 0)
    assert fit.elbo() == ez.fit("ppca", x, guide="mean-field", **QUICK).elbo()
    assert fit.elbo() == ez.fit("ppca", x, method="mean-field", **QUICK).elbo()
    assert fit.elbo() == ez.fit(get_entry("ppca"), x, **QUICK).elbo()


def test_guide_and_method_are_two_ways_to_say_one_thing(x: Tensor) -> None:
    refused(
        "found guide 'mean-field' and method 'em', expected one", ez.fit, "ppca", x, guide="mean-field", method="em"
    )
    refused("unknown guide 'em'", ez.fit, "ppca", x, guide="em")
    assert ez.fit("ppca", x, method="em", **QUICK).guide.name == "exact"


def test_options_reach_their_places(x: Tensor) -> None:
    fit = ez.fit(
        "ppca", x, guide="amortized", latent_dim=1, hidden=7, layers=2, steps=9, learning_rate=0.05, progress=False
    )
    assert fit.entry.options.latent_dim == 1
    assert fit.entry.loading.shape == (3, 1)
    assert [parameter.shape for parameter in fit.guide.parameters()] == [(7, 3), (7,), (7, 7), (7,), (2, 7), (2,)]
    assert (fit.guide_options.hidden, len(fit.trajectory)) == (7, 9)
    assert fit.options == {"latent_dim": 1, "hidden": 7, "layers": 2, "steps": 9, "learning_rate": 0.05}
    em = ez.fit("ppca", x, method="em", iterations=3, progress=False)
    assert len(em.trajectory) == 3
    slow = ez.fit(
        "ppca", x, guide="amortized", latent_dim=1, hidden=7, layers=2, steps=9, learning_rate=1e-9, progress=False
    )
    assert slow.trajectory["objective"].iloc[-1] < fit.trajectory["objective"].iloc[-1], "the step size is read"


def test_one_name_is_one_option_wherever_it_is_read() -> None:
    """``hidden`` is the width of the VAE's decoder and of its encoder."""
    bits = (torch.rand(12, 4, generator=torch.Generator().manual_seed(0)) > 0.5).double()
    fit = ez.fit("vae", bits, guide="amortized", hidden=3, **QUICK)
    assert fit.entry.decoder[0].weight.shape == (3, 2)
    assert next(fit.guide.parameters()).shape == (3, 4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"latent_dims": 2}, "unknown option 'latent_dims'; did you mean 'latent_dim'"),
        ({"components": 2}, "unknown option 'components'"),
        ({"latent_dim": "many"}, "option latent_dim: found 'many', expected int >= 1"),
        ({"steps": 0}, "option steps: found 0, expected int >= 1"),
        ({"learning_rate": math.nan}, "option learning_rate: found nan, expected float > 0"),
        ({"schedule": "linear"}, r"option schedule: found 'linear', expected plateau \| cosine \| constant"),
        ({"objective": "elbow"}, "unknown objective 'elbow'; did you mean 'elbo'"),
        ({"seed": -1}, "option seed: found -1, expected int >= 0"),
        ({"seed": 2**32}, "option seed: found 4294967296, expected int >= 0"),
        ({"seed": 0.5}, "option seed: found 0.5, expected int >= 0"),
    ],
)
def test_options_that_are_none(options: dict[str, Any], says: str, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(says, ez.fit, "ppca", x, progress=False, **options)
    if "seed" in options:
        options = {"seeds": [0, options["seed"]]}
    started = []
    monkeypatch.setattr("elbozoo.inference.comparison.plan", lambda *arguments: started.append(Plan))
    if "seeds" in options:
        refused(says, ez.compare, "ppca", x, methods=["em"], progress=False, **options)
        assert not started, "all seeds are checked before the first one runs"


def test_the_largest_seed(x: Tensor) -> None:
    """Seeds that are derived from it wrap around."""
    fit = ez.fit(
        "gaussian-mixture", x, method="em", seed=2**32 - 1, components=2, restarts=3, iterations=2, progress=False
    )
    assert math.isfinite(fit.elbo())


def test_new_data(x: Tensor) -> None:
    """Where q has no member for them they are refused, in words; an encoder and the exact posterior have one."""
    new = x[:5] + 0.1
    free = ez.fit("ppca", x, guide="mean-field", **QUICK)
    for call in (free.elbo, free.ledger, free.transform):
        refused("found 5 rows, expected the 40 rows of the fit: a free guide .*use an amortized guide", call, new)
    assert free.score_samples(new).shape == (5,)
    for guide in ("amortized", "exact", "shared"):
        fit = ez.fit("ppca", x, guide=guide, **QUICK)
        assert fit.transform(new).shape == (5, 2)
        assert fit.elbo(new) <= float(fit.score_samples(new).sum()) + 1e-9
        assert fit.elbo(new) != fit.elbo()
        for source in (new.numpy(), pd.DataFrame(new.numpy()), new.tolist(), ez.load_data(new)):
            assert fit.elbo(source) == fit.elbo(new)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (torch.zeros(5, 2), r"found data of shape \(5, 2\), expected \(rows, 3\)"),
        (torch.zeros(3), r"found data of shape \(3,\), expected \(rows, 3\)"),
        (torch.full((5, 3), math.nan), "found NaN or infinity in the rows, expected finite numbers"),
        ([[1.0, 2.0], [3.0]], "found a list that holds no numbers, expected rows"),
        ("iris", "found a str that holds no numbers, expected rows"),
    ],
)
def test_rows_that_are_none(rows: Any, says: str, x: Tensor) -> None:
    fit = ez.fit("ppca", x, guide="amortized", **QUICK)
    for call in (fit.elbo, fit.log_evidence, fit.ledger, fit.transform, fit.score_samples, fit.to_inferencedata):
        refused(says, call, rows)


def test_score_samples_and_transform_of_a_discrete_latent(x: Tensor) -> None:
    fit = ez.fit("gaussian-mixture", x, method="em", components=2, restarts=1, progress=False)
    responsibilities = fit.transform()
    assert responsibilities.shape == (40, 2)
    torch.testing.assert_close(responsibilities.sum(1), torch.ones(40, dtype=torch.float64), rtol=0, atol=1e-12)
    entry = fit.entry
    with torch.no_grad():
        densities = [
            stats.multivariate_normal(mean.numpy(), covariance.numpy()).pdf(x.numpy())
            for mean, covariance in zip(entry.means, entry.covariances, strict=True)
        ]
        expected = np.log(entry.weights.numpy() @ np.stack(densities))
    np.testing.assert_allclose(fit.score_samples().numpy(), expected, rtol=0, atol=1e-9)
    assert np.abs(fit.score_samples(x + 0.01).numpy() - expected).max() > 1e-4


def test_a_global_latent_has_no_rows_of_its_own(x: Tensor) -> None:
    fit = ez.fit("normal-mean", x, guide="mean-field", **QUICK)
    refused("normal-mean has one latent for the whole data set", fit.transform)
    refused("gives no evidence per row; use log_evidence", fit.score_samples)
    assert fit.log_evidence() is not None


def test_sample_draws_from_the_fitted_model(x: Tensor) -> None:
    """Moments of 20000 draws against μ and W Wᵀ + σ² I: 9 figures within 5 standard errors, false alarms below 1e-5."""
    fit = ez.fit("ppca", x, method="closed-form")
    drawn = fit.sample(20_000, seed=3)
    assert drawn.shape == (20_000, 3)
    assert torch.equal(drawn, fit.sample(20_000, seed=3))
    assert not torch.equal(drawn, fit.sample(20_000, seed=4))
    entry = fit.entry
    with torch.no_grad():
        covariance = entry.loading @ entry.loading.mT + entry.noise_scale.square() * torch.eye(3)
        spread = covariance.diagonal()
        assert ((drawn.mean(0) - entry.loc).abs() < 5 * (spread / 20_000).sqrt()).all()
        error = ((spread[:, None] * spread + covariance.square()) / 20_000).sqrt()
        assert ((drawn.T.cov() - covariance).abs() < 5 * error).all()
        assert not ((drawn.T.cov() - 1.1 * covariance).abs() < 5 * error).all()


def test_to_inferencedata(x: Tensor) -> None:
    fit = ez.fit("ppca", x, guide="amortized", **QUICK)
    data = fit.to_inferencedata(draws=6)
    assert data.posterior["z"].shape == (1, 6, 40, 2)
    assert data.log_likelihood["x"].shape == (1, 6, 40)
    assert data.posterior_predictive["x"].shape == (1, 6, 40, 3)
    np.testing.assert_array_equal(data.observed_data["x"].to_numpy(), x.numpy())
    z = torch.tensor(data.posterior["z"].to_numpy()[0])
    with torch.no_grad():
        mean = z @ fit.entry.loading.mT + fit.entry.loc
        expected = dist.Normal(mean, fit.entry.noise_scale).log_prob(x).sum(-1)
    np.testing.assert_allclose(data.log_likelihood["x"].to_numpy()[0], expected.numpy(), rtol=1e-12)


@pytest.mark.parametrize(
    ("model", "method"),
    [
        ("ppca", "em"),
        ("ppca", "amortized"),
        ("ppca", "free-full-rank-normal"),
        ("factor-analysis", "shared-low-rank-normal"),
        ("gaussian-mixture", "em"),
        ("gaussian-mixture", "amortized"),
        ("normal-mean", "laplace"),
        ("normal-mean", "closed-form"),
        ("vae", "em"),
        ("vae", "amortized"),
    ],
)
def test_a_fit_comes_back_from_disk_as_it_was(model: str, method: str, tmp_path: Path) -> None:
    rows = get_entry(model).example(columns=3).simulate(24, seed=1)[0].double()
    hidden = {"hidden": 4} if model == "vae" else {}
    fit = ez.fit(model, rows, method=method, seed=5, **hidden, **QUICK)
    back = ez.load_fit(fit.save(tmp_path / "fit"))
    assert back.x is None
    for name in (
        "model",
        "method",
        "seed",
        "objective",
        "seconds",
        "converged",
        "options",
        "guide_options",
        "shape",
        "notes",
        "provenance",
    ):
        assert getattr(back, name) == getattr(fit, name), name
    pd.testing.assert_frame_equal(back.trajectory, fit.trajectory, check_exact=True)
    assert back.parameters == fit.parameters
    pd.testing.assert_series_equal(back.ledger(rows), fit.ledger(), check_exact=True)
    assert torch.equal(back.sample(4), fit.sample(4))
    assert np.array_equal(
        back.to_inferencedata(rows, draws=3).prior.to_array(), fit.to_inferencedata(draws=3).prior.to_array()
    )
    refused("a loaded fit does not carry its data; pass the rows x", back.ledger)
    # Another θ is another fit: the equalities above are not empty.
    if fit.parameters:
        with torch.no_grad():
            next(p for p in [*back.entry.parameters(), *back.guide.parameters()]).mul_(1.1).add_(0.01)
        assert back.log_evidence(rows) != fit.log_evidence() or back.elbo(rows) != fit.elbo()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("fit.json", None, "found no file fit.json"),
        ("fit.json", "{", "the saved fit is damaged"),
        ("fit.json", "{}", "the saved fit is damaged"),
        ("model.safetensors", None, "found no file model.safetensors"),
        ("guide.safetensors", "", "the saved fit is damaged"),
        ("trajectory.csv", None, "found no file trajectory.csv"),
        ("trajectory.csv", "", "the saved fit is damaged"),
    ],
)
def test_a_damaged_fit(name: str, content: str | None, says: str, x: Tensor, tmp_path: Path) -> None:
    ez.fit("ppca", x, **QUICK).save(tmp_path)
    ez.load_fit(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content, encoding="utf-8")
    refused(says, ez.load_fit, tmp_path)


# ---- comparisons -----------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_identical_table(x: Tensor) -> None:
    def table(**options: Any) -> pd.DataFrame:
        return without_seconds(ez.compare("ppca", x, **{"seeds": 2, **QUICK, **options}).table)

    first = table()
    # What ran in between, and the caller's own random state, change nothing.
    torch.manual_seed(99)
    ez.fit("gaussian-mixture", x, components=2, seed=7, **QUICK)
    pd.testing.assert_frame_equal(first, table(), check_exact=True)
    other = table(seeds=[2, 3])
    assert (first["elbo"] != other["elbo"]).all()
    assert first["elbo"].is_unique, "the seeds differ among themselves"
    pd.testing.assert_frame_equal(first[first["seed"] == 1].reset_index(drop=True), table(seeds=[1]), check_exact=True)


def test_table_summary_and_trajectories(x: Tensor) -> None:
    result = ez.compare("ppca", x, methods=["amortized", "em"], seeds=[4, 1], latent_dim=1, **QUICK)
    assert list(result.table.columns) == [*ROW, *TABLE_ONLY]
    assert list(zip(result.table["method"], result.table["seed"], strict=True)) == [
        ("amortized", 4),
        ("amortized", 1),
        ("em", 4),
        ("em", 1),
    ]
    assert result.data == {"name": "tensor", "rows": 40, "columns": 3}
    assert [fit.elbo() for fit in result.fits] == list(result.table["elbo"])
    summary = result.summary
    for method in ("em", "amortized"):
        elbo = result.table.loc[result.table["method"] == method, "elbo"]
        assert summary.loc[method, ("elbo", "mean")] == pytest.approx(elbo.mean(), rel=1e-12)
        assert summary.loc[method, ("elbo", "std")] == pytest.approx(elbo.std(), rel=1e-12)
    assert summary[("log_evidence", "mean")].is_monotonic_decreasing
    trajectories = result.trajectories
    assert list(trajectories.columns) == ["method", "seed", "step", "seconds", "objective", "elbo", "log_evidence"]
    assert len(trajectories) == result.table["steps"].sum()


def test_a_comparison_comes_back_from_disk_as_it_was(x: Tensor, tmp_path: Path) -> None:
    result = ez.compare("ppca", x, seeds=2, out=tmp_path / "out", **QUICK)
    back = ez.load_comparison(tmp_path / "out")
    assert isinstance(back, ez.Comparison)
    assert json.dumps(back.document()) == json.dumps(result.document())
    assert (back.options, back.data, back.model) == (result.options, result.data, result.model)
    pd.testing.assert_frame_equal(back.trajectories, result.trajectories, check_exact=True)
    assert [fit.elbo(x) for fit in back.fits] == [fit.elbo() for fit in result.fits]
    refused("expected a directory written by Comparison.save", ez.load_comparison, tmp_path)
    (tmp_path / "out" / "comparison.json").write_text("{", encoding="utf-8")
    refused("expected a directory written by Comparison.save", ez.load_comparison, tmp_path / "out")


def test_what_is_compared_by_default() -> None:
    for model, methods in {
        "ppca": ["em", "mean-field", "amortized"],
        "normal-mean": ["mean-field", "full-rank", "laplace"],
    }.items():
        rows = get_entry(model).example().simulate(12, seed=1)[0]
        assert list(ez.compare(model, rows, seeds=1, **QUICK).table["method"]) == methods
        assert ez.describe(model)["default_methods"] == methods


def test_methods_and_seeds(x: Tensor) -> None:
    def pairs(**options: Any) -> list[tuple[str, int]]:
        table = ez.compare("ppca", x, **QUICK, **options).table
        return list(zip(table["method"], table["seed"], strict=True))

    assert pairs(methods="em", seeds=1) == [("em", 0)], "one name need not stand in a list"
    assert pairs(methods=["em", "em"], seeds=[2, 2]) == [("em", 2)]
    assert pairs(methods=iter(["em"]), seeds=np.int64(2)) == [("em", 0), ("em", 1)]
    refused("option seeds: found 0, expected at least 1", pairs, methods=["em"], seeds=0)
    refused(r"option seeds: found \[\], expected at least 1", pairs, methods=["em"], seeds=[])
    refused("option seed: found 1.5", pairs, methods=["em"], seeds=1.5)
    refused("found no method, expected at least one", pairs, methods=[], seeds=1)


def test_every_method_is_checked_before_the_first_one_runs(
    x: Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the work has started")

    monkeypatch.setattr(Plan, "run", run)
    refused("unknown method 'emm'; did you mean 'em'", ez.compare, "ppca", x, methods=["em", "emm"])
    refused("'laplace' does not fit ppca", ez.compare, "ppca", x, methods=["em", "laplace"])
    (tmp_path / "file").write_text("", encoding="utf-8")
    refused("output directory .*file/below", ez.compare, "ppca", x, methods=["em"], out=tmp_path / "file" / "below")
    with pytest.raises(AssertionError, match="the work has started"):
        ez.compare("ppca", x, methods=["em"])


# ---- programs of the user's ------------------------------------------------------------------------------------------


def function(batch: Batch) -> Tensor:
    """z ~ N(0, 1), x_d ~ N(a_d z, 1/2): marginally a normal with covariance a aᵀ + I / 4."""
    with pyro.plate("data", batch.total, subsample=batch.index):
        z = pyro.sample("z", dist.Normal(batch.x.new_zeros(1), 1.0).to_event(1))
        return pyro.sample("x", dist.Normal(z * batch.x.new_tensor([1.0, 2.0, -0.5]), 0.5).to_event(1), obs=batch.x)


def scalar_function(batch: Batch) -> Tensor:
    """The same with a latent that is a number and no vector of one."""
    with pyro.plate("data", batch.total, subsample=batch.index):
        z = pyro.sample("z", dist.Normal(batch.x.new_tensor(0.0), 1.0))
        mean = z[..., None] * batch.x.new_tensor([1.0, 2.0, -0.5])
        return pyro.sample("x", dist.Normal(mean, 0.5).to_event(1), obs=batch.x)


class Fixed(PyroModule):
    """The same as a module without parameters."""

    def forward(self, batch: Batch) -> Tensor:
        return function(batch)


class Learned(PyroModule):
    """The same with a slope and a scale to learn."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor([0.5, 0.4, 0.3]))
        self.scale = PyroParam(torch.tensor(1.0), constraints.positive)

    def forward(self, batch: Batch) -> Tensor:
        with pyro.plate("data", batch.total, subsample=batch.index):
            z = pyro.sample("z", dist.Normal(batch.x.new_zeros(1), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(z * self.slope, self.scale).to_event(1), obs=batch.x)


def normal_evidence(x: Tensor, slope: Tensor, scale: float) -> float:
    covariance = np.outer(slope, slope) + scale**2 * np.eye(len(slope))
    return float(stats.multivariate_normal(np.zeros(len(slope)), covariance).logpdf(x.numpy()).sum())


@pytest.mark.parametrize("program", [function, scalar_function, Fixed()], ids=["function", "scalar", "module"])
@pytest.mark.parametrize("guide", ["mean-field", "amortized", "free-low-rank-normal"])
def test_a_program_with_one_latent_dimension_has_its_evidence_by_quadrature(
    program: Any, guide: str, x: Tensor
) -> None:
    fit = ez.fit(program, x, guide=guide, steps=400, learning_rate=0.05, progress=False)
    expected = normal_evidence(x, torch.tensor([1.0, 2.0, -0.5]), 0.5)
    evidence = fit.log_evidence()
    assert fit.model == "program"
    assert evidence is not None and evidence.kind == "quadrature"
    assert evidence.standard_error < 1e-4 * len(x)
    assert evidence.value == pytest.approx(expected, abs=evidence.standard_error + 1e-9)
    assert normal_evidence(x, torch.tensor([1.0, 2.0, -0.49]), 0.5) != pytest.approx(expected, abs=0.01)
    ledger = fit.ledger()
    assert ledger["gap"] == pytest.approx(ledger["approximation_gap"] + ledger["amortization_gap"], abs=1e-9)
    # A normal of one dimension is in the family, so the family costs nothing.
    assert abs(ledger["approximation_gap"]) < 1e-4 * len(x)
    assert ledger["elbo"] < evidence.value < ledger["elbo"] + 0.1 * len(x)
    # The posterior's mean is aᵀx / (1/4 + aᵀa); 400 steps bring q near it.
    mean = x @ x.new_tensor([1.0, 2.0, -0.5]) / (0.25 + 5.25)
    assert np.corrcoef(fit.transform().flatten(), mean)[0, 1] > 0.99


def test_a_module_is_learned_from_and_stays_as_it_was(x: Tensor) -> None:
    program = Learned()
    before = {name: value.clone() for name, value in program.state_dict().items()}
    fit = ez.fit(program, x, guide="amortized", steps=50, learning_rate=0.05, progress=False)
    assert all(torch.equal(program.state_dict()[name], value) for name, value in before.items())
    assert {value.dtype for value in program.state_dict().values()} == {torch.float32}
    assert not list(pyro.get_param_store().keys())
    learned = fit.entry.program
    assert not torch.equal(learned.slope.float(), program.slope)
    with torch.no_grad():
        expected = normal_evidence(x, learned.slope, float(learned.scale))
    assert fit.log_evidence().value == pytest.approx(expected, abs=fit.log_evidence().standard_error + 1e-9)
    assert expected > normal_evidence(x, program.slope.detach(), 1.0) + 1, "it has learned"
    again = ez.fit(program, x, guide="amortized", steps=50, learning_rate=0.05, progress=False)
    assert again.elbo() == fit.elbo(), "from the same start"


def test_programs_can_be_compared(x: Tensor, tmp_path: Path) -> None:
    result = ez.compare(Learned(), x, seeds=1, steps=5, iterations=3, progress=False)
    assert list(result.table["method"]) == ["em", "mean-field", "amortized"]
    assert set(result.table["log_evidence_kind"]) == {"quadrature"}
    assert result.table["kl"].isna().all()
    assert (result.table["learning_gap"] >= 0).all() and (result.table["learning_gap"] == 0).any()
    refused("found a program of your own.*save fit.entry.state_dict", result.fits[0].save, tmp_path / "fit")
    assert not (tmp_path / "fit").exists()


def test_programs_with_other_latents(x: Tensor) -> None:
    """Two latents stand side by side; a positive one has no closed form; a finite one is summed over."""

    def two(batch: Batch) -> Tensor:
        with pyro.plate("data", batch.total, subsample=batch.index):
            u = pyro.sample("u", dist.Normal(batch.x.new_zeros(1), 1.0).to_event(1))
            v = pyro.sample("v", dist.Normal(batch.x.new_zeros(1), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(torch.cat([u, v, u + v], -1), 0.5).to_event(1), obs=batch.x)

    def positive(batch: Batch) -> Tensor:
        with pyro.plate("data", batch.total, subsample=batch.index):
            z = pyro.sample("z", dist.Gamma(batch.x.new_tensor(2.0), 1.0))
            return pyro.sample("x", dist.Normal(z[..., None].expand(*z.shape, 3), 0.5).to_event(1), obs=batch.x)

    def finite(batch: Batch) -> Tensor:
        with pyro.plate("data", batch.total, subsample=batch.index):
            z = pyro.sample("z", dist.Categorical(batch.x.new_tensor([0.2, 0.3, 0.5])))
            mean = z[..., None].expand(*z.shape, 3).to(batch.x.dtype)
            return pyro.sample("x", dist.Normal(mean, 0.5).to_event(1), obs=batch.x)

    fits = {program: ez.fit(program, x, **QUICK) for program in (two, positive, finite)}
    assert [fit.transform().shape[1] for fit in fits.values()] == [2, 1, 3]
    assert (fits[positive].transform() > 0).all()
    evidences = {program: fit.log_evidence() for program, fit in fits.items()}
    assert [evidence.kind for evidence in evidences.values()] == ["quadrature", "estimate", "exact"]
    loadings = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    normal = stats.multivariate_normal(np.zeros(3), loadings @ loadings.T + 0.25 * np.eye(3))
    assert evidences[two].value == pytest.approx(
        normal.logpdf(x.numpy()).sum(), abs=evidences[two].standard_error + 1e-9
    )
    parts = [stats.norm(k, 0.5).logpdf(x.numpy()).sum(1) + np.log(p) for k, p in enumerate((0.2, 0.3, 0.5))]
    assert evidences[finite].value == pytest.approx(np.logaddexp.reduce(parts).sum(), rel=1e-12)
    for program, fit in fits.items():
        ledger = fit.ledger()
        assert ledger["gap"] > 0
        # A family over a finite latent contains its posterior; over a positive one there is no search.
        if program is not two:
            assert ledger["approximation_gap"] == 0 if program is finite else math.isnan(ledger["approximation_gap"])
    precision = np.eye(2) + loadings.T @ loadings / 0.25
    lost = 0.5 * len(x) * (np.log(np.diag(precision)).sum() - np.linalg.slogdet(precision)[1])
    ledger = fits[two].ledger()
    # Six standard errors of draws (false alarms at 2e-9), and the search's own tolerance of 1e-4 nats per datum.
    allowed = 6 * ledger["elbo_se"] + 1e-4 * len(x) + fits[two].log_evidence().standard_error
    assert abs(ledger["approximation_gap"] - lost) <= allowed < lost


def bare_parameter(batch: Batch) -> Tensor:
    scale = pyro.param("scale", torch.tensor(1.0))
    with pyro.plate("data", batch.total, subsample=batch.index):
        z = pyro.sample("z", dist.Normal(batch.x.new_zeros(1), 1.0).to_event(1))
        return pyro.sample("x", dist.Normal(z.expand(*z.shape[:-1], 3), scale).to_event(1), obs=batch.x)


class BareParameter(PyroModule):
    def forward(self, batch: Batch) -> Tensor:
        return bare_parameter(batch)


def another_site(batch: Batch) -> Tensor:
    with pyro.plate("data", batch.total, subsample=batch.index):
        z = pyro.sample("z", dist.Normal(batch.x.new_zeros(1), 1.0).to_event(1))
        return pyro.sample("y", dist.Normal(z.expand(*z.shape[:-1], 3), 1.0).to_event(1), obs=batch.x)


def nothing_observed(batch: Batch) -> Tensor:
    with pyro.plate("data", batch.total, subsample=batch.index):
        return pyro.sample("z", dist.Normal(batch.x.new_zeros(3), 1.0).to_event(1))


def nothing_latent(batch: Batch) -> Tensor:
    with pyro.plate("data", batch.total, subsample=batch.index):
        return pyro.sample("x", dist.Normal(batch.x.new_zeros(3), 1.0).to_event(1), obs=batch.x)


@pytest.mark.parametrize(
    ("program", "says"),
    [
        (
            bare_parameter,
            r"declares pyro.param \['scale'\], which lives in Pyro's global store; expected torch.nn.Parameter or",
        ),
        (
            BareParameter(),
            r"declares pyro.param \['scale'\], which lives in Pyro's global store; expected torch.nn.Parameter or",
        ),
        (another_site, "expected an observed site 'x'"),
        (nothing_observed, "expected an observed site 'x'"),
        (nothing_latent, "no latent site; expected at least one pyro.sample without obs="),
        (3, "found a int as model; expected an entry's name or a callable"),
        ("pcca", "unknown model 'pcca'; did you mean 'ppca'"),
    ],
)
def test_programs_that_are_refused(program: Any, says: str, x: Tensor) -> None:
    refused(says, ez.fit, program, x, **QUICK)
    refused(says, ez.compare, program, x, **QUICK)
    assert not list(pyro.get_param_store().keys())


def test_what_a_program_does_not_have_is_said(x: Tensor) -> None:
    refused("guide 'exact' does not fit program: program has no exact posterior", ez.fit, function, x, guide="exact")
    refused("method 'closed-form' does not apply to program", ez.fit, function, x, method="closed-form")
    refused("method 'em' does not apply to program.*parameters to learn", ez.fit, function, x, method="em")
    refused("unknown option 'latent_dim'", ez.fit, function, x, latent_dim=2)


# ---- tutorials -------------------------------------------------------------------------------------------------------


def test_tutorials_are_pages_or_notebooks(tmp_path: Path) -> None:
    for name in ("page.txt", "page"):
        refused(r"\.md.*\.ipynb", ez.tutorial, "ppca", tmp_path / name)
    refused("unknown model 'pcca'", ez.tutorial, "pcca", tmp_path / "page.md")
    refused(
        "unknown guide 'men-field'; did you mean 'mean-field'",
        ez.tutorial,
        "ppca",
        tmp_path / "page.md",
        guide="men-field",
    )
    assert not list(tmp_path.iterdir())


# ---- the identity ----------------------------------------------------------------------------------------------------


def test_the_identity_the_zoo_is_built_on(x: Tensor) -> None:
    """best log p(x) = ELBO + amortization gap + approximation gap + learning gap, in every row."""
    table = ez.compare("ppca", x, seeds=2, **QUICK).table
    best = table[["elbo", "amortization_gap", "approximation_gap", "learning_gap"]].sum(axis=1)
    closed_form = ez.fit("ppca", x, method="closed-form").log_evidence()
    np.testing.assert_allclose(best, closed_form.value, rtol=1e-12)
    assert (table["elbo"] < table["log_evidence"] + 1e-9).all()
    assert re.fullmatch("exact", closed_form.kind)


# ---- what reaches a fit as it was meant ------------------------------------------------------------------------------


def test_numpys_numbers_are_options_and_can_be_saved(tmp_path: Path) -> None:
    x = ez.load_data("iris").x[:20]
    comparison = ez.compare("ppca", x, methods=["em"], seeds=1, latent_dim=np.int64(1), out=tmp_path, progress=False)
    assert comparison.options == {"latent_dim": 1} and type(comparison.options["latent_dim"]) is int
    assert ez.load_comparison(tmp_path).options == {"latent_dim": 1}


def test_the_shape_of_images_comes_with_the_data() -> None:
    """Four channels of 6 x 6 are no 12 x 12; an image_shape that is given goes first."""
    images = (np.random.default_rng(0).random((12, 4, 6, 6)) > 0.5).astype(float)
    options = {"architecture": "conv", "latent_dim": 1, "hidden": 4, "channels": 2, "steps": 2, "progress": False}
    fit = ez.fit("vae", images, guide="amortized", **options)
    assert str(fit.entry.image_shape) == "4x6x6"
    assert str(ez.fit("vae", images, guide="amortized", image_shape="12x12", **options).entry.image_shape) == "12x12"


def test_an_array_of_another_width_is_no_test_data() -> None:
    x = np.random.default_rng(0).normal(size=(30, 6))
    with pytest.raises(ez.InvalidInput, match="test"):
        ez.fit("ppca", x, method="em", test=np.c_[x, x], progress=False)
    assert ez.fit("ppca", x, method="em", test=x[:5], iterations=3, progress=False).heldout()["heldout_rows"] == 5


def test_no_share_is_no_split(tmp_path: Path) -> None:
    """A share of nothing, with a report of it."""
    comparison = ez.compare("ppca", "iris", methods=["em"], seeds=1, iterations=3, validation=0.0, progress=False)
    comparison.report(tmp_path / "r.html")
    assert "--validation" not in (tmp_path / "r.html").read_text()


def test_labels_in_the_last_column_need_no_option(tmp_path: Path) -> None:
    """Where an entry takes the last column for the class, text will do there, in a frame and in a file."""
    frame = pd.DataFrame({"a": [0, 1, 0, 1, 1, 0], "b": [1, 1, 0, 0, 1, 0], "kind": ["x", "y", "x", "y", "x", "y"]})
    frame.to_csv(tmp_path / "kinds.csv", index=False)
    options = {"latent_dim": 1, "hidden": 2, "steps": 2, "progress": False}
    for data in (frame, tmp_path / "kinds.csv"):
        fit = ez.fit("conditional-vae", data, guide="amortized", **options)
        assert fit.entry.levels == {"kind": ["x", "y"]} and fit.entry.table_names == ("a", "b", "kind")
        assert fit.options["condition"] == "kind"

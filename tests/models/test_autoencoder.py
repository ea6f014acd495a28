"""The autoencoder: its likelihood, its flat prior, PCA in its linear case, and that nothing here passes for a bound."""

from __future__ import annotations

import contextlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.nn import PyroModule
from scipy import linalg, stats
from sklearn.decomposition import PCA
from torch import Tensor
from torch.distributions import constraints

import elbozoo as ez
from elbozoo.cli import main
from elbozoo.guides.base import GuideOptions
from elbozoo.guides.registry import build_guide, guide_names, resolve_guide
from elbozoo.inference.estimators import list_estimators
from elbozoo.inference.evidence import log_evidence
from elbozoo.inference.method import default_methods, resolve_method
from elbozoo.inference.objectives import OBJECTIVES
from elbozoo.models import Batch, capabilities, get_entry
from elbozoo.models.autoencoder import Autoencoder
from elbozoo.models.contract.entry import Program, supports_quadrature
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.contract.sites import latent_sites
from elbozoo.models.vae import VAE

LIKELIHOODS = ["bernoulli", "normal"]
LINEAR = {"decoder": "linear", "encoder": "linear", "likelihood": "normal", "schedule": "cosine"}
FLAT = "the prior of its code is flat"


def example(**options: object) -> Autoencoder:
    return Autoencoder.example(hidden=5, seed=1, **options).double()


def in_units(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in units of their columns, and the standard deviations, 1 where a column is constant."""
    scale = x.std(0, correction=0)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (x - x.mean(0)) / scale, scale


def squared_error(x: Tensor, reconstruction: Tensor) -> float:
    """Squared error per row, in units of the columns."""
    return float(((x - reconstruction) / in_units(x)[1]).square().sum()) / len(x)


def pca_error(x: Tensor, components: int) -> float:
    """The least squared error per row of a projection on a plane, by scikit-learn."""
    rows = in_units(x)[0].numpy()
    pca = PCA(components).fit(rows)
    return float(np.square(rows - pca.inverse_transform(pca.transform(rows))).sum()) / len(rows)


def test_is_in_the_registry() -> None:
    assert get_entry("autoencoder") is Autoencoder


# ---- the program -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("decoder", ["mlp", "linear"])
def test_log_likelihood_is_that_of_scipy(likelihood: str, decoder: str) -> None:
    """Of every row at every code, with the decoder worked out in NumPy: 1e-10 relative (sums of six terms)."""
    entry = example(likelihood=likelihood, decoder=decoder)
    x, _ = entry.simulate(7, seed=2)
    z = torch.randn(5, 2, dtype=torch.float64)
    layers = [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in entry._linear_layers()]
    y = z.numpy()
    for weight, bias in layers[:-1]:
        y = np.tanh(y @ weight.T + bias)
    y = y @ layers[-1][0].T + layers[-1][1]
    assert len(layers) == (1 if decoder == "linear" else 2)

    def expected(y: np.ndarray) -> np.ndarray:
        if likelihood == "bernoulli":
            return stats.bernoulli.logpmf(x.numpy()[:, None].astype(int), 1 / (1 + np.exp(-y))).sum(-1)
        unit, sigma = entry.likelihood.unit.numpy(), float(entry.likelihood.noise_scale)
        mean = entry.likelihood.location.numpy() + unit * y
        return stats.norm.logpdf(x.numpy()[:, None], mean, unit * sigma).sum(-1)

    with torch.no_grad():
        found = entry.log_likelihood(x, z).numpy()
    assert np.abs(found - expected(y)).max() < 1e-10 * np.abs(found).max()
    assert np.abs(found - expected(y + 0.01)).max() > 1e-4  # negative control: another output
    if likelihood == "normal":
        np.testing.assert_allclose(entry.decode(z).detach().numpy(), y, rtol=0, atol=1e-12)  # m = 0 and s = 1 here


def test_the_prior_adds_nothing_and_is_not_proper() -> None:
    """log p(x, z) is log p(x given z), to the bit, wherever z is; a VAE's normal prior takes |z|²/2 nats off."""
    entry = example(likelihood="normal")
    x, z = entry.simulate(6, seed=0)
    vae = VAE.example(columns=6, hidden=5, likelihood="normal").double()
    for program, is_flat in ((entry, True), (vae, False)):
        with isolated(0):
            trace = poutine.trace(poutine.condition(program, {"z": 40 * z})).get_trace(Batch.full(x))
        joint, likelihood = float(trace.log_prob_sum()), float(trace.log_prob_sum(lambda name, _: name == "x"))
        assert (joint == likelihood) is is_flat
        (site,) = program.latent_sites()
        assert site.is_proper is not is_flat and site.is_real


@pytest.mark.parametrize(
    ("prior", "is_proper"),
    [
        (dist.ImproperUniform(constraints.real, (), (2,)), False),
        (dist.Normal(torch.zeros(2), 1.0).to_event(1).mask(False), False),
        (dist.Normal(torch.zeros(2), 1.0).mask(False).to_event(1), False),
        (dist.Normal(torch.zeros(2), 1.0).to_event(1).mask(True), True),
        (dist.Normal(torch.zeros(2), 1.0).to_event(1), True),
        (dist.LogNormal(torch.zeros(2), 1.0).to_event(1), True),
    ],
)
def test_a_prior_without_an_integral_is_found_in_any_program(prior: dist.Distribution, is_proper: bool) -> None:
    """Quadrature integrates a prior, and so it is derived from proper ones alone; a user's program is read as well."""

    def program(batch: Batch) -> Tensor:
        with pyro.plate("data", batch.total, subsample=batch.index):
            z = pyro.sample("z", prior)
            return pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=batch.x)

    batch = Batch.full(torch.ones(3, 2))
    sites = latent_sites(_told(program) if isinstance(prior, dist.ImproperUniform) else program, batch)
    assert [site.is_proper for site in sites] == [is_proper]
    assert supports_quadrature(sites) is (is_proper and sites[0].is_real)


def _told(program: object) -> object:
    """Run ``program`` with a value at its improper site, from which Pyro refuses to draw."""

    class Telling(poutine.messenger.Messenger):
        def _pyro_sample(self, msg: dict[str, object]) -> None:
            if msg["name"] == "z":
                msg["value"] = torch.ones(3, 2)
                msg["done"] = True

    def run(batch: Batch) -> Tensor:
        with Telling():
            return program(batch)  # type: ignore[operator,no-any-return]

    return run


# ---- not a bound -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def comparison() -> ez.Comparison:
    """Twenty steps of an encoder and of free codes on wine."""
    options = {"likelihood": "normal", "hidden": 4, "steps": 20}
    return ez.compare("autoencoder", "wine", methods=["mean-field", "amortized"], seeds=1, progress=False, **options)


def test_nothing_is_said_of_the_evidence(comparison: ez.Comparison) -> None:
    """No oracle, no quadrature, no estimator: for latent_dim 2, where a VAE has all of them."""
    assert capabilities(example()) == ["simulation"]
    assert "quadrature" in capabilities(VAE.example())  # negative control
    for fit in comparison.fits:
        assert fit.log_evidence() is None and log_evidence(fit.entry, fit.x) is None
        assert math.isnan(fit.elbo()) and math.isnan(fit.denoising_elbo().value)
        ledger = fit.ledger()
        figures = ledger.drop(["best_member_converged", "rows", "is_bound", "log_evidence_kind"])
        assert figures.astype(float).isna().all() and not ledger.is_bound and ledger.log_evidence_kind is None
        assert not list_estimators(fit.entry, fit.guide)["fits"].any()
        with pytest.raises(InvalidInput, match=r"autoencoder with .* has no log p\(x\)"):
            fit.score_samples()
        with pytest.raises(InvalidInput, match=r"flat, so that p\(x\) does not exist; estimators that do: none"):
            fit.log_evidence(estimator="prior")
        with pytest.raises(InvalidInput, match="no anatomy of autoencoder"):
            fit.anatomy()
    assert list_estimators(VAE.example())["fits"].any()  # negative control


def test_tables_say_that_there_is_no_bound(comparison: ez.Comparison) -> None:
    """The figure is NaN, or null, beside a column that says why; the objective has a value."""
    table = comparison.table
    assert table["elbo"].isna().all() and not table["is_bound"].any() and table["objective"].notna().all()
    rows = comparison.document()["rows"]
    assert [row["elbo"] for row in rows] == [row["log_evidence"] for row in rows] == [None, None]
    assert "is_bound" not in rows[0]  # the schema is fixed
    json.dumps(rows, allow_nan=False)
    bounded = ez.compare("ppca", "wine", methods=["exact"], seeds=1, steps=2, progress=False)
    assert bounded.table["is_bound"].all() and bounded.table["elbo"].notna().all()  # negative control


def test_the_command_line_says_not_a_bound(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where others show an ELBO."""
    of_model = {
        "autoencoder": ("amortized", ["--set", "likelihood=normal", "--set", "hidden=4", "--set", "steps=2"]),
        "ppca": ("exact", ["--set", "steps=2"]),
    }
    found = {}
    for model, (guide, options) in of_model.items():
        for command in (
            ["fit", model, "--guide", guide],
            ["compare", model, "--methods", guide, "--seeds", "1", "--test", "0.2"],
        ):
            monkeypatch.setattr("sys.argv", ["elbozoo", *command, "--data", "wine", *options])
            with contextlib.suppress(SystemExit):
                main()
            found[model, command[0]] = capsys.readouterr().out
    # In the table of the fits once, and with held-out rows in their total and per datum.
    expected = {("autoencoder", "fit"): 1, ("autoencoder", "compare"): 3}
    assert {key: text.count("not a bound") for key, text in found.items()} == dict.fromkeys(found, 0) | expected
    assert all("log_evidence" in text or "log p(x)" in text for text in found.values())


@pytest.mark.slow
def test_the_report_says_not_a_bound(comparison: ez.Comparison, tmp_path: Path) -> None:
    """Of both methods, in the summary and in the table of fits, and once in the glossary."""
    page = comparison.report(tmp_path / "page.html").read_text(encoding="utf-8")
    assert len(re.findall(r"<td[^>]*>not a bound</td>", page)) == 4
    assert page.count("<dt>not a bound</dt>") == 1
    assert "amortized: elbo (not a bound, as q has no density)" in page


def test_inference_data_have_no_prior(comparison: ez.Comparison) -> None:
    """Codes and reconstructions, and no draws from a distribution that there is not."""
    data = comparison.fits[1].to_inferencedata(draws=3)
    assert not {"prior", "prior_predictive"} & set(data.groups())
    assert {"posterior", "posterior_predictive", "log_likelihood", "observed_data"} <= set(data.groups())
    ppca = ez.fit("ppca", "wine", method="closed-form", progress=False)
    assert {"prior", "prior_predictive"} <= set(ppca.to_inferencedata(draws=3).groups())  # negative control


def test_guides_and_methods_that_fit() -> None:
    """Points alone, one for each row; the aliases mean those."""
    entry = example()
    assert guide_names(entry) == ["free-delta", "amortized-delta", "semi-amortized-delta"]
    assert resolve_guide("mean-field", entry) == "free-delta"
    assert resolve_guide("amortized", entry) == "amortized-delta"
    assert default_methods(entry) == ["mean-field", "amortized"]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("amortized-diagonal-normal", FLAT),
        ("free-full-rank-normal", FLAT),
        ("semi-amortized-flow", FLAT),
        ("shared-delta", "one code for all rows gives them all the same reconstruction"),
        ("exact", "autoencoder has no exact posterior"),
        ("em", "the prior of the latent 'z' is flat, so that there is no log p.x. for EM to climb"),
        ("nuts", "it has parameters to learn"),
        ("closed-form", "no closed form of its maximum is known"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(method: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        resolve_method(method, example())
    assert "\n" not in str(caught.value)


def test_a_program_of_the_users_with_a_flat_prior_has_no_evidence_either() -> None:
    """Read off its trace; the same program with the normal prior in force has it by quadrature."""

    class Flat(PyroModule):
        is_flat = True

        def forward(self, batch: Batch) -> Tensor:
            with pyro.plate("data", batch.total, subsample=batch.index):
                prior = dist.Normal(batch.x.new_zeros(1), 1.0).to_event(1)
                z = pyro.sample("z", prior.mask(False) if self.is_flat else prior)
                return pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=batch.x)

    x = torch.randn(5, 1, dtype=torch.float64)
    program = Flat()
    assert log_evidence(Program(program, 1), x) is None
    program.is_flat = False
    found = log_evidence(Program(program, 1), x)
    assert found is not None and found.kind == "quadrature"


# ---- what it learns --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("components", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_linear_autoencoder_is_pca(components: int) -> None:
    """On digits: PCA's squared error to 1e-5 relative, never below it, on PCA's plane (Baldi & Hornik 1989).

    The tolerance is what 600 steps of Adam leave. An untrained network, and PCA with one component less, are more
    than a twentieth away, and the plane of other components is at a right angle.
    """
    x = ez.load_data("digits").x[:200]
    options = {**LINEAR, "latent_dim": components, "batch_size": len(x), "learning_rate": 0.03, "progress": False}
    fit = ez.fit("autoencoder", x, guide="amortized", steps=600, **options)
    least = pca_error(x, components)

    def excess(fit: ez.Fit) -> float:
        return squared_error(x, fit.reconstruct()) / least - 1

    assert -1e-9 < excess(fit) < 1e-5
    axes = PCA(components + 1).fit(in_units(x)[0].numpy()).components_
    weight = fit.entry.decoder[0].weight.detach().numpy()
    assert linalg.subspace_angles(weight, axes[:components].T).max() < 0.03  # radians; the error has its square
    assert linalg.subspace_angles(weight, axes[1:].T).max() > 1.0  # negative control: the next plane
    assert excess(ez.fit("autoencoder", x, guide="amortized", steps=1, **options)) > 0.05  # negative control
    assert pca_error(x, components + 1) < 0.98 * least
    # The noise that the likelihood wants is the root of what is left, σ² = error / D.
    assert float(fit.entry.likelihood.noise_scale) == pytest.approx(math.sqrt(least / x.shape[1]), rel=1e-3)


def test_a_code_as_wide_as_the_row_learns_the_identity() -> None:
    """With K = D the error vanishes and the noise falls to its floor, 0.05; with K = 1 neither does."""
    x = ez.load_data("wine").x[:, :3]
    options = {**LINEAR, "noise_floor": 0.05, "batch_size": len(x), "steps": 200, "learning_rate": 0.05}
    wide, narrow = (
        ez.fit("autoencoder", x, guide="amortized", latent_dim=k, progress=False, **options) for k in (3, 1)
    )
    assert squared_error(x, wide.reconstruct()) < 0.01 < squared_error(x, narrow.reconstruct())
    assert float(wide.entry.likelihood.noise_scale) < 0.1 < float(narrow.entry.likelihood.noise_scale)


@pytest.mark.slow
def test_free_codes_and_encoders_meet_where_both_are_linear() -> None:
    """A code of its own for each row can do no better than PCA's plane either: within 1 % of its error."""
    x = ez.load_data("wine").x
    options = {"decoder": "linear", "likelihood": "normal", "schedule": "cosine", "learning_rate": 0.1}
    fit = ez.fit("autoencoder", x, guide="free-delta", steps=600, progress=False, **options)
    least = pca_error(x, 2)
    assert 1 - 1e-9 < squared_error(x, fit.reconstruct()) / least < 1.01
    short = ez.fit("autoencoder", x, guide="free-delta", steps=5, progress=False, **options)
    assert squared_error(x, short.reconstruct()) / least > 1.01  # negative control


@pytest.mark.slow
def test_a_deep_autoencoder_beats_pca_on_digits_it_has_not_seen() -> None:
    """Two numbers a digit: at least a twentieth less squared error than PCA's two, on 400 held-out rows.

    As for Hinton & Salakhutdinov (2006). The linear one cannot, which is the negative control.
    """
    data = ez.load_data("digits").x
    data = data[:, data[:800].std(0) > 0.5]  # pixels that are not always blank
    x, unseen = data[:800], data[800:1200]
    scale = in_units(x)[1]
    rows, pca = in_units(x)[0].numpy(), PCA(2)
    pca.fit(rows)
    other = ((unseen - x.mean(0)) / scale).numpy()
    of_pca = float(np.square(other - pca.inverse_transform(pca.transform(other))).sum()) / len(other)

    def error(**options: object) -> float:
        training = {"steps": 1200, "schedule": "cosine", "learning_rate": 0.01, "progress": False}
        fit = ez.fit("autoencoder", x, guide="amortized", likelihood="normal", **training, **options)
        return float(((unseen - fit.reconstruct(unseen)) / scale).square().sum()) / len(unseen)

    assert error(hidden=64, activation="relu") < 0.95 * of_pca
    assert error(decoder="linear", encoder="linear") > 0.95 * of_pca


# ---- codes and reconstructions ---------------------------------------------------------------------------------------


def test_reconstruct_is_decode_of_transform(comparison: ez.Comparison) -> None:
    """To the bit, for free codes and for an encoder's, and on rows that the encoder has not seen."""
    for fit in comparison.fits:
        assert fit.transform().shape == (178, 2)
        with torch.no_grad():
            assert torch.equal(fit.reconstruct(), fit.entry.decode(fit.transform()))
            assert not torch.equal(fit.reconstruct(), fit.entry.decode(fit.transform().roll(1, 0)))
    encoder = comparison.fits[1]
    assert torch.equal(encoder.reconstruct(encoder.x[:5] + 1), encoder.reconstruct(encoder.x + 1)[:5])
    with pytest.raises(InvalidInput, match="found 5 rows, expected the 178 rows of the fit"):
        comparison.fits[0].reconstruct(encoder.x[:5])


def test_other_models_reconstruct_as_well() -> None:
    """PPCA by W z + μ; a conditional VAE leaves the condition as it is; a mixture has no code."""
    x = ez.load_data("iris").x
    ppca = ez.fit("ppca", x, method="closed-form", progress=False)
    expected = ppca.transform() @ ppca.entry.loading.detach().mT + ppca.entry.loc.detach()
    # Absolute, cm: one product of two small matrices.
    np.testing.assert_allclose(ppca.reconstruct().numpy(), expected.numpy(), rtol=0, atol=1e-10)
    labelled = torch.cat([x, torch.arange(150)[:, None] % 3], 1)
    conditional = ez.fit("conditional-vae", labelled, guide="amortized", likelihood="normal", steps=2, progress=False)
    found = conditional.reconstruct()
    assert found.shape == labelled.shape and torch.equal(found[:, -1], labelled[:, -1])
    assert not torch.equal(found[:, 0], labelled[:, 0])
    mixture = ez.fit("gaussian-mixture", x, method="em", components=2, progress=False)
    with pytest.raises(InvalidInput, match="has the latents 'z', expected one continuous latent for each row"):
        mixture.reconstruct()


def test_simulation_draws_codes_by_convention() -> None:
    """Standard normal codes, which is said and is no prior: 20,000 draws within 5 standard errors of mean 0, sd 1."""
    _, z = example().simulate(10_000, seed=0)
    values = z.flatten()
    count = len(values)
    assert abs(float(values.mean())) < 5 / math.sqrt(count)  # false alarms 6e-7
    assert abs(float(values.var()) - 1) < 5 * math.sqrt(2 / count)
    assert abs(float((values + 0.1).mean())) > 5 / math.sqrt(count)  # negative control
    assert abs(float((1.1 * values).var()) - 1) > 5 * math.sqrt(2 / count)


def test_minibatches_and_full_batches_have_one_objective() -> None:
    """Scaled to the data set: the mean of the losses of three thirds is that of the whole, to 1e-9 relative."""
    entry = example(likelihood="normal")
    x, _ = entry.simulate(24, seed=0)
    with isolated(0):
        guide = build_guide("free-delta", entry, x, GuideOptions()).double()
        loss = OBJECTIVES["elbo"].build(1, guide)(entry, guide)
        whole = float(loss(Batch.full(x)))
        parts = [float(loss(Batch(x[index], index, 24))) for index in torch.arange(24).split(8)]
    assert sum(parts) / 3 == pytest.approx(whole, rel=1e-9)
    assert parts[0] != pytest.approx(whole, rel=1e-9)  # negative control: one third is not the whole


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"likelihood=bernoulli: found 0.5 in column 2, row 1 .* set likelihood=normal"),
        ({"latent_dim": 0}, "option latent_dim: found 0, expected int >= 1"),
        ({"decoder": "conv"}, r"option decoder: found 'conv', expected mlp \| linear"),
        ({"code": 3}, "unknown option 'code'"),
    ],
)
def test_bad_input_gets_one_line(options: dict[str, object], message: str) -> None:
    x = torch.tensor([[0.0, 0.5], [1.0, 0.2], [1.0, 0.7]], dtype=torch.float64)
    with pytest.raises(InvalidInput, match=message) as caught:
        Autoencoder.from_data(x, **options)
    assert "\n" not in str(caught.value)
    Autoencoder.from_data(x, likelihood="normal")

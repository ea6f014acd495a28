"""The linear VAE against PPCA's closed form: what SVI reaches, what each gap is, and when a dimension collapses."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

import elbozoo as ez
from elbozoo.inference.em import EMOptions, run_em
from elbozoo.inference.fit import Fit
from elbozoo.models import get_entry
from elbozoo.models.contract.entry import capabilities
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.linear_vae import LinearVAE

WINE = "wine-standardised"
GIVEN_NOISE = 1.1  # its square lies between the third and the fourth eigenvalue of wine: 1.446 and 0.919


@cache
def rows(source: str = WINE) -> torch.Tensor:
    return ez.load_data(source).x


def eigenvalues(x: torch.Tensor) -> np.ndarray:
    return np.sort(np.linalg.eigvalsh(np.cov(x.numpy().T, bias=True)))[::-1]


def numpy_maximum(x: torch.Tensor, latent_dim: int, noise_scale: float | None = None) -> float:
    """Log-likelihood at the maximum from eigenvalues alone: every direction has max(λ, σ²), or σ² beyond K."""
    spectrum = eigenvalues(x)
    noise = spectrum[latent_dim:].mean() if noise_scale is None else noise_scale**2
    fitted = np.full_like(spectrum, noise)
    fitted[:latent_dim] = np.maximum(spectrum[:latent_dim], noise)
    per_row = len(spectrum) * math.log(2 * math.pi) + np.log(fitted).sum() + (spectrum / fitted).sum()
    return float(-0.5 * len(x) * per_row)


def exact(latent_dim: int, noise_scale: float | None = None) -> LinearVAE:
    entry = LinearVAE.from_data(rows(), latent_dim=latent_dim, noise_scale=noise_scale)
    entry.fit_exact(rows())
    return entry


@cache
def trained(latent_dim: int, noise_scale: float | None = None, encoder: str = "linear") -> Fit:
    options = {"latent_dim": latent_dim, "noise_scale": noise_scale, "encoder": encoder}
    return ez.fit("linear-vae", rows(), guide="amortized", **options)


def column_norms(entry: LinearVAE) -> np.ndarray:
    return np.sort(entry.loading.detach().norm(dim=0).numpy())[::-1]


def test_is_in_the_registry_with_the_capabilities_of_ppca() -> None:
    assert get_entry("linear-vae") is LinearVAE
    assert capabilities(LinearVAE.example()) == capabilities(get_entry("ppca").example())
    assert {"oracle", "posterior", "closed form", "EM"} <= set(capabilities(LinearVAE.example(noise_scale=0.5)))


@pytest.mark.parametrize(("latent_dim", "noise_scale"), [(3, None), (5, GIVEN_NOISE), (13, GIVEN_NOISE), (2, 0.3)])
def test_closed_form_is_the_numpy_maximum(latent_dim: int, noise_scale: float | None) -> None:
    """To 1e-8 nats per datum (rounding of sums of squares); with the loading 1 % off it is below by more."""
    x, entry = rows(), exact(latent_dim, noise_scale)
    truth = numpy_maximum(x, latent_dim, noise_scale)
    with torch.no_grad():
        assert abs(float(entry.log_evidence(x).sum()) - truth) <= 1e-8 * len(x)
        entry.loading *= 1.01
        assert float(entry.log_evidence(x).sum()) < truth - 1e-8 * len(x)


@pytest.mark.parametrize(("latent_dim", "noise_scale"), [(3, None), (5, GIVEN_NOISE)])
def test_svi_with_a_linear_encoder_reaches_the_closed_form(latent_dim: int, noise_scale: float | None) -> None:
    """The ELBO ends within 0.02 nats per datum of the maximum of the likelihood; one q for all data does not.

    Above by at most 1e-3: six standard errors of 1000 draws of the ELBO of a converged q.
    """
    x = rows()
    truth = numpy_maximum(x, latent_dim, noise_scale)
    fit = trained(latent_dim, noise_scale)
    assert fit.converged
    assert truth - 0.02 * len(x) <= fit.elbo() <= truth + 1e-3 * len(x)
    shared = ez.fit("linear-vae", x, guide="shared", latent_dim=latent_dim, noise_scale=noise_scale, steps=300)
    assert shared.elbo() < truth - 0.02 * len(x)


def test_each_gap_of_the_ledger_is_explained() -> None:
    """Approximation, amortization and learning gap against closed forms in NumPy that share nothing with the ledger.

    Approximation: ½ (Σ log M_ii - log det M), what correlation under the posterior costs independent normals.
    Amortization: the rest of KL(q ‖ posterior), from the encoder's means and scales. Learning: the eigenvalues'
    maximum less this θ's evidence. Six standard errors of the ledger's ELBO and 1e-6 nats per datum of rounding.
    """
    x, fit = rows(), trained(3)
    ledger = fit.full_ledger(best_known=numpy_maximum(x, 3))
    loading, noise = fit.entry.loading.detach().numpy(), float(fit.entry.noise_scale.detach()) ** 2
    precision = np.eye(3) + loading.T @ loading / noise
    centre = np.linalg.solve(precision, loading.T @ (x.numpy() - fit.entry.loc.detach().numpy()).T / noise).T
    with torch.no_grad():
        (q,) = fit.guide.distributions(ez.models.Batch.full(x)).values()
    mean, variance = q.mean.numpy(), q.variance.numpy()

    approximation = 0.5 * (np.log(np.diag(precision)).sum() - np.linalg.slogdet(precision)[1])
    away = mean - centre
    divergence = 0.5 * (
        (variance * np.diag(precision)).sum(-1)
        + np.einsum("ni,ij,nj->n", away, precision, away)
        - 3
        - np.linalg.slogdet(precision)[1]
        - np.log(variance).sum(-1)
    )
    dense = multivariate_normal(fit.entry.loc.detach().numpy(), loading @ loading.T + noise * np.eye(x.shape[1]))
    learning = numpy_maximum(x, 3) - dense.logpdf(x.numpy()).sum()

    error = 6 * ledger.elbo_se + 1e-6 * len(x)
    assert abs(ledger.gap - divergence.sum()) <= error
    assert abs(ledger.approximation_gap - approximation * len(x)) <= error
    assert abs(ledger.amortization_gap - (divergence.sum() - approximation * len(x))) <= 2 * error
    assert abs(ledger.learning_gap - learning) <= 1e-6 * len(x)
    # Negative control: at the θ and q of an early fit every gap is another number.
    early = ez.fit("linear-vae", x, guide="amortized", encoder="linear", latent_dim=3, steps=30)
    other = early.full_ledger(best_known=numpy_maximum(x, 3))
    assert abs(other.gap - divergence.sum()) > error
    assert abs(other.learning_gap - learning) > 1e-6 * len(x)


@pytest.mark.parametrize("noise_scale", [0.7, 0.95, GIVEN_NOISE, 1.4, 3.0])
def test_the_likelihood_itself_drops_columns_below_the_noise(noise_scale: float) -> None:
    """At the global maximum column k has norm √(λ_k - σ²), and is zero exactly where λ_k <= σ² (1e-9: rounding)."""
    entry, spectrum = exact(8, noise_scale), eigenvalues(rows())[:8]
    expected = np.sqrt(np.maximum(spectrum - noise_scale**2, 0))
    assert np.abs(column_norms(entry) - expected).max() <= 1e-9
    assert ((entry.loading.detach() == 0).all(0).numpy() == (spectrum <= noise_scale**2)).all()
    # Negative control: another noise has other columns.
    assert np.abs(column_norms(exact(8, 1.05 * noise_scale)) - expected).max() > 1e-9 or noise_scale == 3.0


def test_a_larger_or_smaller_column_has_less_likelihood() -> None:
    """No encoder is to blame: log p(x) falls on both sides of zero, and of √(λ_3 - σ²) for the third column.

    The fourth direction has λ = 0.919 < σ² = 1.21; at a noise below λ the same column raises log p(x).
    """
    x = rows()
    _, vectors = np.linalg.eigh(np.cov(x.numpy().T, bias=True))
    fourth = torch.from_numpy(vectors[:, -4].copy())

    def evidence(noise_scale: float, size: float) -> float:
        entry = exact(4, noise_scale)
        with torch.no_grad():
            entry.loading[:, 3] = size * fourth
            return float(entry.log_evidence(x).sum())

    dropped = [evidence(GIVEN_NOISE, size) for size in (0.0, 0.1, 0.3)]
    used = [evidence(0.9, size) for size in (0.0, 0.1, 0.3)]
    assert dropped[0] > dropped[1] > dropped[2]
    assert used[0] < used[1] < used[2]


def test_svi_collapses_the_same_dimensions_and_their_q_is_the_prior() -> None:
    """K = 5 at a noise that leaves three: norms within 0.05 of √(λ_k - σ²)₊, q of the others N(0, 1) to 0.05.

    A norm w near zero costs w⁴/4σ⁴ nats per datum at most, so a fit within 1e-5 of the optimum leaves w < 0.1.
    """
    fit, x = trained(5, GIVEN_NOISE), rows()
    expected = np.sqrt(np.maximum(eigenvalues(x)[:5] - GIVEN_NOISE**2, 0))
    assert np.abs(column_norms(fit.entry) - expected).max() <= 0.05
    with torch.no_grad():
        (q,) = fit.guide.distributions(ez.models.Batch.full(x)).values()
    dead = fit.entry.loading.detach().norm(dim=0) < 0.1
    assert int(dead.sum()) == 2
    assert float(q.mean[:, dead].abs().max()) <= 0.05 and float((q.stddev[:, dead] - 1).abs().max()) <= 0.05
    assert float(q.mean[:, ~dead].abs().max()) > 0.05  # negative control: the others say something
    # With σ learned it ends below λ_K, and the same five dimensions are all in use.
    learned = exact(5)
    assert float(learned.noise_scale.detach()) ** 2 < eigenvalues(x)[4]
    assert column_norms(learned).min() > 0.1


@pytest.mark.parametrize("noise_scale", [None, GIVEN_NOISE])
def test_em_ends_at_the_maximum_and_keeps_a_noise_that_is_given(noise_scale: float | None) -> None:
    """Within 1e-3 nats per datum of NumPy's maximum, from a start that is further away."""
    x = rows()
    entry = LinearVAE.from_data(x, latent_dim=5, noise_scale=noise_scale)
    run = run_em(entry, x, EMOptions(), seed=0, progress=False)
    truth = numpy_maximum(x, 5, noise_scale)
    assert truth - 1e-3 * len(x) <= run.log_evidence <= truth + 1e-8 * len(x)
    assert run.trajectory.frame()["log_evidence"].iloc[0] < truth - 1e-3 * len(x)
    assert noise_scale is None or float(entry.noise_scale) == noise_scale


def test_a_given_noise_is_no_parameter_and_survives_a_round_trip(tmp_path: object) -> None:
    fit = ez.fit("linear-vae", rows(), guide="amortized", latent_dim=4, noise_scale=0.7, steps=3)
    assert float(fit.entry.noise_scale) == 0.7
    assert [name for name, _ in fit.entry.named_parameters()] == ["loading", "loc"]
    loaded = Fit.load(fit.save(f"{tmp_path}/fit"))
    assert float(loaded.entry.noise_scale) == 0.7
    learned = ez.fit("linear-vae", rows(), guide="amortized", latent_dim=4, steps=3)
    assert len(list(learned.entry.parameters())) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_dim": 13}, "expected at most 12: with more the noise vanishes"),
        ({"latent_dim": 14, "noise_scale": 1.0}, "expected at most 13: the covariance has no more eigenvalues"),
        ({"noise_scale": 0.0}, r"option noise_scale: found 0.0, expected float \| none > 0"),
    ],
)
def test_bad_options_get_one_line(options: dict[str, float], message: str) -> None:
    """One more than allowed is refused; what is allowed is taken."""
    with pytest.raises(InvalidInput, match=message) as caught:
        LinearVAE.from_data(rows(), **options)
    assert "\n" not in str(caught.value)
    LinearVAE.from_data(rows(), latent_dim=13, noise_scale=1.0)


@pytest.mark.slow
def test_svi_reaches_the_closed_form_on_digits() -> None:
    """64 raw pixels, K = 10: the ELBO within 0.02 nats per datum of the maximum, above it by no more than 1e-3."""
    x = rows("digits")
    truth = numpy_maximum(x, 10)
    options = {"latent_dim": 10, "encoder": "linear", "learning_rate": 0.05, "particles": 2, "schedule": "cosine"}
    fit = ez.fit("linear-vae", x, guide="amortized", objective="elbo-analytic", steps=2000, **options)
    assert truth - 0.02 * len(x) <= fit.elbo() <= truth + 1e-3 * len(x)
    early = ez.fit("linear-vae", x, guide="amortized", objective="elbo-analytic", steps=50, **options)
    assert early.elbo() < truth - 0.02 * len(x)

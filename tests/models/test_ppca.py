"""PPCA against an independent closed form, EM, a linear encoder and the closed form of the mean-field gap."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

import elbozoo as ez
from elbozoo.guides import build_guide
from elbozoo.guides.base import GuideOptions
from elbozoo.inference.ledger import compute_ledger
from elbozoo.models import get_entry
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.ppca import PPCA

CASES = [("iris", 2), ("wine-standardised", 3), ("digits", 10), ("wine", 2)]


def numpy_maximum(x: np.ndarray, latent_dim: int) -> float:
    """Log-likelihood at the maximum from eigenvalues of the N-denominator covariance alone (Tipping & Bishop 1999)."""
    n, d = x.shape
    eigenvalues = np.sort(np.linalg.eigvalsh(np.cov(x.T, bias=True)))[::-1]
    noise = eigenvalues[latent_dim:].mean()
    log_determinant = np.log(eigenvalues[:latent_dim]).sum() + (d - latent_dim) * math.log(noise)
    return -0.5 * n * (d * math.log(2 * math.pi) + log_determinant + d)


def closed_form(source: str, latent_dim: int) -> tuple[PPCA, torch.Tensor]:
    x = ez.load_data(source).x
    entry = get_entry("ppca").from_data(x, latent_dim=latent_dim)
    entry.fit_exact(x)
    return entry, x


@pytest.mark.parametrize(("source", "latent_dim"), CASES)
def test_closed_form_is_the_numpy_maximum(source: str, latent_dim: int) -> None:
    """To 1e-8 nats per datum; at a noise 1 % off it is below by more."""
    entry, x = closed_form(source, latent_dim)
    truth = numpy_maximum(x.numpy(), latent_dim)
    with torch.no_grad():
        assert abs(float(entry.log_evidence(x).sum()) - truth) <= 1e-8 * len(x)
        entry.noise_scale = 1.01 * entry.noise_scale
        assert float(entry.log_evidence(x).sum()) < truth - 1e-8 * len(x)


@pytest.mark.parametrize(("source", "latent_dim"), CASES)
def test_em_ends_at_the_maximum(source: str, latent_dim: int) -> None:
    """Within 1e-3 nats per datum, from a random start that is further away."""
    x = ez.load_data(source).x
    truth = numpy_maximum(x.numpy(), latent_dim)
    fit = ez.fit("ppca", x, method="em", latent_dim=latent_dim)
    history = fit.trajectory["log_evidence"]
    assert fit.converged
    assert truth - 1e-3 * len(x) <= history.iloc[-1] <= truth + 1e-8 * len(x)
    assert history.iloc[0] < truth - 0.1 * len(x)


def test_a_linear_encoder_reaches_the_closed_form() -> None:
    """A linear VAE is PPCA: its ELBO ends within 0.02 nats per datum of the maximum of the likelihood."""
    x = ez.load_data("wine-standardised").x
    truth = numpy_maximum(x.numpy(), 3)
    fit = ez.fit("ppca", x, guide="amortized", encoder="linear", latent_dim=3)
    assert fit.converged
    assert truth - 0.02 * len(x) <= fit.elbo() <= truth + 1e-3 * len(x)
    shared = ez.fit("ppca", x, guide="shared", latent_dim=3, steps=300)
    assert shared.elbo() < truth - 0.02 * len(x)


@pytest.mark.parametrize(("source", "latent_dim"), CASES)
def test_mean_field_gap_vanishes_at_the_closed_form_rotation_only(source: str, latent_dim: int) -> None:
    """There it is below 1e-6 nats per datum; turned by a random rotation it is ½(Σ log M_ii - log det M)."""
    entry, x = closed_form(source, latent_dim)
    x = x[:300]
    with isolated(0):
        guide = build_guide("mean-field", entry, x)
        rotation = torch.linalg.qr(torch.randn(latent_dim, latent_dim, dtype=torch.float64)).Q
    aligned = compute_ledger(entry, guide, x, GuideOptions(), seed=0)
    assert abs(aligned.approximation_gap) <= 1e-6 * len(x)
    with torch.no_grad():
        entry.loading.copy_(entry.loading @ rotation)
        m = torch.eye(latent_dim) + entry.loading.mT @ entry.loading / entry.noise_scale**2
        gap = 0.5 * float(m.diagonal().log().sum() - torch.logdet(m))
    turned = compute_ledger(entry, guide, x, GuideOptions(), seed=0)
    assert turned.log_evidence == pytest.approx(aligned.log_evidence, rel=1e-9)
    assert gap > 0.01
    # 1,000 draws of the best member: six standard errors of its ELBO; the gap without the turn is further away.
    tolerance = 6 * 0.05 * math.sqrt(latent_dim / len(x))
    assert abs(turned.approximation_gap / len(x) - gap) <= tolerance
    assert abs(aligned.approximation_gap / len(x) - gap) > tolerance


def test_mean_field_gap_of_a_rotated_loading_is_the_divergence_in_closed_form() -> None:
    """The best diagonal normal's KL to the posterior equals ½(Σ log M_ii - log det M) to 1e-9 nats per datum."""
    from elbozoo.inference.best_member import best_member
    from elbozoo.inference.divergence import kl_to_posterior

    entry, x = closed_form("iris", 2)
    angle = torch.tensor(0.5, dtype=torch.float64)
    with torch.no_grad():
        rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).reshape(2, 2)
        entry.loading.copy_(entry.loading @ rotation)
        m = torch.eye(2) + entry.loading.mT @ entry.loading / entry.noise_scale**2
    best = best_member(entry, "diagonal-normal", x, GuideOptions())
    assert best is not None
    divergence = kl_to_posterior(entry, best.guide, x, seed=0)
    assert divergence is not None
    expected = 0.5 * float(m.diagonal().log().sum() - torch.logdet(m))
    assert divergence.value / len(x) == pytest.approx(expected, abs=1e-9)
    assert expected > 0.01


def test_evidence_is_the_dense_normal_and_needs_no_dense_matrix() -> None:
    """Against SciPy's multivariate normal (1e-9 per datum), and with 20,000 columns, where D x D would be 3.2 GB."""
    entry = get_entry("ppca").example(6, seed=0, latent_dim=2)
    x, _ = entry.simulate(9, seed=1)
    with torch.no_grad():
        loading, noise = entry.loading.numpy(), float(entry.noise_scale) ** 2
        dense = multivariate_normal(entry.loc.numpy(), loading @ loading.T + noise * np.eye(6))
        assert np.allclose(entry.log_evidence(x).numpy(), dense.logpdf(x.numpy()), rtol=0, atol=1e-9)
        assert not np.allclose(entry.log_evidence(1.01 * x).numpy(), dense.logpdf(x.numpy()), rtol=0, atol=1e-9)
        wide = get_entry("ppca").example(20_000, seed=0, latent_dim=2)
        assert torch.isfinite(wide.log_evidence(wide.simulate(3, seed=0)[0])).all()


@pytest.mark.parametrize("latent_dim", [4, 5])
def test_more_latent_dimensions_than_the_rank_are_refused(latent_dim: int) -> None:
    """With K at the rank the noise would vanish; one below it is accepted."""
    x = ez.load_data("iris").x
    with pytest.raises(InvalidInput, match="expected at most 3"):
        ez.fit("ppca", x, latent_dim=latent_dim)
    get_entry("ppca").from_data(x, latent_dim=3)

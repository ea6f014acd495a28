"""The parts of an ELBO: closed forms of the linear-Gaussian model, SciPy's integrals, sums over finite latents."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

import elbozoo as ez
from elbozoo.guides import Guide, build_guide
from elbozoo.guides.base import GuideOptions
from elbozoo.inference.anatomy import Anatomy, anatomy
from elbozoo.inference.best_member import best_member
from elbozoo.inference.ledger import elbo_of
from elbozoo.inference.weights import importance_weights
from elbozoo.models import Batch, Entry, get_entry
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.isolation import isolated

Z_BOUND = 5.0  # two-sided, normal: a false alarm of 6e-7 for each number compared
ROUNDING = 1e-9  # nats: sums of some hundred float64 terms of size 1e3


def fitted_ppca(latent_dim: int) -> tuple[Entry, torch.Tensor]:
    x = ez.load_data("iris").x[::3]
    entry = get_entry("ppca").from_data(x, latent_dim=latent_dim)
    entry.fit_exact(x)  # type: ignore[attr-defined]
    with torch.no_grad():  # turned, so that the posterior is not diagonal
        turn = torch.linalg.qr(torch.randn(latent_dim, latent_dim, generator=torch.Generator().manual_seed(1))).Q
        entry.loading.copy_(entry.loading @ turn.double())
    return entry, x


def exact_guide(entry: Entry, x: torch.Tensor) -> Guide:
    return build_guide("exact", entry, x)


def diagonal_guide(entry: Entry, x: torch.Tensor) -> Guide:
    best = best_member(entry, "diagonal-normal", x, GuideOptions())
    assert best is not None
    return best.guide


def arrays(entry: Entry) -> tuple[np.ndarray, np.ndarray, float]:
    return entry.loading.detach().numpy(), entry.loc.detach().numpy(), float(entry.noise_scale.detach())


def test_parts_of_the_exact_posterior_have_closed_forms() -> None:
    """Rate and distortion of each row against NumPy's formulas; those at another noise scale are elsewhere."""
    entry, x = fitted_ppca(2)
    found = anatomy(entry, exact_guide(entry, x), x, seed=0, draws=500)
    w, mu, sigma = arrays(entry)

    def by_formula(sigma: float) -> tuple[np.ndarray, np.ndarray]:
        covariance = np.linalg.inv(np.eye(2) + w.T @ w / sigma**2)
        residual = x.numpy() - mu
        mean = residual @ w @ covariance / sigma**2
        rate = 0.5 * (np.trace(covariance) + (mean**2).sum(-1) - 2 - np.linalg.slogdet(covariance)[1])
        error = ((residual - mean @ w.T) ** 2).sum(-1) + np.trace(w @ covariance @ w.T)
        return rate, 0.5 * (error / sigma**2 + x.shape[1] * np.log(2 * np.pi * sigma**2))

    rate, distortion = by_formula(sigma)
    assert found.rate_form == "closed"
    np.testing.assert_allclose(found.rate.per_datum.numpy(), rate, rtol=0, atol=ROUNDING)
    assert abs(found.distortion.total - distortion.sum()) <= Z_BOUND * found.distortion.standard_error
    other_rate, other_distortion = by_formula(1.1 * sigma)
    assert np.abs(found.rate.per_datum.numpy() - other_rate).max() > 1e-3
    assert abs(found.distortion.total - other_distortion.sum()) > Z_BOUND * found.distortion.standard_error


@pytest.mark.parametrize("make", [exact_guide, diagonal_guide])
def test_the_two_identities(make: object) -> None:
    """Rate + distortion = -ELBO, and the mean rate = information + surplus: to rounding, and against other code."""
    entry, x = fitted_ppca(2)
    guide = make(entry, x)  # type: ignore[operator]
    found = anatomy(entry, guide, x, seed=1, draws=200, kl="sampled")
    split = found.information.per_datum + found.surplus.per_datum
    assert (split - found.rate.per_datum).abs().max() <= ROUNDING
    elbo, error = elbo_of(entry, guide, x, importance_weights(entry, guide, Batch.full(x), 1000, seed=2))
    allowed = Z_BOUND * math.hypot(error, found.elbo_se) + ROUNDING
    assert abs(found.elbo - elbo) <= allowed
    # A β of 0.9 in front of the rate, as in the objective of a β-VAE, is no ELBO.
    assert abs(-0.9 * found.rate.total - found.distortion.total - elbo) > allowed


def test_closed_and_sampled_rates_agree() -> None:
    """Within five standard errors; a rate that is a twentieth too large would not."""
    entry, x = fitted_ppca(2)
    guide = diagonal_guide(entry, x)
    closed, sampled = (anatomy(entry, guide, x, seed=3, draws=400, kl=form) for form in ("closed", "sampled"))
    assert (closed.rate_form, sampled.rate_form) == ("closed", "sampled")
    assert closed.rate.standard_error == 0.0 < sampled.rate.standard_error
    allowed = Z_BOUND * sampled.rate.standard_error
    assert abs(closed.rate.total - sampled.rate.total) <= allowed
    assert abs(1.05 * closed.rate.total - sampled.rate.total) > allowed


def aggregate_by_scipy(guide: Guide, x: torch.Tensor) -> tuple[float, float]:
    """Mutual information and KL of the aggregate to N(0, 1), K = 1, by integrals of the mixture's density."""
    with torch.no_grad():
        (q,) = guide.distributions(Batch.full(x)).values()
        mean, scale = q.mean[:, 0].numpy(), q.variance[:, 0].sqrt().numpy()

    def mixture(z: float) -> float:
        return float(stats.norm.pdf(z, mean, scale).mean())

    def integral(f: object) -> float:
        edges = np.linspace(mean.min() - 9 * scale.max(), mean.max() + 9 * scale.max(), 60)
        return sum(integrate.quad(f, a, b, epsabs=1e-11)[0] for a, b in itertools.pairwise(edges))

    entropy = -integral(lambda z: mixture(z) * np.log(max(mixture(z), 1e-300)))
    to_prior = -entropy - integral(lambda z: mixture(z) * stats.norm.logpdf(z))
    return entropy - stats.norm.entropy(0, scale).mean(), to_prior


def test_surgery_against_integrals_of_the_mixture() -> None:
    """Mutual information and marginal KL of thirty rows within five standard errors of SciPy's quadrature."""
    entry, x = fitted_ppca(1)
    x = x[:30]
    guide = exact_guide(entry, x)
    found = anatomy(entry, guide, x, seed=4, draws=1000)
    information, to_prior = aggregate_by_scipy(guide, x)
    allowed = Z_BOUND * found.information.standard_error / 30
    assert abs(found.mutual_information - information) <= allowed
    assert abs(found.marginal_kl - to_prior) <= Z_BOUND * found.surplus.standard_error / 30
    assert 0 < found.mutual_information <= math.log(30)
    wrong, _ = aggregate_by_scipy(exact_guide(entry, x[:15]), x[:15])
    assert abs(found.mutual_information - wrong) > allowed


def test_population_of_a_linear_gaussian_model() -> None:
    """Rows from the model itself: the aggregate is the prior, and the information is half log det M.

    The tolerance of both is 5 standard errors, over draws and over rows, plus 0.01 nats: an aggregate of N = 1000
    normals is about (cells of the latent space that they tell apart, here 10) / 2N = 0.005 nats from its limit.
    """
    entry = get_entry("ppca").example(seed=3, latent_dim=1)
    x, _ = entry.simulate(1000, seed=5)
    found = anatomy(entry, exact_guide(entry, x), x, seed=6, draws=4)
    w, _, sigma = arrays(entry)
    limit = 0.5 * np.linalg.slogdet(np.eye(1) + w.T @ w / sigma**2)[1]
    allowed = Z_BOUND * float(found.information.per_datum.std()) / math.sqrt(1000) + 0.01
    assert abs(found.mutual_information - limit) <= allowed
    assert abs(found.marginal_kl) <= Z_BOUND * float(found.surplus.per_datum.std()) / math.sqrt(1000) + 0.01
    assert abs(found.mutual_information - 1.2 * limit) > allowed  # negative control
    shifted = anatomy(entry, exact_guide(entry, x), x + 0.5 * torch.from_numpy(w[:, 0]), seed=6, draws=4)
    assert shifted.marginal_kl > 0.05  # rows from another prior have another aggregate: 0.5² / 2 nats from it


def test_collapsed_dimensions_are_not_active() -> None:
    """A column of zeros in the loading leaves its latent at the prior; without it there is one less."""
    entry, x = fitted_ppca(3)
    assert anatomy(entry, exact_guide(entry, x), x, draws=2).active_units == 3
    with torch.no_grad():
        entry.loading[:, 1] = 0.0
    found = anatomy(entry, exact_guide(entry, x), x, draws=2)
    assert found.active_units == 2
    assert found.unit_variances[1] == 0.0
    variances = exact_guide(entry, x).means(Batch.full(x)).detach().numpy().var(0)
    np.testing.assert_allclose(found.unit_variances.numpy(), variances, rtol=1e-12)


def test_a_finite_latent_is_summed_over() -> None:
    """No error bars: the information is the entropy of the mean responsibilities minus the mean of their entropies."""
    fit = ez.fit("gaussian-mixture", "iris", method="em", components=3, seed=0, progress=False)
    found = anatomy(fit.entry, fit.guide, fit.x)
    with torch.no_grad():
        shares = fit.transform().numpy()
    information = stats.entropy(shares.mean(0)) - stats.entropy(shares, axis=1).mean()
    assert found.mutual_information == pytest.approx(information, abs=ROUNDING)
    assert found.elbo == pytest.approx(float(fit.entry.log_evidence(fit.x).detach().sum()), abs=1e-8)
    assert found.rate.standard_error == found.distortion.standard_error == found.elbo_se == 0.0
    sampled = anatomy(fit.entry, fit.guide, fit.x, kl="sampled")
    assert sampled.rate.total == pytest.approx(found.rate.total, abs=1e-8)
    assert found.mutual_information != pytest.approx(stats.entropy(shares.mean(0)), abs=1e-4)  # negative control


def test_discrete_and_continuous_latents_together() -> None:
    """The posterior of a mixture of factor analyzers: ELBO = log p(x) for every draw, identities to rounding."""
    fit = ez.fit("mixture-of-factor-analyzers", "iris", method="em", iterations=5, seed=0, progress=False)
    found = anatomy(fit.entry, fit.guide, fit.x, draws=5)
    with torch.no_grad():
        evidence = float(fit.entry.log_evidence(fit.x).sum())
    assert found.rate_form == "sampled"
    assert found.elbo == pytest.approx(evidence, abs=1e-6)
    assert (found.information.per_datum + found.surplus.per_datum - found.rate.per_datum).abs().max() <= ROUNDING


def test_a_networks_rate_is_seen_as_it_learns() -> None:
    """An untrained encoder says nothing of its datum, a trained one does, within log N; the figures have names."""
    x = ez.load_data("digits-binary").x[:150]
    untrained, trained = (
        ez.fit("vae", x, guide="amortized", latent_dim=2, hidden=32, steps=steps, progress=False) for steps in (1, 200)
    )
    before, after = (_dissected(fit.entry, fit.guide, fit.x) for fit in (untrained, trained))
    assert before.mutual_information < 0.5 and 1.5 < after.mutual_information <= math.log(150)
    assert (before.active_units, after.active_units) == (0, 2)
    figures = after.as_dict()
    assert figures["rate"] == pytest.approx(150 * figures["rate_per_datum"])  # type: ignore[operator]
    assert torch.equal(after.reconstruction, -after.distortion.per_datum)


def _dissected(entry: Entry, guide: Guide, x: torch.Tensor) -> Anatomy:
    return anatomy(entry, guide, x, draws=20)


def test_chunks_and_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The aggregate does not depend on how it is chunked, and a seed repeats bit for bit."""
    from elbozoo.inference import anatomy as module

    entry, x = fitted_ppca(2)
    guide = exact_guide(entry, x)
    whole, again, other = (anatomy(entry, guide, x, seed=seed, draws=3) for seed in (7, 7, 8))
    assert torch.equal(whole.information.per_datum, again.information.per_datum)
    assert not torch.equal(whole.information.per_datum, other.information.per_datum)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1000)
    parts = anatomy(entry, guide, x, seed=7, draws=3)
    assert (parts.information.per_datum - whole.information.per_datum).abs().max() <= ROUNDING


def test_what_has_no_anatomy_is_refused() -> None:
    """Global latents, point masses, sequences, and closed forms that do not exist: one line each."""
    x = ez.load_data("iris").x[:20]
    entry = get_entry("ppca").from_data(x)
    with isolated(0):
        delta = build_guide("free-delta", entry, x)
    with pytest.raises(InvalidInput, match="a point mass has no density"):
        anatomy(entry, delta, x)
    mean = get_entry("normal-mean").from_data(x)
    with pytest.raises(InvalidInput, match="one for the whole data set"):
        anatomy(mean, build_guide("exact", mean, x), x)
    fit = ez.fit("hidden-markov-model", "earthquakes", method="em", emission="poisson", iterations=1, progress=False)
    with pytest.raises(InvalidInput, match="a datum is a sequence"):
        anatomy(fit.entry, fit.guide, fit.x)
    mixture = ez.fit("mixture-of-factor-analyzers", x, method="em", iterations=1, components=2, progress=False)
    with pytest.raises(InvalidInput, match="has no closed form"):
        anatomy(mixture.entry, mixture.guide, mixture.x, kl="closed", draws=2)
    with pytest.raises(InvalidInput, match="draws=1, expected at least 2"):
        anatomy(entry, exact_guide(entry, x), x, draws=1)

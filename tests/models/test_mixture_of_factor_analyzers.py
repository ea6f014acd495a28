"""Mixture of factor analyzers against dense normals, its reductions in scikit-learn and published maxima."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from pyro import poutine
from scipy.special import logsumexp
from scipy.stats import multivariate_normal, norm
from sklearn.decomposition import FactorAnalysis as SklearnFactorAnalysis
from sklearn.mixture import GaussianMixture as SklearnMixture
from torch import Tensor

import elbozoo as ez
from elbozoo.inference.em import EMOptions, run_em
from elbozoo.models import Batch, get_entry
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.mixture_of_factor_analyzers import MixtureOfFactorAnalyzers

NAME = "mixture-of-factor-analyzers"
NOISES = ["shared", "own"]


def example(noise: str = "own", **options: Any) -> MixtureOfFactorAnalyzers:
    entry = get_entry(NAME).example(options.pop("columns", 6), seed=0, noise=noise, **options)
    assert isinstance(entry, MixtureOfFactorAnalyzers)
    return entry


def from_data(x: Tensor, **options: Any) -> MixtureOfFactorAnalyzers:
    entry = get_entry(NAME).from_data(x, **options)
    assert isinstance(entry, MixtureOfFactorAnalyzers)
    return entry


def arrays(entry: MixtureOfFactorAnalyzers) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Weights (K,), means (K, D), loadings (K, D, L) and noise variances (K, D)."""
    tensors = (entry.weights, entry.means, entry.loadings, entry.variance)
    weights, means, loadings, variances = (tensor.detach().numpy() for tensor in tensors)
    return weights, means, loadings, variances


def scipy_log_evidence(entry: MixtureOfFactorAnalyzers, x: np.ndarray) -> np.ndarray:
    terms = [
        np.log(weight) + multivariate_normal(mean, loading @ loading.T + np.diag(variance)).logpdf(x)
        for weight, mean, loading, variance in zip(*arrays(entry), strict=True)
    ]
    return logsumexp(terms, axis=0)


def set_parameters(
    entry: MixtureOfFactorAnalyzers, weights: Any, means: Any, loadings: Any, variances: Any
) -> MixtureOfFactorAnalyzers:
    with torch.no_grad():
        entry.weights = torch.as_tensor(weights)
        entry.means.copy_(torch.as_tensor(means))
        entry.loadings.copy_(torch.as_tensor(loadings))
        entry._set_variance(torch.as_tensor(variances))
    return entry


def em_history(entry: MixtureOfFactorAnalyzers, x: Tensor, iterations: int) -> np.ndarray:
    """Log p(x) after each of so many steps of EM from where the entry stands, total nats."""
    options = EMOptions(restarts=1, iterations=iterations, tolerance=1e-15)
    run = run_em(entry, x, options, seed=0, progress=False)
    return run.trajectory.frame()["log_evidence"].to_numpy()


@pytest.mark.parametrize("noise", NOISES)
def test_evidence_is_a_sum_of_dense_normals(noise: str) -> None:
    """Against SciPy's multivariate normals, to 1e-9 nats per datum: rounding of two routes to the determinant."""
    entry = example(noise, components=4, latent_dim=3)
    x, _ = entry.simulate(40, seed=1)
    found = entry.log_evidence(x).detach().numpy()
    assert np.abs(found - scipy_log_evidence(entry, x.numpy())).max() <= 1e-9
    assert np.abs(found - scipy_log_evidence(entry, 1.001 * x.numpy())).max() > 1e-9


@pytest.mark.parametrize("noise", NOISES)
def test_posterior_is_that_of_the_dense_joint(noise: str) -> None:
    """Responsibilities by SciPy, factors by conditioning the dense normal of (f, x): 1e-9 in each number."""
    entry = example(noise, latent_dim=3)
    x, _ = entry.simulate(7, seed=1)
    weights, means, loadings, variances = arrays(entry)
    joint = entry.posterior(x)
    z = joint.conditionals["z"]
    values = torch.arange(3)[:, None, None]
    f = joint.conditionals["f"]({"z": values})  # type: ignore[operator]
    for k in range(3):
        covariance = loadings[k] @ loadings[k].T + np.diag(variances[k])
        log_joint = np.log(weights[k]) + multivariate_normal(means[k], covariance).logpdf(x.numpy())
        probs = np.exp(log_joint - scipy_log_evidence(entry, x.numpy()))
        assert np.abs(z.probs[:, k].detach().numpy() - probs).max() <= 1e-9  # type: ignore[union-attr]
        gain = loadings[k].T @ np.linalg.inv(covariance)
        mean = (x.numpy() - means[k]) @ gain.T
        dense = np.eye(3) - gain @ loadings[k]
        assert np.abs(f.mean[k, 0].detach().numpy() - mean).max() <= 1e-9
        assert np.abs(f.covariance_matrix[k, 0].detach().numpy() - dense).max() <= 1e-9
        # Negative control: without the noise's share of the covariance.
        assert np.abs(f.covariance_matrix[k, 0].detach().numpy() - (dense - np.eye(3) / 10)).max() > 1e-9


def test_draws_of_the_posterior_have_its_moments() -> None:
    """Means of f and z over 4,000 draws within six standard errors of the closed mixture: false alarms 1e-7 in all.

    The standard error of a factor is at most sqrt(its second moment / 4000).
    """
    entry = example()
    x, _ = entry.simulate(9, seed=1)
    joint = entry.posterior(x)
    with isolated(0), torch.no_grad():
        draws = joint.sample((4000,))
        probs = joint.conditionals["z"].probs  # type: ignore[union-attr]
        given = joint.conditionals["f"]({"z": torch.arange(3)[:, None, None]})  # type: ignore[operator]
        mean = torch.einsum("nk,knl->nl", probs, given.mean[:, 0])
        second = torch.einsum("nk,knl->nl", probs, (given.mean.square() + given.variance)[:, 0])
    assert draws["z"].shape == (4000, 9) and draws["f"].shape == (4000, 9, 2)
    bound = 6 * (second / 4000).sqrt()
    assert ((draws["f"].mean(0) - mean).abs() <= bound).all()
    assert not ((draws["f"].mean(0) - mean.flip(0)).abs() <= bound).all()
    share = (draws["z"][..., None] == torch.arange(3)).double().mean(0)
    assert ((share - probs).abs() <= 6 * (probs * (1 - probs) / 4000).sqrt() + 1e-3).all()


def test_program_broadcasts_over_enumerated_components_and_particles_of_factors() -> None:
    """z of shape (K, 1, 1) with f of (S, B, L) gives log p(x given z, f) of every pair; SciPy, to 1e-9 nats."""
    entry = example()
    x, _ = entry.simulate(5, seed=1)
    _, means, loadings, variances = arrays(entry)
    f = torch.randn(4, 5, 2, dtype=torch.float64)
    values = {"z": torch.arange(3)[:, None, None], "f": f}
    with isolated(0), torch.no_grad(), poutine.condition(data=values):
        trace = poutine.trace(entry).get_trace(Batch.full(x))
        trace.compute_log_prob()
    found = trace.nodes["x"]["unscaled_log_prob"]
    assert found.shape == (3, 4, 5)
    for k in range(3):
        centre = f.numpy() @ loadings[k].T + means[k]
        expected = norm.logpdf(x.numpy(), centre, np.sqrt(variances[k])).sum(-1)
        assert np.abs(found[k].numpy() - expected).max() <= 1e-9
        assert np.abs(found[k - 1].numpy() - expected).max() > 1e-9


def test_one_component_is_factor_analysis() -> None:
    """Same parameters, same score as scikit-learn (1e-9 nats per datum); EM ends at its maximum (1e-3 per datum)."""
    x = ez.load_data("wine-standardised").x
    peer = SklearnFactorAnalysis(2, tol=1e-10, max_iter=20_000, svd_method="lapack").fit(x.numpy())
    entry = from_data(x, components=1, latent_dim=2)
    set_parameters(entry, [1.0], peer.mean_[None], peer.components_.T[None], peer.noise_variance_[None])
    same = float(entry.log_evidence(x).detach().mean())
    assert same == pytest.approx(peer.score(x.numpy()), abs=1e-9)
    assert float(entry.log_evidence(1.001 * x).detach().mean()) != pytest.approx(peer.score(x.numpy()), abs=1e-9)

    fit = ez.fit(NAME, x, method="em", components=1, latent_dim=2, restarts=1)
    assert fit.log_evidence().value / len(x) >= peer.score(x.numpy()) - 1e-3
    assert fit.trajectory["log_evidence"].iloc[0] / len(x) < peer.score(x.numpy()) - 1e-3
    # Our own factor analysis stands at the same height (1e-3 per datum).
    single = ez.fit("factor-analysis", x, method="em", latent_dim=2)
    assert fit.log_evidence().value / len(x) == pytest.approx(single.log_evidence().value / len(x), abs=1e-3)


def test_without_loadings_it_is_the_diagonal_mixture_of_gaussians() -> None:
    """EM keeps W = 0, and ends where scikit-learn's diagonal mixture ends from the same start (1e-6 per datum)."""
    x = ez.load_data("iris").x
    start = x[[10, 60, 110]]
    variance = x.var(0, correction=0)
    options: dict[str, Any] = {"max_iter": 2000, "reg_covar": 0.0, "means_init": start.numpy()}
    options |= {"weights_init": np.full(3, 1 / 3), "precisions_init": np.tile(1 / variance.numpy(), (3, 1))}
    peer = SklearnMixture(3, covariance_type="diag", tol=1e-12, **options).fit(x.numpy())

    entry = from_data(x, components=3, noise="own")
    set_parameters(entry, [1 / 3] * 3, start, torch.zeros(3, 4, 2), variance.expand(3, -1))
    history = em_history(entry, x, 2000)
    assert not entry.loadings.detach().any()
    assert history[-1] / len(x) == pytest.approx(peer.score(x.numpy()), abs=1e-6)
    assert history[0] / len(x) != pytest.approx(peer.score(x.numpy()), abs=1e-6)
    # Same parameters, same score, to rounding.
    set_parameters(entry, peer.weights_, peer.means_, torch.zeros(3, 4, 2), peer.covariances_)
    assert float(entry.log_evidence(x).detach().mean()) == pytest.approx(peer.score(x.numpy()), abs=1e-9)


def test_with_a_factor_less_than_columns_it_is_the_full_mixture_of_gaussians() -> None:
    """Σ = W Wᵀ + λ_min I with D - 1 factors: scikit-learn's score (1e-9 per datum); EM has nothing to gain there."""
    x = ez.load_data("iris").x
    peer = SklearnMixture(2, covariance_type="full", tol=1e-13, max_iter=5000, reg_covar=0.0, random_state=0)
    peer.fit(x.numpy())
    eigenvalues, vectors = np.linalg.eigh(peer.covariances_)
    least = eigenvalues[:, :1]
    loadings = vectors[:, :, 1:] * np.sqrt(eigenvalues[:, None, 1:] - least[..., None])
    entry = from_data(x, components=2, latent_dim=3, noise="own")
    set_parameters(entry, peer.weights_, peer.means_, loadings, np.tile(least, (1, 4)))
    assert float(entry.log_evidence(x).detach().mean()) == pytest.approx(peer.score(x.numpy()), abs=1e-9)
    assert np.abs(entry.covariances.detach().numpy() - peer.covariances_).max() <= 1e-9
    # A maximum among all covariances is one among these: 20 steps gain less than 1e-7 nats per datum.
    history = em_history(entry, x, 20)
    assert abs(history[-1] - history[0]) <= 1e-7 * len(x)
    set_parameters(entry, peer.weights_, peer.means_, 0.9 * loadings, np.tile(least, (1, 4)))
    history = em_history(entry, x, 20)
    assert abs(history[-1] - history[0]) > 1e-7 * len(x)


@pytest.mark.parametrize(
    ("latent_dim", "seed", "published", "misallocated"),
    [(1, 1, -3102.254, 2), (2, 3, -2995.334, 1), (3, 0, -2913.122, 1)],
)
def test_wine_has_the_published_maxima(latent_dim: int, seed: int, published: float, misallocated: int) -> None:
    """Log-likelihoods and numbers of misallocated wines of McLachlan & Peel, Finite Mixture Models (2000), table 8.1.

    They are local maxima, reached from the cultivars with these random loadings. Within -0.005 and +0.05 nats in
    all: a column's noise tends to zero there, EM gains like 1 / iterations, and the book stopped a little earlier.
    """
    data = ez.load_data("wine")
    x, cultivars = data.x, data.labels
    assert cultivars is not None

    def end(noise: str, iterations: int) -> tuple[float, int]:
        entry = from_data(x, components=3, latent_dim=latent_dim, noise=noise)
        with torch.no_grad(), isolated(seed):
            entry._start_from(x, torch.nn.functional.one_hot(cultivars, 3).double())
        value = em_history(entry, x, iterations)[-1]
        return value, int((entry.log_joint(x).argmax(-1) != cultivars).sum())

    value, errors = end("own", 500)
    assert published - 0.005 <= value <= published + 0.05
    assert errors == misallocated
    assert abs(end("shared", 100)[0] - published) > 0.05


@pytest.mark.parametrize("noise", NOISES)
def test_m_step_is_the_exact_maximiser_under_the_floor(noise: str) -> None:
    """Q of a dense E step in NumPy: no admissible (μ, W, ψ) near the M step's has more; below the floor some do."""
    x = ez.load_data("iris").x[:60]
    entry = from_data(x, components=2, latent_dim=1, noise=noise, floor=0.2)
    em_history(entry, x, 30)
    weights, means, loadings, variances = arrays(entry)
    terms, moments = [], []
    for k in range(2):
        covariance = loadings[k] @ loadings[k].T + np.diag(variances[k])
        terms.append(np.log(weights[k]) + multivariate_normal(means[k], covariance).logpdf(x.numpy()))
        gain = np.linalg.solve(covariance, loadings[k])
        f = (x.numpy() - means[k]) @ gain
        moments.append((f, np.eye(1) - gain.T @ loadings[k]))
    probs = np.exp(terms - logsumexp(terms, axis=0))

    def expected(means: np.ndarray, loadings: np.ndarray, variances: np.ndarray) -> float:
        total = 0.0
        for k, (f, cov) in enumerate(moments):
            residual = np.square(x.numpy() - means[k] - f @ loadings[k].T) + np.diag(loadings[k] @ cov @ loadings[k].T)
            total += (probs[k][:, None] * (-0.5 * residual / variances[k] - 0.5 * np.log(variances[k]))).sum()
        return total

    with torch.no_grad():
        entry.maximize(entry.expected_statistics(x))
    _, means, loadings, variances = arrays(entry)
    best = expected(means, loadings, variances)
    floor = 0.2 * x.var(0, correction=0).numpy()
    assert (variances >= floor * (1 - 1e-12)).all() and np.isclose(variances, floor, rtol=1e-9, atol=0).any()
    random = np.random.default_rng(0)

    def factor() -> np.ndarray:
        # One factor for all components where the noise is shared.
        return np.exp(0.1 * random.standard_normal((2 if noise == "own" else 1, 4)))

    for _ in range(300):
        near = (
            means + 0.02 * random.standard_normal(means.shape),
            loadings + 0.02 * random.standard_normal(loadings.shape),
        )
        # Relative: rounding of Q.
        assert expected(*near, np.maximum(variances * factor(), floor)) <= best + 1e-9 * abs(best)
        assert expected(means, loadings, np.maximum(variances * factor(), floor)) <= best + 1e-9 * abs(best)
    below = [expected(means, loadings, variances * np.where(variances <= 1.0001 * floor, s, 1)) for s in (0.9, 0.99)]
    assert max(below) > best + 1e-9 * abs(best)


def test_one_component_has_the_same_noise_either_way() -> None:
    """With K = 1 shared and own noise are one model: the same steps of EM (1e-9 relative); with K = 2 they are not."""
    x = ez.load_data("iris").x

    def histories(components: int) -> list[np.ndarray]:
        return [em_history(from_data(x, components=components, noise=noise), x, 30) for noise in NOISES]

    assert np.allclose(*histories(1), rtol=1e-9, atol=0)
    assert not np.allclose(*histories(2), rtol=1e-9, atol=0)


def test_labels_and_rotations_change_nothing() -> None:
    """Renamed components and turned loadings have the same evidence (1e-12 relative), and rename responsibilities."""
    entry = example(components=3, latent_dim=2)
    x, _ = entry.simulate(20, seed=6)
    order = torch.tensor([2, 0, 1])
    angle = math.pi / 5
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    with torch.no_grad():
        evidence, responsibilities = entry.log_evidence(x), entry.log_joint(x).softmax(-1)
        entry.loadings.copy_(entry.loadings @ turn)
        assert torch.allclose(entry.log_evidence(x), evidence, rtol=1e-12, atol=0)
        weights, means, loadings, variance = entry.weights, entry.means, entry.loadings, entry.variance
        set_parameters(entry, weights[order], means[order], loadings[order], variance[order])
        assert torch.allclose(entry.log_evidence(x), evidence, rtol=1e-12, atol=0)
        assert torch.allclose(entry.log_joint(x).softmax(-1), responsibilities[:, order], rtol=0, atol=1e-12)
        assert not torch.allclose(entry.log_joint(x).softmax(-1), responsibilities, rtol=0, atol=1e-12)
        entry.loadings.copy_(entry.loadings @ (turn + 0.01))
        assert not torch.allclose(entry.log_evidence(x), evidence, rtol=1e-12, atol=0)


@pytest.mark.parametrize("noise", NOISES)
def test_offset_and_scale_of_the_data_change_nothing(noise: str) -> None:
    """At offset 1e6 and scale 1e-3 responsibilities are those of the plain data (1e-4); raw moments would cancel.

    At 1e6 a float64 carries 1e-10, which is 1e-7 of the columns' spread.
    """
    x = ez.load_data("iris").x
    moved = 1e-3 * x + 1e6
    plain, other = from_data(x, latent_dim=1, noise=noise), from_data(moved, latent_dim=1, noise=noise)
    em_history(plain, x, 60)
    em_history(other, moved, 60)
    with torch.no_grad():
        assert torch.allclose(plain.log_joint(x).softmax(-1), other.log_joint(moved).softmax(-1), rtol=0, atol=1e-4)
        shifted = other.log_joint(moved + 1e-3).softmax(-1)
        assert not torch.allclose(plain.log_joint(x).softmax(-1), shifted, rtol=0, atol=1e-4)


def test_collapsed_components_are_said() -> None:
    """A component on a repeated point sinks to the floor under its own noise: it is said, and figures are finite."""
    x = torch.cat([ez.load_data("iris").x[:40], torch.full((6, 4), 9.0, dtype=torch.float64)])
    fit = ez.fit(NAME, x, method="em", components=2, latent_dim=1, noise="own", restarts=2, iterations=300)
    assert any("collapsed" in note for note in fit.notes)
    assert torch.isfinite(fit.score_samples()).all()
    share = fit.entry.variance.detach() / x.var(0, correction=0)
    # The floor to rounding.
    assert float(share.min()) == pytest.approx(1e-6, rel=1e-6)
    clean = ez.fit(
        NAME, ez.load_data("iris").x, method="em", components=2, latent_dim=1, noise="own", restarts=1, iterations=300
    )
    assert not any("collapsed" in note for note in clean.notes)


@pytest.mark.parametrize("noise", NOISES)
def test_duplicates_outliers_and_a_component_per_row_stay_finite(noise: str) -> None:
    """More components than clusters, and as many as rows: finite figures, weights that add up to one (1e-12)."""
    clusters = torch.cat([torch.zeros(10, 3), torch.ones(10, 3), torch.full((1, 3), 1e4)]).double()
    for x, components in ((clusters, 6), (clusters[[0, 10, 20]], 3)):
        entry = from_data(x, components=components, latent_dim=1, noise=noise)
        run = run_em(entry, x, EMOptions(restarts=2, iterations=200), seed=0, progress=False)
        assert math.isfinite(run.log_evidence)
        with torch.no_grad():
            assert torch.isfinite(entry.log_joint(x)).all() and torch.isfinite(entry.covariances).all()
            assert abs(float(entry.weights.sum()) - 1) <= 1e-12


def test_a_component_without_rows_keeps_its_mean() -> None:
    """Rows of which a component has no share at all leave its mean; the rest is finite."""
    x = ez.load_data("iris").x
    entry = from_data(x, components=2, noise="own")
    with torch.no_grad():
        before = entry.means.clone()
        gone = torch.tensor([1.0, 0.0], dtype=torch.float64)
        statistics = entry.expected_statistics(x)
        statistics = type(statistics)(
            statistics.log_evidence, *(value * gone.reshape(-1, *[1] * (value.ndim - 1)) for value in statistics[1:])
        )
        entry.maximize(statistics)
        assert torch.equal(entry.means[1], before[1]) and not torch.equal(entry.means[0], before[0])
        assert torch.isfinite(entry.log_evidence(x)).all()
    assert "[1] collapsed" in str(entry.degeneracy(entry.expected_statistics(x)))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda x: x, {"components": 151}, "found 151 for 150 rows"),
        (lambda x: torch.cat([x, torch.ones(150, 1, dtype=x.dtype)], 1), {}, r"columns \[5\] .* constant"),
        (lambda x: x, {"latent_dim": 4}, "at most 3"),
        (lambda x: x[50:53], {"latent_dim": 3}, "at most 2"),
        (lambda x: x, {"noise": "none"}, r"option noise: found 'none', expected"),
    ],
)
def test_data_that_do_not_fit_are_refused(change: Any, options: dict[str, Any], message: str) -> None:
    """One clear line each; the data without them are taken."""
    x = ez.load_data("iris").x
    with pytest.raises(InvalidInput, match=message) as caught:
        from_data(change(x), **options)
    assert "\n" not in str(caught.value)
    from_data(x, latent_dim=3)


def test_wide_data_need_no_dense_matrix() -> None:
    """5,000 columns, where three D x D matrices would take 600 MB; evidence, E step and M step are finite."""
    entry = example(columns=5_000, latent_dim=2)
    x, _ = entry.simulate(4, seed=0)
    with torch.no_grad():
        entry.maximize(entry.expected_statistics(x))
        assert torch.isfinite(entry.log_evidence(x)).all()
        assert entry.degeneracy(entry.expected_statistics(x)) is not None

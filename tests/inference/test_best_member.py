"""The search for the best member of a family, against closed forms: of normal posteriors, and of coordinate ascent."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from torch.distributions import Categorical, Distribution, MultivariateNormal

import elbozoo as ez
from elbozoo.guides.base import Guide, GuideOptions
from elbozoo.inference import best_member as best_member_module
from elbozoo.inference.best_member import best_member
from elbozoo.inference.divergence import kl_to_posterior
from elbozoo.inference.ledger import compute_ledger
from elbozoo.inference.member_search import gaussian_nodes
from elbozoo.inference.method import plan
from elbozoo.models import Batch, Entry, get_entry
from elbozoo.models.contract.entry import Program

MIXTURE = "mixture-of-factor-analyzers"
NORMAL_FAMILIES = ["diagonal-normal", "full-rank-normal"]


def rotated(latent_dim: int) -> tuple[Entry, Entry, torch.Tensor, float]:
    """PPCA with a correlated posterior, the same program without its posterior, data, and the diagonal family's gap."""
    x = ez.load_data("wine-standardised").x[:40]
    entry = get_entry("ppca").from_data(x, latent_dim=latent_dim)
    entry.fit_exact(x)
    with torch.no_grad():
        entry.loading.copy_(entry.loading @ torch.linalg.qr(torch.randn(latent_dim, latent_dim).double()).Q)
        m = torch.eye(latent_dim) + entry.loading.mT @ entry.loading / entry.noise_scale**2
    gap = 0.5 * float(m.diagonal().log().sum() - torch.logdet(m))
    return entry, Program(entry, x.shape[1]), x, gap


@pytest.mark.parametrize("latent_dim", [1, 2, 4])
def test_natural_gradients_find_the_closed_form(latent_dim: int) -> None:
    """With the posterior hidden, the search ends within 1e-4 nats per datum of ½(Σ log M_ii - log det M), or 0."""
    entry, hidden, x, gap = rotated(latent_dim)
    for family, expected in (("diagonal-normal", gap), ("full-rank-normal", 0.0)):
        best = best_member(hidden, family, x, GuideOptions())
        assert best is not None and best.converged and best.method == "natural gradient"
        divergence = kl_to_posterior(entry, best.guide, x, seed=0)
        assert divergence is not None
        assert divergence.value / len(x) == pytest.approx(expected, abs=1e-4)
        # Negative control: the prior, at which the search starts, is nats away.
        prior = MultivariateNormal(torch.zeros(latent_dim).double(), torch.eye(latent_dim).double())
        far = torch.distributions.kl_divergence(prior, entry.posterior(x)).mean()
        assert float(far.detach()) > expected + 0.1


def test_low_rank_lies_between_diagonal_and_full_rank() -> None:
    """Rank one in four dimensions: its gap is below the diagonal family's and not below zero (1e-3 nats per datum)."""
    entry, hidden, x, gap = rotated(4)
    best = best_member(hidden, "low-rank-normal", x, GuideOptions(rank=1))
    assert best is not None and best.converged and best.method == "natural gradient"
    divergence = kl_to_posterior(entry, best.guide, x, seed=0)
    assert divergence is not None
    assert -1e-9 <= divergence.value / len(x) <= gap + 1e-3
    assert divergence.value / len(x) < gap - 1e-3


def test_families_without_a_bound_have_no_best_member() -> None:
    """A point mass bounds nothing."""
    entry, _, x, _ = rotated(2)
    assert best_member(entry, "delta", x, GuideOptions()) is None


@pytest.mark.parametrize("dim", [1, 2, 3, 10])
def test_nodes_integrate_quadratics_exactly(dim: int) -> None:
    """Moments to second order to 1e-9; in one and two dimensions to eighth order too."""
    nodes, weights = gaussian_nodes(dim)
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-12)
    assert torch.allclose(weights @ nodes, torch.zeros(dim).double(), atol=1e-9)
    assert torch.allclose(torch.einsum("s,si,sj->ij", weights, nodes, nodes), torch.eye(dim).double(), atol=1e-9)
    if dim <= 2:
        assert float(weights @ nodes[:, 0] ** 8) == pytest.approx(105.0, rel=1e-9)
    assert float(weights @ nodes[:, 0] ** 2) != pytest.approx(math.e, abs=1e-9)


class Factors(NamedTuple):
    """q of each row of a mixture of factor analyzers: ``probs`` (N, K), ``mean`` (N, L), ``covariance`` (N, L, L)."""

    probs: np.ndarray
    mean: np.ndarray
    covariance: np.ndarray


class Mixture:
    """The closed forms of a mixture of factor analyzers, in NumPy, and its evidence by SciPy's dense normals."""

    def __init__(self, entry: Any, x: torch.Tensor) -> None:
        tensors = (x, entry.weights, entry.means, entry.loadings, entry.variance)
        self.x, self.weights, self.means, self.loadings, self.variances = (t.detach().numpy() for t in tensors)
        # W' Psi^-1 W of each component, (K, L, L): what one row of it adds to the precision of its factors.
        self.information = np.einsum("kdi,kd,kdj->kij", self.loadings, 1 / self.variances, self.loadings)

    def log_evidence(self) -> np.ndarray:
        terms = [
            np.log(weight) + multivariate_normal(mean, loading @ loading.T + np.diag(variance)).logpdf(self.x)
            for weight, mean, loading, variance in zip(
                self.weights, self.means, self.loadings, self.variances, strict=True
            )
        ]
        return logsumexp(terms, axis=0)

    def expected_log_joint(self, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
        """E[log p(x, z = k, f)] under f ~ N(mean, covariance), (N, K), nats."""
        residual = self.x[:, None] - self.means - np.einsum("kdl,nl->nkd", self.loadings, mean)
        log_likelihood = -0.5 * (np.log(2 * np.pi * self.variances) + residual**2 / self.variances).sum(-1)
        spread = 0.5 * np.einsum("kij,nij->nk", self.information, covariance)
        second = (mean**2).sum(-1) + np.trace(covariance, axis1=1, axis2=2)
        log_prior = -0.5 * (mean.shape[1] * np.log(2 * np.pi) + second)
        return np.log(self.weights) + log_likelihood - spread + log_prior[:, None]

    def elbo(self, q: Factors) -> np.ndarray:
        """ELBO of each row, nats."""
        entropy = -np.where(q.probs > 0, q.probs * np.log(np.maximum(q.probs, 1e-300)), 0).sum(-1)
        entropy = entropy + 0.5 * np.linalg.slogdet(2 * np.pi * np.e * q.covariance)[1]
        return (q.probs * self.expected_log_joint(q.mean, q.covariance)).sum(-1) + entropy

    def responsibilities(self, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
        """Best q(z) given q(f), (N, K)."""
        expected = self.expected_log_joint(mean, covariance)
        return np.exp(expected - logsumexp(expected, axis=1, keepdims=True))

    def factors(self, probs: np.ndarray, family: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance of the best q(f) given q(z)."""
        precision = np.eye(self.loadings.shape[2]) + np.einsum("nk,kij->nij", probs, self.information)
        scaled = (self.x[:, None] - self.means) / self.variances
        mean = np.linalg.solve(precision, np.einsum("nk,kdi,nkd->ni", probs, self.loadings, scaled)[..., None])
        if family == "diagonal-normal":
            precision = precision * np.eye(precision.shape[1])
        return mean[..., 0], np.linalg.inv(precision)

    def ascent(self, component: int, family: str, sweeps: int = 500) -> Factors:
        """End of coordinate ascent from q(z) on one component."""
        probs = np.tile(np.eye(len(self.weights))[component], (len(self.x), 1))
        for _ in range(sweeps):
            mean, covariance = self.factors(probs, family)
            probs = self.responsibilities(mean, covariance)
        return Factors(probs, mean, covariance)


def overlapping(components: int = 3, latent_dim: int = 2) -> tuple[Any, torch.Tensor]:
    """A mixture of factor analyzers whose components overlap, in float64, and 40 rows."""
    entry = get_entry(MIXTURE).example(6, seed=3, components=components, latent_dim=latent_dim, noise="own")
    with torch.no_grad():
        entry.means.mul_(0.3)
    return entry, entry.simulate(40, seed=1)[0]


def factors_of(guide: Guide, x: torch.Tensor) -> Factors:
    """q(z) and q(f) of a guide as arrays."""
    with torch.no_grad():
        q = guide.distributions(Batch.full(x))
        f = q["f"]
        covariance = f.covariance_matrix if hasattr(f, "covariance_matrix") else torch.diag_embed(f.variance)
    return Factors(q["z"].probs.numpy(), f.mean.numpy(), covariance.numpy())


def found(entry: Entry, family: str, x: torch.Tensor, start: dict[str, Distribution] | None = None) -> Factors:
    best = best_member(entry, family, x, GuideOptions(rank=1), start)
    assert best is not None and best.converged
    return factors_of(best.guide, x)


@pytest.mark.parametrize("family", NORMAL_FAMILIES)
def test_best_mixed_member_bounds_the_evidence(family: str) -> None:
    """ELBO <= log p(x) of every row, to 1e-9 nats of rounding; the evidence of other data is exceeded."""
    entry, x = overlapping()
    mixture = Mixture(entry, x)
    q = found(entry, family, x)
    assert ((q.probs > 0.05) & (q.probs < 0.95)).any()
    elbo = mixture.elbo(q)
    assert (elbo <= mixture.log_evidence() + 1e-9).all()
    assert (elbo > Mixture(entry, 1.5 * x).log_evidence() + 1e-9).any()


@pytest.mark.parametrize("family", NORMAL_FAMILIES)
def test_best_mixed_member_is_a_fixed_point(family: str) -> None:
    """A sweep of closed-form coordinate ascent moves it by no more than where the search settles.

    A row settles once a step gains less than 1e-6 nats. A sweep gains KL(q(f) ‖ its optimum), which a mean off by
    sqrt(2e-6) = 1.4e-3 standard deviations makes: 3e-3 is allowed, and as much in the ratio of covariances. q(z) is
    the optimum of the q(f) beside it, to rounding (1e-9).
    """
    entry, x = overlapping()
    mixture = Mixture(entry, x)
    q = found(entry, family, x)
    mean, covariance = mixture.factors(q.probs, family)

    def distance(q: Factors) -> tuple[float, float, float]:
        ratio = np.linalg.solve(covariance, q.covariance) - np.eye(covariance.shape[1])
        shift = (q.mean - mean) / np.sqrt(np.diagonal(covariance, axis1=1, axis2=2))
        probs = q.probs - mixture.responsibilities(q.mean, q.covariance)
        return float(np.abs(shift).max()), float(np.abs(ratio).max()), float(np.abs(probs).max())

    shift, ratio, probs = distance(q)
    assert shift <= 3e-3 and ratio <= 3e-3 and probs <= 1e-9
    # Negative control: the means and q(z) of another row, and a wider q(f).
    shift, ratio, probs = distance(Factors(np.roll(q.probs, 1, 0), np.roll(q.mean, 1, 0), 1.1 * q.covariance))
    assert shift > 3e-3 and ratio > 3e-3 and probs > 1e-9


@pytest.mark.parametrize("family", NORMAL_FAMILIES)
def test_best_mixed_member_is_no_worse_than_coordinate_ascent_from_any_component(family: str) -> None:
    """Without a start within 1e-5 nats of the best of the K ends in every row; with one, not below it either.

    The slack is ten times the gain at which a row settles.
    """
    entry, x = overlapping()
    mixture = Mixture(entry, x)
    ends = [mixture.ascent(component, family) for component in range(3)]
    values = np.stack([mixture.elbo(end) for end in ends])
    alone = mixture.elbo(found(entry, family, x))
    assert (alone >= values.max(0) - 1e-5).all()
    # Negative control: no component alone would do for all rows.
    assert all((values.max(0) - value).max() > 1e-2 for value in values)
    for end, value in zip(ends, values, strict=True):
        f = MultivariateNormal(torch.from_numpy(end.mean), torch.from_numpy(end.covariance))
        start = {"z": Categorical(torch.from_numpy(end.probs)), "f": f}
        assert (mixture.elbo(found(entry, family, x, start)) >= value - 1e-9).all()


@pytest.mark.parametrize("family", NORMAL_FAMILIES)
def test_any_change_of_the_best_mixed_member_lowers_the_bound(family: str) -> None:
    """Means moved by a tenth of a standard deviation, covariances by a tenth, q(z) tempered where it is unsure.

    Given q(z) a mean moved so far costs ½ 0.1² = 5e-3 nats or more, and a covariance of two numbers by a tenth
    0.1 - log 1.1 = 4.7e-3: 1e-3 is asked for. What tempering costs depends on q(z): 1e-4 is asked for.
    """
    entry, x = overlapping()
    mixture = Mixture(entry, x)
    q = found(entry, family, x)
    top = mixture.elbo(q)
    step = 0.1 * np.sqrt(np.diagonal(q.covariance, axis1=1, axis2=2))
    tempered = q.probs**0.7 / (q.probs**0.7).sum(-1, keepdims=True)
    for sign in (1, -1):
        for column in np.eye(2):
            assert (mixture.elbo(q._replace(mean=q.mean + sign * step * column)) < top - 1e-3).all()
        assert (mixture.elbo(q._replace(covariance=(1 + 0.1 * sign) * q.covariance)) < top - 1e-3).all()
    unsure = q.probs.max(-1) < 0.95
    assert unsure.any() and (mixture.elbo(q._replace(probs=tempered))[unsure] < top[unsure] - 1e-4).all()


@pytest.mark.parametrize("latent_dim", [1, 2, 4])
def test_one_component_has_the_answer_of_its_one_latent(latent_dim: int) -> None:
    """Full rank is the posterior; the diagonal family's gap is ½(Σ log M_ii - log det M): both to 1e-9 per datum.

    With one component the log joint is quadratic, and one step of natural gradients ends at its optimum.
    """
    entry, x = overlapping(components=1, latent_dim=latent_dim)
    mixture = Mixture(entry, x)
    precision = np.eye(latent_dim) + mixture.information[0]
    gap = 0.5 * (np.log(np.diag(precision)).sum() - np.linalg.slogdet(precision)[1])
    for family, expected in (("diagonal-normal", gap), ("full-rank-normal", 0.0)):
        q = found(entry, family, x)
        assert np.abs(mixture.log_evidence() - mixture.elbo(q) - expected).max() <= 1e-9
        assert np.abs(mixture.log_evidence() - mixture.elbo(q._replace(mean=0.9 * q.mean)) - expected).max() > 1e-6
    # The single latent's own closed form, from another entry.
    single = get_entry("factor-analysis").from_data(x, latent_dim=latent_dim)
    with torch.no_grad():
        single.loading.copy_(entry.loadings[0])
        single.loc.copy_(entry.means[0])
        single._set_variance(entry.variance[0])
    best = best_member(single, "full-rank-normal", x, GuideOptions())
    assert best is not None and best.method == "closed form"
    (normal,) = best.guide.distributions(Batch.full(x)).values()
    assert np.abs(normal.mean.detach().numpy() - q.mean).max() <= 1e-9
    assert np.abs(normal.covariance_matrix.detach().numpy() - q.covariance).max() <= 1e-9


def test_low_rank_in_two_dimensions_is_full_rank() -> None:
    """Rank one and a diagonal make every covariance of two numbers: the same bound to 1e-3 nats per datum.

    That is what Adam leaves, who stops thrice at gains below 1e-4 nats per datum.
    """
    entry, x = overlapping()
    mixture = Mixture(entry, x[:12])
    low, full, diagonal = (
        mixture.elbo(found(entry, family, x[:12]))
        for family in ("low-rank-normal", "full-rank-normal", "diagonal-normal")
    )
    assert (low <= mixture.log_evidence() + 1e-9).all()
    assert abs((low - full).mean()) <= 1e-3
    assert abs((diagonal - full).mean()) > 1e-3


@pytest.mark.parametrize(
    ("family", "slack"),
    [("full-rank-normal", 1e-5), pytest.param("low-rank-normal", 1e-3, marks=pytest.mark.slow)],
)
def test_chunks_of_rows_do_not_change_the_best_member(
    monkeypatch: pytest.MonkeyPatch, family: str, slack: float
) -> None:
    """Three rows at a time: the same bound of each of eight, within ten times the gain at which they settle.

    A low-rank normal leaves what Adam leaves, 1e-3 nats.
    """
    entry, x = overlapping()
    mixture = Mixture(entry, x[:8])
    whole = mixture.elbo(found(entry, family, x[:8]))
    monkeypatch.setattr(best_member_module, "CHUNK_ELEMENTS", 3 * 3 * 64 * 6)
    parts = mixture.elbo(found(entry, family, x[:8]))
    assert np.abs(whole - parts).max() <= slack
    assert np.abs(np.roll(whole, 1) - parts).max() > slack


def scalar_and_coin(batch: Batch) -> torch.Tensor:
    """A scalar latent that the data depend on, and a finite one that they do not."""
    loading, zero = batch.x.new_tensor([1.0, -2.0, 0.5]), batch.x.new_zeros(())
    with pyro.plate("data", batch.total, subsample=batch.index):
        pyro.sample("c", dist.Categorical(batch.x.new_tensor([0.2, 0.5, 0.3])))
        z = pyro.sample("z", dist.Normal(zero, 1.0))
        return pyro.sample("x", dist.Normal(z[..., None] * loading, 0.5).to_event(1), obs=batch.x)


def test_a_program_of_the_users_with_a_scalar_and_a_finite_latent() -> None:
    """Where c has nothing to say, q(c) is its prior and the normal q(z) the posterior: no gap, to 1e-9 nats a datum."""
    x = torch.randn(30, 3, dtype=torch.float64)
    loading = np.array([1.0, -2.0, 0.5])
    best = best_member(Program(scalar_and_coin, 3), "diagonal-normal", x, GuideOptions())
    assert best is not None and best.converged
    q = best.guide.distributions(Batch.full(x))
    precision = 1 + loading @ loading / 0.25
    assert np.abs(q["c"].probs.detach().numpy() - [0.2, 0.5, 0.3]).max() <= 1e-9
    assert np.abs(q["z"].mean.detach().numpy() - x.numpy() @ loading / 0.25 / precision).max() <= 1e-9
    assert np.abs(q["z"].variance.detach().numpy() - 1 / precision).max() <= 1e-9
    assert np.abs(q["z"].variance.detach().numpy() - 0.9 / precision).max() > 1e-9


def two_coins(batch: Batch) -> torch.Tensor:
    probs = batch.x.new_tensor([0.4, 0.6])
    with pyro.plate("data", batch.total, subsample=batch.index):
        a, b = (pyro.sample(name, dist.Categorical(probs)) for name in "ab")
        z = pyro.sample("z", dist.Normal(batch.x.new_zeros(2), 1.0).to_event(1))
        return pyro.sample("x", dist.Normal(z + (a + b)[..., None], 1.0).to_event(1), obs=batch.x)


def two_vectors(batch: Batch) -> torch.Tensor:
    prior = dist.Normal(batch.x.new_zeros(2), 1.0).to_event(1)
    with pyro.plate("data", batch.total, subsample=batch.index):
        y, z = (pyro.sample(name, prior) for name in "yz")
        return pyro.sample("x", dist.Normal(y + z, 1.0).to_event(1), obs=batch.x)


def test_programs_without_a_search_have_no_best_member() -> None:
    """Two finite latents under a q that takes them as independent: None, rather than a guess."""
    x = torch.randn(5, 2, dtype=torch.float64)
    assert best_member(Program(two_coins, 2), "diagonal-normal", x, GuideOptions()) is None


@pytest.mark.parametrize("family", ["diagonal-normal", "full-rank-normal", "low-rank-normal"])
def test_two_real_latents_are_independent_under_the_best_member(family: str) -> None:
    """x = y + z + noise: the best product has the posterior's means x/3 and precisions 2, to 1e-6 (1e-2 by Adam).

    The posterior's own variance is 2/3 and not 1/2; a q over both vectors at once would have it.
    """
    x = torch.randn(20, 2, dtype=torch.float64)
    best = best_member(Program(two_vectors, 2), family, x, GuideOptions())
    assert best is not None and best.converged
    tolerance = 1e-2 if family == "low-rank-normal" else 1e-6
    for q in best.guide.distributions(Batch.full(x)).values():
        assert (q.mean - x / 3).abs().max() <= tolerance
        assert (q.variance - 1 / 2).abs().max() <= tolerance
        assert (q.variance - 2 / 3).abs().max() > tolerance


def test_the_ledger_of_mean_field_on_iris_splits_its_gap() -> None:
    """ELBO + approximation + amortization = log p(x); the approximation gap is that of coordinate ascent in NumPy.

    Both are estimates from 1,000 draws: six standard errors, false alarms 2e-9.
    """
    x = ez.load_data("iris").x
    fit = plan(MIXTURE, x, "mean-field", {"components": 3, "latent_dim": 2, "steps": 200}).run(0, progress=False)
    ledger = fit.full_ledger()
    assert ledger.best_member_converged
    total = ledger.elbo + ledger.approximation_gap + ledger.amortization_gap
    assert total == pytest.approx(ledger.log_evidence, rel=1e-12)
    error = 6 * ledger.elbo_se
    assert ledger.approximation_gap >= 0 and ledger.amortization_gap >= -error
    mixture = Mixture(fit.entry, fit.x)
    best = np.max([mixture.elbo(mixture.ascent(component, "diagonal-normal")) for component in range(3)], 0)
    expected = float((mixture.log_evidence() - best).sum())
    assert abs(ledger.approximation_gap - expected) <= error
    # Negative control: the same θ with a q of a fit that hardly began has the same approximation gap, and a larger gap.
    with torch.no_grad():
        for values in fit.guide.parameters():
            values.add_(0.5)
    moved = compute_ledger(fit.entry, fit.guide, fit.x, GuideOptions(), seed=0)
    assert abs(moved.approximation_gap - expected) <= 6 * moved.elbo_se
    assert abs(moved.gap - expected) > 6 * moved.elbo_se

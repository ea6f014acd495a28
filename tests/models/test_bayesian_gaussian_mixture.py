"""Bayesian mixture of Gaussians against SciPy, scikit-learn, and sums over assignments by other means."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from scipy import integrate, special, stats
from sklearn.cluster import KMeans
from sklearn.mixture import BayesianGaussianMixture as SklearnMixture
from torch.distributions import biject_to

import elbozoo as ez
from elbozoo.models import Batch, get_entry
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.distributions.wishart import Wishart

COVARIANCES = ["full", "diagonal"]
NAME = "bayesian-gaussian-mixture"

# Absolute, nats: sums of a few log-gammas and log-determinants of order 100 in float64.
ROUNDING = 1e-9


def entry_for(x, **options):
    return get_entry(NAME).from_data(x, **options)


def clusters(rows, columns, seed):
    """Rows about two centres, far enough apart to matter and close enough to mix."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(0, 2, size=(2, columns))
    return torch.tensor(centres[rng.integers(2, size=rows)] + rng.normal(size=(rows, columns)))


def converged_factors(entry, x, sweeps, restart=0):
    with isolated(0):
        factors = entry.initial_factors(x, restart)
    for _ in range(sweeps):
        factors = entry.update_factors(x, factors)
    return factors


# The Wishart distribution.


def wishart(columns, seed):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(columns, columns + 2))
    return columns + 0.7, torch.tensor(root @ root.T)


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_wishart_density_is_scipys(columns):
    nu, inverse_scale = wishart(columns, 0)
    q = Wishart(torch.tensor(nu, dtype=torch.float64), inverse_scale)
    draws = q.sample((5,))
    peer = stats.wishart(nu, np.linalg.inv(inverse_scale.numpy()))
    expected = [float(peer.logpdf(draw.numpy())) for draw in draws]
    assert q.log_prob(draws).tolist() == pytest.approx(expected, rel=0, abs=ROUNDING)
    assert q.log_prob(1.001 * draws).tolist() != pytest.approx(expected, rel=0, abs=ROUNDING)
    assert np.abs(q.mean.numpy() - peer.mean()).max() <= ROUNDING * np.abs(peer.mean()).max()


def test_wishart_draws_have_its_moments():
    """Mean of Λ and of ln |Λ| over 20,000 draws, |z| < 6: false-alarm rate below 1e-7 over the 7 comparisons."""
    nu, inverse_scale = wishart(3, 1)
    q = Wishart(torch.tensor(nu, dtype=torch.float64), inverse_scale)
    draws = q.sample((20_000,))
    scale = np.linalg.inv(inverse_scale.numpy())
    log_determinant = (
        sum(special.digamma((nu - i) / 2) for i in range(3)) + 3 * math.log(2) + np.linalg.slogdet(scale)[1]
    )
    found = torch.cat([draws[:, *np.tril_indices(3)], torch.logdet(draws)[:, None]], 1)
    expected = torch.tensor([*(nu * scale)[np.tril_indices(3)], log_determinant])

    def z(truth):
        return (found.mean(0) - truth) / found.std(0) * math.sqrt(len(found))

    assert z(expected).abs().max() < 6
    assert z(1.1 * expected).abs().max() > 6


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_precisions_have_a_bijection_with_its_jacobian(columns):
    """Against the determinant of the numerical Jacobian onto the lower triangle, 1e-8 nats."""
    transform = biject_to(Wishart.support)
    u = torch.randn(columns * (columns + 1) // 2, dtype=torch.float64)
    lower = torch.tril_indices(columns, columns)

    def triangle(v):
        return transform(v)[lower[0], lower[1]]

    value = transform(u)
    jacobian = torch.autograd.functional.jacobian(triangle, u)
    expected = float(torch.linalg.slogdet(jacobian).logabsdet)
    found = float(transform.log_abs_det_jacobian(u, value))
    assert found == pytest.approx(expected, rel=0, abs=1e-8)
    assert found + 1e-3 != pytest.approx(expected, rel=0, abs=1e-8)
    assert torch.allclose(transform.inv(value), u, rtol=0, atol=1e-10)
    assert transform.inverse_shape(value.shape) == u.shape and transform.forward_shape(u.shape) == value.shape


def test_too_few_degrees_of_freedom_are_refused():
    with pytest.raises(ValueError, match="found 1 degrees of freedom, expected more than 1"):
        Wishart(torch.tensor(1.0), torch.eye(2), validate_args=True)


# The program.


def scipy_log_joint(entry, x, values):
    """ln p(π) + ln p(Λ) + ln p(μ given Λ) + ln p(x given π, μ, Λ), z summed out, from SciPy's densities."""
    options, columns = entry.options, x.shape[1]
    k = options.components
    nu, mean = options.degrees_of_freedom or columns, entry.prior_mean.numpy()
    inverse_scale = entry.prior_inverse_scale.numpy()
    weights, precisions, means = (values[name].numpy() for name in ("weights", "precisions", "means"))
    total = stats.dirichlet(np.full(k, options.concentration or 1 / k)).logpdf(weights)
    densities = []
    for weight, precision, centre in zip(weights, precisions, means, strict=True):
        if options.covariance == "full":
            total += stats.wishart(nu, np.linalg.inv(inverse_scale)).logpdf(precision)
        else:
            total += stats.gamma(nu / 2, scale=2 / inverse_scale).logpdf(precision).sum()
        covariance = np.linalg.inv(precision if options.covariance == "full" else np.diag(precision))
        total += stats.multivariate_normal(mean, covariance / options.mean_precision).logpdf(centre)
        densities.append(np.log(weight) + stats.multivariate_normal(centre, covariance).logpdf(x.numpy()))
    return float(total + special.logsumexp(densities, axis=0).sum())


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("columns", [1, 3])
def test_program_with_z_summed_out_has_scipys_densities(covariance, columns):
    """Pyro's enumeration of z, for two draws of the globals, each alone and both side by side (1e-9 relative)."""
    x = clusters(12, columns, 3)
    entry = entry_for(x, components=3, covariance=covariance, mean_precision=0.3, degrees_of_freedom=columns + 1.5)
    with isolated(1), torch.no_grad():
        traces = [poutine.trace(entry).get_trace(Batch.full(x)) for _ in range(2)]
        draws = [{name: t.nodes[name]["value"] for name in ("weights", "precisions", "means")} for t in traces]
        expected = [scipy_log_joint(entry, x, values) for values in draws]
        found = [-_enumerated_loss(entry, x, values, particles=1) for values in draws]
        together = {name: torch.stack([values[name] for values in draws])[:, None] for name in draws[0]}
        mean = -_enumerated_loss(entry, x, together, particles=2)
    assert found == pytest.approx(expected, rel=1e-9)
    assert mean == pytest.approx(np.mean(expected), rel=1e-9)
    assert found != pytest.approx([scipy_log_joint(entry, x + 0.01, values) for values in draws], rel=1e-9)


def _enumerated_loss(entry, x, values, particles):
    conditioned = poutine.condition(entry, data=values)
    loss = TraceEnum_ELBO(max_plate_nesting=1, num_particles=particles, vectorize_particles=particles > 1)
    return loss.loss(conditioned, lambda batch: None, Batch.full(x))


# The evidence by a sum over assignments.


def sequential_log_evidence(entry, x):
    """Sum over every assignment of the product of predictives, one row after the other: Student-t times a urn."""
    options = entry.options
    k, alpha = options.components, options.concentration or 1 / options.components
    terms = []
    for labels in itertools.product(range(k), repeat=len(x)):
        total = 0.0
        for n, label in enumerate(labels):
            members = [i for i in range(n) if labels[i] == label]
            total += math.log((len(members) + alpha) / (n + k * alpha))
            total += predictive_logpdf(entry, x[members].numpy(), x[n].numpy())
        terms.append(total)
    return float(special.logsumexp(terms))


def predictive_logpdf(entry, members, row):
    """Log density of a row after others of its component, from SciPy's Student-t (Murphy 2007, section 8)."""
    options, n = entry.options, len(members)
    prior_mean, scatter = entry.prior_mean.numpy(), entry.prior_inverse_scale.numpy().copy()
    columns = len(row)
    beta, nu = options.mean_precision + n, (options.degrees_of_freedom or columns) + n
    mean = (options.mean_precision * prior_mean + members.sum(0)) / beta
    if n:
        centred, away = members - members.mean(0), members.mean(0) - prior_mean
        outer = centred.T @ centred + options.mean_precision * n / beta * np.outer(away, away)
        scatter = scatter + (outer if options.covariance == "full" else np.diag(outer))
    spread = (beta + 1) / beta * scatter
    if options.covariance == "full":
        df = nu - columns + 1
        return float(stats.multivariate_t(mean, spread / df, df=df).logpdf(row))
    return float(stats.t(nu, mean, np.sqrt(spread / nu)).logpdf(row).sum())


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize(("rows", "columns", "components"), [(5, 1, 2), (4, 2, 3), (2, 3, 4), (6, 2, 1)])
def test_enumeration_equals_the_product_of_predictives(covariance, rows, columns, components):
    """1e-9 nats: another factorisation of the same evidence, over assignments instead of partitions."""
    x = clusters(rows, columns, 5)
    options = {"components": components, "covariance": covariance, "prior_scale": 1.3, "prior_mean": 0.4}
    entry = entry_for(x, degrees_of_freedom=columns + 0.5, mean_precision=0.7, concentration=0.6, **options)
    expected = sequential_log_evidence(entry, x)
    assert float(entry.enumerated_log_evidence(x)) == pytest.approx(expected, rel=0, abs=ROUNDING)
    other = entry_for(x, degrees_of_freedom=columns + 0.5, mean_precision=0.701, concentration=0.6, **options)
    assert float(other.enumerated_log_evidence(x)) != pytest.approx(expected, rel=0, abs=ROUNDING)


def test_enumeration_equals_scipys_quadrature():
    """Two rows, one column, two components, every prior integrated numerically; 1e-7 nats, above quad's own error."""
    x = torch.tensor([[0.3], [1.9]], dtype=torch.float64)
    alpha, beta, nu, mean, scale = 0.8, 0.5, 3.0, 0.2, 1.1
    entry = entry_for(
        x,
        components=2,
        concentration=alpha,
        mean_precision=beta,
        degrees_of_freedom=nu,
        prior_mean=mean,
        prior_scale=scale,
    )

    def evidence(rows):
        def joint(mu, log_precision):
            precision = math.exp(log_precision)
            log_prior = (
                0.5 * nu * (log_precision + math.log(scale**2 / 2)) - precision * scale**2 / 2 - math.lgamma(nu / 2)
            )
            squares = beta * (mu - mean) ** 2 + sum((row - mu) ** 2 for row in rows)
            log_scale = 0.5 * (len(rows) + 1) * (log_precision - math.log(2 * math.pi)) + 0.5 * math.log(beta)
            return math.exp(log_prior + log_scale - 0.5 * precision * squares)

        def over_means(log_precision):
            centre, deviation = (beta * mean + sum(rows)) / (beta + len(rows)), math.exp(-log_precision / 2)
            ends = (centre - 12 * deviation, centre + 12 * deviation)
            return integrate.quad(joint, *ends, args=(log_precision,), epsabs=0)[0]

        return integrate.quad(over_means, -14, 6, epsabs=0)[0]

    # The ends of the beta distribution are singular; its weight there is left to quad.
    unnormalised = integrate.quad(lambda p: p * p, 0, 1, weight="alg", wvar=(alpha - 1, alpha - 1))[0]
    both_in_one = unnormalised / special.beta(alpha, alpha)
    first, second = x[:, 0].tolist()
    together, apart = evidence([first, second]), evidence([first]) * evidence([second])
    expected = math.log(2 * both_in_one * together + (1 - 2 * both_in_one) * apart)
    assert float(entry.enumerated_log_evidence(x)) == pytest.approx(expected, rel=0, abs=1e-7)
    assert float(entry.enumerated_log_evidence(x + 1e-4)) != pytest.approx(expected, rel=0, abs=1e-7)


def test_enumeration_is_offered_where_it_is_short():
    x = clusters(17, 1, 0)
    assert entry_for(x, components=2).enumerated_log_evidence(x) is None
    assert entry_for(x[:16], components=2).enumerated_log_evidence(x[:16]) is not None
    assert entry_for(x[:1], components=2**16, prior_scale=1.0).enumerated_log_evidence(x[:1]) is not None
    assert entry_for(x, components=1).enumerated_log_evidence(x) is not None


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_names_of_components_and_order_of_rows_change_nothing(covariance):
    """Exchangeability, 1e-9 nats."""
    x = clusters(9, 2, 6)
    entry = entry_for(x, components=3, covariance=covariance)
    evidence = float(entry.enumerated_log_evidence(x))
    assert float(entry.enumerated_log_evidence(x.flip(0))) == pytest.approx(evidence, rel=0, abs=ROUNDING)
    assert float(entry.enumerated_log_evidence(x.roll(4, 0))) == pytest.approx(evidence, rel=0, abs=ROUNDING)
    swapped = torch.stack([x[:, 0], x[:, 1].flip(0)], 1)
    assert float(entry.enumerated_log_evidence(swapped)) != pytest.approx(evidence, rel=0, abs=ROUNDING)


def test_a_mixture_of_one_diagonal_component_is_normal_gamma():
    """Gamma(ν₀ / 2, s² / 2) on the precisions: the evidence of another entry (1e-9 nats)."""
    x = clusters(20, 2, 7)
    prior = {"prior_mean": 0.3, "degrees_of_freedom": 3.0, "mean_precision": 0.4, "prior_scale": 1.2}
    mixture = entry_for(x, components=1, covariance="diagonal", **prior)
    single = get_entry("normal-gamma").from_data(x, prior_mean=0.3, prior_count=0.4, shape=1.5, rate=0.72)
    expected = float(single.log_evidence(x))
    assert float(mixture.enumerated_log_evidence(x)) == pytest.approx(expected, rel=0, abs=ROUNDING)
    two = entry_for(x, components=1, covariance="full", **prior)
    assert float(two.enumerated_log_evidence(x)) != pytest.approx(expected, rel=0, abs=ROUNDING)


# The bound of CAVI.


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize(("rows", "columns", "components"), [(13, 1, 2), (9, 2, 3), (7, 2, 4)])
def test_bound_stays_below_the_evidence_and_near_it(covariance, rows, columns, components):
    """After 0, 10 and 100 sweeps on four data sets: below to rounding; at the end by < 0.6 nats per datum + ln K!."""
    gaps = []
    for seed in range(4):
        x = clusters(rows, columns, seed)
        entry = entry_for(x, components=components, covariance=covariance)
        evidence = float(entry.enumerated_log_evidence(x))
        for sweeps in (0, 10, 100):
            bound = float(entry.bound(x, converged_factors(entry, x, sweeps)))
            assert bound <= evidence + ROUNDING
        gaps.append(evidence - bound)
    assert max(gaps) < 0.6 * rows + math.lgamma(components + 1)
    # Negative control: with the normaliser of the normal likelihood forgotten the bound would exceed the evidence.
    assert bound + 0.5 * rows * columns * math.log(2 * math.pi) > evidence + ROUNDING


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_bound_of_one_component_touches_the_evidence(covariance):
    """With nothing assigned q is the posterior, so that every term of the bound is put to the test (1e-9 nats)."""
    x = clusters(30, 3, 2)
    entry = entry_for(x, components=1, covariance=covariance, mean_precision=0.3, degrees_of_freedom=4.5)
    evidence = float(entry.enumerated_log_evidence(x))
    factors = converged_factors(entry, x, 1)
    assert float(entry.bound(x, factors)) == pytest.approx(evidence, rel=0, abs=ROUNDING)
    for field in factors._fields[1:]:
        moved = factors._replace(**{field: 1.01 * getattr(factors, field)})
        assert float(entry.bound(x, moved)) < evidence - ROUNDING


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_updates_are_stationary_points_of_the_bound(covariance):
    """At convergence the bound is flat in every factor (1e-5 nats per unit change relative to the factor's size)."""
    x = clusters(40, 2, 4)
    entry = entry_for(x, components=2, covariance=covariance)
    factors = converged_factors(entry, x, 500)

    def slopes(at):
        leaves = type(at)(*(field.clone().requires_grad_() for field in at))
        gradients = torch.autograd.grad(entry.bound(x, leaves), leaves)
        return max(float((g * value).abs().max()) for g, value in zip(gradients, at, strict=True))

    assert slopes(factors) < 1e-5
    assert slopes(converged_factors(entry, x, 2)) > 1e-5


# scikit-learn's BayesianGaussianMixture.
#
# Documented differences: ``lower_bound_`` leaves out the terms that no update changes; ``reg_covar`` is added to the
# data's scatter, and is set to zero here; ``covariance_type="diag"`` takes E[ln |Λ|] of a full Wishart for columns
# whose precisions are independent gammas, which is right for one column only.


class Peer(SklearnMixture):
    """scikit-learn's mixture with our start and, for diagonal covariances, E[ln |Λ|] of independent columns."""

    @classmethod
    def at(cls, labels, covariance, sweeps):
        peer = cls(
            n_components=int(labels.max()) + 1,
            covariance_type={"full": "full", "diagonal": "diag"}[covariance],
            weight_concentration_prior_type="dirichlet_distribution",
            reg_covar=0.0,
            tol=0.0,
            max_iter=sweeps,
        )
        peer.labels = labels
        return peer

    def _initialize_parameters(self, X, *args, **kwargs):
        self._initialize(X, np.eye(self.n_components)[self.labels])

    def _estimate_log_prob(self, X, *args, **kwargs):
        columns, nu = X.shape[1], self.degrees_of_freedom_
        right = columns * special.digamma(nu / 2)
        full = special.digamma((nu - np.arange(columns)[:, None]) / 2).sum(0)
        correction = 0.5 * (right - full) if self.covariance_type == "diag" else 0.0
        return super()._estimate_log_prob(X, *args, **kwargs) + correction


@pytest.mark.filterwarnings("ignore:.*did not converge:sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("sweeps", [1, 5, 300])
def test_sweeps_are_scikit_learns(covariance, sweeps):
    """From the same start, after 1, 5 and 300 sweeps: every parameter to 1e-8 relative, probabilities to 1e-8."""
    x = ez.load_data("iris").x
    labels = KMeans(4, n_init=1, random_state=0).fit(x.numpy()).labels_
    entry = entry_for(x, components=4, covariance=covariance)
    factors = entry.factors(x, torch.eye(4, dtype=x.dtype)[torch.tensor(labels).long()])
    peer = Peer.at(labels, covariance, sweeps).fit(x.numpy())
    for _ in range(sweeps):
        factors = entry.update_factors(x, factors)
    nu = factors.degrees_of_freedom
    covariances = factors.inverse_scale / nu.reshape(-1, *[1] * (factors.inverse_scale.ndim - 1))
    pairs = {
        "weights": (peer.weights_, factors.concentration / factors.concentration.sum()),
        "mean precision": (peer.mean_precision_, factors.mean_precision),
        "means": (peer.means_, factors.mean),
        "degrees of freedom": (peer.degrees_of_freedom_, nu),
        "covariances": (peer.covariances_, covariances),
        "responsibilities": (peer.predict_proba(x.numpy()), entry.log_responsibilities(x, factors).exp()),
    }
    for name, (theirs, ours) in pairs.items():
        assert np.abs(theirs - ours.numpy()).max() <= 1e-8 * np.abs(theirs).max(), name
    earlier = entry.factors(x, torch.eye(4, dtype=x.dtype)[torch.tensor(labels).long()])
    assert np.abs(peer.means_ - earlier.mean.numpy()).max() > 1e-8 * np.abs(peer.means_).max()


@pytest.mark.filterwarnings("ignore:.*did not converge:sklearn.exceptions.ConvergenceWarning")
def test_bound_is_scikit_learns_with_the_constants_that_it_leaves_out():
    """At convergence, 1e-6 nats in total; full covariances, where their bound is that of the model."""
    x = ez.load_data("iris").x
    labels = KMeans(3, n_init=1, random_state=0).fit(x.numpy()).labels_
    peer = Peer.at(labels, "full", 500).fit(x.numpy())
    entry = entry_for(x, components=3)
    factors = entry.factors(x, torch.eye(3, dtype=x.dtype)[torch.tensor(labels).long()])
    for _ in range(500):
        factors = entry.update_factors(x, factors)
    bound = float(entry.bound(x, factors))
    # ln C(α₀) + K ln B(W₀, ν₀) without its power of π, which cancels against theirs, + K D / 2 ln β₀ - N D / 2 ln 2π.
    n, d, k, nu = len(x), 4, 3, 4.0
    log_c = special.gammaln(1.0) - k * special.gammaln(1 / k)
    log_det = np.linalg.slogdet(np.cov(x.numpy().T))[1]
    log_b = nu / 2 * log_det - nu * d / 2 * math.log(2) - special.gammaln((nu - np.arange(d)) / 2).sum()
    constants = log_c + k * log_b + k * d / 2 * math.log(1.0) - n * d / 2 * math.log(2 * math.pi)
    assert bound == pytest.approx(peer.lower_bound_ + constants, rel=0, abs=1e-6)
    assert bound != pytest.approx(peer.lower_bound_ + constants - k * log_b, rel=0, abs=1e-6)


def test_iris_optimum_is_at_least_as_good_as_scikit_learns():
    """Best of 5 starts of each, by our bound at their parameters' responsibilities, 1e-6 nats per datum."""
    x = ez.load_data("iris").x
    fit = ez.fit(NAME, x, method="cavi", components=3, restarts=5, tolerance=1e-9)
    peer = SklearnMixture(
        n_components=3,
        weight_concentration_prior_type="dirichlet_distribution",
        reg_covar=0.0,
        n_init=5,
        tol=1e-10,
        max_iter=1000,
        random_state=0,
    ).fit(x.numpy())
    entry = fit.entry
    theirs = entry.factors(x, torch.tensor(peer.predict_proba(x.numpy())))
    found = float(entry.bound(x, fit.guide.factors))
    assert found >= float(entry.bound(x, theirs)) - 1e-6 * len(x)
    one = ez.fit(NAME, x, method="cavi", components=1)
    assert float(one.entry.bound(x, one.guide.factors)) < found - 1e-6 * len(x)


# What comes in and what comes out.


def test_superfluous_components_are_emptied():
    """Two far clusters, six components, a small α₀: two weights hold all rows."""
    x = torch.cat([clusters(60, 2, 1) * 0.3, clusters(60, 2, 2) * 0.3 + 20])
    fit = ez.fit(NAME, x, method="cavi", components=6, concentration=1e-3, restarts=2)
    counts = fit.guide.means(Batch.full(x)).sum(0).sort(descending=True).values
    assert float(counts[:2].sum()) == pytest.approx(120, rel=0, abs=0.5)
    many = ez.fit(NAME, x, method="cavi", components=6, concentration=50.0, restarts=1)
    spread = many.guide.means(Batch.full(x)).sum(0).sort(descending=True).values
    assert float(spread[:2].sum()) < 119.5


def test_prior_comes_from_the_data_unless_it_is_stated():
    x = clusters(30, 2, 8)
    entry = entry_for(x)
    assert np.allclose(entry.prior_mean.numpy(), x.mean(0), rtol=0, atol=1e-12)
    assert np.allclose(entry.prior_inverse_scale.numpy(), np.cov(x.numpy().T), rtol=1e-12, atol=0)
    stated = entry_for(x, prior_mean=2.0, prior_scale=3.0)
    assert stated.prior_mean.tolist() == [2.0, 2.0]
    assert stated.prior_inverse_scale.tolist() == [[9.0, 0.0], [0.0, 9.0]]
    assert entry_for(x, prior_mean=0.0).prior_mean.tolist() == [0.0, 0.0]
    diagonal = entry_for(x, covariance="diagonal").prior_inverse_scale
    assert np.allclose(diagonal.numpy(), x.numpy().var(0, ddof=1), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda x: torch.cat([x, torch.ones_like(x[:, :1])], 1), {}, r"columns \[3\] .* are constant"),
        (lambda x: torch.cat([x, x[:, :1]], 1), {}, "3 columns of 30 rows have centred rank 2, expected full rank"),
        (lambda x: x[:2], {}, "2 columns of 2 rows have centred rank 1"),
        (lambda x: x[:1], {}, "found 1 row, expected at least 2"),
        (lambda x: x, {"degrees_of_freedom": 1.0}, "degrees_of_freedom: found 1 for 2 columns, expected more than 1"),
        (lambda x: x, {"concentration": 0.0}, "option concentration: found 0.0"),
        (lambda x: x, {"components": 0}, "option components: found 0"),
    ],
)
def test_what_makes_no_prior_is_refused_in_one_line(change, options, message):
    x = change(clusters(30, 2, 9))
    with pytest.raises(InvalidInput, match=message) as caught:
        entry_for(x, **options)
    assert "\n" not in str(caught.value)
    # A stated prior takes the same data.
    if not options:
        entry_for(x, prior_scale=1.0)


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize(
    "x",
    [
        torch.tensor([[0.1, 0.2], [3.0, 3.1]], dtype=torch.float64),
        torch.tensor([[1.0, 2.0]], dtype=torch.float64),
        torch.ones(12, 2, dtype=torch.float64),
        torch.cat([clusters(20, 1, 0), torch.full((20, 1), 5.0, dtype=torch.float64)], 1),
        torch.cat([torch.zeros(10, 2), torch.ones(10, 2), torch.full((1, 2), 1e4)]).double(),
        1e-3 * clusters(20, 2, 1) + 1e6,
    ],
    ids=["fewer-rows-than-components", "one-row", "one-point", "constant-column", "far-outlier", "offset"],
)
def test_degenerate_data_have_finite_answers_under_a_stated_prior(covariance, x):
    """Right where it can be told: never above the evidence by enumeration, and finite everywhere."""
    scale = float(x.std()) or 1.0 if len(x) > 1 else 1.0
    entry = entry_for(x, components=4, covariance=covariance, prior_scale=scale)
    evidence = entry.enumerated_log_evidence(x)
    for restart in (0, 1):
        factors = converged_factors(entry, x, 50, restart)
        bound = entry.bound(x, factors)
        assert all(torch.isfinite(field).all() for field in (*factors, bound))
        assert torch.isfinite(entry.log_responsibilities(x, factors)).any(-1).all()
        assert evidence is None or float(bound) <= float(evidence) + ROUNDING * max(1.0, abs(float(evidence)))


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_offset_and_scale_of_the_data_move_the_bound_by_their_jacobian(covariance):
    """Under the prior from the data: -N D ln s nats exactly, to 1e-6 at an offset of 1e6 (raw moments would cancel)."""
    x = ez.load_data("iris").x
    plain, moved = entry_for(x, covariance=covariance), entry_for(1e-3 * x + 1e6, covariance=covariance)
    first = float(plain.bound(x, converged_factors(plain, x, 100)))
    second = float(moved.bound(1e-3 * x + 1e6, converged_factors(moved, 1e-3 * x + 1e6, 100)))
    jacobian = x.numel() * math.log(1e3)
    # At 1e6 a float64 carries 1e-10, which is 1e-7 of the columns' spread and 1e-6 of a nat per number.
    assert second == pytest.approx(first + jacobian, rel=0, abs=1e-6 * x.numel())
    assert second != pytest.approx(first, rel=0, abs=1e-6 * x.numel())


def test_gradient_fits_start_with_components_apart():
    """Copies of one component have equal gradients for ever; what optimisers start from tells them apart."""
    x = ez.load_data("iris").x
    entry = entry_for(x)
    with isolated(0):
        start = entry.starting_latents(x)
    assert start["precisions"].shape == (3, 4, 4) and start["means"].shape == (3, 4)
    assert float(torch.pdist(start["means"]).min()) > 0.5
    conditioned = poutine.condition(entry, data=start)
    with torch.no_grad(), pyro.validation_enabled(True):
        poutine.trace(conditioned).get_trace(Batch.full(x))

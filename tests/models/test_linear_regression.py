"""Linear regression against dense densities, exact fractions, SciPy's quadrature, scikit-learn and its closed gaps."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from scipy.special import digamma, gammaln, logsumexp
from sklearn.linear_model import BayesianRidge
from torch import Tensor

import elbozoo as ez
from elbozoo.inference.unconstrained import UnconstrainedProgram
from elbozoo.models import get_entry
from elbozoo.models.contract.entry import Program
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.joint import Joint
from elbozoo.models.linear_regression import LinearRegression

PRIOR = {"prior_scale": 1.5, "intercept_scale": 4.0, "shape": 2.0, "rate": 3.0, "noise_scale": 0.7}
FORMS = ["unknown", "known"]


def table(rows: int, columns: int, correlation: float = 0.0, seed: int = 0) -> Tensor:
    """Covariates with the given correlation, and a target in the last column."""
    rng = np.random.default_rng(seed)
    own, common = rng.standard_normal((rows, columns - 1)), rng.standard_normal((rows, 1))
    design = math.sqrt(correlation) * common + math.sqrt(1 - correlation) * own
    target = 0.5 + design @ np.linspace(-1, 1, columns - 1) + rng.standard_normal(rows)
    return torch.from_numpy(np.c_[design, target])


def build(x: Tensor, **options: Any) -> LinearRegression:
    entry = get_entry("linear-regression").from_data(x, **options)
    assert isinstance(entry, LinearRegression)
    return entry


def covariance(x: Tensor, intercept: bool = True) -> np.ndarray:
    """Φ S² Φᵀ of the prior above, from NumPy alone."""
    design = x[:, :-1].numpy()
    scale = np.full(design.shape[1], PRIOR["prior_scale"])
    if intercept:
        design = np.c_[np.ones(len(x)), design]
        scale = np.r_[PRIOR["intercept_scale"], scale]
    scaled = design * scale
    return scaled @ scaled.T


def dense_log_evidence(x: Tensor, noise: str, intercept: bool = True) -> float:
    """Log density of the targets under SciPy's multivariate normal or Student-t."""
    y, n, spread = x[:, -1].numpy(), len(x), covariance(x, intercept)
    if noise == "known":
        return float(stats.multivariate_normal(np.zeros(n), spread + PRIOR["noise_scale"] ** 2 * np.eye(n)).logpdf(y))
    shape = PRIOR["rate"] / PRIOR["shape"] * (spread + np.eye(n))
    return float(stats.multivariate_t(np.zeros(n), shape, df=2 * PRIOR["shape"]).logpdf(y))


@pytest.mark.parametrize("noise", FORMS)
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 25])
def test_evidence_is_the_dense_density_of_the_targets(noise: str, intercept: bool, rows: int) -> None:
    """Multivariate normal or Student-t with a dense N x N matrix: 1e-9 nats in total, as its condition is below 1e4."""
    x = table(rows, 4)
    entry = build(x, noise=noise, intercept=intercept, **PRIOR)
    truth = dense_log_evidence(x, noise, intercept)
    assert float(entry.log_evidence(x)) == pytest.approx(truth, abs=1e-9)
    moved = x.clone()
    moved[0, -1] += 1e-3
    assert float(entry.log_evidence(moved)) != pytest.approx(truth, abs=1e-9)


def test_evidence_of_the_conjugate_form_is_the_integral_over_both_latents() -> None:
    """The trapezoid rule over one coefficient and log τ of SciPy's densities: 1e-9 nats.

    It converges exponentially on the line, and what lies beyond the lattice is below e^-40 of the mass.
    """
    x = table(6, 2)
    design, y = x[:, 0].numpy(), x[:, 1].numpy()
    entry = build(x, intercept=False, **PRIOR)
    step = 0.04
    warped = np.arange(-7, 7, step)[:, None]
    log_precision = np.arange(-15, 6, step)
    coefficient, noise = np.sinh(warped), np.exp(-0.5 * log_precision)
    log_joint = (
        stats.norm(coefficient[..., None] * design, noise[:, None]).logpdf(y).sum(-1)
        + stats.norm(0, PRIOR["prior_scale"] * noise).logpdf(coefficient)
        + stats.gamma(PRIOR["shape"], scale=1 / PRIOR["rate"]).logpdf(np.exp(log_precision))
        + log_precision
        + np.log(np.cosh(warped))
    )
    truth = logsumexp(log_joint) + 2 * math.log(step)
    assert float(entry.log_evidence(x)) == pytest.approx(truth, abs=1e-9)
    other = build(x, intercept=False, **{**PRIOR, "rate": 3.001})
    assert float(other.log_evidence(x)) != pytest.approx(truth, abs=1e-9)


def exact_quadratic_and_determinant(design: np.ndarray, y: np.ndarray) -> tuple[Fraction, Fraction]:
    """Return yᵀ (I + ΦΦᵀ)⁻¹ y and det(I + ΦΦᵀ) without rounding, by elimination in fractions."""
    rows = [[Fraction(value) for value in row] for row in design]
    n = len(rows)
    matrix = [[sum((a * b for a, b in zip(rows[i], rows[j], strict=True)), Fraction(i == j)) for j in range(n)]
              for i in range(n)]  # fmt: skip
    right = [Fraction(value) for value in y]
    quadratic, determinant = Fraction(0), Fraction(1)
    for k in range(n):
        pivot = matrix[k][k]
        determinant *= pivot
        quadratic += right[k] ** 2 / pivot
        for i in range(k + 1, n):
            factor = matrix[i][k] / pivot
            right[i] -= factor * right[k]
            matrix[i] = [a - factor * b for a, b in zip(matrix[i], matrix[k], strict=True)]
    return quadratic, determinant


def test_columns_with_far_offsets_keep_their_digits() -> None:
    """Two columns at 1e6 that differ by 1e-3, against exact fractions: 1e-6 nats, where ΨᵀΨ has no digit left.

    Their condition is 1e9, of which the QR factors lose half of the 16 digits; the square of it has none to lose.
    """
    rng = np.random.default_rng(0)
    base = 1e6 + rng.standard_normal(8)
    design = np.c_[base, base + 1e-3 * rng.standard_normal(8)]
    y = rng.standard_normal(8)
    x = torch.from_numpy(np.c_[design, y])
    entry = build(x, noise="known", noise_scale=1.0, prior_scale=1.0, intercept=False)
    quadratic, determinant = exact_quadratic_and_determinant(design, y)
    log_determinant = math.log(determinant.numerator) - math.log(determinant.denominator)
    truth = -0.5 * (len(y) * math.log(2 * math.pi) + log_determinant + float(quadratic))
    assert float(entry.log_evidence(x)) == pytest.approx(truth, abs=1e-6)
    # Negative control: the textbook's formula through ΨᵀΨ, in the same float64.
    precision = np.eye(2) + design.T @ design
    mean = np.linalg.solve(precision, design.T @ y)
    textbook = y @ y - mean @ precision @ mean + np.linalg.slogdet(precision)[1] + len(y) * math.log(2 * math.pi)
    assert -0.5 * textbook != pytest.approx(truth, abs=1e-6)


@pytest.mark.parametrize("noise", FORMS)
def test_posterior_moments_are_those_of_a_ridge_regression(noise: str) -> None:
    """Mean by NumPy's least squares with the prior as further rows, covariance by inversion: 1e-9, well conditioned."""
    x = table(30, 4, correlation=0.5)
    entry = build(x, noise=noise, **PRIOR)
    unit = PRIOR["noise_scale"] if noise == "known" else 1.0
    design = np.c_[np.ones(30), x[:, :-1].numpy()] / unit
    prior_rows = np.diag(1 / np.r_[PRIOR["intercept_scale"], [PRIOR["prior_scale"]] * 3])
    stacked, target = np.r_[design, prior_rows], np.r_[x[:, -1].numpy() / unit, np.zeros(4)]
    mean = np.linalg.lstsq(stacked, target)[0]
    inverse = np.linalg.inv(stacked.T @ stacked)
    posterior = entry.posterior(x)
    if isinstance(posterior, Joint):
        precision = torch.tensor([0.3, 2.0], dtype=torch.float64)
        (_, _), (_, conditional) = posterior.items()
        normal = conditional({"precision": precision})  # type: ignore[operator]
        inverse = inverse / precision.numpy()[:, None, None]
    else:
        normal = posterior
    np.testing.assert_allclose(normal.mean, np.broadcast_to(mean, normal.mean.shape), rtol=0, atol=1e-9)
    np.testing.assert_allclose(normal.covariance_matrix, inverse, rtol=0, atol=1e-9)
    assert np.abs(normal.covariance_matrix.numpy() - 1.001 * inverse).max() > 1e-9


@pytest.mark.parametrize("noise", FORMS)
def test_prediction_is_a_ratio_of_evidences(noise: str) -> None:
    """p(y* given y) = p(y, y*) / p(y) at each new row by itself: 1e-9 nats."""
    x, new = table(20, 4), table(5, 4, seed=1)
    entry = build(x, noise=noise, **PRIOR)
    prediction = entry.predict(x, new).log_prob(new[:, -1])
    ratios = [float(entry.log_evidence(torch.cat([x, row[None]])) - entry.log_evidence(x)) for row in new]
    assert prediction.tolist() == pytest.approx(ratios, abs=1e-9)
    assert entry.predict(x[:-1], new).log_prob(new[:, -1]).tolist() != pytest.approx(ratios, abs=1e-9)
    unread = new.clone()
    unread[:, -1] = 1e9
    assert torch.equal(entry.predict(x, unread).mean, entry.predict(x, new).mean)


def test_evidence_is_that_of_scikit_learns_bayesian_ridge() -> None:
    """With flat hyperpriors its last score is log p(y) at the precisions it found: 1e-8 nats in total.

    Its last score mixes the last coefficients with those before, so it is run until they agree.
    """
    data = ez.load_data("wine-standardised").x
    design, y = data[:, 1:].numpy(), data[:, 0].numpy()
    flat = {"alpha_1": 0, "alpha_2": 0, "lambda_1": 0, "lambda_2": 0}
    peer = BayesianRidge(compute_score=True, fit_intercept=False, tol=1e-13, max_iter=10_000, **flat).fit(design, y)
    scales = {"noise_scale": peer.alpha_**-0.5, "prior_scale": peer.lambda_**-0.5}
    entry = build(data, target=0, noise="known", intercept=False, **scales)
    assert float(entry.log_evidence(data)) == pytest.approx(peer.scores_[-1], abs=1e-8)
    posterior = entry.posterior(data)
    np.testing.assert_allclose(posterior.mean, peer.coef_, rtol=0, atol=1e-10)  # type: ignore[union-attr]
    off = build(data, target=0, noise="known", intercept=False, **{**scales, "noise_scale": 1.01 * peer.alpha_**-0.5})
    assert float(off.log_evidence(data)) != pytest.approx(peer.scores_[-1], abs=1e-8)


def known_noise_gap(entry: LinearRegression, x: Tensor) -> float:
    """Gap of the best diagonal normal, ½(Σ log Λ_ii - log det Λ), from the precision of the page."""
    design = np.c_[np.ones(len(x)), x[:, :-1].numpy()]
    precision = design.T @ design / PRIOR["noise_scale"] ** 2
    precision += np.diag(np.r_[PRIOR["intercept_scale"], [PRIOR["prior_scale"]] * (x.shape[1] - 1)] ** -2.0)
    return 0.5 * float(np.log(np.diag(precision)).sum() - np.linalg.slogdet(precision)[1])


def test_the_best_diagonal_normal_has_the_gap_of_the_page() -> None:
    """KL to the posterior of N(m, 1/Λ_ii), by PyTorch's closed form between normals: 1e-9 nats; and none is closer."""
    x = table(40, 4, correlation=0.9)
    entry = build(x, noise="known", **PRIOR)
    posterior = entry.posterior(x)
    assert isinstance(posterior, torch.distributions.MultivariateNormal)

    def divergence(stretch: Tensor) -> float:
        scale = posterior.precision_matrix.diagonal().rsqrt() * stretch
        q = torch.distributions.MultivariateNormal(posterior.mean, scale_tril=torch.diag(scale))
        return float(torch.distributions.kl_divergence(q, posterior))

    ones = torch.ones(4, dtype=torch.float64)
    assert divergence(ones) == pytest.approx(known_noise_gap(entry, x), abs=1e-9)
    for direction in torch.eye(4, dtype=torch.float64):
        for step in (0.01, -0.01):
            assert divergence(ones + step * direction) > divergence(ones) + 1e-5


@pytest.mark.slow
def test_the_ledger_of_a_mean_field_fit_shows_the_gap_of_a_correlated_design() -> None:
    """Fits end within 0.1 nats, and six standard errors of the ledger's draws, of a gap that grows with correlation."""
    gaps, expected, tolerances = [], [], []
    for correlation in (0.0, 0.9, 0.99):
        x = table(50, 4, correlation)
        fit = ez.fit("linear-regression", x, guide="mean-field", noise="known", **PRIOR)
        ledger = fit.full_ledger()
        assert isinstance(fit.entry, LinearRegression)
        gaps.append(ledger.gap)
        expected.append(known_noise_gap(fit.entry, x))
        tolerances.append(0.1 + 6 * ledger.elbo_se)
        assert abs(ledger.gap - ledger.kl) <= 6 * math.hypot(ledger.elbo_se, ledger.kl_se)
    for gap, truth, tolerance in zip(gaps, expected, tolerances, strict=True):
        assert abs(gap - truth) <= tolerance
    # The gap grows, and is none of its neighbours': each fit fails the test of the next correlation.
    assert gaps == sorted(gaps)
    for gap, (truth, tolerance) in zip(gaps, [*zip(expected, tolerances, strict=True)][1:], strict=False):
        assert abs(gap - truth) > tolerance


def cavi_gap(entry: LinearRegression, rows: int, coefficients: int) -> float:
    """KL of the optimum of q(β) q(τ), in closed form: a function of a_N and P alone."""
    before = entry.options.shape + rows / 2
    after = before + coefficients / 2
    return gammaln(before) - gammaln(after) + after * math.log(after) - before * math.log(before) - coefficients / 2


@pytest.mark.parametrize("correlation", [0.0, 0.99])
@pytest.mark.parametrize("restart", [0, 1])
def test_cavi_ends_at_its_closed_form(correlation: float, restart: int) -> None:
    """log p(y) minus the bound is the page's formula for any design: 1e-9 nats after ten sweeps; E[τ] is exact."""
    x = table(30, 4, correlation)
    entry = build(x, **PRIOR)
    factors = entry.initial_factors(x, restart)
    bounds = [float(entry.bound(x, factors))]
    for _ in range(10):
        factors = entry.update_factors(x, factors)
        bounds.append(float(entry.bound(x, factors)))
    assert all(after >= before - 1e-10 for before, after in itertools.pairwise(bounds))
    gap = float(entry.log_evidence(x)) - bounds[-1]
    assert gap == pytest.approx(cavi_gap(entry, 30, 4), abs=1e-9)
    assert float(entry.log_evidence(x)) - bounds[0] != pytest.approx(cavi_gap(entry, 30, 4), abs=1e-9)
    precision = entry.factor_distributions(x, factors)["precision"]
    exact = entry.posterior(x).conditionals["precision"]  # type: ignore[union-attr]
    assert float(precision.mean) == pytest.approx(float(exact.mean), rel=1e-9)
    assert float(precision.variance) < float(exact.variance)


@pytest.mark.parametrize("noise", FORMS)
def test_the_bound_of_cavi_is_the_expectation_of_its_draws(noise: str) -> None:
    """E_q[log p - log q] over 20,000 draws of factors far from their optimum: within five standard errors.

    A false alarm has probability 6e-7. The program's own density is on the other side.
    """
    x = table(12, 3)
    entry = build(x, noise=noise, **PRIOR)
    factors = entry.initial_factors(x, 0)._replace(mean=torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64))
    draws = {name: q.sample((20_000,)) for name, q in entry.factor_distributions(x, factors).items()}
    log_q = sum(q.log_prob(draws[name]) for name, q in entry.factor_distributions(x, factors).items())
    program = UnconstrainedProgram.of(Program(entry, 3), x)
    assert program is not None
    free = [t.inv(draws[s.name]).reshape(20_000, -1) for s, t in zip(program.sites, program.transforms, strict=True)]
    # log p over τ and β is the density over log τ and β without the Jacobian of the exponential.
    log_jacobian = draws["precision"].log() if noise == "unknown" else 0.0
    difference = program.log_joint(torch.cat(free, -1)) - log_jacobian - log_q
    error = 5 * float(difference.std()) / math.sqrt(len(difference))
    assert abs(float(difference.mean() - entry.bound(x, factors))) <= error
    moved = factors._replace(scale_tril=1.2 * factors.scale_tril)
    assert abs(float(difference.mean() - entry.bound(x, moved))) > error


def test_with_known_noise_cavi_is_the_posterior_after_one_sweep() -> None:
    """One factor has nothing to be independent of: bound = evidence to 1e-9 nats, and not before the sweep."""
    x = table(20, 3)
    entry = build(x, noise="known", **PRIOR)
    start = entry.initial_factors(x, 0)
    truth = float(entry.log_evidence(x))
    assert float(entry.bound(x, entry.update_factors(x, start))) == pytest.approx(truth, abs=1e-9)
    assert float(entry.bound(x, start)) != pytest.approx(truth, abs=1e-9)


@pytest.mark.parametrize("method", ["closed-form", "cavi"])
@pytest.mark.parametrize("noise", FORMS)
def test_methods_without_gradients_end_where_they_should(method: str, noise: str) -> None:
    """The ledger's gap is zero, or CAVI's own: within six standard errors of its draws and 1e-6 nats per datum."""
    x = table(30, 4)
    ledger = ez.fit("linear-regression", x, method=method, noise=noise, **PRIOR).full_ledger()
    entry = build(x, noise=noise, **PRIOR)
    expected = cavi_gap(entry, 30, 4) if (method, noise) == ("cavi", "unknown") else 0.0
    assert abs(ledger.gap - expected) <= 6 * ledger.elbo_se + 1e-6 * len(x)
    assert cavi_gap(entry, 30, 4) > 0.01


@pytest.mark.parametrize("noise", FORMS)
def test_two_equal_columns_are_one_with_a_wider_prior(noise: str) -> None:
    """A collinear design: evidence of the sum's prior s√2, 1e-9 nats; the difference keeps its prior's width."""
    x = table(20, 3)
    twice = torch.cat([x[:, :1], x], 1)
    options = {"noise": noise, "intercept": False, "noise_scale": 0.7}
    once = build(x[:, [0, 2]], prior_scale=2.0 * math.sqrt(2), **options)
    both = build(twice[:, [0, 1, 3]], prior_scale=2.0, **options)
    truth = float(once.log_evidence(x[:, [0, 2]]))
    assert float(both.log_evidence(twice[:, [0, 1, 3]])) == pytest.approx(truth, abs=1e-9)
    narrow = build(twice[:, [0, 1, 3]], prior_scale=1.99, **options)
    assert float(narrow.log_evidence(twice[:, [0, 1, 3]])) != pytest.approx(truth, abs=1e-9)
    if noise == "known":
        posterior = both.posterior(twice[:, [0, 1, 3]])
        contrast = torch.tensor([1.0, -1.0], dtype=torch.float64)
        variance = contrast @ posterior.covariance_matrix @ contrast  # type: ignore[union-attr]
        assert float(variance) == pytest.approx(2 * 2.0**2, rel=1e-9)


def test_a_constant_column_shares_the_intercept() -> None:
    """A column of ones beside the intercept has the evidence of one intercept with both variances: 1e-9 nats."""
    x = table(20, 2)
    with_ones = torch.cat([torch.ones(20, 1, dtype=torch.float64), x], 1)
    both = build(with_ones, prior_scale=3.0, intercept_scale=4.0)
    alone = build(with_ones[:, [0, 2]], prior_scale=3.0, intercept_scale=4.0)
    joined = build(with_ones[:, [2]], intercept_scale=5.0)
    assert float(alone.log_evidence(with_ones[:, [0, 2]])) == pytest.approx(
        float(joined.log_evidence(with_ones[:, [2]])), abs=1e-9
    )
    assert float(both.log_evidence(with_ones)) != pytest.approx(float(joined.log_evidence(with_ones[:, [2]])), abs=1e-3)
    assert torch.isfinite(both.log_evidence(with_ones))


def test_targets_are_named_and_coefficients_after_their_columns() -> None:
    frame = pd.DataFrame(table(10, 3).numpy(), columns=["dose", "age", "weight"])
    fit = ez.fit("linear-regression", frame, method="closed-form", target="age")
    assert fit.entry.coords() == {"coefficient": ["intercept", "dose", "weight"]}
    assert torch.equal(fit.entry.response(fit.x), fit.x[:, 1])  # type: ignore[operator, index]
    design = fit.entry.constant_data(fit.x)["design"]  # type: ignore[arg-type]
    assert torch.equal(design[:, 1:], fit.x[:, [0, 2]])  # type: ignore[index]
    assert (design[:, 0] == 1).all()
    with pytest.raises(InvalidInput, match="'wieght'; did you mean 'weight'"):
        ez.fit("linear-regression", frame, method="closed-form", target="wieght")
    with pytest.raises(InvalidInput, match="found position 3"):
        build(table(10, 3), target=3)


def test_simulation_draws_targets_from_the_prior() -> None:
    """20,000 rows from drawn latents: residuals have the precision drawn, within five standard errors (6e-7)."""
    entry = get_entry("linear-regression").example(3, seed=3)
    x, z = entry.simulate(20_000, seed=1)
    residual = x[:, 2] - entry.design(x) @ z["coefficients"]  # type: ignore[call-overload, operator]
    scaled = float(residual.square().mean() * z["precision"])  # type: ignore[call-overload]
    assert abs(scaled - 1) <= 5 * math.sqrt(2 / 20_000)
    assert abs(1.1 * scaled - 1) > 5 * math.sqrt(2 / 20_000)
    assert abs(float(x[:, 0].mean())) <= 5 / math.sqrt(20_000)


def test_nothing_to_regress_on_is_refused_and_an_intercept_is_enough() -> None:
    y = table(10, 2)[:, -1:]
    with pytest.raises(InvalidInput, match="found no column beside the target"):
        build(y, intercept=False)
    entry = build(y, noise="known", **PRIOR)
    mean = get_entry("normal-mean").from_data(y, scale=0.7, prior_scale=4.0)
    # An intercept alone is the normal mean: 1e-10 nats.
    truth = float(mean.log_evidence(y))  # type: ignore[operator]
    assert float(entry.log_evidence(y)) == pytest.approx(truth, abs=1e-10)
    assert float(entry.log_evidence(1.01 * y)) != pytest.approx(truth, abs=1e-10)


def test_the_gap_formulas_agree_with_the_digamma_function() -> None:
    """CAVI's gap as KL(q(τ) ‖ p(τ)) + E KL(q(β) ‖ p(β given τ)), term by term: 1e-12 nats."""
    before, p = 7.5, 3
    after = before + p / 2
    of_precision = (after - before) * digamma(after) - gammaln(after) + gammaln(before)
    of_precision += before * math.log(after / before) - p / 2
    of_coefficients = p / 2 * (math.log(after) - digamma(after))
    entry = build(table(11, 3), shape=2.0)
    assert of_precision + of_coefficients == pytest.approx(cavi_gap(entry, 11, p), abs=1e-12)
    assert of_precision != pytest.approx(cavi_gap(entry, 11, p), abs=1e-12)

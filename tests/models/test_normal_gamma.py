"""Normal-gamma against quadrature, SciPy's multivariate t, Newcomb's speed of light, and the closed mean-field gaps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats
from torch import Tensor

import elbozoo as ez
from elbozoo.models import get_entry
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.normal_gamma import MeanFieldFactors, NormalGamma

M0, K0, A0, B0 = -0.5, 0.6, 1.8, 0.9
OPTIONS = {"prior_mean": M0, "prior_count": K0, "shape": A0, "rate": B0}

# Newcomb's 66 passage times of light, as deviations from 24,800 ns (Gelman et al. 2013, section 3.2).
NEWCOMB = [
    *(28, 26, 33, 24, 34, -44, 27, 16, 40, -2, 29, 22, 24, 21, 25, 30, 23, 29, 31, 19, 24, 20),
    *(36, 32, 36, 28, 25, 21, 28, 29, 37, 25, 28, 26, 30, 32, 36, 26, 30, 22, 36, 23, 27, 27),
    *(28, 27, 31, 27, 26, 33, 26, 32, 32, 24, 39, 28, 24, 25, 32, 25, 29, 27, 28, 29, 16, 23),
]


def entry_for(x: Tensor) -> NormalGamma:
    return NormalGamma.from_data(x, **OPTIONS)


def rows(n: int = 6, columns: int = 2) -> Tensor:
    return NormalGamma.example(columns, seed=1, **OPTIONS).simulate(n, seed=2)[0]


# SciPy's distributions check their arguments at every point, which quadrature over a plane cannot afford.
def log_normal(value: float, mean: float, precision: float) -> float:
    return 0.5 * (math.log(precision / (2 * math.pi)) - precision * (value - mean) ** 2)


def log_gamma(value: float, shape: float, rate: float) -> float:
    return shape * math.log(rate) - math.lgamma(shape) + (shape - 1) * math.log(value) - rate * value


def log_joint(mean: float, precision: float, column: np.ndarray) -> float:
    """log p(column, μ, τ), added up row by row."""
    prior = log_gamma(precision, A0, B0) + log_normal(mean, M0, K0 * precision)
    return prior + sum(log_normal(value, mean, precision) for value in column.tolist())


def joint_density(mean: float, precision: float, column: np.ndarray) -> float:
    return math.exp(log_joint(mean, precision, column))


def integral(function, column: np.ndarray) -> float:  # type: ignore[no-untyped-def]
    """Integral of function(μ, τ) over τ up to where nothing is left, and over μ within ten deviations of the mean."""
    centre, reach = column.mean(), 10 / math.sqrt(len(column))
    high = stats.gamma.isf(1e-16, A0 + len(column) / 2, scale=1 / B0)
    area = integrate.dblquad(
        function,
        0,
        high,
        lambda precision: centre - (1 + reach) / math.sqrt(precision) - 1,
        lambda precision: centre + (1 + reach) / math.sqrt(precision) + 1,
        epsabs=0,
        epsrel=1e-8,
    )
    return float(area[0])


def test_evidence_is_the_integral_over_mean_and_precision() -> None:
    """To 1e-6 nats: dblquad is asked for 1e-8 relative in each of two columns."""
    x = rows()
    truth = sum(math.log(integral(lambda m, t, c=column: joint_density(m, t, c), column)) for column in x.numpy().T)
    assert float(entry_for(x).log_evidence(x)) == pytest.approx(truth, rel=0, abs=1e-6)
    assert float(entry_for(x).log_evidence(x + 0.01)) != pytest.approx(truth, rel=0, abs=1e-6)


def test_evidence_is_a_multivariate_t() -> None:
    """A column is t with 2a₀ degrees of freedom and shape (b₀/a₀)(I + 11ᵀ/k₀): 1e-9 nats in 40 dimensions."""
    x = rows(40)
    shape = B0 / A0 * (np.eye(40) + np.ones((40, 40)) / K0)
    dense = stats.multivariate_t(np.full(40, M0), shape, df=2 * A0)
    truth = sum(dense.logpdf(column) for column in x.numpy().T)
    assert float(entry_for(x).log_evidence(x)) == pytest.approx(truth, rel=0, abs=1e-9)
    assert float(entry_for(x).log_evidence(1.001 * x)) != pytest.approx(truth, rel=0, abs=1e-9)


def test_posterior_is_the_normalised_joint_density() -> None:
    """At several points, to 1e-6 nats as above; the prior in its place is not. A leading dimension is kept."""
    x = rows(6, columns=1)
    column = x[:, 0].numpy()
    constant = integral(lambda m, t: joint_density(m, t, column), column)
    means, precisions = column.mean() + np.array([-0.3, 0.0, 0.5]), np.array([0.4, 1.5, 0.9])
    truth = [math.log(joint_density(m, t, column) / constant) for m, t in zip(means, precisions, strict=True)]
    values = {"mean": torch.tensor(means)[:, None], "precision": torch.tensor(precisions)[:, None]}
    entry = entry_for(x)
    assert entry.posterior(x).log_prob(values).tolist() == pytest.approx(truth, rel=0, abs=1e-6)
    assert entry.posterior(x[:0]).log_prob(values).tolist() != pytest.approx(truth, rel=0, abs=1e-6)


def test_posterior_draws_have_the_moments_of_their_marginals() -> None:
    """τ is gamma and μ is Student-t: means of 20,000 draws within 6 standard errors, false alarms at 2e-9 each."""
    x = rows(8, columns=1)
    k, shape, rate, location = _closed_form(x[:, 0].numpy())
    with isolated(3):
        draws = entry_for(x).posterior(x).sample((20_000,))
    truths = {"precision": shape / rate, "mean": location}
    deviations = {
        "precision": math.sqrt(shape) / rate,
        "mean": math.sqrt(rate / (shape * k) * shape / (shape - 1)),
    }
    for name, truth in truths.items():
        assert draws[name].shape == (20_000, 1)
        error = deviations[name] / math.sqrt(20_000)
        assert abs(float(draws[name].mean()) - truth) <= 6 * error
        assert abs(float(draws[name].mean()) - (truth + 0.2 * deviations[name])) > 6 * error


def _closed_form(column: np.ndarray) -> tuple[float, float, float, float]:
    """k, a, b, m of the posterior, one row at a time: each row is an update of the prior by itself."""
    k, shape, rate, location = K0, A0, B0, M0
    for value in column:
        rate += 0.5 * k * (value - location) ** 2 / (k + 1)
        location = (k * location + value) / (k + 1)
        k, shape = k + 1, shape + 0.5
    return k, shape, rate, location


def test_predictive_is_student_t_and_a_ratio_of_evidences() -> None:
    """Both to 1e-10 nats; and the product over rows of p(row given those before) is the evidence (1e-9)."""
    x = rows(9)
    entry = entry_for(x)
    new = torch.tensor([0.3, -2.0], dtype=torch.float64)
    found = float(entry.predictive(x).log_prob(new))
    truth = 0.0
    for value, column in zip(new.numpy(), x.numpy().T, strict=True):
        k, shape, rate, location = _closed_form(column)
        truth += stats.t.logpdf(value, 2 * shape, location, math.sqrt(rate * (k + 1) / (shape * k)))
    assert found == pytest.approx(truth, rel=0, abs=1e-10)
    more = torch.cat([x, new[None]])
    assert found == pytest.approx(float(entry.log_evidence(more) - entry.log_evidence(x)), rel=0, abs=1e-10)
    assert float(entry.predictive(x).log_prob(new + 0.01)) != pytest.approx(truth, rel=0, abs=1e-10)

    steps = [float(entry.predictive(x[:n]).log_prob(x[n])) for n in range(len(x))]
    assert sum(steps) == pytest.approx(float(entry.log_evidence(x)), rel=0, abs=1e-9)
    assert sum(steps[1:]) != pytest.approx(float(entry.log_evidence(x)), rel=0, abs=1e-9)


def test_newcombs_speed_of_light() -> None:
    """A vague prior leaves the published 95 % interval of the mean, [23.6, 28.8] (Gelman et al. 2013, section 3.2).

    Their prior is improper: it has n - 1 degrees of freedom where a vague proper one has n, which moves the ends by
    0.02. A prior worth ten rows at zero moves them visibly.
    """
    x = torch.tensor(NEWCOMB, dtype=torch.float64)[:, None]

    def interval(prior_count: float) -> list[float]:
        entry = get_entry("normal-gamma").from_data(x, prior_count=prior_count, shape=1e-6, rate=1e-6)
        conditionals = entry.posterior(x).conditionals  # type: ignore[attr-defined]
        precision = conditionals["precision"].base_dist
        # μ is t: location m_N, and scale that of its normal at the mean precision.
        normal = conditionals["mean"]({"precision": precision.mean}).base_dist
        ends = stats.t.ppf([0.025, 0.975], 2 * float(precision.concentration), float(normal.loc), float(normal.scale))
        return [round(float(end), 1) for end in ends]

    assert len(NEWCOMB) == 66 and round(float(np.mean(NEWCOMB)), 1) == 26.2
    assert interval(1e-6) == [23.6, 28.8]
    assert interval(10.0) != [23.6, 28.8]


def test_a_far_offset_does_not_cancel() -> None:
    """Data and prior moved by 1e8 together keep their evidence to 1e-6 nats, where uncentred squares lose them all.

    Rows are multiples of 1/1024, so that the moved ones are exact and only the algebra is on trial. The mean itself is
    rounded at 1.5e-8, against deviations of 0.1.
    """
    x = (rows(50) * 1024).round() / 1024
    here = entry_for(x)
    moved = x + 1e8
    there = NormalGamma.from_data(moved, **(OPTIONS | {"prior_mean": M0 + 1e8}))
    assert torch.equal(moved - 1e8, x)
    assert float(there.log_evidence(moved)) == pytest.approx(float(here.log_evidence(x)), rel=0, abs=1e-6)
    factors, moved_factors = fixed_point(here, x), fixed_point(there, moved)
    assert float(there.bound(moved, moved_factors)) == pytest.approx(float(here.bound(x, factors)), rel=0, abs=1e-6)
    uncentred = moved.square().sum(0) - len(x) * moved.mean(0).square()
    centred = (x - x.mean(0)).square().sum(0)
    assert (uncentred - centred).abs().max() > 1e-6


@pytest.mark.parametrize("n", [1, 2, 50])
@pytest.mark.parametrize("value", [0.0, M0, 7.0])
def test_a_constant_column_has_a_finite_answer(n: int, value: float) -> None:
    """A single distinct value: the prior's rate keeps the precision finite. Against SciPy's multivariate t, 1e-9."""
    x = torch.full((n, 1), value, dtype=torch.float64)
    entry = entry_for(x)
    shape = B0 / A0 * (np.eye(n) + np.ones((n, n)) / K0)
    truth = stats.multivariate_t.logpdf(x[:, 0].numpy(), np.full(n, M0), shape, df=2 * A0)
    assert float(entry.log_evidence(x)) == pytest.approx(float(truth), rel=0, abs=1e-9)
    assert float(entry.log_evidence(x + 0.1)) != pytest.approx(float(truth), rel=0, abs=1e-9)
    assert torch.isfinite(entry.predictive(x).log_prob(x[0]))
    assert math.isfinite(float(entry.bound(x, fixed_point(entry, x))))


def fixed_point(entry: NormalGamma, x: Tensor, restart: int = 0) -> MeanFieldFactors:
    """Factors after 60 sweeps: an error falls by the factor 1/(2a_N + 1) < ½ in each, to less than 1e-16 of it."""
    factors = entry.initial_factors(x, restart)
    for _ in range(60):
        factors = entry.update_factors(x, factors)
    return factors


def divergence(factors: MeanFieldFactors, column: np.ndarray, constant: float) -> float:
    """KL(q ‖ p(μ, τ given column)) in nats by quadrature of q log (q / p)."""
    mean, mean_precision, shape, rate = (float(value) for value in factors)
    q_mean, q_precision = stats.norm(mean, mean_precision**-0.5), stats.gamma(shape, scale=1 / rate)

    def integrand(m: float, t: float) -> float:
        log_q = log_normal(m, mean, mean_precision) + log_gamma(t, shape, rate)
        return math.exp(log_q) * (log_q - log_joint(m, t, column) + math.log(constant))

    # Nine deviations of μ; of τ all but 1e-12 at the lower and 1e-14 at the upper end.
    ends = [q_precision.ppf(1e-12), q_precision.isf(1e-14)]
    area = integrate.dblquad(integrand, *ends, *(mean + np.array([-9, 9]) * q_mean.std()), epsrel=1e-6)
    return float(area[0])


@pytest.mark.parametrize("sweeps", [0, 1, 60])
def test_bound_is_evidence_minus_divergence(sweeps: int) -> None:
    """For factors anywhere, not at the optimum alone: 1e-4 nats, as dblquad leaves 1e-6 of up to a hundred."""
    x = rows(5, columns=1)
    entry = entry_for(x)
    column = x[:, 0].numpy()
    with isolated(1):
        factors = entry.initial_factors(x, 1)
    for _ in range(sweeps):
        factors = entry.update_factors(x, factors)
    constant = math.exp(
        stats.multivariate_t.logpdf(column, np.full(5, M0), B0 / A0 * (np.eye(5) + np.ones((5, 5)) / K0), df=2 * A0)
    )
    truth = math.log(constant) - divergence(factors, column, constant)
    assert float(entry.bound(x, factors)) == pytest.approx(truth, rel=0, abs=1e-4)
    wider = factors._replace(mean_precision=0.9 * factors.mean_precision)
    assert float(entry.bound(x, wider)) != pytest.approx(truth, rel=0, abs=1e-4)


@pytest.mark.parametrize("restart", range(20))
def test_cavi_never_decreases_and_ends_at_the_closed_form(restart: int) -> None:
    """From 20 starts: no sweep loses more than 1e-9 nats per row, and the gap ends at its closed form (1e-9).

    A sweep that takes the posterior's shape for that of q(τ), half too little, ends short of it.
    """
    x = rows(6)
    entry = entry_for(x)
    truth = float(entry.log_evidence(x)) - mean_field_gap(A0 + 3, columns=2)
    with isolated(restart):
        factors = entry.initial_factors(x, restart)
    bounds = [float(entry.bound(x, factors))]
    for _ in range(60):
        factors = entry.update_factors(x, factors)
        bounds.append(float(entry.bound(x, factors)))
    assert min(np.diff(bounds)) >= -1e-9 * len(x)
    assert bounds[-1] == pytest.approx(truth, rel=0, abs=1e-9)
    assert bounds[0] < truth - 1e-3
    assert float(entry.bound(x, factors._replace(shape=factors.shape - 0.5))) < truth - 1e-3


def mean_field_gap(shape: float, columns: int) -> float:
    """Gap of the best q(μ) q(τ), total nats, for posterior shape a_N: derived on the entry's page."""
    half = shape + 0.5
    log_ratio = special.gammaln(shape) - special.gammaln(half)
    return columns * float(half * math.log(half) - shape * math.log(shape) - 0.5 + log_ratio)


def test_the_closed_gap_is_the_divergence_of_the_fixed_point() -> None:
    """The page's formula against quadrature of the divergence, 1e-5 nats, and against 1/(4 a_N) for many rows (1 %)."""
    x = rows(5, columns=1)
    entry = entry_for(x)
    gap = divergence(fixed_point(entry, x), x[:, 0].numpy(), math.exp(float(entry.log_evidence(x))))
    assert gap == pytest.approx(mean_field_gap(A0 + 2.5, columns=1), rel=0, abs=1e-5)
    assert gap != pytest.approx(mean_field_gap(A0 + 3.0, columns=1), rel=0, abs=1e-5)
    assert mean_field_gap(200.0, columns=1) == pytest.approx(1 / 800, rel=0.01)


def test_each_factor_is_at_its_optimum() -> None:
    """At the fixed point no change of 1 % in any parameter of any factor raises the bound."""
    x = rows()
    entry = entry_for(x)
    factors = fixed_point(entry, x)
    best = float(entry.bound(x, factors))
    for name in MeanFieldFactors._fields:
        for change in (0.99, 1.01):
            moved = factors._replace(**{name: change * getattr(factors, name)})
            assert float(entry.bound(x, moved)) < best
    # Negative control: from the start itself one sweep does raise it.
    start = entry.initial_factors(x, 0)
    assert float(entry.bound(x, entry.update_factors(x, start))) > float(entry.bound(x, start))


def normal_gap(shape: float, columns: int) -> float:
    """Gap of the best independent normals over μ and log τ, total nats, for posterior shape a_N."""
    return columns * float(
        special.gammaln(shape)
        - shape * math.log(shape)
        + shape
        - 0.5 * math.log(2 * math.pi)
        + 0.5 * math.log(shape + 0.5)
    )


def test_mean_field_guide_reaches_its_known_gap() -> None:
    """The ELBO of the fitted q, in closed form, is within 0.005 nats of the best; 6 standard errors for the ledger's.

    6 standard errors: false alarms at 2e-9. After one step q is further off than both.
    """
    x = rows(6, columns=1)
    (k, shape, rate, location), least = _closed_form(x[:, 0].numpy()), normal_gap(A0 + 3, columns=1)

    def of(fit: ez.Fit) -> float:
        locs, scales = (
            {name: float(getattr(values, name).detach()) for name in ("mean", "precision")}
            for values in (fit.guide.auto.locs, fit.guide.auto.scales)
        )
        precision = math.exp(locs["precision"] + 0.5 * scales["precision"] ** 2)
        squares = (locs["mean"] - location) ** 2 + scales["mean"] ** 2
        entropies = math.log(scales["mean"] * scales["precision"]) + math.log(2 * math.pi * math.e)
        log_posterior_of_mean = 0.5 * (math.log(k / (2 * math.pi)) + locs["precision"] - k * precision * squares)
        # The density of log τ is that of τ times τ.
        log_posterior_of_precision = (
            shape * math.log(rate) - math.lgamma(shape) + shape * locs["precision"] - rate * precision
        )
        return -entropies - log_posterior_of_mean - log_posterior_of_precision

    fit = ez.fit("normal-gamma", x, guide="mean-field", learning_rate=0.05, steps=600, schedule="cosine", **OPTIONS)
    ledger = fit.full_ledger()
    assert least - 1e-9 <= of(fit) <= least + 0.005
    assert abs(ledger.gap - of(fit)) <= 6 * ledger.elbo_se
    untrained = ez.fit("normal-gamma", x, guide="mean-field", steps=1, initial_scale=0.1, **OPTIONS)
    assert of(untrained) > least + 0.005
    assert abs(untrained.full_ledger().gap - of(fit)) > 6 * ledger.elbo_se


def test_methods_end_where_the_closed_forms_say() -> None:
    """`closed-form` has no gap (1e-9 relative); `cavi` has the mean-field gap (6 standard errors, or 1e-6 nats)."""
    x = rows(6)
    exact = ez.fit("normal-gamma", x, method="closed-form", **OPTIONS).full_ledger()
    assert abs(exact.gap) < 1e-9 * abs(exact.log_evidence)
    fit = ez.fit("normal-gamma", x, method="cavi", **OPTIONS)
    ledger = fit.full_ledger()
    truth = mean_field_gap(A0 + 3, columns=2)
    assert fit.converged
    assert abs(ledger.gap - truth) <= 6 * ledger.elbo_se + 1e-6
    assert abs(exact.gap - truth) > 6 * exact.elbo_se + 1e-6


def test_options_come_as_strings_and_are_bounded() -> None:
    entry = NormalGamma.from_data(rows(), prior_mean="-1.5", prior_count="2", shape="3", rate="0.5")
    options = entry.options
    assert (options.prior_mean, options.prior_count, options.shape, options.rate) == (-1.5, 2.0, 3.0, 0.5)
    for name in ("prior_count", "shape", "rate"):
        for wrong in ("0", "-1", "inf", "many"):
            with pytest.raises(InvalidInput, match=f"option {name}: found"):
                NormalGamma.from_data(rows(), **{name: wrong})

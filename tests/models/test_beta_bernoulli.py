"""Beta-Bernoulli against quadrature, SciPy's beta-binomial, published posteriors and the least gap of a normal."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, special, stats
from torch import Tensor

import elbozoo as ez
from elbozoo.models import get_entry
from elbozoo.models.beta_bernoulli import BetaBernoulli
from elbozoo.models.contract.errors import InvalidInput

ALPHA, BETA = 1.3, 2.5
SKEWED = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 0, 1], [1, 0, 0]]).double()


def entry_for(x: Tensor) -> BetaBernoulli:
    return BetaBernoulli.from_data(x, alpha=ALPHA, beta=BETA)


def rows(n: int = 15) -> Tensor:
    return BetaBernoulli.example(3, seed=1, alpha=ALPHA, beta=BETA).simulate(n, seed=2)[0].double()


def joint_density(p: float, column: np.ndarray) -> float:
    """p(column, p), multiplied out row by row."""
    return float(stats.beta.pdf(p, ALPHA, BETA) * np.prod(np.where(column == 1, p, 1 - p)))


def quadrature_evidence(x: Tensor) -> float:
    integrals = [integrate.quad(joint_density, 0, 1, args=(c,), epsabs=0, epsrel=1e-10)[0] for c in x.numpy().T]
    return float(np.log(integrals).sum())


def test_evidence_is_the_integral_over_the_probability() -> None:
    """To 1e-8 nats: quad is asked for 1e-10 relative in each of three columns, and the power 1.3 costs it some."""
    x = rows()
    truth = quadrature_evidence(x)
    assert float(entry_for(x).log_evidence(x)) == pytest.approx(truth, rel=0, abs=1e-8)
    flipped = x.clone()
    flipped[0, 0] = 1 - flipped[0, 0]
    assert float(entry_for(x).log_evidence(flipped)) != pytest.approx(truth, rel=0, abs=1e-8)


def test_evidence_is_beta_binomial_without_the_number_of_orders() -> None:
    """To 1e-9 nats: log-gammas of a few hundred are rounded at 1e-13. With the number of orders it differs."""
    x = rows(300)
    ones = x.sum(0).numpy()
    binomial = stats.betabinom.logpmf(ones, 300, ALPHA, BETA).sum()
    orders = np.log(special.comb(300, ones)).sum()
    evidence = float(entry_for(x).log_evidence(x))
    assert evidence == pytest.approx(binomial - orders, rel=0, abs=1e-9)
    assert evidence != pytest.approx(binomial, rel=0, abs=1e-9)


def test_posterior_is_the_normalised_joint_density() -> None:
    """At points of the interval, to 1e-8 nats as above; the prior in its place is not."""
    x = rows()
    entry = entry_for(x)
    constants = [integrate.quad(joint_density, 0, 1, args=(c,), epsabs=0, epsrel=1e-10)[0] for c in x.numpy().T]
    for p in (0.05, 0.3, 0.6, 0.9):
        points = [joint_density(p, c) / k for c, k in zip(x.numpy().T, constants, strict=True)]
        truth = np.log(points).sum()
        value = torch.full((3,), p, dtype=torch.float64)
        assert float(entry.posterior(x).log_prob(value)) == pytest.approx(truth, rel=0, abs=1e-8)
        assert float(entry.posterior(x[:0]).log_prob(value)) != pytest.approx(truth, rel=0, abs=1e-8)


def test_predictive_is_beta_binomial_and_a_ratio_of_evidences() -> None:
    """Both to 1e-12 nats; and the product over rows of p(row given those before) is the evidence (1e-10)."""
    x = rows()
    entry = entry_for(x)
    new = torch.tensor([1.0, 0.0, 1.0]).double()
    found = float(entry.predictive(x).log_prob(new))
    ones = x.sum(0).numpy()
    truth = stats.betabinom.logpmf(new.numpy(), 1, ALPHA + ones, BETA + len(x) - ones).sum()
    assert found == pytest.approx(truth, rel=0, abs=1e-12)
    more = torch.cat([x, new[None]])
    assert found == pytest.approx(float(entry.log_evidence(more) - entry.log_evidence(x)), rel=0, abs=1e-12)
    assert float(entry.predictive(x).log_prob(1 - new)) != pytest.approx(truth, rel=0, abs=1e-12)

    steps = [float(entry.predictive(x[:n]).log_prob(x[n])) for n in range(len(x))]
    assert sum(steps) == pytest.approx(float(entry.log_evidence(x)), rel=0, abs=1e-10)
    assert sum(steps[1:]) != pytest.approx(float(entry.log_evidence(x)), rel=0, abs=1e-10)


def births(girls: int, boys: int) -> Tensor:
    return torch.cat([torch.ones(girls, 1), torch.zeros(boys, 1)]).double()


def test_published_posteriors_of_the_sex_ratio() -> None:
    """Gelman et al. (2013), section 2.4, uniform prior, to the digits printed there.

    Placenta previa, 437 girls of 980: mean .446, standard deviation .016, 95 % interval [.415, .477]. Births in
    Paris 1745 to 1770, 241,945 girls and 251,527 boys (Laplace): Pr(p >= ½) = 1.15e-42.
    """

    def posterior(x: Tensor) -> torch.distributions.Beta:
        return get_entry("beta-bernoulli").from_data(x).posterior(x).base_dist  # type: ignore[attr-defined]

    previa = posterior(births(437, 543))
    interval = stats.beta.ppf([0.025, 0.975], float(previa.concentration1), float(previa.concentration0))
    assert [round(float(v), 3) for v in (previa.mean, previa.stddev, *interval)] == [0.446, 0.016, 0.415, 0.477]
    paris = posterior(births(241_945, 251_527))
    assert f"{stats.beta.sf(0.5, float(paris.concentration1), float(paris.concentration0)):.2e}" == "1.15e-42"
    # Negative control: a tenth more of the girls is seen in the third digit.
    assert round(float(posterior(births(481, 543)).mean), 3) != 0.446


def test_uniform_prior_gives_laplaces_rule() -> None:
    """With s ones of n: evidence 1/((n+1) C(n, s)), next one (s+1)/(n+2), to 1e-12; another prior gives neither."""
    x = births(3, 7)
    entry = BetaBernoulli.from_data(x)
    assert float(entry.log_evidence(x).exp()) == pytest.approx(1 / (11 * 120), rel=1e-12)
    assert float(entry.predictive(x).mean) == pytest.approx(4 / 12, rel=1e-12)
    assert float(entry_for(x).log_evidence(x).exp()) != pytest.approx(1 / (11 * 120), rel=1e-12)
    assert float(entry_for(x).predictive(x).mean) != pytest.approx(4 / 12, rel=1e-12)


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("n", [1, 50, 1_000_000])
def test_a_constant_column_has_a_finite_answer(value: float, n: int) -> None:
    """log B(α, β + n) - log B(α, β) of n zeros; 1e-8 relative, since log-gammas of a million cancel to about 20."""
    x = torch.full((n, 1), value).double()
    entry = entry_for(x)
    counts = (ALPHA + n, BETA) if value else (ALPHA, BETA + n)
    truth = special.betaln(*counts) - special.betaln(ALPHA, BETA)
    assert float(entry.log_evidence(x)) == pytest.approx(truth, rel=1e-8)
    assert float(entry.log_evidence(1 - x)) != pytest.approx(truth, rel=1e-8)
    assert torch.isfinite(entry.posterior(x).mean).all() and torch.isfinite(entry.predictive(x).mean).all()


def divergence(mean: float, scale: float, a: float, b: float) -> float:
    """KL(q ‖ Beta(a, b)) in nats for q normal on the log odds, by Gauss-Hermite quadrature with 80 nodes."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    log_odds = mean + scale * nodes
    energy = weights @ (a * log_odds - (a + b) * np.logaddexp(0, log_odds)) / weights.sum()
    return float(special.betaln(a, b) - energy - 0.5 * np.log(2 * np.pi * np.e * scale**2))


def least_divergence(a: float, b: float) -> float:
    start = [np.log(a / b), 0.5 * np.log(1 / a + 1 / b)]
    return float(optimize.minimize(lambda p: divergence(p[0], np.exp(p[1]), a, b), start, tol=1e-12).fun)


def test_the_least_gap_of_a_normal_is_about_what_the_page_says() -> None:
    """(a - b)² / (12 a b (a + b)): within 10 % where the smaller count is 10 or more."""
    for a, b in [(10, 40), (10, 1000), (438, 544)]:
        assert (a - b) ** 2 / (12 * a * b * (a + b)) == pytest.approx(least_divergence(a, b), rel=0.1)
    assert least_divergence(438, 544) != pytest.approx(1 / (12 * 438), rel=0.1)


def test_mean_field_reaches_its_known_gap() -> None:
    """Divergence of the fitted q within 0.005 nats of the least; the ledger's gap within 6 standard errors of it.

    6 standard errors: false alarms at 2e-9. After one step q is further off than both.
    """
    columns = [(1 + float(s), 1 + 4 - float(s)) for s in SKEWED.sum(0)]
    least = sum(least_divergence(a, b) for a, b in columns)

    def of(fit: ez.Fit) -> float:
        locs, scales = (getattr(fit.guide.auto, name).p.detach().numpy() for name in ("locs", "scales"))
        return sum(divergence(m, s, a, b) for m, s, (a, b) in zip(locs, scales, columns, strict=True))

    fit = ez.fit("beta-bernoulli", SKEWED, guide="mean-field", learning_rate=0.05, steps=600)
    ledger = fit.full_ledger()
    assert least - 1e-9 <= of(fit) <= least + 0.005
    assert abs(ledger.gap - of(fit)) <= 6 * ledger.elbo_se
    untrained = ez.fit("beta-bernoulli", SKEWED, guide="mean-field", steps=1)
    assert of(untrained) > least + 0.005
    assert abs(untrained.full_ledger().gap - of(fit)) > 6 * ledger.elbo_se


def test_the_closed_form_is_the_exact_posterior() -> None:
    """`closed-form` has nothing to learn and no gap; a guide beside it has one."""
    ledger = ez.fit("beta-bernoulli", SKEWED, method="closed-form").full_ledger()
    assert abs(ledger.gap) < 1e-9 * abs(ledger.log_evidence)
    assert ledger.log_evidence == pytest.approx(float(BetaBernoulli.from_data(SKEWED).log_evidence(SKEWED)), rel=1e-12)
    laplace = ez.fit("beta-bernoulli", SKEWED, guide="laplace", steps=200).full_ledger()
    assert laplace.gap > 1e-9 * abs(laplace.log_evidence)


@pytest.mark.parametrize("value", [0.5, -1.0, 2.0, float("nan")])
def test_other_values_are_refused(value: float) -> None:
    with pytest.raises(InvalidInput, match=rf"found the value {value:g}, expected 0 or 1"):
        BetaBernoulli.from_data(torch.tensor([[1.0], [value]]))


def test_options_come_as_strings_and_are_bounded() -> None:
    entry = BetaBernoulli.from_data(SKEWED, alpha="0.5", beta="0.5")
    assert (entry.options.alpha, entry.options.beta) == (0.5, 0.5)
    for wrong in ("0", "-1", "inf", "many"):
        with pytest.raises(InvalidInput, match="option alpha: found"):
            BetaBernoulli.from_data(SKEWED, alpha=wrong)

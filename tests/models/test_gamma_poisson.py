"""Gamma-Poisson against quadrature, SciPy's negative binomial, published posteriors and Stirling's remainder."""

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
from elbozoo.models.gamma_poisson import GammaPoisson

SHAPE, RATE = 1.7, 0.4
FEW = torch.tensor([[0.0, 1.0, 12.0], [0.0, 2.0, 9.0]], dtype=torch.float64)

# Deaths by horse kick in 200 corps-years of the Prussian cavalry (von Bortkewitsch 1898): years with 0, 1, ... deaths.
HORSE_KICKS = [109, 65, 22, 3, 1]


def entry_for(x: Tensor) -> GammaPoisson:
    return GammaPoisson.from_data(x, shape=SHAPE, rate=RATE)


def rows(n: int = 12) -> Tensor:
    return GammaPoisson.example(3, seed=1, shape=SHAPE, rate=RATE).simulate(n, seed=2)[0]


def joint_density(rate: float, column: np.ndarray) -> float:
    """p(column, λ), multiplied out row by row."""
    return float(stats.gamma.pdf(rate, SHAPE, scale=1 / RATE) * np.prod(stats.poisson.pmf(column, rate)))


def normaliser(column: np.ndarray) -> float:
    # Cut where SciPy's own posterior quantiles say that less than 1e-20 is left outside.
    high = stats.gamma.isf(1e-20, SHAPE + column.sum(), scale=1 / (RATE + len(column)))
    return float(integrate.quad(joint_density, 0, high, args=(column,), epsabs=0, epsrel=1e-11, limit=200)[0])


def test_evidence_is_the_integral_over_the_rate() -> None:
    """To 1e-9 nats: quad is asked for 1e-11 relative in each of three columns."""
    x = rows()
    truth = sum(math.log(normaliser(column)) for column in x.numpy().T)
    assert float(entry_for(x).log_evidence(x)) == pytest.approx(truth, rel=0, abs=1e-9)
    more = x.clone()
    more[0, 0] += 1
    assert float(entry_for(x).log_evidence(more)) != pytest.approx(truth, rel=0, abs=1e-9)


def test_evidence_is_a_negative_binomial_sum_dealt_out_evenly() -> None:
    """The sum of a column is negative binomial, and given it the rows are multinomial with equal shares: 1e-9 nats."""
    x = rows(300)
    n = len(x)
    truth = sum(
        stats.nbinom.logpmf(column.sum(), SHAPE, RATE / (RATE + n))
        + stats.multinomial.logpmf(column, int(column.sum()), np.full(n, 1 / n))
        for column in x.numpy().T
    )
    assert float(entry_for(x).log_evidence(x)) == pytest.approx(truth, rel=0, abs=1e-9)
    other = GammaPoisson.from_data(x, shape=SHAPE, rate=1.001 * RATE)
    assert float(other.log_evidence(x)) != pytest.approx(truth, rel=0, abs=1e-9)


def test_posterior_is_the_normalised_joint_density() -> None:
    """At several rates, to 1e-9 nats; the prior in its place is not."""
    x = rows()
    entry = entry_for(x)
    constants = [normaliser(column) for column in x.numpy().T]
    for factor in (0.5, 0.9, 1.3):
        at = factor * (x.mean(0) + 0.1)
        points = zip(at.tolist(), x.numpy().T, constants, strict=True)
        truth = sum(math.log(joint_density(rate, column) / constant) for rate, column, constant in points)
        assert float(entry.posterior(x).log_prob(at)) == pytest.approx(truth, rel=0, abs=1e-9)
        assert float(entry.posterior(x[:0]).log_prob(at)) != pytest.approx(truth, rel=0, abs=1e-9)


def test_predictive_is_negative_binomial_and_a_ratio_of_evidences() -> None:
    """Both to 1e-10 nats; and the product over rows of p(row given those before) is the evidence (1e-9)."""
    x = rows()
    entry = entry_for(x)
    new = torch.tensor([0.0, 3.0, 8.0], dtype=torch.float64)
    found = float(entry.predictive(x).log_prob(new))
    shape, rate = SHAPE + x.sum(0).numpy(), RATE + len(x)
    truth = stats.nbinom.logpmf(new.numpy(), shape, rate / (rate + 1)).sum()
    assert found == pytest.approx(truth, rel=0, abs=1e-10)
    assert found == pytest.approx(
        float(entry.log_evidence(torch.cat([x, new[None]])) - entry.log_evidence(x)), rel=0, abs=1e-10
    )
    assert float(entry.predictive(x).log_prob(new + 1)) != pytest.approx(truth, rel=0, abs=1e-10)

    steps = [float(entry.predictive(x[:n]).log_prob(x[n])) for n in range(len(x))]
    assert sum(steps) == pytest.approx(float(entry.log_evidence(x)), rel=0, abs=1e-9)
    assert sum(steps[1:]) != pytest.approx(float(entry.log_evidence(x)), rel=0, abs=1e-9)


def test_published_posteriors_of_asthma_mortality() -> None:
    """Gelman et al. (2013), section 2.6, to the digits printed there: prior Gamma(3, 5), deaths per 100,000 a year.

    Three deaths among 200,000 persons (two rows of 100,000): Gamma(6, 7) with mean 0.86. Thirty in ten years of the
    same (twenty rows): Gamma(33, 25) with mean 1.32.
    """

    def posterior(deaths: int, count: int) -> torch.distributions.Gamma:
        x = torch.zeros(count, 1, dtype=torch.float64)
        x[0] = deaths
        return get_entry("gamma-poisson").from_data(x, shape=3, rate=5).posterior(x).base_dist  # type: ignore[attr-defined]

    one_year, ten_years = posterior(3, 2), posterior(30, 20)
    assert (float(one_year.concentration), float(one_year.rate)) == (6, 7)
    assert (float(ten_years.concentration), float(ten_years.rate)) == (33, 25)
    assert [round(float(p.mean), 2) for p in (one_year, ten_years)] == [0.86, 1.32]
    assert round(float(posterior(4, 2).mean), 2) != 0.86


def test_horse_kicks() -> None:
    """122 deaths in 200 corps-years: a vague prior leaves the published mean 0.61, with deviation √122 / 200."""
    x = torch.repeat_interleave(torch.arange(5.0, dtype=torch.float64), torch.tensor(HORSE_KICKS))[:, None]
    posterior = GammaPoisson.from_data(x, shape=1e-6, rate=1e-6).posterior(x)
    # The prior moves both by 1e-6 of an event in 122: 1e-7 covers it.
    assert float(posterior.mean) == pytest.approx(0.61, abs=1e-7)
    assert float(posterior.variance.sqrt()) == pytest.approx(math.sqrt(122) / 200, abs=1e-7)
    assert float(GammaPoisson.from_data(x).posterior(x).mean) != pytest.approx(0.61, abs=1e-7)


@pytest.mark.parametrize("n", [1, 50, 1_000_000])
def test_all_zero_counts_have_a_finite_answer(n: int) -> None:
    """A column of zeros has evidence (b/(b + N))^a, to 1e-12 relative; with a single event it is another one."""
    x = torch.zeros(n, 2, dtype=torch.float64)
    entry = entry_for(x)
    truth = 2 * SHAPE * math.log(RATE / (RATE + n))
    assert float(entry.log_evidence(x)) == pytest.approx(truth, rel=1e-12)
    x[0, 0] = 1
    assert float(entry.log_evidence(x)) != pytest.approx(truth, rel=1e-12)
    assert torch.isfinite(entry.predictive(x).log_prob(x[0]))


@pytest.mark.parametrize("guide", ["mean-field", "full-rank", "laplace"])
def test_all_zero_counts_can_be_fitted(guide: str) -> None:
    """Every figure is finite, and the bound stays below log(b/(b + 5)) within 6 standard errors (2e-9)."""
    ledger = ez.fit("gamma-poisson", torch.zeros(5, 1), guide=guide, steps=300).full_ledger()
    assert all(math.isfinite(v) for v in (ledger.elbo, ledger.log_evidence, ledger.gap, ledger.kl))
    assert ledger.log_evidence == pytest.approx(math.log(0.1 / 5.1), rel=1e-12)
    assert ledger.elbo <= math.log(0.1 / 5.1) + 6 * ledger.elbo_se
    # The evidence of ten thousand zeros would be caught.
    assert ledger.elbo > math.log(0.1 / 10_000.1) + 6 * ledger.elbo_se


def test_large_counts_keep_their_digits() -> None:
    """One count of ten million against SciPy's negative binomial: 1e-6 nats, where terms of 1.6e8 nats cancel."""
    x = torch.tensor([[1e7]], dtype=torch.float64)
    truth = stats.nbinom.logpmf(1e7, SHAPE, RATE / (RATE + 1))
    assert float(entry_for(x).log_evidence(x)) == pytest.approx(truth, rel=1e-9)
    assert float(entry_for(x).log_evidence(1.001 * x)) != pytest.approx(truth, rel=1e-9)


def stirling_remainder(shape: np.ndarray) -> np.ndarray:
    """log Γ(a) - (a - ½) log a + a - ½ log 2π: the least KL of a log-normal from Gamma(a, b)."""
    return special.gammaln(shape) - (shape - 0.5) * np.log(shape) + shape - 0.5 * math.log(2 * math.pi)


def divergence(location: np.ndarray, scale: np.ndarray, shape: np.ndarray, rate: float) -> float:
    """KL(q ‖ Gamma(a, b)) in nats for q log-normal, by Gauss-Hermite quadrature with 80 nodes."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    log_rate = location[:, None] + scale[:, None] * nodes
    log_posterior = stats.gamma.logpdf(np.exp(log_rate), shape[:, None], scale=1 / rate) + log_rate
    log_q = stats.norm.logpdf(nodes) - np.log(scale)[:, None]
    return float(((log_q - log_posterior) @ weights / weights.sum()).sum())


def test_mean_field_reaches_stirlings_remainder() -> None:
    """Divergence of the fitted q within 0.005 nats of the least; the ledger's gap within 6 standard errors of it.

    6 standard errors: false alarms at 2e-9. After one step q is further off than both.
    """
    shape, rate = 1 + FEW.sum(0).numpy(), 0.1 + len(FEW)
    least = stirling_remainder(shape).sum()
    assert divergence(np.log(shape / rate) - 0.5 / shape, shape**-0.5, shape, rate) == pytest.approx(least, abs=1e-9)

    def of(fit: ez.Fit) -> float:
        locs, scales = (getattr(fit.guide.auto, name).rate.detach().numpy() for name in ("locs", "scales"))
        return divergence(locs, scales, shape, rate)

    fit = ez.fit("gamma-poisson", FEW, guide="mean-field", learning_rate=0.05, steps=600, schedule="cosine")
    ledger = fit.full_ledger()
    assert least - 1e-9 <= of(fit) <= least + 0.005
    assert abs(ledger.gap - of(fit)) <= 6 * ledger.elbo_se
    untrained = ez.fit("gamma-poisson", FEW, guide="mean-field", steps=1, initial_scale=0.1)
    assert of(untrained) > least + 0.005
    assert abs(untrained.full_ledger().gap - of(fit)) > 6 * ledger.elbo_se


def test_the_closed_form_is_the_exact_posterior() -> None:
    """`closed-form` has nothing to learn and no gap; a guide beside it has one."""
    ledger = ez.fit("gamma-poisson", FEW, method="closed-form").full_ledger()
    assert abs(ledger.gap) < 1e-9 * abs(ledger.log_evidence)
    laplace = ez.fit("gamma-poisson", FEW, guide="laplace", steps=200).full_ledger()
    assert laplace.gap > 1e-9 * abs(laplace.log_evidence)


@pytest.mark.parametrize("value", [0.5, -1.0, float("nan")])
def test_what_is_no_count_is_refused(value: float) -> None:
    with pytest.raises(InvalidInput, match=rf"found the value {value:g}, expected counts"):
        GammaPoisson.from_data(torch.tensor([[1.0], [value]]))


def test_options_come_as_strings_and_are_bounded() -> None:
    entry = GammaPoisson.from_data(FEW, shape="0.5", rate="2")
    assert (entry.options.shape, entry.options.rate) == (0.5, 2.0)
    for wrong in ("0", "-1", "inf", "many"):
        with pytest.raises(InvalidInput, match="option rate: found"):
            GammaPoisson.from_data(FEW, rate=wrong)

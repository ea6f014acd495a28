"""Dirichlet-categorical against quadrature over the simplex, SciPy's Dirichlet-multinomial and beta-bernoulli."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, special, stats
from torch import Tensor

import elbozoo as ez
from elbozoo.inference.fit import Fit
from elbozoo.models import get_entry
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.dirichlet_categorical import DirichletCategorical

CONCENTRATION = 1.5
CATEGORIES = 3


def entry_for(x: Tensor) -> DirichletCategorical:
    return DirichletCategorical.from_data(x, categories=CATEGORIES, concentration=CONCENTRATION)


def rows(n: int = 10) -> Tensor:
    example = DirichletCategorical.example(2, seed=1, categories=CATEGORIES, concentration=CONCENTRATION)
    return example.simulate(n, seed=2)[0]


def counts_of(x: Tensor) -> np.ndarray:
    return np.array([np.bincount(column.astype(int), minlength=CATEGORIES) for column in x.numpy().T])


def joint_density(second: float, first: float, column: np.ndarray) -> float:
    """p(column, π) at π = (first, second, the rest), multiplied out row by row."""
    probs = np.array([first, second, max(1 - first - second, 0.0)])
    constant = math.gamma(3 * CONCENTRATION) / math.gamma(CONCENTRATION) ** 3
    return float(constant * np.prod(probs ** (CONCENTRATION - 1)) * np.prod(probs[column.astype(int)]))


def normaliser(column: np.ndarray) -> float:
    area = integrate.dblquad(joint_density, 0, 1, 0, lambda first: 1 - first, args=(column,), epsabs=0, epsrel=1e-9)
    return float(area[0])


def test_evidence_is_the_integral_over_the_simplex() -> None:
    """To 1e-7 nats: dblquad is asked for 1e-9 relative, and the roots at the edges cost it some."""
    x = rows()
    truth = sum(math.log(normaliser(column)) for column in x.numpy().T)
    assert float(entry_for(x).log_evidence(x)) == pytest.approx(truth, rel=0, abs=1e-7)
    other = x.clone()
    other[0, 0] = (other[0, 0] + 1) % CATEGORIES
    assert float(entry_for(x).log_evidence(other)) != pytest.approx(truth, rel=0, abs=1e-7)


def test_evidence_is_dirichlet_multinomial_without_the_number_of_orders() -> None:
    """To 1e-9 nats: log-gammas of a few hundred are rounded at 1e-13. With the number of orders it differs."""
    x = rows(300)
    counts = counts_of(x)
    multinomial = stats.dirichlet_multinomial.logpmf(counts, np.full(CATEGORIES, CONCENTRATION), 300).sum()
    orders = (special.gammaln(301) - special.gammaln(counts + 1).sum(-1)).sum()
    evidence = float(entry_for(x).log_evidence(x))
    assert evidence == pytest.approx(multinomial - orders, rel=0, abs=1e-9)
    assert evidence != pytest.approx(multinomial, rel=0, abs=1e-9)


def test_posterior_is_the_normalised_joint_density() -> None:
    """At several points, to 1e-7 nats as above; the prior in its place is not."""
    x = rows()
    entry = entry_for(x)
    constants = [normaliser(column) for column in x.numpy().T]
    for probs in ([0.2, 0.3, 0.5], [0.6, 0.3, 0.1]):
        pairs = zip(x.numpy().T, constants, strict=True)
        truth = sum(math.log(joint_density(probs[1], probs[0], column) / constant) for column, constant in pairs)
        value = torch.tensor([probs, probs], dtype=torch.float64)
        assert float(entry.posterior(x).log_prob(value)) == pytest.approx(truth, rel=0, abs=1e-7)
        assert float(entry.posterior(x[:0]).log_prob(value)) != pytest.approx(truth, rel=0, abs=1e-7)


def test_predictive_is_dirichlet_multinomial_and_a_ratio_of_evidences() -> None:
    """Both to 1e-12 nats; and the product over rows of p(row given those before) is the evidence (1e-10)."""
    x = rows()
    entry = entry_for(x)
    new = torch.tensor([0.0, 2.0], dtype=torch.float64)
    found = float(entry.predictive(x).log_prob(new))
    one_hot = np.eye(CATEGORIES, dtype=int)[new.numpy().astype(int)]
    truth = stats.dirichlet_multinomial.logpmf(one_hot, CONCENTRATION + counts_of(x), 1).sum()
    assert found == pytest.approx(truth, rel=0, abs=1e-12)
    more = torch.cat([x, new[None]])
    assert found == pytest.approx(float(entry.log_evidence(more) - entry.log_evidence(x)), rel=0, abs=1e-12)
    assert float(entry.predictive(x).log_prob(2 - new)) != pytest.approx(truth, rel=0, abs=1e-12)

    steps = [float(entry.predictive(x[:n]).log_prob(x[n])) for n in range(len(x))]
    assert sum(steps) == pytest.approx(float(entry.log_evidence(x)), rel=0, abs=1e-10)
    assert sum(steps[1:]) != pytest.approx(float(entry.log_evidence(x)), rel=0, abs=1e-10)


def test_published_posterior_of_an_election_poll() -> None:
    """Gelman et al. (2013), section 3.4: 727, 583 and 137 of 1447, uniform prior, give Dirichlet(728, 584, 138)."""
    x = torch.repeat_interleave(torch.arange(3.0), torch.tensor([727, 583, 137]))[:, None].double()
    posterior = get_entry("dirichlet-categorical").from_data(x).posterior(x)
    assert posterior.base_dist.concentration.tolist() == [[728, 584, 138]]  # type: ignore[attr-defined]
    swapped = (x + 1) % 3
    other = get_entry("dirichlet-categorical").from_data(swapped).posterior(swapped)
    assert other.base_dist.concentration.tolist() != [[728, 584, 138]]  # type: ignore[attr-defined]


def test_two_categories_are_beta_bernoulli() -> None:
    """Evidence, posterior density and predictive to 1e-10 nats; with a third category the evidence falls."""
    x = get_entry("beta-bernoulli").example(3, seed=1).simulate(30, seed=2)[0]
    beta = get_entry("beta-bernoulli").from_data(x, alpha=CONCENTRATION, beta=CONCENTRATION)
    two = DirichletCategorical.from_data(x, categories=2, concentration=CONCENTRATION)
    p = torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64)
    ours, theirs = two.posterior(x).log_prob(torch.stack([1 - p, p], -1)), beta.posterior(x).log_prob(p)  # type: ignore[attr-defined]
    assert float(two.log_evidence(x)) == pytest.approx(float(beta.log_evidence(x)), rel=0, abs=1e-10)  # type: ignore[attr-defined]
    assert float(ours) == pytest.approx(float(theirs), rel=0, abs=1e-10)
    assert torch.equal(
        two.predictive(x).log_prob(x[0]).round(decimals=10), beta.predictive(x).log_prob(x[0]).round(decimals=10)
    )  # type: ignore[attr-defined]
    assert float(entry_for(x).log_evidence(x)) < float(beta.log_evidence(x)) - 1e-10  # type: ignore[attr-defined]


def test_categories_come_from_the_data_and_stay_with_a_saved_fit(tmp_path: Path) -> None:
    """The largest category of any column plus one; a loaded fit has the same evidence to the last bit."""
    x = torch.tensor([[0.0, 3.0], [1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    fit = ez.fit("dirichlet-categorical", x, guide="mean-field", steps=5)
    loaded = Fit.load(fit.save(tmp_path / "fit"))
    assert fit.entry.options.categories == loaded.entry.options.categories == 4
    assert loaded.full_ledger(x).log_evidence == fit.full_ledger().log_evidence
    five = ez.fit("dirichlet-categorical", x, guide="mean-field", steps=5, categories=5)
    assert five.full_ledger().log_evidence != fit.full_ledger().log_evidence
    assert fit.sample(200).max() <= 3 and fit.sample(200).dtype == torch.float64


def test_one_category_is_refused_or_stated() -> None:
    """All rows alike say nothing of how many categories there are; told two, the evidence is 1/(N + 1)."""
    x = torch.zeros(9, 1, dtype=torch.float64)
    with pytest.raises(InvalidInput, match="found the category 0 in every row, expected two categories") as caught:
        DirichletCategorical.from_data(x)
    assert "\n" not in str(caught.value) and "set categories=2" in str(caught.value)
    entry = DirichletCategorical.from_data(x, categories=2)
    assert float(entry.log_evidence(x).exp()) == pytest.approx(1 / 10, rel=1e-12)
    assert float(DirichletCategorical.from_data(x, categories=3).log_evidence(x).exp()) != pytest.approx(0.1, rel=1e-12)
    ledger = ez.fit("dirichlet-categorical", x, guide="mean-field", categories=2, steps=300).full_ledger()
    assert all(math.isfinite(v) for v in (ledger.elbo, ledger.log_evidence, ledger.gap, ledger.kl))


def test_a_category_beyond_the_last_is_impossible() -> None:
    """New rows may hold it; their evidence is -inf, and not that of the rows without them."""
    x = rows()
    entry = entry_for(x)
    for value in (3.0, -1.0, 0.5):
        other = torch.cat([x, torch.tensor([[0.0, value]], dtype=torch.float64)])
        assert float(entry.log_evidence(other)) == -math.inf
    assert math.isfinite(float(entry.log_evidence(x)))


def divergence_of_fraction(mean: float, scale: float, a: float, b: float) -> float:
    """KL(q ‖ Beta(a, b)) in nats for q normal on the log odds, by Gauss-Hermite quadrature with 80 nodes."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    log_odds = mean + scale * nodes
    energy = weights @ (a * log_odds - (a + b) * np.logaddexp(0, log_odds)) / weights.sum()
    return float(special.betaln(a, b) - energy - 0.5 * np.log(2 * np.pi * np.e * scale**2))


def least_divergence(a: float, b: float) -> float:
    start = [np.log(a / b), 0.5 * np.log(1 / a + 1 / b)]
    return float(optimize.minimize(lambda p: divergence_of_fraction(p[0], np.exp(p[1]), a, b), start, tol=1e-12).fun)


def test_mean_field_reaches_the_gap_of_the_stick() -> None:
    """The divergence of the fitted q, fraction by fraction, is within 0.005 nats of the least.

    Under Dirichlet(α) the fraction broken off for category c is Beta(α_c, α_{c+1} + ... + α_C), independent of the
    others. The ledger's gap agrees within 6 standard errors (false alarms at 2e-9); after one step neither holds.
    """
    x = torch.tensor([[0.0], [2.0], [2.0], [1.0], [2.0]], dtype=torch.float64)
    alpha = 1 + counts_of(x)[0]
    betas = [(alpha[c], alpha[c + 1 :].sum()) for c in range(CATEGORIES - 1)]
    least = sum(least_divergence(a, b) for a, b in betas)

    def of(fit: Fit) -> float:
        locs, scales = (getattr(fit.guide.auto, name).probs[0].detach().numpy() for name in ("locs", "scales"))
        # torch shifts each log odds by the log of the number of categories that follow.
        shifted = locs - np.log(np.arange(CATEGORIES - 1, 0, -1))
        return sum(divergence_of_fraction(m, s, a, b) for m, s, (a, b) in zip(shifted, scales, betas, strict=True))

    fit = ez.fit("dirichlet-categorical", x, guide="mean-field", learning_rate=0.05, steps=600, schedule="cosine")
    ledger = fit.full_ledger()
    assert least - 1e-9 <= of(fit) <= least + 0.005
    assert abs(ledger.gap - of(fit)) <= 6 * ledger.elbo_se
    untrained = ez.fit("dirichlet-categorical", x, guide="mean-field", steps=1, initial_scale=0.1)
    assert of(untrained) > least + 0.005
    assert abs(untrained.full_ledger().gap - of(fit)) > 6 * ledger.elbo_se


def test_the_closed_form_is_the_exact_posterior() -> None:
    """`closed-form` has nothing to learn and no gap; a guide beside it has one."""
    ledger = ez.fit("dirichlet-categorical", rows(), method="closed-form").full_ledger()
    assert abs(ledger.gap) < 1e-9 * abs(ledger.log_evidence)
    laplace = ez.fit("dirichlet-categorical", rows(), guide="laplace", steps=200).full_ledger()
    assert laplace.gap > 1e-9 * abs(laplace.log_evidence)


@pytest.mark.parametrize("value", [0.5, -1.0, float("nan")])
def test_what_is_no_category_is_refused(value: float) -> None:
    with pytest.raises(InvalidInput, match=rf"found the value {value:g}, expected categories"):
        DirichletCategorical.from_data(torch.tensor([[1.0], [value]]))


def test_options_come_as_strings_and_are_bounded() -> None:
    x = torch.tensor([[0.0], [2.0]], dtype=torch.float64)
    entry = DirichletCategorical.from_data(x, categories="4", concentration="0.5")
    assert (entry.options.categories, entry.options.concentration) == (4, 0.5)
    for wrong in ("1", "0", "two", "20000"):
        with pytest.raises(InvalidInput, match="option categories: found"):
            DirichletCategorical.from_data(x, categories=wrong)
    with pytest.raises(InvalidInput, match=r"found the category 2, expected 0 to 1: .*set categories=3"):
        DirichletCategorical.from_data(x, categories=2)
    with pytest.raises(InvalidInput, match="expected 0 to 9999"):
        DirichletCategorical.from_data(1e6 * x)

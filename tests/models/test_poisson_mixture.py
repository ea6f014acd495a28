"""Mixture of Poissons against SciPy, the sum over counts, enumeration by Pyro and a published maximum."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from scipy import stats
from scipy.special import logsumexp
from torch import Tensor

import elbozoo as ez
from elbozoo.models import Batch, get_entry
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.isolation import isolated

# Days with 0, 1, ..., 9 deaths of women of 80 and older in notices of the London Times, 1910 to 1912
# (Hasselblad 1969; Lange, Applied Probability, chapter 2, table 2.6).
DEATH_NOTICES = [162, 267, 271, 185, 111, 61, 27, 8, 3, 1]


def death_notices() -> Tensor:
    return torch.arange(10.0, dtype=torch.float64).repeat_interleave(torch.tensor(DEATH_NOTICES))[:, None]


def scipy_log_evidence(weights: np.ndarray, rates: np.ndarray, x: np.ndarray) -> np.ndarray:
    terms = [np.log(w) + stats.poisson.logpmf(x, rate).sum(-1) for w, rate in zip(weights, rates, strict=True)]
    return logsumexp(terms, axis=0)


@pytest.mark.parametrize("scale", [1.0, 1e5])
def test_evidence_is_the_sum_over_components(scale: float) -> None:
    """Against SciPy's Poisson, to 1e-12 of the size of its terms, x log λ: at 1e5 events that is 1e-6 nats."""
    entry = get_entry("poisson-mixture").example(3, seed=1, components=4)
    with torch.no_grad():
        entry.log_excess.add_(math.log(scale))
    x, _ = entry.simulate(50, seed=2)
    weights, rates = entry.weights.detach().numpy(), entry.rates.detach().numpy()
    found = entry.log_evidence(x).detach().numpy()
    tolerance = 1e-12 * (1 + float(torch.xlogy(x, x).sum(-1).max()))
    assert np.abs(found - scipy_log_evidence(weights, rates, x.numpy())).max() <= tolerance
    assert np.abs(found - scipy_log_evidence(weights, 0.999 * rates, x.numpy())).max() > tolerance


def test_probabilities_of_all_counts_add_up_to_one() -> None:
    """Over two columns of 0 to 199 events, to 1e-12: beyond them a Poisson of rate below 50 has less."""
    entry = get_entry("poisson-mixture").example(2, seed=3)
    assert float(entry.rates.detach().max()) < 50
    counts = torch.arange(200.0, dtype=torch.float64)
    probability = entry.log_evidence(torch.cartesian_prod(counts, counts)).detach().exp()
    assert abs(float(probability.sum()) - 1) <= 1e-12
    assert abs(float(probability[1:].sum()) - 1) > 1e-12


def test_enumeration_by_pyro_is_a_second_oracle() -> None:
    """TraceEnum_ELBO with an empty guide sums out the component: -log p(x), to 1e-9 relative."""
    entry = get_entry("poisson-mixture").example(seed=2)
    x, _ = entry.simulate(30, seed=3)
    with isolated(0), torch.no_grad():
        loss = TraceEnum_ELBO(max_plate_nesting=1).loss(config_enumerate(entry), lambda batch: None, Batch.full(x))
        assert -loss == pytest.approx(float(entry.log_evidence(x).sum()), rel=1e-9)
        assert -loss != pytest.approx(float(entry.log_evidence(x + 1).sum()), rel=1e-9)
        pyro.get_param_store().clear()


def test_death_notices_reach_the_published_maximum() -> None:
    """Weights and rates of Hasselblad's data in print to four digits (Lange, Applied Probability, section 2.5).

    π = 0.3599 and λ = 1.2561, 2.6634, at log p(x) = -1989.946 (half a unit of the last digit each).
    """
    x = death_notices()
    fit = ez.fit("poisson-mixture", x, method="em", components=2, restarts=1, tolerance=1e-13)
    order = fit.entry.rates.detach()[:, 0].argsort()
    found = torch.cat([fit.entry.weights.detach()[order][:1], fit.entry.rates.detach()[order, 0]])
    assert fit.converged
    assert (found - torch.tensor([0.3599, 1.2561, 2.6634])).abs().max() <= 6e-5
    assert fit.log_evidence().value == pytest.approx(-1989.946, abs=5e-4)
    # Negative control: one Poisson is 11 nats below.
    one = ez.fit("poisson-mixture", x, method="em", components=1)
    assert one.log_evidence().value != pytest.approx(-1989.946, abs=5e-4)


def test_a_mixture_of_one_has_the_columns_means() -> None:
    """The Poisson of the mean, whose likelihood SciPy knows (1e-9 relative); with two components it is higher."""
    x = death_notices()
    fit = ez.fit("poisson-mixture", x, method="em", components=1)
    closed = stats.poisson.logpmf(x.numpy(), float(x.mean())).sum()
    assert fit.log_evidence().value == pytest.approx(closed, rel=1e-9)
    assert float(fit.entry.rates.detach()) == pytest.approx(float(x.mean()), rel=1e-12)
    two = ez.fit("poisson-mixture", x, method="em", components=2, restarts=1)
    assert two.log_evidence().value != pytest.approx(closed, rel=1e-9)


def test_equal_rates_are_one_poisson_and_labels_carry_no_order() -> None:
    """Equal rates: the evidence of one Poisson, whatever the weights; renamed components change nothing (1e-12)."""
    entry = get_entry("poisson-mixture").example(seed=5)
    x, _ = entry.simulate(20, seed=6)
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        evidence, responsibilities = entry.log_evidence(x), entry.posterior(x).probs
        single = torch.from_numpy(stats.poisson.logpmf(x.numpy(), entry.rates[0].numpy()).sum(-1))
        assert not torch.allclose(evidence, single, rtol=1e-12)
        entry.weights, _ = entry.weights[order], entry.log_excess.copy_(entry.log_excess[order])
        assert torch.allclose(entry.log_evidence(x), evidence, rtol=1e-12)
        assert torch.allclose(entry.posterior(x).probs, responsibilities[:, order], rtol=0, atol=1e-12)
        assert not torch.allclose(entry.posterior(x).probs, responsibilities, rtol=0, atol=1e-12)
        entry.log_excess.copy_(entry.log_excess[1].expand_as(entry.log_excess))
        assert torch.allclose(entry.log_evidence(x), single, rtol=1e-12)


def test_raising_to_the_floor_is_the_exact_maximiser_under_it() -> None:
    """No admissible λ has a larger expected log-likelihood than the M step's; adding the floor is worse."""
    floor = 1.5
    entry = get_entry("poisson-mixture").from_data(death_notices(), components=2, floor=floor)
    x = death_notices()
    with torch.no_grad():
        statistics = entry.expected_statistics(x)
        entry.maximize(statistics)
        rates = entry.rates.detach()

    def expected(lam: Tensor) -> Tensor:
        return (statistics.sums * lam.log() - statistics.counts[:, None] * lam).sum((-1, -2))

    # On the floor to rounding.
    assert float(rates.min()) == pytest.approx(floor, abs=1e-12)
    others = floor + 10 * torch.rand(2000, 2, 1, dtype=torch.float64)
    near = (rates + 0.01 * torch.randn(2000, 2, 1, dtype=torch.float64)).clamp(min=floor)
    assert (expected(torch.cat([others, near])) <= expected(rates)).all()
    unbounded = statistics.sums / statistics.counts[:, None]
    assert expected(unbounded) > expected(rates) > expected(floor + unbounded)


def test_a_column_without_events_costs_the_floor_and_changes_nothing_else() -> None:
    """Its share of log p(x) is -N floor, to the 1e-6 nats that EM may leave.

    A new datum with an event there stays possible: the event costs the log of the floor (1e-9 nats).
    """
    x = death_notices()
    more = torch.cat([x, torch.zeros_like(x)], 1)
    plain = ez.fit("poisson-mixture", x, method="em", components=2, restarts=1, floor=1e-4, tolerance=1e-11)
    wide = ez.fit("poisson-mixture", more, method="em", components=2, restarts=1, floor=1e-4, tolerance=1e-11)
    difference = wide.log_evidence().value - plain.log_evidence().value
    assert difference == pytest.approx(-1e-4 * len(x), abs=1e-6)
    assert difference != pytest.approx(0, abs=1e-6)
    event = more[:1] + torch.tensor([0.0, 1.0])
    surprise = float((wide.entry.log_evidence(more[:1]) - wide.entry.log_evidence(event)).detach())
    assert surprise == pytest.approx(-math.log(1e-4), abs=1e-9)


@pytest.mark.parametrize("components", [1, 3, 10])
def test_counts_that_are_all_zero_have_their_closed_likelihood(components: int) -> None:
    """Log p(x) = -N D floor whatever the number of components, to 1e-9 nats, and every figure is finite."""
    x = torch.zeros(10, 3).double()
    fit = ez.fit("poisson-mixture", x, method="em", components=components)
    assert fit.log_evidence().value == pytest.approx(-30e-6, abs=1e-9)
    assert fit.log_evidence().value != pytest.approx(-30e-5, abs=1e-9)
    assert torch.isfinite(fit.transform()).all() and torch.isfinite(fit.entry.weights).all()


def test_duplicates_and_a_far_outlier_stay_finite() -> None:
    """More components than clusters; the outlier has a component of its own, whose rate is its count (1e-6)."""
    x = torch.cat([torch.zeros(10, 2), torch.full((10, 2), 7.0), torch.full((1, 2), 1e6)]).double()
    fit = ez.fit("poisson-mixture", x, method="em", components=6, restarts=3)
    assert torch.isfinite(fit.score_samples()).all()
    assert float(fit.entry.weights.detach().sum()) == pytest.approx(1.0, abs=1e-12)
    assert float(fit.entry.rates.detach().max()) == pytest.approx(1e6, rel=1e-6)
    assert float(fit.entry.rates.detach().min()) < 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1.0, "the value -1 in column 1 "),
        (0.5, r"the value 0\.5 in"),
        (math.nan, "value nan"),
        (math.inf, "value inf"),
    ],
)
def test_what_is_no_count_is_refused(value: float, message: str) -> None:
    """One clear line; the same rows with a count there are taken."""
    x = death_notices()
    x[5, 0] = value
    with pytest.raises(InvalidInput, match=message + r".*expected counts"):
        get_entry("poisson-mixture").from_data(x)
    x[5, 0] = 3
    get_entry("poisson-mixture").from_data(x)


def test_more_components_than_rows_are_refused() -> None:
    """One component per row is the most."""
    x = death_notices()[:4]
    with pytest.raises(InvalidInput, match="found 5 for 4 rows"):
        get_entry("poisson-mixture").from_data(x, components=5)
    get_entry("poisson-mixture").from_data(x, components=4)

"""Mixture of Bernoullis against SciPy, the sum over all patterns, enumeration by Pyro and published latent classes."""

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
from elbozoo.models.bernoulli_mixture import BernoulliMixture
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.isolation import isolated

# Answers of 216 students to four conflicts between duty and friendship: 0 universalistic, 1 particularistic
# (Stouffer & Toby 1951; frequencies as in Goodman 1974, table 2). The last answer changes fastest.
ROLE_CONFLICT = [42, 23, 6, 25, 6, 24, 7, 38, 1, 4, 1, 6, 2, 9, 2, 20]


def patterns(columns: int) -> Tensor:
    """All 2^D rows of zeros and ones, (2^D, D)."""
    bits = torch.arange(2**columns)[:, None] >> torch.arange(columns - 1, -1, -1)
    return (bits & 1).double()


def role_conflict() -> Tensor:
    return patterns(4).repeat_interleave(torch.tensor(ROLE_CONFLICT), 0)


def scipy_log_evidence(weights: np.ndarray, probs: np.ndarray, x: np.ndarray) -> np.ndarray:
    terms = [np.log(w) + stats.bernoulli.logpmf(x, p).sum(-1) for w, p in zip(weights, probs, strict=True)]
    return logsumexp(terms, axis=0)


def test_evidence_is_the_sum_over_classes() -> None:
    """Against SciPy's Bernoulli, to 1e-10 nats per datum: rounding of a few logarithms."""
    entry = get_entry("bernoulli-mixture").example(seed=1, components=4)
    x, _ = entry.simulate(50, seed=2)
    weights, probs = entry.weights.detach().numpy(), entry.probs.detach().numpy()
    found = entry.log_evidence(x).detach().numpy()
    assert np.abs(found - scipy_log_evidence(weights, probs, x.numpy())).max() <= 1e-10
    assert np.abs(found - scipy_log_evidence(weights, 0.999 * probs, x.numpy())).max() > 1e-10


def test_probabilities_of_all_patterns_add_up_to_one() -> None:
    """To 1e-12, 256 terms in float64; without the rarest pattern they do not."""
    entry = get_entry("bernoulli-mixture").example(8, seed=3)
    probability = entry.log_evidence(patterns(8)).detach().exp()
    assert abs(float(probability.sum()) - 1) <= 1e-12
    assert abs(float(probability.sum() - probability.min()) - 1) > 1e-12


def test_enumeration_by_pyro_is_a_second_oracle() -> None:
    """TraceEnum_ELBO with an empty guide sums out the class: -log p(x), to 1e-9 relative."""
    entry = get_entry("bernoulli-mixture").example(seed=2)
    x, _ = entry.simulate(30, seed=3)
    with isolated(0), torch.no_grad():
        loss = TraceEnum_ELBO(max_plate_nesting=1).loss(config_enumerate(entry), lambda batch: None, Batch.full(x))
        assert -loss == pytest.approx(float(entry.log_evidence(x).sum()), rel=1e-9)
        assert -loss != pytest.approx(float(entry.log_evidence(1 - x).sum()), rel=1e-9)
        pyro.get_param_store().clear()


@pytest.mark.parametrize(("components", "published"), [(1, -543.6498), (2, -504.4677), (3, -503.3011)])
def test_latent_classes_of_role_conflict_have_the_published_likelihood(components: int, published: float) -> None:
    """Maxima printed for these data by the R package poLCA (Linzer & Lewis 2011).

    To half a unit of their last digit, 5e-5 nats, and what EM says it left, 1e-7 per datum.
    """
    x = role_conflict()
    tolerance = 5e-5 + 1e-7 * len(x)
    fit = ez.fit("bernoulli-mixture", x, method="em", components=components, restarts=2, tolerance=1e-7)
    assert fit.converged
    assert abs(fit.log_evidence().value - published) <= tolerance
    assert abs(fit.trajectory["log_evidence"].iloc[0] - published) > tolerance


def test_latent_classes_of_role_conflict_are_goodmans() -> None:
    """Shares and probabilities of Goodman (1974), model H1, in print to three digits; G² and X² of poLCA to 1e-5."""
    x = role_conflict()
    fit = ez.fit("bernoulli-mixture", x, method="em", components=2, restarts=2, tolerance=1e-11)
    order = fit.entry.weights.detach().argsort()
    weights, universalistic = fit.entry.weights.detach()[order], 1 - fit.entry.probs.detach()[order]
    assert (weights - torch.tensor([0.279, 0.721])).abs().max() <= 1e-3
    published = torch.tensor([[0.993, 0.940, 0.927, 0.769], [0.714, 0.330, 0.354, 0.132]])
    assert (universalistic - published).abs().max() <= 1e-3
    assert (universalistic - published.flip(0)).abs().max() > 1e-3
    observed = torch.tensor(ROLE_CONFLICT).double()
    expected = 216 * fit.entry.log_evidence(patterns(4)).detach().exp()
    assert float(2 * (observed * (observed / expected).log()).sum()) == pytest.approx(2.719922, abs=1e-5)
    assert float(((observed - expected).square() / expected).sum()) == pytest.approx(2.719764, abs=1e-4)


def test_a_mixture_of_one_has_the_columns_means() -> None:
    """Independent columns, whose likelihood is closed (1e-9 relative); with two classes it is higher."""
    x = role_conflict()
    fit = ez.fit("bernoulli-mixture", x, method="em", components=1)
    means = x.mean(0)
    closed = float(len(x) * (torch.xlogy(means, means) + torch.xlogy(1 - means, 1 - means)).sum())
    assert fit.log_evidence().value == pytest.approx(closed, rel=1e-9)
    assert (fit.entry.probs.detach()[0] - means).abs().max() <= 1e-12
    two = ez.fit("bernoulli-mixture", x, method="em", components=2, restarts=1)
    assert two.log_evidence().value != pytest.approx(closed, rel=1e-9)


def test_labels_carry_no_order() -> None:
    """Renamed classes have the same evidence (1e-12 relative) and renamed responsibilities (1e-12)."""
    entry = get_entry("bernoulli-mixture").example(seed=5)
    x, _ = entry.simulate(20, seed=6)
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        evidence, responsibilities = entry.log_evidence(x), entry.posterior(x).probs
        entry.probs = entry.probs[order]
        assert not torch.allclose(entry.log_evidence(x), evidence, rtol=1e-12)
        entry.weights = entry.weights[order]
        assert torch.allclose(entry.log_evidence(x), evidence, rtol=1e-12)
        assert torch.allclose(entry.posterior(x).probs, responsibilities[:, order], rtol=0, atol=1e-12)
        assert not torch.allclose(entry.posterior(x).probs, responsibilities, rtol=0, atol=1e-12)


def test_clipping_is_the_exact_maximiser_under_the_floor() -> None:
    """No admissible θ has a larger expected log-likelihood than the M step's; shrinking into the bounds is worse."""
    floor = 0.15
    entry = get_entry("bernoulli-mixture").from_data(role_conflict(), components=2, floor=floor)
    x = role_conflict()
    with torch.no_grad():
        statistics = entry.expected_statistics(x)
        entry.maximize(statistics)
        probs = entry.probs.detach()

    def expected(theta: Tensor) -> Tensor:
        counts = statistics.counts[:, None]
        return (statistics.sums * theta.log() + (counts - statistics.sums) * torch.log1p(-theta)).sum((-1, -2))

    # On the floor to rounding.
    assert float(probs.min()) == pytest.approx(floor, abs=1e-12)
    others = floor + (1 - 2 * floor) * torch.rand(2000, 2, 4, dtype=torch.float64)
    near = (probs + 0.01 * torch.randn(2000, 2, 4, dtype=torch.float64)).clamp(floor, 1 - floor)
    assert (expected(torch.cat([others, near])) <= expected(probs)).all()
    unbounded = statistics.sums / statistics.counts[:, None]
    assert expected(unbounded) > expected(probs) > expected(floor + (1 - 2 * floor) * unbounded)


def test_a_constant_column_costs_the_floor_and_changes_nothing_else() -> None:
    """Its share of log p(x) is N log(1 - floor), to the 1e-6 nats that EM may leave.

    A new datum with the other answer stays possible: its column costs the log of the floor (1e-9 nats).
    """
    x = role_conflict()
    constant = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    plain = ez.fit("bernoulli-mixture", x, method="em", components=2, restarts=1, floor=1e-4, tolerance=1e-11)
    more = ez.fit("bernoulli-mixture", constant, method="em", components=2, restarts=1, floor=1e-4, tolerance=1e-11)
    difference = more.log_evidence().value - plain.log_evidence().value
    assert difference == pytest.approx(len(x) * math.log1p(-1e-4), abs=1e-6)
    assert difference != pytest.approx(0, abs=1e-6)
    unseen = torch.cat([x[:1], torch.zeros(1, 1, dtype=x.dtype)], 1)
    surprise = float((more.entry.log_evidence(constant[:1]) - more.entry.log_evidence(unseen)).detach())
    assert surprise == pytest.approx(math.log1p(-1e-4) - math.log(1e-4), abs=1e-9)


@pytest.mark.parametrize(
    ("x", "components"),
    [
        (torch.zeros(10, 3), 3),
        (torch.ones(10, 3), 1),
        (torch.zeros(3, 2), 3),
    ],
)
def test_one_pattern_has_its_closed_likelihood(x: Tensor, components: int) -> None:
    """Whatever the number of classes, log p(x) = N D log(1 - floor), to 1e-9 nats, and every figure is finite."""
    fit = ez.fit("bernoulli-mixture", x.double(), method="em", components=components)
    assert fit.log_evidence().value == pytest.approx(x.numel() * math.log1p(-1e-6), abs=1e-9)
    assert fit.log_evidence().value != pytest.approx(x.numel() * math.log1p(-1e-5), abs=1e-9)
    assert torch.isfinite(fit.transform()).all() and torch.isfinite(fit.entry.weights).all()


def test_more_classes_than_patterns_reach_the_saturated_likelihood() -> None:
    """Two patterns, five classes: log p(x) is that of the two frequencies, to the floor and to 1e-3 nats of EM."""
    x = torch.cat([torch.zeros(12, 2), torch.ones(4, 2)]).double()
    fit = ez.fit("bernoulli-mixture", x, method="em", components=5, restarts=2)
    saturated = 12 * math.log(0.75) + 4 * math.log(0.25)
    assert fit.log_evidence().value == pytest.approx(saturated, abs=1e-3)
    one = ez.fit("bernoulli-mixture", x, method="em", components=1)
    assert one.log_evidence().value != pytest.approx(saturated, abs=1e-3)
    assert torch.isfinite(fit.score_samples()).all()


def test_a_class_without_rows_keeps_its_parameters_and_is_said() -> None:
    """Rows of which a class has no share at all leave it as it was; the others move."""
    entry = get_entry("bernoulli-mixture").from_data(role_conflict(), components=2)
    assert isinstance(entry, BernoulliMixture)
    x = role_conflict()
    with torch.no_grad():
        statistics = entry.expected_statistics(x)
        assert entry.degeneracy(statistics) is None
        before = entry.probs.clone()
        entry.maximize(statistics._replace(counts=statistics.counts * torch.tensor([1.0, 0.0])))
        after = entry.probs
    assert torch.allclose(after[1], before[1], rtol=0, atol=1e-12)
    assert not torch.allclose(after[0], before[0], rtol=0, atol=1e-12)
    assert torch.isfinite(entry.log_evidence(x)).all()
    assert "components [1] lost their rows" in str(entry.degeneracy(entry.expected_statistics(x)))


@pytest.mark.parametrize(
    ("value", "message"), [(2.0, r"the value 2 in column 3 "), (0.5, r"the value 0\.5 in"), (math.nan, "the value nan")]
)
def test_what_is_not_binary_is_refused(value: float, message: str) -> None:
    """One clear line; the same rows with a 1 there are taken."""
    x = role_conflict()
    x[5, 2] = value
    with pytest.raises(InvalidInput, match=message + r".*expected 0 or 1"):
        get_entry("bernoulli-mixture").from_data(x)
    x[5, 2] = 1
    get_entry("bernoulli-mixture").from_data(x)


def test_more_classes_than_rows_are_refused() -> None:
    """One class per row is the most."""
    x = role_conflict()[:4]
    with pytest.raises(InvalidInput, match="found 5 for 4 rows"):
        get_entry("bernoulli-mixture").from_data(x, components=5)
    get_entry("bernoulli-mixture").from_data(x, components=4)

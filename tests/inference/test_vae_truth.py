"""The VAE against the exact answer: two latent dimensions on the 1,797 binary digits, trained for real."""

from __future__ import annotations

import math

import pytest
import torch

import elbozoo as ez
from elbozoo.guides.base import Guide, GuideOptions
from elbozoo.guides.registry import build_guide
from elbozoo.inference import evidence as evidence_module
from elbozoo.inference.best_flow import best_flow
from elbozoo.inference.best_member import best_member
from elbozoo.inference.evidence import log_evidence
from elbozoo.inference.fit import Fit
from elbozoo.inference.ledger import Ledger, elbo_estimate
from elbozoo.inference.weights import importance_weights, iwae
from elbozoo.models import Batch
from elbozoo.models.contract.isolation import isolated

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("vae")]


@pytest.fixture(scope="module")
def fit() -> Fit:
    """A VAE with the classic encoder, trained until it converges."""
    return ez.fit("vae", "digits-binary", guide="amortized", latent_dim=2, steps=4000, progress=False)


@pytest.fixture(scope="module")
def ledger(fit: Fit) -> Ledger:
    """Its ledger."""
    return fit.full_ledger()


def bound(fit: Fit, guide: Guide, x: torch.Tensor) -> tuple[float, float]:
    """ELBO of a guide on the rows ``x`` at the θ of the fit, with its standard error: total nats."""
    return elbo_estimate(importance_weights(fit.entry, guide, Batch.full(x), 2000, seed=1))


def grid_evidence(fit: Fit, x: torch.Tensor, points: int, radius: float) -> torch.Tensor:
    """Sum over a plain grid, from the decoder's logits alone: shares no code with the quadrature that it checks."""
    axis = torch.linspace(-radius, radius, points, dtype=torch.float64)
    nodes = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        probability = fit.entry.decode(nodes)
        log_likelihood = x @ probability.log().mT + (1 - x) @ (-probability).log1p().mT
    log_prior = torch.distributions.Normal(0.0, 1.0).log_prob(nodes).sum(-1)
    return torch.logsumexp(log_likelihood + log_prior, -1) + 2 * torch.log(axis[1] - axis[0])


def test_quadrature_error_is_honest(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 1e-4 nats per datum; a finer rule and an independent grid agree within it; too coarse a grid does not."""
    x = fit.x[::4]
    found, rows = log_evidence(fit.entry, x), len(x)
    assert found.kind == "quadrature" and 0 < found.standard_error <= 1e-4 * rows
    monkeypatch.setattr(evidence_module, "QUADRATURE_TOLERANCE", 1e-8)
    finer = log_evidence(fit.entry, x[::3])
    assert finer.standard_error < found.standard_error / 10
    assert abs(finer.value - float(found.per_datum[::3].sum())) <= found.standard_error
    independent = float(grid_evidence(fit, x, 401, 8.0).sum())
    assert abs(independent - found.value) <= found.standard_error + 1e-6 * rows
    coarse = float(grid_evidence(fit, x, 21, 8.0).sum())
    assert abs(coarse - found.value) > found.standard_error + 1e-6 * rows


def test_bounds_are_ordered(fit: Fit, ledger: Ledger) -> None:
    """ELBO <= IWAE-5 <= IWAE-50 <= log p(x), each within six standard errors of the ELBO; strict in a trained fit."""
    weights = importance_weights(fit.entry, fit.guide, Batch.full(fit.x), 1000, seed=11)
    iwae_5, iwae_50 = float(iwae(weights, 5).sum()), float(iwae(weights, 50).sum())
    error = 6 * ledger.elbo_se
    assert ledger.elbo <= iwae_5 + error and iwae_5 <= iwae_50 + error
    assert iwae_50 <= ledger.log_evidence + error + ledger.log_evidence_se
    assert ledger.elbo < ledger.log_evidence - error
    assert ledger.elbo > -20.5 * ledger.rows


def test_the_three_gaps_add_up(fit: Fit, ledger: Ledger) -> None:
    """And each is positive: one encoder for all data costs, and a diagonal normal is not the posterior."""
    total = ledger.elbo + ledger.amortization_gap + ledger.approximation_gap
    assert total == pytest.approx(ledger.log_evidence, rel=1e-12)
    assert ledger.best_member_converged
    assert ledger.approximation_gap > 6 * ledger.elbo_se
    assert ledger.amortization_gap > 0
    few = fit.x[:50]
    truth = log_evidence(fit.entry, few).value
    assert fit.full_ledger(few, best_known=truth + 10.0).learning_gap == pytest.approx(10.0)


def test_a_richer_family_has_a_smaller_approximation_gap(fit: Fit, ledger: Ledger) -> None:
    """At the same θ the best full-rank normal is closer than the best diagonal one, by more than the errors."""
    best = best_member(fit.entry, "full-rank-normal", fit.x, GuideOptions())
    value, error = elbo_estimate(importance_weights(fit.entry, best.guide, Batch.full(fit.x), 1000, seed=3))
    assert ledger.log_evidence - value < ledger.approximation_gap - 6 * error
    assert value <= ledger.log_evidence + 6 * error


def test_the_flows_approximation_gap_is_below_the_diagonal_normals(fit: Fit) -> None:
    """At the same θ, on 60 rows, by more than six standard errors, and above zero; before its search it is not."""
    x = fit.x[:60]
    options = GuideOptions()
    with isolated(0):
        guide = build_guide("amortized-flow", fit.entry, x, options).double()
    evidence = log_evidence(fit.entry, x)
    flow = bound(fit, best_flow(fit.entry, guide, x, options).guide, x)
    diagonal = bound(fit, best_member(fit.entry, "diagonal-normal", x, options).guide, x)
    error = 6 * math.hypot(flow[1], diagonal[1])
    assert flow[0] <= evidence.value + 6 * flow[1] + evidence.standard_error
    assert flow[0] > diagonal[0] + error
    untrained = bound(fit, guide, x)
    assert not untrained[0] > diagonal[0] + error


def test_monte_carlo_em_learns_what_amortization_misses(ledger: Ledger) -> None:
    """Posterior draws in the E step, gradients in the M step: the evidence climbs from its start, and is no bound."""
    em = ez.fit("vae", "digits-binary", method="em", latent_dim=2, iterations=150, progress=False)
    assert em.trajectory["elbo"].isna().all()
    start = ez.fit("vae", "digits-binary", method="em", latent_dim=2, iterations=1, progress=False)
    assert em.log_evidence().value > start.log_evidence().value + 2.0 * ledger.rows
    figures = em.full_ledger()
    assert figures.elbo <= figures.log_evidence + 6 * figures.elbo_se
    assert abs(figures.amortization_gap) <= 6 * figures.elbo_se + 0.01 * figures.rows


def test_more_than_two_dimensions_are_estimated_and_said_so() -> None:
    """Three dimensions have no quadrature: the kind is `estimate`, with a standard error."""
    fit = ez.fit("vae", "digits-binary", guide="amortized", latent_dim=3, steps=300, progress=False)
    found = fit.log_evidence()
    assert found.kind == "estimate" and found.standard_error > 0
    assert fit.elbo() < found.value

"""The search for the best member of a family, against its closed form where the posterior is normal."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

import elbozoo as ez
from elbozoo.guides.base import GuideOptions
from elbozoo.inference.best_member import best_member, gaussian_nodes
from elbozoo.inference.divergence import kl_to_posterior
from elbozoo.models import Entry, get_entry
from elbozoo.models.contract.entry import Program


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
    assert best is not None and best.converged and best.method == "Adam"
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

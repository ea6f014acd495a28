"""Evidence of programs with finite latents beside real ones: a sum at each point of an integral."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro import distributions as dist
from torch import Tensor

from elbozoo.inference.estimators import estimate_log_evidence
from elbozoo.inference.evidence import log_evidence
from elbozoo.inference.method import program_entry
from elbozoo.models import Batch, get_entry
from elbozoo.models.contract.entry import capabilities, supports_quadrature


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_quadrature_of_a_mixture_of_factor_analyzers_is_its_oracle(latent_dim: int) -> None:
    """Within the error it states and 1e-5 nats per datum of the closed form, which knows nothing of either rule."""
    entry = get_entry("mixture-of-factor-analyzers").example(columns=4, seed=1, latent_dim=latent_dim, components=3)
    x, _ = entry.simulate(12, seed=2)
    with torch.no_grad():
        truth = entry.log_evidence(x)
    assert "quadrature" in capabilities(entry)
    found = estimate_log_evidence(entry, x, "quadrature")
    assert found.kind == "quadrature" and found.reliable and found.per_datum is not None
    assert (found.per_datum - truth).abs().max() <= 1e-5
    assert abs(found.value - float(truth.sum())) <= found.standard_error + 1e-9 * abs(float(truth.sum()))
    with torch.no_grad():
        entry.loadings[0] *= 1.01
        assert (found.per_datum - entry.log_evidence(x)).abs().max() > 1e-5  # negative control


def two_finite_sites(batch: Batch) -> Tensor:
    """x = 2 c + d + z + noise with c one of two values, d one of three, z ~ N(0, 1)."""
    first, second = torch.tensor([0.3, 0.7]).double(), torch.tensor([0.2, 0.5, 0.3]).double()
    with pyro.plate("data", batch.total, subsample=batch.index):
        c = pyro.sample("c", dist.Categorical(first))
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0).double(), 1.0))
        d = pyro.sample("d", dist.Categorical(second))
        return pyro.sample("x", dist.Normal((2 * c + d + z)[..., None], 0.5).to_event(1), obs=batch.x)


def test_several_finite_sites_are_summed_over_together() -> None:
    """log Σ_cd p(c) p(d) N(x; 2c + d, 1 + ½²) by hand, 1e-6 nats; without one of the six terms it is another number."""
    x = torch.tensor([[-1.0], [0.4], [2.5], [5.0]], dtype=torch.float64)
    evidence = log_evidence(program_entry(two_finite_sites, x), x)
    weights = (torch.tensor([[0.3], [0.7]]) * torch.tensor([0.2, 0.5, 0.3])).double()
    means = 2 * torch.arange(2)[:, None] + torch.arange(3)
    terms = weights.log() + torch.distributions.Normal(means.double(), 1.25**0.5).log_prob(x[..., None])
    assert evidence is not None and evidence.kind == "quadrature" and evidence.per_datum is not None
    # The weights by hand were rounded to float32.
    assert (evidence.per_datum - terms.flatten(1).logsumexp(-1)).abs().max() <= 1e-6
    assert (evidence.per_datum - terms.flatten(1)[:, 1:].logsumexp(-1)).abs().max() > 1e-3


def test_too_many_values_are_not_summed_over() -> None:
    """Ten sites of two values have 1024 together; finite latents of all data, and paths of them, are no sum either."""

    def many(count: int) -> object:
        def program(batch: Batch) -> None:
            with pyro.plate("data", batch.total, subsample=batch.index):
                z = pyro.sample("z", dist.Normal(torch.tensor(0.0).double(), 1.0))
                for i in range(count):
                    pyro.sample(f"c{i}", dist.Categorical(torch.ones(2).double() / 2))
                pyro.sample("x", dist.Normal(z[..., None], 1.0).to_event(1), obs=batch.x)

        return program

    x = torch.zeros(3, 1).double()
    assert supports_quadrature(program_entry(many(9), x).latent_sites(x))
    assert not supports_quadrature(program_entry(many(10), x).latent_sites(x))
    for name in ("gaussian-mixture", "bayesian-gaussian-mixture", "hidden-markov-model"):
        assert not supports_quadrature(get_entry(name).example().latent_sites())

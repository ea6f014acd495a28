"""KL(q ‖ posterior) where the posterior is known: a second opinion on the gap, from no evidence at all."""

from __future__ import annotations

from typing import NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, MultivariateNormal, Normal
from torch.distributions.kl import kl_divergence

from elbozoo.guides.base import Guide
from elbozoo.guides.local import ExactGuide
from elbozoo.guides.whole import WholeGuide
from elbozoo.inference.weights import PARTICLE_DIM
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry, HasPosterior, joint_posterior
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.contract.joint import Joint
from elbozoo.models.contract.sites import stochastic_nodes

PARTICLES = 2000


class Divergence(NamedTuple):
    """KL divergence, nats over all data, with its standard error (zero in closed form)."""

    value: float
    standard_error: float


def kl_to_posterior(entry: Entry, guide: Guide, x: Tensor, seed: int) -> Divergence | None:
    """Return KL(q ‖ p(z given x)) summed over the rows, or None where the posterior or q has no density."""
    if not isinstance(entry, HasPosterior) or not guide.is_bound:
        return None
    batch = Batch.full(x)
    with isolated(seed), torch.no_grad():
        posterior = joint_posterior(entry, x, entry.latent_sites(x))
        if not guide.is_local:
            return _by_draws(guide, posterior, batch)
        exact = isinstance(guide, ExactGuide)
        if isinstance(guide, WholeGuide):
            q = Joint(guide.conditionals(batch))
        else:
            q = guide.posterior(batch) if exact else Joint(guide.distributions(batch))
        if not q.conditionals:
            return Divergence(0.0, 0.0)
        if len(q.conditionals) == 1:
            ((mine, truth),) = zip(q.conditionals.values(), posterior.conditionals.values(), strict=True)
            assert isinstance(mine, Distribution) and isinstance(truth, Distribution)
            try:
                return Divergence(float(closed_form_kl(mine, truth).sum()), 0.0)
            except NotImplementedError:
                pass
        return _by_draws_of_rows(q, posterior)


def _by_draws(guide: Guide, posterior: Joint, batch: Batch) -> Divergence:
    with pyro.plate("particles", PARTICLES, dim=PARTICLE_DIM):
        trace = poutine.trace(guide).get_trace(batch)
    trace.compute_log_prob()
    difference = torch.zeros(PARTICLES, dtype=batch.x.dtype)
    for _, node in stochastic_nodes(trace):
        difference += node["log_prob"].reshape(PARTICLES)
    values = {name: trace.nodes[name]["value"] for name in posterior.conditionals}
    difference -= posterior.log_prob({name: _drawn(value) for name, value in values.items()})
    return Divergence(float(difference.mean()), float(difference.std() / PARTICLES**0.5))


def _drawn(value: Tensor) -> Tensor:
    # Without the dimension of the data plate, in which a global latent does not vary.
    return value.reshape(PARTICLES, *value.shape[2:])


def _by_draws_of_rows(q: Joint, posterior: Joint) -> Divergence:
    z = q.sample((PARTICLES,))
    difference = q.log_prob(z) - posterior.log_prob(z)
    return Divergence(float(difference.mean(0).sum()), float((difference.var(0) / PARTICLES).sum().sqrt()))


def closed_form_kl(q: Distribution, posterior: Distribution) -> Tensor:
    """KL(q ‖ posterior) of each row in nats; raises ``NotImplementedError`` where no closed form is known."""
    if isinstance(q, Categorical) and isinstance(posterior, Categorical):
        # PyTorch says infinity where a posterior probability underflows, although its logarithm is still finite.
        terms = q.probs * (q.logits - posterior.logits)
        return torch.where(q.probs > 0, terms, torch.zeros_like(terms)).sum(-1)
    divergence: Tensor = kl_divergence(_plain(q), _plain(posterior))
    return divergence


def _plain(distribution: Distribution) -> Distribution:
    # PyTorch has closed forms between multivariate normals, and none between one and independent normals.
    if isinstance(distribution, Independent) and isinstance(distribution.base_dist, Normal):
        return MultivariateNormal(distribution.mean, scale_tril=torch.diag_embed(distribution.stddev))
    return distribution

"""The ELBO of each row as a function of the parameters of its q, on noise that is given."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import pyro
import torch
from pyro import poutine
from scipy.stats import norm, qmc
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
)

from elbozoo.guides.families import Delta, Family, LowRankNormal
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.isolation import private_parameters
from elbozoo.models.contract.sites import log_density

Parameters = dict[str, Tensor]


def noise_dim(families: Mapping[str, Family]) -> int:
    """Return how many standard normal numbers one joint draw of ``families`` takes."""
    return sum(_noise_of(family) for family in families.values())


def refusal_of_sum(finite: Sequence[str]) -> str | None:
    """Say why :func:`row_elbo` cannot serve a program with these ``finite`` sites, or return None."""
    if len(finite) <= 1:
        return None
    return f"the latents {', '.join(map(repr, finite))} are finite, and the sum over all of their values is long"


def row_elbo(
    entry: Entry, families: Mapping[str, Family], batch: Batch, parameters: Mapping[str, Tensor], noise: Tensor
) -> Tensor:
    """ELBO of each row, (B,), nats: the mean over draws of the continuous sites, the sum over a finite one.

    It is differentiable in the parameters of q and of the model; the densities of points are those of log p(x, z).

    Parameters
    ----------
    families : mapping of Family
        The family of each latent site, at most one of them over finitely many values.
    parameters : mapping of Tensor (B, P)
        The parameters of q of each site.
    noise : Tensor (S, noise_dim)
        Draws of the standard normal, the same for each row: a row's ELBO does not depend on the others.
    """
    draws, rows = len(noise), len(batch.x)
    values: dict[str, Tensor] = {}
    entropy = batch.x.new_zeros(draws, rows)
    probability, log_probability = batch.x.new_ones(rows, 1), batch.x.new_zeros(rows, 1)
    start = 0
    for site, family in families.items():
        if family.discrete:
            log_probability = parameters[site].log_softmax(-1)
            probability = log_probability.exp()
            continue
        q = family.distribution(parameters[site])
        stop = start + _noise_of(family)
        value = placed(q, noise[:, None, start:stop].expand(-1, rows, -1))
        values[site] = value
        if not isinstance(family, Delta):
            entropy = entropy - q.log_prob(value)
        start = stop
    log_joint = _log_joint(entry, families, batch, values, draws, log_probability.shape[-1])
    # (C, S, B): mean over the draws first, then the sum over the finite values.
    terms = (log_joint + entropy).mean(1).mT - log_probability
    return (probability * terms).sum(-1)


def placed(q: Distribution, noise: Tensor) -> Tensor:
    """Draws of ``q`` (batch shape (B,)) from standard normal ``noise`` (S, B, noise), differentiable in its parameters.

    A flow remembers the way of its last draws, so that their density costs no inversion.
    """
    if isinstance(q, Independent):
        return placed(q.base_dist, noise)
    if isinstance(q, Normal):
        return q.loc + q.scale * noise
    if isinstance(q, MultivariateNormal):
        return q.loc + (q.scale_tril @ noise[..., None])[..., 0]
    if isinstance(q, LowRankMultivariateNormal):
        dim = q.loc.shape[-1]
        along = (q.cov_factor @ noise[..., dim:, None])[..., 0]
        return q.loc + along + q.cov_diag.sqrt() * noise[..., :dim]
    if isinstance(q, TransformedDistribution):
        value = placed(q.base_dist, noise)
        for transform in q.transforms:
            value = transform(value)
        return value
    value = q.mean
    return value.expand(len(noise), *value.shape)


def whitened_noise(draws: int, dim: int, *, seed: int, like: Tensor) -> Tensor:
    """Antithetic draws (S, dim) of the standard normal with mean zero and covariance one exactly, S >= ``draws``.

    Scrambled Sobol points, which spread more evenly than independent ones: q's entropy is exact for normals, and
    the rest of the ELBO is as good as of many more draws.
    """
    if dim == 0:
        return like.new_zeros(1, 0)
    return _whitened(draws, dim, seed).to(like)


@lru_cache(maxsize=8)
def _whitened(draws: int, dim: int, seed: int) -> Tensor:
    half = 2 ** math.ceil(math.log2(max(draws / 2, 2 * dim)))
    points = torch.from_numpy(norm.ppf(qmc.Sobol(dim, seed=seed).random(half)))
    symmetric = torch.cat([points, -points])
    factor = torch.linalg.cholesky(symmetric.mT @ symmetric / len(symmetric))
    return torch.linalg.solve_triangular(factor, symmetric.mT, upper=False).mT


def _noise_of(family: Family) -> int:
    if family.discrete or isinstance(family, Delta):
        return 0
    return family.site.dim + (family.rank if isinstance(family, LowRankNormal) else 0)


def _log_joint(
    entry: Entry, families: Mapping[str, Family], batch: Batch, values: Mapping[str, Tensor], draws: int, cases: int
) -> Tensor:
    """Log p(x, z) of each case of the finite site, draw and row, (C, S, B), nats.

    Each is a row of one long batch, so that nothing is asked of the program but to take a batch. It runs behind a
    block and with a store of its own: a guide may call this while its own trace is taken.
    """
    rows, copies = len(batch.x), draws * cases
    long = Batch(
        batch.x.repeat(copies, *[1] * (batch.x.ndim - 1)), batch.index.repeat(copies), max(batch.total, copies * rows)
    )
    latents = {site: value.repeat(cases, *[1] * (value.ndim - 1)).flatten(0, 1) for site, value in values.items()}
    for site, family in families.items():
        if family.discrete:
            latents[site] = torch.arange(cases, device=batch.x.device).repeat_interleave(draws * rows)
    with pyro.get_param_store().scope(), private_parameters(), poutine.block():
        trace = poutine.trace(poutine.condition(entry, data=latents)).get_trace(long)
    trace.compute_log_prob()
    terms = [log_density(node) for node in trace.nodes.values() if "unscaled_log_prob" in node]
    return sum(terms, batch.x.new_zeros(len(long.x))).reshape(cases, draws, rows)

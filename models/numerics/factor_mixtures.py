"""Algebra of mixtures of x = means[k] + W[k] f + e with f ~ N(0, I) and e ~ N(0, diag(variances[k])).

The algebra of one component is :mod:`elbozoo.models.numerics.linear_gaussian`, mapped over the components, so
that no D x D matrix is formed here either.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from elbozoo.models.numerics import linear_gaussian
from elbozoo.models.numerics.linear_gaussian import GaussianPosterior


class FactorMixtureStatistics(NamedTuple):
    """Expected sufficient statistics, summed over rows; r = x - means[k] and f̃ = (f, 1), weighed by p(z = k given x).

    Attributes
    ----------
    log_evidence : Tensor ()
        Sum of log p(x), nats.
    counts : Tensor (K,)
        Sum of the responsibilities.
    rr : Tensor (K, D)
        Weighted sum of r².
    rf : Tensor (K, D, L + 1)
        Weighted sum of r E[f̃]ᵀ.
    ff : Tensor (K, L + 1, L + 1)
        Weighted sum of E[f̃ f̃ᵀ].
    """

    log_evidence: Tensor
    counts: Tensor
    rr: Tensor
    rf: Tensor
    ff: Tensor


class FactorMixtureMaximum(NamedTuple):
    """What the M step finds: ``means`` (K, D), ``loadings`` (K, D, L), ``squares`` (K, D) of weighed residuals."""

    means: Tensor
    loadings: Tensor
    squares: Tensor


def log_density(
    x: Float[Tensor, "n d"],
    means: Float[Tensor, "k d"],
    loadings: Float[Tensor, "k d l"],
    variances: Float[Tensor, "k d"],
) -> Float[Tensor, "n k"]:
    """Log N(x; means[k], W[k] W[k]ᵀ + diag(variances[k])) of every row under every component, nats."""
    mapped = torch.vmap(linear_gaussian.log_density, in_dims=(None, 0, 0, 0), out_dims=-1)
    density: Tensor = mapped(x, means, loadings, variances)
    return density


def posterior(
    x: Float[Tensor, "n d"],
    means: Float[Tensor, "k d"],
    loadings: Float[Tensor, "k d l"],
    variances: Float[Tensor, "k d"],
) -> GaussianPosterior:
    """Posterior of f for each component and row: ``mean`` (K, N, L) and ``scale_tril`` (K, L, L)."""
    mapped = torch.vmap(linear_gaussian.posterior, in_dims=(None, 0, 0, 0))
    found: GaussianPosterior = mapped(x, means, loadings, variances)
    return found


def expected_statistics(
    x: Float[Tensor, "n d"],
    responsibilities: Float[Tensor, "n k"],
    log_evidence: Float[Tensor, ""],
    means: Float[Tensor, "k d"],
    loadings: Float[Tensor, "k d l"],
    variances: Float[Tensor, "k d"],
) -> FactorMixtureStatistics:
    """E step (Ghahramani & Hinton 1996, section 3)."""
    mean, scale_tril = posterior(x, means, loadings, variances)
    counts = responsibilities.sum(0)
    weight = responsibilities.mT[..., None]
    residual = x - means[:, None, :]
    augmented = torch.cat([mean, mean.new_ones(*mean.shape[:-1], 1)], -1)
    ff = (weight * augmented).mT @ augmented
    ff[:, :-1, :-1] += counts[:, None, None] * (scale_tril @ scale_tril.mT)
    return FactorMixtureStatistics(
        log_evidence,
        counts,
        (weight * residual.square()).sum(1),
        (weight * residual).mT @ augmented,
        ff,
    )


def maximize(statistics: FactorMixtureStatistics, means: Float[Tensor, "k d"]) -> FactorMixtureMaximum:
    """M step: regress x - means[k] on (f, 1) for each component, with the ``means`` that made the statistics.

    The regression is the best one whatever the noise, so noises may be shared, pooled or bounded afterwards. A
    component that has lost all its rows keeps its mean and loses its loading.
    """
    _, counts, rr, rf, ff = statistics
    present = counts > torch.finfo(counts.dtype).tiny
    scale = torch.where(present, counts, 1.0)[:, None, None]
    identity = torch.eye(ff.shape[-1], dtype=ff.dtype, device=ff.device)
    gram = torch.where(present[:, None, None], ff / scale, identity)
    coefficients = torch.linalg.solve(gram, (rf / scale).mT).mT
    squares = rr - (coefficients * rf).sum(-1)
    return FactorMixtureMaximum(means + coefficients[..., -1], coefficients[..., :-1], squares)

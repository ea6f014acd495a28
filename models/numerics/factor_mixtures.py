"""Algebra of mixtures of x = means[k] + W[k] f + e with f ~ N(0, I) and e ~ N(0, diag(variances[k])).

The algebra of one component is :mod:`elbozoo.models.numerics.linear_gaussian`, mapped over the components, so
that no D x D matrix is formed here either.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from elbozoo.models.numerics import linear_gaussian
from elbozoo.models.numerics.linear_gaussian import GaussianPosterior

CHUNK_ELEMENTS = 2**16  # numbers in the residuals of a chunk from all components: 512 KiB, which stay in the cache


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
    log_weights: Float[Tensor, " k"],
    means: Float[Tensor, "k d"],
    loadings: Float[Tensor, "k d l"],
    variances: Float[Tensor, "k d"],
) -> FactorMixtureStatistics:
    """E step (Ghahramani & Hinton 1996, section 3), in memory that does not grow with the number of rows."""
    terms = _Terms.of(log_weights, loadings, variances)
    total: FactorMixtureStatistics | None = None
    for part in x.split(max(64, CHUNK_ELEMENTS // means.numel())):
        sums = _sums(part, means, terms)
        total = sums if total is None else FactorMixtureStatistics(*map(torch.add, total, sums))
    assert total is not None
    total.ff[:, :-1, :-1] += total.counts[:, None, None] * terms.inverse
    return total


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


class _Terms(NamedTuple):
    """What the E step needs of θ for each component, once for all rows."""

    constant: Tensor  # (K, 1), log of the weight and of the normalisation
    loadings: Tensor  # (K, D, L)
    scaled: Tensor  # (K, D, L), Ψ⁻¹ W
    inverse: Tensor  # (K, L, L), covariance of f given x and z
    precision: Tensor  # (K, 1, D), 1 / ψ

    @classmethod
    def of(cls, log_weights: Tensor, loadings: Tensor, variances: Tensor) -> _Terms:
        scaled = loadings / variances[..., None]
        identity = torch.eye(loadings.shape[-1], dtype=loadings.dtype, device=loadings.device)
        factor = torch.linalg.cholesky(identity + loadings.mT @ scaled)
        log_determinant = variances.log().sum(-1) + 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = log_weights - 0.5 * (log_determinant + variances.shape[1] * math.log(2 * math.pi))
        inverse = torch.cholesky_inverse(factor)
        return cls(constant[:, None], loadings, scaled, inverse, variances.reciprocal()[:, None, :])


def _sums(x: Tensor, means: Tensor, terms: _Terms) -> FactorMixtureStatistics:
    """Sums over a chunk of rows, without the covariance of f."""
    residual = x - means[:, None, :]
    mean = residual @ terms.scaled @ terms.inverse
    left = torch.baddbmm(residual, mean, terms.loadings.mT, alpha=-1)
    quadratic = (left.square_() @ terms.precision.mT)[..., 0] + mean.square().sum(-1)
    log_joint = terms.constant - 0.5 * quadratic
    log_evidence = torch.logsumexp(log_joint, 0)
    weight = (log_joint - log_evidence).exp()
    weighted = residual * weight[..., None]
    augmented = torch.cat([mean, mean.new_ones(*mean.shape[:-1], 1)], -1)
    return FactorMixtureStatistics(
        log_evidence.sum(),
        weight.sum(-1),
        (weighted * residual).sum(1),
        weighted.mT @ augmented,
        (augmented * weight[..., None]).mT @ augmented,
    )

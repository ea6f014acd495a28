"""Algebra of x = loc + W z + e with z ~ N(0, I) and e ~ N(0, diag(variance)).

Everything goes through the K x K matrix M = I + Wᵀ diag(1/variance) W, so that the cost is linear in the
number of columns D; no D x D matrix is formed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from elbozoo.models.numerics.second_moments import SecondMoments


class GaussianPosterior(NamedTuple):
    """Posterior of z given x: ``mean`` (N, K), and ``scale_tril`` (K, K), the same for every row."""

    mean: Tensor
    scale_tril: Tensor


class LinearGaussianStatistics(NamedTuple):
    """Expected sufficient statistics, summed over rows; r = x - loc and z̃ = (z, 1).

    Attributes
    ----------
    rows : Tensor ()
        Number of rows.
    log_evidence : Tensor ()
        Sum of log p(x), nats.
    rr : Tensor (D,)
        Sum of r².
    rz : Tensor (D, K + 1)
        Sum of r E[z̃]ᵀ.
    zz : Tensor (K + 1, K + 1)
        Sum of E[z̃ z̃ᵀ].
    """

    rows: Tensor
    log_evidence: Tensor
    rr: Tensor
    rz: Tensor
    zz: Tensor


class LinearGaussianMaximum(NamedTuple):
    """What the M step finds: ``loc`` (D,), ``loading`` (D, K), ``variance`` (D,) of each column's residual."""

    loc: Tensor
    loading: Tensor
    variance: Tensor


def posterior(
    x: Float[Tensor, "n d"], loc: Float[Tensor, " d"], loading: Float[Tensor, "d k"], variance: Float[Tensor, " d"]
) -> GaussianPosterior:
    """Posterior of z for each row (Bishop 2006, equation 12.42, for a diagonal noise)."""
    factor = _precision_factor(loading, variance)
    mean = torch.cholesky_solve(loading.mT @ ((x - loc) / variance).mT, factor).mT
    return GaussianPosterior(mean, torch.linalg.cholesky(torch.cholesky_inverse(factor)))


def log_density(
    x: Float[Tensor, "n d"], loc: Float[Tensor, " d"], loading: Float[Tensor, "d k"], variance: Float[Tensor, " d"]
) -> Float[Tensor, " n"]:
    """Log N(x; loc, W Wᵀ + diag(variance)) in nats, by the determinant lemma.

    The quadratic form is written as |x - loc - W m|² / variance + |m|², with m the posterior mean: a sum of
    squares, so that nothing cancels where the noise is small.
    """
    factor = _precision_factor(loading, variance)
    residual = x - loc
    mean = torch.cholesky_solve(loading.mT @ (residual / variance).mT, factor).mT
    quadratic = ((residual - mean @ loading.mT).square() / variance).sum(-1) + mean.square().sum(-1)
    log_determinant = variance.log().sum() + 2 * factor.diagonal().log().sum()
    return -0.5 * (quadratic + log_determinant + len(loc) * math.log(2 * math.pi))


def expected_statistics(
    x: Float[Tensor, "n d"], loc: Float[Tensor, " d"], loading: Float[Tensor, "d k"], variance: Float[Tensor, " d"]
) -> LinearGaussianStatistics:
    """E step (Rubin & Thayer 1982; Tipping & Bishop 1999, equations 25 and 26)."""
    rows = torch.tensor(len(x), dtype=x.dtype, device=x.device)
    return _statistics(rows, x.new_ones(len(x)), x - loc, loading, variance)


def expected_statistics_from(
    moments: SecondMoments, loc: Float[Tensor, " d"], loading: Float[Tensor, "d k"], variance: Float[Tensor, " d"]
) -> LinearGaussianStatistics:
    """E step from the second moments of the rows: that of the few rows which stand for all."""
    ones, residual = moments.about(loc)
    return _statistics(moments.rows, ones, residual, loading, variance)


def summary_pays(rows: int, columns: int, latent_dim: int) -> bool:
    """Whether EM is cheaper from the second moments of the rows.

    They cost N D² products, once, and an E step over the rows about 6 N D K: the limit is where some hundred E steps
    would be the same; and D² numbers should be few beside the data.
    """
    return rows >= 10 * columns and columns <= 600 * latent_dim


def maximize(statistics: LinearGaussianStatistics, loc: Float[Tensor, " d"]) -> LinearGaussianMaximum:
    """M step: regress x - loc on (z, 1); ``loc`` is the one that the statistics were made with."""
    rows, _, rr, rz, zz = statistics
    coefficients = torch.linalg.solve(zz, rz.mT).mT
    variance = (rr - (coefficients * rz).sum(-1)) / rows
    return LinearGaussianMaximum(loc + coefficients[:, -1], coefficients[:, :-1], variance)


def _statistics(
    rows: Tensor, ones: Tensor, residual: Tensor, loading: Tensor, variance: Tensor
) -> LinearGaussianStatistics:
    """Sum over the rows of ``residual``, with ``ones`` in the place of the constant column."""
    factor = _precision_factor(loading, variance)
    mean = torch.cholesky_solve((residual @ (loading / variance[:, None])).mT, factor).mT
    augmented = torch.cat([mean, ones[:, None]], -1)
    zz = augmented.mT @ augmented
    quadratic = ((residual - mean @ loading.mT).square() / variance).sum() + mean.square().sum()
    log_determinant = variance.log().sum() + 2 * factor.diagonal().log().sum()
    log_evidence = -0.5 * (quadratic + rows * (log_determinant + len(loading) * math.log(2 * math.pi)))
    zz[:-1, :-1] += rows * torch.cholesky_inverse(factor)
    return LinearGaussianStatistics(rows, log_evidence, residual.square().sum(0), residual.mT @ augmented, zz)


def _precision_factor(loading: Tensor, variance: Tensor) -> Tensor:
    identity = torch.eye(loading.shape[1], dtype=loading.dtype, device=loading.device)
    return torch.linalg.cholesky(identity + loading.mT @ (loading / variance[:, None]))

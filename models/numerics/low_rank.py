"""The covariance of low rank that is nearest to a given precision.

Among the covariances Σ = F Fᵀ + diag(v) with F (K, R), the one with the smallest KL(N(0, Σ) ‖ N(0, B⁻¹)), that is of

    tr(B Σ) - log det Σ.

Two steps in turn, each an exact minimum over its block, so that the divergence never rises. In units in which v is
one, the best F given v has columns along the eigenvectors of B with the smallest eigenvalues b < 1, where Σ takes the
variance 1/b: the argument of Tipping & Bishop (1999, "Probabilistic principal component analysis", appendix A) with
the roles of the two covariances exchanged. One element of v given the rest adds δ to one element of the diagonal, which
costs B_ii δ and gains log(1 + δ (Σ⁻¹)_ii) by the matrix determinant lemma: δ = 1/B_ii - 1/(Σ⁻¹)_ii.

What goes wrong: a local minimum, as in factor analysis; an element of v may fall to zero, and is kept above
``SMALLEST`` of what it would be alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

SMALLEST = 1e-6  # share of 1/B_ii below which no variance falls


class LowRankCovariance(NamedTuple):
    """Covariances F Fᵀ + diag(v): ``variance`` v (N, K) and ``factor`` F (N, K, R)."""

    variance: Tensor
    factor: Tensor

    def dense(self) -> Tensor:
        """Return them as matrices, (N, K, K)."""
        return torch.diag_embed(self.variance) + self.factor @ self.factor.mT


def nearest_low_rank(
    precision: Float[Tensor, "n k k"], variance: Float[Tensor, "n k"], rank: int, *, sweeps: int
) -> LowRankCovariance:
    """Return the covariance of ``rank`` near to each ``precision`` B, after so many sweeps over both blocks.

    Parameters
    ----------
    precision : Tensor (N, K, K)
        B, positive definite.
    variance : Tensor (N, K)
        v to start from, positive.
    rank : int
        R, from 0 to K.
    sweeps : int
        How often both blocks are set to their minima.
    """
    smallest = SMALLEST / precision.diagonal(dim1=-2, dim2=-1)
    found = LowRankCovariance(variance, _best_factor(precision, variance, rank))
    for _ in range(sweeps):
        variance = _best_variance(precision, found, smallest)
        found = LowRankCovariance(variance, _best_factor(precision, variance, rank))
    return found


def _best_factor(precision: Tensor, variance: Tensor, rank: int) -> Tensor:
    """Return the best F given v."""
    scale = variance.sqrt()
    eigenvalues, eigenvectors = torch.linalg.eigh(scale[:, :, None] * precision * scale[:, None])
    lengths = (1 / eigenvalues[:, :rank] - 1).clamp(min=0).sqrt()
    return scale[:, :, None] * eigenvectors[:, :, :rank] * lengths[:, None]


def _best_variance(precision: Tensor, now: LowRankCovariance, smallest: Tensor) -> Tensor:
    """Return v with each element in turn at its best given F and the others."""
    variance, inverse = now.variance.clone(), torch.linalg.inv(now.dense())
    for i in range(variance.shape[1]):
        wanted = variance[:, i] + 1 / precision[:, i, i] - 1 / inverse[:, i, i]
        wanted = torch.maximum(wanted, smallest[:, i])
        step = wanted - variance[:, i]
        column = inverse[:, :, i]
        share = step / (1 + step * inverse[:, i, i])
        inverse = inverse - share[:, None, None] * column[:, :, None] * column[:, None]
        variance[:, i] = wanted
    return variance

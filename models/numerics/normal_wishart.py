"""Algebra of the normal–Wishart distribution, the conjugate prior of a normal's mean and precision.

    Λ ~ Wishart(W, ν),    μ | Λ ~ N(m, (β Λ)⁻¹)

W is kept as its inverse, the *inverse scale* W⁻¹, a scatter matrix in squared units of the data: data add to it, and
only its Cholesky factor is ever needed. Two kinds: ``full``, and ``diagonal``, where Λ is diagonal and each column has
a Wishart of one dimension, Gamma(ν / 2, w / 2), with an inverse scale w of its own. K distributions at once
throughout; the numbers of equations are those of Bishop (2006).
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

LOG_2, LOG_PI, LOG_2PI = math.log(2), math.log(math.pi), math.log(2 * math.pi)


class NormalWishart(NamedTuple):
    """Parameters of K normal–Wishart distributions over D columns.

    Attributes
    ----------
    mean_precision : Tensor (K,)
        β, the number of data that the mean is worth.
    mean : Tensor (K, D)
        m.
    degrees_of_freedom : Tensor (K,)
        ν.
    inverse_scale : Tensor (K, D, D), or (K, D) where Λ is diagonal
        W⁻¹, squared units of the data; E[Λ] = ν W.
    """

    mean_precision: Tensor
    mean: Tensor
    degrees_of_freedom: Tensor
    inverse_scale: Tensor


@runtime_checkable
class PrecisionKind(Protocol):
    """What differs between precision matrices of any shape and diagonal ones."""

    def width(self, columns: int) -> int:
        """Dimension p of each Wishart."""
        ...

    def covariance(self, x: Tensor) -> Tensor:
        """Unbiased covariance of the rows, in the shape of one inverse scale."""
        ...

    def isotropic(self, variance: float, like: Tensor) -> Tensor:
        """Inverse scale with ``variance`` in every column, for the columns of the vector ``like``."""
        ...

    def scatter(self, x: Tensor, mean: Tensor, responsibilities: Tensor) -> Tensor:
        """Weighted squares about ``mean``, summed over rows, in the shape of the inverse scale."""
        ...

    def squares(self, residual: Tensor, inverse_scale: Tensor) -> Tensor:
        """Return rᵀ W r of every vector under every distribution, (K, N), for residuals (K, N, D)."""
        ...

    def trace(self, other: Tensor, inverse_scale: Tensor) -> Tensor:
        """tr(A W), (K,), for one matrix A in the shape of an inverse scale."""
        ...

    def log_determinant(self, inverse_scale: Tensor) -> Tensor:
        """ln |W|, (K,)."""
        ...

    def log_gamma(self, degrees_of_freedom: Tensor, columns: int) -> Tensor:
        """Log of the gamma function in the normaliser at ν / 2, constants kept, (K,)."""
        ...

    def digamma(self, degrees_of_freedom: Tensor, columns: int) -> Tensor:
        """Derivative of :meth:`log_gamma` by ν / 2, (K,)."""
        ...


class Full:
    """Precision matrices of any shape."""

    def width(self, columns: int) -> int:
        """One Wishart over all columns."""
        return columns

    def covariance(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
        """Unbiased covariance matrix of the rows."""
        centred = x - x.mean(0)
        return centred.mT @ centred / (len(x) - 1)

    def isotropic(self, variance: float, like: Float[Tensor, " d"]) -> Float[Tensor, "d d"]:
        """``variance`` times the identity."""
        return variance * torch.eye(len(like), dtype=like.dtype, device=like.device)

    def scatter(
        self, x: Float[Tensor, "n d"], mean: Float[Tensor, "k d"], responsibilities: Float[Tensor, "n k"]
    ) -> Float[Tensor, "k d d"]:
        """Sum over rows of r (x - m)(x - m)ᵀ."""
        residual = x - mean[:, None, :]
        return (residual * responsibilities.mT[..., None]).mT @ residual

    def squares(self, residual: Float[Tensor, "k n d"], inverse_scale: Float[Tensor, "k d d"]) -> Float[Tensor, "k n"]:
        """Return rᵀ W r by triangular solves."""
        factor = torch.linalg.cholesky(inverse_scale)
        return torch.linalg.solve_triangular(factor, residual.mT, upper=False).square().sum(-2)

    def trace(self, other: Float[Tensor, "d d"], inverse_scale: Float[Tensor, "k d d"]) -> Float[Tensor, " k"]:
        """tr(A W) as a sum of squares of whitened factors."""
        factor = torch.linalg.cholesky(inverse_scale)
        root = torch.linalg.cholesky(other).expand_as(factor)
        return torch.linalg.solve_triangular(factor, root, upper=False).square().sum((-2, -1))

    def log_determinant(self, inverse_scale: Float[Tensor, "k d d"]) -> Float[Tensor, " k"]:
        """ln |W| from the Cholesky factor of its inverse."""
        return -2 * torch.linalg.cholesky(inverse_scale).diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def log_gamma(self, degrees_of_freedom: Float[Tensor, " k"], columns: int) -> Float[Tensor, " k"]:
        """ln Γ_D(ν / 2), the multivariate gamma function (B.79)."""
        return torch.lgamma(_halves(degrees_of_freedom, columns)).sum(-1) + columns * (columns - 1) / 4 * LOG_PI

    def digamma(self, degrees_of_freedom: Float[Tensor, " k"], columns: int) -> Float[Tensor, " k"]:
        """Sum of ψ((ν + 1 - i) / 2) over i = 1..D (B.81)."""
        return torch.digamma(_halves(degrees_of_freedom, columns)).sum(-1)


class Diagonal:
    """Diagonal precision matrices: a Wishart of one dimension per column, all with the same ν."""

    def width(self, columns: int) -> int:
        """Each column by itself."""
        return 1

    def covariance(self, x: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
        """Unbiased variance of each column."""
        return x.var(0, correction=1)

    def isotropic(self, variance: float, like: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """``variance`` in every column."""
        return torch.full_like(like, variance)

    def scatter(
        self, x: Float[Tensor, "n d"], mean: Float[Tensor, "k d"], responsibilities: Float[Tensor, "n k"]
    ) -> Float[Tensor, "k d"]:
        """Sum over rows of r (x - m)², per column."""
        return (responsibilities.mT[..., None] * (x - mean[:, None, :]).square()).sum(-2)

    def squares(self, residual: Float[Tensor, "k n d"], inverse_scale: Float[Tensor, "k d"]) -> Float[Tensor, "k n"]:
        """Sum over columns of r² / w."""
        return (residual.square() / inverse_scale[:, None, :]).sum(-1)

    def trace(self, other: Float[Tensor, " d"], inverse_scale: Float[Tensor, "k d"]) -> Float[Tensor, " k"]:
        """Sum over columns of a / w."""
        return (other / inverse_scale).sum(-1)

    def log_determinant(self, inverse_scale: Float[Tensor, "k d"]) -> Float[Tensor, " k"]:
        """ln |W|, the sum over columns of -ln w."""
        return -inverse_scale.log().sum(-1)

    def log_gamma(self, degrees_of_freedom: Float[Tensor, " k"], columns: int) -> Float[Tensor, " k"]:
        """D ln Γ(ν / 2)."""
        return columns * torch.lgamma(degrees_of_freedom / 2)

    def digamma(self, degrees_of_freedom: Float[Tensor, " k"], columns: int) -> Float[Tensor, " k"]:
        """D ψ(ν / 2)."""
        return columns * torch.digamma(degrees_of_freedom / 2)


KINDS: dict[str, PrecisionKind] = {"full": Full(), "diagonal": Diagonal()}


def updated(
    kind: PrecisionKind, prior: NormalWishart, x: Float[Tensor, "n d"], responsibilities: Float[Tensor, "n k"]
) -> NormalWishart:
    """Posterior after rows that count by their responsibilities: equations 10.60 to 10.63.

    ``prior`` is one distribution (K = 1). The scatter is taken about the posterior means, with the prior as β data at
    its own mean: the same matrix as in the book, without the empty component's 0 / 0 and without cancellation.
    """
    counts = responsibilities.sum(0)
    mean_precision = prior.mean_precision + counts
    mean = prior.mean + responsibilities.mT @ (x - prior.mean) / mean_precision[:, None]
    own = kind.scatter(x, mean, responsibilities)
    pulled = kind.scatter(prior.mean, mean, prior.mean_precision[:, None].expand(1, len(mean)))
    degrees_of_freedom = prior.degrees_of_freedom + counts
    return NormalWishart(mean_precision, mean, degrees_of_freedom, prior.inverse_scale + own + pulled)


def expected_log_determinant(kind: PrecisionKind, nw: NormalWishart) -> Float[Tensor, " k"]:
    """E[ln |Λ|], equation 10.65."""
    columns = nw.mean.shape[-1]
    digamma = kind.digamma(nw.degrees_of_freedom, columns)
    return digamma + columns * LOG_2 + kind.log_determinant(nw.inverse_scale)


def expected_squares(kind: PrecisionKind, nw: NormalWishart, x: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
    """E[(x - μ)ᵀ Λ (x - μ)] of every row, equation 10.64."""
    squares = kind.squares(x - nw.mean[:, None, :], nw.inverse_scale).mT
    return x.shape[1] / nw.mean_precision + nw.degrees_of_freedom * squares


def expected_log_density(kind: PrecisionKind, nw: NormalWishart, x: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
    """E[ln N(x | μ, Λ⁻¹)] of every row, nats."""
    log_determinant = expected_log_determinant(kind, nw)
    return 0.5 * (log_determinant - x.shape[1] * LOG_2PI - expected_squares(kind, nw, x))


def log_wishart_normalizer(kind: PrecisionKind, nw: NormalWishart) -> Float[Tensor, " k"]:
    """ln B(W, ν), the log normaliser of the Wishart, equation B.79."""
    columns, nu = nw.mean.shape[-1], nw.degrees_of_freedom
    log_determinant = kind.log_determinant(nw.inverse_scale)
    return -0.5 * nu * (log_determinant + columns * LOG_2) - kind.log_gamma(nu, columns)


def wishart_entropy(kind: PrecisionKind, nw: NormalWishart) -> Float[Tensor, " k"]:
    """H[Λ], nats, equation B.82."""
    columns, nu = nw.mean.shape[-1], nw.degrees_of_freedom
    exponent = (nu - kind.width(columns) - 1) / 2
    expected = expected_log_determinant(kind, nw)
    return -log_wishart_normalizer(kind, nw) - exponent * expected + nu * columns / 2


def expected_log_prior(kind: PrecisionKind, prior: NormalWishart, nw: NormalWishart) -> Float[Tensor, " k"]:
    """E[ln p(μ, Λ)] of each component under its own q, nats: one component's share of equation 10.74.

    ``prior`` is one distribution (K = 1).
    """
    columns = nw.mean.shape[-1]
    log_determinant = expected_log_determinant(kind, nw)
    pull = kind.squares((nw.mean - prior.mean)[:, None, :], nw.inverse_scale)[:, 0]
    distance = columns / nw.mean_precision + nw.degrees_of_freedom * pull
    means = columns * (prior.mean_precision.log() - LOG_2PI) + log_determinant - prior.mean_precision * distance
    exponent = (prior.degrees_of_freedom - kind.width(columns) - 1) / 2
    trace = nw.degrees_of_freedom * kind.trace(prior.inverse_scale[0], nw.inverse_scale)
    return 0.5 * means + log_wishart_normalizer(kind, prior) + exponent * log_determinant - 0.5 * trace


def entropy(kind: PrecisionKind, nw: NormalWishart) -> Float[Tensor, " k"]:
    """H[μ, Λ], nats: minus one component's share of equation 10.77."""
    columns = nw.mean.shape[-1]
    means = columns * (1 + LOG_2PI - nw.mean_precision.log()) - expected_log_determinant(kind, nw)
    return 0.5 * means + wishart_entropy(kind, nw)


def log_marginal(
    kind: PrecisionKind, prior: NormalWishart, x: Float[Tensor, "n d"], members: Float[Tensor, "n k"]
) -> Float[Tensor, " k"]:
    """Log evidence of K subsets of the rows, nats, each under a mean and a precision of its own.

    ``members`` says by 0 and 1 which rows are in which subset. The evidence is the ratio of the normalisers of prior
    and posterior (Murphy 2007, section 8).
    """
    posterior = updated(kind, prior, x, members)
    columns = x.shape[1]
    likelihood = -0.5 * columns * LOG_2PI * members.sum(0)
    means = 0.5 * columns * (prior.mean_precision.log() - posterior.mean_precision.log())
    return likelihood + means + log_wishart_normalizer(kind, prior) - log_wishart_normalizer(kind, posterior)


def _halves(degrees_of_freedom: Tensor, columns: int) -> Tensor:
    steps = torch.arange(columns, dtype=degrees_of_freedom.dtype, device=degrees_of_freedom.device)
    return (degrees_of_freedom[..., None] - steps) / 2

"""Algebra of groups of rows x_n = loc + A u + B v_n + e_n, with u shared by the rows of a group.

Here u ~ N(0, I) for each group, v_n ~ N(0, I) and e_n ~ N(0, diag(variance)) for each row. Given u the rows are
independent, x_n ~ N(loc + A u, S) with S = B Bᵀ + diag(variance), so that everything goes through the matrix
I + Bᵀ diag(1/variance) B of the row latents and, for a group of n rows, I + n Aᵀ S⁻¹ A of the group's: no matrix has
the size of a row, let alone of a group. Padded rows are told by a mask and count for nothing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Loadings(NamedTuple):
    """The model: ``loc`` (D,), ``group`` A (D, U), ``row`` B (D, V), ``variance`` (D,) of the noise."""

    loc: Float[Tensor, " d"]
    group: Float[Tensor, "d u"]
    row: Float[Tensor, "d v"]
    variance: Float[Tensor, " d"]


class GroupedPosterior(NamedTuple):
    """Posterior of u, and of each v_n given u, for G groups padded to T rows.

    Attributes
    ----------
    mean : Tensor (G, U)
        E[u].
    scale_tril : Tensor (G, U, U)
        Cholesky factor of the covariance of u.
    row_mean : Tensor (G, T, V)
        E[v_n]; zero at padding.
    row_slope : Tensor (V, U)
        E[v_n given u] = E[v_n] - row_slope (u - E[u]).
    row_scale_tril : Tensor (V, V)
        Cholesky factor of the covariance of v_n given u, the same for every row.
    """

    mean: Float[Tensor, "g u"]
    scale_tril: Float[Tensor, "g u u"]
    row_mean: Float[Tensor, "g t v"]
    row_slope: Float[Tensor, "v u"]
    row_scale_tril: Float[Tensor, "v v"]


class _Parts(NamedTuple):
    """What does not depend on the rows.

    Attributes
    ----------
    row_factor : Tensor (V, V)
        Cholesky factor of I + Bᵀ diag(1/variance) B.
    slope : Tensor (V, U)
        Regression of v_n on u given x_n: the mean of v_n falls by that much as u rises.
    unexplained : Tensor (D, U)
        A - B slope: what no v_n makes up for; S⁻¹ A is that over the variance.
    information : Tensor (U, U)
        Aᵀ S⁻¹ A, what one row adds to the precision of u; a sum of squares, so that nothing cancels.
    """

    row_factor: Tensor
    slope: Tensor
    unexplained: Tensor
    information: Tensor


def posterior(x: Float[Tensor, "g t d"], mask: Bool[Tensor, "g t"], loadings: Loadings) -> GroupedPosterior:
    """Posterior of u and of the v_n given u (Bishop 2006, equations 2.113 to 2.117, first over v, then over u)."""
    parts = _parts(loadings)
    residual = _residual(x, mask, loadings)
    mean, factor = _group(residual, mask, loadings, parts)
    identity = torch.eye(mean.shape[-1], dtype=x.dtype, device=x.device)
    scale_tril = torch.linalg.cholesky(torch.cholesky_solve(identity, factor))
    return GroupedPosterior(
        mean,
        scale_tril,
        _row_mean(_about(residual, mask, loadings, mean), loadings, parts),
        parts.slope,
        torch.linalg.cholesky(torch.cholesky_inverse(parts.row_factor)),
    )


def log_density(x: Float[Tensor, "g t d"], mask: Bool[Tensor, "g t"], loadings: Loadings) -> Float[Tensor, " g"]:
    """Log density of the rows of each group together, nats, by the determinant lemma, first over v, then over u.

    The quadratic form is that of the residuals at the posterior means plus those means' own squares: a sum of
    squares, so that nothing cancels where the noise is small.
    """
    parts = _parts(loadings)
    residual = _residual(x, mask, loadings)
    mean, factor = _group(residual, mask, loadings, parts)
    about = _about(residual, mask, loadings, mean)
    row_mean = _row_mean(about, loadings, parts)
    noise = (about - row_mean @ loadings.row.mT).square() / loadings.variance
    quadratic = noise.sum((-1, -2)) + row_mean.square().sum((-1, -2)) + mean.square().sum(-1)
    rows = mask.sum(-1).to(x.dtype)
    of_row = loadings.variance.log().sum() + 2 * parts.row_factor.diagonal().log().sum()
    log_determinant = rows * of_row + 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -0.5 * (quadratic + log_determinant + rows * len(loadings.loc) * math.log(2 * math.pi))


def precision_blocks(rows: Float[Tensor, " g"], loadings: Loadings) -> tuple[Tensor, Tensor]:
    """Blocks on the diagonal of the precision of (u, v_1, ..., v_n) given the rows: (G, U, U) of u, (V, V) of each v_n.

    They are I + n Aᵀ diag(1/variance) A and I + Bᵀ diag(1/variance) B: those of the factors of the q nearest to it
    among products of a normal for u and one for each v_n (Bishop 2006, section 10.1.2).
    """
    weighted = loadings.group / loadings.variance[:, None]
    of_row = _identity(loadings.row) + loadings.row.mT @ (loadings.row / loadings.variance[:, None])
    return _identity(loadings.group) + rows[:, None, None] * (loadings.group.mT @ weighted), of_row


def _parts(loadings: Loadings) -> _Parts:
    weighted = loadings.row / loadings.variance[:, None]
    row_factor = torch.linalg.cholesky(_identity(loadings.row) + loadings.row.mT @ weighted)
    slope = torch.cholesky_solve(weighted.mT @ loadings.group, row_factor)
    unexplained = loadings.group - loadings.row @ slope
    information = unexplained.mT @ (unexplained / loadings.variance[:, None]) + slope.mT @ slope
    return _Parts(row_factor, slope, unexplained, information)


def _group(residual: Tensor, mask: Tensor, loadings: Loadings, parts: _Parts) -> tuple[Tensor, Tensor]:
    """Posterior mean of u, (G, U), and the Cholesky factor of its precision, (G, U, U)."""
    rows = mask.sum(-1).to(residual.dtype)
    factor = torch.linalg.cholesky(_identity(loadings.group) + rows[:, None, None] * parts.information)
    evidence = residual.sum(-2) @ (parts.unexplained / loadings.variance[:, None])
    return torch.cholesky_solve(evidence[..., None], factor)[..., 0], factor


def _residual(x: Tensor, mask: Tensor, loadings: Loadings) -> Tensor:
    return torch.where(mask[..., None], x - loadings.loc, torch.zeros_like(x))


def _about(residual: Tensor, mask: Tensor, loadings: Loadings, mean: Tensor) -> Tensor:
    """What is left of the rows, (G, T, D), once u stands at ``mean``."""
    return residual - mask[..., None] * (mean @ loadings.group.mT)[..., None, :]


def _row_mean(about: Tensor, loadings: Loadings, parts: _Parts) -> Tensor:
    weighted = about @ (loadings.row / loadings.variance[:, None])
    return torch.cholesky_solve(weighted.mT, parts.row_factor).mT


def _identity(loading: Tensor) -> Tensor:
    return torch.eye(loading.shape[1], dtype=loading.dtype, device=loading.device)

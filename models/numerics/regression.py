"""Algebra of r = Ψ v + e with v ~ N(0, I) and e ~ N(0, I): a regression in units of its prior and its noise.

Every Bayesian linear regression with a normal prior is this one once rows are divided by the noise and columns
multiplied by the prior's scale. It goes through the QR factors of Ψ with an identity below it, whose condition is the
square root of that of ΨᵀΨ + I, so that collinear columns, and columns with large offsets, keep their digits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Regression(NamedTuple):
    """Posterior of v and the terms of log p(r).

    Attributes
    ----------
    mean : Tensor (P,)
        Posterior mean of v.
    scale_tril : Tensor (P, P)
        Lower Cholesky factor of the posterior covariance (I + ΨᵀΨ)⁻¹.
    quadratic : Tensor ()
        rᵀ (I + ΨΨᵀ)⁻¹ r.
    log_determinant : Tensor ()
        log det(I + ΨΨᵀ).
    """

    mean: Tensor
    scale_tril: Tensor
    quadratic: Tensor
    log_determinant: Tensor


def regression(design: Float[Tensor, "n p"], response: Float[Tensor, " n"]) -> Regression:
    """Solve the regression of ``response`` on ``design``, for any number of rows, none included.

    The quadratic form is |r - Ψ m|² + |m|² with m the posterior mean: a sum of squares, in which nothing cancels.
    """
    columns = design.shape[1]
    identity = torch.eye(columns, dtype=design.dtype, device=design.device)
    # With the columns in reverse order the triangular factor of the precision comes out lower, and so does its
    # inverse, which is then the Cholesky factor of the covariance.
    orthogonal, upper = torch.linalg.qr(torch.cat([design, identity]).flip(1))
    sign = torch.where(upper.diagonal() < 0, -1.0, 1.0).to(design.dtype)
    orthogonal, upper = orthogonal * sign, sign[:, None] * upper
    projected = orthogonal[: len(design)].mT @ response
    mean = torch.linalg.solve_triangular(upper, projected[:, None], upper=True)[:, 0].flip(0)
    scale_tril = torch.linalg.solve_triangular(upper.flip(0, 1), identity, upper=False)
    quadratic = (response - design @ mean).square().sum() + mean.square().sum()
    return Regression(mean, scale_tril, quadratic, 2 * upper.diagonal().log().sum())

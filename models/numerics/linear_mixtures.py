"""E step of mixtures whose log densities are linear in the row: constant memory in the number of rows.

For components of one exponential family whose sufficient statistic is the row itself, such as Bernoulli and Poisson,

    log π_k + log p(x given z = k) = θ_k · x + c_k + h(x),

where h(x) is the same for all components and cancels in the responsibilities. So all components of several mixtures are
one matrix product, and the sums that the M step needs are another, over chunks of rows that stay in the cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

CHUNK_ELEMENTS = 2**17  # numbers in the log densities of a chunk, or in its rows: 1 MiB, which stay in the cache


class LinearMixtureStatistics(NamedTuple):
    """Expected sufficient statistics of R mixtures, summed over rows.

    Attributes
    ----------
    log_evidence : Tensor (R,)
        Sum of log p(x) - h(x), nats.
    counts : Tensor (R, K)
        Sum of the responsibilities.
    sums : Tensor (R, K, D)
        Sum of r x.
    """

    log_evidence: Tensor
    counts: Tensor
    sums: Tensor


def expected_statistics(
    x: Float[Tensor, "n d"], slopes: Float[Tensor, "r k d"], constants: Float[Tensor, "r k"]
) -> LinearMixtureStatistics:
    """E step of R mixtures of K components in one pass over the rows (Bishop 2006, equations 9.56 to 9.58).

    Parameters
    ----------
    slopes, constants : Tensor (R, K, D), (R, K)
        θ and c.
    """
    width = max(constants.numel(), x.shape[1])
    flat, heights = slopes.flatten(0, 1), constants.flatten()[:, None]
    sums, counts = torch.zeros_like(flat), torch.zeros_like(heights[:, 0])
    log_evidence = torch.zeros_like(constants[:, 0])
    for rows in x.split(max(64, CHUNK_ELEMENTS // width)):
        log_joint = torch.addmm(heights, flat, rows.mT)
        log_evidence += normalise(log_joint.view(*constants.shape, len(rows)))
        counts += log_joint.sum(1)
        sums.addmm_(log_joint, rows)
    return LinearMixtureStatistics(log_evidence, counts.view_as(constants), sums.view_as(slopes))


def normalise(log_joint: Float[Tensor, "r k n"]) -> Float[Tensor, " r"]:
    """Turn log p(x, z) into responsibilities in place, and return the sums over rows of log p(x)."""
    largest = log_joint.amax(1, keepdim=True)
    log_joint.sub_(largest).exp_()
    total = log_joint.sum(1, keepdim=True)
    log_joint.div_(total)
    return (total.log() + largest).sum((1, 2))

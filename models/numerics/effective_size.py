"""How many draws a set of importance weights is worth, and how far to flatten it so that enough are left."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

BISECTIONS = 60


def effective_size(log_weight: Float[Tensor, " s"]) -> float:
    """Effective sample size (Σ w)² / Σ w² of weights given by their logarithms (Kong et al. 1994)."""
    return 1 / float(log_weight.softmax(0).square().sum())


def flattening_power(log_weight: Float[Tensor, " s"], share: float, largest: float = 1.0) -> float:
    """Return the largest power of the weights, at most ``largest``, that leaves a share of them effective.

    Parameters
    ----------
    log_weight : Tensor (S,)
        Nats; some may be -inf, which count for nothing.
    share : float
        Wanted effective size, as a share of the number of finite weights.
    largest : float
        Power that is returned if it leaves enough of them.
    """
    finite = log_weight[torch.isfinite(log_weight)]
    wanted = share * len(finite)
    if effective_size(largest * finite) >= wanted:
        return largest
    low, high = 0.0, largest
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if effective_size(middle * finite) >= wanted else (low, middle)
    return high

"""Pareto k-hat of q, for each datum: whether importance weights can repair it."""

from __future__ import annotations

from typing import NamedTuple

import arviz
import numpy as np

from elbozoo.inference.weights import Weights

THRESHOLD = 0.7
CONSTANT = 1e-8


class KHat(NamedTuple):
    """Largest k-hat over the data, and the share of data above 0.7 (Vehtari et al. 2024)."""

    maximum: float
    share_above: float


def k_hat(weights: Weights) -> KHat | None:
    """Pareto k-hat of each datum's weights, by ArviZ's ``psislw``; for all data at once where z is global.

    Taken over a whole data set, the k-hat of a good q grows with the number of rows, so each datum has its own.
    Weights that are constant to rounding, as those of the exact posterior, have no tail: their k-hat is 0.
    Returns None where every latent is enumerated: expectations are sums and need no repair.
    """
    if weights.is_enumerated and weights.log_weight.shape[1] == 1:
        return None
    log_weight = weights.marginal().numpy().T
    varying = np.ptp(log_weight, axis=1) > CONSTANT
    values = np.zeros(len(log_weight))
    if varying.any():
        values[varying] = arviz.psislw(log_weight[varying])[1]
    return KHat(float(values.max()), float((values > THRESHOLD).mean()))

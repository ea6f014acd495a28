"""The nearest covariance of low rank, against its closed forms and against a general optimiser."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from elbozoo.models.numerics.low_rank import nearest_low_rank

DIM = 4


def precisions(count: int, dim: int = DIM) -> Tensor:
    """Correlated precisions of unequal scales."""
    factor = torch.randn(count, dim, dim + 3, dtype=torch.float64) * torch.randn(count, dim, 1).double().exp()
    return factor @ factor.mT + torch.eye(dim, dtype=torch.float64)


def divergence(precision: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """KL(N(0, Σ) ‖ N(0, B⁻¹)) of each pair, nats."""
    product = precision @ covariance
    found: np.ndarray = 0.5 * (np.trace(product, axis1=1, axis2=2) - precision.shape[1] - np.linalg.slogdet(product)[1])
    return found


def test_full_rank_is_the_inverse_and_rank_zero_the_diagonal() -> None:
    """Rank K - 1 of K = 2, which with a diagonal is every covariance, to 1e-6; rank 0 has v = 1/B_ii, to 1e-12."""
    precision = precisions(20, 2)
    alone = 1 / precision.diagonal(dim1=1, dim2=2)
    near = nearest_low_rank(precision, alone, 1, sweeps=2000)
    assert np.abs(divergence(precision.numpy(), near.dense().numpy())).max() <= 1e-6
    none = nearest_low_rank(precision, 3 * alone, 0, sweeps=1)
    assert float((none.variance / alone - 1).abs().max()) <= 1e-12
    assert divergence(precision.numpy(), none.dense().numpy()).max() > 1e-6  # negative control


@pytest.mark.parametrize("rank", [1, 2])
def test_no_covariance_of_a_general_optimiser_is_nearer(rank: int) -> None:
    """SciPy's BFGS on v and F from six random points gains no more than 5e-3 nats a matrix on average.

    A local minimum may remain in some. Without any sweep it gains more.
    """
    precision = precisions(8)
    alone = 1 / precision.diagonal(dim1=1, dim2=2)
    near, first = (nearest_low_rank(precision, alone, rank, sweeps=sweeps) for sweeps in (100, 0))
    best = np.array([least_divergence(each, rank) for each in precision.numpy()])
    assert (divergence(precision.numpy(), near.dense().numpy()) - best).mean() <= 5e-3
    assert (divergence(precision.numpy(), first.dense().numpy()) - best).mean() > 5e-3


def least_divergence(precision: np.ndarray, rank: int) -> float:
    generator = np.random.default_rng(0)

    def objective(parameters: np.ndarray) -> float:
        factor = parameters[DIM:].reshape(DIM, rank)
        covariance = np.diag(np.exp(parameters[:DIM])) + factor @ factor.T
        return float(divergence(precision[None], covariance[None])[0])

    starts = (
        np.concatenate([-np.log(np.diag(precision)), generator.normal(0, 0.3, DIM * rank)]) + generator.normal(0, 0.1)
        for _ in range(6)
    )
    return min(minimize(objective, start).fun for start in starts)


def test_no_sweep_raises_the_divergence() -> None:
    """Each block is set to its minimum: never up by more than rounding, 1e-12; from a wrong end it is up."""
    precision = precisions(50)
    start = torch.rand(50, DIM, dtype=torch.float64).exp() / precision.diagonal(dim1=1, dim2=2)
    ends = [nearest_low_rank(precision, start, 2, sweeps=sweeps).dense().numpy() for sweeps in range(6)]
    path = np.stack([divergence(precision.numpy(), end) for end in ends])
    assert (np.diff(path, axis=0) <= 1e-12).all()
    assert (divergence(precision.numpy(), 1.5 * ends[-1]) > path[-1] + 1e-12).all()

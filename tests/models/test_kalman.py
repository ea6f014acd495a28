"""The Kalman filter and smoother against a dense joint normal, in NumPy, with which they share no code."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.linalg import block_diag, solve_discrete_are
from scipy.stats import multivariate_normal
from torch import Tensor

from elbozoo.models.numerics.kalman import (
    StateSpace,
    backward_kernels,
    kalman_filter,
    rts_smoother,
    smoothed_disturbances,
)

# Absolute, in nats and in units of order one: matrices of at most 150 rows and condition numbers below 1e5 leave
# rounding errors of about 1e-12 in the dense reference.
TOLERANCE = 1e-9


class Dense(NamedTuple):
    """Evidence, mean (T, K) and covariance (T, K, T, K) of the states of one sequence given its observations."""

    log_evidence: float
    mean: np.ndarray
    covariance: np.ndarray


def dense(x: np.ndarray, space: StateSpace) -> Dense:
    """Posterior through the dense precision of the path, evidence through the dense covariance of x."""
    mean, start, transition, process, loading, loc, noise = (np.asarray(v) for v in space[:7])
    steps, states = len(x), len(transition)
    # z = powers z_1 + moved w, with w the noises of steps 2 to T.
    powers = np.concatenate([np.linalg.matrix_power(transition, t) for t in range(steps)])
    moved = np.zeros((steps * states, (steps - 1) * states))
    for t in range(1, steps):
        for s in range(1, t + 1):
            block = np.linalg.matrix_power(transition, t - s)
            moved[t * states : (t + 1) * states, (s - 1) * states : s * states] = block
    seen = ~np.isnan(x.ravel())
    to_x = np.kron(np.eye(steps), loading)[seen]
    residual = (x - loc).ravel()[seen]
    noises = np.tile(noise, steps)[seen]
    given_start = to_x @ moved @ np.kron(np.eye(steps - 1), process) @ moved.T @ to_x.T + np.diag(noises)
    slope = to_x @ powers
    if space.diffuse:
        # The integral over z_1 of a normal density in it, by generalised least squares.
        weighted = np.linalg.solve(given_start, slope)
        best = np.linalg.solve(slope.T @ weighted, weighted.T @ residual)
        at_best = multivariate_normal(slope @ best, given_start).logpdf(residual)
        log_evidence = at_best + multivariate_normal(best, np.linalg.inv(slope.T @ weighted)).logpdf(best) * -1
    else:
        covariance = slope @ start @ slope.T + given_start
        log_evidence = multivariate_normal(slope @ mean, covariance).logpdf(residual) if seen.any() else 0.0
    # Precision: the start's, then (z_t+1 - A z_t)ᵀ Q⁻¹ (z_t+1 - A z_t), then the observations'.
    difference = np.eye(steps * states)
    for t in range(1, steps):
        difference[t * states : (t + 1) * states, (t - 1) * states : t * states] = -transition
    first = np.zeros((states, states)) if space.diffuse else np.linalg.inv(start)
    blocks = block_diag(first, *[np.linalg.inv(process)] * (steps - 1))
    precision = difference.T @ blocks @ difference + (to_x.T / noises) @ to_x
    linear = (to_x.T / noises) @ residual
    linear[:states] += first @ mean
    covariance = np.linalg.inv(precision)
    return Dense(
        float(log_evidence),
        (covariance @ linear).reshape(steps, states),
        covariance.reshape(steps, states, steps, states),
    )


def space_of(diffuse: bool, states: int = 2, columns: int = 3, seed: int = 0) -> StateSpace:
    """A stable chain with correlated noises; under a flat start, measured from a point of no consequence."""
    rng = np.random.default_rng(seed)

    def covariance(size: int) -> np.ndarray:
        factor = rng.normal(size=(size, size))
        return factor @ factor.T / size + 0.3 * np.eye(size)

    transition = 0.6 * np.linalg.qr(rng.normal(size=(states, states)))[0] + 0.3 * np.eye(states)
    loading, loc, noise = rng.normal(size=(columns, states)), rng.normal(size=columns), rng.uniform(0.1, 1, columns)
    values = (rng.normal(size=states), covariance(states), transition, covariance(states), loading, loc, noise)
    return StateSpace(*(torch.from_numpy(v) for v in values), diffuse)


def data(steps: int = 20, columns: int = 3, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Three sequences of different lengths with gaps: single values, whole steps, a long stretch."""
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(3, steps, columns)) * 2 + 1)
    x[0, 2, 1] = x[0, 0, 0] = x[1, 3] = x[2, 1, :2] = math.nan
    x[0, 6:15] = math.nan
    mask = torch.arange(steps) < torch.tensor([steps, steps - 4, 2])[:, None]
    return x.masked_fill(~mask[..., None], math.nan), mask


CASES = pytest.mark.parametrize(
    ("diffuse", "states", "steps"), [(False, 2, 20), (True, 2, 20), (False, 3, 50), (True, 1, 50)]
)


@CASES
def test_evidence_is_the_dense_normals(diffuse: bool, states: int, steps: int) -> None:
    """With gaps and padding, sequence by sequence; and a value moved by a thousandth shows."""
    space, (x, mask) = space_of(diffuse, states), data(steps)
    log_density = kalman_filter(x, space, mask).log_density.numpy()
    truth = [dense(row[real].numpy(), space).log_evidence for row, real in zip(x, mask, strict=True)]
    np.testing.assert_allclose(log_density, truth, rtol=0, atol=TOLERANCE)
    moved = kalman_filter(x + 1e-3, space, mask).log_density.numpy()
    assert (np.abs(moved - truth) > TOLERANCE).all()


@CASES
def test_smoothed_moments_are_the_dense_normals(diffuse: bool, states: int, steps: int) -> None:
    """Means, covariances, covariances of neighbours, and the moments of the steps that EM needs."""
    space, (x, mask) = space_of(diffuse, states), data(steps)
    kernels = backward_kernels(kalman_filter(x, space, mask), space, mask)
    smoothed = rts_smoother(kernels)
    moves = smoothed_disturbances(kernels, smoothed, space.transition)
    transition = space.transition.numpy()
    for n, length in enumerate(mask.sum(1).tolist()):
        truth = dense(x[n, :length].numpy(), space)
        t = np.arange(length)
        covariance = truth.covariance[t, :, t]
        lag = truth.covariance[t[1:], :, t[:-1]]  # Cov[z_t+1, z_t]
        spread = (
            covariance[1:]
            - transition @ lag.transpose(0, 2, 1)
            - lag @ transition.T
            + transition @ covariance[:-1] @ transition.T
        )
        pairs = [
            (smoothed.mean[n, :length], truth.mean),
            (smoothed.covariance[n, :length], covariance),
            (smoothed.lag_one[n, : length - 1], lag),
            (moves.mean[n, : length - 1], truth.mean[1:] - truth.mean[:-1] @ transition.T),
            (moves.covariance[n, : length - 1], spread),
            (moves.past[n, : length - 1], lag - transition @ covariance[:-1]),
        ]
        for ours, theirs in pairs:
            np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=TOLERANCE)
    # Negative control: the filter's moments are not the smoother's, but at the last step.
    filtered = kalman_filter(x, space._replace(diffuse=False), mask)
    assert (filtered.mean[0, :5, :, 0] - smoothed.mean[0, :5]).abs().min() > TOLERANCE
    np.testing.assert_allclose(
        kalman_filter(x, space, mask).covariance[0, -1] if not diffuse else smoothed.covariance[0, -1],
        smoothed.covariance[0, -1],
        rtol=0,
        atol=TOLERANCE,
    )


def test_a_flat_start_is_the_limit_of_a_wide_one() -> None:
    """log p(x) + ½ log(2π κ) per state tends to the flat one like 1 / κ: tenfold κ, a tenth of the error.

    The ratio of the errors is 10 up to terms of order 1 / κ (1e-2 relative) where rounding of 1e-12 is small beside
    them. A flat prior of another density, such as statsmodels', is not the limit.
    """
    space, (x, mask) = space_of(True), data()
    x, mask = x[:2], mask[:2]
    flat = kalman_filter(x, space, mask).log_density

    def error(variance: float) -> Tensor:
        wide = space._replace(initial_covariance=variance * torch.eye(2, dtype=torch.float64), diffuse=False)
        return kalman_filter(x, wide, mask).log_density + math.log(2 * math.pi * variance) - flat

    ratio = error(1e3) / error(1e4)
    np.testing.assert_allclose(ratio, 10.0, rtol=1e-2)
    assert (error(1e4).abs() < 1e-2).all()
    assert ((error(1e4) - math.log(2 * math.pi)).abs() > 1e-2).all()


def test_the_flat_start_does_not_depend_on_the_point_it_is_measured_from() -> None:
    """Only rounding does (1e-8: the point is moved by 100 standard deviations, whose squares cancel)."""
    space, (x, mask) = space_of(True), data()
    one = kalman_filter(x, space, mask).log_density
    other = kalman_filter(x, space._replace(initial_mean=space.initial_mean + 100), mask).log_density
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-8)
    proper = space._replace(diffuse=False)
    moved = kalman_filter(x, proper._replace(initial_mean=space.initial_mean + 100), mask).log_density
    assert ((moved - kalman_filter(x, proper, mask).log_density).abs() > 1e-8).all()


@pytest.mark.parametrize("diffuse", [False, True])
def test_gradients_of_the_evidence(diffuse: bool) -> None:
    """By finite differences, for every parameter, through gaps and padding (torch's gradcheck, 1e-6)."""
    space, (x, mask) = space_of(diffuse), data(6)
    parameters = [v.clone().requires_grad_() for v in space[2:7]]

    def log_evidence(*values: Tensor) -> Tensor:
        process = values[1] @ values[1].mT
        moved = space._replace(transition=values[0], process=process, loading=values[2], loc=values[3], noise=values[4])
        return kalman_filter(x, moved, mask).log_density

    assert torch.autograd.gradcheck(log_evidence, parameters)

    def detached(*values: Tensor) -> Tensor:
        return log_evidence(values[0].detach(), *values[1:]) + values[0].sum() * 0

    assert not torch.autograd.gradcheck(detached, parameters, raise_exception=False)


def test_an_exploding_chain_does_not_reach_into_the_padding() -> None:
    """A state that triples at each step overflows in 650 steps; the short sequence ends before, and stays finite."""
    space = space_of(False, states=1)._replace(transition=torch.tensor([[3.0]], dtype=torch.float64))
    x = torch.full((1, 800, 3), math.nan, dtype=torch.float64)
    x[0, :5] = torch.arange(15.0).reshape(5, 3)
    mask = torch.arange(800)[None] < 5
    kernels = backward_kernels(kalman_filter(x, space, mask), space, mask)
    moments = rts_smoother(kernels)
    alone = backward_kernels(kalman_filter(x[:, :5], space, mask[:, :5]), space, mask[:, :5])
    np.testing.assert_array_equal(moments.mean[:, :5], rts_smoother(alone).mean)
    with pytest.raises(torch.linalg.LinAlgError):
        kalman_filter(x, space, torch.ones_like(mask))


def least_eigenvalue_of_the_usual_update(space: StateSpace, steps: int) -> float:
    """Least eigenvalue over all steps of P - K C P, the update that subtracts, in the same floating-point type."""
    covariance, least = space.initial_covariance.numpy(), math.inf
    transition, process, loading = (np.asarray(v) for v in (space.transition, space.process, space.loading))
    for t in range(steps):
        if t > 0:
            covariance = transition @ covariance @ transition.T + process
        seen = loading @ covariance @ loading.T + np.diag(space.noise)
        covariance = covariance - covariance @ loading.T @ np.linalg.solve(seen, loading @ covariance)
        least = min(least, float(np.linalg.eigvalsh((covariance + covariance.T) / 2)[0]))
    return least


@pytest.mark.slow
@pytest.mark.parametrize("diffuse", [False, True])
def test_covariances_stay_positive_definite_over_100_000_steps(diffuse: bool) -> None:
    """A trend that is nearly a straight line, from a start whose variance is 1e16 times that of the noise.

    The update that subtracts is indefinite here (negative control). In the end the filter is in the steady state,
    which SciPy's solution of the Riccati equation gives: 1e-6 relative, condition numbers of 1e8 times rounding.
    """
    steps = 100_000
    values = [
        [0.0, 0.0],
        np.eye(2) * 1e12,
        [[1.0, 1.0], [0.0, 1.0]],
        np.diag([1e-8, 1e-10]),
        [[1.0, 1 / 3]],
        [0.0],
        [1e-4],
    ]
    space = StateSpace(*(torch.tensor(np.array(v)) for v in values), diffuse)
    generator = torch.Generator().manual_seed(0)
    x = 1e-2 * torch.randn(1, steps, 1, generator=generator, dtype=torch.float64)
    mask = torch.ones(1, steps, dtype=torch.bool)
    with torch.no_grad():
        filtered = kalman_filter(x, space, mask)
        smoothed = rts_smoother(backward_kernels(filtered, space, mask))
    later = filtered.covariance[:, 1:] if diffuse else filtered.covariance  # z_1 given itself has no variance
    for covariance in (later, smoothed.covariance):
        assert torch.equal(covariance, covariance.mT)
        assert float(torch.linalg.eigvalsh(covariance).min()) > 0
    assert torch.isfinite(filtered.log_density).all() and torch.isfinite(smoothed.mean).all()
    transition, process, loading = (np.asarray(v) for v in (space.transition, space.process, space.loading))
    predicted = solve_discrete_are(transition.T, loading.T, process, np.diag(space.noise))
    gain = predicted @ loading.T / (loading @ predicted @ loading.T + 1e-4)
    steady = (np.eye(2) - gain @ loading) @ predicted
    np.testing.assert_allclose(filtered.covariance[0, -1], steady, rtol=1e-6, atol=0)
    assert not np.allclose(filtered.covariance[0, 1], steady, rtol=1e-6, atol=0)
    assert least_eigenvalue_of_the_usual_update(space, 100) < 0

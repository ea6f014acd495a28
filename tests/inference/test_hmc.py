"""Hamiltonian Monte Carlo reaches its target, stays on it, and fails the same test without its accept step.

The chains are independent, so each test compares the final positions of thousands of them: no autocorrelation enters.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from elbozoo.inference import hmc
from elbozoo.inference.hmc import HMCState, LogJoint, initial_state, transition
from elbozoo.models.contract.errors import NumericalFailure
from elbozoo.models.ppca import PPCA

CHAINS = 4000
Z_BOUND = 5.0  # a two-sided false alarm of 6e-7 for each number compared, below 1e-4 for a whole test


class Target:
    """Normal posteriors of N = 3 data, of different widths and correlations."""

    loc = torch.tensor([[0.0, 0.0], [1.0, -2.0], [0.3, 0.1]], dtype=torch.float64)
    scale_tril = torch.tensor(
        [[[1.0, 0.0], [0.0, 1.0]], [[0.5, 0.0], [0.4, 0.2]], [[0.02, 0.0], [-0.01, 0.02]]], dtype=torch.float64
    )
    normal = MultivariateNormal(loc, scale_tril=scale_tril)


def largest_z_score(draws: Tensor, loc: Tensor, covariance: Tensor) -> float:
    """Largest |z| of the means and the second moments of normal draws (S, N, K) about their true location."""
    count, scale = len(draws), covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    centred = (draws - loc) / scale
    correlation = covariance / (scale[..., :, None] * scale[..., None, :])
    second = (centred[..., :, None] * centred[..., None, :]).mean(0)
    first_z = centred.mean(0) * math.sqrt(count)
    second_z = (second - correlation) * math.sqrt(count) / (1 + correlation.square()).sqrt()
    return max(first_z.abs().max().item(), second_z.abs().max().item())


def run(log_joint: LogJoint, state: HMCState, count: int, *, adapt: bool = True) -> HMCState:
    for _ in range(count):
        state = transition(log_joint, state, adapt=adapt)
    return state


def test_reaches_normal_posteriors_of_any_width() -> None:
    prior = torch.randn(CHAINS, 3, 2, dtype=torch.float64)
    state = run(Target.normal.log_prob, initial_state(Target.normal.log_prob, prior), 100)
    state = run(Target.normal.log_prob, state, 20, adapt=False)
    assert largest_z_score(state.z, Target.loc, Target.normal.covariance_matrix) < Z_BOUND
    assert largest_z_score(prior, Target.loc, Target.normal.covariance_matrix) > Z_BOUND  # negative control
    assert (state.acceptance - 0.8).abs().max() < 0.05
    assert state.step_size[0] > 10 * state.step_size[2]
    assert (state.log_joint - Target.normal.log_prob(state.z)).abs().max() < 1e-12


def test_reaches_the_posterior_of_ppca() -> None:
    entry = PPCA.example(columns=4, latent_dim=2, seed=1)
    x, _ = entry.simulate(6, seed=0)

    def log_joint(z: Tensor) -> Tensor:
        likelihood = Normal(z @ entry.loading.mT + entry.loc, entry.noise_scale).log_prob(x).sum(-1)
        return likelihood + Normal(0.0, 1.0).log_prob(z).sum(-1)

    state = run(log_joint, initial_state(log_joint, torch.randn(CHAINS, 6, 2, dtype=torch.float64)), 120)
    posterior = entry.posterior(x)
    assert largest_z_score(state.z, posterior.mean.detach(), posterior.covariance_matrix.detach()) < Z_BOUND
    assert entry.loading.grad is None


def unadapted(draws: Tensor, step_size: float) -> HMCState:
    return initial_state(Target.normal.log_prob, draws, step_size)


def test_exact_draws_stay_exact_and_fail_without_the_accept_step(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = Target.normal.sample((CHAINS,))
    start = unadapted(draws, 1.0)._replace(step_size=torch.tensor([1.3, 0.25, 0.025], dtype=torch.float64))
    moved = run(Target.normal.log_prob, start, 5, adapt=False)
    assert ((moved.z != draws).any(-1).double().mean(0) > 0.9).all()
    assert largest_z_score(moved.z, Target.loc, Target.normal.covariance_matrix) < Z_BOUND
    monkeypatch.setattr(hmc, "_accept", lambda probability: torch.ones_like(probability, dtype=torch.bool))
    drifted = run(Target.normal.log_prob, start, 5, adapt=False)
    assert largest_z_score(drifted.z, Target.loc, Target.normal.covariance_matrix) > 2 * Z_BOUND


def test_one_hard_datum_does_not_hold_up_the_others() -> None:
    draws = Target.normal.sample((CHAINS,))
    state = run(Target.normal.log_prob, unadapted(draws, 1.0), 1, adapt=False)
    assert state.acceptance[0] > 0.7
    assert state.acceptance[2] < 1e-6


def test_proposals_out_of_the_finite_are_rejected() -> None:
    def bounded(z: Tensor) -> Tensor:
        return torch.where(z[..., 0] > 0, -z[..., 0], torch.nan)

    state = initial_state(bounded, torch.rand(500, 2, 1, dtype=torch.float64) + 0.1)
    state = run(bounded, state, 200)
    assert state.z.isfinite().all()
    assert (state.z > 0).all()
    mean = state.z.mean(0)
    assert ((mean - 1).abs() < Z_BOUND / math.sqrt(500)).all()  # an exponential of scale 1


def test_target_may_change_between_transitions() -> None:
    state = run(Target.normal.log_prob, unadapted(Target.normal.sample((CHAINS,)), 0.02), 30)
    shifted = MultivariateNormal(Target.loc + 0.05, scale_tril=Target.scale_tril)
    state = run(shifted.log_prob, state, 60)
    assert largest_z_score(state.z, shifted.loc, shifted.covariance_matrix) < Z_BOUND
    assert largest_z_score(state.z, Target.loc, Target.normal.covariance_matrix) > Z_BOUND  # negative control


def test_seed_repeats_and_single_precision_is_kept() -> None:
    def log_joint(z: Tensor) -> Tensor:
        return -0.5 * z.square().sum(-1)

    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(run(log_joint, initial_state(log_joint, torch.zeros(8, 3, 2)), 3))
    assert torch.equal(states[0].z, states[1].z)
    assert not torch.equal(states[0].z, states[2].z)
    assert states[0].z.dtype == states[0].step_size.dtype == torch.float32
    assert states[0].z.shape == (8, 3, 2)
    assert states[0].log_joint.shape == (8, 3)
    assert states[0].step_size.shape == states[0].acceptance.shape == (3,)
    assert not states[0].z.requires_grad


def test_refuses_a_start_that_has_no_density() -> None:
    with pytest.raises(NumericalFailure, match=r"is nan at chain 0 of datum 2.*start from draws of the prior"):
        initial_state(lambda z: z[..., 0].log(), torch.tensor([[[1.0], [2.0], [-1.0]]]))

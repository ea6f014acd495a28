"""The evidence of a program with many global latents by annealed importance sampling (Neal 2001).

A chain starts at a draw of a base density q₀ with a known normaliser and crosses the densities

    q₀(u)^(1-β) p(x, u)^β,    0 = β₀ < β₁ < … < β_T = 1,

by one Hamiltonian transition each. The product of the ratios that it meets on its way is an unbiased estimate of p(x),
whether or not the chains reach their targets; how well they do decides its variance. Two stages:

1. *Exploration*: particles from the prior are carried to the posterior by tempering the likelihood, with resampling, at
   temperatures chosen so that half of the particles stay effective (Del Moral et al. 2006). The transitions are made
   in coordinates whitened by the particles' own covariance.
2. *Annealing*: fresh chains start from a Student-t with the mean and covariance of those particles, which is wider than
   the posterior and close to it, so that the way is short. Its number of temperatures is multiplied until the
   standard error is small, or the largest is reached.

What goes wrong: a mode that no particle has found is missing from the estimate, and from its standard error. So is much
of the neck of a funnel, for which one step size is too long: the eight schools in their centred form come out low by
0.08 nats on average with an error bar of 0.04, in the non-centred form they are right. The
logarithm of an unbiased estimate is low in expectation, by half its squared standard error and by more where
that is large: a standard error above a few tenths of a nat is itself too small.

References
----------
```bibtex
@article{neal2001annealed,
  author = {Neal, Radford M.}, title = {Annealed importance sampling},
  journal = {Statistics and Computing}, volume = {11}, pages = {125--139}, year = {2001}
}
@article{delmoral2006sequential,
  author = {Del Moral, Pierre and Doucet, Arnaud and Jasra, Ajay}, title = {Sequential {Monte Carlo} samplers},
  journal = {Journal of the Royal Statistical Society B},
  volume = {68}, number = {3}, pages = {411--436}, year = {2006}
}
```
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from elbozoo.inference.hmc import HMCState, initial_state, transition
from elbozoo.models.contract.errors import NumericalFailure
from elbozoo.models.numerics.effective_size import flattening_power

LogTerms = Callable[[Tensor], tuple[Tensor, Tensor]]
LogDensity = Callable[[Tensor], Tensor]

CHAINS = 256
TEMPERATURES = (32, 128, 512)  # of the annealing, one number after the other
SMALL_ERROR = 0.05  # nats: standard error at which there are temperatures enough
STEEPNESS = 4.0  # of the sigmoid along which temperatures lie: dense at both ends
FREEDOM = 8.0  # degrees of freedom of the base's Student-t
EFFECTIVE = 0.5  # share of the particles that stays effective from one temperature of the exploration to the next
MOVES = 5  # transitions at each temperature of the exploration
LAST_MOVES = 20  # transitions at its end
EXPLORATION = 200  # temperatures of the exploration, at most
LEAPFROG_STEPS = 4
STEP_SIZE = 0.5  # first leapfrog step, in whitened coordinates


class AnnealedEstimate(NamedTuple):
    """Estimate of log p(x).

    Attributes
    ----------
    log_value : float
        Log of the mean weight, nats.
    standard_error : float
        By the delta method over the chains, nats.
    log_weights : Tensor (S,)
        Log weight of each chain, nats.
    temperatures : int
        Number T of steps from the base to the target.
    """

    log_value: float
    standard_error: float
    log_weights: Tensor
    temperatures: int


class Whitening(NamedTuple):
    """Coordinates v with u = loc + scale_tril v.

    Attributes
    ----------
    loc : Tensor (K,)
        Centre.
    scale_tril : Tensor (K, K)
        Lower triangular.
    """

    loc: Tensor
    scale_tril: Tensor

    @classmethod
    def of(cls, u: Tensor) -> Whitening:
        """Coordinates in which points (S, K) have zero mean and about unit covariance.

        The covariance is shrunk toward its diagonal by as much as K dimensions are many for S points.
        """
        count, dim = u.shape
        loc = u.mean(0)
        centred = u - loc
        covariance = centred.mT @ centred / count
        share = dim / (count + dim)
        variances = covariance.diagonal().clamp(min=torch.finfo(u.dtype).tiny)
        return cls(loc, torch.linalg.cholesky((1 - share) * covariance + share * variances.diag()))

    def inward(self, u: Tensor) -> Tensor:
        """Return v (S, K) of ``u`` (S, K)."""
        return torch.linalg.solve_triangular(self.scale_tril, (u - self.loc).mT, upper=False).mT

    def outward(self, v: Tensor) -> Tensor:
        """Return u (S, K) of ``v`` (S, K)."""
        return self.loc + v @ self.scale_tril.mT


class Exploration(NamedTuple):
    """What the exploration has found.

    Attributes
    ----------
    particles : Tensor (S, K)
        Points from about the posterior.
    whitening : Whitening
        Coordinates in which they have about zero mean and unit covariance.
    step_size : float
        Leapfrog step there that is accepted four times out of five.
    """

    particles: Tensor
    whitening: Whitening
    step_size: float


def annealed_evidence(log_terms: LogTerms, prior_draws: Tensor, *, chains: int = CHAINS) -> AnnealedEstimate:
    """Estimate log p(x) = log ∫ exp(log prior(u) + log likelihood(u)) du.

    Draws from torch's global random state, which the caller seeds.

    Parameters
    ----------
    log_terms : callable
        Log prior and log likelihood at the points (S, K): (S,) each, nats, differentiable.
    prior_draws : Tensor (S, K)
        Points from which to explore, float64.
    chains : int
        Number of chains.

    Raises
    ------
    NumericalFailure
        If the likelihood is zero at all of the draws.
    """
    found = explore(log_terms, prior_draws)
    for temperatures in TEMPERATURES:
        log_weights = anneal(
            lambda u: _tempered(log_terms(u), 1.0), found.whitening, found.step_size, temperatures, chains
        )
        estimate = mean_weight(log_weights, temperatures)
        if estimate.standard_error <= SMALL_ERROR:
            break
    return estimate


def explore(log_terms: LogTerms, prior_draws: Tensor) -> Exploration:
    """Carry draws of the prior (S, K) to the posterior by tempering the likelihood, with resampling."""
    particles, power, step_size = prior_draws, 0.0, STEP_SIZE
    for _ in range(EXPLORATION):
        with torch.no_grad():
            _, log_likelihood = log_terms(particles)
        if not log_likelihood.isfinite().any():
            raise NumericalFailure(
                f"annealing cannot start: the likelihood is zero at all {len(particles)} draws of the prior; check "
                "that the priors reach values at which the data are possible"
            )
        increment = flattening_power(log_likelihood, EFFECTIVE, 1 - power)
        power += increment
        particles = particles[_systematic((increment * log_likelihood).softmax(0))]
        whitening = Whitening.of(particles)
        target = _whitened(lambda u, power=power: _tempered(log_terms(u), power), whitening)  # type: ignore[misc]
        state = initial_state(target, whitening.inward(particles)[:, None], step_size)
        for _ in range(MOVES if power < 1 else LAST_MOVES):
            state = transition(target, state, leapfrog_steps=LEAPFROG_STEPS)
        step_size = float(state.step_size)
        particles = whitening.outward(state.z[:, 0])
        if power >= 1:
            break
    return Exploration(particles, Whitening.of(particles), step_size)


def anneal(
    log_target: LogDensity, base: Whitening, step_size: float, temperatures: int, chains: int, *, moves: bool = True
) -> Tensor:
    """Return log weights (S,), nats, of chains that run from a Student-t to the target.

    The mean of their exponentials estimates the integral of the target without bias.

    Parameters
    ----------
    log_target : callable
        Log density at the points (S, K), (S,), nats, with the normaliser that is sought.
    base : Whitening
        Centre and scale of the Student-t.
    step_size : float
        Leapfrog step in the coordinates of ``base``.
    temperatures : int
        Number T of ratios that make a weight.
    chains : int
        Number S of chains.
    moves : bool
        Whether the chains move at all; importance sampling from the base if not.
    """
    target = _whitened(log_target, base)
    log_volume = base.scale_tril.diagonal().log().sum()

    def log_base(z: Tensor) -> Tensor:
        return _log_student(z) - log_volume

    z = _student_draws(chains, base.loc)[:, None]
    powers = schedule(temperatures)
    with torch.no_grad():
        log_ratio = target(z) - log_base(z)
    log_weights = powers[1] * log_ratio
    state = HMCState(z, log_ratio, z.new_tensor([step_size]), z.new_tensor([math.nan]), 0)
    for power, following in itertools.pairwise(powers[1:]):
        if moves:
            bridge = _bridge(log_base, target, power)
            state = transition(bridge, state, leapfrog_steps=LEAPFROG_STEPS, adapt=False)
            # The bridge is log base + power * log ratio.
            log_ratio = (state.log_joint - log_base(state.z)) / power
        log_weights = log_weights + (following - power) * log_ratio
    return log_weights[:, 0]


def schedule(temperatures: int) -> list[float]:
    """Return the powers 0 = β₀ < … < β_T = 1 of a path, equally spaced along a sigmoid."""
    ends = [math.tanh(0.5 * STEEPNESS * (2 * t / temperatures - 1)) for t in range(temperatures + 1)]
    return [(end - ends[0]) / (ends[-1] - ends[0]) for end in ends]


def mean_weight(log_weights: Tensor, temperatures: int) -> AnnealedEstimate:
    """Return the log of the mean weight with the delta method's standard error."""
    chains = len(log_weights)
    log_value = float(log_weights.logsumexp(0)) - math.log(chains)
    error = float((log_weights - log_value).exp().std()) / math.sqrt(chains)
    return AnnealedEstimate(log_value, error, log_weights, temperatures)


def _tempered(terms: tuple[Tensor, Tensor], power: float) -> Tensor:
    prior, likelihood = terms
    return prior + power * likelihood


def _bridge(log_base: LogDensity, log_target: LogDensity, power: float) -> LogDensity:
    return lambda z: (1 - power) * log_base(z) + power * log_target(z)


def _whitened(log_density: LogDensity, whitening: Whitening) -> LogDensity:
    """Density at points z (S, 1, K) of whitened coordinates, without a volume element: (S, 1)."""
    return lambda z: log_density(whitening.outward(z[:, 0]))[:, None]


def _systematic(probability: Tensor) -> Tensor:
    """Indices (S,) of systematic resampling."""
    count = len(probability)
    points = (torch.arange(count, dtype=probability.dtype) + torch.rand((), dtype=probability.dtype)) / count
    return torch.searchsorted(probability.cumsum(0), points).clamp(max=count - 1)


def _student_draws(count: int, like: Tensor) -> Tensor:
    """Draws (S, K) of the standard multivariate Student-t."""
    normal = torch.randn(count, len(like), dtype=like.dtype)
    chi2 = torch.distributions.Chi2(like.new_tensor(FREEDOM)).sample((count, 1))
    return normal * (FREEDOM / chi2).sqrt()


def _log_student(z: Tensor) -> Tensor:
    """Log density of the standard multivariate Student-t at ``z`` (..., K), nats."""
    dim = z.shape[-1]
    log_norm = math.lgamma((FREEDOM + dim) / 2) - math.lgamma(FREEDOM / 2) - 0.5 * dim * math.log(FREEDOM * math.pi)
    return log_norm - 0.5 * (FREEDOM + dim) * torch.log1p(z.square().sum(-1) / FREEDOM)

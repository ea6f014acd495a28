"""Annealed importance sampling of local latents: chains of its own for each datum, all advanced together.

The posterior of a data set with local latents is a product over data, so each datum has S chains, a weight for each,
and a path of its own, and one step of all of them costs one gradient of the log joint at (S, N) points. The
chains cross the densities

    p(z) p(x | z)^β,    0 = β₀ < β₁ < … < β_T = 1,

by one Hamiltonian transition each (Neal 2001). *Forward*, from the prior, the mean of their weights is p(x) in
expectation, so that its logarithm is below log p(x) in expectation. *In reverse*, from a draw of the posterior,
the mean of one over the weight is 1 / p(x) in expectation, so that minus its logarithm is above (Grosse et al. 2015).
A draw of the posterior is at hand where the data were simulated: it is the latent that they were drawn from.

The way must not depend on the chains that are weighed. A pilot with chains of its own chooses it for each datum: the
step size at each β, and the β themselves, so that the log likelihood varies as much from each to the next
(Gelman & Meng 1998: the optimal path has constant speed). Both directions then use those; their
transitions leave the densities invariant and are reversible.

What goes wrong: a mode that the chains do not reach on their way is missing from the forward value and from its
standard error; only the reverse value shows it. Too few temperatures widen the distance between both.

References
----------
```bibtex
@article{neal2001annealed,
  author = {Neal, Radford M.}, title = {Annealed importance sampling},
  journal = {Statistics and Computing}, volume = {11}, pages = {125--139}, year = {2001}
}
@article{gelman1998simulating,
  author = {Gelman, Andrew and Meng, Xiao-Li},
  title = {Simulating normalizing constants: from importance sampling to bridge sampling to path sampling},
  journal = {Statistical Science}, volume = {13}, number = {2}, pages = {163--185}, year = {1998}
}
@article{grosse2015sandwiching,
  author = {Grosse, Roger B. and Ghahramani, Zoubin and Adams, Ryan P.},
  title = {Sandwiching the marginal likelihood using bidirectional {Monte Carlo}},
  journal = {arXiv preprint arXiv:1511.02543}, year = {2015}
}
@inproceedings{wu2017quantitative,
  author = {Wu, Yuhuai and Burda, Yuri and Salakhutdinov, Ruslan and Grosse, Roger},
  title = {On the Quantitative Analysis of Decoder-Based Generative Models},
  booktitle = {International Conference on Learning Representations}, year = {2017}
}
```
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

from elbozoo.inference.hmc import HMCState, LogJoint, initial_state, transition
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.collapse import PARTICLE_DIM
from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.sites import LatentSite, log_density

LEAPFROG_STEPS = (1, 2, 3)  # in turn: after half an orbit of one length a chain would have the likelihood that it had
STEP_SIZE = 0.5  # first leapfrog step of the pilot; the prior of most programs has unit scale
PILOT_CHAINS = 16
PILOT_POWER = 4  # the pilot's β are those powers of equally spaced numbers: dense at 0, where little data say much
STEADY = 8  # the pilot's gain stays at that of its ninth transition, since its target moves all the way
SLOWEST = 0.02  # speed along a path, relative to its mean, below which no stretch of it is taken to be
MIXING = 10  # transitions of each reverse chain at β = 1 before it leaves, so that chains are not all the same draw


class RowProgram:
    """A program with continuous local latents as a function of unconstrained coordinates u (S, B, K).

    Parameters
    ----------
    entry : Entry
        The program, at the θ to evaluate.
    sites : sequence of LatentSite
        Its latent sites, all local and continuous.
    batch : Batch
        Rows.
    """

    def __init__(self, entry: Entry, sites: Sequence[LatentSite], batch: Batch) -> None:
        self.entry, self.sites, self.batch = entry, list(sites), batch
        self.transforms = [biject_to(site.support) for site in sites]
        inverse = [t.inverse_shape(site.event_shape) for t, site in zip(self.transforms, sites, strict=True)]
        self.shapes = [torch.Size(shape) for shape in inverse]

    def prior_draws(self, count: int) -> Tensor:
        """Draw ``count`` points (S, B, K) from the prior, from the global random state."""
        with torch.no_grad(), pyro.validation_enabled(False), pyro.plate("particles", count, dim=PARTICLE_DIM):
            trace = poutine.trace(self.entry).get_trace(self.batch)
        return self.coordinates({site.name: trace.nodes[site.name]["value"] for site in self.sites})

    def coordinates(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the coordinates (S, B, K) of ``values`` (S, B, ...) of the sites."""
        parts = [t.inv(values[site.name]) for t, site in zip(self.transforms, self.sites, strict=True)]
        lead = (-1, len(self.batch.x))
        return torch.cat([part.reshape(*lead, s.numel()) for part, s in zip(parts, self.shapes, strict=True)], -1)

    def log_terms(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Log prior, Jacobian included, and log likelihood at ``u`` (S, B, K): (S, B) each, nats."""
        values, prior = {}, u.new_zeros(u.shape[:2])
        parts = u.split([shape.numel() for shape in self.shapes], -1)
        for site, transform, shape, part in zip(self.sites, self.transforms, self.shapes, parts, strict=True):
            free = part.reshape(*u.shape[:2], *shape)
            values[site.name] = transform(free)
            volume = transform.log_abs_det_jacobian(free, values[site.name])
            prior = prior + volume.reshape(*u.shape[:2], -1).sum(-1)
        with pyro.validation_enabled(False), pyro.plate("particles", len(u), dim=PARTICLE_DIM):
            trace = poutine.trace(poutine.condition(self.entry, data=values)).get_trace(self.batch)
            trace.compute_log_prob()
        likelihood = torch.zeros_like(prior)
        for name, node in trace.nodes.items():
            if name in values:
                prior = prior + log_density(node)
            elif "unscaled_log_prob" in node:
                likelihood = likelihood + log_density(node)
        return prior, likelihood

    def log_likelihood(self, u: Tensor) -> Tensor:
        """Log likelihood at ``u``, (S, B), without a gradient."""
        with torch.no_grad():
            return self.log_terms(u)[1]

    def tempered(self, power: Tensor) -> LogJoint:
        """Log density of the prior times the likelihood to the ``power`` (B,) of each datum."""

        def at_power(u: Tensor) -> Tensor:
            prior, likelihood = self.log_terms(u)
            return prior + power * likelihood

        return at_power


class Path(NamedTuple):
    """Densities to cross, and how to move among them.

    Attributes
    ----------
    powers : Tensor (T + 1, B)
        0 = β₀ < … < β_T = 1 of each datum.
    step_sizes : Tensor (T + 1, B)
        Leapfrog step at each.
    """

    powers: Tensor
    step_sizes: Tensor

    @property
    def last(self) -> int:
        """T."""
        return len(self.powers) - 1

    def share(self, t: int) -> Tensor:
        """β_{t+1} - β_t, (B,): the power of the likelihood that a weight gains at β_t."""
        return self.powers[t + 1] - self.powers[t]

    def moved(self, program: RowProgram, state: HMCState, t: int) -> HMCState:
        """Make one transition at β_t."""
        state = state._replace(step_size=self.step_sizes[t])
        return transition(program.tempered(self.powers[t]), state, leapfrog_steps=_leapfrog_steps(t), adapt=False)


def pilot_path(program: RowProgram, temperatures: int) -> Path:
    """Choose the path by chains that are thrown away.

    Raises
    ------
    NumericalFailure
        If the likelihood is zero at a draw of the prior.
    """
    u = program.prior_draws(PILOT_CHAINS)
    powers = (torch.arange(temperatures + 1, dtype=u.dtype, device=u.device) / temperatures) ** PILOT_POWER
    powers = powers[:, None].expand(-1, u.shape[1])
    state = initial_state(program.tempered(powers[1]), u, STEP_SIZE)
    speeds, step_sizes = [program.log_likelihood(u).std(0)], [state.step_size]
    for t in range(1, temperatures + 1):
        state = state._replace(transitions=min(state.transitions, STEADY))
        state = transition(program.tempered(powers[t]), state, leapfrog_steps=_leapfrog_steps(t))
        speeds.append(program.log_likelihood(state.z).std(0))
        step_sizes.append(state.step_size)
    return at_constant_speed(powers, torch.stack(speeds), torch.stack(step_sizes))


def at_constant_speed(powers: Tensor, speeds: Tensor, step_sizes: Tensor) -> Path:
    """Return as many β, such that the integral of the speed over each stretch is the same, with steps interpolated.

    Parameters
    ----------
    powers : Tensor (T + 1, B)
        β at which the speeds and step sizes are known.
    speeds : Tensor (T + 1, B)
        Standard deviation of the log likelihood there, nats.
    step_sizes : Tensor (T + 1, B)
        Leapfrog steps there.
    """
    gaps = powers.diff(dim=0)
    areas = 0.5 * (speeds[1:] + speeds[:-1]) * gaps
    areas = areas + (SLOWEST * areas.sum(0) + torch.finfo(areas.dtype).tiny) * gaps
    length = torch.cat([torch.zeros_like(areas[:1]), areas.cumsum(0) / areas.sum(0)])
    wanted = torch.linspace(0, 1, len(powers), dtype=powers.dtype, device=powers.device)[:, None].expand_as(length)
    right = torch.searchsorted(length.mT.contiguous(), wanted.mT.contiguous()).mT.clamp(1, len(powers) - 1)
    left = right - 1
    start = length.gather(0, left)
    share = ((wanted - start) / (length.gather(0, right) - start)).clamp(0, 1)

    def between(values: Tensor) -> Tensor:
        return torch.lerp(values.gather(0, left), values.gather(0, right), share)

    found = between(powers)
    found[0], found[-1] = 0.0, 1.0
    return Path(found, between(step_sizes))


def forward_log_weights(program: RowProgram, path: Path, chains: int) -> Tensor:
    """Log weights (S, B), nats, of chains from the prior to the posterior: E[exp] is p(x_n)."""
    state = _at_rest(program.prior_draws(chains))
    log_weights = path.share(0) * program.log_likelihood(state.z)
    for t in range(1, path.last):
        state = path.moved(program, state, t)
        log_weights = log_weights + path.share(t) * program.log_likelihood(state.z)
    return log_weights


def reverse_log_weights(program: RowProgram, path: Path, posterior_draw: Tensor, chains: int) -> Tensor:
    """Log weights (S, B), nats, of chains from the posterior to the prior: E[exp(-)] is 1 / p(x_n).

    Parameters
    ----------
    posterior_draw : Tensor (1, B, K)
        Coordinates of one exact draw for each datum.
    """
    state = _at_rest(posterior_draw.expand(chains, -1, -1))
    for _ in range(MIXING):
        state = path.moved(program, state, path.last)
    log_weights = torch.zeros_like(state.log_joint)
    for t in range(path.last - 1, 0, -1):
        log_weights = log_weights + path.share(t) * program.log_likelihood(state.z)
        state = path.moved(program, state, t)
    return log_weights + path.share(0) * program.log_likelihood(state.z)


def _leapfrog_steps(t: int) -> int:
    return LEAPFROG_STEPS[t % len(LEAPFROG_STEPS)]


def _at_rest(u: Tensor) -> HMCState:
    unknown = u.new_full(u.shape[:2], math.nan)
    return HMCState(u, unknown, unknown[0], unknown[0], 0)

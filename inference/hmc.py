"""Hamiltonian Monte Carlo for local latents: one chain per draw and datum, all advanced together.

The posterior of a data set with local latents is a product over data, so each datum can have its own chains, its own
step size and its own acceptance. Pyro's HMC and NUTS treat the whole program as one target: a proposal moves the
latents of all N data at once and is accepted or rejected as a whole, so the step must shrink like N^(-1/4) (Neal 2011,
section 5.4.4), and one hard datum holds up all the others. Here a step costs one gradient of the log joint at (S, N)
points, and no chain waits for another.

The step size of each datum follows the acceptance of its chains by the Robbins-Monro rule of Andrieu & Thoms (2008,
algorithm 4), with the target of 0.8 that Hoffman & Gelman (2014, section 4.2) found to suit HMC. Its gain goes to
zero, so that the chains keep their target.

References
----------
```bibtex
@incollection{neal2011mcmc,
  author = {Neal, Radford M.},
  title = {{MCMC} Using {H}amiltonian Dynamics},
  booktitle = {Handbook of Markov Chain Monte Carlo}, publisher = {CRC Press}, year = {2011}
}
@article{andrieu2008tutorial,
  author = {Andrieu, Christophe and Thoms, Johannes},
  title = {A tutorial on adaptive {MCMC}},
  journal = {Statistics and Computing}, volume = {18}, pages = {343--373}, year = {2008}
}
@article{hoffman2014no,
  author = {Hoffman, Matthew D. and Gelman, Andrew},
  title = {The {No-U-Turn} Sampler: Adaptively Setting Path Lengths in {H}amiltonian {M}onte {C}arlo},
  journal = {Journal of Machine Learning Research}, volume = {15}, pages = {1593--1623}, year = {2014}
}
```
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from elbozoo.models.contract.errors import NumericalFailure

LogJoint = Callable[[Float[Tensor, "s n k"]], Float[Tensor, "s n"]]

TARGET_ACCEPTANCE = 0.8
JITTER = 0.2  # share by which each chain's step varies at random, so that no orbit closes (Neal 2011, section 5.4.2.2)
DECAY = 0.6  # the gain of the adaptation falls like t^-0.6; any power in (0.5, 1] converges


class HMCState(NamedTuple):
    """Chains for N data, S for each.

    Attributes
    ----------
    z : Tensor (S, N, K)
        Where the chains are.
    log_joint : Tensor (S, N)
        log p(x_n, z), nats, under the target of the last transition.
    step_size : Tensor (N,)
        Leapfrog step of each datum's chains, in units of z.
    acceptance : Tensor (N,)
        Mean probability of acceptance over each datum's chains in the last transition; NaN before the first.
    transitions : int
        Transitions that have adapted the step size.
    """

    z: Tensor
    log_joint: Tensor
    step_size: Tensor
    acceptance: Tensor
    transitions: int


def initial_state(log_joint: LogJoint, z: Float[Tensor, "s n k"], step_size: float = 0.25) -> HMCState:
    """Begin chains at ``z``, such as draws of the prior or of a guide.

    Raises
    ------
    NumericalFailure
        If the log joint is not finite at some of the points.
    """
    value, _ = _value_and_gradient(log_joint, z)
    broken = (~value.isfinite()).nonzero()
    if len(broken):
        chain, datum = broken[0].tolist()
        raise NumericalFailure(
            f"HMC cannot start: the log joint is {value[chain, datum].item()} at chain {chain} of datum {datum}, "
            "expected a finite number; start from draws of the prior or of a guide, and check the parameters for NaN"
        )
    data = value.new_ones(z.shape[1])
    return HMCState(z.detach().clone(), value, step_size * data, torch.full_like(data, torch.nan), 0)


def transition(log_joint: LogJoint, state: HMCState, *, leapfrog_steps: int = 5, adapt: bool = True) -> HMCState:
    """Advance every chain by one proposal, accepted or rejected by itself; a non-finite one is rejected.

    The log joint is evaluated anew at the start, so the parameters behind it may have changed in between, as
    they do from one E step to the next. Draws from torch's global random state, which the caller seeds.

    Parameters
    ----------
    log_joint : callable
        (S, N, K) to (S, N): log p(x_n, z) in nats, up to a constant for each datum, differentiable in z.
    state : HMCState
        From :func:`initial_state` or the transition before.
    leapfrog_steps : int
        Gradients per proposal.
    adapt : bool
        Whether to move the step sizes toward an acceptance of 0.8.
    """
    step = state.step_size[:, None] * (1 + JITTER * (2 * torch.rand_like(state.z[..., :1]) - 1))
    momentum = torch.randn_like(state.z)
    value, gradient = _value_and_gradient(log_joint, state.z)
    energy = value - _kinetic(momentum)
    z, new_value, momentum = _leapfrog(log_joint, state.z, gradient, momentum, step, leapfrog_steps)
    probability = _acceptance_probability(new_value - _kinetic(momentum), energy)
    accepted = _accept(probability)
    acceptance = probability.mean(0)
    step_size, transitions = state.step_size, state.transitions
    if adapt:
        step_size = step_size * ((transitions + 1) ** -DECAY * (acceptance - TARGET_ACCEPTANCE)).exp()
        transitions += 1
    return HMCState(
        torch.where(accepted[..., None], z, state.z),
        torch.where(accepted, new_value, value),
        step_size,
        acceptance,
        transitions,
    )


def _leapfrog(
    log_joint: LogJoint, z: Tensor, gradient: Tensor, momentum: Tensor, step: Tensor, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Follow the dynamics from ``z``: its end, the log joint there, and the momentum there."""
    momentum = momentum + 0.5 * step * gradient
    for i in range(steps):
        z = z + step * momentum
        value, gradient = _value_and_gradient(log_joint, z)
        momentum = momentum + (0.5 if i == steps - 1 else 1.0) * step * gradient
    return z, value, momentum


def _kinetic(momentum: Tensor) -> Tensor:
    return 0.5 * momentum.square().sum(-1)


def _acceptance_probability(new_energy: Tensor, energy: Tensor) -> Tensor:
    """Metropolis probability of each proposal (S, N), from minus the total energies; 0 where it is not finite."""
    return (new_energy - energy).nan_to_num(-torch.inf).exp().clamp(max=1.0).where(new_energy.isfinite(), 0.0)


def _accept(probability: Tensor) -> Tensor:
    """Decide for each chain by itself (S, N)."""
    return torch.rand_like(probability) < probability


def _value_and_gradient(log_joint: LogJoint, z: Tensor) -> tuple[Tensor, Tensor]:
    """Log joint (S, N) and its gradient (S, N, K); chains do not touch, so the gradient of the sum is each one's."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        value = log_joint(z)
        (gradient,) = torch.autograd.grad(value.sum(), z)
    return value.detach(), gradient

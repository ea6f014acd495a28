"""Monte Carlo EM, for a program whose E step has no closed form.

E: draws from the posterior of each datum by Hamiltonian Monte Carlo, with chains that go on from one
iteration to the next. M: gradient steps on the mean of log p(x, z) over the draws (Wei & Tanner 1990).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import pyro
import torch
from pyro import poutine

from elbozoo.inference.convergence import PlateauMonitor
from elbozoo.inference.hmc import HMCState, initial_state, transition
from elbozoo.inference.progress import progress_bar
from elbozoo.inference.svi import DECAY, PLATEAUS
from elbozoo.inference.trajectory import Trajectory
from elbozoo.inference.weights import log_joint
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.options import Field, Options


class MonteCarloEMOptions(Options):
    """Options of Monte Carlo EM."""

    chains: int = Field(2, ge=1, description="posterior draws of each datum in an E step, one per chain")
    transitions: int = Field(1, ge=1, description="Hamiltonian transitions of each chain in an E step")
    gradient_steps: int = Field(3, ge=1, description="Adam steps in an M step")
    iterations: int = Field(10_000, ge=1, description="most EM iterations")
    learning_rate: float = Field(0.01, gt=0, description="Adam's step size at the start")
    tolerance: float = Field(1e-4, gt=0, description="gain per 50 iterations, nats per datum, that counts as a plateau")


class MonteCarloEMRun(NamedTuple):
    """How a run of Monte Carlo EM ended."""

    trajectory: Trajectory
    converged: bool
    interrupted: bool
    state: HMCState


def run_monte_carlo_em(
    entry: Entry, batch: Batch, options: MonteCarloEMOptions, *, progress: bool = True
) -> MonteCarloEMRun:
    """Fit θ of ``entry`` in place; must be called inside ``isolated``, which gives the seed.

    The recorded objective is the mean of log p(x, z) over the draws, in nats over all rows: it is what the
    M step raises, and no bound.
    """
    (site,) = entry.latent_sites()

    def log_density(z: torch.Tensor) -> torch.Tensor:
        return log_joint(entry, batch, {site.name: z.reshape(*z.shape[:2], *site.event_shape)})

    state = initial_state(log_density, _prior_draws(entry, batch, site.name, options.chains, site.dim))
    optimizer = torch.optim.Adam(entry.parameters(), lr=options.learning_rate)
    monitor, plateaus = PlateauMonitor(options.tolerance, window=50), 0
    trajectory = Trajectory(is_elbo=False)
    try:
        with progress_bar(f"{entry.name()} em", options.iterations, progress) as report, pyro.validation_enabled(False):
            for iteration in range(options.iterations):
                before = time.perf_counter()
                for _ in range(options.transitions):
                    state = transition(log_density, state)
                objective = _maximize(log_density, state, optimizer, options.gradient_steps)
                trajectory.record(time.perf_counter() - before, objective)
                report(iteration + 1, f"E[log p(x, z)] {objective:.2f}")
                if monitor.update(objective / batch.total):
                    plateaus += 1
                    optimizer.param_groups[0]["lr"] = options.learning_rate * DECAY**plateaus
                if plateaus > PLATEAUS:
                    return MonteCarloEMRun(trajectory, True, False, state)
    except KeyboardInterrupt:
        return MonteCarloEMRun(trajectory, False, True, state)
    return MonteCarloEMRun(trajectory, False, False, state)


def _prior_draws(entry: Entry, batch: Batch, site: str, chains: int, dim: int) -> torch.Tensor:
    with torch.no_grad():
        draws = [poutine.trace(entry).get_trace(batch).nodes[site]["value"] for _ in range(chains)]
    return torch.stack(draws).reshape(chains, len(batch.x), dim)


def _maximize(
    log_density: Callable[[torch.Tensor], torch.Tensor], state: HMCState, optimizer: torch.optim.Optimizer, steps: int
) -> float:
    objective = 0.0
    for step in range(steps):
        optimizer.zero_grad()
        loss = -log_density(state.z).mean(0).sum()
        loss.backward()
        optimizer.step()
        objective = -float(loss.detach()) if step == 0 else objective
    return objective

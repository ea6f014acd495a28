"""Expectation maximisation: one loop over statistics that add up."""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elbozoo.inference.convergence import MonotoneMonitor
from elbozoo.inference.progress import progress_bar
from elbozoo.inference.trajectory import Trajectory
from elbozoo.models.contract.entry import Entry, SupportsEM
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.contract.options import Field, Options

RESTARTS_OF_MIXTURES = 10


class EMOptions(Options):
    """Options of EM."""

    restarts: int | None = Field(
        None, ge=1, description="starts, of which the best is kept; none takes 10 for discrete latents, else 1"
    )
    iterations: int = Field(10_000, ge=1, description="most iterations of each start")
    tolerance: float = Field(1e-6, gt=0, description="gain still to come, nats per datum, at which EM has converged")
    chunk: int = Field(65_536, ge=1, description="rows in a chunk of the E step")


class EMRun(NamedTuple):
    """One start of EM: the parameters it ended with, its record, how it ended, what is wrong or left to do."""

    state: dict[str, Tensor]
    log_evidence: float
    trajectory: Trajectory
    converged: bool
    interrupted: bool
    degeneracy: str | None
    unfinished: str | None

    @property
    def notes(self) -> list[str]:
        """What a reader of the figures should know."""
        return [note for note in (self.degeneracy, self.unfinished) if note]


def run_em(entry: Entry, x: Tensor, options: EMOptions, *, seed: int, progress: bool = True) -> EMRun:
    """Set θ of ``entry`` to the best of several starts of EM on the rows ``x`` (N, D).

    A start without a collapsed component is preferred to one with; the first start is from the
    parameters that ``entry`` has.

    Raises
    ------
    NumericalFailure
        If the log-likelihood falls by more than rounding, or is not finite.
    """
    restarts = options.restarts or (RESTARTS_OF_MIXTURES if entry.latent_sites()[0].is_discrete else 1)
    best: EMRun | None = None
    with progress_bar(f"{entry.name()} em", restarts, progress) as report:
        for restart in range(restarts):
            if restart > 0:
                with isolated(seed + 1_000_003 * restart):
                    entry.initialize(x, restart)
            run = _one_start(entry, x, options)
            if best is None or _rank(run) > _rank(best):
                best = run
            report(restart + 1, f"log p(x) {best.log_evidence:.2f}")
            if run.interrupted:
                break
    assert best is not None
    entry.load_state_dict(best.state)
    return best


def expected_statistics(entry: Entry, x: Tensor, chunk: int) -> Any:
    """E step over chunks of rows: the sum of the entry's statistics."""
    assert isinstance(entry, SupportsEM)
    total: Any = None
    for part in x.split(chunk):
        statistics = entry.expected_statistics(part)
        total = statistics if total is None else type(total)(*map(torch.add, total, statistics))
    return total


def _one_start(entry: Entry, x: Tensor, options: EMOptions) -> EMRun:
    assert isinstance(entry, SupportsEM)
    monitor, trajectory = MonotoneMonitor(options.tolerance, entry.count(x)), Trajectory(is_elbo=True)
    converged = interrupted = False
    with torch.no_grad():
        try:
            for _ in range(options.iterations):
                before = time.perf_counter()
                statistics = expected_statistics(entry, x, options.chunk)
                log_evidence = float(statistics.log_evidence)
                converged = monitor.update(log_evidence)
                if not converged:
                    entry.maximize(statistics)
                trajectory.record_exact(time.perf_counter() - before, log_evidence)
                if converged:
                    break
        except KeyboardInterrupt:
            interrupted = True
    state = {name: value.clone() for name, value in entry.state_dict().items()}
    degeneracy = entry.degeneracy(x) if hasattr(entry, "degeneracy") else None
    unfinished = None if converged or interrupted else monitor.unfinished()
    log_evidence = monitor.history[-1] if monitor.history else -math.inf
    return EMRun(state, log_evidence, trajectory, converged, interrupted, degeneracy, unfinished)


def _rank(run: EMRun) -> tuple[bool, float]:
    return run.degeneracy is None, run.log_evidence
